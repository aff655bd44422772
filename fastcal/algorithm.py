"""Algorithms: how each picks a tensor's scale from its histogram, and what a cache and a record say of it.

The rules were measured on TensorRT 8.6.0: known inputs in, scales out of the caches that TensorRT wrote. They reproduce
those scales to the last bit.
"""

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastcal.errors import CacheError, FastcalError
from fastcal.observe.histogram import Histogram, Observations
from fastcal.thresholds import EXPONENT, INT8_MAX, entropy_scales, error_scales, percentile_scales
from fastcal.versions import version_number, version_of_number

#: The names of the algorithms, with their names in the headers of caches; Legacy calibration's header has none.
_HEADERS = {
    "entropy2": "EntropyCalibration2",
    "entropy": "EntropyCalibration",
    "minmax": "MinMaxCalibration",
    "percentile": None,
}

#: The names of the algorithms. TensorRT takes a cache of "mse" or "best" under the header of "entropy2".
ALGORITHMS = (*_HEADERS, "mse", "best")

#: The names of TensorRT's algorithms whose header has a TensorRT version.
VERSIONED = tuple(name for name, header in _HEADERS.items() if header is not None)

#: The share of values that "percentile" does not clip, if none is given.
DEFAULT_QUANTILE = 0.9999

#: The regression cutoff at which TensorRT's Legacy calibration is a plain percentile.
_NO_REGRESSION = 1.0

#: Scales outside these bounds belong to no tensor of a network: they come from a damaged cache, or from a mask of
#: float32's lowest number.
_BOUNDS = 1e-30, 1e30


@dataclass(frozen=True)
class Algorithm:
    """An algorithm that picks scales from histograms.

    Attributes:
        name: "entropy2" (which TensorRT recommends for convolutional networks), "entropy" (picks the scales of
            "entropy2" and has a header of its own), "minmax" (clips nothing), "percentile" (TensorRT's Legacy
            calibration), "mse" (the least expected error of rounding and clipping; no algorithm of TensorRT's) or
            "best" (those scales of the others that cost the network's outputs least: a calibration must find them).
        quantile: For "percentile", the share of values that is not clipped, in (0, 1]; by default 0.9999. None for the
            others.
        cutoff: For "percentile", Legacy calibration's regression cutoff; by default 1, for none. None for the others.
        keeps_ranges: Whether no scale may clip an output of the network, or a tensor whose range is known. TensorRT
            clips these too, and so do None and False; with None a cache of either kind is up to date.

    Raises:
        FastcalError: There is no such algorithm, or it does not take the quantile.
    """

    name: str = "entropy2"
    quantile: float | None = None
    cutoff: float | None = None
    keeps_ranges: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in ALGORITHMS:
            raise FastcalError(f"there is no algorithm {self.name!r}; choose one of {', '.join(ALGORITHMS)}")
        if self.has_version:
            if self.quantile is not None or self.cutoff is not None:
                raise FastcalError(f"algorithm {self.name} takes no quantile and no cutoff; leave them out")
            return
        for name, default in (("quantile", DEFAULT_QUANTILE), ("cutoff", _NO_REGRESSION)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @classmethod
    def of(
        cls, algorithm: "str | Algorithm", quantile: float = DEFAULT_QUANTILE, *, exact: bool | None = None
    ) -> "Algorithm":
        """Return `algorithm` itself, or the one of that name, with `quantile` if it has one.

        `exact` is the opposite of `keeps_ranges`, for an algorithm that is given by its name.

        Raises:
            FastcalError: There is no such algorithm, or the quantile is not in (0, 1].
        """
        if isinstance(algorithm, Algorithm):
            return algorithm
        if not 0 < quantile <= 1:
            raise FastcalError(f"quantile {quantile} is not in (0, 1]; 0.9999 clips one value in ten thousand")
        keeps_ranges = None if exact is None else not exact
        return cls(algorithm, quantile if algorithm == "percentile" else None, keeps_ranges=keeps_ranges)

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
        kind = _HEADERS[self.name if self.is_tensorrts else "entropy2"]
        if kind is None:
            return f"0 {_finite_hex(self.cutoff, 'the cutoff')} {_finite_hex(self.quantile, 'the quantile')}"
        if tensorrt_version is None:
            raise CacheError(f"a cache of algorithm {self.name} needs a TensorRT version, e.g. 10.16.1")
        return f"TRT-{version_number(tensorrt_version)}-{kind}"

    @property
    def settings(self) -> dict[str, Any]:
        """The algorithm's entries in a cache's record."""
        settings: dict[str, Any] = {"algorithm": self.name}
        if self.name == "percentile":
            settings |= {"quantile": self.quantile, "regression_cutoff": self.cutoff}
        if self.name == "mse":
            settings["exponent"] = EXPONENT
        is_known = self.keeps_ranges is not None and self.name != "minmax"
        return settings | ({"keeps_ranges": self.keeps_ranges} if is_known else {})

    @property
    def has_version(self) -> bool:
        """True if the header of the algorithm's caches names a TensorRT version."""
        return self.name != "percentile"

    @property
    def is_known(self) -> bool:
        """True if fastcal can pick the scales: only TensorRT knows the rule of a regression cutoff below 1."""
        return self.cutoff in (None, _NO_REGRESSION)

    @property
    def is_measured(self) -> bool:
        """True if the network must run in INT8 to find the scales, on samples that are held out."""
        return self.name == "best"

    @property
    def is_tensorrts(self) -> bool:
        """True if TensorRT can pick the scales."""
        return self.name in _HEADERS

    def pick(self, histogram: Histogram) -> float:
        """Return the scale for a tensor's `histogram`, exactly a float32; 0.0 for a tensor that is always 0."""
        if self.is_measured:
            raise FastcalError("algorithm best looks at the whole network: use calibrate or tune, or another algorithm")
        if self.name == "minmax":
            return _whole(histogram)
        if self.name == "mse":
            return _by_error([histogram])[0]
        if histogram.range == 0.0:
            return 0.0
        counts, widths = histogram.counts[None], np.array([histogram.width], np.float32)
        if self.name == "percentile":
            return float(percentile_scales(counts, widths, self.quantile or 1.0)[0])
        return float(entropy_scales(counts, widths)[0])

    def pick_all(self, histograms: Mapping[str, Histogram]) -> dict[str, float]:
        """Return the scale of every tensor in `histograms`, in the same order, picked on all cores."""
        if self.name == "mse":
            return dict(zip(histograms, _by_error(list(histograms.values())), strict=True))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "fastcal-scales") as pool:
            return dict(zip(histograms, pool.map(self.pick, histograms.values()), strict=True))

    def scales(self, observed: Observations) -> dict[str, float]:
        """Return the scale of every tensor in `observed`, a calibration's observations; shared scales are shared."""
        scales = self.pick_all(observed.histograms)
        scales |= {name: kept for name, (_, kept) in self.kept_ranges(observed).items()}
        shared = observed.shared_scales.items()
        return scales | {name: scales[source] for name, source in shared if {name, source} <= scales.keys()}

    def kept_ranges(self, observed: Observations) -> dict[str, tuple[float, float]]:
        """Return the scales that are raised so that they clip nothing: before and after, by tensor name.

        `observed` has the tensors' histograms, and the least thresholds of those that must not be clipped. If such a
        tensor takes the scale of another one, that one is raised.
        """
        if not self.keeps_ranges or self.name == "minmax":
            return {}
        least: dict[str, float] = {}
        for name, threshold in observed.least_thresholds.items():
            source = observed.shared_scales.get(name, name)
            least[source] = max(threshold, least.get(source, 0.0))
        kept = {}
        histograms = {name: found for name, found in observed.histograms.items() if name in least}
        for name, scale in self.pick_all(histograms).items():
            whole = float(np.float32(max(histograms[name].amax, least[name])) / INT8_MAX)
            if 0 < scale < whole:
                kept[name] = scale, whole
        return kept


def _whole(histogram: Histogram) -> float:
    """Return the scale that clips nothing."""
    return float(np.float32(histogram.amax) / INT8_MAX)


def _by_error(histograms: Sequence[Histogram]) -> list[float]:
    """Return the scales of algorithm "mse": one product of matrices picks them all."""
    if not histograms:
        return []
    counts = np.stack([histogram.counts for histogram in histograms])
    widths = np.array([histogram.width for histogram in histograms], np.float32)
    scales = []
    for histogram, scale in zip(histograms, error_scales(counts, widths).tolist(), strict=True):
        # Many values may be equal to the largest one, as behind a Clip: they are to be exact.
        is_whole = abs(127 * (scale - _whole(histogram))) <= histogram.width
        scales.append(_whole(histogram) if is_whole else scale)
    return scales


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
