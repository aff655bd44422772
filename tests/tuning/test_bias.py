"""The mean error of one layer's outputs, measured by running it, is what bias correction takes out."""

import numpy as np
import pytest

from fastcal.model import Model
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.bias import corrections

RANDOM = np.random.default_rng(5)


def weights(*shape):
    return RANDOM.standard_normal(shape).astype("f4")


#: A layer, the shape of its input without the batch, its constants, and the axis of its channels.
LAYERS = {
    "a convolution": ("y = Conv(x, w)", (4, 6, 6), {"w": weights(3, 4, 3, 3)}, 1),
    "a bias": ("y = Conv(x, w, b)", (4, 6, 6), {"w": weights(3, 4, 3, 3), "b": weights(3)}, 1),
    "groups": ("y = Conv<group = 2>(x, w)", (4, 6, 6), {"w": weights(6, 2, 1, 1)}, 1),
    "Gemm": ("y = Gemm(x, w, b)", (8,), {"w": weights(8, 5), "b": weights(5)}, 1),
    "Gemm, transposed": ("y = Gemm<transB = 1>(x, w)", (8,), {"w": weights(5, 8)}, 1),
    "MatMul and Add": ("m = MatMul(x, w) y = Add(m, b)", (7, 8), {"w": weights(8, 5), "b": weights(5)}, 2),
    "Add and MatMul": ("m = MatMul(x, w) y = Add(b, m)", (7, 8), {"w": weights(8, 5), "b": weights(5)}, 2),
}


def mean_error(model, axes, scales, batches, axis, bias):
    """Return the mean of INT8 minus float for each output channel, by running both."""
    graph = Graph(model)
    for name, correction in bias.items():
        graph.correct_bias(graph.producers[name], correction)
    graph.insert_pairs(axes, scales)
    errors = []
    with OnnxRuntimeRunner(model) as exact, OnnxRuntimeRunner(model, variant=graph.proto) as rounded:
        for batch in batches:
            error = rounded.run(batch)["y"].astype("f8") - exact.run(batch)["y"]
            errors.append(np.moveaxis(error, axis, -1).reshape(-1, error.shape[axis]))
    return np.concatenate(errors).mean(axis=0)


def corrected(onnx_file, text, shape, constants):
    dims = ", ".join(map(str, shape))
    rank = ", ".join(["N", *"PQR"[: text.count("Conv") * 2 + (len(shape) == 2)], "M"])
    model = Model(onnx_file(f"net (float[N, {dims}] x) => (float[{rank}] y) {{ {text} }}", constants))
    # Skewed, never negative; flat images, of which a kernel sees the same everywhere.
    size = (shape[0], 1, 1) if len(shape) == 3 else shape
    values = 2 * RANDOM.gamma(1.0, size=(3, 4, *size)) * np.ones(shape)
    batches = [{"x": each.astype("f4")} for each in values]
    scales = dict.fromkeys(model.varying, 0.02)  # clips what is above 2.54
    axes = Placement(Graph(model), scales, set()).axes
    return model, axes, scales, batches, corrections(model, axes, scales, batches)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_error_is_taken_out(onnx_file, layer):
    text, shape, constants, axis = LAYERS[layer]
    model, axes, scales, batches, bias = corrected(onnx_file, text, shape, constants)
    before = mean_error(model, axes, scales, batches, axis, {})
    after = mean_error(model, axes, scales, batches, axis, bias)
    assert np.abs(before).max() > 0.1
    assert np.abs(after).max() < 1e-5 * np.abs(before).max() + 2e-6


@pytest.mark.parametrize(
    ("text", "shape", "constants"),
    [
        ("y = MatMul(x, w)", (7, 8), {"w": weights(8, 5)}),
        ("y = Gemm<beta = 0.5>(x, w, b)", (8,), {"w": weights(8, 5), "b": weights(5)}),
        ("c = ReduceMean<keepdims = 0>(x) d = Mul(c, b) y = Conv(x, w, d)", (4, 3, 3),
         {"w": weights(3, 4, 3, 3), "b": weights(3)}),
    ],
)  # fmt: skip
def test_a_layer_without_a_constant_bias_stays_as_it_is(onnx_file, text, shape, constants):
    *_, bias = corrected(onnx_file, text, shape, constants)
    assert bias == {}


def test_a_bias_that_two_layers_share_is_corrected_for_each(onnx_file):
    constants = {"w1": weights(3, 4, 1, 1), "w2": 2 * weights(3, 4, 1, 1), "b": weights(3)}
    text = "a = Conv(x, w1, b) c = Conv(x, w2, b) y = Sub(a, c)"
    model, axes, scales, batches, bias = corrected(onnx_file, text, (4, 6, 6), constants)
    assert set(bias) == {"a", "c"}
    assert np.abs(mean_error(model, axes, scales, batches, 1, bias)).max() < 1e-5
    graph = Graph(model)
    graph.correct_bias(graph.producers["a"], bias["a"])
    graph.insert_pairs(axes, scales)
    assert {tensor.name for tensor in graph.proto.graph.initializer} >= {"b", "a_corrected_bias"}
