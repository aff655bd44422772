"""`build_engine`: an ONNX model and calibration images to an INT8 engine."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcal.calibrators import EntropyCalibrator2, FeedCalibrator  # first: it says what is wrong with TensorRT
from fastcal.errors import FastcalError
from fastcal.feed.feed import Batch, Feed
from fastcal.files import write_atomically
from fastcal.model import Model

import tensorrt as trt  # isort: skip

_log = logging.getLogger("fastcal")


class _Logger(trt.ILogger):  # type: ignore[misc]
    """Hands TensorRT's messages to `logging`, and keeps its errors for ours."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        levels = {trt.ILogger.VERBOSE: 5, trt.ILogger.INFO: logging.DEBUG, trt.ILogger.WARNING: logging.WARNING}
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        _log.log(levels.get(severity, logging.ERROR), "TensorRT: %s", message)


def build_engine(
    model: str | os.PathLike[str] | Model,
    calibrator: FeedCalibrator | Feed | Iterable[Batch],
    *,
    fp16: bool = True,
    min_batch: int | None = None,
    opt_batch: int | None = None,
    max_batch: int | None = None,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    optimization_level: int | None = None,
    tactic_sources: int | None = None,
) -> bytes:
    """Build an INT8 engine with TensorRT, which calibrates it on the way.

    Args:
        model: The ONNX file.
        calibrator: One of fastcal's calibrators, or a feed or batches for an `EntropyCalibrator2`.
        fp16: Whether TensorRT may also run layers in FP16 where that is faster.
        min_batch: Where the model's batch is dynamic: the smallest batch the engine runs, by default 1.
        opt_batch: The batch the engine is tuned for, by default the calibrator's.
        max_batch: The largest batch the engine runs, by default the larger of `opt_batch` and the calibrator's.
        workspace: How many bytes of GPU memory TensorRT may use for scratch, by default all.
        timing_cache: A file of TensorRT's timings, used and extended, which makes a second build faster.
        optimization_level: 0 (fastest build) to 5 (fastest engine); by default TensorRT's own, 3.
        tactic_sources: Bits of `tensorrt.TacticSource`; by default TensorRT's own.

    Returns:
        The serialized engine.

    Raises:
        FastcalError: The model cannot be parsed, the batches do not fit it, or TensorRT builds no engine.
        Exception: What the feed raised during the calibration.
    """
    model = Model.of(model)
    if not isinstance(calibrator, FeedCalibrator):
        calibrator = EntropyCalibrator2(calibrator, model=model)
    logger = _Logger()
    builder = trt.Builder(logger)
    network = _parse(builder, model, logger)
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
    batch = calibrator.feed.batch_size
    opt = opt_batch or batch
    _add_profiles(builder, network, config, min_batch or 1, opt, max_batch or max(opt, batch), batch)
    config.int8_calibrator = calibrator
    calibrator.check_network(network, config)
    with calibrator, _timings(config, timing_cache):
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise FastcalError(
            f"TensorRT builds no engine from {model.path}: {'; '.join(logger.errors[-2:]) or 'no reason given'}"
        )
    return bytes(engine)


def _parse(builder: Any, model: Model, logger: _Logger) -> Any:
    explicit_batch = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # TensorRT 10 knows no other
    network = builder.create_network(0 if explicit_batch is None else 1 << int(explicit_batch))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model.path)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise FastcalError(f"TensorRT cannot parse {model.path}: {'; '.join(errors)}".replace("\n", " "))
    return network


def _add_profiles(builder: Any, network: Any, config: Any, least: int, opt: int, most: int, calibrated: int) -> None:
    """Profiles for a dynamic batch: one that the engine runs with, one that TensorRT calibrates with."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if not any(-1 in tuple(value.shape) for value in inputs):
        return
    run, calibrate = builder.create_optimization_profile(), builder.create_optimization_profile()
    for value in inputs:
        shape = tuple(value.shape)
        if -1 in shape[1:]:
            raise FastcalError(f"input {value.name!r} is dynamic beyond its batch; export the model with a fixed size")
        if shape[0] == -1:
            run.set_shape(value.name, (least, *shape[1:]), (opt, *shape[1:]), (most, *shape[1:]))
            calibrate.set_shape(value.name, *[(calibrated, *shape[1:])] * 3)
        else:
            run.set_shape(value.name, shape, shape, shape)
            calibrate.set_shape(value.name, shape, shape, shape)
    config.add_optimization_profile(run)
    config.set_calibration_profile(calibrate)


@contextmanager
def _timings(config: Any, path: str | os.PathLike[str] | None) -> Iterator[None]:
    if path is None:
        yield
        return
    known = Path(path).read_bytes() if Path(path).exists() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    yield
    write_atomically(path, bytes(config.get_timing_cache().serialize()))
