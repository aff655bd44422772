import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.tuning.choice import fewest, in_order, within
from fastcal.tuning.layers import Layer, depthwise_in, layers_of


def layers(*multiply_adds):
    return [Layer(number, f"layer {number}", f"y{number}", float(cost)) for number, cost in enumerate(multiply_adds)]


@given(st.integers(1, 70), st.integers(0, 80))
def test_the_first_that_suffices_is_found_with_few_tries(count, least):
    lengths, tried = list(range(count)), []
    found = fewest(lengths, lambda length: tried.append(length) or length >= least)
    assert found == min(least, lengths[-1])
    assert len(tried) <= 3 + 2 * math.log2(count)


def test_orders_begin_with_the_worst_and_leave_out_what_costs_nothing():
    by_noise, by_cost = in_order(layers(100, 10, 0, 50), [3.0, 1.0, 0.1, 0.0])
    assert by_noise == [0, 1, 2]
    assert by_cost == [1, 2, 0]  # an Add counts as one multiply-add


def test_layers_in_float_keep_within_the_share():
    found = layers(100, 10, 0, 50, 40)
    noises = [5.0, 3.0, 1.0, 0.01, 2.0]
    assert within(found, [0, 1, 4, 2, 3], noises, 0.15) == [1, 2]  # 30 of 200, and 3 has too little noise
    assert within(found, [0, 1, 4, 2, 3], noises, 0.25) == [1, 4, 2]
    assert within(found, [0, 1, 4, 2, 3], noises, 0.0) == [2]
    assert within(found, [0, 1, 4, 2, 3], noises, 1.0) == [0, 1, 4, 2]


def test_multiply_adds_are_those_of_the_definitions(onnx_file):
    constants = {
        "w1": np.ones((6, 3, 3, 3), "f4"), "w2": np.ones((6, 1, 3, 3), "f4"), "w3": np.ones((6, 4, 2, 2), "f4"),
        "w4": np.ones((5, 64), "f4"), "rows": np.array([0, -1], np.int64),
    }  # fmt: skip
    model = Model(onnx_file("""
        net (float[N, 3, 10, 10] x) => (float[N, 5] y, float[N, 4, M] z) {
            a = Conv(x, w1) b = Conv<group = 6>(a, w2) c = ConvTranspose<strides = [2, 2]>(b, w3)
            p = AveragePool<kernel_shape = [3, 3], strides = [3, 3]>(c) f = Flatten(p) y = Gemm<transB = 1>(f, w4)
            q = Flatten<axis = 2>(p) t = Transpose<perm = [0, 2, 1]>(q) z = MatMul(q, t)
        }""", constants))  # fmt: skip
    shapes = {"x": (2, 3, 10, 10), "a": (2, 6, 8, 8), "b": (2, 6, 6, 6), "c": (2, 4, 12, 12), "p": (2, 4, 4, 4),
              "f": (2, 64), "y": (2, 5), "q": (2, 4, 16), "t": (2, 16, 4), "z": (2, 4, 4)}  # fmt: skip
    graph = Graph(model)
    found = {layer.output: layer.multiply_adds for layer in layers_of(graph, [0, 1, 2, 3, 5, 8], shapes, 2)}
    assert found == {
        "a": 6 * 8 * 8 * 3 * 3 * 3, "b": 6 * 6 * 6 * 3 * 3, "c": 6 * 6 * 6 * 4 * 2 * 2, "p": 0, "y": 64 * 5,
        "z": 4 * 4 * 16,
    }  # fmt: skip
    assert depthwise_in(graph) == {1}
