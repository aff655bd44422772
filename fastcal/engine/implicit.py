"""Engines of TensorRT 8.6 to 10 from a calibration ("implicit quantization")."""

import logging
from dataclasses import replace
from typing import Any

import onnx

from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.calibrators import EntropyCalibrator2
from fastcal.dla import for_dla
from fastcal.engine.settings import BuildSettings, check_gpu, fill_sizes, input_shapes, make_profile
from fastcal.errors import first_few
from fastcal.feed.feed import Feed
from fastcal.feed_calibrator import FeedCalibrator
from fastcal.model import Model
from fastcal.network import Logger, float_names, layers, parse, start_builder, trt
from fastcal.observe.parsed import completed_scales
from fastcal.qdq import correct_biases
from fastcal.tuning.tuned import Tuning
from fastcal.versions import check_tensorrt_version

_log = logging.getLogger("fastcal")


class KeptScales(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
    """A calibrator that gives TensorRT scales that are known already, in the form of its entropy calibration."""

    def __init__(self, cache: CalibrationCache) -> None:
        trt.IInt8EntropyCalibrator2.__init__(self)
        version = check_tensorrt_version(trt.__version__)
        self._cache = replace(cache, algorithm=Algorithm("entropy2"), tensorrt_version=version)

    def get_batch_size(self) -> int:
        """Return 1: there are no batches."""
        return 1

    def get_batch(self, names: list[str], *_: Any) -> None:
        """Return no batch."""

    def read_calibration_cache(self) -> bytes:
        """Return the cache."""
        return self._cache.to_bytes()

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep nothing: the scales are known."""


def build_calibrated(
    model: Model, calibrator: Any, settings: BuildSettings, *, fp16: bool, calibrates: bool, **options: Any
) -> bytes:
    """Return an engine with the scales of one of fastcal's calibrators; batches are those of an `EntropyCalibrator2`.

    If `calibrates`, fastcal calibrates with `options`, as `FeedCalibrator.calibrate`; else TensorRT does.
    """
    if not isinstance(calibrator, FeedCalibrator):
        calibrator = EntropyCalibrator2(calibrator, model=model)
    batches = settings.batches(model, calibrator.feed.batch_size)
    check_gpu(calibrator.feed)
    build = _Build(model, settings, batches, calibrator.feed, fp16)
    build.config.int8_calibrator = calibrator
    calibrator.check_network(build.network, build.config)
    with calibrator:
        if calibrates:
            calibrator.calibrate(build.network, target=settings.target, **options)
        return build.run()


def build_tuned(model: Model, tuning: Tuning, feed: Feed | None, settings: BuildSettings, *, fp16: bool) -> bytes:
    """Return an engine with the scales, the layers in float and the corrected biases of a tuning."""
    batches = settings.batches(model, 1 if feed is None else feed.batch_size)
    build = _Build(model, settings, batches, feed, fp16, correct_biases(model, tuning) if tuning.bias else None)
    cache = tuning.cache if settings.dla is None else for_dla(model, tuning.cache)
    scales = completed_scales(build.network, cache.scales, model)
    if missing := [name for name in float_names(build.network) if name not in scales]:
        _log.warning("no scale for %s: layers with these tensors do not run in INT8", first_few(missing))
    keep_in_float(build.network, build.config, tuning.in_float or (), trt.float16 if fp16 else trt.float32)
    build.config.int8_calibrator = calibrator = KeptScales(replace(cache, scales=scales))
    engine = build.run()
    del calibrator  # TensorRT holds no reference to it
    return engine


def keep_in_float(network: Any, config: Any, outputs: Any, precision: Any) -> None:
    """Let the layers that compute tensors with these names run in a precision, if TensorRT can."""
    kept = set(outputs)
    for layer in layers(network):
        names = {layer.get_output(index).name for index in range(layer.num_outputs)}
        if not kept.isdisjoint(names):
            layer.precision = precision
    if kept:
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)


class _Build:
    """A build that is prepared: the parsed network, and a config for INT8 with the profiles of dynamic inputs.

    One profile is the one that the engine runs with, the other the one that TensorRT calibrates with.
    """

    def __init__(
        self,
        model: Model,
        settings: BuildSettings,
        batches: tuple[int, int, int],
        feed: Feed | None,
        fp16: bool,
        proto: onnx.ModelProto | None = None,
    ) -> None:
        """Prepare to build a model, or `proto`, which was made from the model; `feed` tells dynamic sizes."""
        self._model, self._settings, self._logger = model, settings, Logger()
        self._builder = start_builder(self._logger)
        self.network = parse(self._builder, model, self._logger, proto)
        self.config = settings.configure(trt, self._builder)
        for flag in (trt.BuilderFlag.INT8, *([trt.BuilderFlag.FP16] if fp16 else [])):
            self.config.set_flag(flag)
        shapes = input_shapes(self.network)
        if any(-1 in shape for shape in shapes.values()):
            shapes = fill_sizes(shapes, feed)
            self.config.add_optimization_profile(make_profile(self._builder, shapes, batches))
            size = batches[1] if feed is None else feed.batch_size
            self.config.set_calibration_profile(make_profile(self._builder, shapes, [size] * 3))

    def run(self) -> bytes:
        """Return the engine."""
        return self._settings.build(self._builder, self.network, self.config, self._logger, self._model)
