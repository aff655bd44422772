"""`Switched`: a network in which each layer can be switched between float and INT8 as it runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastcal.qdq_graph import Edge, Graph, round_weights, spread, weight_scales

#: The inputs that the network has besides its own: a Boolean for each layer, and a scale for each tensor.
IS_INT8, SCALES = "fastcal_is_int8", "fastcal_scales"

#: The first versions of ONNX's file format and of its opset that know all that is inserted.
_FIRST_IR = 4


class Switched:
    """A model in which each layer is an If: it runs in INT8 or in float.

    The scales of activations come as an input. Rounded weights are stored beside the exact ones.

    Attributes:
        proto: The model.
        numbers: The numbers of the nodes that have pairs, the layers, in the graph's order.
        tensors: The names of the activations that pairs round.
        begins: The name of the first tensor that is computed for each layer.
    """

    def __init__(self, graph: Graph, axes: Mapping[Edge, int | None]) -> None:
        self._graph, self._axes = graph, axes
        self.numbers = sorted({number for number, _ in axes})
        read = (graph.nodes[number].input[index] for number, index in sorted(axes))
        self.tensors = list(dict.fromkeys(name for name in read if graph.constant(name) is None))
        self.begins = [f"fastcal_{number}_is_int8" for number in self.numbers]
        self._constants: dict[str, onnx.TensorProto] = {}
        self.proto = self._insert()

    def vector(self, scales: Mapping[str, float]) -> npt.NDArray[np.float32]:
        """Return the scales of `tensors` as an input of the model."""
        return np.array([scales[name] for name in self.tensors], np.float32)

    def _insert(self) -> onnx.ModelProto:
        proto, layers = self._graph.proto, set(self.numbers)
        nodes: list[onnx.NodeProto] = []
        for number, node in enumerate(self._graph.nodes):
            nodes += self._switch(number, node) if number in layers else [node]
        proto.ir_version = max(proto.ir_version, _FIRST_IR)
        proto.graph.ClearField("node")
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(self._constants.values())
        for name, kind, length in (
            (IS_INT8, TensorProto.BOOL, len(self.numbers)),
            (SCALES, TensorProto.FLOAT, len(self.tensors)),
        ):
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, [length]))
        return proto

    def _switch(self, number: int, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that run a layer in INT8 or in float."""
        prefix, layer = f"fastcal_{number}", self.numbers.index(number)
        index_of = self._constant(f"{prefix}_layer", np.int64(layer))
        begin = helper.make_node("Gather", [IS_INT8, index_of], [self.begins[layer]])
        pairs: list[onnx.NodeProto] = []
        rounded, exact = onnx.NodeProto(), onnx.NodeProto()
        for copy, kind in ((rounded, "int8"), (exact, "float")):
            copy.CopyFrom(node)
            copy.output[0] = f"{prefix}_{kind}"
        for index, name in enumerate(node.input):
            if (number, index) in self._axes:
                found, rounded.input[index] = self._round(f"{prefix}_{index}", name, self._axes[number, index])
                pairs += found
        branches = {"then_branch": _branch([*pairs, rounded]), "else_branch": _branch([exact])}
        return [begin, helper.make_node("If", [begin.output[0]], node.output, **branches)]

    def _round(self, prefix: str, name: str, axis: int | None) -> tuple[list[onnx.NodeProto], str]:
        """Return the nodes that round an input of a layer, and the name of the result."""
        weights, result = self._graph.constant(name), f"{prefix}_rounded"
        if weights is None:
            tensor = self._constant(f"{prefix}_tensor", np.int64(self.tensors.index(name)))
            scale, zero, integers = (
                f"{prefix}_scale",
                self._constant(f"{prefix}_zero", np.int8(0)),
                f"{prefix}_integers",
            )
            return [
                helper.make_node("Gather", [SCALES, tensor], [scale]),
                helper.make_node("QuantizeLinear", [name, scale, zero], [integers]),
                helper.make_node("DequantizeLinear", [integers, scale, zero], [result]),
            ], result
        values = weight_scales(weights, axis)
        stored = round_weights(weights, values, axis)
        if self._graph.model.external.files:  # they may be too large for one file as float32
            constants = [self._constant(f"{prefix}_stored", stored), self._constant(f"{prefix}_scale", values)]
            options: dict[str, Any] = {} if axis is None else {"axis": axis}
            return [helper.make_node("DequantizeLinear", constants, [result], **options)], result
        return [], self._constant(result, stored.astype(np.float32) * spread(values, axis, weights.ndim))

    def _constant(self, name: str, value: Any) -> str:
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    """Return a branch of an If whose output is that of the last node."""
    output = nodes[-1].output[0]
    return helper.make_graph(nodes, output, [], [onnx.ValueInfoProto(name=output)])
