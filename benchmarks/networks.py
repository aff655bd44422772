"""Networks for the benchmarks: the shapes of known ones, with random weights."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects the nodes and weights of a graph whose tensors are named after their nodes."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def conv(self, x: str, inputs: int, outputs: int, size: int, stride: int = 1, pad: int = 0) -> str:
        spread = (2 / (inputs * size * size)) ** 0.5
        weights = self._random.standard_normal((outputs, inputs, size, size), dtype=np.float32) * np.float32(spread)
        name = f"weights_{len(self.nodes)}"
        self.weights.append(numpy_helper.from_array(weights, name))
        return self.add("Conv", x, name, kernel_shape=[size, size], strides=[stride, stride], pads=[pad] * 4)

    def model(self, output: str, classes: int, size: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", classes, 1, 1])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def resnet50(size: int = 224) -> onnx.ModelProto:
    """ResNet-50 for square images, batch normalization folded into the convolutions."""
    net = Builder()
    x = net.add("Relu", net.conv("input", 3, 64, 7, stride=2, pad=3))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = net.add("Relu", net.conv(x, channels, width, 1))
            y = net.add("Relu", net.conv(y, width, width, 3, stride=stride, pad=1))
            y = net.conv(y, width, 4 * width, 1)
            shortcut = net.conv(x, channels, 4 * width, 1, stride=stride) if block == 0 else x
            x = net.add("Relu", net.add("Add", y, shortcut))
            channels = 4 * width
    x = net.conv(net.add("GlobalAveragePool", x), channels, 1000, 1)
    return net.model(x, 1000, size)


def squeezenet() -> onnx.ModelProto:
    """SqueezeNet 1.1 for 224x224 images."""
    net = Builder()
    x = net.add("Relu", net.conv("input", 3, 64, 3, stride=2))
    channels = 64
    for squeeze, expand, pool in (
        (16, 64, True), (16, 64, False), (32, 128, True), (32, 128, False),
        (48, 192, True), (48, 192, False), (64, 256, False), (64, 256, False),
    ):  # fmt: skip
        if pool:
            x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        s = net.add("Relu", net.conv(x, channels, squeeze, 1))
        left = net.add("Relu", net.conv(s, squeeze, expand, 1))
        right = net.add("Relu", net.conv(s, squeeze, expand, 3, pad=1))
        x = net.add("Concat", left, right, axis=1)
        channels = 2 * expand
    x = net.add("Relu", net.conv(x, channels, 1000, 1))
    return net.model(net.add("GlobalAveragePool", x), 1000, 224)
