"""Q/DQ models of all layers and ranks in ONNX Runtime at its default optimization level, which moves pairs."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastcal
from fastcal.qdq import count_quantized

RANDOM = np.random.default_rng(2)


def f(*shape):
    return RANDOM.normal(size=shape).astype("f4")


def node(kind, inputs, **attributes):
    return helper.make_node(kind, inputs.split(), ["y"], **attributes)


def renamed(nodes):
    """A chain of nodes, each of which reads the output of the one before as "last"."""
    for number, each in enumerate(nodes[:-1]):
        each.output[0] = f"t{number}"
        nodes[number + 1].input[:] = [f"t{number}" if name == "last" else name for name in nodes[number + 1].input]
    return nodes


def layers():
    """Each kind of layer for each rank: its nodes, inputs and initializers."""
    for x, w in (
        ((4, 6), (6, 5)), ((2, 4, 6), (6, 5)), ((2, 4, 6), (2, 6, 5)), ((2, 4, 6), (1, 6, 5)),
        ((2, 3, 4, 6), (3, 6, 5)), ((2, 3, 4, 6), (2, 3, 6, 5)), ((4, 6), (3, 6, 5)), ((4, 6), (6,)), ((6,), (6, 5)),
        ((6,), (2, 6, 5)),
    ):  # fmt: skip
        yield f"MatMul {x} {w}", [node("MatMul", "x w")], {"x": f(*x)}, {"w": f(*w)}
        if w[-1] == 5:
            with_bias = renamed([node("MatMul", "x w"), node("Add", "last b"), node("Relu", "last")])
            yield f"MatMul and bias {x} {w}", with_bias, {"x": f(*x)}, {"w": f(*w), "b": f(5)}
    for x, w in (((6, 4), (5, 6)), ((2, 6, 4), (5, 6)), ((2, 6, 4), (2, 5, 6)), ((6,), (5, 6)), ((6, 4), (6,))):
        yield f"weights on the left {x} {w}", [node("MatMul", "w x")], {"x": f(*x)}, {"w": f(*w)}
    yield "two activations", [node("MatMul", "x z")], {"x": f(2, 4, 6), "z": f(2, 6, 3)}, {}
    for a, b in itertools.product((0, 1), (0, 1)):
        x, w = (6, 4) if a else (4, 6), (5, 6) if b else (6, 5)
        gemm = node("Gemm", "x w b", transA=a, transB=b, alpha=0.5)
        yield f"Gemm {a} {b}", [gemm], {"x": f(*x)}, {"w": f(*w), "b": f(5)}
    for rank in (1, 2, 3):
        x, kernel = f(2, 4, *(8,) * rank), (3,) * rank
        yield f"Conv {rank}", [node("Conv", "x w b")], {"x": x}, {"w": f(6, 4, *kernel), "b": f(6)}
        yield f"Conv in groups {rank}", [node("Conv", "x w", group=2)], {"x": x}, {"w": f(6, 2, *kernel)}
        yield f"ConvTranspose {rank}", [node("ConvTranspose", "x w b")], {"x": x}, {"w": f(4, 6, *kernel), "b": f(6)}
        up = [node("ConvTranspose", "x w", group=2)]
        yield f"ConvTranspose in groups {rank}", up, {"x": x}, {"w": f(4, 3, *kernel)}
    residual = [
        node("Conv", "x w", pads=[1] * 4), node("Add", "last x"), node("AveragePool", "last", kernel_shape=[2, 2]),
        node("Conv", "last w"), node("GlobalAveragePool", "last"), node("Flatten", "last"), node("MatMul", "last v"),
        node("Add", "last b"),
    ]  # fmt: skip
    yield "residual", renamed(residual), {"x": f(2, 4, 8, 8)}, {"w": f(4, 4, 3, 3), "v": f(4, 3), "b": f(3)}
    for pool in (node("AveragePool", "x", kernel_shape=[1, 1]), node("GlobalAveragePool", "x")):
        pooled = renamed([pool, node("MatMul", "last w"), node("Add", "last b")])
        yield f"{pool.op_type} and MatMul", pooled, {"x": f(2, 3, 1, 1)}, {"w": f(1, 5), "b": f(5)}
    shared = [node("Relu", "x"), node("Conv", "last k"), node("MatMul", "last w"), node("Add", "last b")]
    shared = renamed(shared)
    shared[2].input[0] = "t0"
    yield (
        "read by Conv and MatMul",
        [*shared[:3], node("Add", "t2 t1")],
        {"x": f(2, 3, 6, 6)},
        {"w": f(6, 6), "k": f(3, 3, 1, 1)},
    )
    linear = [node("MatMul", "x w"), node("Add", "last b"), node("Relu", "last"), node("MatMul", "last v")]
    yield "two layers", renamed(linear), {"x": f(2, 4, 6)}, {"w": f(6, 5), "b": f(5), "v": f(2, 5, 3)}


LAYERS = {name: rest for name, *rest in layers()}


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_runs_optimized(tmp_path, name, opset):
    nodes, inputs, weights = LAYERS[name]
    values = [helper.make_tensor_value_info(each, TensorProto.FLOAT, array.shape) for each, array in inputs.items()]
    initializers = [numpy_helper.from_array(array, each) for each, array in weights.items()]
    output = onnx.ValueInfoProto(name="y", type=onnx.TypeProto(tensor_type={"elem_type": TensorProto.FLOAT}))
    graph = helper.make_graph(nodes, "g", values, [output], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), tmp_path / "m")
    scales = dict.fromkeys([*inputs, *(each.output[0] for each in nodes)], 0.03)
    model = fastcal.quantize(tmp_path / "m", fastcal.CalibrationCache(scales))
    stored = fastcal.quantize(tmp_path / "m", fastcal.CalibrationCache(scales), int8_weights=True)
    assert count_quantized(stored) == count_quantized(model)
    assert count_quantized(model)[0] == count_quantized(model)[1] > 0
    level = onnxruntime.GraphOptimizationLevel
    found = []
    for chosen in (level.ORT_DISABLE_ALL, level.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = chosen
        outputs = []
        for each in (model, stored):
            content = each.SerializeToString()
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            outputs.append(session.run(None, inputs)[0])
        assert outputs[0].tobytes() == outputs[1].tobytes()
        found.append(outputs[0])
    exact, optimized = found
    assert optimized.shape == exact.shape
    assert np.abs(optimized - exact).max() <= 0.03 * np.abs(exact).max()  # the optimized one rounds biases too
    for each in model.graph.node:
        if each.op_type == "QuantizeLinear" and len(each.input) == 2:
            assert opset >= 21
            assert {value.name: value.i for value in each.attribute} == {"output_dtype": TensorProto.INT8}
