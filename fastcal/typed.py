"""`narrow`: a typed model, whose layers run in FP16 or BF16 where that keeps their results.

From 11.0 on TensorRT runs each layer in the type that the model names. The float16 converter of ONNX Runtime knows no
BF16 and no tensors that overflow, and gives pairs a type that their opset does not allow.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from fastcal.errors import first_few
from fastcal.graph import subgraphs
from fastcal.half import HalfType
from fastcal.large_bias import split_biases
from fastcal.model import Model, node_label
from fastcal.qdq_graph import IN_SUBGRAPH, Graph, attribute, names_in, round_weights, spread, unique_name
from fastcal.qdq_placement import WEIGHTED

#: The operators that lose precision in 16 bits: they sum many values, widen their range, or compute with positions.
_PRECISE = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitCast", "CumSum", "Exp", "GridSample", "Log", "LogSoftmax",
    "LpNormalization", "LpPool", "MeanVarianceNormalization", "Pow", "Range", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "RoiAlign",
)  # fmt: skip

_PAIR = ("QuantizeLinear", "DequantizeLinear")

#: What a tensor may grow beyond the largest value that a calibration saw, before 16 bits hold it no more.
_HEADROOM = 4.0

#: Constants with more elements are weights.
_FEW = 16

_log = logging.getLogger("fastcal")


def narrow(model: Model, half: HalfType, largest: Mapping[str, float], ends: Collection[str] = ()) -> onnx.ModelProto:
    """Return a model with pairs whose layers run in a type of 16 bits; inputs and outputs keep their types.

    Layers stay in FP32 if one of their tensors could overflow, or if they lose precision; the log names them.

    Args:
        model: The model with pairs, of an opset in which they take the type.
        half: The type.
        largest: The largest |x| of tensors, by name, as far as it is known.
        ends: The inputs and outputs that are to be of 16 bits.
    """
    graph = Graph(split_biases(model, half))
    choice = _Choice(graph, half, largest)
    if choice.reasons:
        named = [f"{name} ({reason})" for name, reason in choice.reasons.items()]
        _log.info("layers that stay in FP32: %s", first_few(named))
        _log.debug("all layers that stay in FP32: %s", ", ".join(named))
    return _Rewriting(graph, half, choice, ends).run()


class _Choice:
    """The nodes of a graph that run in 16 bits.

    Attributes:
        narrowed: By the number of such a node, the indexes of its inputs of 16 bits, if they are float32 in the graph.
        reasons: The reasons of the layers that stay in FP32 for the sake of their results.
    """

    def __init__(self, graph: Graph, half: HalfType, largest: Mapping[str, float]) -> None:
        self._graph, self._half, self._largest = graph, half, largest
        self._types = types_of(graph)
        self.narrowed: dict[int, list[int]] = {}
        self.reasons: dict[str, str] = {}
        kept: set[int] = set()
        for number, node in enumerate(graph.nodes):
            indexes = self._inputs_of_half(node)
            reason = "" if indexes is None else self._fault_of(number, node)
            if reason:
                self.reasons[node_label(node)] = reason
            if indexes is None or reason or self._follows(node, kept):
                kept.add(number)
            else:
                self.narrowed[number] = indexes
        self._match_pairs()

    def _inputs_of_half(self, node: onnx.NodeProto) -> list[int] | None:
        """Return the float32 inputs that a node may read in 16 bits; None if its outputs would stay float32."""
        if node.domain not in ("", "ai.onnx") or any(subgraphs(node)):
            return None
        try:
            schema = onnx.defs.get_schema(node.op_type, self._graph.model.opset, "")
        except onnx.defs.SchemaError:
            return None
        allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        name_of_type = f"tensor({self._half.name})"

        def takes(formal: str) -> bool:
            return name_of_type in allowed.get(formal, ())

        inputs = list(_formal(node.input, schema.inputs))
        known = {name: self._types.get(name, TensorProto.UNDEFINED) for name in (*node.input, *node.output) if name}
        if TensorProto.UNDEFINED in known.values():
            return None
        read = {formal for name, formal in inputs if name}
        for name, formal in _formal(node.output, schema.outputs):
            if name and known[name] == TensorProto.FLOAT and not (takes(formal) and formal in read):
                return None
        floats = [index for index, (name, _) in enumerate(inputs) if known.get(name) == TensorProto.FLOAT]
        found = [index for index in floats if takes(inputs[index][1])]
        return found or None

    def _fault_of(self, number: int, node: onnx.NodeProto) -> str:
        """Return the reason why 16 bits would spoil the results of a node; an empty text if they would not."""
        if node.op_type in _PAIR:
            return ""
        if node.op_type in _PRECISE:
            return node.op_type
        if node.op_type in self._half.lacking:
            return f"TensorRT lacks {node.op_type} in {self._half.label}"
        for name in filter(None, (*node.input, *node.output)):
            if _HEADROOM * self._largest.get(name, 0.0) > self._half.largest:
                return f"{name} reaches {self._largest[name]:.3g}"
            if is_stored(self._graph, name) and self._types[name] == TensorProto.FLOAT:
                values = self._graph.constant(name)
                if values is not None and (fault := self._fault_of_constant(values)):
                    return f"{name} {fault}"
        return ""

    def _fault_of_constant(self, values: npt.NDArray[np.generic]) -> str:
        finite = np.abs(values[np.isfinite(values)].astype(np.float32, copy=False))
        if finite.size and finite.max() > self._half.largest:
            return f"holds {finite.max():.3g}"
        if finite.size <= _FEW and not self._half.holds(finite):
            return f"holds {finite[finite > 0].min():.3g}"
        return ""

    def _follows(self, node: onnx.NodeProto, kept: set[int]) -> bool:
        """Return True if a node goes on with what stays in FP32: it reads nothing else, and multiplies no weights."""
        if node.op_type in (*WEIGHTED, *_PAIR):
            return False
        read = [name for name in node.input if self._types.get(name) == TensorProto.FLOAT]
        producers = [self._graph.producers.get(name) for name in read if name in self._graph.model.varying]
        return bool(producers) and all(producer in kept for producer in producers)

    def _match_pairs(self) -> None:
        """Give each pair the type of the layers that read through it: a Cast between them would keep them apart."""
        again = True
        while again:
            again = False
            for number, node in enumerate(self._graph.nodes):
                if node.op_type != "DequantizeLinear" or number not in self.narrowed:
                    continue
                readers = [reader for reader, _ in self._graph.readers.get(node.output[0], [])]
                if self._scales_fit(node) and all(reader in self.narrowed for reader in readers):
                    continue
                before = self._graph.producers.get(node.input[0], number)  # stored INT8 has no producer
                for reader in self.narrowed.keys() & readers:
                    reason = f"it shares {node.output[0]} with a layer in FP32"
                    self.reasons.setdefault(node_label(self._graph.nodes[reader]), reason)
                for each in (number, before, *readers):
                    self.narrowed.pop(each, None)
                again = True

    def _scales_fit(self, node: onnx.NodeProto) -> bool:
        """Return True if the type holds the scales of a pair; note the reason of the layers that read it if not."""
        scales = self._graph.constant(node.input[1])
        assert scales is not None
        largest = np.asarray(scales.max(), np.float32)
        if self._half.holds(largest):
            return True
        for reader, _ in self._graph.readers.get(node.output[0], []):
            label = node_label(self._graph.nodes[reader])
            self.reasons.setdefault(label, f"{node.input[1]} is {largest:.3g}")
        return False


class _Rewriting:
    """Rewrites a graph for a choice: Casts at the borders, and constants in the types that their readers take."""

    def __init__(self, graph: Graph, half: HalfType, choice: _Choice, ends: Collection[str]) -> None:
        self._graph, self._half, self._narrowed = graph, half, choice.narrowed
        self._types = types_of(graph)
        self._taken = set(names_in(graph.proto.graph))
        self._ends = set(ends)
        within = {name for name, edges in graph.readers.items() if IN_SUBGRAPH in {index for _, index in edges}}
        self._pinned = graph.outputs - self._ends | within  # what stays float32
        self._nodes: list[onnx.NodeProto] = []
        # The names of tensors in 16 bits, by their names in the graph.
        self._halves: dict[str, str] = {
            value.name: value.name for value in graph.proto.graph.input if value.name in self._ends
        }
        self._floats: dict[str, str] = {}  # the names of tensors of 16 bits in float32
        self._constants: dict[tuple[str, str], str] = {}  # those of constants, by their names and those of scales

    def run(self) -> onnx.ModelProto:
        """Return the rewritten model."""
        proto = self._graph.proto
        for number, node in enumerate(self._graph.nodes):
            before = list(node.input)
            for index, name in enumerate(before):
                if self._types.get(name) == TensorProto.FLOAT:
                    is_half = index in self._narrowed.get(number, ())
                    node.input[index] = self._as_half(name, node, before) if is_half else self._as_float(name)
            self._nodes.append(node)
            self._name_outputs(node, is_half=number in self._narrowed)
        for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
            if self._halves.get(value.name) == value.name:
                value.type.tensor_type.elem_type = self._half.kind
        self._graph.replace_nodes(self._nodes)
        return proto

    def _name_outputs(self, node: onnx.NodeProto, *, is_half: bool) -> None:
        """Note the outputs of a node that have 16 bits, and cast those that must be of the other type."""
        for index, name in enumerate(node.output):
            if self._types.get(name) != TensorProto.FLOAT:
                continue
            if (is_half and name in self._pinned) or (not is_half and name in self._ends):
                node.name = node.name or f"node_of_{name}"  # as TensorRT names it, by its output
            if is_half and name in self._pinned:
                node.output[index] = self._halves[name] = self._new_name(f"{name}_{self._half.name}")
                self._cast(node.output[index], name, TensorProto.FLOAT)
            elif is_half:
                self._halves[name] = name
            elif name in self._ends:
                node.output[index] = self._floats[name] = self._new_name(f"{name}_float32")
                self._halves[name] = name
                self._cast(node.output[index], name, self._half.kind)

    def _as_float(self, name: str) -> str:
        """Return the name of a tensor in float32, cast if it has 16 bits."""
        if self._halves.get(name) != name:
            return name
        if name not in self._floats:
            self._floats[name] = self._new_name(f"{name}_float32")
            self._cast(name, self._floats[name], TensorProto.FLOAT)
        return self._floats[name]

    def _as_half(self, name: str, node: onnx.NodeProto, read: Sequence[str]) -> str:
        """Return the name of a float32 tensor in 16 bits; `node` reads it among the tensors `read`."""
        if name in self._halves:
            return self._halves[name]
        if is_stored(self._graph, name):
            is_rounded = node.op_type == "QuantizeLinear" and name == read[0]
            return self._stored(name, read[1] if is_rounded else "", node)
        self._halves[name] = self._new_name(f"{name}_{self._half.name}")
        self._cast(name, self._halves[name], self._half.kind)
        return self._halves[name]

    def _stored(self, name: str, scale: str, node: onnx.NodeProto) -> str:
        """Return the name of a constant in 16 bits; with a scale, rounded to its multiples as INT8 would be."""
        if (name, scale) not in self._constants:
            values, scales = self._graph.constant(name), self._graph.constant(scale) if scale else None
            assert values is not None
            if scales is not None:  # so that 16 bits do not round the weights a second time
                axis = attribute(node, "axis", None)
                values = round_weights(values, scales, axis) * spread(scales, axis, values.ndim)
            self._constants[name, scale] = self._new_name(f"{name}_{self._half.name}")
            self._graph.proto.graph.initializer.append(self._half.tensor(values, self._constants[name, scale]))
        return self._constants[name, scale]

    def _cast(self, name: str, new: str, kind: int) -> None:
        self._nodes.append(helper.make_node("Cast", [name], [new], self._new_name(f"{new}_Cast"), to=kind))

    def _new_name(self, name: str) -> str:
        return unique_name(name, self._taken)


def types_of(graph: Graph) -> dict[str, int]:
    """Return the element types of a graph's tensors by name, constants included, as far as ONNX infers them."""
    stored = {tensor.name: tensor.data_type for tensor in graph.proto.graph.initializer}
    return {**graph.model.types, **stored}


def is_stored(graph: Graph, name: str) -> bool:
    """Return True for an initializer, or the output of a Constant node."""
    if name in graph.producers:
        return str(graph.nodes[graph.producers[name]].op_type) == "Constant"
    return name not in graph.model.varying


def _formal(names: Sequence[str], formal: Sequence[onnx.defs.OpSchema.FormalParameter]) -> Iterator[tuple[str, str]]:
    """Yield the tensors that a node reads or computes, each with the type of the operator's schema."""
    for index, name in enumerate(names):
        yield name, formal[min(index, len(formal) - 1)].type_str
