"""`Model`: an ONNX file."""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from fastcal.batch import Input, known_sizes
from fastcal.branches import inline_branches
from fastcal.errors import ModelError, first_few
from fastcal.external import ExternalData
from fastcal.functions import inline_functions
from fastcal.graph import constants_of, damaged_text, graphs_within, nodes_within, varying_in
from fastcal.ranges import least_thresholds
from fastcal.widen import is_half, widened

#: The element types that count as float.
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

#: The names of the domain of ONNX's standard operators.
_STANDARD = ("", "ai.onnx")

#: A constant with more elements is not a shape: type inference does not need its values, and copying them takes long.
_LARGE = 1024


class Model:
    """An ONNX file, read without its external data.

    Attributes:
        path: The file.
        proto: The content of the file, an `onnx.ModelProto` without external data; its local functions are inlined, and
            so are the branches that are taken of Ifs with a constant condition.
        external: The external data.
        is_variant: Whether `proto` is another graph than the file's.

    Raises:
        ModelError: The file is missing or is not an ONNX model, a node has too few inputs or outputs, or external data
            lies outside the model's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise ModelError(f"the model is a {type(path).__name__}; name an ONNX file (onnx.save writes one)")
        self.path, self.is_variant = Path(path), False
        try:
            self.proto = onnx.load(self.path, load_external_data=False)
        except OSError as error:
            raise ModelError(f"cannot read model {path}: {error.strerror}; check the path") from error
        except Exception as error:  # from protobuf, or from the parser of one of ONNX's text formats
            raise ModelError(f"{path} is not an ONNX model; export the network to ONNX first") from error
        if not self.proto.graph.node:
            raise ModelError(f"{path} is not an ONNX model, or has no nodes; export the network to ONNX first")
        if field := damaged_text(self.proto):
            raise ModelError(f"{path} is a damaged ONNX model: a {field} is no text; copy or export it again")
        try:
            self.proto = inline_branches(inline_functions(self.proto))
        except Exception as error:  # of ONNX's inliner, or at a node that lacks an input
            raise self.invalid(" ".join(str(error).split())) from error
        self._check_nodes()
        graph = self.proto.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 1 and dim.HasField("dim_value"):  # dynamic; ONNX would use the number as a size
                    dim.Clear()
        self._converted: dict[int, Model] = {}
        self.external = ExternalData(self.proto.graph, self.path.parent, self.label)

    @classmethod
    def of(cls, model: "str | os.PathLike[str] | Model") -> "Model":
        """Return `model` itself, or read it from a file."""
        return model if isinstance(model, Model) else cls(model)

    def invalid(self, reason: str) -> ModelError:
        """Return the error to raise if the graph breaks a rule of ONNX; `reason` names the rule."""
        return ModelError(f"{self.label} is not a valid ONNX model: {reason.rstrip('.')}; export the network again")

    def _check_nodes(self) -> None:
        """Raise ModelError if a node has fewer inputs or outputs than code that reads the graph relies on."""
        for node in self.proto.graph.node:
            if node.domain not in _STANDARD:
                continue
            try:
                schema = onnx.defs.get_schema(node.op_type, self.opset, "")
            except onnx.defs.SchemaError:  # the backend may know the operator
                continue
            ends = ("inputs", node.input, schema.min_input), ("outputs", node.output, schema.min_output)
            for kind, names, least in ends:
                if len(names) < least:
                    raise self.invalid(
                        f"node {node_label(node)!r} has {len(names)} {kind}, and {node.op_type} needs at least {least}"
                    )

    @property
    def label(self) -> str:
        """The model's name in messages: its path."""
        return str(self.path)

    @property
    def input_names(self) -> list[str]:
        """The names of `inputs`, in the same order; errors as there."""
        return [value.name for value in self.inputs]

    @property
    def opset(self) -> int:
        """The version of ONNX's standard operators; 0 if the model does not name it."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in _STANDARD), 0)

    def to_opset(self, opset: int) -> "Model":
        """Return the model with `opset`, a later one, made by ONNX's version converter; the file stays as it is.

        Raises:
            ModelError: ONNX cannot convert the model, or would give its tensors other names.
        """
        if opset not in self._converted:
            if any(graphs_within(self.proto.graph.node)):
                raise ModelError("ONNX does not convert what lies in an If, a Loop or a Scan")
            try:
                proto = onnx.version_converter.convert_version(self.proto, opset)
            except Exception as error:  # of many kinds
                raise ModelError(" ".join(str(error).split())) from error
            converted = self.variant(proto)
            gone = {*self.input_names, *self.activations} - converted.tensors
            if gone:
                raise ModelError(f"the converter loses the tensors {first_few(sorted(gone))}")
            self._converted[opset] = converted
        return self._converted[opset]

    def extended(self, nodes: Sequence[onnx.NodeProto], initializers: Sequence[onnx.TensorProto]) -> "Model":
        """Return the model with more of what its graph has; the file stays as it is.

        Args:
            nodes: Nodes that come behind the model's own.
            initializers: Constants that they read.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(initializers)
        return self.variant(proto)

    def showing(self, tensors: Iterable[str]) -> "Model":
        """Return the model with fewer `activations`, those among `tensors`: a calibration observes no others."""
        variant, shown = self.variant(self.proto), frozenset(tensors)
        variant.__dict__["activations"] = tuple(name for name in self.activations if name in shown)
        return variant

    def variant(self, proto: onnx.ModelProto) -> "Model":
        """Return a model with the content `proto`, and the same file and external data."""
        variant = copy(self)
        variant.__dict__ = {"path": self.path, "external": self.external, "proto": proto, "_converted": {}}
        variant.is_variant = self.is_variant or proto is not self.proto
        return variant

    @cached_property
    def wide(self) -> "Model":
        """The model with float32 in place of float16; the model itself if it has none."""
        return self.variant(widened(self.proto, self.external, self.types)) if is_half(self.proto) else self

    @property
    def has_pairs(self) -> bool:
        """True if QuantizeLinear or DequantizeLinear nodes round activations: the model is quantized already.

        Such nodes may compute the weights: stored INT8 weights are constants like others.
        """
        pairs = (node for node in self.proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
        return any(not self.varying.keys().isdisjoint(node.output) for node in pairs)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that a batch must have, in the graph's order; inputs with a constant value are left out.

        Raises:
            ModelError: The model has no inputs, or an input is not a tensor or has an unknown rank.
        """
        constants = constants_of(self.proto.graph)
        values = [value for value in self.proto.graph.input if value.name not in constants]
        if not values:
            raise ModelError(f"{self.label} has no inputs: its outputs are constant and need no calibration")
        return tuple(map(self._input, values))

    def _input(self, value: onnx.ValueInfoProto) -> Input:
        tensor = value.type.tensor_type
        dtype = _dtype(tensor.elem_type)
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape") or dtype is None:
            fault, known = ("has no shape", "rank") if dtype is not None else ("has no type that ONNX knows", "type")
            if not value.type.HasField("tensor_type"):
                fault, known = "is not a tensor", "rank"
            raise ModelError(
                f"{self.label}: input {value.name!r} {fault}; export the network with tensors of known {known}"
            )
        dims = tensor.shape.dim
        return Input(value.name, known_sizes(dim.dim_value for dim in dims), dtype, dims[0].dim_param if dims else "")

    @cached_property
    def varying(self) -> Mapping[str, None]:
        """The names of the tensors that depend on the inputs, or on chance: all others are constants."""
        return varying_in(self.proto.graph)

    @cached_property
    def activations(self) -> tuple[str, ...]:
        """The names of the tensors that the nodes compute, in the graph's order, of any type.

        Constants are left out: TensorRT's parser gives constants names of its own.
        """
        nodes = (node for node in self.proto.graph.node if node.op_type != "Constant")
        return tuple(name for node in nodes for name in node.output if name)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of all tensors of the graph: inputs, constants and the outputs of nodes, also in subgraphs."""
        graph = self.proto.graph
        names = {value.name for value in graph.input} | constants_of(graph)
        return frozenset(names) | {
            name for node in (*graph.node, *nodes_within(graph.node)) for name in node.output if name
        }

    @cached_property
    def calibrated(self) -> tuple[str, ...]:
        """The names of the tensors that a calibration picks scales for: the float tensors that depend on the inputs.

        In the graph's order, inputs first, those of subgraphs last, without tensors whose type ONNX cannot infer;
        errors as `types`.
        """
        return tuple(name for name in (*self.varying, *self.within) if self.types.get(name) in FLOATS)

    @cached_property
    def within(self) -> tuple[str, ...]:
        """The names of the tensors that nodes compute in the branches of an If, or in the body of a Loop or a Scan.

        Subgraphs that depend on no input are left out.
        """
        varying = (node for node in self.proto.graph.node if not self.varying.keys().isdisjoint(node.output))
        nodes = (node for node in nodes_within(varying) if node.op_type != "Constant")
        return tuple(dict.fromkeys(name for node in nodes for name in node.output if name))

    @cached_property
    def types(self) -> Mapping[str, int]:
        """The element types of the tensors by name, as far as ONNX can infer them: `onnx.TensorProto.DataType`.

        Raises:
            ModelError: The graph contradicts itself.
        """
        try:
            inferred = self._infer({})
        except Exception as error:  # of many kinds
            raise self.invalid(" ".join(str(error).split())) from error
        graphs = (*graphs_within(inferred.node), inferred)
        known = (value for graph in graphs for value in (*graph.input, *graph.value_info, *graph.output))
        return {value.name: value.type.tensor_type.elem_type for value in known}

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the nodes' outputs for inputs of `shapes`, by name, as far as ONNX infers them."""
        return {name: shape for name, (shape, _) in self._outputs(shapes).items()}

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the bytes that the nodes' outputs take for inputs of `shapes`, by name, as far as ONNX infers them."""
        return {name: math.prod(shape) * itemsize for name, (shape, itemsize) in self._outputs(shapes).items()}

    def _outputs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return the shape and the bytes of an element of the nodes' outputs."""
        try:
            inferred = self._infer(shapes)
        except Exception:  # of many kinds; the backend reports the error
            return {}
        outputs = {}
        for value in (*inferred.value_info, *inferred.output):
            tensor = value.type.tensor_type
            is_known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
            dtype = _dtype(tensor.elem_type)
            if dtype is not None and is_known:
                outputs[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim), dtype.itemsize
        return outputs

    def _infer(self, shapes: Mapping[str, tuple[int, ...]]) -> onnx.GraphProto:
        """Return the graph with the types and shapes that ONNX infers, and without large constants' values."""
        proto = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        proto.functions.extend(self.proto.functions)
        imported = {entry.domain for entry in proto.opset_import}
        unknown = {node.domain for node in self.proto.graph.node} - {*_STANDARD, *imported}
        proto.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in sorted(unknown))
        for field, value in self.proto.graph.ListFields():
            if field.name != "initializer":
                proto.graph.MergeFrom(onnx.GraphProto(**{field.name: value}))
        for tensor in self.proto.graph.initializer:
            if math.prod(tensor.dims) > _LARGE:
                tensor = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            proto.graph.initializer.append(tensor)
        if shapes:  # the file may have the shapes of another batch
            for value in (*proto.graph.value_info, *proto.graph.output):
                value.type.tensor_type.ClearField("shape")
        for value in proto.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
                dim.dim_value = size
        return onnx.shape_inference.infer_shapes(proto, data_prop=bool(shapes)).graph

    @cached_property
    def shared_scales(self) -> Mapping[str, str]:
        """The tensors that take the scale of another tensor: the name of each and the name of that other tensor.

        TensorRT 8.6.0 gives the output of a pooling layer the scale of the layer's input, and every other tensor a
        scale of its own. Seen in the caches that TensorRT wrote for 118 small networks: the output of MaxPool and
        AveragePool over two or three dimensions shares the scale, also in a chain of these; over one dimension, where
        TensorRT's parser puts reshapes around the pooling, it does not. Nor does the output of GlobalAveragePool,
        GlobalMaxPool, LpPool, Concat, Slice, Split, Reshape, Transpose, Flatten, Squeeze, Resize, Pad, Add, Gather,
        Tile, Expand, Identity, Dropout, Clip, Cast, a reduction or a chain of these.
        """
        pools: dict[str, str] = {}
        for node in self.proto.graph.node:
            kernel = next((list(value.ints) for value in node.attribute if value.name == "kernel_shape"), [])
            if node.op_type in ("MaxPool", "AveragePool") and len(kernel) > 1:
                pools[node.output[0]] = pools.get(node.input[0], node.input[0])
        return pools

    @cached_property
    def least_thresholds(self) -> Mapping[str, float]:
        """The tensors that must not be clipped: see `fastcal.ranges.least_thresholds`."""
        return least_thresholds(self.proto.graph)

    def replaced(self, proto: onnx.ModelProto) -> "Model":
        """Return a model of this path with another graph; its digest is that of the file that `onnx.save` writes.

        Args:
            proto: The model's content, with all its weights.
        """
        variant = self.variant(proto)
        variant.__dict__["digest"] = hashlib.sha256(proto.SerializeToString()).hexdigest()
        return variant

    @property
    def external_files(self) -> list[Path]:
        """The paths of the files with external data."""
        return self.external.files

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the contents of the file and of its external data, however large; a copy has the same.

        Raises:
            ModelError: A file with external data is missing.
        """
        return hashlib.sha256(self.path.read_bytes() + self.external.digest).hexdigest()

    @property
    def batch_size(self) -> int | None:
        """The batch size that the model fixes; None if the batch is dynamic or the inputs disagree."""
        sizes = {value.shape[0] for value in self.inputs if value.shape}
        return sizes.pop() if len(sizes) == 1 else None


def _dtype(kind: int) -> np.dtype[Any] | None:
    """Return the NumPy type of one of `onnx.TensorProto.DataType`; None if there is no such type."""
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(kind)
    except KeyError:
        return None


def node_label(node: onnx.NodeProto) -> str:
    """Return a node's name, or the name of its first output if the node has no name."""
    return str(node.name or next(iter(node.output), ""))
