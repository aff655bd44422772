"""`contents_of`: the layers of an engine by the type that they run in, as TensorRT's engine inspector tells."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcal.library import logger_of
from fastcal.model import Model, node_label
from fastcal.qdq_placement import WEIGHTED

#: Parts of the inspector's names of formats, with the types that they stand for; the first that fits.
_TYPES = (
    ("int8", "INT8"), ("bf16", "BF16"), ("bfloat", "BF16"), ("fp16", "FP16"), ("half", "FP16"), ("fp32", "FP32"),
    ("float", "FP32"),
)  # fmt: skip

#: The layers that only move values.
_MOVES = ("Reformat", "NoOp", "Constant", "ShapeHostToDevice", "signal", "wait")

#: What separates the names of ONNX nodes in the name of a layer, or in its metadata.
_BETWEEN = re.compile(r" \+ |\|\||[\x1e\x1f]|\[ONNX Layer: |\]|, ")


@dataclass(frozen=True)
class Contents:
    """The layers of an engine.

    Attributes:
        layers: The number of layers by the type that they read: "INT8", "FP16", "BF16", "FP32" or "other".
        not_int8: The model's layers that multiply by weights and do not run in INT8, with their types.
    """

    layers: Mapping[str, int]
    not_int8: Mapping[str, str]


def contents_of(library: Any, engine: bytes, model: Model) -> Contents | None:
    """Return the layers of a serialized engine; None if it cannot be loaded here, for instance without a GPU.

    The engine must have been built with detailed profiling verbosity.
    """
    loaded = library.Runtime(logger_of(library)).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    inspector = loaded.create_engine_inspector()
    # The inspector tells the formats of dynamic shapes for a context alone.
    inspector.execution_context = context = loaded.create_execution_context()
    for index in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(index)
        if loaded.get_tensor_mode(name) == library.TensorIOMode.INPUT and -1 in tuple(loaded.get_tensor_shape(name)):
            context.set_input_shape(name, loaded.get_tensor_profile_shape(name, 0)[1])
    return read_contents(inspector.get_engine_information(library.LayerInformationFormat.JSON), model)


def read_contents(information: str, model: Model) -> Contents:
    """Return the layers that the JSON text of an engine inspector names."""
    layers = json.loads(information, strict=False)["Layers"]  # TensorRT's own JSON has control characters
    nodes = [node for node in model.proto.graph.node if node.op_type in WEIGHTED]
    labels = {node.name or f"node_of_{node.output[0]}": node_label(node) for node in nodes}
    counts: Counter[str] = Counter()
    found: dict[str, str] = {}
    for layer in layers:
        if isinstance(layer, str) or layer.get("LayerType", "").startswith(_MOVES):  # a text without details
            continue
        kind = _type_of(layer)
        counts[kind] += 1
        parts = _BETWEEN.split(f"{layer.get('Name', '')}||{layer.get('Metadata', '')}")
        found |= {labels[name]: kind for name in parts if name in labels}
    return Contents(dict(counts), {name: kind for name, kind in found.items() if kind != "INT8"})


def _type_of(layer: Mapping[str, Any]) -> str:
    """Return the type of the first tensor that a layer reads, or computes if it reads none."""
    ends = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    text = str(ends[0].get("Format/Datatype", "")).lower() if ends else ""
    return next((kind for part, kind in _TYPES if part in text), "other")
