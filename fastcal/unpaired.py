"""`Unpaired`: a model without its Q/DQ pairs, and the scales that they held."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fastcal.algorithm import fault_of_scale
from fastcal.carried import MOVING
from fastcal.errors import ModelError
from fastcal.files import MOST_IN_A_FILE
from fastcal.functions import rename
from fastcal.graph import nodes_within, reads
from fastcal.model import Model, node_label
from fastcal.qdq_graph import Graph, attribute

#: The types of the two nodes of a pair.
_PAIR = ("QuantizeLinear", "DequantizeLinear")

#: The zero points of unsigned types with which rounding is symmetric; those of other types are 0.
_MIDDLE = {"uint4": 8, "uint8": 128, "uint16": 32768}

_log = logging.getLogger("fastcal")


class Unpaired:
    """A model without its Q/DQ pairs, with weights in float.

    Activations have the names of the tensors that the pairs read, and the graph's outputs keep their names. Weights
    that are stored as INT8 are dequantized; weights that a pair rounds stay as they are.

    Attributes:
        model: The model, with all its weights.
        scales: The pairs' scales, by the name of the activation. If pairs of several scales read one activation, it is
            the largest of them, and the log names the activation.

    Raises:
        ModelError: The model has no pairs, pairs that a calibration cache cannot stand for, or 2 GB of weights.
    """

    def __init__(self, model: Model) -> None:
        self.scales: dict[str, float] = {}
        self._graph = Graph(model)
        self._sources: dict[str, str] = {}  # the float tensor, by the name of its INT8 or dequantized form
        self._int8: dict[str, str] = {}  # the type of each tensor between the two nodes of a pair
        self._weights: list[onnx.TensorProto] = []
        self._check()
        for node in self._graph.nodes:
            self._take(node)
        for name in self._int8.keys() & self._graph.outputs:
            raise ModelError(f"{model.label} has an INT8 output, {name}; export the network with outputs in float")
        self.model = self._without_pairs()

    def _check(self) -> None:
        graph, label = self._graph, self._graph.model.label
        within = [node_label(node) for node in nodes_within(graph.nodes) if node.op_type in _PAIR]
        if within:
            raise ModelError(f"{label} has {within[0]} in an If, a Loop or a Scan; quantize only what lies outside")
        if not graph.model.has_pairs:
            raise ModelError(
                f"{label} has no QuantizeLinear and DequantizeLinear of activations; use fastcal calibrate"
            )

    def _fault(self, node: onnx.NodeProto, reason: str) -> ModelError:
        label = f"{node.op_type} {node_label(node)}"
        return ModelError(f"{self._graph.model.label}: {label} {reason}; quantize to symmetric INT8 with Q/DQ pairs")

    def _take(self, node: onnx.NodeProto) -> None:
        varies = not self._graph.model.varying.keys().isdisjoint(node.output)
        if node.op_type == "QuantizeLinear":
            self._take_quantize(node, varies)
        elif node.op_type == "DequantizeLinear":
            self._take_dequantize(node, varies)
        elif varies and (kinds := [self._int8[name] for name in reads(node) if name in self._int8]):
            if node.op_type not in MOVING:
                raise self._fault(node, f"computes in {kinds[0]}")
            self._int8 |= dict.fromkeys(node.output, kinds[0])

    def _take_quantize(self, node: onnx.NodeProto, varies: bool) -> None:
        name, kind = node.input[0], self._kind(node)
        self._sources[node.output[0]] = self._sources.get(name, name)
        self._int8[node.output[0]] = kind
        if varies:
            self._keep_scale(node, self._sources[node.output[0]], kind)

    def _take_dequantize(self, node: onnx.NodeProto, varies: bool) -> None:
        name, output = node.input[0], node.output[0]
        quantize = self._graph.nodes[self._graph.producers[name]] if name in self._graph.producers else None
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            self._sources[output] = self._sources[name]
            if self._scale(quantize).tolist() != self._scale(node).tolist():
                raise self._fault(node, f"has another scale than {node_label(quantize)}")
            self._kind(node)
        elif varies:
            if name not in self._int8:
                raise self._fault(node, f"reads {name}, which no QuantizeLinear gives")
            self._sources[output] = name
            self._keep_scale(node, name, self._kind(node))
        else:
            weights = self._graph.constant(output)
            if weights is None:
                raise self._fault(node, "gives weights of an unknown value")
            self._kind(node)
            self._weights.append(numpy_helper.from_array(weights, output))

    def _scale(self, node: onnx.NodeProto) -> npt.NDArray[Any]:
        scale = self._graph.constant(node.input[1])
        if scale is None:
            raise self._fault(node, "has a scale that is computed")
        return scale

    def _kind(self, node: onnx.NodeProto) -> str:
        """Return the type that a node quantizes to or dequantizes, if its rounding is symmetric."""
        if len(node.input) > 2 and node.input[2]:
            zero_point = self._graph.constant(node.input[2])
            if zero_point is None:
                raise self._fault(node, "has a zero point that is computed")
            kind, points = str(zero_point.dtype.name), {*map(float, np.ravel(zero_point))}
        else:
            kind, points = self._kind_without_zero_point(node), {0.0}
        if points != {_MIDDLE.get(kind, 0)}:
            found = ", ".join(f"{point:g}" for point in sorted(points))
            raise self._fault(node, f"is not symmetric: its zero point is {found} ({kind})")
        return kind

    def _kind_without_zero_point(self, node: onnx.NodeProto) -> str:
        if node.op_type == "QuantizeLinear":
            named = attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8
            return str(helper.tensor_dtype_to_np_dtype(named).name)
        stored = self._graph.constant(node.input[0])
        return self._int8[node.input[0]] if stored is None else str(stored.dtype.name)

    def _keep_scale(self, node: onnx.NodeProto, name: str, kind: str) -> None:
        scale = np.ravel(self._scale(node))
        if kind not in ("int8", "uint8"):
            raise self._fault(node, f"is of {kind}")
        if scale.size != 1:
            raise self._fault(node, f"has {scale.size} scales for the activation {name}")
        value = float(np.float32(scale[0]))
        if fault := fault_of_scale(value):
            raise self._fault(node, f"has a scale that is {fault}")
        before = self.scales.get(name, value)
        if before != value:
            _log.warning("pairs of several scales read %s, %g and %g: the larger one counts", name, before, value)
        self.scales[name] = max(before, value)

    def _without_pairs(self) -> Model:
        """Return the model without the pairs: each tensor is read where it was dequantized."""
        graph, proto = self._graph, self._graph.proto
        nodes = [node for node in graph.nodes if node.op_type not in _PAIR]
        names, ends = dict(self._sources), dict[str, str]()
        for output in [value.name for value in proto.graph.output if value.name in names]:
            source = names.pop(output)
            if source in graph.producers and source not in {*graph.outputs, *ends}:
                ends[source] = output
            else:
                nodes.append(helper.make_node("Identity", [source], [output]))
        names = {name: ends.get(source, source) for name, source in names.items()} | ends
        self.scales = {ends.get(name, name): scale for name, scale in self.scales.items()}
        kept = [value for value in proto.graph.value_info if value.name not in {*names, *self._int8}]
        for field, values in (("value_info", kept), ("quantization_annotation", [])):
            proto.graph.ClearField(field)
            getattr(proto.graph, field).extend(values)
        proto.graph.initializer.extend(self._weights)
        graph.replace_nodes(nodes, drops_unread=False)
        rename(proto.graph, names)
        graph.replace_nodes(list(proto.graph.node))
        size = graph.model.external.size(proto.graph)
        if size > MOST_IN_A_FILE:
            raise ModelError(
                f"{graph.model.label}: its weights take {size / 1e9:.2g} GB in float, and a model in one file has less "
                "than 2; calibrate the float model that it was made from"
            )
        graph.model.external.load(proto.graph)
        return graph.model.replaced(proto)
