"""The figures of the accuracy benchmark, against values worked out by hand."""

import accuracy_metrics
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper


def yolo(*boxes):
    """Return an output (6, boxes) of YOLOv8 with two classes, from (x, y, width, height, class, score)."""
    output = np.zeros((6, len(boxes)), np.float32)
    for column, (*box, label, score) in zip(output.T, boxes, strict=True):
        column[:4] = box
        column[4 + label] = score
    return output[None]


FOUND = [(20, 20, 10, 10, 0, 0.9), (21, 20, 10, 10, 0, 0.8), (20, 20, 10, 10, 1, 0.7), (80, 80, 10, 10, 1, 0.2)]


@pytest.mark.parametrize(
    ("other", "counts"),
    [
        (FOUND, (4, 4)),  # the second box is the first, found again, and the fourth's score is too low
        ([(23, 20, 10, 10, 0, 0.3), FOUND[2]], (4, 4)),  # IoU 70 / 130
        ([(24, 20, 10, 10, 0, 0.3), FOUND[2]], (2, 4)),  # IoU 60 / 140
        ([(20, 20, 10, 10, 0, 0.9), (20, 20, 10, 10, 0, 0.8)], (2, 3)),  # the other class is not found
        ([*FOUND[:3], (80, 80, 10, 10, 1, 0.3)], (4, 5)),
        ([], (0, 2)),
    ],
)
def test_boxes(other, counts):
    assert accuracy_metrics.boxes(yolo(*FOUND), yolo(*other)) == counts


def test_a_box_is_found_once():
    near = [(20, 20, 10, 10, 0, 0.9), (20, 24.5, 10, 10, 0, 0.8)]  # IoU 55 / 145: neither suppresses the other
    assert accuracy_metrics.boxes(yolo(*near), yolo((20, 22, 10, 10, 0, 0.9))) == (2, 3)


@pytest.mark.parametrize(
    ("best", "equal"), [([1, 0, 1, 2, 2], 1), ([1, 1, 0, 1, 2], 1), ([1, 1, 2, 2, 0], 0), ([1, 0, 1, 2, 3], 0)]
)
def test_lines(best, equal):
    exact, other = (np.eye(4)[[choice]] for choice in ([1, 0, 1, 2, 0], best))
    assert accuracy_metrics.lines(exact, other) == (equal, 1)


def test_masks():
    exact = np.array([[0.6, 0.6, 0.4, 0.1], [0.1, 0.2, 0.1, 0.1]])
    other = np.array([[0.4, 0.6, 0.6, 0.1], [0.1, 0.2, 0.1, 0.1]])
    assert accuracy_metrics.mask(exact, other) == (1 / 3 + 1, 2)
    assert accuracy_metrics.textmask(exact, other) == (2, 2)


def test_best_classes():
    assert accuracy_metrics.top1(np.eye(3), np.eye(3)[[0, 2, 1]]) == (1, 3)


def test_share_of_multiply_adds_in_int8(tmp_path):
    """A depthwise convolution in float, a convolution in INT8 and a Gemm of which only the weights are."""

    def dequantize(kind, name, *read):
        return helper.make_node(kind, [*read, "scale"], [name])

    nodes = [
        helper.make_node("Conv", ["x", "depthwise"], ["a"], group=4, pads=[1, 1, 1, 1]),
        dequantize("QuantizeLinear", "qa", "a"),
        dequantize("DequantizeLinear", "da", "qa"),
        helper.make_node("Transpose", ["da"], ["ta"], perm=[0, 1, 3, 2]),
        dequantize("DequantizeLinear", "weights", "int8"),
        helper.make_node("Conv", ["ta", "weights"], ["b"]),
        helper.make_node("Flatten", ["b"], ["flat"]),
        dequantize("DequantizeLinear", "last", "int8 last"),
        helper.make_node("Gemm", ["flat", "last"], ["y"], transB=1),
    ]
    random = np.random.default_rng(0)
    values = {
        "depthwise": random.standard_normal((4, 1, 3, 3), np.float32),
        "int8": random.integers(-9, 9, (6, 4, 1, 1), np.int8),
        "int8 last": random.integers(-9, 9, (5, 6 * 8 * 8), np.int8),
        "scale": np.float32(0.1),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    sample = {"x": np.zeros((1, 4, 8, 8), np.float32)}
    depthwise, int8, last = 4 * 64 * 9, 6 * 64 * 4, 5 * 384
    assert list(accuracy_metrics.int8_share(path, sample, 1)) == pytest.approx(
        [int8 / (depthwise + int8 + last), int8 / (int8 + last)]
    )
