"""`Switched`: a network in which each layer can be switched between float and INT8 as it runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastcal.model import node_label
from fastcal.qdq_graph import Edge, Graph, round_weights, weight_scales

#: The inputs that the network has besides its own: a Boolean for each layer, and a scale for each tensor.
IS_INT8, SCALES = "fastcal_is_int8", "fastcal_scales"

#: The first versions of ONNX's file format and of its opset that know all that is inserted.
_FIRST_IR = 4


class Switched:
    """A model with a switch on each input that may have a Q/DQ pair.

    An If computes what a layer reads: the pair if the layer is in INT8, else the tensor as it is. The scales of
    activations come as an input. Weights are stored as INT8 beside the float ones.

    Attributes:
        proto: The model.
        numbers: The numbers of the nodes that have pairs, the layers, in the graph's order.
        labels: The layers' names.
        tensors: The names of the activations that pairs round.
        begins: The name of the first tensor that is computed for each layer's switches.
    """

    def __init__(self, graph: Graph, axes: Mapping[Edge, int | None]) -> None:
        self._graph, self._axes = graph, axes
        self.numbers = sorted({number for number, _ in axes})
        self.labels = [node_label(graph.nodes[number]) for number in self.numbers]
        read = (graph.nodes[number].input[index] for number, index in sorted(axes))
        self.tensors = list(dict.fromkeys(name for name in read if graph.constant(name) is None))
        self.begins: list[str] = []
        self._constants: list[onnx.TensorProto] = []
        self.proto = self._insert()

    def vector(self, scales: Mapping[str, float]) -> npt.NDArray[np.float32]:
        """Return the scales of `tensors` as an input of the model."""
        return np.array([scales[name] for name in self.tensors], np.float32)

    def _insert(self) -> onnx.ModelProto:
        nodes: list[onnx.NodeProto] = []
        for number, node in enumerate(self._graph.nodes):
            before = len(nodes)
            for index, name in enumerate(node.input):
                if (number, index) in self._axes:
                    nodes += self._switch(f"fastcal_{number}_{index}", (number, index), name)
                    node.input[index] = nodes[-1].output[0]
            self.begins += [inserted.output[0] for inserted in nodes[before : before + 1]]
            nodes.append(node)
        proto = self._graph.proto
        proto.ir_version = max(proto.ir_version, _FIRST_IR)
        proto.graph.ClearField("node")
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(self._constants)
        for name, kind, length in (
            (IS_INT8, TensorProto.BOOL, len(self.numbers)),
            (SCALES, TensorProto.FLOAT, len(self.tensors)),
        ):
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, [length]))
        return proto

    def _switch(self, prefix: str, edge: Edge, name: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that compute an input of a layer: the last one's output is in INT8 or in float."""
        layer = self._constant(f"{prefix}_layer", np.int64(self.numbers.index(edge[0])))
        yield helper.make_node("Gather", [IS_INT8, layer], [f"{prefix}_is_int8"])
        weights, axis = self._graph.constant(name), self._axes[edge]
        zero, rounded = f"{prefix}_zero", f"{prefix}_rounded"
        inner: list[onnx.NodeProto] = []
        if weights is None:
            tensor = self._constant(f"{prefix}_tensor", np.int64(self.tensors.index(name)))
            scale = f"{prefix}_scale"
            yield helper.make_node("Gather", [SCALES, tensor], [scale])
            self._constant(zero, np.int8(0))
            inner.append(helper.make_node("QuantizeLinear", [name, scale, zero], [rounded]))
        else:
            values = weight_scales(weights, axis)
            scale = self._constant(f"{prefix}_scale", values)
            self._constant(zero, np.zeros(values.shape, np.int8))
            self._constant(rounded, round_weights(weights, values, axis))
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        inner.append(helper.make_node("DequantizeLinear", [rounded, scale, zero], [f"{prefix}_int8"], **options))
        outer = [helper.make_node("Identity", [name], [f"{prefix}_float"])]
        branches = {"then_branch": _branch(inner), "else_branch": _branch(outer)}
        yield helper.make_node("If", [f"{prefix}_is_int8"], [f"{prefix}_read"], **branches)

    def _constant(self, name: str, value: Any) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    """Return a branch of an If whose output is that of the last node."""
    output = nodes[-1].output[0]
    return helper.make_graph(nodes, output, [], [onnx.ValueInfoProto(name=output)])
