"""The DALI pipeline that reads, decodes and prepares images."""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from fastcal.errors import FastcalError
from fastcal.feed.preprocess import Preprocess

_END_OF_JPEG = (0xFF, 0xD9)
_END_OF_PNG = (0x60, 0x82)

#: Moves a half below a half for any number of pixels, and no other number of pixels to another.
_LITTLE = 1e-5

_INTERPOLATIONS = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
_DECODED = {"RGB": types.RGB, "BGR": types.BGR, "GRAY": types.GRAY}


class ImagePipeline:
    """Turns image files into a network's input.

    Runs are submitted and collected in the same order; up to `ahead` may be under way.

    Args:
        preprocess: What the network expects of an image.
        most: The largest number of images in one run.
        threads: How many threads read and decode.
        gpu: The number of the GPU to work on; None for the CPU.
        ahead: How many runs are under way, DALI's prefetch queue depth. The first is worked on once so many have been
            submitted.
        hw_decoder_load: The share of JPEG images that a GPU's own JPEG decoder is given, where it has one.
    """

    def __init__(
        self, preprocess: Preprocess, *, most: int, threads: int, gpu: int | None, ahead: int, hw_decoder_load: float
    ) -> None:
        self.ahead = ahead
        self.under_way: deque[Sequence[str]] = deque()
        self._started = False
        self._gpu = gpu is not None
        decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if self._gpu else {"device": "cpu"}

        def define(encoded: Any) -> Any:
            prepared = _prepare(encoded, preprocess, decoder)
            # A GPU decodes what there is of a JPEG file that breaks off, and says nothing.
            return (prepared, encoded[-2:]) if self._gpu else (prepared,)

        self._pipeline = _define(most, threads, gpu, ahead, define)

    def submit(self, paths: Sequence[str]) -> None:
        """Begin to prepare the images at `paths`."""
        self._pipeline.feed_input("paths", _names(paths))
        self.under_way.append(paths)
        if self._started:
            self._pipeline.schedule_run()
        elif len(self.under_way) == self.ahead:
            self._pipeline.schedule_run()  # DALI's first call begins as many runs as its queue is deep
            self._started = True

    def collect(self, out: Any, stream: Any = None) -> None:
        """Copy what was prepared in the oldest run into `out`.

        Args:
            out: float32 array whose first dimension counts the run's images: NumPy's or, on a GPU, CuPy's.
            stream: On a GPU, the stream to copy on; the copy is under way when this returns.

        Raises:
            RuntimeError: DALI failed, or a JPEG file breaks off; the pipeline is of no use any more. `find_unreadable`
                tells whose fault it is.
        """
        prepared, *ends = self._pipeline.share_outputs(cuda_stream=stream)
        if self._gpu:
            _check_ends(self.under_way[0], np.asarray(ends[0].as_tensor()))
            address, on = ctypes.c_void_p(out.data.ptr), ctypes.c_void_p(stream.ptr)
            prepared.copy_to_external(address, cuda_stream=on, non_blocking=True)
        else:
            np.copyto(out, np.asarray(prepared.as_tensor()))
        del prepared, ends
        self._pipeline.release_outputs()  # on a GPU in the stream's order: after the copy
        self.under_way.popleft()


def find_unreadable(paths: Iterable[str], channels: str) -> FastcalError | None:
    """The error that names the first of `paths` that cannot be decoded by itself; None where all can."""
    for path in paths:
        try:
            if not os.path.getsize(path):
                return FastcalError(f"{path} is empty (0 bytes); replace or remove it")
        except OSError as error:
            return FastcalError(f"cannot read {path}: {error.strerror}; it was there when the images were listed")
        try:
            pipeline = _define(1, 1, None, 1, lambda encoded: (_decode(encoded, channels, {"device": "cpu"}),))
            pipeline.feed_input("paths", _names([path]))
            pipeline.run()
        except RuntimeError:
            return FastcalError(f"{path} cannot be decoded: damaged, or no image DALI knows; replace or remove it")
    return None


def _define(most: int, threads: int, gpu: int | None, ahead: int, define: Callable[[Any], Any]) -> Any:
    pipeline = Pipeline(batch_size=most, num_threads=threads, device_id=gpu, prefetch_queue_depth=ahead)
    with pipeline:
        names = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        # Reading is twice as fast as mapping files of this size into memory.
        pipeline.set_outputs(*define(fn.io.file.read(names, dont_use_mmap=True)))
    pipeline.build()
    return pipeline


def _names(paths: Sequence[str]) -> Any:
    """Paths as DALI reads them: a row of bytes each, zeros at the end, which no path holds and the system ignores."""
    return np.array([os.fsencode(path) for path in paths]).view(np.uint8).reshape(len(paths), -1)


def _check_ends(paths: Sequence[str], ends: Any) -> None:
    """Raise RuntimeError if a JPEG file breaks off; `ends` are the last two bytes of each file."""
    known = (ends == _END_OF_JPEG).all(axis=1) | (ends == _END_OF_PNG).all(axis=1)
    for index in np.flatnonzero(~known):  # few: other formats, and what has something after the image
        path = paths[int(index)]
        with open(path, "rb") as file:
            is_jpeg = file.read(2) == b"\xff\xd8"
            if is_jpeg and not _has_end_of_image(b"\xff\xd8" + file.read()) and find_unreadable([path], "RGB"):
                raise RuntimeError(f"encountered:\n{path} breaks off")


def _has_end_of_image(jpeg: bytes) -> bool:
    """Whether there is an end-of-image marker after the first scan begins (an EXIF thumbnail before has one too)."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.find(b"\xff\xd9", place) >= 0


def _decode(encoded: Any, channels: str, decoder: Mapping[str, Any]) -> Any:
    return fn.decoders.image(encoded, output_type=_DECODED[channels], **decoder)


def _prepare(encoded: Any, preprocess: Preprocess, decoder: Mapping[str, Any]) -> Any:
    images = _decode(encoded, preprocess.channels, decoder)
    size, position = _geometry(fn.peek_image_shape(encoded), preprocess)
    images = fn.resize(
        images,
        size=size,
        interp_type=_INTERPOLATIONS[preprocess.interpolation],
        antialias=preprocess.antialias,
    )
    count = preprocess.channel_count
    mean, std = _per_channel(preprocess.mean, count), _per_channel(preprocess.std, count)
    return fn.crop_mirror_normalize(
        images,
        crop=preprocess.size,
        crop_pos_y=position[0],
        crop_pos_x=position[1],
        out_of_bounds_policy="pad",
        fill_values=[(preprocess.fill * preprocess.scale - m) / s for m, s in zip(mean, std, strict=True)],
        dtype=types.FLOAT,
        output_layout="CHW" if preprocess.layout == "NCHW" else "HWC",
        mean=[m / preprocess.scale for m in mean],
        std=[s / preprocess.scale for s in std],
    )


def _per_channel(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    return values if len(values) == count else values * count


def _geometry(shape: Any, preprocess: Preprocess) -> tuple[Any, Any]:
    """The size to resize an image to, and the place of the network's part in it.

    A place is the part's first pixel as a share of all pixels that are cut off or, where it is larger, padded; DALI
    multiplies the two and rounds.

    All in whole numbers and rounded as those round who trained the networks: torchvision and timm cut off the longer
    side's fraction and round the crop's place half to even; Ultralytics rounds the sizes and puts the odd pixel of the
    padding last. Both sides are reckoned at once, since each operation on 64 small tensors costs DALI what resizing an
    image does.
    """
    target = preprocess.size
    if preprocess.resize == "stretch":
        return list(target), (0.0, 0.0)
    size = shape[:2]
    if preprocess.resize == "crop":
        covered = preprocess.covered
        if covered[0] == covered[1]:
            new = size * covered[0] // fn.reductions.min(size)
        else:
            area = shape[0] * shape[1]  # so that size * size / area is each side over the other
            new = dali_math.max(size * size * _vector(covered[::-1]) // area, _vector(covered))
        over = new - (target[0] if target[0] == target[1] else _vector(target))
        # DALI rounds a half up: halves that are to be rounded down, to the even number below, begin a little lower.
        place = 0.5 - (over & 3 == 1) * _LITTLE
    else:
        # round(a / b) is (2 * a + b) // (2 * b), and here b is the other side, area // size.
        area = shape[0] * shape[1]
        new = (2 * size * size * _vector(target[::-1]) + area) // (2 * area)
        new = dali_math.clamp(new, 1, _vector(target))
        over = _vector(target) - new
        place = over // 2 / dali_math.max(over, 1)
    return fn.cast(new, dtype=types.FLOAT), (place[0], place[1])


def _vector(values: Sequence[int]) -> Any:
    return types.Constant(np.array(values, np.int64), device="cpu")
