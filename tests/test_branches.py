"""Ifs whose condition is a constant: the branch that is taken replaces them, with the names of TensorRT's parser."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastcal
from fastcal.model import Model
from fastcal.qdq import count_quantized

X = np.random.default_rng(0).standard_normal((2, 4), dtype="f4")
CONSTANTS = {"yes": np.array(True), "no": np.array(False), "w": np.diag(np.float32([1, 2, 3, 4]))}


def value(name, shape=(2, 4)):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def branch(kind, x, inner="t", out="o"):
    """Two layers whose names and tensors every branch shares."""
    nodes = [helper.make_node("Relu", [x], [inner], "first"), helper.make_node(kind, [inner], [out], "second")]
    return helper.make_graph(nodes, "branch", [], [value(out)])


def choice(x, y, condition="yes", **names):
    then_branch, else_branch = branch("Sigmoid", x, **names), branch("Neg", x, **names)
    return helper.make_node("If", [condition], [y], then_branch=then_branch, else_branch=else_branch)


def nested(x, y, condition, inner_condition="yes"):
    nodes = [helper.make_node("Exp", [x], ["e"]), choice("e", "z", inner_condition)]
    inner = helper.make_graph(nodes, "outer", [], [value("z")])
    return helper.make_node("If", [condition], [y], then_branch=inner, else_branch=branch("Neg", x))


def with_constants(y, condition):
    """An If whose branches have constants of one name, give them, and give a tensor twice: ONNX Runtime fails there."""
    product = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["m"])], "b", [], [value("m"), value("k", [1, 1]), value("m")],
        [numpy_helper.from_array(np.float32([[3]]), "k")],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Add", ["x", "k"], ["m"])], "b", [], [value("m"), value("k", [1, 1]), value("m")],
        [numpy_helper.from_array(np.float32([[5]]), "k")],
    )  # fmt: skip
    outputs = [y, f"{y}_constant", f"{y}_again"]
    return helper.make_node("If", [condition], outputs, then_branch=product, else_branch=other)


@pytest.fixture
def save(tmp_path):
    """A function that writes a model of these nodes, from x to y, to a file."""

    def write(*nodes, outputs=("y",)):
        initializers = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()]
        graph = helper.make_graph(
            nodes, "g", [value("x")], [value(name, [None, None]) for name in outputs], initializers
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def run(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})


def parsed_names(path, trt):
    """Return the tensors of the network that NVIDIA's parser makes of a file."""
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse(path.read_bytes())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [layer.get_output(index).name for layer in layers for index in range(layer.num_outputs)]


CASES = {
    "one": [choice("x", "a"), helper.make_node("Tanh", ["a"], ["y"])],
    "the other": [choice("x", "a", "no"), helper.make_node("Tanh", ["a"], ["y"])],
    "the output": [choice("x", "y")],
    "four with the same names": [choice("x", "a"), choice("a", "b"), choice("b", "c", "no"), choice("c", "y")],
    "a name that comes later": [choice("x", "a"), helper.make_node("Exp", ["a"], ["t_0"]), choice("t_0", "y")],
    "nested": [nested("x", "a", "yes"), choice("a", "y")],
    "nested and not taken": [nested("x", "a", "no"), choice("a", "y")],
    "a condition from a node": [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(CONSTANTS["no"])), choice("x", "y", "c"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_of_tensorrts_parser(save, case):
    trt = pytest.importorskip("tensorrt_rtx")
    path = save(*CASES[case])
    model = Model(path)
    onnx.checker.check_model(model.proto, full_check=True)
    assert not any(node.op_type == "If" for node in model.proto.graph.node)
    assert list(model.activations) == parsed_names(path, trt)
    np.testing.assert_array_equal(run(model.proto.SerializeToString()), run(path))


@pytest.mark.parametrize("condition", ["yes", "no"])
def test_constants_and_copies(save, condition):
    outputs = ["a", "a_constant", "a_again", "b", "b_constant", "b_again"]
    path = save(with_constants("a", condition), with_constants("b", "yes"), outputs=outputs)
    model = Model(path).proto
    onnx.checker.check_model(model)
    assert not any(node.op_type == "If" for node in model.graph.node)
    a, k = (3 * X, 3) if condition == "yes" else (X + 5, 5)
    for ours, theirs in zip(run(model.SerializeToString()), [a, k, a, 3 * X, 3, 3 * X], strict=True):
        np.testing.assert_array_equal(ours, np.broadcast_to(np.float32(theirs), ours.shape))


@pytest.mark.parametrize("condition", ["yes", "no"])
def test_a_condition_that_is_computed_from_constants(save, condition):
    nodes = [helper.make_node("Not", [condition], ["n"]), helper.make_node("Or", ["n", "no"], ["c"])]
    path = save(*nodes, choice("x", "a", "c"), choice("a", "y", "c"))
    model = Model(path)
    assert not any(node.op_type == "If" for node in model.proto.graph.node)
    assert model.within == ()
    np.testing.assert_array_equal(run(model.proto.SerializeToString()), run(path))


def test_the_layers_are_calibrated_and_quantized(save):
    product = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["p"])], "b", [], [value("p")])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["p"])], "b", [], [value("p")])
    choose = helper.make_node("If", ["yes"], ["a"], then_branch=product, else_branch=other)
    path = save(choose, helper.make_node("MatMul", ["a", "w"], ["y"]))
    cache = fastcal.calibrate(path, [X], backend="onnxruntime", algorithm="minmax")
    assert list(cache.scales) == ["x", "a", "y"]
    assert cache.scales["a"] == float(np.abs(X @ CONSTANTS["w"]).max() / np.float32(127))
    assert not fastcal.check_cache(cache, path)
    quantized = fastcal.quantize(path, cache)
    onnx.checker.check_model(quantized, full_check=True)
    assert count_quantized(quantized) == (2, 2)
    assert "yes" not in {tensor.name for tensor in quantized.graph.initializer}  # nothing reads it any more


def test_other_ifs_stay(save):
    depends = [helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0), helper.make_node("Cast", ["s"], ["c"], to=9)]
    path = save(*depends, choice("x", "a", "c"), choice("a", "y"))
    model = Model(path)
    assert [node.op_type for node in model.proto.graph.node] == ["ReduceSum", "Cast", "If", "Relu", "Sigmoid"]
    onnx.checker.check_model(model.proto, full_check=True)
    np.testing.assert_array_equal(run(model.proto.SerializeToString()), run(path))
    assert set(model.within) == {"t", "o"}
    path = save(*depends, nested("x", "a", "yes", "c"), nested("a", "y", "yes", "c"))  # within branches that are taken
    model = Model(path).proto
    assert [node.op_type for node in model.graph.node if node.op_type != "Exp"] == ["ReduceSum", "Cast", "If", "If"]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model.SerializeToString()), run(path))
    inside = nested("x", "y", "c")  # within a branch that depends on the input
    model = Model(save(*depends, inside))
    assert model.proto.graph.node[-1] == inside


@pytest.mark.parametrize("fault", ["no branches", "an unknown operator", "no condition"])
def test_an_if_that_cannot_be_decided_stays(save, fault):
    node = choice("x", "y", "c" if fault == "an unknown operator" else "yes")
    nodes = [helper.make_node("Own", ["yes"], ["c"], domain="own"), node]
    if fault == "no branches":
        del node.attribute[:]
    if fault == "no condition":
        node.input[0] = ""
    path = save(*nodes)
    assert [node.op_type for node in Model(path).proto.graph.node] == ["Own", "If"]
