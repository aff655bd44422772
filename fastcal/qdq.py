"""`quantize`: a model that carries its INT8 scales itself, as QuantizeLinear and DequantizeLinear (Q/DQ) pairs.

TensorRT from 11.0 on has no calibration: it runs in INT8 what a model asks for. Where the pairs belong is taken from
the placement recommendations in TensorRT's documentation ("Explicit Quantization"). ONNX Runtime's quantizer is not
used: it quantizes both inputs of an Add, hands layers that stay in float the rounded tensor as soon as one other layer
reads it in INT8, and drops the beta of a Gemm whose bias stays in float.
"""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache as remembered
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import record_path
from fastcal.errors import FastcalError
from fastcal.model import Model

#: Layers that multiply by weights: where TensorRT's INT8 gains are.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

#: The same, for a text.
_LAYERS = ", ".join(WEIGHTED[:-1]) + f" or {WEIGHTED[-1]}"

#: Layers into which TensorRT fuses the Add that follows.
_TAKES_ADD = ("Conv", "ConvTranspose")

#: Pooling layers that compute, so that TensorRT runs them in INT8 only between two pairs.
_AVERAGES = ("AveragePool", "GlobalAveragePool")

#: Layers through which TensorRT moves a QuantizeLinear up, to the layer before.
_COMMUTE = ("Concat", "Dropout", "Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

#: The first opset whose QuantizeLinear takes a scale per channel.
_FIRST_OPSET = 13

#: The first version of ONNX's format in which constants, the scales, need not be inputs of the graph too.
_FIRST_IR = 4

#: How many layers that stay in float are named in the log.
_MOST_NAMED = 5

_log = logging.getLogger("fastcal")


def quantize(
    model: str | os.PathLike[str] | Model,
    cache: CalibrationCache | str | os.PathLike[str],
    *,
    exclude: Iterable[str] = (),
) -> onnx.ModelProto:
    """Put Q/DQ pairs with the scales of a calibration cache into a model, where TensorRT's documentation wants them.

    - A pair is on every activation that a Conv, ConvTranspose, Gemm or MatMul reads, with the cache's scale as it is,
      and on its weights, with a scale per output channel: amax / 127. INT8 is symmetric, every zero point 0. Weights
      stay float32 behind their pair, which every TensorRT from 8 on reads; biases stay float32 without one.
    - No pair is between layers that TensorRT fuses: convolution, BatchNormalization, Relu, and the Add of a residual
      connection. Such an Add has a pair on its other input, which lets the convolution write INT8.
    - An average pooling has one on its input where what it gives is quantized too. MaxPool, Concat and what only
      changes the shape need none: TensorRT moves the next pair through them.

    A layer stays in float if the cache has no scale for what it reads, or the scale 0, and if its weights are computed
    or not float32. The log says which.

    Args:
        model: The ONNX file.
        cache: The cache, or its file; then the record beside it must not be of another model.
        exclude: Layers to keep in float: their names, or types like "Gemm". "Add" keeps the residual connections.

    Returns:
        The model with its weights, external ones too.

    Raises:
        FastcalError: The model has such pairs already, its opset is below 13, or it has no layer to quantize; the
            cache is of another model; a layer to exclude is not in the model.
    """
    network = Model.of(model)
    excluded = check_quantizable(network, exclude)
    scales = load_for(network, cache).scales
    graph = _Graph(network)
    plan = _Plan(graph, scales, excluded)
    if not plan.pairs:
        raise FastcalError(
            f"{network.path} has no layer to quantize{_named(plan.in_float, ': ')}; that is a {_LAYERS} of float32 "
            "inputs and weights, with a scale above 0 in the cache"
        )
    if plan.in_float:
        _log.warning("%d layers stay in float%s", len(plan.in_float), _named(plan.in_float, ": "))
    _insert(graph, plan.pairs, scales)
    return graph.proto


def count_quantized(model: onnx.ModelProto) -> tuple[int, int]:
    """How many of a model's Conv, ConvTranspose, Gemm and MatMul are in INT8, and how many there are."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in model.graph.node if node.op_type in WEIGHTED]
    return sum(set(node.input[:2]) <= dequantized for node in layers), len(layers)


def check_quantizable(network: Model, exclude: Iterable[str] = ()) -> set[int]:
    """Fail now if `quantize` would refuse the model, or a layer to exclude.

    Returns:
        The numbers of the nodes to exclude, in the graph's order.

    Raises:
        FastcalError: As `quantize`.
    """
    if network.has_pairs:
        raise FastcalError(
            f"{network.path} has QuantizeLinear or DequantizeLinear already; quantize the float model it was made from"
        )
    if network.opset < _FIRST_OPSET:
        raise FastcalError(
            f"{network.path} is of opset {network.opset}, a scale per channel needs {_FIRST_OPSET}; export the network "
            f"with opset 17, or convert the model with onnx.version_converter.convert_version and calibrate again"
        )
    if not any(node.op_type in WEIGHTED for node in network.proto.graph.node):
        raise FastcalError(f"{network.path} has no layer to quantize: none is a {_LAYERS}")
    if isinstance(exclude, str):
        raise FastcalError(f"exclude is {exclude!r}; give a list of names or types")
    return _find(network, exclude)


def load_for(network: Model, cache: CalibrationCache | str | os.PathLike[str]) -> CalibrationCache:
    """The cache itself, or the one in a file.

    Raises:
        FastcalError: It was made from another model.
    """
    if isinstance(cache, CalibrationCache):
        label, remedy = "the cache", "calibrate this one"
        loaded = cache
    else:
        label, remedy = str(cache), f"calibrate this one, or remove {record_path(cache)} if they are the same network"
        loaded = CalibrationCache.load(cache)
    made_from = loaded.record.entries.get("model") if loaded.record else None
    if made_from is not None and made_from != network.digest:
        raise FastcalError(f"{label} was calibrated with another model than {network.path}, says its record; {remedy}")
    return loaded


class _Graph:
    """A copy of a model with all its weights, and what is where in its graph.

    An edge, a pair of numbers, is one input of one node.
    """

    def __init__(self, network: Model) -> None:
        self.path = network.path
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(network.proto)
        try:
            onnx.load_external_data_for_model(self.proto, str(network.path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            text = str(error).splitlines()[0]
            raise FastcalError(f"cannot load {network.path}: {text}; keep its external data beside it") from error
        self.nodes = list(self.proto.graph.node)
        self.outputs = {value.name for value in self.proto.graph.output}
        self.producers = {name: number for number, node in enumerate(self.nodes) for name in node.output if name}
        self._check_order()
        self.consumers: dict[str, list[tuple[int, int]]] = {}
        for number, node in enumerate(self.nodes):
            for index, name in enumerate(node.input):
                self.consumers.setdefault(name, []).append((number, index))
        self._initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.types = network.types
        self.constant = remembered(self._constant)

    def _check_order(self) -> None:
        """Fail if nodes read what is computed from what they compute."""
        read = {
            number: [self.producers[name] for name in node.input if name in self.producers]
            for number, node in enumerate(self.nodes)
        }
        try:
            TopologicalSorter(read).prepare()
        except CycleError as error:
            label = _label(self.nodes[error.args[1][0]])
            raise FastcalError(
                f"{self.path} is no valid ONNX model: node {label!r} reads what is computed from its own output; "
                "export it again"
            ) from error

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        """The value of a tensor that is the same for every input: a weight, perhaps transposed; None for others."""
        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        if name not in self.producers:
            return None
        node = self.nodes[self.producers[name]]
        if node.op_type == "Constant":
            tensor = _attribute(node, "value", None)
            return None if tensor is None else numpy_helper.to_array(tensor)
        if node.op_type not in ("Identity", "Transpose"):
            return None
        value = self.constant(node.input[0])
        if value is None or node.op_type == "Identity":
            return value
        try:
            return np.transpose(value, _attribute(node, "perm", None))
        except ValueError as error:
            raise FastcalError(
                f"{self.path} is no valid ONNX model: node {_label(node)!r}: {error}; export it again"
            ) from error


class _Plan:
    """Which inputs of which nodes get a pair.

    Args:
        graph: The model.
        scales: The cache's scales.
        excluded: Numbers of the nodes to keep in float.

    Attributes:
        pairs: For every edge with a pair the axis of its scales; None for one scale.
        in_float: For every layer that cannot be quantized the reason.
    """

    def __init__(self, graph: _Graph, scales: Mapping[str, float], excluded: set[int]) -> None:
        self.pairs: dict[tuple[int, int], int | None] = {}
        self.in_float: dict[str, str] = {}
        self._graph, self._scales = graph, scales
        self._numbers = [number for number in range(len(graph.nodes)) if number not in excluded]
        self._check_names()
        self._plan_weighted()
        self._plan_residuals()
        self._plan_averages()

    def _check_names(self) -> None:
        """Fail if the layers' inputs are not the cache's tensors."""
        layers = [node for node in self._graph.nodes if node.op_type in WEIGHTED]
        read = {name for node in layers for name in node.input[:2] if self._graph.constant(name) is None}
        found = len(read & self._scales.keys())
        if 2 * found < len(read):
            raise FastcalError(
                f"the cache has scales for {found} of the {len(read)} tensors that the layers of {self._graph.path} "
                f"read: it is another model's; calibrate this one"
            )

    def _plan_weighted(self) -> None:
        for number, node in self._nodes(*WEIGHTED):
            axes: dict[int, int | None] = {}
            reason = ""
            for index, name in enumerate(node.input[:2]):
                weights = self._graph.constant(name)
                if weights is not None:
                    axes[index] = _channel_axis(node, index, weights.ndim)
                    reason = reason or _unfit(name, weights)
                else:
                    axes[index] = None
                    computed = index == 1 and node.op_type in _TAKES_ADD
                    reason = reason or (f"its weights {name} are computed" if computed else self._without_scale(name))
            self._add(number, axes, reason)

    def _plan_residuals(self) -> None:
        depths = self._depths()
        for number, node in self._nodes("Add"):
            if any(self._graph.constant(name) is not None for name in node.input):
                continue
            # Of two convolutions TensorRT fuses the Add into one. The branch with fewer layers is the residual one.
            fused = [index for index, name in enumerate(node.input) if self._ends_in_convolution(name)]
            if fused:
                main = max(fused, key=lambda index: depths[node.input[index]])
                residual = node.input[1 - main]
                self._add(number, {1 - main: None}, self._without_scale(residual))

    def _plan_averages(self) -> None:
        for number, node in reversed(list(self._nodes(*_AVERAGES))):
            # A tensor that something reads in float would have to be in memory twice.
            readers = self._graph.consumers[node.input[0]]
            alone = all(edge in self.pairs or self._graph.nodes[edge[0]].op_type in _AVERAGES for edge in readers)
            if alone and self._is_quantized_next(node.output[0]):
                self._add(number, {0: None}, self._without_scale(node.input[0]))

    def _nodes(self, *kinds: str) -> Iterator[tuple[int, onnx.NodeProto]]:
        for number in self._numbers:
            if self._graph.nodes[number].op_type in kinds:
                yield number, self._graph.nodes[number]

    def _add(self, number: int, axes: Mapping[int, int | None], reason: str) -> None:
        if reason:
            self.in_float[_label(self._graph.nodes[number])] = reason
        else:
            self.pairs |= {(number, index): axis for index, axis in axes.items()}

    def _without_scale(self, name: str) -> str:
        """Why an activation cannot be quantized; empty if it can."""
        kind = self._graph.types.get(name, TensorProto.FLOAT)
        if kind not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
            return f"{name} is {TensorProto.DataType.Name(kind).lower()}"
        if name not in self._scales:
            return f"no scale for {name}"
        scale = self._scales[name]
        return "" if 0 < scale < np.inf else f"the scale of {name} is {scale:g}"

    def _ends_in_convolution(self, name: str) -> bool:
        """Whether a tensor comes from a quantized convolution into which TensorRT fuses what reads it."""
        number = self._graph.producers.get(name)
        if number is None or name in self._graph.outputs or len(self._graph.consumers[name]) > 1:
            return False
        node = self._graph.nodes[number]
        if node.op_type == "BatchNormalization":
            return self._ends_in_convolution(node.input[0])
        return node.op_type in _TAKES_ADD and (number, 0) in self.pairs

    def _is_quantized_next(self, name: str) -> bool:
        """Whether all that reads a tensor reads it in INT8."""
        return name not in self._graph.outputs and all(
            (number, index) in self.pairs
            or (
                self._graph.nodes[number].op_type in _COMMUTE
                and self._is_quantized_next(self._graph.nodes[number].output[0])
            )
            for number, index in self._graph.consumers.get(name, [(-1, -1)])
        )

    def _depths(self) -> dict[str, int]:
        """For every activation how many weighted layers there are on the longest way to it."""
        depths: dict[str, int] = {}
        for node in self._graph.nodes:
            depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type in WEIGHTED)
            depths |= dict.fromkeys(node.output, depth)
        return depths


def _insert(graph: _Graph, pairs: Mapping[tuple[int, int], int | None], scales: Mapping[str, float]) -> None:
    """Put the pairs into the graph, each before the first node that reads it."""
    taken = set(_names(graph.proto.graph))
    made: dict[tuple[str, int | None], str] = {}
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(graph.nodes):
        for index, name in enumerate(node.input):
            if (number, index) not in pairs:
                continue
            axis = pairs[number, index]
            if (name, axis) not in made:
                weights = graph.constant(name)
                scale = np.asarray(scales[name], "f4") if weights is None else _weight_scales(weights, axis)
                prefix = _unused(name, taken)
                new, tensors = _pair(name, prefix, scale, axis)
                nodes += new
                graph.proto.graph.initializer.extend(tensors)
                taken.update(_pair_names(prefix))
                made[name, axis] = new[-1].output[0]
            node.input[index] = made[name, axis]
        nodes.append(node)
    graph.proto.ir_version = max(graph.proto.ir_version, _FIRST_IR)
    graph.proto.graph.ClearField("node")
    graph.proto.graph.node.extend(nodes)


def _pair(
    name: str, prefix: str, scale: npt.NDArray[np.float32], axis: int | None
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The two nodes of a pair, and their scale and zero point."""
    *parameters, quantize, dequantize, quantized, dequantized = _pair_names(prefix)
    tensors = [
        numpy_helper.from_array(scale, parameters[0]),
        numpy_helper.from_array(np.zeros(scale.shape, np.int8), parameters[1]),
    ]
    options: dict[str, Any] = {} if axis is None else {"axis": axis}
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantized], quantize, **options),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [dequantized], dequantize, **options),
    ], tensors


def _pair_names(prefix: str) -> tuple[str, ...]:
    """The names of a pair's scale and zero point, of its two nodes, and of their outputs."""
    nodes = (f"{prefix}_QuantizeLinear", f"{prefix}_DequantizeLinear")
    return f"{prefix}_scale", f"{prefix}_zero_point", *nodes, *(f"{node}_Output" for node in nodes)


def _unused(name: str, taken: set[str]) -> str:
    """A prefix under which all names of a pair are free."""
    prefix, number = name, 1
    while not taken.isdisjoint(_pair_names(prefix)):
        number += 1
        prefix = f"{name}_{number}"
    return prefix


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """All names of tensors and nodes in a graph, and in those within it."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names(inner)


def _weight_scales(weights: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.float32]:
    """One scale, amax / 127, for each index of an axis, or for all; 1 where all weights are 0: no scale may be 0."""
    others = None if axis is None else tuple(other for other in range(weights.ndim) if other != axis)
    scales = np.asarray(np.abs(weights).max(axis=others) / np.float32(127), np.float32)
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def _channel_axis(node: onnx.NodeProto, index: int, dimensions: int) -> int | None:
    """Along which axis of a constant input the output channels lie; None for a vector, which has one."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1  # with groups: the channels of one group, each with one scale for all groups
    if node.op_type == "Gemm":
        return int(_attribute(node, "transB", 0) == 0) if index == 1 else int(_attribute(node, "transA", 0) != 0)
    return None if dimensions < 2 else dimensions - 1 if index == 1 else dimensions - 2


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(value) for value in node.attribute if value.name == name), default)


def _unfit(name: str, weights: npt.NDArray[Any]) -> str:
    """Why weights cannot be quantized; empty if they can."""
    if weights.dtype != np.float32:
        return f"its weights {name} are {weights.dtype}"
    return "" if np.isfinite(weights).all() else f"its weights {name} are not all finite"


def _find(network: Model, wanted: Iterable[str]) -> set[int]:
    """Numbers of the nodes with certain names or of certain types."""
    nodes = network.proto.graph.node
    numbers: set[int] = set()
    for name in wanted:
        found = {number for number, node in enumerate(nodes) if name in (_label(node), node.op_type)}
        if not found:
            known = sorted({_label(node) for node in nodes} | {node.op_type for node in nodes})
            near = difflib.get_close_matches(name, known, 3, 0.5) or [kind for kind in WEIGHTED if kind in known]
            raise FastcalError(
                f"{network.path} has no layer and no type of layer {name!r} to exclude; near are {', '.join(near)}"
            )
        numbers |= found
    return numbers


def _label(node: onnx.NodeProto) -> str:
    """A node's name; where it has none, that of what it computes."""
    return str(node.name or node.output[0])


def _named(in_float: Mapping[str, str], before: str) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(in_float.items())[:_MOST_NAMED]]
    more = f" and {len(in_float) - _MOST_NAMED} more" if len(in_float) > _MOST_NAMED else ""
    return before + ", ".join(shown) + more if shown else ""
