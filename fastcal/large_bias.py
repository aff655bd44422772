"""`split_biases`: large biases apart from their layers, for ONNX Runtime's sake.

ONNX Runtime 1.32 rounds the bias of a layer between pairs to INT32, by a division through the product of the scales. In
FP16 the quotient may overflow, and the outputs of the channel are then wrong. It leaves an Add behind a Conv or a Gemm
alone, and a Sub behind a MatMul. TensorRT makes the same kernels of them (seen with TensorRT for RTX 1.7).
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fastcal.half import HalfType
from fastcal.model import Model
from fastcal.qdq_graph import Graph, attribute, names_in, unique_name

#: The layers that have a bias themselves.
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


def split_biases(model: Model, half: HalfType) -> Model:
    """Return a quantized model in which each bias that could overflow in a type of 16 bits is added apart."""
    graph = Graph(model)
    taken, nodes, is_changed = set(names_in(graph.proto.graph)), [], False
    for number, node in enumerate(graph.nodes):
        nodes.append(node)
        name = _bias_of(graph, number)
        if name and _overflows(graph, number, name, half):
            is_changed = True
            if node.op_type == "MatMul":
                _subtract(graph, number, name, taken)
            else:
                nodes.append(_split(graph, node, name, taken))
    if not is_changed:
        return model
    graph.replace_nodes(nodes)
    return model.variant(graph.proto)


def _bias_of(graph: Graph, number: int) -> str:
    """Return the name of a layer's constant bias; an empty text if it has none."""
    node = graph.nodes[number]
    if node.op_type in _WITH_BIAS:
        name = node.input[2] if len(node.input) > 2 else ""
        return name if name and graph.constant(name) is not None else ""
    place = graph.bias_of(number) if node.op_type == "MatMul" else None
    return graph.nodes[place[0]].input[place[1]] if place else ""


def _overflows(graph: Graph, number: int, bias: str, half: HalfType) -> bool:
    """Return True if a layer is between pairs, and the quotient of its bias and the scales may overflow."""
    activation, weights = (_scale_of(graph, name) for name in graph.nodes[number].input[:2])
    values = graph.constant(bias)
    if activation is None or weights is None or values is None:
        return False
    weights = weights if weights.shape == values.shape and activation.ndim == 0 else weights.min()
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.abs(values) / half.rounded(activation.min() * weights)
    return not bool((quotients < half.largest / 2).all())


def _scale_of(graph: Graph, name: str) -> npt.NDArray[np.float32] | None:
    """Return the scale of the pair that a tensor comes from; None if it comes from no pair."""
    number = graph.producers.get(name)
    if number is None or graph.nodes[number].op_type != "DequantizeLinear":
        return None
    return graph.constant(graph.nodes[number].input[1])


def _split(graph: Graph, node: onnx.NodeProto, bias: str, taken: set[str]) -> onnx.NodeProto:
    """Take the bias from a layer; return the Add that comes behind it."""
    values, output = graph.constant(bias), node.output[0]
    assert values is not None
    if node.op_type == "Gemm":
        values = (values * np.float32(attribute(node, "beta", 1.0))).astype(np.float32)
    else:
        values = values.reshape(-1, *[1] * (_rank_of_weights(graph, node.input[1]) - 2))
    product, spread = unique_name(f"{output}_without_bias", taken), unique_name(f"{bias}_added", taken)
    graph.proto.graph.initializer.append(numpy_helper.from_array(values, spread))
    node.name = node.name or f"node_of_{output}"  # as TensorRT names it, by its output
    node.output[0] = product
    del node.input[2]
    return helper.make_node("Add", [product, spread], [output], unique_name(f"{output}_bias", taken))


def _subtract(graph: Graph, number: int, bias: str, taken: set[str]) -> None:
    """Let the Add behind a MatMul subtract the negative bias: ONNX Runtime would make a Gemm of both."""
    place, values = graph.bias_of(number), graph.constant(bias)
    assert place is not None
    assert values is not None
    negative = unique_name(f"{bias}_subtracted", taken)
    graph.proto.graph.initializer.append(numpy_helper.from_array(-values, negative))
    add = graph.nodes[place[0]]
    add.op_type = "Sub"
    add.input[:] = [graph.nodes[number].output[0], negative]


def _rank_of_weights(graph: Graph, name: str) -> int:
    """Return the number of dimensions of weights behind a pair, or behind the DequantizeLinear of stored INT8."""
    source = graph.nodes[graph.producers[name]].input[0]
    if source in graph.producers:
        source = graph.nodes[graph.producers[source]].input[0]
    weights = graph.constant(source)
    assert weights is not None
    return weights.ndim
