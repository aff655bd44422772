"""The part of a model that ONNX Runtime can run: without TensorRT's plugins, for instance."""

from functools import cache

import onnx
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from fastcal.graph import nodes_within, reads


@cache
def _known() -> frozenset[tuple[str, str]]:
    """Return the domains and names of the operators that the installed ONNX Runtime knows."""
    return frozenset((schema.domain, schema.name) for schema in get_all_operator_schema())


def _unknown_in(node: onnx.NodeProto) -> list[str]:
    """Return the types of the unknown operators of a node and of those in its subgraphs."""
    names = (("" if each.domain == "ai.onnx" else each.domain, each.op_type) for each in (node, *nodes_within([node])))
    return [name for domain, name in names if (domain, name) not in _known()]


def unknown_operators(graph: onnx.GraphProto) -> list[str]:
    """Return the types of the operators that the installed ONNX Runtime does not know."""
    return list(dict.fromkeys(name for node in graph.node for name in _unknown_in(node)))


def cut_unknown(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """Return a model without the nodes whose operators ONNX Runtime does not know, and without what depends on them.

    If no output of the graph is left, what the first removed nodes read becomes the output. If nothing is left, the
    graph stays as it is, for ONNX Runtime to report.

    Returns:
        The model, a copy if it is another; the types of the unknown operators, and the names of the tensors that are
        gone.
    """
    unknown = unknown_operators(proto.graph)
    gone: dict[str, None] = {}
    ends: dict[str, None] = {}
    kept = []
    for node in proto.graph.node if unknown else ():
        if not _unknown_in(node) and gone.keys().isdisjoint(reads(node)):
            kept.append(node)
            continue
        gone |= dict.fromkeys(filter(None, node.output))
        ends |= dict.fromkeys(reads(node))
    outputs = [value for value in proto.graph.output if value.name not in gone]
    computed = {name for node in kept for name in node.output}
    left = outputs or [onnx.ValueInfoProto(name=name) for name in ends if name in computed]
    if not unknown or not left:
        return proto, [], []
    rest = onnx.ModelProto()
    rest.CopyFrom(proto)
    for field, values in (("node", kept), ("output", left)):
        rest.graph.ClearField(field)
        getattr(rest.graph, field).extend(values)
    return rest, unknown, list(gone)
