"""Layers that are not nodes of the graph itself: in local functions, in the subgraphs of If, Loop and Scan."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastcal
from fastcal.errors import ModelError
from fastcal.model import Model
from fastcal.qdq import count_quantized

RANDOM = np.random.default_rng(5)
WEIGHTS = {name: RANDOM.normal(size=(4, 4)).astype("f4") for name in ("w", "v")}
BATCH = {"x": RANDOM.normal(size=(2, 4)).astype("f4")}
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def function(name, inputs, outputs, nodes, attributes=()):
    return helper.make_function("local", name, inputs, outputs, nodes, OPSETS, list(attributes))


def call(name, inputs, outputs, **attributes):
    return helper.make_node(name, inputs, outputs, domain="local", **attributes)


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4])


def save(path, nodes, functions, outputs=("y",)):
    initializers = [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "g", [value("x")], [value(name) for name in outputs], initializers)
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=9), path)
    return path


DENSE = function(
    "Dense", "iw", "o", [helper.make_node("MatMul", ["i", "w"], ["m"]), helper.make_node("Relu", ["m"], ["o"])]
)
TWICE = function("Twice", "i", "o", [call("Dense", ["i", "k"], ["h"]), helper.make_node("Sigmoid", ["h"], ["s"], "sg"),
                                     call("Dense", ["s", "k"], ["o"])])  # fmt: skip
TWICE.node.insert(0, helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHTS["w"])))
TWO = function("Two", "i", "pq", [helper.make_node("Relu", "i", "p"), helper.make_node("Sigmoid", "i", "q")])

#: Calls, and the tensors that TensorRT's parser makes of them (TensorRT for RTX 1.7.1), constants left out.
CALLS = {
    "one after the other": (
        [call("Dense", "xw", "a"), call("Dense", "av", "b"), call("Dense", "bw", "y")],
        ["m", "a", "m_1", "b", "m_5", "y"],
    ),
    "a name that the graph has too": (
        [call("Dense", "xw", "a"), helper.make_node("MatMul", ["a", "v"], ["m"]), call("Dense", "mw", "y")],
        ["m", "a", "m_1", "m_3", "y"],
    ),
    "an output that is called like a tensor within": (
        [call("Dense", "xw", "a"), call("Dense", "av", "m")], ["m_0", "a", "m_2", "m"],
    ),
    "a layer that is called like a layer within": (
        [helper.make_node("Sigmoid", "x", "a", "sg"), call("Twice", "a", "b"), call("Dense", "bv", "y")],
        ["a", "m", "h", "s", "m_2", "b", "m_7", "y"],
    ),
    "two outputs": (
        [call("Two", "x", "ab"), call("Two", "a", "cd"), helper.make_node("Add", "bd", "e"),
         helper.make_node("Add", "ce", "y")],
        ["a", "b", "c", "d", "e", "y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_functions_are_called_as_tensorrt_calls_them(tmp_path, name):
    nodes, names = CALLS[name]
    path = save(tmp_path / "m.onnx", nodes, [DENSE, TWICE, TWO], [nodes[-1].output[0]])
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    assert list(cache.scales) == ["x", *names]
    assert not fastcal.check_cache(cache, path)
    onnx.checker.check_model(Model(path).proto, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inlined = onnxruntime.InferenceSession(Model(path).proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, BATCH)[0].tobytes() == inlined.run(None, BATCH)[0].tobytes()


def test_outputs_of_functions_that_are_outputs_of_the_graph(tmp_path):
    nodes = [call("Dense", "xw", "a"), call("Dense", "av", "b"), call("Dense", "bv", "y")]
    assert Model(save(tmp_path / "m.onnx", nodes, [DENSE], "aby")).activations == ("m", "a", "m_2", "b", "m_7", "y")


def test_functions_that_call_functions_are_calibrated_and_quantized(tmp_path):
    path = save(tmp_path / "m.onnx", [call("Twice", "x", "a"), call("Dense", "av", "y")], [DENSE, TWICE])
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    assert list(cache.scales) == ["x", "m", "h", "s", "m_1", "a", "m_6", "y"]
    model = fastcal.quantize(path, cache)
    onnx.checker.check_model(model, full_check=True)
    assert count_quantized(model) == (3, 3)
    assert not model.functions


def test_a_function_with_an_attribute_and_an_if(onnx_file):
    path = onnx_file("f (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    f (float[2, 4] x) => (float[2, 4] y) <float[4, 4] w> {
      s = ReduceSum<keepdims = 0>(x)
      b = Cast<to = 9>(s)
      a = local.Choose<slope = 0.25>(x, w, b)
      y = local.Choose<slope = 0.5>(a, w, b)
    }
    <domain: "local", opset_import: ["" : 17]>
    Choose<slope>(i, w, b) => (o) {
      m = MatMul(i, w)
      o = If(b) <then_branch = t () => (t) { t = LeakyRelu<alpha: float = @slope>(m) },
                 else_branch = e () => (e) { e = Neg(m) }>
    }"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHTS["w"], "w"))
    onnx.save(proto, path)
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    assert list(cache.scales) == ["x", "s", "m", "a", "m_1", "y"]
    (session, inlined) = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for data in (path.read_bytes(), Model(path).proto.SerializeToString())
    )
    assert session.run(None, BATCH)[0].tobytes() == inlined.run(None, BATCH)[0].tobytes()
    assert [name for name in Model(path).calibrated if name not in cache.scales] == [*Model(path).within]


def test_a_function_that_calls_itself(tmp_path):
    again = function("Again", "i", "o", [call("Again", "i", "m"), helper.make_node("Relu", "m", "o")])
    path = save(tmp_path / "m.onnx", [call("Again", "x", "y")], [again])
    with pytest.raises(ModelError, match=r"m.onnx is not a valid ONNX model: .*recursive.*; export the network again$"):
        Model(path)


def test_functions_for_another_opset(tmp_path):
    old = helper.make_function("local", "Old", ["i"], ["o"], [helper.make_node("Dropout", ["i"], ["d"], ratio=0.5),
                               helper.make_node("Relu", ["d"], ["o"])], [helper.make_opsetid("", 11)])  # fmt: skip
    path = save(tmp_path / "m.onnx", [call("Old", "x", "a"), helper.make_node("MatMul", ["a", "w"], ["y"])], [old])
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    assert {"x", "a", "y"} <= cache.scales.keys()
    assert cache.scales["y"] > 0


BRANCHES = """f (float[2, 4] x) => (float[2, 4] y) {
  [top] a = MatMul(x, w)
  s = ReduceSum<keepdims = 0>(a)
  c = Cast<to = 9>(s)
  b = If(c) <then_branch = t () => (float[2, 4] t) { [left] t = MatMul(a, v) },
             else_branch = e () => (float[2, 4] e) { k = Relu(a) [right] e = MatMul(k, w) }>
  y = MatMul(b, w)
}"""

LOOP = """f (float[2, 4] x) => (float[2, 4] y) {
  n = Constant<value = int64 {3}>()
  yes = Constant<value = bool {1}>()
  y = Loop(n, yes, x) <body = g (int64 i, bool go, float[2, 4] p) => (bool on, float[2, 4] q)
    { on = Identity(go) m = MatMul(p, w) q = Tanh(m) }>
}"""

SCAN = """f (float[2, 4] x) => (float[2, 4] y) {
  y = Scan<num_scan_inputs = 1, body = g (float[4] row) => (float[4] out)
    { [inner] m = MatMul(row, w) out = Relu(m) }>(x)
}"""

#: A graph, its layers within subgraphs, the float tensors within, and what is quantized of how many layers.
GRAPHS = {
    "If": (BRANCHES, ["left", "right"], ["t", "k", "e"], (2, 4)),
    "Loop": (LOOP, ["m"], ["m", "q"], (0, 1)),
    "Scan": (SCAN, ["inner"], ["m", "out"], (0, 1)),
    "Loop and more": (
        LOOP.replace("y = Loop", "a = MatMul(x, v) y = Loop").replace("yes, x)", "yes, a)"), ["m"], ["m", "q"], (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAPHS)
def test_layers_in_subgraphs_are_named_everywhere(onnx_file, caplog, kind):
    graph, layers, tensors, counts = GRAPHS[kind]
    path = onnx_file(graph, {name: array for name, array in WEIGHTS.items() if name in graph})
    cache = fastcal.calibrate(path, [BATCH], backend="onnxruntime")
    assert caplog.messages == [
        f"no scale for {', '.join(tensors)}: they lie in an If, a Loop or a Scan, whose layers stay in float"
    ]
    found = fastcal.check_cache(cache, path)
    assert found.missing == tuple(tensors)
    assert found.unknown == ()
    assert not fastcal.check_cache(fastcal.CalibrationCache(cache.scales | dict.fromkeys(tensors, 0.5)), path)
    caplog.clear()
    named = [f"{layer} (it lies in an If, a Loop or a Scan)" for layer in layers]
    if counts[0]:
        model = fastcal.quantize(path, cache, exclude=layers)
        onnx.checker.check_model(model, full_check=True)
        assert caplog.messages == ["layers that stay in float: " + ", ".join(named)]
        assert count_quantized(model) == counts
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, BATCH)
    else:
        with pytest.raises(ModelError) as raised:
            fastcal.quantize(path, cache)
        assert str(raised.value) == f"{path} has no layer to quantize: {', '.join(named)}"


def test_what_a_subgraph_reads_is_not_fused(onnx_file):
    graph = """f (float[N, 2, 4, 4] x, bool b) => (float[N, 2, 4, 4] y) {
      c = Conv(x, w)
      [plus] s = Add(c, x)
      t = If(b) <then_branch = f () => (float[N, 2, 4, 4] p) { p = READ },
                 else_branch = g () => (float[N, 2, 4, 4] n) { n = Neg(x) }>
      y = Add(s, t)
    }"""
    for read, fused in (("Relu(c)", False), ("Relu(x)", True)):
        path = onnx_file(graph.replace("READ", read), {"w": np.ones((2, 2, 1, 1), "f4")})
        model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "c": 0.5}))
        (plus,) = [node for node in model.graph.node if node.name == "plus"]
        assert (plus.input[1] == "x_DequantizeLinear_Output") == fused


def test_a_subgraph_that_reads_what_depends_on_it_is_a_circle(onnx_file):
    path = onnx_file("""f (float[2, 4] x, bool b) => (float[2, 4] y) {
      a = MatMul(x, w)
      [turn] t = If(b) <then_branch = f () => (float[2, 4] p) { p = Relu(y) },
                        else_branch = g () => (float[2, 4] n) { n = Neg(a) }>
      y = Relu(t) }""", {"w": WEIGHTS["w"]})  # fmt: skip
    with pytest.raises(ModelError, match=r"is not a valid ONNX model: node '(turn|y)' depends on its own output"):
        fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}))
