"""`for_dla`: a calibration cache as NVIDIA's Deep Learning Accelerator (DLA) needs it, with TensorRT up to 10.

The rules are NVIDIA's: the page "DLA Supported Layers and Restrictions" of TensorRT's documentation, the warnings in
NvInfer.h at IElementWiseLayer and IPoolingLayer, and the table of ONNX operators in the repository
NVIDIA/Deep-Learning-Accelerator-SW. They were not tried on a DLA.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx

from fastcal.algorithm import Algorithm, fault_of_scale
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.errors import CacheError, FastcalError, counted, first_few
from fastcal.model import Model, node_label
from fastcal.qdq_graph import attribute

#: The operators of two inputs or more that the DLA computes element by element.
_ELEMENTWISE = ("Add", "Max", "Min", "Mul", "Sub", "Sum")

_POOLS = ("AveragePool", "MaxPool")

#: The operators that the DLA runs in INT8.
_INT8 = (
    *_ELEMENTWISE, *_POOLS, "Abs", "BatchNormalization", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm",
    "LeakyRelu", "MatMul", "PRelu", "Relu", "Reshape", "Resize", "Transpose", "Upsample",
)  # fmt: skip

#: The operators that leave no layer.
_NONE = ("Cast", "Dropout", "Identity")

#: The operators that the DLA runs in FP16 in an INT8 network too.
_FP16 = ("LRN", "Sigmoid", "Slice", "Softmax", "Split", "Tanh")

#: The operators whose second input must be a constant.
_BY_CONSTANT = ("Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu")

#: The least and the largest value that an attribute, or each of its numbers, may have.
_LIMITS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "Conv": {"kernel_shape": (1, 32), "strides": (1, 8), "pads": (0, 31), "dilations": (1, 32)},
    "ConvTranspose": {"pads": (0, 0), "dilations": (1, 1), "group": (1, 1)},
    **{kind: {"kernel_shape": (1, 8), "strides": (1, 16), "pads": (0, 7)} for kind in _POOLS},
}

#: The targets of a cache: a GPU, or the DLA.
TARGETS = (None, "dla")

_log = logging.getLogger("fastcal")


def unfit_for_dla(model: str | os.PathLike[str] | Model) -> dict[str, str]:
    """Return the layers that the DLA does not run in INT8, by name, each with the reason.

    Only the type of a layer and the sizes in its attributes are looked at: TensorRT may find more reasons.

    Args:
        model: The ONNX file.

    Raises:
        ModelError: The model cannot be loaded.
    """
    network = Model.of(model)
    reasons = ((node_label(node), _fault(node, network)) for node in _layers(network))
    return {name: reason for name, reason in reasons if reason}


def for_dla(model: str | os.PathLike[str] | Model, cache: CalibrationCache) -> CalibrationCache:
    """Return a cache with equal scales where the DLA needs equal ones: the largest of those that must be equal.

    They are the scales of both inputs of an Add, a Sub, a Mul, a Max or a Min, of all inputs and the output of a
    Concat, and of the input and the output of a MaxPool or an AveragePool. The log names the layers of `unfit_for_dla`,
    and the tensors of other layers that have no scale of use, since the DLA cannot run the layers that touch them.

    Args:
        model: The ONNX file.
        cache: The cache, of Entropy calibration 2, the only one that the DLA takes.

    Raises:
        ModelError: The model cannot be loaded.
        CacheError: The cache has another header.
    """
    check_target("dla", cache.algorithm)
    network = Model.of(model)
    unfit = unfit_for_dla(network)
    layers = [node for node in _layers(network) if node_label(node) not in unfit]
    scales = dict(cache.scales)
    for group in _groups(layers, network):
        found = [scales[name] for name in group if name in scales]
        scales |= {name: max(found) for name in group if name in scales}
    if unfit:
        _log.warning("the DLA does not run %s in INT8: %s", counted(len(unfit), "layer"), _by_reason(unfit))
    touched = dict.fromkeys(name for node in layers for name in (*node.input, *node.output))
    lacking = [name for name in touched if name in network.calibrated and fault_of_scale(scales.get(name, 0.0))]
    if lacking:
        _log.warning("the DLA does not run in INT8 what touches %s: no scale, or 0", first_few(lacking))
    record = None if cache.record is None else Record({**cache.record.entries, "target": "dla"})
    return replace(cache, scales=scales, record=record)


def check_target(target: str | None, algorithm: Algorithm) -> None:
    """Raise FastcalError if there is no such target, or if it does not take the caches of an algorithm."""
    if target not in TARGETS:
        raise FastcalError(f"there is no target {target!r}; choose dla, or leave it out for a GPU")
    if target == "dla" and algorithm.is_tensorrts and algorithm.name != "entropy2":
        raise CacheError(
            f"the DLA takes caches of Entropy calibration 2 alone, not of {algorithm.name}; use entropy2, mse or best"
        )


def _by_reason(unfit: Mapping[str, str]) -> str:
    """Return the reasons, each with the layers that it is true of."""
    names: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{reason} ({first_few(found, 2)})" for reason, found in names.items())


def _layers(network: Model) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that become layers with float activations."""
    calibrated = set(network.calibrated)
    for node in network.proto.graph.node:
        if not calibrated.isdisjoint(node.output) and node.op_type not in _NONE:
            yield node


def _fault(node: onnx.NodeProto, network: Model) -> str:
    """Return the reason why the DLA does not run a node in INT8; an empty text if it does."""
    kind = node.op_type
    if kind in _FP16:
        return f"a {kind} runs in FP16"
    if kind not in _INT8:
        return f"there is no {kind} on the DLA"
    if kind in _BY_CONSTANT and node.input[1] in network.varying:
        return f"its second input, {node.input[1]}, is no constant"
    if kind == "Concat" and attribute(node, "axis", 1) not in (1, -3):
        return f"it is along axis {attribute(node, 'axis', 1)}, not along the channels"
    for name, (least, most) in _LIMITS.get(kind, {}).items():
        values = attribute(node, name, [])
        values = values if isinstance(values, list) else [values]
        if name == "kernel_shape" and values and len(values) != 2:
            return f"it has {len(values)} spatial dimensions, not 2"
        if bad := [value for value in values if not least <= value <= most]:
            return f"its {name} has {bad[0]}, not {least} to {most}"
    return ""


def _groups(layers: list[onnx.NodeProto], network: Model) -> list[set[str]]:
    """Return the groups of tensors that need one scale."""
    groups: dict[str, set[str]] = {}
    for node in layers:
        names = set(node.input) if node.op_type in (*_ELEMENTWISE, "Concat") else set()
        if node.op_type == "Concat":
            names.add(node.output[0])
        elif node.op_type in _POOLS:
            names = {node.input[0], node.output[0]}
        names = {name for name in names if name in network.varying}
        joined = names.union(*(groups.get(name, set()) for name in names))
        groups |= dict.fromkeys(joined, joined)
    return [group for name, group in groups.items() if name == min(group)]
