"""The parts of outputs: each is what one input of a Concat holds, whatever stands between."""

import numpy as np
import onnx
import onnxruntime
import pytest

from detectors import DETECTORS, RANDOM
from fastcal.accuracy.outputs import Part, channels_of, parts_of
from fastcal.model import Model


def values_of(path, names):
    """Return the tensors of a network by name, as ONNX Runtime computes them for two images."""
    model = onnx.load(path)
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return dict(zip(names, session.run(names, {"x": RANDOM.standard_normal((2, 3, 8, 8)).astype("f4")}), strict=True))


@pytest.fixture
def detector(onnx_file):
    """A function that writes one of the detectors, with images of 8x8 or of any size, to a file."""

    def write(name, height="8"):
        graph, constants = DETECTORS[name]
        return onnx_file(graph.replace("HEIGHT", height), constants)

    return write


@pytest.mark.parametrize("height", ["8", "H"])
def test_boxes_and_scores_of_all_levels(detector, height):
    path = detector("yolov8", height)
    found = values_of(path, ["y", "boxes", "scores"])
    for shapes in (None, {"x": (2, 3, 8, 8)}):
        boxes, scores = parts_of(Model(path), shapes)
        assert (boxes.label, scores.label) == ("y[:, 0:4]", "y[:, 4:]")
        np.testing.assert_array_equal(found["y"][boxes.index], found["boxes"])
        np.testing.assert_array_equal(found["y"][scores.index], found["scores"])


def test_channels_of_different_layers_differ_in_kind_and_levels_do_not(detector):
    path = detector("yolov8 undecoded")
    found = values_of(path, ["all", "box", "cls"])
    boxes, classes = parts_of(Model(path))
    np.testing.assert_array_equal(found["all"][boxes.index], found["box"])
    np.testing.assert_array_equal(found["all"][classes.index], found["cls"])


def test_kinds_within_each_level(detector):
    path = detector("yolov5")
    found = values_of(path, ["y", "dxy1", "dwh1", "conf1", "dxy2", "dwh2", "conf2"])
    parts = parts_of(Model(path))
    assert [part.label for part in parts] == ["y[:, :, 0:2]", "y[:, :, 2:4]", "y[:, :, 4:]"]
    for part, kind in zip(parts, ("dxy", "dwh", "conf"), strict=True):
        both = [found[f"{kind}{level}"] for level in (1, 2)]
        expected = np.concatenate([each.reshape(2, -1, each.shape[-1]) for each in both], axis=1)
        np.testing.assert_array_equal(found["y"][part.index], expected)


def test_they_are_followed_through_a_transpose(detector):
    labels = [part.label for part in parts_of(Model(detector("yolox")))]
    assert labels == ["y[:, :, 0:4]", "y[:, :, 4:5]", "y[:, :, 5:]"]


def test_levels_alone_are_one_part(detector):
    assert [(part.label, part.index) for part in parts_of(Model(detector("ssd")))] == [("y", ()), ("z", ())]


def test_kinds_that_alternate_stay_apart(onnx_file):
    graph = "r = Relu(x) s = Sigmoid(x) n = Neg(x) y = Concat<axis = 1>(r, s, n, r)"
    parts = parts_of(Model(onnx_file(f"f (float[N, 2, 5] x) => (float[N, 8, 5] y) {{ {graph} }}")))
    assert [part.label for part in parts] == ["y[:, 0:2]", "y[:, 2:4]", "y[:, 4:6]", "y[:, 6:]"]


@pytest.mark.parametrize(("count", "parts"), [(8, 8), (9, 1)])
def test_many_kinds_are_no_kinds(onnx_file, count, parts):
    names = ["Relu", "Sigmoid", "Neg", "Abs", "Exp", "Tanh", "Sqrt", "Log", "Erf"][:count]
    nodes = "\n".join(f"{name} = {name}(x)" for name in names)
    graph = f"f (float[N, 2, 5] x) => (float[N, M, 5] y) {{ {nodes} y = Concat<axis = 1>({', '.join(names)}) }}"
    assert len(parts_of(Model(onnx_file(graph)))) == parts


def test_the_channels_of_parts():
    whole, one, rows = Part("y", "y"), Part("y", "o", (slice(None), slice(4, 5))), Part("y", "r", (slice(None),) * 2)
    several = Part("y", "s", (slice(None), slice(None), slice(2, 4)))
    assert [part.label for part in channels_of(whole, (2, 3))] == ["y[:, 0]", "y[:, 1]", "y[:, 2]"]
    assert [part.label for part in channels_of(whole, (2, 2, 8, 8))] == ["y[:, 0]", "y[:, 1]"]
    assert [part.label for part in channels_of(several, (2, 9, 6))] == ["y[:, :, 2]", "y[:, :, 3]"]
    assert [len(channels_of(rows, (2, count, 6))) for count in (1024, 1025)] == [1024, 0]
    for part, shape in ((whole, (2, 3, 8)), (whole, (2,)), (whole, (2, 1)), (one, (2, 9, 6))):
        assert channels_of(part, shape) == ()
    values = np.arange(2 * 9 * 6).reshape(2, 9, 6)
    np.testing.assert_array_equal(values[channels_of(several, (2, 9, 6))[1].index], values[:, :, 3:4])


def test_outputs_that_are_no_float_or_constant_are_left_out(onnx_file):
    path = onnx_file(
        "f (float[N, 3] x) => (float[N, 3] y, int64[N, 1] k, float[2] c) { y = Relu(x)\n k = ArgMax<axis = 1>(x) }",
        {"c": np.ones(2, np.float32)},
    )
    assert [part.output for part in parts_of(Model(path))] == ["y"]
