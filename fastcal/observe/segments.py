"""A graph cut into segments of consecutive nodes, which take less memory one after another than together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from fastcal.graph import reads

#: ONNX Runtime's names of the types that pass from segment to segment, with ONNX's numbers: those that NumPy has too.
_TYPES = {"tensor(float)": TensorProto.FLOAT, "tensor(double)": TensorProto.DOUBLE} | {
    f"tensor({name.lower()})": TensorProto.DataType.Value(name)
    for name in ("FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
}


@dataclass(frozen=True)
class Segment:
    """Nodes of a graph that run together.

    Attributes:
        nodes: The nodes; a Constant node is in each segment that reads it.
        received: The names of the tensors that earlier segments compute and the nodes read.
        later: The names of the tensors that later segments read.
    """

    nodes: Sequence[onnx.NodeProto]
    received: Sequence[str]
    later: frozenset[str]

    @property
    def computed(self) -> list[str]:
        """The names of the tensors that the nodes compute."""
        return [name for node in self.nodes for name in node.output if name]

    def model(self, proto: onnx.ModelProto, types: Mapping[str, str]) -> onnx.ModelProto:
        """Return the segment as a model of its own; `proto` is the whole, `types` are as in `cut`.

        Its inputs are the received tensors and those inputs of the whole that the nodes read.
        """
        versions = {"ir_version": proto.ir_version, "opset_import": proto.opset_import, "functions": proto.functions}
        part, whole = onnx.ModelProto(**versions), proto.graph
        read, computed = _read(self.nodes), set(self.computed)
        received = (onnx.helper.make_tensor_value_info(name, _TYPES[types[name]], None) for name in self.received)
        part.graph.name = whole.name
        part.graph.node.extend(self.nodes)
        part.graph.initializer.extend(tensor for tensor in whole.initializer if tensor.name in read)
        part.graph.sparse_initializer.extend(each for each in whole.sparse_initializer if each.values.name in read)
        part.graph.input.extend(value for value in whole.input if value.name in read)
        part.graph.input.extend(received)
        part.graph.value_info.extend(value for value in whole.value_info if value.name in computed)
        part.graph.output.extend(value for value in whole.output if value.name in computed)
        return part


def cut(graph: onnx.GraphProto, sizes: Mapping[str, int], types: Mapping[str, str], memory: int) -> list[Segment]:
    """Return a graph as few segments, each with tensors of at most `memory` bytes, or with a single node of more.

    A graph whose nodes are not in the order in which they can run is left whole.

    Args:
        graph: The graph.
        sizes: The bytes of the tensors to count, by name.
        types: ONNX Runtime's types of the tensors that nodes compute, by name. All nodes that read a tensor whose type
            NumPy lacks, a sequence for instance, are in the segment that computes it.
        memory: The number of bytes.
    """
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    last: dict[str, int] = {}  # the node that reads a tensor last
    for index, node in enumerate(nodes):
        last |= dict.fromkeys(reads(node), index)
        if any(makers.get(name, -1) >= index for name in reads(node)):
            return [Segment(graph.node, (), frozenset())]
    parts: list[list[onnx.NodeProto]] = [[]]
    taken = together = 0  # the bytes of the last part, and the last node that must be in it
    for index, node in enumerate(nodes):
        size = node_size(node, sizes)
        if taken and size and taken + size > memory and index > together:
            parts.append([])
            taken = 0
        parts[-1].append(node)
        taken += size
        bound = (last.get(name, 0) for name in node.output if types.get(name) not in _TYPES)
        together = max(together, *bound, 0)
    constants = {name: node for node in graph.node if node.op_type == "Constant" for name in node.output}
    return _connected(parts, constants, makers.keys())


def node_size(node: onnx.NodeProto, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a node's outputs, of those that `sizes` has."""
    return sum(sizes.get(name, 0) for name in node.output)


def _connected(
    parts: Sequence[Sequence[onnx.NodeProto]], constants: Mapping[str, onnx.NodeProto], computed: Iterable[str]
) -> list[Segment]:
    """Return segments of these nodes; `constants` are Constant nodes by output, `computed` what other nodes compute."""
    segments: list[Segment] = []
    later: frozenset[str] = frozenset()
    names = frozenset(computed)
    for nodes in reversed(parts):
        read = _read(nodes)
        own = {name for node in nodes for name in node.output}
        received = [name for name in read if name in names and name not in own]
        segments.append(Segment([*(constants[name] for name in read if name in constants), *nodes], received, later))
        later |= read.keys()
    return segments[::-1]


def _read(nodes: Iterable[onnx.NodeProto]) -> dict[str, None]:
    """Return the names of the tensors that nodes read, in order."""
    return dict.fromkeys(name for node in nodes for name in reads(node))
