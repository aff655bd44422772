"""TensorRT's five calibrator classes, fed by a `Feed`.

They are handed to any builder that takes TensorRT's own: `config.int8_calibrator = EntropyCalibrator2(feed)`. TensorRT
swallows what a calibrator raises: it takes an exception in `get_batch` for the end of the data, builds the engine and
writes a cache from what it got so far (seen on 8.6.0). These calibrators remember it, write no cache, and raise it as
soon as they can: when `with calibrator:` around the build ends, or at `calibrator.check()`.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastcal.cache import CalibrationCache, check_algorithm, check_tensorrt_version
from fastcal.errors import GPU_EXTRAS, FastcalError
from fastcal.feed.arrays import ArrayFeed
from fastcal.feed.device import type_of, upload, wait_until_filled
from fastcal.feed.feed import Batch, Feed, length
from fastcal.model import Model, format_shape, match_names
from fastcal.progress import Progress
from fastcal.record import Record, check_cache_writable, precision, usable_cache

try:
    import tensorrt as trt
except (ImportError, OSError) as error:
    raise FastcalError(
        f"TensorRT's calibrators need TensorRT 8.6 to 10.16, which cannot be imported ({error}): {GPU_EXTRAS}; "
        "without it, fastcal calibrate writes a cache"
    ) from error
if not hasattr(trt, "IInt8EntropyCalibrator2"):
    raise FastcalError(
        f"TensorRT {trt.__version__} has no calibrators (gone from 11.0): calibrate with fastcal calibrate, and carry "
        "the scales in the model as QuantizeLinear and DequantizeLinear nodes"
    )

_log = logging.getLogger("fastcal")


@dataclass
class CalibratorStats:
    """How a calibration inside TensorRT's builder went.

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


class FeedCalibrator:
    """What the five classes share: what TensorRT calls, and what it must not lose.

    Args:
        feed: The batches: a `Feed`, or what `ArrayFeed` takes, with the inputs of `model` for its names. A feed's
            arrays on the GPU are read where they are; others are copied there.
        cache: Where to keep the cache. It is used while it is true: its header and the record beside it must name the
            same algorithm, TensorRT version, model (where known), samples in order and preprocessing; else TensorRT
            calibrates again and the log says what differs. The old file is replaced when the new one is complete.
        model: The ONNX file that will be calibrated, for that record.
        progress: Called in `get_batch` before a batch is fetched, with the batches that TensorRT is through with; the
            time it takes is waited for.

    Attributes:
        feed: The batches.
        stats: How the calibration under way, or the last one, went.
    """

    #: TensorRT's class, and the algorithm as `CalibrationCache` names it.
    _base: Any
    _algorithm: str

    def __init__(
        self,
        feed: Any,
        *,
        cache: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | Model | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._batches: Iterator[Batch] | None = None
        self._base.__init__(self)
        self._model = None if model is None else Model.of(model)
        self._owns_feed = not isinstance(feed, Feed)
        names = None if self._model is None else [value.name for value in self._model.inputs]
        self.feed: Feed = ArrayFeed(feed, names) if self._owns_feed else feed
        self.stats = CalibratorStats()
        self._cache = None if cache is None else Path(cache)
        self._progress = progress
        self._wanted: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._held: list[Any] = []
        self._uploads: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._ended = False  # whether all batches have been handed out
        self._finished = False  # whether TensorRT has had its cache written
        self._made_from: Record | None = None
        self._ready: bytes | None = None  # a finished cache to hand over
        self._tf32 = False  # whether fastcal observes in TF32; TensorRT does so in FP32
        self._left = 0.0

    # What TensorRT calls.

    def get_batch_size(self) -> int:
        """The number of samples in a batch; 1 where the feed fails to tell, and then there is no batch."""
        try:
            return self.feed.batch_size
        except BaseException as error:
            self._fail(error)
            return 1

    def get_batch(self, names: Sequence[str], *_: Any) -> list[int] | None:
        """Device addresses of the next batch.

        Args:
            names: The network's inputs, in the order in which TensorRT wants them.

        Returns:
            One address per name, valid until the next call; None at the end of the data, or after an error.
        """
        entered = time.perf_counter()
        try:
            if self._error is not None:
                return None
            self._report(entered)
            addresses = self._next_addresses(names)
        except BaseException as error:  # even Ctrl-C: TensorRT would take it for the end of the data
            self._fail(error)
            return None
        self._count(entered, self.feed.batch_size if addresses else 0)
        return addresses

    def read_calibration_cache(self) -> bytes | None:
        """The cache, if it is what this calibration would make; else None, and TensorRT calibrates.

        TensorRT 8.6.0 asks twice: before the first batch, and after the last, before it has the cache written.
        """
        if self._finished:
            self.rewind()  # another build
        if self._ready is not None:
            return self._ready
        if self._ended or self._error is not None:
            return None
        try:
            return self._usable()
        except BaseException as error:
            self._fail(error)
            return None

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep `cache`, the bytes that TensorRT found, with a record of what it was made from.

        After an error nothing is kept.
        """
        self._finished = True
        if self._cache is None or self._ready is not None:
            return
        try:
            if self._error is not None:
                _log.info("%s is not written: the calibration failed", self._cache)
            elif not self._ended:
                _log.warning("%s is not written: TensorRT has not asked for all batches", self._cache)
            else:
                self._record().after(self.feed).save(self._cache, bytes(cache))
        except BaseException as error:
            self._fail(error)

    # What the application calls.

    def rewind(self) -> None:
        """Begin again: the next `get_batch` hands out the first batch, and an earlier error is forgotten."""
        self._end_pass()
        self._error = None
        self._ended = self._finished = False
        self._made_from = self._ready = None
        self._tf32 = False
        self.stats = CalibratorStats()

    def calibrate(
        self,
        network: Any,
        *,
        tf32: bool = False,
        optimization_level: int | None = None,
        tactic_sources: int | Iterable[str] | None = None,
    ) -> None:
        """Calibrate now with `fastcal.calibrate`, so that TensorRT is handed a finished cache and asks for no batch.

        Belongs inside `with calibrator:`, before the build. Does nothing where the cache on the disk is still true, or
        where only TensorRT knows how: Legacy calibration with a regression cutoff below 1.

        Args:
            network: The `INetworkDefinition` that will be built, or its ONNX file.
            tf32: Whether TensorRT may observe the network in TF32: faster, and an amax differs by about 1e-3.
            optimization_level: As for `fastcal.calibrate`.
            tactic_sources: As for `fastcal.calibrate`.

        Raises:
            FastcalError: TensorRT cannot run the network with every tensor visible, or the batches do not fit it; or
                what the feed raises.
        """
        settings = self._settings()
        if settings["algorithm"] == "percentile" and settings.get("regression_cutoff") != 1:
            _log.info(
                "TensorRT calibrates itself: Legacy calibration is a plain percentile with regression cutoff 1 only"
            )
            return
        self._tf32 = tf32
        if self._usable() is not None:
            return
        from fastcal.observe.calibration import observe
        from fastcal.observe.observer import Engine

        engine = Engine("tensorrt", tf32, optimization_level, tactic_sources)
        observed = observe(network, self.feed, engine, self._progress)
        cache = self._cache_of(observed.scales(settings["algorithm"], settings.get("quantile", 1.0))).to_bytes()
        if self._cache is not None:
            self._record().after(self.feed).save(self._cache, cache)
        self._ready = cache

    def check(self) -> None:
        """Raise what went wrong in the last calibration, if something did."""
        if self._error is not None:
            raise self._error

    def check_network(self, network: Any, config: Any) -> None:
        """Tell the calibrator what TensorRT will read, so that it never reads beyond a batch or only a part of one.

        From now on a batch of another shape or type than the network's inputs is an error.

        Args:
            network: The `INetworkDefinition` that will be calibrated.
            config: The `IBuilderConfig`. Where an input is dynamic, TensorRT reads the shape of its calibration
                profile, whatever shape the batches have.

        Raises:
            FastcalError: An input is dynamic and the config has no calibration profile.
        """
        self._wanted = {}
        for index in range(network.num_inputs):
            value = network.get_input(index)
            self._wanted[value.name] = (_calibrated_shape(value, config), np.dtype(trt.nptype(value.dtype)))

    def __enter__(self) -> "FeedCalibrator":
        self.rewind()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_pass()
        if self._owns_feed:
            self.feed.close()
        if error is None:
            self.check()
        elif self._error not in (None, error) and isinstance(error, Exception):
            raise self._error from error  # that there is no engine, say, is what came of it

    def __del__(self) -> None:
        self._end_pass()

    # The rest.

    def _usable(self) -> bytes | None:
        """The cache on the disk if it is what this calibration would make; else None, if it can be written."""
        if self._cache is None:
            return None
        self._made_from = None  # files may have changed since an earlier build
        data, reason = usable_cache(self._cache, self._cache_of({}).header, self._record())
        if data is None:
            _log.info("calibrating: %s is not used, %s", self._cache, reason)
            check_cache_writable(self._cache, self._model.activations if self._model else ())
        else:
            _log.info("%s is used: it was made from the same model, samples and settings", self._cache)
        return data

    def _next_addresses(self, names: Sequence[str]) -> list[int] | None:
        if self._batches is None:  # perhaps after a build that ended between its last batch and its cache
            self._ended = False
            self.stats = CalibratorStats()
            self._batches = iter(self.feed)
        batch = next(self._batches, None)
        if batch is None:
            total = length(self.feed)
            if not self.stats.batches:
                raise FastcalError("the feed gave no batches; a calibration needs at least one")
            if total is not None and self.stats.batches < total:
                raise FastcalError(f"the feed ended after {self.stats.batches} of {total} batches; it was to give all")
            self._end_pass()
            self._ended = True
            return None
        arrays = match_names(names, "the network", batch, self.feed.anonymous)
        for name, array in arrays.items():
            self._check_array(name, array)
        self._held = [self._on_device(name, array) for name, array in arrays.items()]
        return [_address(array) for array in self._held]

    def _check_array(self, name: str, array: Any) -> None:
        shape, dtype = tuple(array.shape), type_of(array)
        wanted_shape, wanted_dtype = self._wanted.setdefault(name, (shape, dtype))  # or as the first batch
        if shape != wanted_shape:
            raise FastcalError(
                f"TensorRT reads input {name!r} as {format_shape(wanted_shape)}, the batches are "
                f"{format_shape(shape)}; give batches, or a calibration profile, of that shape"
            )
        if dtype != wanted_dtype:
            raise FastcalError(f"input {name!r} takes {wanted_dtype}, the batches are {dtype}; convert them")

    def _on_device(self, name: str, array: Any) -> Any:
        """A contiguous array on the GPU with the values of `array`: itself, or a copy in memory kept for the input."""
        if hasattr(array, "__cuda_array_interface__"):
            if array.__cuda_array_interface__.get("strides") is not None:
                raise FastcalError(f"input {name!r} is not contiguous in memory; TensorRT reads it as if it were")
            if self.feed.gpu is None:  # else the feed has waited
                wait_until_filled(array)
            return array
        return upload(array, name, self._uploads)

    def _report(self, now: float) -> None:
        if self._progress is not None and self.stats.batches:
            seconds = self.stats.waited + self.stats.builder_seconds + now - self._left
            stats, total = self.stats, length(self.feed)
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

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._end_pass()
        _log.error("calibration failed: %s", error)

    def _end_pass(self) -> None:
        batches, self._batches, self._held = getattr(self, "_batches", None), None, []
        if batches is not None and hasattr(batches, "close"):
            batches.close()

    def _cache_of(self, scales: dict[str, float]) -> CalibrationCache:
        return CalibrationCache(scales, self._algorithm, check_tensorrt_version(trt.__version__))

    def _record(self) -> Record:
        """What this calibration is made from, found out once a calibration: it looks at every sample's file."""
        if self._made_from is None:
            settings = self._settings() | {"precision": precision(self._tf32)}
            self._made_from = Record.of(self.feed, self._model, **settings)
        return self._made_from

    def _settings(self) -> dict[str, Any]:
        return {"algorithm": self._algorithm}


def _calibrated_shape(value: Any, config: Any) -> tuple[int, ...]:
    shape = tuple(value.shape)
    if -1 not in shape:
        return shape
    profile = config.get_calibration_profile()
    if profile is None:
        if not config.num_optimization_profiles:
            raise FastcalError(f"input {value.name!r} is dynamic; add an optimization profile to the config")
        raise FastcalError(
            f"input {value.name!r} is dynamic and the config has no calibration profile; set one of the batches' shape "
            "with config.set_calibration_profile"
        )
    return tuple(profile.get_shape(value.name)[1])


def _address(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])


class EntropyCalibrator2(FeedCalibrator, trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
    """TensorRT's `IInt8EntropyCalibrator2`, what TensorRT recommends for convolutional networks.

    Takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` explains them.
    """

    _base, _algorithm = trt.IInt8EntropyCalibrator2, "entropy2"


class EntropyCalibrator(FeedCalibrator, trt.IInt8EntropyCalibrator):  # type: ignore[misc]
    """TensorRT's `IInt8EntropyCalibrator`.

    Takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` explains them.
    """

    _base, _algorithm = trt.IInt8EntropyCalibrator, "entropy"


class MinMaxCalibrator(FeedCalibrator, trt.IInt8MinMaxCalibrator):  # type: ignore[misc]
    """TensorRT's `IInt8MinMaxCalibrator`, which clips nothing.

    Takes `feed`, `cache`, `model` and `progress`, as `FeedCalibrator` explains them.
    """

    _base, _algorithm = trt.IInt8MinMaxCalibrator, "minmax"


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

    _base, _algorithm = trt.IInt8LegacyCalibrator, "percentile"

    def __init__(
        self,
        feed: Any,
        *,
        quantile: float = 0.9999,
        regression_cutoff: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(feed, **options)
        check_algorithm("percentile", quantile)
        self._quantile = quantile
        self._cutoff = regression_cutoff

    def get_quantile(self) -> float:
        """The share of values that is not clipped."""
        return self._quantile

    def get_regression_cutoff(self) -> float:
        """The cutoff of the regression; 1 for none."""
        return self._cutoff

    def read_histogram_cache(self, *_: Any) -> None:
        """No histograms: TensorRT takes them anew.

        TensorRT's Python bindings cannot take them back: they refuse bytes, and pass the length that a calibrator
        should set as a plain number (seen on 8.6.0).
        """

    def write_histogram_cache(self, *_: Any) -> None:
        """Keep nothing, since it could not be read back."""

    def _cache_of(self, scales: dict[str, float]) -> CalibrationCache:
        return CalibrationCache(scales, "percentile", None, self._quantile, self._cutoff)

    def _settings(self) -> dict[str, Any]:
        return {"algorithm": "percentile", "quantile": self._quantile, "regression_cutoff": self._cutoff}


class Calibrator(FeedCalibrator, trt.IInt8Calibrator):  # type: ignore[misc]
    """TensorRT's plain `IInt8Calibrator`.

    Args:
        feed: As for the others.
        algorithm: A `tensorrt.CalibrationAlgoType`.
        **options: `cache`, `model` and `progress`, as for the others.

    Raises:
        FastcalError: It is none; or it is Legacy calibration, whose cache names a quantile, and a cache is to be kept.
    """

    _base = trt.IInt8Calibrator

    def __init__(
        self,
        feed: Any,
        *,
        algorithm: Any = trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2,
        **options: Any,
    ) -> None:
        super().__init__(feed, **options)
        if algorithm not in _ALGORITHMS:
            raise FastcalError(f"there is no algorithm {algorithm!r}; give a tensorrt.CalibrationAlgoType")
        self._type = algorithm
        self._algorithm = _ALGORITHMS[algorithm]
        if self._algorithm == "percentile" and self._cache is not None:
            raise FastcalError(
                "a cache of Legacy calibration names its quantile: use LegacyCalibrator, or keep no cache"
            )

    def get_algorithm(self) -> Any:
        """The algorithm, a `tensorrt.CalibrationAlgoType`."""
        return self._type


_ALGORITHMS = {
    trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2: "entropy2",
    trt.CalibrationAlgoType.ENTROPY_CALIBRATION: "entropy",
    trt.CalibrationAlgoType.MINMAX_CALIBRATION: "minmax",
    trt.CalibrationAlgoType.LEGACY_CALIBRATION: "percentile",
}

_CLASSES: dict[str, type[FeedCalibrator]] = {
    "entropy2": EntropyCalibrator2,
    "entropy": EntropyCalibrator,
    "minmax": MinMaxCalibrator,
    "percentile": LegacyCalibrator,
}


def make_calibrator(algorithm: str, feed: Feed, *, quantile: float = 0.9999, **options: Any) -> FeedCalibrator:
    """The calibrator of an algorithm as `fastcal.calibrate` names it.

    Args:
        algorithm: "entropy2", "entropy", "minmax" or "percentile".
        feed: The batches.
        quantile: For "percentile", the share of values that is not clipped.
        **options: `cache`, `model` and `progress`, as the classes take them.

    Raises:
        FastcalError: The algorithm is unknown, or the quantile not in (0, 1].
    """
    check_algorithm(algorithm, quantile)
    if algorithm == "percentile":
        options["quantile"] = quantile
    return _CLASSES[algorithm](feed, **options)
