"""The tensors that TensorRT's parser adds to a network, observed with ONNX Runtime.

The parser makes constants of weights, splits a Gemm, and puts reshapes around layers of one dimension. TensorRT asks a
cache for the scales of these tensors too, under names of its own. Here, such a tensor is a constant, has the values of
a tensor of the ONNX file, only moved, or is the result of a simple layer that ONNX has an operator for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from fastcal.definition import Definition, Network
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.network import (
    computed_tensors,
    constant_values,
    float_names,
    input_tensors,
    is_float,
    layers,
    pooled_tensors,
    trt,
)
from fastcal.observe.backends import Enough, LocalBackend, OnnxRuntimeBackend, Report
from fastcal.observe.histogram import Histogram, Observations

#: The types of layers that only move values, by their names in `tensorrt.LayerType`.
_MOVES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")

#: ONNX's operators for TensorRT's operations of layers of these types.
_OPERATORS = {
    "ELEMENTWISE": {
        "SUM": "Add", "PROD": "Mul", "MAX": "Max", "MIN": "Min", "SUB": "Sub", "DIV": "Div", "POW": "Pow",
    },
    "UNARY": {
        "EXP": "Exp", "LOG": "Log", "SQRT": "Sqrt", "RECIP": "Reciprocal", "ABS": "Abs", "NEG": "Neg", "ERF": "Erf",
    },
    "ACTIVATION": {"RELU": "Relu", "SIGMOID": "Sigmoid", "TANH": "Tanh", "HARD_SIGMOID": "HardSigmoid"},
}  # fmt: skip


@dataclass(frozen=True)
class ParsedBackend(LocalBackend):
    """ONNX Runtime for a network that TensorRT's parser made of an ONNX file; the cache lacks none of its tensors.

    Attributes:
        parsed: The network's tensors in terms of the file.
        inner: The backend that runs the file.
    """

    parsed: "Parsed"
    inner: OnnxRuntimeBackend
    name = "onnxruntime"
    device = "auto"

    @property
    def precision(self) -> str:  # type: ignore[override]
        """The name of the precision."""
        return self.inner.precision

    def observer(self, network: Network, gpu: int | None) -> Any:
        """Return the observer of the file."""
        return self.inner.observer(self.parsed.model, gpu)

    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe the file, and give the parser's tensors their histograms too."""
        observed = self.inner.observe(self.parsed.model, feed, progress, enough)
        histograms = dict(observed.histograms)
        for name, values in self.parsed.constants.items():
            histograms[name] = Histogram()
            histograms[name].update(values)
        histograms |= {name: histograms[source] for name, source in self.parsed.copies.items() if source in histograms}
        names, least = self.parsed.names, observed.least_thresholds
        histograms = {name: histograms[name] for name in names if name in histograms} | histograms
        least = {**least, **{name: least[source] for name, source in self.parsed.copies.items() if source in least}}
        return replace(
            observed, network=network.label, histograms=histograms, shared_scales=self.parsed.shared_scales,
            least_thresholds=least,
        )  # fmt: skip


def completed_scales(network: Any, scales: Mapping[str, float], file: Model) -> dict[str, float]:
    """Return a file's scales with those of the tensors that TensorRT's parser adds to its `INetworkDefinition`.

    Constants have their largest |x| / 127; other tensors, the parts of a Gemm for instance, have the scale of what is
    computed from them.
    """
    found = dict(scales)
    for name, values in constant_values(network).items():
        found.setdefault(name, float(np.float32(np.abs(values).max(initial=0)) / np.float32(127)))
    for layer in reversed(list(layers(network))):
        scale = found.get(layer.get_output(0).name)
        for value in map(layer.get_input, range(layer.num_inputs)):
            if scale is not None and value is not None and value.name not in file.tensors:
                found.setdefault(value.name, scale)
    return found


class Parsed:
    """The float tensors of an `INetworkDefinition` in terms of the ONNX file that it was parsed from.

    Attributes:
        names: The names of all float tensors.
        constants: The values of the constants, by name.
        copies: The tensors with moved values: the name of each and of the tensor that they come from.
        unknown: The names of the tensors that are neither, nor results of simple layers.
        shared_scales: See `Model.shared_scales`.
        model: The file with nodes for the results of simple layers, which have TensorRT's names.
    """

    def __init__(self, definition: Definition, model: Model) -> None:
        network = definition.raw
        self._given = {value.name for value in model.inputs} | {*model.activations}
        self._makers = {
            layer.get_output(index).name: layer for layer in layers(network) for index in range(layer.num_outputs)
        }
        self._nodes: dict[str, onnx.NodeProto] = {}
        self._stored: dict[str, onnx.TensorProto] = {}
        self._near = _moved(network)
        self.constants = constant_values(network)
        values = [*filter(is_float, input_tensors(network)), *computed_tensors(network)]
        self.names = float_names(network)
        self.copies: dict[str, str] = {}
        self.unknown: list[str] = []
        self.shared_scales = pooled_tensors(network)
        for value in values:
            if value.name not in self._given:
                self._find(value.name)
        self._file = model

    @cached_property
    def model(self) -> Model:
        """The file with further nodes."""
        return self._file.extended(list(self._nodes.values()), list(self._stored.values()))

    def _find(self, name: str) -> None:
        """Find out what a tensor is that the file does not have."""
        source = self._source(name)
        if source is not None:
            self.copies[name] = source
        elif not self._computes(name):
            self.unknown.append(name)

    def _source(self, name: str) -> str | None:
        """Return a tensor of the file, or a constant, with the values of another tensor, perhaps moved."""
        seen, left = {name}, [name]
        while left:
            current = left.pop()
            if current != name and (current in self._given or current in self.constants):
                return current
            near = {other for other in self._near.get(current, ()) if other not in seen}
            seen |= near
            left += near
        return None

    def _computes(self, name: str) -> bool:
        """Return whether a node can compute a tensor, and keep the node."""
        if name in self._given or name in self._nodes:
            return True
        if name in self.constants:
            layer = self._makers[name]
            layer.__class__ = trt.IConstantLayer
            self._stored[name] = onnx.numpy_helper.from_array(self.constants[name].reshape(tuple(layer.shape)), name)
            return True
        node = self._node(name)
        if node is None:
            return False
        inputs = [self._makers[name].get_input(index).name for index in range(self._makers[name].num_inputs)]
        if not all(map(self._computes, inputs)):
            return False
        self._nodes[name] = node  # after those that compute its inputs
        return True

    def _node(self, name: str) -> onnx.NodeProto | None:
        """Return ONNX's node for the layer that computes a tensor, if there is such an operator."""
        layer = self._makers.get(name)
        if layer is None:
            return None
        kind = layer.type.name
        inputs = [layer.get_input(index).name for index in range(layer.num_inputs)]
        if kind == "MATRIX_MULTIPLY":
            return _product(layer, inputs, name)
        if kind not in _OPERATORS:
            return None
        layer.__class__ = {
            "ELEMENTWISE": trt.IElementWiseLayer, "UNARY": trt.IUnaryLayer, "ACTIVATION": trt.IActivationLayer,
        }[kind]  # fmt: skip
        operation = (layer.type if kind == "ACTIVATION" else layer.op).name
        operator = _OPERATORS[kind].get(operation)
        attributes = {"alpha": layer.alpha, "beta": layer.beta} if operation == "HARD_SIGMOID" else {}
        return None if operator is None else onnx.helper.make_node(operator, inputs, [name], **attributes)


def _product(layer: Any, inputs: list[str], name: str) -> onnx.NodeProto | None:
    layer.__class__ = trt.IMatrixMultiplyLayer
    turns = [layer.op0.name, layer.op1.name]
    is_matrix = all(len(tuple(layer.get_input(index).shape)) == 2 for index in (0, 1))
    if "VECTOR" in turns or not is_matrix:
        return None
    return onnx.helper.make_node(
        "Gemm", inputs, [name], transA=int(turns[0] == "TRANSPOSE"), transB=int(turns[1] == "TRANSPOSE")
    )


def _moved(network: Any) -> dict[str, list[str]]:
    """Return the tensors that a layer moves values from or to, each with the tensors at the other ends."""
    near: dict[str, list[str]] = {}
    for layer in layers(network):
        if layer.type.name in _MOVES and is_float(layer.get_output(0)):
            ends = layer.get_input(0).name, layer.get_output(0).name
            for one, other in (ends, ends[::-1]):
                near.setdefault(one, []).append(other)
    return near
