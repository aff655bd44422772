"""`Sharing`: one Q/DQ pair for a tensor that several pairs would round with different scales.

A YOLOv8, for instance, has activations that a convolution reads, and a Concat before another convolution reads too.
With pairs in front of convolutions alone, TensorRT 8.6 computes such an activation in float and rounds it once for each
scale. With a pair behind the activation, the layer before it writes INT8.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import onnx

from fastcal.qdq_graph import Edge, Graph, attribute

#: The layers that take parts of a tensor.
_CUT = ("Slice", "Split")

#: The layers that move values and compute none: values that are rounded before them are rounded behind them.
_MOVE = (*_CUT, "Dropout", "Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

#: The largest ratio of the scales of a tensor and of a part of it, for the part to take over the tensor's scale.
_NEAR = 2.0


def commutes(node: onnx.NodeProto) -> bool:
    """Return True if TensorRT moves a QuantizeLinear up through a layer, to the layer before."""
    return node.op_type == "Concat" or _moves(node)


def adds_activations(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return True if a layer is an Add of two activations, as in a residual connection."""
    return node.op_type == "Add" and all(name in graph.model.varying for name in node.input)


def _moves(node: onnx.NodeProto) -> bool:
    is_copying = node.op_type == "Resize" and attribute(node, "mode", b"nearest") == b"nearest"
    return is_copying or node.op_type in _MOVE


@dataclass
class _Use:
    """The use of a tensor's values.

    Attributes:
        ends: The tensors whose pairs round the values; "" stands for a reader in float.
        parts: Those of `ends` that have no other values: the tensor itself and its parts.
    """

    ends: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)


class Sharing:
    """The pairs to add to a placement's `axes`.

    A tensor gets a pair if a layer computes the tensor, several scales would round it, and all its readers are in INT8,
    or move the tensor or join it with others for such readers. A residual Add may be among the readers. If `fault_of`
    returns a reason, a tensor cannot be rounded. The nodes `excluded` read in float.

    Attributes:
        edges: The edges that get a pair.
        sources: The tensors that take over the scale of another one, whose parts they are, and that other one.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Collection[Edge],
        scales: Mapping[str, float],
        excluded: Collection[int],
        fault_of: Callable[[str], str],
    ) -> None:
        self.edges: set[Edge] = set()
        self.sources: dict[str, str] = {}
        self._graph, self._axes, self._excluded = graph, axes, excluded
        self._uses = {"": _Use()}
        for node in reversed(graph.nodes):
            for name in filter(None, node.output):
                use, is_rounded_twice = self._follow(name)
                if is_rounded_twice and not commutes(node) and not fault_of(name):
                    parts = use.parts - {name}
                    if all(scales[name] <= _NEAR * scales[part] for part in parts):
                        self.edges.update(graph.readers[name])
                        self.sources |= dict.fromkeys(parts, name)
                self._uses[name] = use

    def _follow(self, name: str) -> tuple[_Use, bool]:
        """Return the use of a tensor, and whether all of it is in INT8 and several scales round the same values."""
        use, cut = _Use(), [_Use()]
        if name in self._graph.outputs:
            use.ends.add("")
        for edge in self._graph.readers.get(name, []):
            node = self._graph.nodes[edge[0]]
            following = [self._uses.get(output, _Use({""})) for output in node.output]  # missing in an unsorted graph
            if edge in self._axes:
                use.ends.add(name)
                use.parts.add(name)
            elif not self._passes(edge[0]):
                use.ends.add("")
            elif node.op_type in _CUT:
                cut += following
            else:  # an Add rounds nothing, but its sum may be read in float
                use.ends.update(*(each.ends & {""} if node.op_type == "Add" else each.ends for each in following))
            if _moves(node):
                use.parts.update(*(each.parts for each in following))
        is_rounded_twice = any(len(use.ends | each.ends) > 1 for each in cut)
        use.ends.update(*(each.ends for each in cut))
        return use, is_rounded_twice and "" not in use.ends

    def _passes(self, number: int) -> bool:
        """Return True if a node passes on what it reads, or is an Add of two activations that is not excluded."""
        node = self._graph.nodes[number]
        return (adds_activations(self._graph, node) or commutes(node)) and number not in self._excluded
