"""The connections of an ONNX graph, its subgraphs included: the branches of an If, the bodies of a Loop or a Scan."""

from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import Message

#: The operators whose outputs differ from run to run.
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def damaged_text(message: Message) -> str:
    """Return the name of a text field whose bytes are no UTF-8, of a message or one within it; "" if there is none."""
    for field, value in message.ListFields():
        parts = [value] if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING and field.name != "doc_string":
            if any(isinstance(part, bytes) for part in parts):
                return str(field.name)
        elif field.type == field.TYPE_MESSAGE and (found := next(filter(None, map(damaged_text, parts)), "")):
            return found
    return ""


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs of a node, not those within them."""
    for value in node.attribute:
        if value.HasField("g"):
            yield value.g
        yield from value.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the tensors that a node reads, also in its subgraphs."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (value.name for value in graph.output)


def graphs_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of nodes, and those within them."""
    for node in nodes:
        for inner in subgraphs(node):
            yield inner
            yield from graphs_within(inner.node)


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the subgraphs of `nodes`, and of those within them."""
    for inner in graphs_within(nodes):
        yield from inner.node


def constants_of(graph: onnx.GraphProto) -> set[str]:
    """Return the names of a graph's initializers."""
    dense = {tensor.name for tensor in graph.initializer}
    return dense | {tensor.values.name for tensor in graph.sparse_initializer}


def varying_in(graph: onnx.GraphProto) -> dict[str, None]:
    """Return the names of the tensors that depend on a graph's inputs, or on chance, in order: all but constants."""
    constants = constants_of(graph)
    varying = dict.fromkeys(value.name for value in graph.input if value.name not in constants)
    for node in graph.node:
        if node.op_type in _RANDOM or not varying.keys().isdisjoint(reads(node)):
            varying |= dict.fromkeys(filter(None, node.output))
    return varying
