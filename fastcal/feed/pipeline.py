"""The DALI pipeline that reads, decodes and prepares images."""

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from fastcal.feed.chunks import Chunk
from fastcal.feed.codecs import chosen_codecs
from fastcal.feed.jpeg import has_end_of_image
from fastcal.feed.preprocess import Preprocess
from fastcal.feed.signatures import kind_of_content
from fastcal.feed.sources import ImageSource, UnreadableError

_END_OF_JPEG = (0xFF, 0xD9)
_END_OF_PNG = (0x60, 0x82)

#: The bytes at the beginning of a file that tell its kind.
_HEAD = 4096

#: Pushes an exact .5 below .5 for any number of pixels, and changes no other rounding.
_LITTLE = 1e-5

_INTERPOLATIONS = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
_DECODED = {"RGB": types.RGB, "BGR": types.BGR, "GRAY": types.GRAY, "RGBA": types.ANY_DATA}
_DEPTHS = {8: types.UINT8, 16: types.UINT16}


@dataclass(frozen=True)
class ImageInput:
    """An input that takes images."""

    source: ImageSource
    preprocess: Preprocess

    def is_fed_like(self, other: "ImageInput") -> bool:
        """Return whether a pipeline for this input takes the samples of the other one too."""
        return self.source.is_read_by_dali == other.source.is_read_by_dali


class ImagePipeline:
    """Turns encoded images into a network's inputs, on the CPU or on a GPU.

    Chunks are submitted and collected in the same order; up to `ahead` may be under way.

    Args:
        most: The largest number of samples in a chunk.
        ahead: DALI's prefetch queue depth. DALI begins its work when so many chunks have been submitted.

    Attributes:
        inputs: The inputs by name. Others with other samples may take their places between two passes.
        has_begun: Whether `ahead` chunks have been submitted.
        process: The process that made the pipeline. In a fork of it the pipeline has no threads.
    """

    def __init__(
        self,
        inputs: Mapping[str, ImageInput],
        *,
        most: int,
        threads: int = 1,
        gpu: int | None,
        ahead: int = 1,
        hw_decoder_load: float = 0.0,
        decode_on_cpu: bool = False,
    ) -> None:
        self.ahead = ahead
        self.under_way: deque[Chunk] = deque()
        self.inputs = inputs
        self.has_begun = False
        self.process = os.getpid()
        self._gpu = gpu is not None
        self._fetched: Mapping[str, Any] = {}
        self._spare = 0
        decoder: dict[str, Any] = {"device": "cpu"}
        is_plain = all(value.preprocess.bits == 8 and not value.source.has_alpha for value in inputs.values())
        if self._gpu and is_plain and not decode_on_cpu:
            # Fancy upsampling interpolates colours; on the CPU there is no other way.
            decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True}
        self._pipeline = Pipeline(batch_size=most, num_threads=threads, device_id=gpu, prefetch_queue_depth=ahead)
        outputs = []
        with self._pipeline:
            for name, image_input in inputs.items():
                fetched = fn.external_source(name=name, ndim=1, dtype=types.UINT8)
                encoded = image_input.source.read_with_dali(fetched)
                preprocess = image_input.preprocess
                decoded = {"output_type": _DECODED[preprocess.channels], "dtype": _DEPTHS[preprocess.bits]}
                images = fn.decoders.image(encoded, **decoded, **decoder)
                shape = fn.peek_image_shape(encoded)
                outputs.append(_prepare(images.gpu() if self._gpu else images, shape, preprocess))
                if self._gpu:  # which decodes a JPEG file that breaks off as far as it goes, without an error
                    outputs.append(encoded[-2:])
            self._pipeline.set_outputs(*outputs)
        with chosen_codecs(on_gpu=decoder["device"] == "mixed"):
            self._pipeline.build()

    def submit(self, chunk: Chunk, fetched: Mapping[str, Any]) -> None:
        """Begin to prepare the samples of a chunk; `fetched` are their data by input, from `Source.fetch`."""
        while self._spare:
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
            self._spare -= 1
        self._feed(fetched)
        self.under_way.append(chunk)
        if self.has_begun:
            self._pipeline.schedule_run()
        else:
            self._fetched = fetched
            if len(self.under_way) == self.ahead:
                self._begin()

    def begin_with_fewer(self) -> None:
        """Begin with fewer chunks under way than DALI begins with: the last one is prepared several times."""
        for _ in range(self.ahead - len(self.under_way)):
            self._feed(self._fetched)
            self._spare += 1
        self._begin()

    def _feed(self, fetched: Mapping[str, Any]) -> None:
        for name in self.inputs:
            self._pipeline.feed_input(name, fetched[name])

    def _begin(self) -> None:
        self._pipeline.schedule_run()  # DALI's first call begins as many chunks as its queue is deep
        self.has_begun, self._fetched = True, {}

    def collect(self, out: Mapping[str, Any] | None, stream: Any = None) -> None:
        """Copy the prepared samples of the oldest chunk into arrays, on a GPU into CuPy arrays on `stream`, later.

        A RuntimeError means that DALI failed or a JPEG file breaks off; then the pipeline cannot be used again.
        """
        outputs = self._pipeline.share_outputs(cuda_stream=stream)
        if self._gpu:
            for image_input, ends in zip(self.inputs.values(), outputs[1::2], strict=True):
                _check_ends(image_input, self.under_way[0].numbers, np.asarray(ends.as_tensor()))
                del ends
            outputs = outputs[::2]
        for name, prepared in zip(self.inputs, outputs, strict=True):
            if out is None:
                pass
            elif self._gpu:
                address, on = ctypes.c_void_p(out[name].data.ptr), ctypes.c_void_p(stream.ptr)
                prepared.copy_to_external(address, cuda_stream=on, non_blocking=True)
            else:
                np.copyto(out[name], np.asarray(prepared.as_tensor()))
            del prepared
        del outputs
        self._pipeline.release_outputs()  # on a GPU in the stream's order: after the copy
        self.under_way.popleft()


def find_unreadable(
    inputs: Iterable[ImageInput], numbers: Sequence[int], gpu: int | None = None, threads: int = 1
) -> Iterator[UnreadableError]:
    """Yield the samples that have an unreadable image: one that cannot be prepared by itself.

    With several threads, all samples are tried at once first, which is faster if most are readable. All are read here
    and not by DALI: an image whose name belies its format is readable.
    """
    for given in inputs:
        image_input = replace(given, source=given.source.read_here())
        if threads > 1 and _are_readable(image_input, numbers, gpu, threads):
            continue
        pipeline: ImagePipeline | None = None
        for number in numbers:
            name = image_input.source.names[number]
            pipeline = pipeline or ImagePipeline({"image": image_input}, most=1, gpu=gpu)
            try:
                if not (head := image_input.source.content(number, _HEAD)):
                    yield UnreadableError(number, f"{name} is empty (0 bytes); replace or remove it")
                    continue
                _try(pipeline, image_input, [number])
            except UnreadableError as error:
                yield error
            except RuntimeError:
                pipeline = None
                kind = kind_of_content(head)
                fault = "damaged, or no image DALI knows" if kind in ("", "image") else f"it is {kind}"
                yield UnreadableError(number, f"{name} cannot be decoded: {fault}; replace or remove it")


def _are_readable(image_input: ImageInput, numbers: Sequence[int], gpu: int | None, threads: int) -> bool:
    try:
        _try(ImagePipeline({"image": image_input}, most=len(numbers), threads=threads, gpu=gpu), image_input, numbers)
    except (UnreadableError, RuntimeError):
        return False
    return True


def _try(pipeline: ImagePipeline, image_input: ImageInput, numbers: Sequence[int]) -> None:
    pipeline.submit(Chunk(list(numbers), numbers[0], 0), {"image": image_input.source.fetch(numbers)})
    pipeline.collect(None)


def _check_ends(image_input: ImageInput, numbers: Sequence[int], ends: Any) -> None:
    """Raise RuntimeError if a JPEG file breaks off; `ends` are the last two bytes of each file."""
    known = (ends == _END_OF_JPEG).all(axis=1) | (ends == _END_OF_PNG).all(axis=1)
    for index in np.flatnonzero(~known):  # few: other formats, and files with something after the image
        number = numbers[int(index)]
        source = image_input.source
        is_jpeg = source.content(number, 2) == b"\xff\xd8"
        if is_jpeg and not has_end_of_image(source.content(number)) and any(find_unreadable([image_input], [number])):
            raise RuntimeError(f"encountered:\n{source.names[number]} breaks off")


def _prepare(images: Any, shape: Any, preprocess: Preprocess) -> Any:
    size, position = _geometry(shape, preprocess)
    interpolation = _INTERPOLATIONS[preprocess.interpolation]
    images = fn.resize(images, size=size, interp_type=interpolation, antialias=preprocess.antialias)
    mean, std = (np.resize(values, preprocess.channel_count).tolist() for values in (preprocess.mean, preprocess.std))
    fill = preprocess.fill
    zero = [0.0] * preprocess.channel_count
    step = 1 if preprocess.bits == 8 else 257  # DALI's 16-bit pixels are 0 to 65535
    return fn.crop_mirror_normalize(
        images,
        crop=preprocess.padded,
        crop_pos_y=position[0],
        crop_pos_x=position[1],
        out_of_bounds_policy="pad",
        fill_values=zero
        if isinstance(fill, str)
        else [(fill * preprocess.scale - m) / s for m, s in zip(mean, std, strict=True)],
        dtype=types.UINT8 if preprocess.dtype == "uint8" else types.FLOAT,
        output_layout="CHW" if preprocess.layout == "NCHW" else "HWC",
        mean=[m * step / preprocess.scale for m in mean],
        std=[s * step / preprocess.scale for s in std],
    )


def _geometry(shape: Any, preprocess: Preprocess) -> tuple[Any, Any]:
    """Return the size to resize an image to, and the position of the network's part in the resized image.

    A position is the part's first pixel as a share of all pixels that are cut off or, if the part is larger, padded;
    DALI multiplies the two and rounds.

    All numbers are whole, and rounded as in the networks' training: torchvision and timm cut off the longer side's
    fraction and round the crop's position half to even; Ultralytics rounds the sizes and puts the odd pixel of the
    padding last. Both sides are computed at once, since an operation on 64 small tensors costs DALI as much time as
    resizing an image.
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
        # DALI rounds a half up. A half that is to be rounded down, to the even number below, is lowered a little:
        # those for which new - target is one more than a multiple of four.
        rest, first = (new, target[0]) if target[0] % 4 == target[1] % 4 else (new - _vector(target), 0)
        place = _look_up(rest & 3, [0.5 - _LITTLE * ((key - first) % 4 == 1) for key in range(4)])
    else:
        # round(a / b) is (2 * a + b) // (2 * b), and here b is the other side, area // size.
        area = shape[0] * shape[1]
        half = area if preprocess.rounding == "nearest" else 0
        new = (size * size * _vector([2 * side for side in target[::-1]]) + half) // (2 * area)
        new = dali_math.clamp(new, 1, _vector(target))
        if preprocess.padding == "end":
            return fn.cast(new, dtype=types.FLOAT), (0.0, 0.0)
        padded = preprocess.padded
        place = _look_up(_vector(padded) - new, [over // 2 / max(over, 1) for over in range(max(padded))])
    return fn.cast(new, dtype=types.FLOAT), (place[0], place[1])


def _look_up(keys: Any, values: Sequence[float]) -> Any:
    return fn.lookup_table(keys, keys=list(range(len(values))), values=list(values), dtype=types.FLOAT)


def _vector(values: Sequence[int]) -> Any:
    return types.Constant(np.array(values, np.int64), device="cpu")
