"""Weights that are constants but not stored as they are read: expressions that depend on no input."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import fastcal
from fastcal.model import Model
from fastcal.qdq import count_quantized

RANDOM = np.random.default_rng(3)
WEIGHTS = RANDOM.normal(size=(6, 4)).astype("f4") * np.float32([1, 0.1, 10, 3])
INT8 = np.round(WEIGHTS / np.abs(WEIGHTS).max(0) * 127).astype("i1")
BATCH = {"x": RANDOM.normal(size=(5, 6)).astype("f4")}

#: Expressions of a (6, 4) matrix `w`, with the initializers that they read.
EXPRESSIONS = {
    "u = Unsqueeze(a, zero) w = Squeeze(u, zero)": {"a": WEIGHTS, "zero": np.int64([0])},
    "w = Slice(a, from, to)": {"a": np.pad(WEIGHTS, ((1, 0), (0, 0))), "from": np.int64([1]), "to": np.int64([7])},
    "w = Concat<axis = 0>(a, b)": {"a": WEIGHTS[:2], "b": WEIGHTS[2:]},
    "w = Mul(a, b)": {"a": WEIGHTS / 2, "b": np.float32([2])},
    "w = Gather<axis = 1>(a, i)": {"a": WEIGHTS[:, ::-1].copy(), "i": np.int64([3, 2, 1, 0])},
    "w, rest = Split<axis = 1>(a, sizes)": {"a": np.hstack([WEIGHTS, WEIGHTS]), "sizes": np.int64([4, 4])},
    "w = DequantizeLinear<axis = 1>(a, s)": {"a": INT8, "s": (np.abs(WEIGHTS).max(0) / 127).astype("f4")},
    "q = QuantizeLinear(a, s, z) w = DequantizeLinear(q, s, z)": {"a": WEIGHTS, "s": np.float32(0.1), "z": np.int8(0)},
    "h = Cast<to = 10>(a) t = Transpose(h) c = Cast<to = 1>(t) w = Transpose(c)": {"a": WEIGHTS},
    "l = Shape(a) o = ConstantOfShape<value = float[1] {2}>(l) w = Add(a, o)": {"a": WEIGHTS - 2},
    f"c = Constant<value = float[6, 4] {{{','.join(map(str, WEIGHTS.ravel()))}}}>() w = Neg(c)": {},
    "w = If(yes) <then_branch = f () => (float[6, 4] p) { p = Neg(a) }, "
    "else_branch = g () => (float[6, 4] q) { q = Identity(a) }>": {"a": -WEIGHTS, "yes": np.array(True)},
}  # fmt: skip


def outputs(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model.read_bytes()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, BATCH)[0]


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("layer", ["MatMul(x, w)", "Gemm(x, w, bias)"])
def test_a_constant_expression_is_quantized_as_stored_weights_are(onnx_file, caplog, expression, layer):
    bias = {"bias": np.zeros(4, "f4")} if "bias" in layer else {}
    path = onnx_file(
        f"f (float[N, 6] x) => (float[N, 4] y) {{ {expression} y = {layer} }}", EXPRESSIONS[expression] | bias
    )
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    model = fastcal.quantize(path, cache)
    onnx.checker.check_model(model, full_check=True)
    assert caplog.messages == []
    assert count_quantized(model) == (1, 1)
    found = initializers(model)
    shown = onnx.load(path)
    shown.graph.output.append(onnx.ValueInfoProto(name="w"))
    del shown.graph.output[0]
    weights = outputs(shown)
    assert found["w"].tobytes() == weights.tobytes()
    assert found["w_scale"].tobytes() == (np.abs(weights).max(0) / np.float32(127)).tobytes()
    # Nothing is left of the expression.
    direct = onnx_file(f"f (float[N, 6] x) => (float[N, 4] y) {{ y = {layer} }}", {"w": weights} | bias)
    want = fastcal.quantize(direct, fastcal.CalibrationCache(cache.scales))
    assert [node.SerializeToString() for node in model.graph.node] == [n.SerializeToString() for n in want.graph.node]
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in initializers(want).items()
    }
    exact, noise = outputs(path), outputs(model) - outputs(path)
    assert 10 * np.log10(np.square(exact).sum() / np.square(noise).sum()) > 30


def test_the_weights_of_a_convolution_are_folded(onnx_file):
    weights = RANDOM.normal(size=(4, 2, 3, 3)).astype("f4")
    path = onnx_file(
        "f (float[N, 2, 8, 8] x) => (float[N, 2, 8, 8] y) {"
        "  w = Reshape(flat, shape) c = Conv(x, w) v = Reshape(flat, shape) y = ConvTranspose(c, w) }",
        {"flat": weights.ravel(), "shape": np.int64([4, 2, 3, 3])},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "c": 0.1}))
    onnx.checker.check_model(model, full_check=True)
    assert count_quantized(model) == (2, 2)
    found = initializers(model)
    scales = {found[node.input[1]].size: found[node.input[1]] for node in model.graph.node if node.input[0] == "w"}
    assert scales[4].tolist() == (np.abs(weights).max((1, 2, 3)) / np.float32(127)).tolist()
    assert scales[2].tolist() == (np.abs(weights).max((0, 2, 3)) / np.float32(127)).tolist()


def test_what_others_read_stays(onnx_file):
    path = onnx_file(
        "f (float[N, 4] x, int64[N] i) => (float[N, 4] y, float[N, 4] e, float[2, 4] second, float[2, 4] first) {"
        "  wt = Transpose(w) m = MatMul(x, wt) e = Gather(w, i) first, second = Split(halves)"
        "  y = MatMul(m, first) }",
        {"w": RANDOM.normal(size=(2, 4)).astype("f4"), "halves": RANDOM.normal(size=(4, 4)).astype("f4")},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "m": 0.1}))
    onnx.checker.check_model(model, full_check=True)
    assert count_quantized(model) == (2, 2)
    batch = {"x": RANDOM.normal(size=(3, 4)).astype("f4"), "i": np.int64([0, 1, 1])}
    got, want = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(["e", "second", "first"], batch)
        for data in (model.SerializeToString(), path.read_bytes())
    )
    assert [value.tolist() for value in got] == [value.tolist() for value in want]


def test_weights_that_chance_gives_are_no_constants(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) { c = Conv(x, w) [noisy] y = Conv(c, r)"
        "  r = RandomNormal<shape = [2, 2, 1, 1]>() }",
        {"w": np.ones((2, 2, 1, 1), "f4")},
    )
    proto = onnx.load(path)
    nodes = [proto.graph.node[index] for index in (2, 0, 1)]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)
    assert count_quantized(fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "c": 0.1}))) == (1, 2)
    assert caplog.messages == ["layers that stay in float: noisy (its weights r are computed)"]


def test_stored_int8_weights_are_no_pairs_but_rounded_activations_are(onnx_file, caplog):
    parts = {"a": INT8, "s": (np.abs(WEIGHTS).max(0) / 127).astype("f4"), "t": np.float32(0.1), "z": np.int8(0)}
    stored = "f (float[N, 6] x) => (float[N, 4] y) { w = DequantizeLinear<axis = 1>(a, s) y = MatMul(x, w) }"
    assert not Model(onnx_file(stored, parts)).has_pairs
    rounded = stored.replace(
        "y = MatMul(x, w)", "q = QuantizeLinear(x, t, z) d = DequantizeLinear(q, t, z) y = MatMul(d, w)"
    )
    assert Model(onnx_file(rounded, parts)).has_pairs
    given = "f (uint8[N, 6] x) => (float[N, 4] y) { d = DequantizeLinear(x, t) y = MatMul(d, w) }"
    assert Model(onnx_file(given, parts | {"w": WEIGHTS})).has_pairs


def test_a_sparse_weight_is_named(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 6] x) => (float[N, 4] y) { m = MatMul(x, w) [sparse] y = MatMul(m, s) }", {"w": WEIGHTS}
    )
    proto = onnx.load(path)
    values, indices = numpy_helper.from_array(np.ones(1, "f4"), "s"), numpy_helper.from_array(np.array([5]))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    onnx.save(proto, path)
    assert count_quantized(fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "m": 0.1}))) == (1, 2)
    assert caplog.messages == ["layers that stay in float: sparse (its weights s are of an unknown value)"]
