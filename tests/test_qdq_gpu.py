"""Models with Q/DQ pairs in TensorRT: what it makes of them, against what it makes of the cache."""

import json
import logging

import numpy as np
import onnx
import pytest
from networks import resnet50

import fastcal
from conftest import DIGITS, SQUEEZENET, needs_squeezenet, squeezenet_batches
from fastcal.model import Model

pytestmark = pytest.mark.gpu("TensorRT")


def digits(_):
    feed = fastcal.ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=32, device="cpu", limit=128)
    with feed:
        return DIGITS / "digits.onnx", [{name: array.copy() for name, array in batch.items()} for batch in feed]


def squeezenet(_):
    return SQUEEZENET, list(squeezenet_batches())


def resnet(folder):
    onnx.save(resnet50(), folder / "resnet50.onnx")
    random = np.random.default_rng(0)
    return folder / "resnet50.onnx", [
        {"input": random.standard_normal((8, 3, 224, 224), dtype=np.float32)} for _ in range(2)
    ]


class Builder:
    """Builds engines of fixed shapes that can tell how their layers run."""

    def __init__(self, trt, tactics, shapes):
        from fastcal.network import Logger, start_builder

        self.trt, self.tactics, self.shapes, self.logger = trt, tactics, shapes, Logger()
        self.builder = start_builder(self.logger)

    def build(self, path, *, int8=True, calibrator=None):
        """Build an engine; convolutions run in INT8 with a cache, too, whatever is faster."""
        from fastcal.network import layers, parse

        trt = self.trt
        network = parse(self.builder, Model(path), self.logger)
        for index in range(network.num_inputs):
            network.get_input(index).shape = self.shapes[network.get_input(index).name]
        config = self.builder.create_builder_config()
        config.set_tactic_sources(self.tactics)
        config.builder_optimization_level = 0
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)
        if int8:
            config.set_flag(trt.BuilderFlag.INT8)
        if calibrator is None:
            plan = self.builder.build_serialized_network(network, config)
        else:
            config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
            for layer in layers(network):
                if layer.type == trt.LayerType.CONVOLUTION:
                    layer.precision = trt.int8
            config.int8_calibrator = calibrator
            calibrator.check_network(network, config)
            with calibrator:
                calibrator.calibrate(network, tactic_sources=self.tactics)
                plan = self.builder.build_serialized_network(network, config)
        assert plan is not None, self.logger.reasons()
        self.runtime = trt.Runtime(self.logger)
        return self.runtime.deserialize_cuda_engine(plan)


def convolutions(trt, engine):
    """How many convolutions an engine has, and how many of them read INT8."""
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(information, strict=False)  # TensorRT's own JSON has control characters in its strings
    found = [layer for layer in layers["Layers"] if layer.get("ParameterType") == "Convolution"]
    return len(found), sum("int8" in layer["Inputs"][0]["Format/Datatype"].lower() for layer in found)


def outputs(trt, engine, batch):
    import cupy

    context, stream, arrays = engine.create_execution_context(), cupy.cuda.Stream(), {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            arrays[name] = cupy.asarray(batch[name])
        else:
            result = arrays[name] = cupy.empty(tuple(engine.get_tensor_shape(name)), cupy.float32)
        context.set_tensor_address(name, arrays[name].data.ptr)
    cupy.cuda.Device().synchronize()
    assert context.execute_async_v3(stream.ptr)
    stream.synchronize()
    return result.get().astype(np.float64)


def decibels(reference, other):
    """The signal-to-noise ratio of `other`."""
    return 10 * np.log10(np.square(reference).mean() / np.square(reference - other).mean())


@pytest.mark.parametrize("make", [digits, pytest.param(squeezenet, marks=needs_squeezenet), resnet])
def test_tensorrt_runs_the_convolutions_in_int8_as_with_the_cache(trt, tactics, tmp_path, caplog, make):
    path, batches = make(tmp_path)
    builder = Builder(trt, tactics, {name: array.shape for name, array in batches[0].items()})
    calibrator = fastcal.EntropyCalibrator2(fastcal.ArrayFeed(batches), cache=tmp_path / "cache", model=path)
    implicit = builder.build(path, calibrator=calibrator)
    onnx.save(fastcal.quantize(path, tmp_path / "cache"), tmp_path / "quantized.onnx")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fastcal.tensorrt"):
        explicit = builder.build(tmp_path / "quantized.onnx")
    assert not [message for message in caplog.messages if "scale" in message.lower()]
    plain = builder.build(path, int8=False)
    (layers, quantized), from_cache = convolutions(trt, explicit), convolutions(trt, implicit)
    exact, with_pairs, with_cache = (outputs(trt, engine, batches[0]) for engine in (plain, explicit, implicit))
    noise = decibels(exact, with_pairs), decibels(exact, with_cache), decibels(with_cache, with_pairs)
    print(f"\n{path.stem}: convolutions {layers}, INT8 {quantized}; with the cache {from_cache}; noise to FP32 "
          f"{noise[0]:.1f} dB, with the cache {noise[1]:.1f} dB, between them {noise[2]:.1f} dB")  # fmt: skip
    assert quantized == layers >= from_cache[1]
    assert noise[0] > noise[1] - 1
