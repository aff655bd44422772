"""`widened`: a float16 model in float32, in which layers can get pairs as in any other."""

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fastcal.external import ExternalData, tensors_in
from fastcal.graph import graphs_within

#: The attributes that name the type of an output.
_TYPES = ("to", "dtype")

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def is_half(proto: onnx.ModelProto) -> bool:
    """Return True if more of a model's stored values are float16 than float32."""
    sizes: dict[int, int] = dict.fromkeys(_FLOATS, 0)
    for tensor in tensors_in(proto.graph):
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims)
    return sizes[TensorProto.FLOAT16] > sizes[TensorProto.FLOAT]


def widened(proto: onnx.ModelProto, external: ExternalData, types: Mapping[str, int]) -> onnx.ModelProto:
    """Return a copy of a model in which all that is float16 is float32; names and values stay.

    A Cast from one of these types to the other becomes an Identity; `types` are the tensors' types.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for tensor in tensors_in(wide.graph):
        if tensor.data_type == TensorProto.FLOAT16:
            values = external.array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for graph in (wide.graph, *graphs_within(wide.graph.node)):
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            target = next((value.i for value in node.attribute if value.name == "to"), None)
            if node.op_type == "Cast" and types.get(node.input[0]) in _FLOATS and target in _FLOATS:
                node.op_type = "Identity"
                node.ClearField("attribute")
            for attribute in node.attribute:
                if attribute.name in _TYPES and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
    return wide


def half_ends(proto: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the inputs and outputs of a model that are float16."""
    values = (*proto.graph.input, *proto.graph.output)
    return frozenset(value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16)
