"""`ImplicitPlacement`: the places where an engine that TensorRT 8 to 10 builds from a cache rounds, to simulate it.

With a cache, TensorRT may run any layer in INT8 whose inputs and outputs have scales ("implicit quantization"), and
passes INT8 from one kernel to the next. Which layers it runs in INT8 is a matter of their speed, so the simulation
rounds wherever TensorRT may.
"""

from collections.abc import Mapping

import onnx

from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import WEIGHTED, Placement

#: The operators that TensorRT fuses, in a row, with the layer before.
_POINTWISE = (
    "Abs", "Add", "BatchNormalization", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu",
)  # fmt: skip

#: The other layers that compute, and that TensorRT runs in INT8 if their input has a scale.
_COMPUTING = ("AveragePool", "GlobalAveragePool", "Resize", "Upsample")

#: The first words of the operators whose output stays in float between pointwise operators.
_IN_FLOAT = ("GroupNorm", "InstanceNorm", "LayerNorm", "LogSoftmax", "RMSNorm", "Reduce", "Softmax")


class ImplicitPlacement(Placement):
    """The edges that get a pair as in `Placement`, and those between all other kernels that compute.

    A kernel is a layer with the pointwise operators behind it: a convolution with its BatchNormalization, activation
    and residual Add, for instance; or pointwise operators alone. An activation that another kernel computes with is
    rounded if it has a scale. Outputs stay in float, and so does what a normalization computes from a mean.
    """

    def __init__(self, graph: Graph, scales: Mapping[str, float], excluded: set[int]) -> None:
        super().__init__(graph, scales, excluded)
        kernels: dict[int, int] = {}  # the first node of the kernel of each node
        for number, node in enumerate(graph.nodes):
            kernels[number] = self._kernel(number, node, kernels)
        for number, node in self._nodes(*_POINTWISE, *_COMPUTING):
            for index, name in enumerate(node.input):
                producer = graph.producers.get(name, -1)
                is_inner = kernels.get(producer) == kernels[number] or self._stays_in_float(producer)
                if not is_inner and name in graph.model.varying and not self._fault_of(name):
                    self.axes[number, index] = None

    def _kernel(self, number: int, node: onnx.NodeProto, kernels: Mapping[int, int]) -> int:
        """Return the kernel of a node: the last one that one of its inputs comes from, or its own."""
        if node.op_type not in _POINTWISE:
            return number
        read = [name for index, name in enumerate(node.input) if (number, index) not in self.axes]
        producers = [self._graph.producers.get(name, -1) for name in read]
        before = [kernels[producer] for producer in producers if producer in kernels]
        fusing = (kernel for kernel in before if self._graph.nodes[kernel].op_type in (*WEIGHTED, *_POINTWISE))
        return max(fusing, default=number)

    def _stays_in_float(self, number: int) -> bool:
        return number >= 0 and self._graph.nodes[number].op_type.startswith(_IN_FLOAT)
