"""`build_engine`: an ONNX model and calibration images to an INT8 engine."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastcal.batch import format_shape, known_sizes, match_names, shape_fits
from fastcal.calibrators import EntropyCalibrator2
from fastcal.device import resolve
from fastcal.errors import FastcalError, check_range
from fastcal.feed.feed import Feed
from fastcal.feed_calibrator import FeedCalibrator
from fastcal.files import check_writable, write_atomically
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder, tactic_bits, trt

#: Who can calibrate.
CALIBRATIONS = ("fastcal", "tensorrt")

_log = logging.getLogger("fastcal")


def build_engine(
    model: str | os.PathLike[str] | Model,
    calibrator: Any,
    *,
    calibration: str = "fastcal",
    tf32: bool = False,
    fp16: bool = True,
    min_batch: int | None = None,
    opt_batch: int | None = None,
    max_batch: int | None = None,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    optimization_level: int | None = None,
    tactic_sources: int | Iterable[str] | None = None,
) -> bytes:
    """Build an INT8 engine with TensorRT from a model and calibration images.

    Where the model's inputs are dynamic beyond their batch, the engine takes the sizes of the first calibration batch.
    TensorRT's messages go to the logger "fastcal.tensorrt".

    Args:
        model: The ONNX file.
        calibrator: One of fastcal's calibrators; or a feed, or what `ArrayFeed` takes, for an `EntropyCalibrator2`.
        calibration: Who calibrates: "fastcal", at the speed of the data, or "tensorrt", in its builder on one CPU core.
            The scales are the same.
        tf32: Whether fastcal's calibration may use TF32: see `fastcal.calibrate`.
        fp16: Whether TensorRT may also run layers in FP16 where that is faster.
        min_batch: Where the model's batch is dynamic: the smallest batch the engine runs, by default 1.
        opt_batch: The batch the engine is tuned for, by default the calibrator's as far as the others allow it.
        max_batch: The largest batch the engine runs, by default the largest of the others and the calibrator's.
        workspace: How many bytes of GPU memory TensorRT may use for scratch, by default all.
        timing_cache: A file of TensorRT's timings, used and extended, which makes a second build faster.
        optimization_level: 0 (fastest build) to 5 (fastest engine); by default TensorRT's own, 3.
        tactic_sources: Names of `tensorrt.TacticSource`, or their bits; by default TensorRT's own.

    Returns:
        The serialized engine.

    Raises:
        FastcalError: An option is out of its range, the model cannot be parsed, the batches do not fit it, or TensorRT
            finds no GPU or builds no engine.
        Exception: What the feed raised during the calibration.
    """
    model = Model.of(model)
    if not isinstance(calibrator, FeedCalibrator):
        calibrator = EntropyCalibrator2(calibrator, model=model)
    if calibration not in CALIBRATIONS:
        raise FastcalError(f"there is no calibration {calibration!r}; choose {' or '.join(CALIBRATIONS)}")
    batches = _batch_range(model, min_batch, opt_batch, max_batch, calibrator.feed.batch_size)
    check_range("workspace", workspace, 1)
    check_range("optimization_level", optimization_level, 0, 5)
    tactics = tactic_bits(tactic_sources)
    if timing_cache is not None:
        check_writable(timing_cache, 1)
    _check_gpu(calibrator.feed)
    logger = Logger()
    builder = start_builder(logger)
    network = parse(builder, model, logger)
    config = _configure(builder, fp16, workspace, optimization_level, tactics)
    _add_profiles(builder, network, config, batches, calibrator.feed)
    config.int8_calibrator = calibrator
    calibrator.check_network(network, config)
    timings = None if timing_cache is None else _Timings(timing_cache, config, logger)
    with calibrator:
        if calibration == "fastcal":
            calibrator.calibrate(network, tf32=tf32, tactic_sources=tactics)
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise FastcalError(f"TensorRT builds no engine from {model.path}: {logger.reasons()}")
    if timings is not None:
        timings.save()
    return bytes(engine)


def _check_gpu(feed: Feed) -> None:
    """Raise FastcalError if the batches lie on another GPU than CUDA's current one, which TensorRT builds on."""
    current = None if feed.gpu is None else resolve("cuda")
    if current != feed.gpu:
        raise FastcalError(
            f"the batches lie on GPU {feed.gpu}, and TensorRT builds on GPU {current}, which is current; make the feed "
            f"with device='cuda:{current}', or make the other current"
        )


def _batch_range(
    model: Model, least: int | None, opt: int | None, most: int | None, calibrated: int
) -> tuple[int, int, int]:
    """The smallest batch the engine runs, the one it is tuned for, the largest."""
    asked = {"min_batch": least, "opt_batch": opt, "max_batch": most}
    given = [name for name, value in asked.items() if value is not None]
    if given and all(value.shape[:1] != (None,) for value in model.inputs):
        raise FastcalError(f"{model.path} has a fixed batch; leave out {' and '.join(given)}, or export it with a "
                           "dynamic one")  # fmt: skip
    least = 1 if least is None else least
    if opt is None:
        opt = max(least, calibrated if most is None else min(most, calibrated))
    most = max(opt, calibrated) if most is None else most
    if not 1 <= least <= opt <= most:
        raise FastcalError(
            f"the engine's batches are min_batch {least}, opt_batch {opt}, max_batch {most}; they must be at least 1 "
            "and in this order"
        )
    return least, opt, most


def _configure(
    builder: Any, fp16: bool, workspace: int | None, optimization_level: int | None, tactic_sources: int | None
) -> Any:
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    if fp16:
        config.set_flag(trt.BuilderFlag.FP16)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if tactic_sources is not None:
        config.set_tactic_sources(tactic_sources)
    return config


def _add_profiles(builder: Any, network: Any, config: Any, batches: tuple[int, int, int], feed: Feed) -> None:
    """Profiles for dynamic inputs: one that the engine runs with, one that TensorRT calibrates with."""
    shapes = {value.name: tuple(value.shape) for value in map(network.get_input, range(network.num_inputs))}
    if not any(-1 in shape for shape in shapes.values()):
        return
    shapes = _sized(shapes, feed)
    run, calibrate = builder.create_optimization_profile(), builder.create_optimization_profile()
    for name, shape in shapes.items():
        for profile, sizes in ((run, batches), (calibrate, [feed.batch_size] * 3)):
            profile.set_shape(name, *[(size, *shape[1:]) if shape[:1] == (-1,) else shape for size in sizes])
    config.add_optimization_profile(run)
    config.set_calibration_profile(calibrate)


def _sized(shapes: dict[str, tuple[int, ...]], feed: Feed) -> dict[str, tuple[int, ...]]:
    """Inputs' shapes, -1 for what is dynamic, with the sizes of the feed's batches where more than the batch is."""
    if not any(-1 in shape[1:] for shape in shapes.values()):
        return shapes
    given = match_names(list(shapes), "the network", feed.shapes())
    sized = {}
    for name, shape in shapes.items():
        wanted = known_sizes(shape[1:])
        if not shape_fits(wanted, given[name][1:]):
            raise FastcalError(
                f"the network takes input {name!r} as {format_shape((None, *wanted))}, the batches are "
                f"{format_shape(given[name])}; give batches of that shape"
            )
        sized[name] = (*shape[:1], *given[name][1:])
    return sized


class _Timings:
    """TensorRT's timings in a file, which a build uses and extends.

    TensorRT needs this object until the build has ended.

    Args:
        path: The file; it need not be there yet.
        config: The configuration of the build.
        logger: That of the builder.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any, logger: Logger) -> None:
        try:
            known = Path(path).read_bytes() if Path(path).exists() else b""
        except OSError as error:
            raise FastcalError(f"cannot read timing cache {path}: {error.strerror}; name another file") from error
        self._path, self._config, self._logger = path, config, logger
        self._timings = config.create_timing_cache(known)
        self._is_refused = not self._set()
        if self._is_refused:
            self._timings = config.create_timing_cache(b"")
            self._set()

    def _set(self) -> bool:
        return self._timings is not None and bool(self._config.set_timing_cache(self._timings, ignore_mismatch=False))

    def save(self) -> None:
        """Write them to the file, with what the build has added; says where those that were there were of no use."""
        said = self._logger.errors + self._logger.warnings
        # TensorRT 8.6 takes what is no timing cache, and complains only.
        if self._is_refused or any("timing cache will not be used" in message for message in said):
            _log.info("%s was not used: it is of another TensorRT or GPU, or no timing cache", self._path)
        try:
            write_atomically(self._path, bytes(self._config.get_timing_cache().serialize()))
        except FastcalError as error:  # the engine took longer to make, and is not to be lost for this
            _log.warning("the timings are not kept: %s", error)
