"""Tensors that must not be clipped: outputs, and those with a known range."""

import logging

import numpy as np
import pytest

import fastcal
from fastcal.algorithm import Algorithm
from fastcal.model import Model

# Boxes and class scores in one output, a gate within, and an attention's weights.
DETECTOR = """
    f (float[N, 8] x) => (float[N, 4, 2] y, float[N, 8] z) {
        gate = Sigmoid(x)
        gated = Mul(x, gate)
        weights = Softmax<axis = -1>(gated)
        scores = Sigmoid(gated)
        shape = Constant<value_ints = [-1, 2, 2]>()
        low = Constant<value_ints = [0]>()
        high = Constant<value_ints = [4]>()
        axes = Constant<value_ints = [1]>()
        four = Slice(scores, low, high, axes)
        moved = Reshape(four, shape)
        boxes = Slice(gated, low, high, axes)
        placed = Reshape(boxes, shape)
        y = Concat<axis = 1>(placed, moved)
        z = Mul(weights, gated)
    }
"""


def test_which_tensors_are_not_clipped(onnx_file):
    least = Model(onnx_file(DETECTOR)).least_thresholds
    assert least == {
        "gate": 1.0, "scores": 1.0, "four": 1.0, "moved": 1.0, "weights": 0.0,
        "boxes": 0.0, "placed": 0.0, "gated": 0.0, "y": 0.0, "z": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("last", "least"), [("Softmax<axis = -1>(x)", 1.0), ("Tanh(x)", 1.0), ("HardSigmoid(x)", 1.0), ("Relu(x)", 0.0)]
)
def test_the_range_of_an_output(onnx_file, last, least):
    assert Model(onnx_file(f"f (float[N, 8] x) => (float[N, 8] y) {{ y = {last} }}")).least_thresholds == {"y": least}


@pytest.fixture
def rare():
    """Batches in which few of many values are large, so that entropy and percentile clip them."""
    values = np.random.default_rng(0).normal(-4, 0.5, (4, 500, 8)).astype("f4")
    values[2, :2] = 3.0
    return [{"x": each} for each in values]


@pytest.mark.parametrize("algorithm", ["entropy2", "entropy", "percentile", "mse"])
def test_outputs_and_known_ranges_are_not_clipped(onnx_file, rare, algorithm):
    model = onnx_file(DETECTOR)
    options = {"algorithm": algorithm, "quantile": 0.99, "backend": "onnxruntime", "tensorrt_version": "10.3.0"}
    kept = fastcal.calibrate(model, rare, **options)
    exact = fastcal.calibrate(model, rare, exact=True, **options)
    amax = {name: np.float32(found.amax) for name, found in kept.observed.histograms.items()}
    for name in ("gate", "scores", "moved"):
        assert kept.scales[name] == float(np.float32(1) / np.float32(127))
    for name in ("boxes", "gated", "y", "z", "weights"):
        assert kept.scales[name] >= float(amax[name] / np.float32(127))
        assert kept.scales[name] == max(exact.scales[name], float(amax[name] / np.float32(127)))
    assert kept.scales["x"] == exact.scales["x"]
    if algorithm != "mse":  # it clips less than the others
        assert any(exact.scales[name] < kept.scales[name] for name in ("boxes", "y"))
    assert exact.scales == Algorithm.of(algorithm, 0.99).scales(exact.observed)


def test_minmax_stays_tensorrts(onnx_file, rare):
    options = {"algorithm": "minmax", "backend": "onnxruntime", "tensorrt_version": "10.3.0"}
    kept = fastcal.calibrate(onnx_file(DETECTOR), rare, **options)
    exact = fastcal.calibrate(onnx_file(DETECTOR), rare, exact=True, **options)
    assert kept.to_bytes() == exact.to_bytes()
    assert kept.record == exact.record


def test_the_log_names_them(onnx_file, rare, caplog):
    caplog.set_level(logging.INFO, "fastcal")
    options = {"algorithm": "percentile", "quantile": 0.99, "backend": "onnxruntime"}
    fastcal.calibrate(onnx_file(DETECTOR), rare, **options)
    assert "not clipped, as outputs or by their known range: gate (" in caplog.text
    assert "with exact (--exact) they are" in caplog.text
    caplog.clear()
    fastcal.calibrate(onnx_file(DETECTOR), rare, exact=True, **options)
    assert "not clipped" not in caplog.text


@pytest.mark.parametrize("exact", [True, False])
def test_a_cache_of_the_other_kind_is_stale(onnx_file, rare, tmp_path, caplog, exact):
    options = {"backend": "onnxruntime", "tensorrt_version": "10.3.0", "cache": tmp_path / "x.cache"}
    fastcal.calibrate(onnx_file(DETECTOR), rare, exact=exact, **options)
    caplog.set_level(logging.INFO, "fastcal")
    fastcal.calibrate(onnx_file(DETECTOR), rare, exact=not exact, **options)
    assert f"it was made from other keeps_ranges ({not exact} then, {exact} now)" in caplog.text
    assert fastcal.calibrate(onnx_file(DETECTOR), rare, exact=not exact, **options).observed is None


def test_a_pooled_output_is_not_clipped(onnx_file):
    """TensorRT gives the output of a pooling layer the scale of the layer's input."""
    values = np.random.default_rng(0).normal(0, 0.1, (1, 1, 64, 64)).astype("f4")
    values[0, 0, 9, 9] = 4
    model = onnx_file(
        "f (float[1, 1, 64, 64] x) => (float[1, 1, 32, 32] y) "
        "{ r = Relu(x) y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r) }"
    )
    options = {"algorithm": "percentile", "quantile": 0.99, "backend": "onnxruntime"}
    scales = fastcal.calibrate(model, [values], **options).scales
    assert scales["y"] == scales["r"] == float(np.float32(4) / np.float32(127))
    assert scales["x"] < scales["r"] / 4
    clipped = fastcal.calibrate(model, [values], exact=True, **options).scales
    assert clipped["y"] == clipped["r"] < scales["r"] / 4


def test_a_cache_by_error_is_one_of_entropy2_for_tensorrt(onnx_file, rare, tmp_path):
    options = {"algorithm": "mse", "backend": "onnxruntime", "tensorrt_version": "10.3.0"}
    cache = fastcal.calibrate(onnx_file(DETECTOR), rare, cache=tmp_path / "x.cache", **options)
    assert cache.header == "TRT-100300-EntropyCalibration2"
    assert cache.record.entries["algorithm"] == "mse"
    again = fastcal.calibrate(onnx_file(DETECTOR), rare, cache=tmp_path / "x.cache", **options)
    assert again.observed is None
    assert again.scales == cache.scales
