"""What has to be known of an ONNX model: its inputs, its activations, and which tensors TensorRT gives one scale."""

import hashlib
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import onnx

from fastcal.batch import Input
from fastcal.errors import ModelError

#: The element types that count as float.
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

#: The names of the domain of ONNX's own operators.
_STANDARD = ("", "ai.onnx")

#: From so many elements on a constant is no shape, and its values are not looked at.
_LARGE = 1024


class Model:
    """An ONNX file, read without its external data.

    Args:
        path: The file.

    Raises:
        ModelError: There is no such file, or it is not an ONNX model, or a node lacks an input or output.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise ModelError(f"the model is a {type(path).__name__}; name an ONNX file (onnx.save writes one)")
        self.path = Path(path)
        try:
            self.proto = onnx.load(self.path, load_external_data=False)
        except OSError as error:
            raise ModelError(f"cannot read model {path}: {error.strerror}; check the path") from error
        except Exception as error:  # of protobuf, or of the parser of one of ONNX's text forms
            raise ModelError(f"{path} is not an ONNX model; export the network to ONNX first") from error
        if not self.proto.graph.node:
            raise ModelError(f"{path} is not an ONNX model, or one without a layer; export the network to ONNX first")
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
                    raise ModelError(
                        f"{self.path} is no valid ONNX model: node {label!r} has {len(names)} of at least {least} "
                        f"{what} of {node.op_type}; export it again"
                    )

    @property
    def label(self) -> str:
        """The model's name in texts: its path."""
        return str(self.path)

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs that a batch must give, in the graph's order.

        Raises:
            ModelError: As `inputs`.
        """
        return [value.name for value in self.inputs]

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 0 where it is not said."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in _STANDARD), 0)

    @property
    def has_pairs(self) -> bool:
        """Whether it is quantized already: it has Q/DQ pairs, or halves of them."""
        return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in self.proto.graph.node)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that a batch must give, in the graph's order.

        Raises:
            ModelError: There is none, or one that is no tensor, or whose number of dimensions is not known.
        """
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        constants |= {tensor.values.name for tensor in self.proto.graph.sparse_initializer}
        values = [value for value in self.proto.graph.input if value.name not in constants]
        if not values:
            raise ModelError(f"{self.path} has no inputs: what it computes is constant, and needs no calibration")
        return tuple(map(self._input, values))

    def _input(self, value: onnx.ValueInfoProto) -> Input:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            what = "is no tensor" if not value.type.HasField("tensor_type") else "has no shape"
            raise ModelError(f"{self.path}: input {value.name!r} {what}; export the network with tensors of known rank")
        shape = tuple(size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim)
        return Input(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))

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
            ModelError: As `types`.
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
            ModelError: ONNX cannot make sense of the graph.
        """
        try:
            inferred = self._infer({})
        except onnx.shape_inference.InferenceError as error:
            text = " ".join(str(error).split())
            raise ModelError(f"{self.path} is no valid ONNX model: {text}; export it again") from error
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
    def shared_scales(self) -> Mapping[str, str]:
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
            ModelError: A file of external data is missing.
        """
        digest = hashlib.sha256(self.path.read_bytes())
        for name in self._external:
            try:
                status = (self.path.parent / name).stat()
            except OSError as error:
                raise ModelError(
                    f"cannot load {self.path}: its external data {name}: {error.strerror}; keep it beside the model"
                ) from error
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    @property
    def batch_size(self) -> int | None:
        """The batch size that the model fixes; None where it is dynamic."""
        sizes = {value.shape[0] for value in self.inputs if value.shape}
        return sizes.pop() if len(sizes) == 1 else None
