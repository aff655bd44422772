"""TensorRT's five calibrator classes, fed by a `Feed`.

Any builder that takes TensorRT's own calibrators takes these: `config.int8_calibrator = EntropyCalibrator2(feed)`.
"""

import math
from dataclasses import replace
from typing import Any

from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm
from fastcal.errors import FastcalError
from fastcal.feed.feed import Feed
from fastcal.feed_calibrator import FeedCalibrator, trt


class EntropyCalibrator2(FeedCalibrator, trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
    """TensorRT's `IInt8EntropyCalibrator2`, which TensorRT recommends for convolutional networks.

    Takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` explains them.
    """

    _base, _algorithm = trt.IInt8EntropyCalibrator2, Algorithm("entropy2")


class EntropyCalibrator(FeedCalibrator, trt.IInt8EntropyCalibrator):  # type: ignore[misc]
    """TensorRT's `IInt8EntropyCalibrator`; takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` does."""

    _base, _algorithm = trt.IInt8EntropyCalibrator, Algorithm("entropy")


class MinMaxCalibrator(FeedCalibrator, trt.IInt8MinMaxCalibrator):  # type: ignore[misc]
    """TensorRT's `IInt8MinMaxCalibrator`, which clips nothing.

    Takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` explains them.
    """

    _base, _algorithm = trt.IInt8MinMaxCalibrator, Algorithm("minmax")


class LegacyCalibrator(FeedCalibrator, trt.IInt8LegacyCalibrator):  # type: ignore[misc]
    """TensorRT's `IInt8LegacyCalibrator`. It keeps no histogram cache: see `read_histogram_cache`.

    Args:
        feed: As for the others.
        quantile: The share of values that is not clipped.
        regression_cutoff: With 1, the quantile alone decides; what a lower one does TensorRT does not document.
        **options: `cache`, `model` and `progress`, as for the others.

    Raises:
        FastcalError: The quantile is not in (0, 1].
    """

    _base = trt.IInt8LegacyCalibrator

    def __init__(
        self,
        feed: Any,
        *,
        quantile: float = DEFAULT_QUANTILE,
        regression_cutoff: float = 1.0,
        **options: Any,
    ) -> None:
        self._algorithm = replace(Algorithm.of("percentile", quantile), cutoff=regression_cutoff)
        super().__init__(feed, **options)

    def get_quantile(self) -> float | None:
        """Return the share of values that is not clipped."""
        return self._algorithm.quantile

    def get_regression_cutoff(self) -> float | None:
        """Return the cutoff of the regression; 1 for none."""
        return self._algorithm.cutoff

    def read_histogram_cache(self, *_: Any) -> None:
        """Return no histograms: TensorRT takes them anew.

        TensorRT's Python bindings cannot read histograms back: they reject bytes, and pass the length that a calibrator
        should set as a plain number (seen on 8.6.0).
        """

    def write_histogram_cache(self, *_: Any) -> None:
        """Keep nothing: histograms could not be read back."""


class Calibrator(FeedCalibrator, trt.IInt8Calibrator):  # type: ignore[misc]
    """TensorRT's plain `IInt8Calibrator`.

    Args:
        feed: As for the others.
        algorithm: A `tensorrt.CalibrationAlgoType`.
        **options: `cache`, `model` and `progress`, as for the others.

    Raises:
        FastcalError: There is no such algorithm; or it is Legacy calibration, whose cache names a quantile, and a cache
            is to be kept.
    """

    _base = trt.IInt8Calibrator

    def __init__(
        self,
        feed: Any,
        *,
        algorithm: Any = trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2,
        **options: Any,
    ) -> None:
        if algorithm not in _ALGORITHMS:
            raise FastcalError(f"there is no algorithm {algorithm!r}; give a tensorrt.CalibrationAlgoType")
        self._type = algorithm
        self._algorithm = _ALGORITHMS[algorithm]
        if not self._algorithm.has_version and options.get("cache") is not None:
            raise FastcalError(
                "a cache of Legacy calibration names its quantile: use LegacyCalibrator, or keep no cache"
            )
        super().__init__(feed, **options)

    def get_algorithm(self) -> Any:
        """Return the algorithm, a `tensorrt.CalibrationAlgoType`."""
        return self._type


#: TensorRT asks this class for no quantile, so the one of Legacy calibration is not known here, nor its cutoff.
_ALGORITHMS = {
    trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2: Algorithm("entropy2"),
    trt.CalibrationAlgoType.ENTROPY_CALIBRATION: Algorithm("entropy"),
    trt.CalibrationAlgoType.MINMAX_CALIBRATION: Algorithm("minmax"),
    trt.CalibrationAlgoType.LEGACY_CALIBRATION: Algorithm("percentile", math.nan, math.nan),
}


class ErrorCalibrator(EntropyCalibrator2):
    """TensorRT's `IInt8EntropyCalibrator2` with the scales of algorithm "mse", which `calibrate` must pick."""

    _algorithm = Algorithm("mse")


_CLASSES = {
    "entropy2": EntropyCalibrator2,
    "entropy": EntropyCalibrator,
    "minmax": MinMaxCalibrator,
    "mse": ErrorCalibrator,
}


def make_calibrator(algorithm: Algorithm, feed: Feed, **options: Any) -> FeedCalibrator:
    """Return the calibrator of an algorithm, with the options of its class; raise FastcalError for "best"."""
    if algorithm.is_measured:
        raise FastcalError(
            "no calibrator has algorithm best, which runs the network in INT8: take the cache of fastcal calibrate "
            "--algorithm best, or choose another algorithm"
        )
    if algorithm.name in _CLASSES:
        return _CLASSES[algorithm.name](feed, **options)
    return LegacyCalibrator(feed, quantile=algorithm.quantile or DEFAULT_QUANTILE, **options)
