"""`FeedCalibrator`: the part that TensorRT's five calibrator classes share.

TensorRT takes an exception in `get_batch` for the end of the data, builds the engine and writes a cache from the first
batches (seen on 8.6.0). These calibrators remember the exception, write no cache, and raise the exception as soon as
they can: when `with calibrator:` around the build ends, or at `calibrator.check()`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.calibration import Calibration
from fastcal.definition import Definition, Network, as_network
from fastcal.dla import check_target
from fastcal.errors import FastcalError, ModelError, UnavailableError, first_few
from fastcal.feed.arrays import ArrayFeed
from fastcal.feed.feed import Feed
from fastcal.handout import CalibratorStats, Handout
from fastcal.kept_cache import keep_cache
from fastcal.model import Model
from fastcal.network import float_names, trt
from fastcal.observe.backends import (
    LocalBackend,
    OnnxRuntimeBackend,
    TensorRTBackend,
    has_cuda_provider,
    unknown_to_onnxruntime,
)
from fastcal.observe.parsed import Parsed, ParsedBackend
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


class FeedCalibrator:
    """The part that the five classes share: the calls that TensorRT makes, and the errors that it must not lose.

    Args:
        feed: The batches: a `Feed`, or anything that `ArrayFeed` takes, named after the inputs of `model`. A feed's
            arrays on the GPU are read where they are; others are copied there.
        cache: The file of the cache. It is reused as long as it is up to date: its header and the record beside it must
            name the same algorithm, TensorRT version, model (if known), samples in order and preprocessing. Otherwise
            TensorRT calibrates again, and the log names the difference. The old file is replaced when the new one is
            complete. Or an open binary file or `io.BytesIO`, which has no record: it is reused if its header fits. By
            default the cache is kept in memory, for further builds with this calibrator until `rewind`.
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
        cache: str | os.PathLike[str] | BinaryIO | None = None,
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
        self._cache = keep_cache(cache)
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
            if not self._algorithm.is_tensorrts:
                raise FastcalError(
                    f"TensorRT has no algorithm {self._algorithm.name}: call calibrate before the build, or choose "
                    "another algorithm"
                )
            return self._handout.next(names)
        except BaseException as error:  # even Ctrl-C: TensorRT would take it for the end of the data
            self._fail(error)
            return None

    def read_calibration_cache(self) -> bytes | None:
        """Return the cache if it is up to date; else None, and TensorRT calibrates.

        TensorRT 8.6.0 asks twice: before the first batch, and after the last one, before it has the cache written.
        """
        if self._finished:
            self._begin()  # another build
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
        if self._ready is not None:
            return
        try:
            if self._error is not None:
                _log.info("%s is not written: the calibration failed", self._cache)
            elif not self._handout.ended:
                _log.warning("%s is not written: TensorRT has not asked for all batches", self._cache)
            else:
                self._cache.save(self._calibration.record.skipping(self.feed.skipped), bytes(cache))
        except BaseException as error:
            self._fail(error)

    # What the application calls.

    def rewind(self) -> None:
        """Begin again: the next `get_batch` hands out the first batch; errors and a cache in memory are forgotten."""
        self._begin()
        self._cache.forget()

    def _begin(self) -> None:
        self._handout.begin_anew()
        self._calibration = self._default
        self._error = self._ready = None
        self._finished = False

    def calibrate(
        self,
        network: Any,
        *,
        exact: bool = False,
        tf32: bool = False,
        optimization_level: int | None = None,
        tactic_sources: int | Iterable[str] | None = None,
        target: str | None = None,
    ) -> None:
        """Calibrate now as `fastcal.calibrate` does, so that TensorRT is given a finished cache and asks for no batch.

        Belongs inside `with calibrator:`, before the build. Does nothing if the cache on the disk is up to date, or if
        only TensorRT knows the algorithm: Legacy calibration with a regression cutoff below 1. If the calibrator knows
        the ONNX file (`model`), ONNX Runtime runs it on the GPU; otherwise, and if it cannot give all the scales that
        TensorRT asks for, TensorRT runs the network.

        Args:
            network: The `INetworkDefinition` that will be built, or its ONNX file.
            exact: Whether to clip outputs and tensors with a known range as TensorRT does, as for `fastcal.calibrate`.
            tf32: Whether the network may run in TF32: faster, and an amax differs by about 1e-3.
            optimization_level: As for `fastcal.calibrate`.
            tactic_sources: As for `fastcal.calibrate`.
            target: As for `fastcal.calibrate`; "dla" needs the ONNX file as the calibrator's `model`.

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
            wanted = replace(wanted, file=known if isinstance(known, Model) else None)
        if wanted.digest is None:
            self._cache.forget()  # it may be of another network
        backend = _choose_backend(wanted, known, TensorRTBackend(tf32, optimization_level, tactic_sources))
        algorithm = replace(self._algorithm, keeps_ranges=not exact)
        check_target(target, algorithm)
        self._calibration = replace(self._default, network=wanted, backend=backend, algorithm=algorithm, target=target)
        kept = self._reuse()
        if kept is not None and not self._lacks_any(wanted, kept):
            return
        cache = self._calibration.run(self._progress)
        self._ready = cache.to_bytes()
        assert cache.record is not None
        self._cache.save(cache.record, self._ready)

    def _lacks_any(self, network: Network, kept: bytes) -> bool:
        """Return whether a cache that is up to date lacks tensors that TensorRT will ask for, and say so."""
        scales = CalibrationCache.from_bytes(kept, str(self._cache)).scales
        missing = [name for name in float_names(network.raw) if name not in scales] if hasattr(network, "raw") else []
        if missing:
            _log.info("calibrating: %s lacks the scales of %s", self._cache, first_few(missing))
        return bool(missing)

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
        shapes = {value.name: (_calibrated_shape(value, config), np.dtype(trt.nptype(value.dtype))) for value in inputs}
        if self._handout.expect(shapes):
            self._cache.forget()  # it is of another network

    def __enter__(self) -> "FeedCalibrator":
        self._begin()
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
        """Return the kept cache if it is up to date; else None, after checking that it can be written."""
        self._calibration = replace(self._calibration)  # the record anew: files may have changed
        data, reason = self._cache.reuse(self._calibration)
        if data is not None:
            _log.info("%s is reused: %s", self._cache, reason)
        elif reason:
            _log.info("calibrating: %s is not reused, %s", self._cache, reason)
            network = self._calibration.network
            self._cache.check_writable(() if network is None else network.activations)
        return data

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._handout.end()
        _log.error("calibration failed: %s", error)


def _choose_backend(network: Network, file: Network | None, with_tensorrt: TensorRTBackend) -> LocalBackend:
    """Return ONNX Runtime on a GPU if it can observe all tensors of a network that was parsed from `file`."""
    if not isinstance(network, Definition) or not isinstance(file, Model) or not has_cuda_provider():
        return with_tensorrt
    foreign = unknown_to_onnxruntime(file)
    parsed = Parsed(network, file)
    if not foreign and not parsed.unknown:
        return ParsedBackend(parsed, OnnxRuntimeBackend(tf32=with_tensorrt.tf32))
    _log.info("TensorRT runs the network: ONNX Runtime cannot give %s", first_few(foreign or parsed.unknown))
    return with_tensorrt


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
