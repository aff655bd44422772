"""`quantize`: a model that holds its INT8 scales itself, in QuantizeLinear and DequantizeLinear (Q/DQ) pairs.

From 11.0 on TensorRT has no calibration: it runs in INT8 the layers that a model marks with such pairs.
"""

import difflib
import fnmatch
import logging
import operator
import os
from collections.abc import Iterable, Sequence

import numpy as np
import onnx

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import record_path
from fastcal.errors import CacheError, FastcalError, ModelError, first_few
from fastcal.graph import nodes_within
from fastcal.half import BF16, FP16, HalfType
from fastcal.model import Model, node_label
from fastcal.qdq_graph import Graph, modern
from fastcal.qdq_placement import PAIRED, WEIGHTED, Placement
from fastcal.tuning.layers import depthwise_in
from fastcal.tuning.tuned import Tuning
from fastcal.typed import narrow
from fastcal.widen import half_ends, is_half

__all__ = ["WEIGHTED", "add_pairs", "check_quantizable", "count_quantized", "load_for", "quantize"]

#: `WEIGHTED` for a message.
_LAYERS = ", ".join(WEIGHTED[:-1]) + f" or {WEIGHTED[-1]}"

_log = logging.getLogger("fastcal")


def quantize(
    model: str | os.PathLike[str] | Model,
    cache: CalibrationCache | Tuning | str | os.PathLike[str],
    *,
    exclude: Iterable[str] = (),
    depthwise: bool = True,
    int8_weights: bool = False,
    fp16: bool = False,
    bf16: bool = False,
) -> onnx.ModelProto:
    """Return a copy of a model with Q/DQ pairs that hold the scales of a calibration cache or of a tuning.

    The pairs are where TensorRT's documentation recommends them ("Explicit Quantization"):

    - Every activation that a Conv, ConvTranspose, Gemm or MatMul reads has a pair with the cache's scale, unchanged.
      The weights have a pair with one scale per output channel, amax / 127; a MatMul's weights of more than two
      dimensions have one scale. INT8 is symmetric, every zero point is 0. The weights themselves stay float32, unless
      `int8_weights` or `fp16`; biases stay float32 without a pair.
    - There is no pair between layers that TensorRT fuses: convolution, BatchNormalization, Relu, and the Add of a
      residual connection. Such an Add has a pair on its other input, so that the convolution can write INT8.
    - An average pooling has a pair on its input if its output is quantized too. MaxPool, Concat and the layers that
      only change the shape need no pair: TensorRT moves the next pair through them.
    - If several scales would round a tensor, that of a convolution and that of a Concat for instance, all its readers
      have one pair with the tensor's own scale, and parts of it take over that scale.

    With `depthwise=False`, depthwise convolutions stay in float, which makes an engine of TensorRT for RTX smaller.
    TensorRT 8.6 becomes slower, since it converts every tensor between them and their neighbours. With a tuning, the
    layers that it leaves in float have no pairs, and the biases that it corrects are corrected.

    Weights may be any constant: an expression that depends on no input, such as a Cast or the DequantizeLinear of
    stored INT8, is computed and stored. Local functions are inlined. A float16 model stays one, with pairs of FP16. A
    layer stays in float if the cache has no scale for the layer's input, or the scale 0, if the layer's weights depend
    on the inputs or are of another type than the model's, or if the layer lies in an If, a Loop or a Scan. The log
    names these layers.

    Args:
        model: The ONNX file.
        cache: The cache, or a `Tuning`, or the file of either. If it has a record, the record must be of the same
            model.
        exclude: The layers to keep in float: by their names, by types like "Gemm" ("Add" keeps the residual connections
            in float), or by a tensor that they read. Patterns like "/model.22/*" stand for all that fit.
        depthwise: Whether depthwise convolutions are in INT8.
        int8_weights: Whether to store the weights that would have a pair as INT8, a quarter of their size, with a
            DequantizeLinear alone. The outputs stay the same.
        fp16: Whether the layers between the pairs run in FP16, as a model for TensorRT 11 must say itself. Weights,
            biases and scales have that type too, with Casts where FP32 begins; inputs and outputs keep their types.
            Layers stay in FP32 if one of their tensors could overflow, by the largest values that the calibration saw,
            or if they sum many values or compute with positions: the log names them. The opset is at least 19.
        bf16: The same in BF16, with opset 22 or later. ONNX Runtime does not run such a model on the CPU.

    Returns:
        The new model with all its weights, external ones included.

    Raises:
        ModelError: The model cannot be loaded, has Q/DQ pairs already, has too low an opset and cannot be converted, or
            has no layer to quantize.
        CacheError: The cache cannot be read, or belongs to another model.
        FastcalError: A layer to exclude is not in the model, or both fp16 and bf16 are asked for.
    """
    model = Model.of(model)
    half = half_type(fp16, bf16, model)
    quantized = add_pairs(model, cache, exclude, depthwise=depthwise, int8_weights=int8_weights, half=half)
    model.external.load(quantized.graph)
    return quantized


def add_pairs(
    model: Model,
    cache: CalibrationCache | Tuning | str | os.PathLike[str],
    exclude: Iterable[str] = (),
    *,
    depthwise: bool = True,
    int8_weights: bool = False,
    half: HalfType | None = None,
    placing: type[Placement] = Placement,
) -> onnx.ModelProto:
    """Return the model of `quantize`, whose external data stays where the model has it; errors as there.

    `half` is the type of the layers between the pairs, by default FP32; `placing` places the pairs.
    """
    tuning = load_for(model, cache)
    scales = tuning.cache.scales
    half = half or half_type(False, False, model)
    ends = half_ends(model.proto)
    model = modern(model, half)
    excluded = check_quantizable(model, exclude)
    graph = Graph(model)
    excluded |= _tuned(graph, tuning)
    if tuning.in_float is None and not depthwise:
        excluded |= depthwise_in(graph)
    placement = placing(graph, scales, excluded)
    in_float = first_few([f"{name} ({reason})" for name, reason in (placement.in_float | _within(model)).items()])
    if not placement.axes:
        if all(number in excluded for number, node in enumerate(graph.nodes) if node.op_type in WEIGHTED):
            raise ModelError(f"{model.label} has no layer left to quantize: all of them are excluded; exclude fewer")
        raise ModelError(
            f"{model.label} has no layer to quantize{in_float and ': ' + in_float}; fastcal quantizes a {_LAYERS} with "
            "float32 inputs and weights, and a scale above 0 in the cache"
        )
    if in_float:
        _log.warning("layers that stay in float: %s", in_float)
    _correct(graph, tuning)
    graph.insert_pairs(placement.axes, placement.resolved(scales), int8_weights=int8_weights, half=half)
    return graph.proto if half is None else narrow(model.variant(graph.proto), half, largest_values(tuning.cache), ends)


def correct_biases(model: Model, tuning: Tuning) -> onnx.ModelProto:
    """Return a model with the corrected biases of a tuning, and without pairs; errors as `quantize`."""
    graph = Graph(modern(model))
    _tuned(graph, tuning)
    _correct(graph, tuning)
    return graph.proto


def _correct(graph: Graph, tuning: Tuning) -> None:
    for name, correction in tuning.bias.items():
        graph.correct_bias(graph.producers[name], np.asarray(correction, np.float32))


def half_type(fp16: bool, bf16: bool, model: Model | None = None) -> HalfType | None:
    """Return the type of 16 bits that the layers between the pairs run in; None for FP32.

    A float16 `model` stays one.
    """
    if fp16 and bf16:
        raise FastcalError("both fp16 and bf16 are asked for; choose one")
    if model is not None and is_half(model.proto):
        if bf16:
            raise FastcalError(f"{model.label} is float16; leave out bf16, or export the network in float32")
        return FP16
    return FP16 if fp16 else BF16 if bf16 else None


def largest_values(cache: CalibrationCache) -> dict[str, float]:
    """Return the largest |x| of tensors: as it was observed, else what their scales stand for."""
    largest = {name: 127 * scale for name, scale in cache.scales.items()}
    if cache.observed is not None:
        largest |= {name: histogram.amax for name, histogram in cache.observed.histograms.items()}
    return largest


def _tuned(graph: Graph, tuning: Tuning) -> set[int]:
    """Return the numbers of the layers that a tuning leaves in float, after checking its names."""
    in_float = tuning.in_float or ()
    names = [*in_float, *tuning.bias]
    if unknown := [name for name in names if name not in graph.producers]:
        raise CacheError(f"the tuning has layers that {graph.model.label} lacks: {first_few(unknown)}; tune this model")
    for name, correction in tuning.bias.items():
        number = graph.producers[name]
        if graph.bias_of(number) is None:
            raise CacheError(f"the tuning corrects the bias of {name}, which has none; tune this model")
        if len(correction) != (channels := graph.output_channels(number)):
            raise CacheError(
                f"the tuning has {len(correction)} corrections for {name}, which has {channels} channels; tune this "
                "model"
            )
    return {graph.producers[name] for name in in_float}


def count_quantized(model: onnx.ModelProto) -> tuple[int, int]:
    """Return the number of layers of the types `WEIGHTED` that are in INT8, and the number of all such layers.

    Layers in the branches of an If or the body of a Loop or a Scan count too.
    """
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in (*model.graph.node, *nodes_within(model.graph.node)) if node.op_type in WEIGHTED]
    return sum(set(node.input[:2]) <= dequantized for node in layers), len(layers)


def check_quantizable(model: Model, exclude: Iterable[str] = (), half: HalfType | None = None) -> set[int]:
    """Return the numbers of the nodes to exclude, in the graph's order, if `quantize` accepts the model."""
    model = modern(model, half)
    if model.has_pairs:
        raise ModelError(
            f"{model.label} has QuantizeLinear or DequantizeLinear already; quantize the float model that it was made "
            "from"
        )
    nodes = model.proto.graph.node
    if not any(node.op_type in WEIGHTED for node in nodes):
        within = first_few([f"{name} ({reason})" for name, reason in _within(model).items()])
        raise ModelError(f"{model.label} has no layer to quantize: {within or f'no node is a {_LAYERS}'}")
    if isinstance(exclude, str):
        raise FastcalError(f"exclude is {exclude!r}; give a list of names or types")
    numbers: set[int] = set()
    for name in exclude:
        found = _named(name, nodes)
        if not found and name not in _within(model):
            raise FastcalError(
                f"{model.label} has no layer, type or tensor {name!r} to exclude; similar: {_similar(name, model)}"
            )
        numbers |= found
    return numbers


def _named(name: str, nodes: Sequence[onnx.NodeProto]) -> set[int]:
    """Return the numbers of the layers that a name or a pattern stands for, if they are to stay in float.

    They are the layers or types of that name; else the layers that read the tensor of that name, or compute it if no
    layer reads it. Exact names come before patterns. A layer that no pair belongs to has the name of its tensor.
    """
    for fits in (operator.eq, fnmatch.fnmatchcase):
        layers, readers, sources = (
            {number for number, node in enumerate(nodes) if any(fits(text, name) for text in names(node))}
            for names in (
                lambda node: (node_label(node), node.op_type),
                lambda node: node.input,
                lambda node: node.output,
            )
        )
        if any(nodes[number].op_type in PAIRED for number in layers):
            return layers
        if found := readers or layers or sources:
            return found
    return set()


def load_for(model: Model, cache: CalibrationCache | Tuning | str | os.PathLike[str]) -> Tuning:
    """Return a tuning, or a cache as one, perhaps from a file, after checking that its record is of the model."""
    loaded = Tuning.of(cache)
    if isinstance(cache, CalibrationCache | Tuning):
        label, remedy = "the cache", "calibrate this one"
    else:
        label = str(cache)
        remedy = f"calibrate this one, or remove {record_path(cache)} if both are the same network"
    record = loaded.cache.record
    made_from = record.entries.get("model") if record else None
    if made_from is not None and made_from != model.digest:
        raise CacheError(f"{label} was calibrated with another model than {model.label}, by its record; {remedy}")
    return loaded


def _within(model: Model) -> dict[str, str]:
    """Return the layers in subgraphs, with the reason why they stay in float."""
    layers = (node for node in nodes_within(model.proto.graph.node) if node.op_type in WEIGHTED)
    return {node_label(node): "it lies in an If, a Loop or a Scan" for node in layers}


def _similar(name: str, model: Model) -> str:
    nodes = model.proto.graph.node
    tensors = {name for node in nodes for name in (*node.input, *node.output) if name}
    known = sorted(tensors | {node_label(node) for node in nodes} | {node.op_type for node in nodes})
    return ", ".join(difflib.get_close_matches(name, known, 3, 0.5) or [kind for kind in WEIGHTED if kind in known])
