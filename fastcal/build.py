"""`build_engine`: an INT8 engine from an ONNX model and calibration images."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcal.batch import format_shape, known_sizes, match_names, shape_fits
from fastcal.calibrators import EntropyCalibrator2
from fastcal.device import resolve
from fastcal.errors import DataError, FastcalError, ModelError, check_range
from fastcal.feed.feed import Feed
from fastcal.feed_calibrator import FeedCalibrator
from fastcal.files import check_writable, write_atomically
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder, tactic_bits, trt

#: The values of `calibration`: fastcal calibrates, or TensorRT's builder does.
CALIBRATIONS = ("fastcal", "tensorrt")

_log = logging.getLogger("fastcal")


def build_engine(
    model: str | os.PathLike[str] | Model,
    calibrator: Any,
    *,
    calibration: str = "fastcal",
    exact: bool = False,
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

    If an input is dynamic in more than its batch, the engine takes the other sizes from the first calibration batch.
    TensorRT's messages go to the logger "fastcal.tensorrt".

    Args:
        model: The ONNX file.
        calibrator: One of fastcal's calibrators; or the batches for an `EntropyCalibrator2`: a `Feed`, or anything that
            `ArrayFeed` takes.
        calibration: "fastcal" calibrates at the speed of the data; "tensorrt" lets TensorRT's builder calibrate, on one
            CPU core. With `exact`, the scales are the same.
        exact: Whether fastcal clips outputs and tensors with a known range as TensorRT does: see `fastcal.calibrate`.
        tf32: Whether fastcal's calibration may use TF32: see `fastcal.calibrate`.
        fp16: Whether TensorRT may run layers in FP16 if that is faster.
        min_batch: The smallest batch that the engine runs, if the model's batch is dynamic; by default 1.
        opt_batch: The batch that the engine is tuned for; by default the calibrator's, limited by the other two.
        max_batch: The largest batch that the engine runs; by default the largest of the other two and the calibrator's.
        workspace: The bytes of GPU memory that TensorRT may use for scratch; by default all.
        timing_cache: A file with TensorRT's timings, which makes a second build faster. It is read if it exists, and
            the new timings are added.
        optimization_level: 0 (the engine is built fastest) to 5 (the engine runs fastest); by default TensorRT's 3.
        tactic_sources: Names of `tensorrt.TacticSource`, or their bits; by default TensorRT's own.

    Returns:
        The serialized engine.

    Raises:
        ModelError: TensorRT cannot parse the model or builds no engine from it.
        DataError: The batches do not fit the model.
        UnavailableError: TensorRT cannot start, for instance because there is no GPU.
        FastcalError: A setting is out of range.
        Exception: As the feed.
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
    with _timings(timing_cache, config, logger):
        with calibrator:
            if calibration == "fastcal":
                calibrator.calibrate(network, exact=exact, tf32=tf32, tactic_sources=tactics)
            engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ModelError(f"TensorRT builds no engine from {model.label}: {logger.reasons()}")
    return bytes(engine)


def _check_gpu(feed: Feed) -> None:
    current = None if feed.gpu is None else resolve("cuda")
    if current != feed.gpu:
        raise FastcalError(
            f"the batches are on GPU {feed.gpu}, but TensorRT builds on the current GPU, {current}; make the feed with "
            f"device='cuda:{current}', or make GPU {feed.gpu} current"
        )


def _batch_range(
    model: Model, least: int | None, opt: int | None, most: int | None, calibrated: int
) -> tuple[int, int, int]:
    """Return the smallest batch that the engine runs, the one that it is tuned for, and the largest."""
    asked = {"min_batch": least, "opt_batch": opt, "max_batch": most}
    given = [name for name, value in asked.items() if value is not None]
    if given and all(value.shape[:1] != (None,) for value in model.inputs):
        raise FastcalError(
            f"{model.label} has a fixed batch; leave out {' and '.join(given)}, or export it with a dynamic one"
        )
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
    builder: Any, fp16: bool, workspace: int | None, optimization_level: int | None, tactics: int | None
) -> Any:
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    if fp16:
        config.set_flag(trt.BuilderFlag.FP16)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if tactics is not None:
        config.set_tactic_sources(tactics)
    return config


def _add_profiles(builder: Any, network: Any, config: Any, batches: tuple[int, int, int], feed: Feed) -> None:
    """Give dynamic inputs two profiles: one that the engine runs with, and one that TensorRT calibrates with."""
    shapes = {value.name: tuple(value.shape) for value in map(network.get_input, range(network.num_inputs))}
    if not any(-1 in shape for shape in shapes.values()):
        return
    shapes = fill_sizes(shapes, feed)
    run, calibrate = builder.create_optimization_profile(), builder.create_optimization_profile()
    for name, shape in shapes.items():
        for profile, sizes in ((run, batches), (calibrate, [feed.batch_size] * 3)):
            profile.set_shape(name, *[(size, *shape[1:]) if shape[:1] == (-1,) else shape for size in sizes])
    config.add_optimization_profile(run)
    config.set_calibration_profile(calibrate)


def fill_sizes(shapes: dict[str, tuple[int, ...]], feed: Feed) -> dict[str, tuple[int, ...]]:
    """Return inputs' shapes with the sizes of the feed's batches in place of -1 for all dimensions but the batch."""
    if not any(-1 in shape[1:] for shape in shapes.values()):
        return shapes
    given = match_names(list(shapes), "the network", feed.shapes())
    filled = {}
    for name, shape in shapes.items():
        wanted = known_sizes(shape[1:])
        if not shape_fits(wanted, given[name][1:]):
            raise DataError(
                f"the network takes input {name!r} as {format_shape((None, *wanted))}, the batches are "
                f"{format_shape(given[name])}; give batches of that shape"
            )
        filled[name] = (*shape[:1], *given[name][1:])
    return filled


@contextmanager
def _timings(path: str | os.PathLike[str] | None, config: Any, logger: Logger) -> Iterator[None]:
    """Let a build use the timings in a file; if the build succeeds, write them and those that it added."""
    if path is None:
        yield
        return
    try:
        known = Path(path).read_bytes() if Path(path).exists() else b""
    except OSError as error:
        raise FastcalError(f"cannot read timing cache {path}: {error.strerror}; name another file") from error
    timings = config.create_timing_cache(known)
    is_rejected = timings is None or not config.set_timing_cache(timings, ignore_mismatch=False)
    if is_rejected:
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    yield  # TensorRT needs `timings` until the build has ended
    # TensorRT 8.6 accepts a file that is not a timing cache, and only logs a message.
    if is_rejected or any("timing cache will not be used" in message for message in logger.errors + logger.warnings):
        _log.info("%s was rejected: it is of another TensorRT or GPU, or is not a timing cache", path)
    try:
        write_atomically(path, bytes(config.get_timing_cache().serialize()))
    except FastcalError as error:  # the engine took longer to build, and must not be lost for this
        _log.warning("the timings are not saved: %s", error)
