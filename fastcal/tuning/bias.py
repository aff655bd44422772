"""Bias correction: the mean shift that rounding adds to a layer's output, taken out of its bias.

A layer computes W x + b. In INT8 it computes W' q(x) + b, with rounded weights W'. The mean of the difference over
many samples, W' E[q(x)] - W E[x] for each output channel, is known from the means of the layer's input channels, but
for the edges of images, which a kernel sees less often. Source: Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019, section 4.2.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.batch import match_batch
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import PartedRunner
from fastcal.qdq_graph import Edge, Graph, attribute, round_weights, weight_scales

#: The means of a tensor's channels: of its values, and of the values rounded to INT8.
_Means = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def corrections(
    model: Model,
    axes: Mapping[Edge, int | None],
    scales: Mapping[str, float],
    batches: Sequence[Mapping[str, npt.NDArray[Any]]],
    threads: int | None = None,
) -> dict[str, npt.NDArray[np.float32]]:
    """Return what to add to the bias of each layer with pairs, by the name of the layer's output.

    Layers that have no place for a bias (see `Graph.bias_of`) are left out.
    """
    graph = Graph(model)
    layers = [
        number for number, index in axes
        if index == 1 and graph.constant(graph.nodes[number].input[1]) is not None and graph.bias_of(number) is not None
    ]  # fmt: skip
    tensors = {graph.nodes[number].input[0]: _channel_axis(graph.nodes[number].op_type) for number in layers}
    means = _means(model, tensors, scales, batches, threads)
    found = {}
    for number in layers:
        node = graph.nodes[number]
        name = node.input[0]
        if name in means:
            weights = graph.constant(node.input[1])
            assert weights is not None
            shift = _shift(node, weights, axes[number, 1], means[name])
            if shift is not None and np.isfinite(shift).all():
                found[node.output[0]] = (-shift).astype(np.float32)
    return found


def _channel_axis(operator: str) -> int:
    return 1 if operator in ("Conv", "ConvTranspose") else -1


def _means(
    model: Model,
    tensors: Mapping[str, int],
    scales: Mapping[str, float],
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    threads: int | None,
) -> dict[str, _Means]:
    """Return the means of the tensors' channels, each along its axis, over all samples."""
    sums: dict[str, list[Any]] = {}
    with PartedRunner(model.showing(tensors), threads, is_optimized=True) as runner:
        for batch in batches:
            for values in runner.run(match_batch(model.inputs, model.label, batch)):
                for name in tensors.keys() & values.keys():
                    found = _sums(values[name], tensors[name], scales[name])
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0, 0]), found, strict=True)]
    return {name: (exact / count, rounded / count) for name, (exact, rounded, count) in sums.items()}


def _sums(values: npt.NDArray[Any], axis: int, scale: float) -> tuple[Any, Any, int]:
    """Return the sums of a tensor's channels, the same after rounding, and the number of values of a channel."""
    rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    rounded = np.clip(np.rint(rows / np.float32(scale)), -128, 127)
    rounded *= np.float32(scale)
    return rows.sum(0, np.float64), rounded.sum(0, np.float64), len(rows)


def _shift(
    node: Any, weights: npt.NDArray[np.float32], axis: int | None, means: _Means
) -> npt.NDArray[np.float64] | None:
    """Return the mean shift of each output channel; None if the shapes do not belong together."""
    scales = weight_scales(weights, axis)
    exact = weights.astype(np.float64)
    spread = scales if axis is None else scales.reshape([-1 if each == axis else 1 for each in range(weights.ndim)])
    rounded = round_weights(weights, scales, axis).astype(np.float64) * spread
    before, after = means
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        kernels = [each.reshape(*each.shape[:2], -1).sum(2) for each in (exact, rounded)]
        return _grouped(kernels[0], kernels[1], before, after, groups)
    if node.op_type == "ConvTranspose" or weights.ndim != 2:
        return None
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        exact, rounded = exact.T, rounded.T
    return after @ rounded - before @ exact if len(exact) == len(before) else None


def _grouped(
    exact: npt.NDArray[np.float64],
    rounded: npt.NDArray[np.float64],
    before: npt.NDArray[np.float64],
    after: npt.NDArray[np.float64],
    groups: int,
) -> npt.NDArray[np.float64] | None:
    """Return the shift of a convolution whose kernels (outputs, inputs of a group) are summed over their area."""
    outputs, inputs = exact.shape
    if len(before) != groups * inputs:
        return None
    by_group = [each.reshape(groups, outputs // groups, inputs) for each in (exact, rounded)]
    means = [each.reshape(groups, inputs, 1) for each in (before, after)]
    return (by_group[1] @ means[1] - by_group[0] @ means[0]).reshape(-1)
