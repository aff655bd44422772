"""Histograms of |x| as TensorRT's calibrators take them: 2048 bins over a range that doubles when it must.

The rules were measured on TensorRT 8.6.0: known inputs in, scales out of the caches that TensorRT wrote.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.progress import Progress

#: The number of bins of a histogram.
BINS = 2048

#: The share of clipped values from which on a tensor deserves a look.
MANY_CLIPPED = 0.0005


class Histogram:
    """The distribution of one tensor's |x| over all batches so far.

    The largest |x| of the first batch that is not all 0 sets the range; until then all elements lie in bin 0. A bin is
    range / 2048 wide, and x falls into bin min(floor(|x| / width), 2047), divided in float32. When a later batch's
    largest |x| exceeds the range, neighbouring bins are added in pairs and the range doubles, until the batch fits. So
    an element equal to the range lies in bin 2047, and in bin 1023 after a doubling, while an equal element that comes
    after the doubling lands in bin 1024. TensorRT counts the same way.

    The order of batches has no other effect: every range is the first one times a power of two, and the clamp to bin
    2047 acts on elements equal to the range alone. So parts of the batches can be counted apart and put together
    exactly with `append`: each part begins with a range that earlier batches have set, and keeps the number of elements
    that it clamped at each range.

    Args:
        start: A range to begin with: the one that earlier batches have set.

    Attributes:
        counts: int64 array of shape (2048,).
        range: The upper end of the last bin; 0.0 as long as all elements were 0.
        amax: The largest |x|.
        start: The range that the histogram began with.
        clamped: The number of elements that were equal to the range when they were counted, by that range.
        nan: The number of NaN elements; they are in no bin.
        inf: The number of infinite elements; they are in no bin either and do not count for `amax`.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.start = start
        self.range = start
        self.amax = 0.0
        self.clamped: dict[float, int] = {}
        self.nan = 0
        self.inf = 0

    @property
    def width(self) -> float:
        """The width of one bin."""
        return self.range / BINS

    def below(self, x: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the number of counted elements below each of the values `x`, if a bin's elements are spread evenly."""
        counts = np.concatenate([[0], np.cumsum(self.counts)])
        below: npt.NDArray[np.float64] = np.interp(np.asarray(x), np.linspace(0, self.range, BINS + 1), counts)
        return below

    def clipped(self, threshold: float) -> float:
        """Return the share of the counted elements beyond `threshold`, to within its bin; 0.0 from `amax` on."""
        total = int(self.counts.sum())
        if not total or threshold >= self.amax:
            return 0.0
        return 1 - float(self.below(threshold)) / total

    def update(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Count one batch of `values` of any shape; other types are converted to float32."""
        with np.errstate(over="ignore"):  # a float64 that float32 cannot hold counts as infinite
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        batch_amax = max(float(flat.max()), -float(flat.min()))  # NaN if an element is NaN
        if not math.isfinite(batch_amax):
            self.nan += int(np.isnan(flat).sum())
            self.inf += int(np.isinf(flat).sum())
            flat = flat[np.isfinite(flat)]
            batch_amax = float(np.abs(flat).max(initial=0.0))
        self.widen(batch_amax)
        if self.range == 0.0:
            self.counts[0] += flat.size
            return
        counted = _counted(flat, np.float32(self.width))
        self.counts += counted[:BINS]
        if counted[BINS]:
            self.clamped[self.range] = self.clamped.get(self.range, 0) + int(counted[BINS])
            self.counts[-1] += counted[BINS]

    def widen(self, batch_amax: float) -> None:
        """Make room for a batch whose largest |x| is `batch_amax`, before its elements are counted."""
        self.amax = max(self.amax, batch_amax)
        if self.range == 0.0:
            # Equal to batch_amax, unless that is so small (below 2^-115) that the width is rounded, perhaps to 0.
            self.range = float(np.float32(batch_amax / BINS)) * BINS
        if self.range:
            doublings = _doublings(self.range, batch_amax)
            self.counts = _paired(self.counts, doublings)
            self.range = math.ldexp(self.range, doublings)

    def can_append(self, later: "Histogram") -> bool:
        """Return whether `append` takes `later`: it began with a range like ours, 0 too, or has counted only zeros."""
        return not later.amax or math.frexp(self.range)[0] == math.frexp(later.start)[0]

    def append(self, later: "Histogram") -> None:
        """Add `later`, the histogram of later batches, as if they had been counted here."""
        before, self.range = self.range, max(self.range, later.range)
        if self.range:
            self.counts = _paired(self.counts, _doublings(before or self.range, self.range))
            self.counts += _paired(later.counts, _doublings(later.range or self.range, self.range))
        else:
            self.counts += later.counts
        for value, count in later.clamped.items():
            if value < before:  # here the range was larger already when they came
                doublings = _doublings(value, self.range)
                self.counts[BINS - 1 >> doublings] -= count
                self.counts[BINS >> doublings] += count
            else:
                self.clamped[value] = self.clamped.get(value, 0) + count
        self.amax = max(self.amax, later.amax)
        self.nan += later.nan
        self.inf += later.inf


def _counted(flat: npt.NDArray[np.float32], width: np.float32) -> npt.NDArray[np.int64]:
    """Return the number of elements in each bin of that width; one more bin is for elements equal to the range."""
    try:
        from fastcal.observe import count
    except ImportError:  # numba is missing where a GPU counts all but small constants
        bins = np.minimum(np.abs(flat) / width, BINS).astype(np.int32)
        return np.bincount(bins, minlength=BINS + 1).astype(np.int64)
    counted = np.zeros(BINS + 1, np.int64)
    for start in range(0, flat.size, count.MOST):
        count.add(flat[start : start + count.MOST], width, counted)
    return counted


def _doublings(lower: float, upper: float) -> int:
    """Return how often `lower` must be doubled to be no less than `upper`."""
    doublings = 0
    while math.ldexp(lower, doublings) < upper:
        doublings += 1
    return doublings


def _paired(counts: npt.NDArray[np.int64], times: int) -> npt.NDArray[np.int64]:
    """Return counts with neighbouring bins added in pairs, that many times."""
    for _ in range(times):
        paired = np.zeros_like(counts)
        paired[: BINS // 2] = counts.reshape(-1, 2).sum(axis=1)
        counts = paired
    return counts


class Histograms(dict[str, Histogram], AbstractContextManager["Histograms"]):
    """Histograms by tensor name, counted on all cores; a context manager that ends its threads."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        self._pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "fastcal-histogram")

    def update_all(self, activations: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
        """Count one batch of every tensor's values."""
        largest_first = sorted(activations, key=lambda name: -activations[name].size)
        for name in activations:
            self.setdefault(name, Histogram())
        for counted in [self._pool.submit(self[name].update, activations[name]) for name in largest_first]:
            counted.result()

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Observations:
    """A network's tensors, observed over the batches of a calibration; every algorithm can pick scales from them.

    Attributes:
        network: The path of the ONNX file, or the network's name.
        backend: The backend that ran the network: "onnxruntime" or "tensorrt".
        precision: The precision in which it ran: "FP32" or "TF32".
        histograms: The histogram of every tensor's |x|, by tensor name.
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.
        progress: The state of the calibration after each batch.
        least_thresholds: Tensors that must not be clipped: name to the least threshold that the scale must cover; 0 for
            the largest |x|.
        skipped: The samples that were unreadable.
    """

    network: str
    backend: str
    precision: str
    histograms: Mapping[str, Histogram]
    shared_scales: Mapping[str, str]
    progress: Sequence[Progress]
    least_thresholds: Mapping[str, float] = field(default_factory=dict)
    skipped: Sequence[str] = ()
