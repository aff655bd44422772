"""`Rounded`: the layers of a network in INT8, each apart, so that a run takes some of them in place of float ones."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastcal.graph import reads
from fastcal.qdq_graph import Edge, Graph, round_weights, spread, weight_scales

#: The input that the network has besides its own: a scale for each tensor.
SCALES = "fastcal_scales"

#: The first version of ONNX's file format that knows all that is inserted.
_FIRST_IR = 4


class Rounded:
    """A model whose layers can be replaced by ones in INT8.

    The scales of activations come as an input. Weights are rounded when a layer is first in INT8, and kept.

    Attributes:
        proto: The model with all layers in float.
        numbers: The numbers of the nodes that have pairs, the layers, in the graph's order.
        tensors: The names of the activations that pairs round.
        outputs: The name of the first tensor that each layer computes.
    """

    def __init__(self, graph: Graph, axes: Mapping[Edge, int | None]) -> None:
        self._graph, self._axes = graph, axes
        self.numbers = sorted({number for number, _ in axes})
        read = (graph.nodes[number].input[index] for number, index in sorted(axes))
        self.tensors = list(dict.fromkeys(name for name in read if graph.constant(name) is None))
        self.outputs = [graph.nodes[number].output[0] for number in self.numbers]
        self._number_of = dict(zip(self.outputs, self.numbers, strict=True))
        self._constants: dict[str, onnx.TensorProto] = {}
        self.proto = graph.proto
        self.proto.ir_version = max(self.proto.ir_version, _FIRST_IR)
        scales = helper.make_tensor_value_info(SCALES, TensorProto.FLOAT, [len(self.tensors)])
        self.proto.graph.input.append(scales)

    def vector(self, scales: Mapping[str, float]) -> npt.NDArray[np.float32]:
        """Return the scales of `tensors` as an input of the model."""
        return np.array([scales[name] for name in self.tensors], np.float32)

    def replaced(
        self, nodes: Sequence[onnx.NodeProto], in_int8: Collection[str]
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Return consecutive nodes of the model, the layers with these `outputs` in INT8, and the constants to add."""
        pairs: dict[str, list[onnx.NodeProto]] = {}
        result: list[onnx.NodeProto] = []
        for node in nodes:
            if not node.output or node.output[0] not in in_int8:
                result.append(node)
                continue
            number, copy = self._number_of[node.output[0]], onnx.NodeProto()
            copy.CopyFrom(node)
            for index, name in enumerate(node.input):
                if (number, index) not in self._axes:
                    continue
                if name in self.tensors:
                    if name not in pairs:
                        pairs[name] = self._pair(name)
                        result += pairs[name]
                    copy.input[index] = pairs[name][-1].output[0]
                else:
                    found, copy.input[index] = self._round(number, index, name)
                    result += found
            result.append(copy)
        read = dict.fromkeys(name for node in result for name in reads(node))
        return result, [self._constants[name] for name in read if name in self._constants]

    def _pair(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that round an activation; the last one computes the result."""
        number = self.tensors.index(name)
        prefix = f"fastcal_{number}"
        tensor = self._constant(f"{prefix}_tensor", np.int64(number))
        zero = self._constant(f"{prefix}_zero", np.int8(0))
        scale, integers = f"{prefix}_scale", f"{prefix}_integers"
        return [
            helper.make_node("Gather", [SCALES, tensor], [scale]),
            helper.make_node("QuantizeLinear", [name, scale, zero], [integers]),
            helper.make_node("DequantizeLinear", [integers, scale, zero], [f"{prefix}_rounded"]),
        ]

    def _round(self, number: int, index: int, name: str) -> tuple[list[onnx.NodeProto], str]:
        """Return the nodes that round the weights of a layer, and the name of the result."""
        prefix, axis = f"fastcal_weights_{number}_{index}", self._axes[number, index]
        stored, scale, result = f"{prefix}_stored", f"{prefix}_scale", f"{prefix}_rounded"
        is_external = bool(self._graph.model.external.files)  # they may be too large for one file as float32
        if self._constants.keys().isdisjoint((stored, result)):
            weights = self._graph.constant(name)
            assert weights is not None
            scales = weight_scales(weights, axis)
            integers = round_weights(weights, scales, axis)
            if is_external:
                self._constant(stored, integers)
                self._constant(scale, scales)
            else:
                self._constant(result, integers.astype(np.float32) * spread(scales, axis, weights.ndim))
        if not is_external:
            return [], result
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        return [helper.make_node("DequantizeLinear", [stored, scale], [result], **options)], result

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name
