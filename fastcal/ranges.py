"""Ranges: the tensors of a network that must not be clipped, since users see them, or their range is known."""

import onnx

#: The largest |x| of operators' outputs. A Softmax reaches 1 too, but over many classes its values stay far below.
_LARGEST = {"Sigmoid": 1.0, "HardSigmoid": 1.0, "Tanh": 1.0, "Softmax": 0.0}

#: The largest |x| of those whose outputs reach an output of the network.
_AT_OUTPUTS = {**_LARGEST, "Softmax": 1.0}

#: The operators that only move the values of their first input.
_MOVES = (
    "Cast", "Dropout", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip


def least_thresholds(graph: onnx.GraphProto) -> dict[str, float]:
    """Return the tensors that must not be clipped, each with the least threshold that its scale must cover.

    They are the network's outputs, the tensors that an output is put together from, and the outputs of Sigmoid,
    HardSigmoid, Tanh and Softmax. A threshold of 0 asks only for the largest |x| that was observed.
    """
    least: dict[str, float] = {}
    for node in graph.node:
        if node.op_type in _LARGEST:
            least |= dict.fromkeys(node.output, _LARGEST[node.op_type])
        elif node.op_type in _MOVES and node.input[0] in least:
            least |= dict.fromkeys(node.output, least[node.input[0]])
    producers = {name: node for node in graph.node for name in node.output}
    unread = [value.name for value in graph.output]
    seen: set[str] = set()
    while unread:
        name = unread.pop()
        if name in seen:
            continue
        seen.add(name)
        node = producers.get(name, onnx.NodeProto())
        least[name] = max(least.get(name, 0.0), _AT_OUTPUTS.get(node.op_type, 0.0))
        if node.op_type == "Concat":
            unread += node.input
        elif node.op_type in _MOVES:
            unread.append(node.input[0])
    return least
