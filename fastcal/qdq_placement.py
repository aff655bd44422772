"""`Placement`: the places in a graph that get a Q/DQ pair, as TensorRT's documentation recommends them.

See "Explicit Quantization", section "Q/DQ Layer-Placement Recommendations". ONNX Runtime's quantizer places pairs in
another way: it quantizes both inputs of an Add, it gives layers that stay in float the rounded tensor as soon as one
other layer reads the tensor in INT8, and it drops the beta of a Gemm whose bias stays in float.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from fastcal.algorithm import fault_of_scale
from fastcal.errors import CacheError
from fastcal.model import node_label
from fastcal.qdq_graph import Edge, Graph, attribute
from fastcal.qdq_sharing import Sharing, adds_activations, commutes

#: The layers that multiply by weights, and gain most from INT8 in TensorRT.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

#: The layers that TensorRT fuses with the Add that follows.
_TAKES_ADD = ("Conv", "ConvTranspose")

#: The pooling layers that compute, so that TensorRT runs them in INT8 only between two pairs.
_AVERAGES = ("AveragePool", "GlobalAveragePool")

#: The layers whose inputs may get a pair.
PAIRED = (*WEIGHTED, "Add", *_AVERAGES)


class Placement:
    """The edges of a graph that get a Q/DQ pair: `axes`, as `Graph.insert_pairs` takes them.

    The nodes with the numbers `excluded` stay in float. `in_float` has the layers that must, with the reasons.
    `sources` has the parts of tensors whose pairs have the scale of the whole tensor, and that tensor.
    """

    def __init__(self, graph: Graph, scales: Mapping[str, float], excluded: set[int]) -> None:
        self.axes: dict[Edge, int | None] = {}
        self.in_float: dict[str, str] = {}
        self._graph, self._scales = graph, scales
        self._numbers = [number for number in range(len(graph.nodes)) if number not in excluded]
        self._check_names()
        self._place_on_weighted()
        self._place_on_residuals()
        self._place_on_averages()
        sharing = Sharing(graph, self.axes, scales, excluded, self._fault_of)
        self.axes |= dict.fromkeys(sharing.edges)
        self.sources = sharing.sources

    def resolved(self, scales: Mapping[str, float]) -> dict[str, float]:
        """Return scales in which the parts in `sources` have the scales of the whole tensors."""
        return {**scales, **{part: scales[whole] for part, whole in self.sources.items()}}

    def _check_names(self) -> None:
        layers = [node for node in self._graph.nodes if node.op_type in WEIGHTED]
        read = {name for node in layers for name in node.input[:2] if name in self._graph.model.varying}
        found = len(read & self._scales.keys())
        if 2 * found < len(read):
            raise CacheError(
                f"the cache has scales for {found} of the {len(read)} tensors that the layers of "
                f"{self._graph.model.label} read: the cache belongs to another model; calibrate this one"
            )

    def _place_on_weighted(self) -> None:
        for number, node in self._nodes(*WEIGHTED):
            axes: dict[int, int | None] = {}
            reason = ""
            for index, name in enumerate(node.input[:2]):
                weights = self._graph.constant(name)
                if weights is not None:
                    axes[index] = _channel_axis(node, index, weights.ndim)
                    reason = reason or _fault_of_weights(name, weights)
                else:
                    axes[index] = None
                    are_weights = index == 1 and node.op_type in _TAKES_ADD
                    is_constant = name not in self._graph.model.varying
                    fault = f"its weights {name} are {'of an unknown value' if is_constant else 'computed'}"
                    reason = reason or (fault if are_weights or is_constant else self._fault_of(name))
            self._add(number, axes, reason)

    def _place_on_residuals(self) -> None:
        depths = self._depths()
        for number, node in self._nodes("Add"):
            if not adds_activations(self._graph, node):
                continue
            # TensorRT fuses the Add into one convolution. If both inputs come from one, the residual branch is the one
            # with fewer layers.
            fused = [index for index, name in enumerate(node.input) if self._ends_in_convolution(name)]
            if fused:
                main = max(fused, key=lambda index: depths[node.input[index]])
                residual = node.input[1 - main]
                self._add(number, {1 - main: None}, self._fault_of(residual))

    def _place_on_averages(self) -> None:
        for number, node in reversed(list(self._nodes(*_AVERAGES))):
            # If another layer reads the input in float, a pair would keep the tensor in memory twice.
            readers = self._graph.readers[node.input[0]]
            alone = all(edge in self.axes or self._graph.nodes[edge[0]].op_type in _AVERAGES for edge in readers)
            if alone and self._is_read_in_int8(node.output[0]):
                self._add(number, {0: None}, self._fault_of(node.input[0]))

    def _nodes(self, *types: str) -> Iterator[tuple[int, onnx.NodeProto]]:
        for number in self._numbers:
            if self._graph.nodes[number].op_type in types:
                yield number, self._graph.nodes[number]

    def _add(self, number: int, axes: Mapping[int, int | None], reason: str) -> None:
        """Give inputs of a node a pair; if there is a reason against it, keep the node in float."""
        if reason:
            self.in_float[node_label(self._graph.nodes[number])] = reason
        else:
            self.axes |= {(number, index): axis for index, axis in axes.items()}

    def _fault_of(self, name: str) -> str:
        """Return the reason why an activation cannot be quantized; an empty text if it can."""
        kind = self._graph.model.types.get(name, TensorProto.FLOAT)
        if kind not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
            return f"{name} is {TensorProto.DataType.Name(kind).lower()}"
        if name not in self._scales:
            return f"no scale for {name}"
        scale = self._scales[name]
        return f"the scale of {name} is {scale:g}" if fault_of_scale(scale) else ""

    def _ends_in_convolution(self, name: str) -> bool:
        """Return True if a quantized convolution computes a tensor, and TensorRT fuses its only reader with it."""
        number = self._graph.producers.get(name)
        if number is None or name in self._graph.outputs or len(self._graph.readers[name]) > 1:
            return False
        node = self._graph.nodes[number]
        if node.op_type == "BatchNormalization":
            return self._ends_in_convolution(node.input[0])
        return node.op_type in _TAKES_ADD and (number, 0) in self.axes

    def _is_read_in_int8(self, name: str) -> bool:
        if name in self._graph.outputs or name not in self._graph.readers:
            return False
        return all(edge in self.axes or self._commutes(edge[0]) for edge in self._graph.readers[name])

    def _commutes(self, number: int) -> bool:
        node = self._graph.nodes[number]
        return commutes(node) and all(map(self._is_read_in_int8, node.output))

    def _depths(self) -> dict[str, int]:
        """Return the number of weighted layers on the longest way to each activation."""
        depths: dict[str, int] = {}
        for node in self._graph.nodes:
            depth = max((depths.get(name, 0) for name in node.input), default=0) + (node.op_type in WEIGHTED)
            depths |= dict.fromkeys(node.output, depth)
        return depths


def _channel_axis(node: onnx.NodeProto, index: int, rank: int) -> int | None:
    """Return the axis of a constant input along which the output channels lie; None for one scale.

    A vector has one channel. A MatMul's right side of more than two dimensions has one scale too: from its optimization
    level "extended" on, ONNX Runtime 1.32 cannot run several.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1  # with groups, the channels of one group: all groups share a scale per channel
    if node.op_type == "Gemm":
        return int(attribute(node, "transB", 0) == 0) if index == 1 else int(attribute(node, "transA", 0) != 0)
    if index == 1:
        return 1 if rank == 2 else None
    return None if rank < 2 else rank - 2


def _fault_of_weights(name: str, weights: npt.NDArray[np.generic]) -> str:
    """Return the reason why weights cannot be quantized; an empty text if they can."""
    if weights.dtype != np.float32:
        return f"its weights {name} are {weights.dtype}"
    return "" if np.isfinite(weights).all() else f"its weights {name} are not all finite"
