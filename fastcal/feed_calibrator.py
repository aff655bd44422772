"""`FeedCalibrator`: the part that TensorRT's five calibrator classes share.

TensorRT takes an exception in `get_batch` for the end of the data, builds the engine and writes a cache from the first
batches (seen on 8.6.0). These calibrators remember the exception, write no cache, and raise the exception as soon as
they can: when `with calibrator:` around the build ends, or at `calibrator.check()`.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcal.algorithm import Algorithm
from fastcal.batch import format_shape, match_names
from fastcal.cache.record import check_cache_writable
from fastcal.calibration import Calibration
from fastcal.device import type_of, upload, wait_until_filled
from fastcal.errors import DataError, ModelError, UnavailableError
from fastcal.feed.arrays import ArrayFeed
from fastcal.feed.feed import Batch, Feed, length
from fastcal.model import Definition, Model, as_network
from fastcal.network import trt
from fastcal.observe.backends import TensorRTBackend
from fastcal.progress import Progress
from fastcal.versions import check_tensorrt_version

if not hasattr(trt, "IInt8EntropyCalibrator2"):
    raise UnavailableError(
        f"TensorRT {trt.__version__} has no calibrators (gone from 11.0): calibrate with fastcal calibrate, and carry "
        "the scales in the model as QuantizeLinear and DequantizeLinear nodes",
        "TensorRT",
    )

__all__ = ["FeedCalibrator", "trt"]

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

    Arrays on the GPU are read where they are; others are copied there.
    """

    def __init__(self, feed: Feed, progress: Callable[[Progress], None] | None) -> None:
        self.stats = CalibratorStats()
        self.ended = False
        self._feed, self._progress = feed, progress
        self._batches: Iterator[Batch] | None = None
        self._wanted: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._held: list[Any] = []
        self._uploads: dict[str, Any] = {}
        self._left = 0.0

    def expect(self, wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        """Reject arrays of other shapes and types than these, by input name; by default those of the first batch."""
        self._wanted = dict(wanted)

    def next(self, names: Sequence[str]) -> list[int] | None:
        """Return the device addresses of the next batch, in the order of `names`; None at the end of the batches."""
        entered = time.perf_counter()
        self._report(entered)
        addresses = self._next(names)
        self._count(entered, self._feed.batch_size if addresses else 0)
        return addresses

    def end(self) -> None:
        """End the pass."""
        batches, self._batches, self._held = self._batches, None, []
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
        arrays = match_names(names, "the network", batch)
        for name, array in arrays.items():
            self._check(name, array)
        self._held = [self._on_device(name, array) for name, array in arrays.items()]
        return [int(array.__cuda_array_interface__["data"][0]) for array in self._held]

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


class FeedCalibrator:
    """The part that the five classes share: the calls that TensorRT makes, and the errors that it must not lose.

    Args:
        feed: The batches: a `Feed`, or anything that `ArrayFeed` takes, named after the inputs of `model`. A feed's
            arrays on the GPU are read where they are; others are copied there.
        cache: The file of the cache. It is reused as long as it is up to date: its header and the record beside it must
            name the same algorithm, TensorRT version, model (if known), samples in order and preprocessing. Otherwise
            TensorRT calibrates again, and the log names the difference. The old file is replaced when the new one is
            complete.
        model: The ONNX file that will be calibrated, for that record.
        progress: Called in `get_batch` before a batch is fetched, with the batches that TensorRT has finished; the
            builder waits for it.

    Attributes:
        feed: The batches.
    """

    #: TensorRT's class, and the algorithm.
    _base: Any
    _algorithm: Algorithm

    def __init__(
        self,
        feed: Any,
        *,
        cache: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | Model | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._base.__init__(self)
        network = None if model is None else Model.of(model)
        self._owns_feed = not isinstance(feed, Feed)
        self.feed: Feed = ArrayFeed(feed, model=network) if self._owns_feed else feed
        self._progress = progress
        self._handout = Handout(self.feed, progress)
        version = check_tensorrt_version(trt.__version__)
        self._default = Calibration(self.feed, self._algorithm, network, TensorRTBackend(), version)
        self._calibration = self._default  # the one of the build at hand
        self._cache = None if cache is None else Path(cache)
        self._error: BaseException | None = None
        self._finished = False  # whether TensorRT has had its cache written
        self._ready: bytes | None = None  # a finished cache to hand over

    @property
    def stats(self) -> CalibratorStats:
        """The statistics of the calibration under way, or of the last one."""
        return self._handout.stats

    # What TensorRT calls.

    def get_batch_size(self) -> int:
        """Return the number of samples in a batch; 1 if the feed fails to tell, and then there is no batch."""
        try:
            return self.feed.batch_size
        except BaseException as error:
            self._fail(error)
            return 1

    def get_batch(self, names: Sequence[str], *_: Any) -> list[int] | None:
        """Return the device addresses of the next batch's arrays, in the order of the inputs `names`.

        The addresses are valid until the next call. None is returned at the end of the data, and after an error.
        """
        if self._error is not None:
            return None
        try:
            return self._handout.next(names)
        except BaseException as error:  # even Ctrl-C: TensorRT would take it for the end of the data
            self._fail(error)
            return None

    def read_calibration_cache(self) -> bytes | None:
        """Return the cache if it is up to date; else None, and TensorRT calibrates.

        TensorRT 8.6.0 asks twice: before the first batch, and after the last one, before it has the cache written.
        """
        if self._finished:
            self.rewind()  # another build
        if self._ready is not None:
            return self._ready
        if self._handout.ended or self._error is not None:
            return None
        try:
            return self._reuse()
        except BaseException as error:
            self._fail(error)
            return None

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep `cache`, TensorRT's bytes, with a record of what it was made from; after an error, keep nothing."""
        self._finished = True
        if self._cache is None or self._ready is not None:
            return
        try:
            if self._error is not None:
                _log.info("%s is not written: the calibration failed", self._cache)
            elif not self._handout.ended:
                _log.warning("%s is not written: TensorRT has not asked for all batches", self._cache)
            else:
                self._calibration.record.skipping(self.feed.skipped).save(self._cache, bytes(cache))
        except BaseException as error:
            self._fail(error)

    # What the application calls.

    def rewind(self) -> None:
        """Begin again: the next `get_batch` hands out the first batch, and an earlier error is forgotten."""
        self._handout.begin_anew()
        self._calibration = self._default
        self._error = self._ready = None
        self._finished = False

    def calibrate(
        self,
        network: Any,
        *,
        tf32: bool = False,
        optimization_level: int | None = None,
        tactic_sources: int | Iterable[str] | None = None,
    ) -> None:
        """Calibrate now as `fastcal.calibrate` does, so that TensorRT is given a finished cache and asks for no batch.

        Belongs inside `with calibrator:`, before the build. Does nothing if the cache on the disk is up to date, or if
        only TensorRT knows the algorithm: Legacy calibration with a regression cutoff below 1.

        Args:
            network: The `INetworkDefinition` that will be built, or its ONNX file.
            tf32: Whether TensorRT may observe the network in TF32: faster, and an amax differs by about 1e-3.
            optimization_level: As for `fastcal.calibrate`.
            tactic_sources: As for `fastcal.calibrate`.

        Raises:
            ModelError: TensorRT cannot run the network with every tensor visible.
            DataError: The batches do not fit the network.
            Exception: As the feed.
        """
        if not self._algorithm.is_known:
            _log.info(
                "TensorRT calibrates itself: Legacy calibration is a plain percentile with regression cutoff 1 only"
            )
            return
        known, wanted = self._default.network, as_network(network)
        if isinstance(wanted, Definition):
            wanted = replace(wanted, digest=None if known is None else known.digest)
        backend = TensorRTBackend(tf32, optimization_level, tactic_sources)
        self._calibration = replace(self._default, network=wanted, backend=backend)
        if self._reuse() is not None:
            return
        cache = self._calibration.run(self._progress)
        if self._cache is not None:
            cache.save(self._cache)
        self._ready = cache.to_bytes()

    def check(self) -> None:
        """Raise the error of the last calibration, if there was one."""
        if self._error is not None:
            raise self._error

    def check_network(self, network: Any, config: Any) -> None:
        """Tell the calibrator what TensorRT will read: never beyond a batch, never a part of one.

        From now on a batch of another shape or type than the network's inputs is an error.

        Args:
            network: The `INetworkDefinition` that will be calibrated.
            config: The `IBuilderConfig`. If an input is dynamic, TensorRT reads the shape of the config's calibration
                profile, whatever shape the batches have.

        Raises:
            ModelError: An input is dynamic and the config has no calibration profile.
        """
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        self._handout.expect(
            {value.name: (_calibrated_shape(value, config), np.dtype(trt.nptype(value.dtype))) for value in inputs}
        )

    def __enter__(self) -> "FeedCalibrator":
        self.rewind()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._handout.end()
        if self._owns_feed:
            self.feed.close()
        if error is None:
            self.check()
        elif self._error not in (None, error) and isinstance(error, Exception):
            raise self._error from error  # the missing engine, for instance, is a consequence

    def __del__(self) -> None:
        if (handout := getattr(self, "_handout", None)) is not None:  # None after an error in __init__
            handout.end()

    def _reuse(self) -> bytes | None:
        """Return the cache on the disk if it is up to date; else None, after checking that it can be written."""
        if self._cache is None:
            return None
        self._calibration = replace(self._calibration)  # the record anew: files may have changed
        data, reason = self._calibration.reuse(self._cache)
        if data is None:
            _log.info("calibrating: %s is not reused, %s", self._cache, reason)
            network = self._calibration.network
            check_cache_writable(self._cache, () if network is None else network.activations)
        else:
            _log.info("%s is reused: it was made from the same model, samples and settings", self._cache)
        return data

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._handout.end()
        _log.error("calibration failed: %s", error)


def _calibrated_shape(value: Any, config: Any) -> tuple[int, ...]:
    shape = tuple(value.shape)
    if -1 not in shape:
        return shape
    profile = config.get_calibration_profile()
    if profile is None:
        if not config.num_optimization_profiles:
            raise ModelError(f"input {value.name!r} is dynamic; add an optimization profile to the config")
        raise ModelError(
            f"input {value.name!r} is dynamic and the config has no calibration profile; set one of the batches' shape "
            "with config.set_calibration_profile"
        )
    return tuple(profile.get_shape(value.name)[1])
