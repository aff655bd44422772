"""`Handout`: the batches of a feed as TensorRT's builder asks for them, by address."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcal.batch import check_arrays, format_shape, match_names
from fastcal.device import completed, copied, type_of, upload, wait_until_filled
from fastcal.errors import DataError, counted
from fastcal.feed.feed import Batch, Feed, length
from fastcal.progress import Progress

_log = logging.getLogger("fastcal")


@dataclass
class CalibratorStats:
    """Statistics of a calibration inside TensorRT's builder.

    Attributes:
        batches: Batches handed out.
        images: Samples handed out.
        waited: Seconds in `get_batch`, all calls together.
        waited_first: Seconds of these in the first call, which starts the feed.
        waited_worst: Seconds in the longest of the other calls.
        builder_seconds: Seconds between the calls, in which TensorRT observed.
    """

    batches: int = 0
    images: int = 0
    waited: float = 0.0
    waited_first: float = 0.0
    waited_worst: float = 0.0
    builder_seconds: float = 0.0


class Handout:
    """Hands out the addresses of a feed's batches, one batch after another; `ended`: all of them.

    Arrays on the GPU are read where they are; others are copied there. TensorRT reads whole batches: if a feed's last
    batch is smaller, it is completed with the samples of the first one.
    """

    def __init__(self, feed: Feed, progress: Callable[[Progress], None] | None) -> None:
        self.stats = CalibratorStats()
        self.ended = False
        self._feed, self._progress = feed, progress
        self._batches: Iterator[Batch] | None = None
        self._wanted: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._held: list[Any] = []
        self._first: dict[str, Any] = {}  # copies of the first batch's arrays, if the last batch may need them
        self._uploads: dict[str, Any] = {}
        self._left = 0.0
        self._samples = 0  # in the batch handed out last

    def expect(self, wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> bool:
        """Reject arrays of other shapes and types than these, by input name; by default those of the first batch.

        Return whether others were wanted or handed out before.
        """
        before, self._wanted = self._wanted, dict(wanted)
        return before not in ({}, self._wanted)

    def next(self, names: Sequence[str]) -> list[int] | None:
        """Return the device addresses of the next batch, in the order of `names`; None at the end of the batches."""
        entered = time.perf_counter()
        self._report(entered)
        addresses = self._next(names)
        self._count(entered, self._samples if addresses else 0)
        return addresses

    def end(self) -> None:
        """End the pass."""
        batches, self._batches, self._held, self._first = self._batches, None, [], {}
        if batches is not None and hasattr(batches, "close"):
            batches.close()

    def begin_anew(self) -> None:
        """End the pass and forget it."""
        self.end()
        self.ended = False
        self.stats = CalibratorStats()

    def _next(self, names: Sequence[str]) -> list[int] | None:
        if self._batches is None:  # the first batch; or an earlier build ended between its last batch and its cache
            self.begin_anew()
            self._batches = iter(self._feed)
        batch = next(self._batches, None)
        if batch is None:
            total, given = length(self._feed), self.stats.batches
            if not given:
                raise DataError("the feed gave no batches; a calibration needs at least one")
            if total is not None and given < total:
                raise DataError(f"the feed ended after {given} of {total} batches; it was to give all")
            self.end()
            self.ended = True
            return None
        check_arrays("the network", batch)
        arrays = match_names(names, "the network", batch)
        self._samples = self._feed.samples_of(batch)
        if self._feed.may_end_smaller:
            arrays = self._complete(arrays)
        for name, array in arrays.items():
            self._check(name, array)
        self._held = [self._on_device(name, array) for name, array in arrays.items()]
        return [int(array.__cuda_array_interface__["data"][0]) for array in self._held]

    def _complete(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays of a batch, those of fewer samples than a batch has with the first batch's samples."""
        size = self._feed.batch_size
        self._first = self._first or {name: copied(array) for name, array in arrays.items()}
        if self._samples == size:
            return arrays
        said = counted(self._samples, "sample")
        _log.info("the last batch has %s of %d: it is completed with the first", said, size)
        return {
            name: completed(array, self._first[name], size) if array.shape[:1] == (self._samples,) else array
            for name, array in arrays.items()
        }

    def _check(self, name: str, array: Any) -> None:
        shape, dtype = tuple(array.shape), type_of(array)
        wanted_shape, wanted_dtype = self._wanted.setdefault(name, (shape, dtype))
        if shape != wanted_shape:
            raise DataError(
                f"TensorRT reads input {name!r} as {format_shape(wanted_shape)}, the batches are "
                f"{format_shape(shape)}; give batches, or a calibration profile, of that shape"
            )
        if dtype != wanted_dtype:
            raise DataError(f"input {name!r} takes {wanted_dtype}, the batches are {dtype}; convert them")

    def _on_device(self, name: str, array: Any) -> Any:
        """Return a contiguous array on the GPU with the values of `array`: itself, or a copy in memory of `name`."""
        if hasattr(array, "__cuda_array_interface__"):
            if array.__cuda_array_interface__.get("strides") is not None:
                raise DataError(f"input {name!r} is not contiguous in memory; TensorRT reads it as if it were")
            if self._feed.gpu is None:  # a feed on the GPU has waited
                wait_until_filled(array)
            return array
        return upload(array, name, self._uploads)

    def _report(self, now: float) -> None:
        if self._progress is not None and self.stats.batches:
            seconds = self.stats.waited + self.stats.builder_seconds + now - self._left
            stats, total = self.stats, length(self._feed)
            self._progress(Progress(stats.batches, stats.images, total, seconds, stats.waited))

    def _count(self, entered: float, images: int) -> None:
        left = time.perf_counter()
        self.stats.waited += left - entered
        if self.stats.batches:
            self.stats.builder_seconds += entered - self._left
            self.stats.waited_worst = max(self.stats.waited_worst, left - entered)
        else:
            self.stats.waited_first = left - entered
        self.stats.batches += images > 0
        self.stats.images += images
        self._left = left
