"""Scales of tensors that hold the values of others."""

import numpy as np
import pytest

from fastcal.carried import carry_scales
from fastcal.model import Model
from fastcal.qdq_graph import Graph


def carried(path, **scales):
    return carry_scales(Graph(Model(path)), scales)


@pytest.mark.parametrize(
    ("layer", "scales", "expected"),
    [
        # All values of the input: both ways.
        ("Identity(x)", {"x": 1}, {"x": 1, "r": 1}),
        ("Flatten(x)", {"r": 1}, {"x": 1, "r": 1}),
        ("Transpose<perm = [0, 1, 3, 2]>(x)", {"r": 1}, {"x": 1, "r": 1}),
        ("Cast<to = 1>(x)", {"r": 1}, {"x": 1, "r": 1}),
        # Some values: forward only.
        ("Gather(x, one)", {"x": 1}, {"x": 1, "r": 1}),
        ("Gather(x, one)", {"r": 1}, {"r": 1}),
        ("AveragePool<kernel_shape = [2, 2]>(x)", {"x": 1}, {"x": 1, "r": 1}),
        ("AveragePool<kernel_shape = [2, 2]>(x)", {"r": 1}, {"r": 1}),
        ("GlobalAveragePool(x)", {"x": 1}, {"x": 1}),
        # A pair's scale stays.
        ("Relu(x)", {"x": 1, "r": 2}, {"x": 1, "r": 2}),
        ("Relu(x)", {"r": 2}, {"x": 2, "r": 2}),
        ("MaxPool<kernel_shape = [2, 2]>(x)", {"x": 1}, {"x": 1, "r": 1}),
        ("MaxPool<kernel_shape = [2, 2]>(x)", {"r": 1}, {"x": 1, "r": 1}),
        ("Sigmoid(x)", {"x": 1}, {"x": 1}),
        # A constant has no scale.
        ("Concat<axis = 1>(x, more)", {"r": 1}, {"x": 1, "r": 1}),
        ("Concat<axis = 1>(x, more)", {"x": 1}, {"x": 1, "r": 1}),
    ],
)
def test_one_layer(onnx_file, layer, scales, expected):
    graph = f"f (float[1, 3, 4, 4] x) => (float[A, B, C, D] y) {{ r = {layer} y = Abs(r) }}"
    assert carried(onnx_file(graph, {"one": np.array([1]), "more": np.ones((1, 3, 4, 4), "f4")}), **scales) == expected


def test_several_inputs_and_outputs(onnx_file):
    path = onnx_file(
        "f (float[1, 3, 4, 4] a, float[1, 3, 4, 4] b) => (float[A, B, C, D] y, float[E, F, G, H] z) "
        "{ c = Concat<axis = 1>(a, b) y, z = Split<axis = 1>(c) }"
    )
    assert carried(path, a=1) == {"a": 1}
    assert carried(path, a=1, b=3) == {"a": 1, "b": 3, "c": 3, "y": 3, "z": 3}
    assert carried(path, a=1, c=2) == {"a": 1, "b": 2, "c": 2, "y": 2, "z": 2}


def test_rounding_before_a_relu_is_seen_by_other_readers(onnx_file):
    path = onnx_file("f (float[1, 4] x) => (float[1, 4] y, float[1, 4] z) { a = Abs(x) y = Relu(a) z = Neg(a) }")
    assert carried(path, y=1) == {"y": 1}
    path = onnx_file("f (float[1, 4] x) => (float[1, 4] y, float[1, 4] a) { a = Abs(x) y = Relu(a) }")
    assert carried(path, y=1) == {"y": 1}


def test_chains_in_both_directions(onnx_file):
    path = onnx_file(
        "f (float[1, 4] x) => (float[1, 4] y) { a = Abs(x) b = Relu(a) c = Identity(b) d = Identity(b) e = Flatten(d) "
        "y = Add(c, e) }"
    )
    assert carried(path, c=1) == dict.fromkeys("abcde", 1)
