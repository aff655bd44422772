"""What has to be known of an ONNX model: its inputs, its activations, and which tensors TensorRT gives one scale."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fastcal.errors import FastcalError, quoted
from fastcal.feed.device import type_of

#: The element types that count as float.
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

#: The names of the domain of ONNX's own operators.
_STANDARD = ("", "ai.onnx")

#: From so many elements on a constant is no shape, and its values are not looked at.
_LARGE = 1024


@dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes:
        name: Its name in the graph.
        shape: Its dimensions; None stands for one that is dynamic.
        dtype: Its element type.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name!r} {format_shape(self.shape)}"


def format_shape(shape: tuple[int | None, ...]) -> str:
    """A shape as an error text shows it, e.g. (?, 3, 224, 224) with a question mark for a dynamic dimension."""
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


class Model:
    """An ONNX file, read without its external data.

    Args:
        path: The file.

    Raises:
        FastcalError: There is no such file, or it is not an ONNX model, or a node lacks an input or output.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise FastcalError(f"the model is a {type(path).__name__}; name an ONNX file (onnx.save writes one)")
        self.path = Path(path)
        try:
            self.proto = onnx.load(self.path, load_external_data=False)
        except OSError as error:
            raise FastcalError(f"cannot read model {path}: {error.strerror}; check the path") from error
        except Exception as error:  # of protobuf, or of the parser of one of ONNX's text forms
            raise FastcalError(f"{path} is not an ONNX model; export the network to ONNX first") from error
        if not self.proto.graph.node:
            raise FastcalError(f"{path} is not an ONNX model, or one without a layer; export the network to ONNX first")
        self._check_nodes()

    @classmethod
    def of(cls, model: "str | os.PathLike[str] | Model") -> "Model":
        """The model itself, or the one in a file."""
        return model if isinstance(model, Model) else cls(model)

    def _check_nodes(self) -> None:
        """Fail if a node has fewer inputs or outputs than its operator: what reads the graph relies on them."""
        for node in self.proto.graph.node:
            if node.domain not in _STANDARD:
                continue
            try:
                schema = onnx.defs.get_schema(node.op_type, self.opset, "")
            except onnx.defs.SchemaError:  # what runs the model may know it
                continue
            for what, names, least in (
                ("inputs", node.input, schema.min_input),
                ("outputs", node.output, schema.min_output),
            ):
                if len(names) < least:
                    label = node.name or next(iter(node.output), "")
                    raise FastcalError(
                        f"{self.path} is no valid ONNX model: node {label!r} has {len(names)} of at least {least} "
                        f"{what} of {node.op_type}; export it again"
                    )

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 0 where it is not said."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in _STANDARD), 0)

    @property
    def has_pairs(self) -> bool:
        """Whether it is quantized already: it has Q/DQ pairs, or halves of them."""
        return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in self.proto.graph.node)

    @cached_property
    def inputs(self) -> tuple[ModelInput, ...]:
        """The inputs that a batch must give, in the graph's order.

        Raises:
            FastcalError: There is none, or one that is no tensor, or whose number of dimensions is not known.
        """
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        constants |= {tensor.values.name for tensor in self.proto.graph.sparse_initializer}
        values = [value for value in self.proto.graph.input if value.name not in constants]
        if not values:
            raise FastcalError(f"{self.path} has no inputs: what it computes is constant, and needs no calibration")
        return tuple(map(self._input, values))

    def _input(self, value: onnx.ValueInfoProto) -> ModelInput:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            what = "is no tensor" if not value.type.HasField("tensor_type") else "has no shape"
            raise FastcalError(
                f"{self.path}: input {value.name!r} {what}; export the network with tensors of known rank"
            )
        shape = tuple(size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim)
        return ModelInput(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))

    @cached_property
    def activations(self) -> tuple[str, ...]:
        """Names of the tensors that the graph's nodes compute, in its order, whatever their type.

        Constants are not among them: which names they get is the business of TensorRT's parser.
        """
        return tuple(
            name for node in self.proto.graph.node if node.op_type != "Constant" for name in node.output if name
        )

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors of the graph: inputs, constants, and what its nodes give."""
        graph = self.proto.graph
        values = [*graph.input, *graph.initializer, *(tensor.values for tensor in graph.sparse_initializer)]
        return frozenset(
            {value.name for value in values} | {name for node in graph.node for name in node.output if name}
        )

    @cached_property
    def calibrated(self) -> tuple[str, ...]:
        """Names of the tensors that a calibration picks scales for: of float type, and not the same for every input.

        In the graph's order, its inputs first. What has no type that ONNX can infer is not among them.

        Raises:
            FastcalError: As `types`.
        """
        floats = {name for name, kind in self.types.items() if kind in FLOATS}
        varying = dict.fromkeys(value.name for value in self.inputs)
        for node in self.proto.graph.node:
            # A node of a subgraph reads from outside what is not among its inputs.
            if not varying.keys().isdisjoint(node.input) or any(value.HasField("g") for value in node.attribute):
                varying |= dict.fromkeys(name for name in node.output if name)
        return tuple(name for name in varying if name in floats)

    @cached_property
    def types(self) -> Mapping[str, int]:
        """The element types of the tensors, as far as ONNX can infer them: numbers of `onnx.TensorProto.DataType`.

        Raises:
            FastcalError: ONNX cannot make sense of the graph.
        """
        try:
            inferred = self._infer({})
        except onnx.shape_inference.InferenceError as error:
            text = " ".join(str(error).split())
            raise FastcalError(f"{self.path} is no valid ONNX model: {text}; export it again") from error
        known = [*inferred.input, *inferred.value_info, *inferred.output]
        return {value.name: value.type.tensor_type.elem_type for value in known}

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The bytes of the tensors that the graph's nodes compute, by name, as far as ONNX can infer their shapes.

        Args:
            shapes: Those of the inputs, by name.
        """
        try:
            inferred = self._infer(shapes)
        except onnx.shape_inference.InferenceError:  # what runs the model says what is wrong with it
            return {}
        sizes = {}
        for value in (*inferred.value_info, *inferred.output):
            tensor = value.type.tensor_type
            is_known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
            if tensor.elem_type and is_known:
                itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
                sizes[value.name] = itemsize * math.prod(dim.dim_value for dim in tensor.shape.dim)
        return sizes

    def _infer(self, shapes: Mapping[str, tuple[int, ...]]) -> onnx.GraphProto:
        """The graph with the types and shapes that ONNX infers for inputs of these shapes, and without large constants.

        ONNX reads none but shapes and the like from constants, and hundreds of megabytes take their time.
        """
        proto = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        proto.functions.extend(self.proto.functions)
        for field, value in self.proto.graph.ListFields():
            if field.name != "initializer":
                proto.graph.MergeFrom(onnx.GraphProto(**{field.name: value}))
        for tensor in self.proto.graph.initializer:
            if math.prod(tensor.dims) > _LARGE:
                tensor = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            proto.graph.initializer.append(tensor)
        for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:  # dynamic, which ONNX takes for the size
                    dim.Clear()
        for value in proto.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
                dim.dim_value = size
        return onnx.shape_inference.infer_shapes(proto, data_prop=bool(shapes)).graph

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """Tensors that take another tensor's scale, by name, each with the tensor it takes it from.

        TensorRT 8.6.0 gives the output of a pooling layer its input's scale, and every other tensor its own. Seen in
        the caches it wrote for 118 small networks: MaxPool and AveragePool over two or three dimensions share, one
        after another too; over one dimension, where TensorRT's parser puts reshapes around the pooling, they do not.
        Nor do GlobalAveragePool, GlobalMaxPool, LpPool, Concat, Slice, Split, Reshape, Transpose, Flatten, Squeeze,
        Resize, Pad, Add, Gather, Tile, Expand, Identity, Dropout, Clip, Cast, the reductions or the chains of these.
        """
        pools: dict[str, str] = {}
        for node in self.proto.graph.node:
            kernel = next((list(value.ints) for value in node.attribute if value.name == "kernel_shape"), [])
            if node.op_type in ("MaxPool", "AveragePool") and len(kernel) > 1:
                pools[node.output[0]] = pools.get(node.input[0], node.input[0])
        return pools

    @property
    def external_files(self) -> list[Path]:
        """The files of external data."""
        return [self.path.parent / name for name in self._external]

    @property
    def _external(self) -> list[str]:
        entries = (entry for tensor in self.proto.graph.initializer for entry in tensor.external_data)
        return sorted({entry.value for entry in entries if entry.key == "location"})

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file, and of the size and time of each file of external data.

        Raises:
            FastcalError: A file of external data is missing.
        """
        digest = hashlib.sha256(self.path.read_bytes())
        for name in self._external:
            try:
                status = (self.path.parent / name).stat()
            except OSError as error:
                raise FastcalError(
                    f"cannot load {self.path}: its external data {name}: {error.strerror}; keep it beside the model"
                ) from error
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    @property
    def batch_size(self) -> int | None:
        """The batch size that the model fixes; None where it is dynamic."""
        sizes = {value.shape[0] for value in self.inputs if value.shape}
        return sizes.pop() if len(sizes) == 1 else None


def fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array of a shape is what is wanted; None stands for any size."""
    return len(shape) == len(wanted) and all(want in (None, have) for want, have in zip(wanted, shape, strict=True))


def match_batch(inputs: Sequence[ModelInput], label: str, batch: Mapping[str, Any], anonymous: bool) -> dict[str, Any]:
    """A batch's arrays by a network's input names, once names, shapes and types are seen to fit.

    Args:
        inputs: What the network takes.
        label: What errors call the network.
        batch: Arrays by input name.
        anonymous: Whether the batch's one array was given no name and so goes to the network's one input.

    Raises:
        FastcalError: An input is missing, unknown, of another shape, or of a type that cannot be converted; both sides
            are shown.
    """
    arrays = match_names([value.name for value in inputs], label, batch, anonymous)
    for value in inputs:
        _check_shape(value, label, tuple(arrays[value.name].shape))
        dtype = type_of(arrays[value.name])
        if not np.can_cast(dtype, value.dtype, "same_kind"):  # a float to an integer would be cut off
            raise FastcalError(f"{label} takes input {value.name!r} as {value.dtype}, the batches are {dtype}; convert "
                               "them")  # fmt: skip
        if not hasattr(arrays[value.name], "__cuda_array_interface__"):
            check_values(arrays[value.name], value, label)
    return arrays


def check_values(array: Any, value: ModelInput, label: str) -> None:
    """Raise FastcalError if an array, NumPy's or CuPy's, has values that its input's type cannot hold."""
    array = array if hasattr(array, "__cuda_array_interface__") else np.asarray(array)
    if np.can_cast(array.dtype, value.dtype, "safe"):
        return
    with np.errstate(over="ignore"):
        held = array.astype(value.dtype)
    beyond = held != array if value.dtype.kind in "iu" else np.isinf(held) & np.isfinite(array)
    if beyond.any():
        raise FastcalError(
            f"{label} takes input {value.name!r} as {value.dtype}, which cannot hold {array[beyond][0]}; give "
            "values that fit"
        )


def match_names(names: Sequence[str], label: str, batch: Mapping[str, Any], anonymous: bool) -> dict[str, Any]:
    """A batch's arrays by a network's input names, in their order.

    Args:
        names: The network's inputs.
        label: What errors call the network.
        batch: Arrays by input name.
        anonymous: Whether the batch's one array was given no name and so goes to the network's one input.

    Raises:
        FastcalError: An input is missing or unknown; both sides are shown.
    """
    if anonymous and len(names) == len(batch) == 1:
        return {names[0]: next(iter(batch.values()))}
    if set(names) != set(batch):
        remedy = "name the batches' arrays after the inputs"
        if set(batch) < set(names):
            remedy = f"give {quoted(name for name in names if name not in batch)} too"
        raise FastcalError(
            f"{label} takes the inputs {quoted(names)}, the batches have {quoted(batch) or 'none'}; {remedy}"
        )
    return {name: batch[name] for name in names}


def _check_shape(value: ModelInput, label: str, shape: tuple[int, ...]) -> None:
    differ = [
        axis
        for axis, (want, have) in enumerate(zip(value.shape, shape, strict=False))
        if want is not None and want != have
    ]
    if len(value.shape) == len(shape) and not differ:
        return
    if len(value.shape) != len(shape):
        remedy = f"give arrays of {len(value.shape)} dimensions"
    elif differ == [0]:
        remedy = f"use batch size {value.shape[0]}"
    else:
        remedy = "choose the preprocessing (size, layout, channels) that the network was trained with"
    raise FastcalError(f"{label} takes input {value}, the batches are {format_shape(shape)}; {remedy}")
