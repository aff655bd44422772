"""`contents_of`: the layers of an engine by the type that they run in, as TensorRT's engine inspector tells."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

#: The beginning of a layer in the builder's log, and the type of a tensor there.
_LINE = re.compile(r"Name: .*?, LayerType: (\w+), ")
_DATATYPE = re.compile(r"Datatype: (\w+)")

#: The type of kernels that compute each element by itself, or only move values.
_POINTWISE = ("kgen",)


@dataclass(frozen=True)
class _Layer:
    """A layer of an engine: TensorRT's word for its `operator`, the type that it reads, and the ONNX nodes in it."""

    operator: str
    kind: str
    nodes: frozenset[str]


@dataclass(frozen=True)
class Contents:
    """The layers of an engine.

    Attributes:
        layers: The number of layers by the type that they read: "INT8", "FP16", "BF16", "FP32" or "other".
        weighted: The types in which the model's layers run that multiply by weights, as far as the engine names them.
    """

    layers: Mapping[str, int]
    weighted: Mapping[str, str]

    @property
    def not_int8(self) -> dict[str, str]:
        """Those of `weighted` that do not run in INT8."""
        return {name: kind for name, kind in self.weighted.items() if kind != "INT8"}


def contents_of(library: Any, engine: bytes, model: Model) -> Contents | None:
    """Return the layers of the engine that was built last; None if they are not known here.

    TensorRT for RTX logs the layers as it builds an engine; else the engine is loaded, which needs a GPU. It must have
    been built with detailed profiling verbosity.
    """
    logger = logger_of(library)
    if logger.layers:
        return _contents(_logged(logger.layers), model)
    loaded = library.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    inspector, context = loaded.create_engine_inspector(), loaded.create_execution_context()
    set_best_shapes(library, loaded, context)
    inspector.execution_context = context  # without its shapes the inspector knows no formats
    return read_contents(inspector.get_engine_information(library.LayerInformationFormat.JSON), model)


def set_best_shapes(library: Any, engine: Any, context: Any) -> list[str]:
    """Give dynamic inputs the shapes that an engine is tuned for; return the names of all inputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT]
    for name in inputs:
        if -1 in tuple(engine.get_tensor_shape(name)):
            context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
    return inputs


def read_contents(information: str, model: Model) -> Contents:
    """Return the layers that the JSON text of an engine inspector names."""
    layers = json.loads(information, strict=False)["Layers"]  # TensorRT's own JSON has control characters
    return _contents(map(_inspected, (layer for layer in layers if isinstance(layer, dict))), model)


def _contents(layers: Iterable[_Layer], model: Model) -> Contents:
    nodes = [node for node in model.proto.graph.node if node.op_type in WEIGHTED]
    labels = {node.name or f"node_of_{node.output[0]}": node_label(node) for node in nodes}
    counts: Counter[str] = Counter()
    products: dict[str, set[str]] = {}
    others: dict[str, set[str]] = {}
    for layer in layers:
        if layer.operator.startswith(_MOVES):
            continue
        counts[layer.kind] += 1
        # A kernel that computes each element by itself casts or scales for a layer, and seldom computes it.
        found = others if layer.operator in _POINTWISE else products
        for name in labels.keys() & layer.nodes:
            found.setdefault(labels[name], set()).add(layer.kind)
    weighted = {name: "INT8" if "INT8" in kinds else min(kinds) for name, kinds in (others | products).items()}
    return Contents(dict(counts), weighted)


def _inspected(layer: Mapping[str, Any]) -> _Layer:
    """Return a layer of the inspector's JSON."""
    ends = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    formats = [str(end.get("Datatype", end.get("Format/Datatype", ""))) for end in ends]
    # TensorRT 8.6 tells no formats of dynamic shapes; the type of a layer's weights stands for them.
    weights = [layer[key].get("Type", "") for key in ("Weights", "ConvWeights") if key in layer]
    kinds = [kind for text in (*formats[:1], *weights) if (kind := _kind(text)) != "other"]
    nodes = _BETWEEN.split(f"{layer.get('Name', '')}||{layer.get('Metadata', '')}")
    return _Layer(str(layer.get("LayerType", "")), next(iter(kinds), "other"), frozenset(nodes))


def _logged(text: str) -> Iterator[_Layer]:
    """Yield the layers of a message of the builder's log."""
    for line in text.splitlines():
        if found := _LINE.match(line):
            nodes = _BETWEEN.split(line.rpartition("Metadata: ")[2])
            yield _Layer(found[1], _kind(next(iter(_DATATYPE.findall(line)), "")), frozenset(nodes))


def _kind(text: str) -> str:
    return next((kind for part, kind in _TYPES if part in text.lower()), "other")
