"""Compare the latency and size of TensorRT engines: FP32, FP16, INT8 from a cache, and INT8 from Q/DQ pairs.

INT8 engines may run layers in FP16 too. "explicit" leaves depthwise convolutions in float, "explicit-depthwise" has
them in INT8 as well. Each engine is built for one batch size. A latency is the median of `--runs` launches of a CUDA
graph. For TensorRT 8.6 to 10, and models with one image input of float32 and a dynamic batch.

    python benchmarks/engines.py MODEL.onnx ... [--batches 1 32] [--optimization-level 3] [--layers FOLDER]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cupy
import numpy as np
import onnx
import tensorrt as trt
from int8 import CLASSES, TACTICS, make_calibrator

import fastcal
from fastcal.cache.cache import CalibrationCache
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder, tactic_bits

#: The number of images in a calibration batch.
CALIBRATED = 8

FLAGS = {"FP32": (), "FP16": (trt.BuilderFlag.FP16,)}
INT8 = (trt.BuilderFlag.FP16, trt.BuilderFlag.INT8)


class Network:
    """The models that the engines of a network are built from.

    Attributes:
        models: The model of each way to build an engine.
        cache: The calibration cache for the implicit way.
    """

    def __init__(self, path, side, folder):
        self.path, self.side, self.timings = path, side, folder / "timings"
        model, generator = Model(path), np.random.default_rng(0)
        name, shape = model.inputs[0].name, self.shape(model, CALIBRATED)
        calibrator = fastcal.EntropyCalibrator2(
            [{name: generator.random(shape, dtype="f4")} for _ in range(4)], model=path
        )
        logger = Logger()
        builder = start_builder(logger)
        with calibrator:
            calibrator.calibrate(parse(builder, model, logger), tactic_sources=TACTICS)
            self.cache = bytes(calibrator.read_calibration_cache())
        self.models = dict.fromkeys(("FP32", "FP16", "implicit"), model)
        for way, depthwise in (("explicit", False), ("explicit-depthwise", True)):
            onnx.save(
                fastcal.quantize(path, CalibrationCache.from_bytes(self.cache, "cache"), depthwise=depthwise),
                folder / f"{way}.onnx",
            )
            self.models[way] = Model(folder / f"{way}.onnx")

    def shape(self, model, batch):
        """Return the shape of a model's input, with the side for unknown heights and widths."""
        return (batch, *(size or self.side for size in model.inputs[0].shape[1:]))

    def build(self, way, batch, level):
        """Return the serialized engine of a way for one batch size."""
        logger, model = Logger(), self.models[way]
        builder = start_builder(logger)
        network = parse(builder, model, logger)
        config = builder.create_builder_config()
        for flag in FLAGS.get(way, INT8):
            config.set_flag(flag)
        config.builder_optimization_level = level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_tactic_sources(tactic_bits(TACTICS))
        for size in (batch, CALIBRATED):
            profile, shape = builder.create_optimization_profile(), self.shape(model, size)
            profile.set_shape(network.get_input(0).name, shape, shape, shape)
            if size == batch:
                config.add_optimization_profile(profile)
        if way == "implicit":
            config.set_calibration_profile(profile)
            config.int8_calibrator = make_calibrator(CLASSES["entropy2"], [], CALIBRATED, self.cache)
        config.set_timing_cache(
            config.create_timing_cache(self.timings.read_bytes() if self.timings.exists() else b""), False
        )
        engine = builder.build_serialized_network(network, config)
        assert engine is not None, logger.reasons()
        self.timings.write_bytes(bytes(config.get_timing_cache().serialize()))
        return bytes(engine)


def measure(data, shape, runs, layers=None):
    """Return the median milliseconds of an engine's runs; write its layers to a file."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    context, stream, held = engine.create_execution_context(), cupy.cuda.Stream(non_blocking=True), []
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    context.set_input_shape(next(n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT), shape)
    if layers is not None:
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        layers.write_text(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    with stream:
        for name in names:
            values = np.random.default_rng(0).random(tuple(context.get_tensor_shape(name)), dtype="f4")
            held.append(cupy.asarray(values))
            context.set_tensor_address(name, held[-1].data.ptr)
        for _ in range(3):
            assert context.execute_async_v3(stream.ptr)
        stream.synchronize()
        stream.begin_capture()
        context.execute_async_v3(stream.ptr)
        graph = stream.end_capture()
        first, last, found = cupy.cuda.Event(), cupy.cuda.Event(), []
        for run in range(runs + 20):
            first.record(stream)
            graph.launch(stream)
            last.record(stream)
            last.synchronize()
            if run >= 20:
                found.append(cupy.cuda.get_elapsed_time(first, last))
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--side", type=int, default=320, help="the height and width of inputs that leave them open")
    parser.add_argument("--ways", nargs="+", default=["FP16", "implicit", "explicit", "explicit-depthwise"])
    parser.add_argument("--optimization-level", type=int, default=3)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--layers", type=Path, help="a folder for what TensorRT says of each engine's layers")
    arguments = parser.parse_args()
    print("| network | batch | engine | milliseconds | MB | seconds to build |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for path in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            network = Network(path, arguments.side, Path(folder))
            for batch in arguments.batches:
                shape = network.shape(Model(path), batch)
                for way in arguments.ways:
                    start = time.perf_counter()
                    data = network.build(way, batch, arguments.optimization_level)
                    took = time.perf_counter() - start
                    layers = arguments.layers and arguments.layers / f"{path.stem}.{batch}.{way}.json"
                    found = measure(data, shape, arguments.runs, layers)
                    row = (path.stem, batch, way, f"{found:.3f}", f"{len(data) / 1e6:.1f}", f"{took:.0f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
