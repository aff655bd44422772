"""A tensor that several scales would round gets one pair for all its readers."""

import numpy as np
import pytest

import fastcal
from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.meter import NoiseMeter

#: A convolution reads t, and so does a Concat before another one.
CONCAT = "c = Conv(x, w) t = Tanh(c) a = Conv(t, w) j = Concat<axis = 1>(t, a) y = Conv(j, w8)"

#: The block of a YOLOv8: a convolution, an Add and a Concat read a half of t.
BLOCK = """c = Conv(x, w) t = Tanh(c) p, q = Split<axis = 1>(t) d = Conv(q, w2) b = Tanh(d) s = Add(q, b)
    j = Concat<axis = 1>(p, q, s) e = Conv(j, w6) y = Relu(e)"""

#: A tensor that is moved before the Concat.
MOVED = """c = Conv(x, w) t = Tanh(c) r = Resize<mode = "nearest">(t, , twice) m = MaxPool<kernel_shape = [2, 2],
    strides = [2, 2]>(r) n = Transpose<perm = [0, 1, 3, 2]>(m) a = Conv(t, w) j = Concat<axis = 1>(n, a)
    y = Conv(j, w8)"""

RANDOM = np.random.default_rng(3)
CONSTANTS = {f"w{channels}": RANDOM.standard_normal((4, channels, 1, 1), dtype="f4") for channels in (4, 6, 8)}
CONSTANTS |= {"w": CONSTANTS.pop("w4"), "w2": RANDOM.standard_normal((2, 2, 1, 1), dtype="f4")}
CONSTANTS |= {
    "twice": np.array([1, 1, 2, 2], "f4"),
    "begin": np.array([2]),
    "end": np.array([4]),
    "axis": np.array([1]),
}
CONSTANTS["one"] = np.float32(1)


@pytest.fixture
def model_of(onnx_file):
    def make(body, outputs="float[N, 4, 8, 8] y"):
        constants = {name: value for name, value in CONSTANTS.items() if f" {name})" in body or f" {name}," in body}
        return Model(onnx_file(f"f (float[N, 4, 8, 8] x) => ({outputs}) {{ {body} }}", constants))

    return make


def shared(model, scales=None, excluded=()):
    """Return the readers of pairs that are no convolutions, as type and tensor, and the tensors with another's scale.

    By default all scales are 1. The nodes of the types `excluded` stay in float.
    """
    graph = Graph(model)
    numbers = {number for number, node in enumerate(graph.nodes) if node.op_type in excluded}
    placement = Placement(graph, dict.fromkeys(model.varying, 1.0) | (scales or {}), numbers)
    edges = [(graph.nodes[number].op_type, graph.nodes[number].input[index]) for number, index in placement.axes]
    return sorted(edge for edge in edges if edge[0] != "Conv"), placement.sources


@pytest.mark.parametrize(
    ("body", "edges", "sources"),
    [
        (CONCAT, [("Concat", "t")], {}),
        (BLOCK, [("Split", "t")], {"q": "t"}),
        (BLOCK.replace("p, q = Split<axis = 1>(t)", "p = Slice(t, begin, end, axis) q = Slice(t, begin, end, axis)"),
         [("Slice", "t")] * 2, {"q": "t"}),
        (MOVED, [("Resize", "t")], {}),
        # A second block behind the first sum.
        (BLOCK.replace("e =", "f = Conv(s, w2) g = Tanh(f) h = Add(s, g) k = Concat<axis = 1>(j, h) e =")
         .replace("(j, w6)", "(k, w8)"), [("Add", "s"), ("Concat", "s"), ("Split", "t")], {"q": "t"}),
    ],
)  # fmt: skip
def test_a_tensor_gets_a_pair_for_all_readers(model_of, body, edges, sources):
    assert shared(model_of(body)) == (edges, sources)


@pytest.mark.parametrize(
    ("body", "change"),
    [
        # Another reader is in float, or the tensor is an output.
        (CONCAT + " z = Exp(t)", {"outputs": "float[N, 4, 8, 8] y, float[N, 4, 8, 8] z"}),
        (CONCAT, {"outputs": "float[N, 4, 8, 8] y, float[N, 4, 8, 8] t"}),
        (CONCAT.replace("y = Conv(j, w8)", "y = Exp(j)"), {"outputs": "float[N, 8, 8, 8] y"}),
        (BLOCK.replace("e = Conv(j, w6)", "k = Exp(s) e = Conv(j, w6)"), {}),
        (BLOCK.replace("(p, q, s)", "(p, q, b)").replace("y = Relu(e)", "i = Exp(s) y = Relu(e)"), {}),
        (MOVED.replace("nearest", "linear"), {}),
        (CONCAT + " i = Add(t, one) z = Conv(i, w)", {}),
        # No value is rounded twice: the halves go ways of their own, or one scale rounds both readings.
        ("c = Conv(x, w) t = Tanh(c) p, q = Split<axis = 1>(t) a = Conv(p, w2) b = Conv(q, w2)"
         " y = Concat<axis = 1>(a, b)", {}),
        ("c = Conv(x, w) t = Tanh(c) j = Concat<axis = 1>(t, t) y = Conv(j, w8)", {}),
        ("c = Conv(x, w) t = Tanh(c) a = Conv(t, w) b = Tanh(a) s = Add(t, b) y = Conv(s, w)", {}),
        # No layer computes it.
        ("j = Concat<axis = 1>(x, x) y = Conv(j, w8) z = Conv(x, w)", {}),
        # The scales are far apart, or there is none; or the layer that would share stays in float.
        (BLOCK, {"scales": {"t": 2.1}}),
        (BLOCK, {"scales": {"t": 0.0}}),
        (CONCAT, {"excluded": ("Concat",)}),
        (BLOCK, {"excluded": ("Add",)}),
        (BLOCK, {"excluded": ("Split",)}),
    ],
)  # fmt: skip
def test_a_tensor_is_left_as_it_is(model_of, body, change):
    outputs = {"outputs": change["outputs"]} if "outputs" in change else {}
    options = {key: value for key, value in change.items() if key != "outputs"}
    assert shared(model_of(body, **outputs), **options) == ([], {})


def test_parts_are_near_up_to_twice_their_scale(model_of):
    assert shared(model_of(BLOCK), {"t": 1.9}) == ([("Split", "t")], {"q": "t"})


def test_a_part_has_the_scale_of_the_tensor(model_of):
    """The scales are those of the model, and of the noise that is measured before there is one."""
    model = model_of(BLOCK)
    scales = dict.fromkeys(model.varying, 0.02) | {"t": 0.01, "q": 0.0075}
    quantized = fastcal.quantize(model, fastcal.CalibrationCache(scales))
    values = {tensor.name: tensor for tensor in quantized.graph.initializer}
    found = {
        node.input[0]: values[node.input[1]].float_data or np.frombuffer(values[node.input[1]].raw_data, "f4")
        for node in quantized.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in scales
    }
    assert {name: float(np.float32(scale[0])) for name, scale in found.items()} == pytest.approx(
        {"x": 0.02, "t": 0.01, "q": 0.01, "j": 0.02}
    )
    batch = {"x": RANDOM.standard_normal((4, 4, 8, 8)).astype("f4")}
    with NoiseMeter(model, Placement(Graph(model), scales, set()), [batch]) as meter:
        simulated, made = meter.errors(meter.choice(True), scales), meter.errors_of(quantized)
    assert simulated.noise == pytest.approx(made.noise, rel=1e-4)
