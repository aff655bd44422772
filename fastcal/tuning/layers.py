"""`Layer`: a node that may run in INT8, and its cost in multiply-adds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from fastcal.model import node_label
from fastcal.qdq_graph import Graph, attribute
from fastcal.qdq_placement import WEIGHTED


@dataclass(frozen=True)
class Layer:
    """A node that has pairs.

    Attributes:
        number: The node's number in the graph's order.
        label: The node's name.
        output: The name of the node's first output, which tells it from all others.
        multiply_adds: The multiply-adds that it takes for a sample; 0 for an Add or a pooling.
    """

    number: int
    label: str
    output: str
    multiply_adds: float


def layers_of(graph: Graph, numbers: Iterable[int], shapes: Mapping[str, tuple[int, ...]], samples: int) -> list[Layer]:
    """Return the nodes with these numbers; `shapes` are those of the tensors for so many samples."""
    return [
        Layer(number, node_label(node), node.output[0], _multiply_adds(graph, node, shapes) / samples)
        for number, node in ((number, graph.nodes[number]) for number in numbers)
    ]


def is_depthwise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return True for a convolution with one input channel per group, and several groups."""
    if node.op_type not in ("Conv", "ConvTranspose") or attribute(node, "group", 1) == 1:
        return False
    weights = graph.constant(node.input[1])
    if weights is None:
        return False
    channels = weights.shape[0] / attribute(node, "group", 1) if node.op_type == "ConvTranspose" else weights.shape[1]
    return bool(channels == 1)


def depthwise_in(graph: Graph) -> set[int]:
    """Return the numbers of the depthwise convolutions."""
    return {number for number, node in enumerate(graph.nodes) if is_depthwise(graph, node)}


def _multiply_adds(graph: Graph, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the multiply-adds of a layer; 0 if its shapes are not known."""
    if node.op_type not in WEIGHTED or node.output[0] not in shapes:
        return 0.0
    outputs = math.prod(shapes[node.output[0]])
    if node.op_type in ("Gemm", "MatMul"):
        first = _shape(graph, node.input[0], shapes)
        is_transposed = node.op_type == "Gemm" and attribute(node, "transA", 0)
        return float(outputs * (first[0 if is_transposed else -1] if first else 0))
    weights = _shape(graph, node.input[1], shapes)
    counted = math.prod(_shape(graph, node.input[0], shapes)) if node.op_type == "ConvTranspose" else outputs
    return float(counted * math.prod(weights[1:]))


def _shape(graph: Graph, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    constant = graph.constant(name)
    return shapes.get(name, ()) if constant is None else constant.shape
