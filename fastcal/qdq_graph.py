"""`Graph`: the connections and constants of an ONNX graph, and the insertion of Q/DQ pairs."""

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_dequantize_linear import DequantizeLinear_21

from fastcal.errors import ModelError
from fastcal.graph import reads
from fastcal.half import HalfType
from fastcal.model import Model, node_label

#: One input of one node: the number of the node in the graph's order, and the index of the input.
Edge = tuple[int, int]

#: The index of an input that a node's subgraphs read.
IN_SUBGRAPH = -1

#: The first opset whose QuantizeLinear takes a scale per channel.
_FIRST_OPSET = 13

#: The first opset whose QuantizeLinear may name its output type. From there on, ONNX Runtime 1.32 cannot optimize a
#: MatMul and Add that read more than two dimensions through a pair with a zero point of INT8.
_FIRST_OUTPUT_TYPE = 21

#: The first version of ONNX's file format in which constants, here the scales, need not be inputs of the graph.
_FIRST_IR = 4


class Graph:
    """A copy of a model, and the connections between its nodes. External data is read where it is needed.

    By the name of a tensor, `producers` has the number of the node that computes it, `readers` the edges that read it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.nodes = list(self.proto.graph.node)
        self.outputs = {value.name for value in self.proto.graph.output}
        self.producers = {name: number for number, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[Edge]] = {}
        for number, node in enumerate(self.nodes):
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((number, index))
            for name in set(reads(node)) - set(node.input):
                self.readers.setdefault(name, []).append((number, IN_SUBGRAPH))
        self._initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._constants: dict[str, npt.NDArray[Any] | None] = {}
        self._folded: set[str] = set()
        self._has_unread = False
        self._check_for_cycles()

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """Return the value of a weight or another constant, also of a computed one; None for other tensors."""
        if name not in self._constants:
            self._constants[name] = self._read_constant(name)
        return self._constants[name]

    def _read_constant(self, name: str) -> npt.NDArray[Any] | None:
        if name in self._initializers:
            return self.model.external.array(self._initializers[name])
        if name in self.model.varying or name not in self.producers:
            return None
        tensor = attribute(self.nodes[self.producers[name]], "value", None)
        if isinstance(tensor, onnx.TensorProto) and self.nodes[self.producers[name]].op_type == "Constant":
            return self.model.external.array(tensor)
        needed, unread = {self.producers[name]}, [self.producers[name]]
        while unread:
            before = {self.producers[each] for each in reads(self.nodes[unread.pop()]) if each in self.producers}
            unread += before - needed
            needed |= before
        try:
            return self._compute(name, [self.nodes[number] for number in sorted(needed)])
        except Exception:  # an operator is unknown or the graph is invalid: the weights stay as they are
            return None

    def _compute(self, name: str, nodes: Sequence[onnx.NodeProto]) -> npt.NDArray[Any]:
        """Return the value of a tensor that these nodes compute from initializers."""
        leaves = {each for node in nodes for each in reads(node)} & self._initializers.keys()
        values = {leaf: self.model.external.array(self._initializers[leaf]) for leaf in leaves}
        inputs, outputs = ([onnx.ValueInfoProto(name=each) for each in names] for names in (leaves, [name]))
        graph = helper.make_graph(nodes, "constant", inputs, outputs)
        self.model.external.load(graph)
        model = helper.make_model(graph, opset_imports=self.proto.opset_import)
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(model, new_ops=[DequantizeLinear]).run(None, values)
        return np.asarray(found[0])

    def bias_of(self, number: int) -> Edge | None:
        """Return the input that holds the bias of a layer, a constant or one that can be added; None if there is none.

        It is the third input of a convolution or a Gemm, or the constant of the Add behind a MatMul.
        """
        node = self.nodes[number]
        if node.op_type == "MatMul":
            readers = self.readers.get(node.output[0], [])
            if len(readers) != 1 or node.output[0] in self.outputs or self.nodes[readers[0][0]].op_type != "Add":
                return None
            place = readers[0][0], 1 - readers[0][1]
            bias = self.constant(self.nodes[place[0]].input[place[1]])
            return None if bias is None or bias.dtype != np.float32 else place
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            return None
        if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1, 1):
            return None
        if len(node.input) > 2 and node.input[2] and self.constant(node.input[2]) is None:
            return None
        return number, 2

    def output_channels(self, number: int) -> int:
        """Return the number of output channels of a convolution, a Gemm or a MatMul; 0 if its weights do not tell."""
        node = self.nodes[number]
        weights = self.constant(node.input[1]) if len(node.input) > 1 else None
        if weights is None or weights.ndim < 2:
            return 0
        is_first = node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0))
        groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
        return int(weights.shape[0 if is_first else 1] * groups)

    def correct_bias(self, number: int, correction: npt.NDArray[np.float32]) -> None:
        """Add to the bias of a layer that has one: a value for each output channel."""
        place = self.bias_of(number)
        assert place is not None
        node, index = self.nodes[place[0]], place[1]
        name = node.input[index] if len(node.input) > index else ""
        bias = self.constant(name) if name else None
        corrected = f"{self.nodes[number].output[0]}_corrected_bias"
        value = correction if bias is None else (bias + correction).astype(np.float32)
        self.proto.graph.initializer.append(numpy_helper.from_array(value, corrected))
        self._has_unread |= bias is not None
        del node.input[index : index + 1]
        node.input.insert(index, corrected)

    def _check_for_cycles(self) -> None:
        read = {
            number: [self.producers[name] for name in reads(node) if name in self.producers]
            for number, node in enumerate(self.nodes)
        }
        try:
            TopologicalSorter(read).prepare()
        except CycleError as error:
            label = node_label(self.nodes[error.args[1][0]])
            raise self.model.invalid(f"node {label!r} depends on its own output") from error

    def insert_pairs(
        self,
        axes: Mapping[Edge, int | None],
        scales: Mapping[str, float],
        *,
        int8_weights: bool = False,
        half: HalfType | None = None,
    ) -> None:
        """Insert Q/DQ pairs into the copy, each before the first node that reads through it.

        `axes` has the edges that get a pair, with the axis along which a constant's scales lie; None for one scale.
        If `int8_weights`, constants are stored as INT8, in the place of the pair's QuantizeLinear. The scales of
        constants are values of the type `half`, unless the largest is too small for it.
        """
        taken = set(names_in(self.proto.graph))
        dequantized: dict[tuple[str, int | None], str] = {}
        nodes: list[onnx.NodeProto] = []
        for number, node in enumerate(self.nodes):
            for index, name in enumerate(node.input):
                if (number, index) not in axes:
                    continue
                axis = axes[number, index]
                if (name, axis) not in dequantized:
                    weights = self.constant(name)
                    scale = np.asarray(scales[name], "f4") if weights is None else weight_scales(weights, axis)
                    if weights is not None and half is not None and half.holds(scale.max()):
                        scale = half.rounded_up(scale)
                    pair, parameters = _pair(name, taken, scale, axis, self._names_output_type(name))
                    if weights is not None and int8_weights:
                        stored = pair.pop(0).output[0]
                        parameters.append(numpy_helper.from_array(round_weights(weights, scale, axis), stored))
                    elif weights is not None:
                        self._fold(name)
                    nodes += pair
                    self.proto.graph.initializer.extend(parameters)
                    dequantized[name, axis] = pair[-1].output[0]
                node.input[index] = dequantized[name, axis]
            nodes.append(node)
        self.proto.ir_version = max(self.proto.ir_version, _FIRST_IR)
        kept = [node for node in nodes if self._folded.isdisjoint(node.output)]
        self.replace_nodes(kept, drops_unread=bool(self._folded) or int8_weights or self._has_unread)

    def replace_nodes(self, nodes: Sequence[onnx.NodeProto], *, drops_unread: bool = True) -> None:
        """Put nodes into the copy in place of its own; if asked for, drop the constants that none of them reads."""
        self.proto.graph.ClearField("node")
        self.proto.graph.node.extend(nodes)
        if drops_unread:
            self._drop_unread()

    def _names_output_type(self, name: str) -> bool:
        """Return True if the pair of an activation is to name its type in place of a zero point."""
        if self.model.opset < _FIRST_OUTPUT_TYPE or name not in self.model.varying:
            return False
        return any(self.nodes[number].op_type == "MatMul" for number, _ in self.readers[name])

    def _fold(self, name: str) -> None:
        """Store a computed constant as an initializer: TensorRT may not compute what a pair reads."""
        number = self.producers.get(name)
        if number is None or self.nodes[number].op_type == "Constant":
            return
        for output in filter(None, self.nodes[number].output):
            if output not in self._folded:
                self._folded.add(output)
                self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(self.constant(output)), output))

    def _drop_unread(self) -> None:
        """Drop the constants that nothing reads: other constants were computed from them, or hold them as INT8."""
        graph, varying = self.proto.graph, self.model.varying.keys()
        read, kept = {*self.outputs, *(name for value in graph.input if (name := value.name) in varying)}, []
        for node in reversed(graph.node):
            if not (node.output and read.isdisjoint(node.output) and varying.isdisjoint(node.output)):
                kept.append(node)
                read.update(reads(node))
        for field, values in (
            ("node", kept[::-1]),
            ("initializer", [tensor for tensor in graph.initializer if tensor.name in read]),
            ("input", [value for value in graph.input if value.name in read]),
        ):
            graph.ClearField(field)
            getattr(graph, field).extend(values)


def modern(model: Model, half: HalfType | None = None) -> Model:
    """Return a model of an opset that has a scale per channel: the model, or what ONNX's converter makes of it.

    With `half`, the scales may have that type. What is float16 becomes float32.
    """
    least, needed_for = (_FIRST_OPSET, "a scale per channel") if half is None else (half.opset, half.label)
    if model.opset >= least:
        return model.wide
    try:
        return model.to_opset(least).wide
    except ModelError as error:
        raise ModelError(
            f"{model.label} has opset {model.opset}, and {needed_for} needs opset {least}; export the "
            f"network with opset {max(least, 17)} and calibrate again, since it cannot be converted: {error}"
        ) from error


class DequantizeLinear(DequantizeLinear_21):
    """The operator of any opset: ONNX's evaluator lacks it before opset 19. The name is ONNX's."""

    op_domain = ""

    def _run(self, *args: Any, axis: int = 1, block_size: int = 0, output_dtype: int | None = None) -> Any:
        return super()._run(*args, axis=axis, block_size=block_size)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or `default` if the node does not have it."""
    return next((helper.get_attribute_value(value) for value in node.attribute if value.name == name), default)


def _pair(
    name: str, taken: set[str], scale: npt.NDArray[np.float32], axis: int | None, names_output_type: bool
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the two nodes of a pair, its scale, and its zero point; add their names to `taken`.

    The type of the zero point is INT8. If the node names its output type itself, it needs no zero point.
    """
    prefix, number = name, 1
    while not taken.isdisjoint(names := _pair_names(prefix)):
        number += 1
        prefix = f"{name}_{number}"
    taken.update(names)
    *parameters, quantize, dequantize, quantized, dequantized = names
    tensors = [
        numpy_helper.from_array(scale, parameters[0]),
        numpy_helper.from_array(np.zeros(scale.shape, np.int8), parameters[1]),
    ]
    options: dict[str, Any] = {} if axis is None else {"axis": axis}
    output_type: dict[str, Any] = {}
    if names_output_type:
        output_type["output_dtype"] = onnx.TensorProto.INT8
        del parameters[1], tensors[1]
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantized], quantize, **options, **output_type),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [dequantized], dequantize, **options),
    ], tensors


def _pair_names(prefix: str) -> tuple[str, ...]:
    """Return the names of a pair's scale and zero point, of its two nodes, and of the outputs of the nodes."""
    nodes = (f"{prefix}_QuantizeLinear", f"{prefix}_DequantizeLinear")
    return f"{prefix}_scale", f"{prefix}_zero_point", *nodes, *(f"{node}_Output" for node in nodes)


def names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of a graph's tensors and nodes, those of subgraphs too."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for value in node.attribute:
            for subgraph in (value.g, *value.graphs):
                yield from names_in(subgraph)


def unique_name(name: str, taken: set[str]) -> str:
    """Return a name like `name` that is not taken, and add it to those that are."""
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique


def weight_scales(weights: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.float32]:
    """Return a scale, amax / 127, for each index of an axis, or one scale for all weights.

    A scale must not be 0, so the scale is 1 if all its weights are 0.
    """
    others = None if axis is None else tuple(other for other in range(weights.ndim) if other != axis)
    largest = np.maximum(weights.max(axis=others), -weights.min(axis=others))  # without a copy of all weights
    scales = np.asarray(largest / np.float32(127), np.float32)
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def round_weights(
    weights: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], axis: int | None
) -> npt.NDArray[np.int8]:
    """Return weights as QuantizeLinear rounds them, a half to the even number; scales of amax / 127 saturate none."""
    rounded: npt.NDArray[np.int8] = np.rint(weights / spread(scales, axis, weights.ndim)).astype(np.int8)
    return rounded


def spread(scales: npt.NDArray[np.float32], axis: int | None, rank: int) -> npt.NDArray[np.float32]:
    """Return scales along an axis in a shape that NumPy broadcasts to tensors of a rank."""
    return scales if axis is None else scales.reshape([-1 if other == axis else 1 for other in range(rank)])
