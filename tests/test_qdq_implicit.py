"""The places where an engine that is built from a cache may round."""

import math

import numpy as np
import pytest

import fastcal
from fastcal.cache.cache import CalibrationCache
from fastcal.model import Model
from fastcal.qdq import add_pairs
from fastcal.qdq_implicit import ImplicitPlacement

MATRIX = {"w": np.eye(8, dtype=np.float32), "v": np.eye(8, dtype=np.float32) * 2, "two": np.float32(2)}
KERNEL = {"w": np.ones((4, 4, 1, 1), np.float32), "v": np.ones((4, 4, 1, 1), np.float32), "b": np.ones(4, np.float32)}
KERNEL |= {"sizes": np.array([1, 4, 16, 16])}

VECTORS = "f (float[N, 8] x) => (float[N, 8] y)"
IMAGES = "f (float[1, 4, 8, 8] x) => (float[1, 4, M, M] y)"

#: Graphs, their constants, and the activations that each node reads in INT8.
GRAPHS = {
    "a swish belongs to its convolution": (
        f"{IMAGES} {{ c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v) }}",
        KERNEL,
        {"c": {"x"}, "y": {"m"}},
    ),
    "a normalization and a shortcut belong to the last convolution": (
        f"{IMAGES} {{ c = Conv(x, w) n = BatchNormalization(c, b, b, b, b) r = Relu(n)\n"
        "d = Conv(r, v) a = Add(d, r) e = Relu(a) y = Conv(e, w) }",
        KERNEL,
        {"c": {"x"}, "d": {"r"}, "a": {"r"}, "y": {"e"}},
    ),
    "the shorter branch of a residual connection is not in the kernel of the convolution": (
        f"{IMAGES} {{ c = Conv(x, w) r = Relu(c) d = Conv(r, v) s = Conv(x, v) y = Add(d, s) }}",
        KERNEL,
        {"c": {"x"}, "d": {"r"}, "s": {"x"}, "y": {"s"}},
    ),
    "a pointwise kernel reads what another kernel writes": (
        f"{VECTORS} {{ r = Relu(x) t = Tanh(r) m = MatMul(t, w) s = Sum(m, r) y = Sub(s, two) }}",
        MATRIX,
        {"r": {"x"}, "m": {"t"}, "s": {"r"}},
    ),
    "poolings and resizings read INT8": (
        f"{IMAGES} {{ r = Conv(x, w) p = AveragePool<kernel_shape = [1, 1]>(r) z = Resize(p, , , sizes)\n"
        "g = GlobalAveragePool(z) k = MaxPool<kernel_shape = [1, 1]>(z) e = Elu(k) y = Mul(e, g) }",
        KERNEL,
        {"r": {"x"}, "p": {"r"}, "z": {"p"}, "g": {"z"}, "e": {"k"}, "y": {"g"}},
    ),
    "a pooling behind a convolution is a kernel of its own": (
        f"{IMAGES} {{ c = Conv(x, w) k = MaxPool<kernel_shape = [1, 1]>(c) y = Relu(k) }}",
        KERNEL,
        {"c": {"x"}, "y": {"k"}},
    ),
    "what a normalization computes stays in float": (
        f"{VECTORS} {{ m = MatMul(x, w) s = Softmax(m) d = Mul(s, m) mean = ReduceMean<axes = [1]>(d)\n"
        "c = Sub(d, mean) l = LayerNormalization(c, v) y = Add(l, c) }",
        {"w": MATRIX["w"], "v": np.ones(8, np.float32)},
        {"m": {"x"}},
    ),
    "a layer that only moves values is a kernel of its own": (
        f"{VECTORS} {{ m = MatMul(x, w) i = Identity(m) y = Relu(i) }}",
        MATRIX,
        {"m": {"x"}, "y": {"i"}},
    ),
}


def read_in_int8(path, without=()):
    """Return the activations that each node reads in INT8, by the node's first output."""
    model = Model(path)
    cache = CalibrationCache({name: 0.5 for name in (*model.calibrated, "two") if name not in without})
    nodes = add_pairs(model, cache, placing=ImplicitPlacement).graph.node
    quantized = {node.output[0]: node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    source = {node.output[0]: quantized.get(node.input[0], "") for node in nodes if node.op_type == "DequantizeLinear"}
    found = {node.output[0]: {source[name] for name in node.input if name in source} for node in nodes}
    weights, inner = {"w", "v", ""}, {*source, *quantized}
    return {name: names - weights for name, names in found.items() if names - weights and name not in inner}


@pytest.mark.parametrize("case", GRAPHS)
def test_which_activations_are_read_in_int8(onnx_file, case):
    graph, constants, expected = GRAPHS[case]
    assert read_in_int8(onnx_file(graph, constants)) == expected


def test_without_a_scale_nothing_is_rounded(onnx_file):
    path = onnx_file(f"{VECTORS} {{ r = Relu(x) m = MatMul(r, w) e = Exp(x) y = Add(m, e) }}", MATRIX)
    assert read_in_int8(path) == {"r": {"x"}, "m": {"r"}, "e": {"x"}, "y": {"m"}}
    assert read_in_int8(path, without=["x"]) == {"m": {"r"}, "y": {"m"}}


def rounded(values, scale):
    return np.clip(np.rint(values / np.float32(scale)), -128, 127) * np.float32(scale)


def test_the_comparison_rounds_there(onnx_file):
    """Against NumPy: each activation that a kernel reads is rounded, in place of the convolution's alone."""
    random = np.random.default_rng(0)
    values = {"w": random.standard_normal((1, 1, 1, 1)).astype("f4"), "sizes": np.array([1, 1, 8, 8])}
    path = onnx_file(
        "f (float[1, 1, 8, 8] x) => (float[1, 1, 8, 8] y) { t = Tanh(x) u = Resize(t, , , sizes) y = Conv(u, w) }",
        values,
    )
    x = random.standard_normal((1, 1, 8, 8)).astype("f4")
    cache = fastcal.calibrate(path, [x], backend="onnxruntime", algorithm="minmax")
    weight = values["w"].item()  # a single weight is exact in INT8
    for rounding, inputs in (("explicit", x), ("implicit", rounded(x, cache.scales["x"]))):
        t = np.tanh(inputs)
        t = t if rounding == "explicit" else rounded(t, cache.scales["t"])
        noise = np.square(weight * rounded(t, cache.scales["u"]) - weight * np.tanh(x), dtype=np.float64).sum()
        expected = 10 * math.log10(np.square(weight * np.tanh(x), dtype=np.float64).sum() / noise)
        found = fastcal.compare(path, [x], rounding=rounding).qualities["minmax"].sqnr
        assert found == pytest.approx(expected, abs=0.05)
