"""Which backend runs a network, from what is installed; the backends themselves are tested where they can run."""

import logging

import numpy as np
import onnx
import pytest

import fastcal
from fastcal.calibration import Calibration
from fastcal.feed.arrays import as_feed
from fastcal.model import Model
from fastcal.observe import backends
from fastcal.observe.backends import OnnxRuntimeBackend, choose_backend
from fastcal.observe.with_onnxruntime import float_outputs, with_outputs

GRAPH = "f (float[N, 4] x) => (float[N, 4] y) { a = Relu(x) y = Sigmoid(a) }"


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine one with or without a GPU, the CUDA provider and TensorRT."""

    def make(gpu, provider, tensorrt, calibrators=True):
        monkeypatch.setattr(backends, "resolve", lambda device: 0 if gpu else None)
        monkeypatch.setattr(backends, "has_cuda_provider", lambda: provider)
        monkeypatch.setattr(backends, "is_installed", lambda module: tensorrt or module != "tensorrt")
        monkeypatch.setattr(backends, "has_calibrators", lambda: calibrators)

    return make


@pytest.mark.parametrize(
    ("gpu", "provider", "tensorrt", "calibrators", "chosen", "for_plugins"),
    [
        (False, False, False, True, "onnxruntime", "onnxruntime"),
        (False, True, True, True, "onnxruntime", "onnxruntime"),
        (True, True, False, True, "onnxruntime", "onnxruntime"),
        (True, True, True, True, "onnxruntime", "tensorrt"),
        (True, False, True, True, "tensorrt", "tensorrt"),
        (True, False, True, False, "onnxruntime", "onnxruntime"),  # TensorRT 11
        (True, False, False, True, "onnxruntime", "onnxruntime"),
    ],
)
def test_auto_takes_onnxruntime_unless_it_cannot(machine, gpu, provider, tensorrt, calibrators, chosen, for_plugins):
    machine(gpu, provider, tensorrt, calibrators)
    assert choose_backend("auto", False) == chosen
    assert choose_backend("auto", True) == for_plugins
    assert choose_backend("onnxruntime", True) == "onnxruntime"
    assert choose_backend("tensorrt", False) == "tensorrt"


def test_a_choice_of_tensorrt_is_told_with_its_reason(machine, onnx_file, monkeypatch, caplog):
    monkeypatch.setattr(backends.TensorRTBackend, "observe", lambda *_: 1 / 0)
    plugin = onnx_file(
        "f (float[N, 4] x) => (float[N, 4] y) { a = Relu(x) y = trt.EfficientNMS_TRT(a) }", name="p.onnx"
    )
    for provider, path, reason in (
        (True, plugin, "cannot run EfficientNMS_TRT"),
        (False, onnx_file(GRAPH), "has no CUDA provider here"),
    ):
        machine(True, provider, True)
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastcal"), pytest.raises(ZeroDivisionError):
            fastcal.calibrate(path, iter([{"x": np.ones((1, 4), "f4")}]), tensorrt_version="10.3.0")
        assert f"TensorRT runs the network: ONNX Runtime {reason}" in caplog.messages


def test_on_the_cpu_the_precision_is_fp32(onnx_file):
    cache = fastcal.calibrate(onnx_file(GRAPH), [{"x": np.ones((1, 4), "f4")}], tf32=True)
    assert cache.record.entries["precision"] == "FP32"


def test_a_gpus_batches_without_a_cuda_provider_are_remarked_on(machine, onnx_file, caplog):
    machine(True, False, False)
    with OnnxRuntimeBackend().observer(Model(onnx_file(GRAPH)), 0):
        pass
    assert caplog.messages == [
        "ONNX Runtime has no CUDA provider here, so the CPU runs the network: run fastcal doctor"
    ]


def test_nothing_is_started_early_without_a_gpu(onnx_file):
    model = Model(onnx_file(GRAPH))
    backends.start_early(model, "auto", tf32=False, batch_size=4)
    with as_feed([np.ones((1, 4), "f4")], model, "cpu") as feed:
        calibration = Calibration(feed, fastcal.Algorithm.of("minmax"), model, OnnxRuntimeBackend(), "10.3.0")
        assert calibration.run().scales["x"] == pytest.approx(1 / 127)


def test_outputs_are_added_to_a_serialized_model(onnx_file):
    model = Model(onnx_file(GRAPH))
    variant = onnx.ModelProto.FromString(with_outputs(model.proto, ["a", "y"], {"a": "copy of a"}))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(variant))
    assert [value.name for value in variant.graph.output] == ["y", "copy of a"]
    assert [(node.op_type, list(node.output)) for node in variant.graph.node][-1] == ("Identity", ["copy of a"])
    assert [value.name for value in model.proto.graph.output] == ["y"]


def test_only_the_named_float_outputs_count(onnx_file):
    import onnxruntime

    path = onnx_file(
        "f (float[N, 4] x) => (float[N, 4] y, int64[2] s, float[N, 4] z) { y = Relu(x) s = Shape(x) z = Exp(y) }"
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert float_outputs(session) == {"y": "float32", "z": "float32"}
    assert float_outputs(session, ["z", "s"]) == {"z": "float32"}


def test_shapes_are_those_of_the_batch_whatever_the_file_says(onnx_file):
    proto = onnx.load(onnx_file(GRAPH))
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [7, 4]))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 9
    path = onnx_file(GRAPH)
    onnx.save(proto, path)
    assert Model(path).shapes({"x": (3, 4)}) == {"a": (3, 4), "y": (3, 4)}
