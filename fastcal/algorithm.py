"""Algorithms: how each picks a tensor's scale from its histogram, and what a cache and a record say of it.

The rules were measured on TensorRT 8.6.0: known inputs in, scales out of the caches that TensorRT wrote. They reproduce
those scales to the last bit.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fastcal.errors import CacheError, FastcalError
from fastcal.observe.histogram import BINS, Histogram, Observations
from fastcal.versions import version_number, version_of_number

#: INT8's largest value: a scale is amax, or the threshold, over this.
INT8_MAX = np.float32(127)

#: The fewest bins that the entropy algorithms keep below the threshold, and the number of levels they compare with.
LEVELS = 128

#: The names of the algorithms, with their names in the headers of caches; Legacy calibration's header has none.
_HEADERS = {
    "entropy2": "EntropyCalibration2",
    "entropy": "EntropyCalibration",
    "minmax": "MinMaxCalibration",
    "percentile": None,
}

ALGORITHMS = tuple(_HEADERS)

#: The names of the algorithms whose header has a TensorRT version.
VERSIONED = tuple(name for name, header in _HEADERS.items() if header is not None)

#: The share of values that "percentile" does not clip, if none is given.
DEFAULT_QUANTILE = 0.9999

#: The regression cutoff at which TensorRT's Legacy calibration is a plain percentile.
_NO_REGRESSION = 1.0

#: Scales outside these bounds belong to no tensor of a network: they come from a damaged cache, or from a mask of
#: float32's lowest number.
_BOUNDS = 1e-30, 1e30

_LARGEST = np.finfo(np.float32).max

# Divergences closer than this are equal: prefix sums leave rounding noise of about 1e-13, and a rule decides among
# equal candidates, not the noise.
_TIE = 1e-10


@dataclass(frozen=True)
class Algorithm:
    """An algorithm that picks scales from histograms.

    Attributes:
        name: "entropy2" (which TensorRT recommends for convolutional networks), "entropy" (picks the scales of
            "entropy2" and has a header of its own), "minmax" (clips nothing) or "percentile" (TensorRT's Legacy
            calibration).
        quantile: For "percentile", the share of values that is not clipped, in (0, 1]; by default 0.9999. None for the
            others.
        cutoff: For "percentile", Legacy calibration's regression cutoff; by default 1, for none. None for the others.

    Raises:
        FastcalError: There is no such algorithm, or it does not take the quantile.
    """

    name: str = "entropy2"
    quantile: float | None = None
    cutoff: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _HEADERS:
            raise FastcalError(f"there is no algorithm {self.name!r}; choose one of {', '.join(ALGORITHMS)}")
        if self.has_version:
            if self.quantile is not None or self.cutoff is not None:
                raise FastcalError(f"algorithm {self.name} takes no quantile and no cutoff; leave them out")
            return
        for name, default in (("quantile", DEFAULT_QUANTILE), ("cutoff", _NO_REGRESSION)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @classmethod
    def of(cls, algorithm: "str | Algorithm", quantile: float = DEFAULT_QUANTILE) -> "Algorithm":
        """Return `algorithm` itself, or the one of that name, with `quantile` if it has one.

        Raises:
            FastcalError: There is no such algorithm, or the quantile is not in (0, 1].
        """
        if isinstance(algorithm, Algorithm):
            return algorithm
        if not 0 < quantile <= 1:
            raise FastcalError(f"quantile {quantile} is not in (0, 1]; 0.9999 clips one value in ten thousand")
        return cls("percentile", quantile) if algorithm == "percentile" else cls(algorithm)

    @classmethod
    def of_header(cls, line: str) -> "tuple[Algorithm, str | None] | None":
        """Return the algorithm and the TensorRT version in `line`, a cache's header; None if it is not a header."""
        match = re.fullmatch(r"TRT-(\d{4}|\d{6})-(\w+)\s*", line)
        for name, kind in _HEADERS.items():
            if match and kind == match[2]:
                return cls(name), version_of_number(match[1])
        match = re.fullmatch(r"0 ([0-9a-f]{1,16}) ([0-9a-f]{1,16})\s*", line)
        if match is None:
            return None
        cutoff, quantile = (from_hex(digits, ">d") for digits in match.groups())
        if not (math.isfinite(cutoff) and math.isfinite(quantile)):
            return None
        return cls("percentile", quantile, cutoff), None

    def header(self, tensorrt_version: str | None) -> str:
        """Return the first line of a cache, without its line end.

        It names `tensorrt_version`, "major.minor.patch"; for Legacy calibration the cutoff and the quantile instead.

        Raises:
            FastcalError: There is no such version, or none is given where the header needs one; or the quantile or the
                cutoff is not a finite number that a float64 holds.
        """
        kind = _HEADERS[self.name]
        if kind is None:
            return f"0 {_finite_hex(self.cutoff, 'the cutoff')} {_finite_hex(self.quantile, 'the quantile')}"
        if tensorrt_version is None:
            raise CacheError(f"a cache of algorithm {self.name} needs a TensorRT version, e.g. 10.16.1")
        return f"TRT-{version_number(tensorrt_version)}-{kind}"

    @property
    def settings(self) -> dict[str, Any]:
        """The algorithm's entries in a cache's record."""
        if self.has_version:
            return {"algorithm": self.name}
        return {"algorithm": self.name, "quantile": self.quantile, "regression_cutoff": self.cutoff}

    @property
    def has_version(self) -> bool:
        """True if the header of the algorithm's caches names a TensorRT version."""
        return self.name in VERSIONED

    @property
    def is_known(self) -> bool:
        """True if fastcal can pick the scales: only TensorRT knows the rule of a regression cutoff below 1."""
        return self.cutoff in (None, _NO_REGRESSION)

    def pick(self, histogram: Histogram) -> float:
        """Return the scale for a tensor's `histogram`, exactly a float32; 0.0 for a tensor that is always 0."""
        if self.name == "minmax":
            return float(np.float32(histogram.amax) / INT8_MAX)
        if histogram.range == 0.0:
            return 0.0
        counts, widths = histogram.counts[None], np.array([histogram.width], np.float32)
        if self.name == "percentile":
            return float(percentile_scales(counts, widths, self.quantile or 1.0)[0])
        return float(entropy_scales(counts, widths)[0])

    def pick_all(self, histograms: Mapping[str, Histogram]) -> dict[str, float]:
        """Return the scale of every tensor in `histograms`, in the same order, picked on all cores."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "fastcal-scales") as pool:
            return dict(zip(histograms, pool.map(self.pick, histograms.values()), strict=True))

    def scales(self, observed: Observations) -> dict[str, float]:
        """Return the scale of every tensor in `observed`, a calibration's observations; shared scales are shared."""
        scales = self.pick_all(observed.histograms)
        shared = observed.shared_scales.items()
        return scales | {name: scales[source] for name, source in shared if {name, source} <= scales.keys()}


def percentile_scales(counts: Any, widths: Any, quantile: float) -> Any:
    """Return the scales of TensorRT's Legacy calibration with regression cutoff 1; arrays as for `entropy_scales`.

    The threshold is the upper end of the first bin at which the cumulative count, bin 0 included, exceeds
    quantile * total (or is the total, for a quantile of 1).
    """
    cumulative = np.cumsum(counts, axis=1)
    total = cumulative[:, -1:]
    bins = 1 + np.argmax((cumulative > quantile * total) | (cumulative == total), axis=1)
    return _scales(bins, widths)


def entropy_scales(counts: Any, widths: Any) -> Any:
    """Return scales whose INT8 histogram diverges least from the float one: TensorRT's Entropy and Entropy2.

    A candidate i, from 128 to 2048, is the number of bins below the threshold. The smallest divergence wins; among
    equal divergences, the largest candidate. scale = float32(float32(i + 0.5) * width) / 127. `counts` is int64 of
    shape (tensors, 2048); the bins' `widths` and the result are float32 of shape (tensors,).
    """
    divergence = divergences(counts)
    equal = divergence <= divergence.min(axis=1, keepdims=True) + _TIE
    best = BINS - np.argmax(equal[:, ::-1], axis=1)
    return _scales(best + 0.5, widths)


def _scales(bins: Any, widths: Any) -> Any:
    """Return the scales of thresholds given as numbers of bins, none beyond what float32 holds."""
    with np.errstate(over="ignore"):
        return np.minimum(bins.astype(np.float32) * widths, _LARGEST) / INT8_MAX


def fault_of_scale(scale: float) -> str:
    """Return the reason why a scale is of no use for INT8, e.g. "infinite"; an empty text if it is of use."""
    if math.isnan(scale):
        return "NaN"
    if math.isinf(scale):
        return "infinite"
    if scale <= 0:
        return "negative" if scale < 0 else "0"
    least, most = _BOUNDS
    return "" if least <= scale <= most else f"{scale:g}, absurdly {'small' if scale < least else 'large'}"


def divergences(counts: Any) -> Any:
    """Return the Kullback-Leibler divergence KL(P || Q) of every candidate: float64, shape (tensors, 1921).

    The divergence is infinite if fewer than two bins of P are non-empty, or if bin i-1 is empty in Q but not in P. For
    a candidate i, with bin 1's count in place of bin 0's:

    - P is bins 0 to i-1, with all counts beyond added to bin i-1, over its sum.
    - Q cuts bins 0 to i-1, without the added counts, into 128 groups with edges ceil(j * i / 128), and gives each
      non-empty bin the mean of its group's non-empty bins; over its sum.

    Within a group log Q is one constant. So the group's part of the divergence needs only the group's sum and its
    number of non-empty bins, which are differences of prefix sums: no loop over bins.
    """
    counts = counts.astype(np.float64)
    counts[:, 0] = counts[:, 1]
    candidates, edges = _candidates()

    sums = _prefix_sums(counts)
    nonempty = _prefix_sums((counts > 0).astype(np.float64))
    terms = _x_log_x(counts)
    total, inside, last = sums[:, -1:], sums[:, candidates], counts[:, candidates - 1]
    beyond = total - inside

    group_sums = np.diff(sums[:, edges], axis=2)
    group_bins = np.diff(nonempty[:, edges], axis=2)
    log_q = np.log(np.where(group_sums > 0, group_sums, 1.0) / np.maximum(group_bins, 1.0))

    p_log_p = _prefix_sums(terms)[:, candidates] - terms[:, candidates - 1] + _x_log_x(last + beyond)
    p_log_q = (group_sums * log_q).sum(axis=2) + beyond * log_q[:, :, -1]
    some, all_of_it = np.maximum(inside, 1.0), np.maximum(total, 1.0)
    divergence = (p_log_p - p_log_q) / all_of_it - np.log(all_of_it) + np.log(some)
    impossible = (nonempty[:, candidates] < 2) | ((last == 0) & (beyond > 0))
    return np.where(impossible, np.inf, divergence)


@cache
def _candidates() -> tuple[Any, Any]:
    """Return the candidates and the edges of the groups of each: int arrays of shape (1921,) and (1921, 129)."""
    candidates = np.arange(LEVELS, BINS + 1)
    return candidates, -(-np.arange(LEVELS + 1) * candidates[:, None] // LEVELS)


def _prefix_sums(values: Any) -> Any:
    """Return the sums of the first 0, 1, ... values along the last axis, one more than there are values."""
    return np.concatenate([np.zeros_like(values[:, :1]), np.cumsum(values, axis=1)], axis=1)


def _x_log_x(values: Any) -> Any:
    return values * np.log(np.where(values > 0, values, 1.0))


def packed(value: Any, form: str, label: str) -> bytes:
    """Return a number of any library in a form of `struct`, ">f" or ">d"; raise CacheError, with `label`, if none."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise CacheError(f"{label} is {value!r}; it must be a number")
    try:
        return struct.pack(form, float(value))
    except OverflowError as error:
        raise CacheError(f"{label} is too large for a float{8 * struct.calcsize(form)}") from error
    except (TypeError, ValueError) as error:  # an array of several numbers, for instance
        raise CacheError(f"{label} is {value!r}; it must be a number") from error


def to_hex(value: Any, form: str, label: str) -> str:
    """Return the hexadecimal digits of a number as TensorRT's caches have them: big-endian, without leading zeros."""
    return packed(value, form, label).hex().lstrip("0") or "0"


def _finite_hex(value: Any, label: str) -> str:
    digits = to_hex(value, ">d", label)
    if not math.isfinite(value):
        raise CacheError(f"{label} is {float(value)}; it must be a finite number")
    return digits


def from_hex(digits: str, form: str) -> float:
    """Return the number that `to_hex` wrote."""
    value: float = struct.unpack(form, bytes.fromhex(digits.strip().zfill(2 * struct.calcsize(form))))[0]
    return value
