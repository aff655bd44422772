"""`carry_scales`: the scales of tensors that hold the values of other tensors."""

from collections.abc import Mapping

import onnx

from fastcal.qdq_graph import Graph

#: The operators whose output holds all values of their first input, and no others.
_WHOLE = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

#: The operators whose outputs hold some of the values of their first input.
_PART = ("Gather", "Slice", "Split")

#: The operators that give the same result before and after rounding to INT8.
_COMMUTE = ("MaxPool", "Relu")

#: The operators that an INT8 tensor goes through unchanged in type.
MOVING = (*_WHOLE[1:], *_PART, *_COMMUTE, "Concat")


def carry_scales(graph: Graph, scales: Mapping[str, float]) -> dict[str, float]:
    """Return `scales` with those of more tensors that depend on the inputs: tensors that hold the same values.

    - Cast, Dropout, Flatten, Identity, Reshape, Squeeze, Transpose and Unsqueeze: both tensors have one scale.
    - Gather, Slice and Split: the outputs take the input's.
    - MaxPool and Relu: the output takes the input's. The input takes the output's if nothing else reads the input:
      INT8 rounds to the same values before and after.
    - AveragePool: the output takes the input's, as in TensorRT.
    - Concat: the inputs take the output's; the output takes the largest of the inputs' if all have one.
    """
    found, before = dict(scales), -1
    while len(found) > before:
        before = len(found)
        for node in graph.nodes:
            _forward(graph, node, found)
        for node in reversed(graph.nodes):
            _backward(graph, node, found)
    return {name: scale for name, scale in found.items() if name in graph.model.varying}


def _forward(graph: Graph, node: onnx.NodeProto, scales: dict[str, float]) -> None:
    if node.op_type == "Concat":
        inputs = [name for name in node.input if name in graph.model.varying]
        if inputs and scales.keys() >= set(inputs):
            scales.setdefault(node.output[0], max(scales[name] for name in inputs))
    elif node.op_type in (*_WHOLE, *_PART, *_COMMUTE, "AveragePool") and node.input[0] in scales:
        for name in filter(None, node.output if node.op_type == "Split" else node.output[:1]):
            scales.setdefault(name, scales[node.input[0]])


def _backward(graph: Graph, node: onnx.NodeProto, scales: dict[str, float]) -> None:
    if node.op_type not in (*_WHOLE, *_COMMUTE, "Concat") or node.output[0] not in scales:
        return
    if node.op_type in _COMMUTE and (len(graph.readers[node.input[0]]) > 1 or node.input[0] in graph.outputs):
        return
    for name in node.input if node.op_type == "Concat" else node.input[:1]:
        scales.setdefault(name, scales[node.output[0]])
