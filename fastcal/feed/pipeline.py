"""The DALI pipeline that reads, decodes and prepares images."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from fastcal.errors import FastcalError
from fastcal.feed.preprocess import Preprocess

_DECODED = {"RGB": types.RGB, "BGR": types.BGR, "GRAY": types.GRAY}


class ImagePipeline:
    """Turns image files into a network's input, on the CPU.

    Args:
        preprocess: What the network expects of an image.
        most: The largest number of images in one run.
        threads: How many threads decode.
    """

    def __init__(self, preprocess: Preprocess, most: int, threads: int) -> None:
        self._pipeline = _start(most, threads, lambda encoded: _prepare(encoded, preprocess))

    def run(self, paths: Sequence[str], out: npt.NDArray[np.float32]) -> None:
        """Prepare the images at `paths` into `out`, whose first dimension counts them.

        Raises:
            RuntimeError: DALI failed; the pipeline is of no use any more. `find_unreadable` tells whose fault it is.
        """
        (prepared,) = _run(self._pipeline, paths)
        np.copyto(out, np.asarray(prepared.as_tensor()))


def find_unreadable(paths: Sequence[str], channels: str) -> FastcalError | None:
    """The error that names the first of `paths` that cannot be decoded by itself; None where all can."""
    for path in paths:
        try:
            if not os.path.getsize(path):
                return FastcalError(f"{path} is empty (0 bytes); replace or remove it")
        except OSError as error:
            return FastcalError(f"cannot read {path}: {error.strerror}; it was there when the images were listed")
        try:
            _run(_start(1, 1, lambda encoded: _decode(encoded, channels)), [path])
        except RuntimeError:
            return FastcalError(f"{path} cannot be decoded: damaged, or no image DALI knows; replace or remove it")
    return None


def _start(most: int, threads: int, define: Any) -> Any:
    # A queue of one: the consumer's ring of buffers already works ahead, and a pipeline that does too would have to
    # finish that work before it can be stopped.
    pipeline = Pipeline(batch_size=most, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        names = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        pipeline.set_outputs(define(fn.io.file.read(names)))
    pipeline.build()
    return pipeline


def _run(pipeline: Any, paths: Sequence[str]) -> Any:
    pipeline.feed_input("paths", [np.frombuffer(os.fsencode(path), np.uint8) for path in paths])
    return pipeline.run()


def _decode(encoded: Any, channels: str) -> Any:
    return fn.decoders.image(encoded, device="cpu", output_type=_DECODED[channels])


def _prepare(encoded: Any, preprocess: Preprocess) -> Any:
    images = _decode(encoded, preprocess.channels)
    size, anchor = _geometry(fn.peek_image_shape(encoded), preprocess)
    images = fn.resize(
        images,
        size=fn.cast(size, dtype=types.FLOAT),
        interp_type=types.INTERP_LINEAR,
        antialias=preprocess.antialias,
    )
    images = fn.slice(
        images,
        fn.cast(anchor, dtype=types.INT32),
        list(preprocess.size),
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=[preprocess.fill],
    )
    count = preprocess.channel_count
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW" if preprocess.layout == "NCHW" else "HWC",
        mean=[mean / preprocess.scale for mean in _per_channel(preprocess.mean, count)],
        std=[std / preprocess.scale for std in _per_channel(preprocess.std, count)],
    )


def _per_channel(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    return values if len(values) == count else values * count


def _geometry(shape: Any, preprocess: Preprocess) -> tuple[Any, Any]:
    """The size to resize an image to, and where in the result the network's part begins (< 0: padding before it).

    All in whole numbers and rounded as those round who trained the networks: torchvision and timm cut off the longer
    side's fraction and round the crop's place half to even; Ultralytics rounds the sizes and puts the odd pixel of the
    padding last.
    """
    height, width = shape[0], shape[1]
    target_height, target_width = preprocess.size
    if preprocess.resize == "crop":
        covered_height = int(target_height / preprocess.crop_fraction)
        covered_width = int(target_width / preprocess.crop_fraction)
        new_height = dali_math.max(height * covered_width // width, covered_height)
        new_width = dali_math.max(width * covered_height // height, covered_width)
        anchor = [_half_to_even(new_height - target_height), _half_to_even(new_width - target_width)]
    elif preprocess.resize == "letterbox":
        new_height = dali_math.clamp((2 * height * target_width + width) // (2 * width), 1, target_height)
        new_width = dali_math.clamp((2 * width * target_height + height) // (2 * height), 1, target_width)
        anchor = [0 - (target_height - new_height) // 2, 0 - (target_width - new_width) // 2]
    else:
        new_height, new_width = height * 0 + target_height, width * 0 + target_width
        anchor = [height * 0, width * 0]
    return fn.stack(new_height, new_width), fn.stack(*anchor)


def _half_to_even(double: Any) -> Any:
    """Half of a whole number >= 0, rounded to a whole number as Python's round does."""
    half = double // 2
    return half + (double & 1) * (half & 1)
