"""The metrics of what users see: which is taken for a network, and its value where that is known."""

import re
import statistics

import numpy as np
import pytest

from detectors import DETECTORS
from fastcal.accuracy.detections import Detections, Layout
from fastcal.accuracy.labels import Cosine, Sequences, TopOne
from fastcal.accuracy.masks import Masks
from fastcal.accuracy.metrics import metric_for
from fastcal.accuracy.own import OwnMetric, load_metric
from fastcal.errors import FastcalError, ModelError
from fastcal.model import Model

W = {"w": np.ones((5, 3, 1, 1), np.float32), "v": np.ones((3, 6), np.float32), "b": np.ones(6, np.float32)}

#: The layouts of the detectors.
LAYOUTS = {
    "yolov8": Layout("y", "y", 1, 4, 10, "classes"),
    "yolov8 undecoded": Layout("all", "all", 1, 4, 10, "classes"),
    "yolov5": Layout("y", "y", 2, 4, None, "objects"),
    "yolox": Layout("y", "y", 2, 4, None, "objects"),
    "ssd": Layout("y", "z", 2, 0, None, "classes"),
}

IMAGE = "f (float[N, 3, 16, 32] x) => (float"
TOKENS = "f (float[N, 7, 3] x) => (float[N, 7, 6] y)"
VECTOR = "f (float[N, 3] x) => (float[N, 6] y)"

#: Networks and their metrics: the settings.
NETWORKS = [
    (f"{IMAGE}[N, 1, 16, 32] y) {{ c = ReduceMean<axes = [1]>(x) y = Sigmoid(c) }}", Masks("y", 1, False)),
    (f"{IMAGE}[N, 16, 32] y) {{ y = ReduceMean<axes = [1], keepdims = 0>(x) }}", Masks("y", None, False)),
    (f"{IMAGE}[N, 5, 16, 32] y) {{ y = Conv(x, w) }}", Masks("y", 1, True)),
    (f"{IMAGE}[N, 5, 16, 32] y) {{ c = Conv(x, w) y = Sigmoid(c) }}", Masks("y", 1, False)),
    (f"{IMAGE}[N, 16, 32, 5] y) {{ c = Conv(x, w) y = Transpose<perm = [0, 2, 3, 1]>(c) }}", Masks("y", 3, True)),
    ("f (float[N, 16, 32, 3] x) => (float[N, 16, 32, 3] y) { y = Relu(x) }", Masks("y", 3, True)),
    (f"{IMAGE}[N, 5, 4, 8] y) {{ y = Conv<strides = [4, 4]>(x, w) }}", Masks("y", 1, True)),
    (f"{IMAGE}[N, 5, 2, 4] y) {{ y = Conv<strides = [8, 8]>(x, w) }}", None),  # features
    (f"{IMAGE}[N, 5, 16, 32] y, float[N, 5, 2, 4] z) {{ y = Conv(x, w) z = Conv<strides = [8, 8]>(x, w) }}", None),
    (f"{TOKENS} {{ m = MatMul(x, v) y = Softmax(m) }}", Sequences("y")),
    (f"{TOKENS} {{ m = MatMul(x, v) y = Add(b, m) }}", Sequences("y")),
    (f"{TOKENS} {{ m = MatMul(x, v) y = Relu(m) }}", None),  # features
    (
        "f (int64[N, 7] x) => (float[N, 7, 6] y) { e = Gather(v, x) t = Transpose<perm = [1, 0]>(v) m = MatMul(e, t)\n"
        "y = MatMul(m, v) }",
        TopOne("y", 6, tokens=True),
    ),
    (f"{VECTOR} {{ y = MatMul(x, v) }}", TopOne("y", 6)),
    ("f (float[N, 3, 1, 1] x) => (float[N, 5, 1, 1] y) { y = Conv(x, w) }", TopOne("y", 5)),
    ("f (float[N, 3] x) => (float[N, 6] y, float[N, 6] z) { y = MatMul(x, v) z = Neg(y) }", None),  # two
    ("f (float[N, 3] x) => (float[N, 1] y) { y = ReduceMean<axes = [1]>(x) }", None),  # a number
    ("f (float[N, 3] x) => (float[N, 1] y) { m = ReduceMean<axes = [1]>(x) y = Sigmoid(m) }", TopOne("y", 1)),
    (f"{VECTOR} {{ m = MatMul(x, v) y = LpNormalization(m) }}", Cosine("y")),
    (f"{VECTOR} {{ m = MatMul(x, v) l = ReduceL2<axes = [1]>(m) s = Clip(l) y = Div(m, s) }}", Cosine("y")),
    (
        f"{VECTOR} {{ m = MatMul(x, v) q = Mul(m, m) l = ReduceSum<keepdims = 1>(q, a) s = Sqrt(l) y = Div(m, s) }}",
        Cosine("y"),
    ),
    (f"{VECTOR} {{ m = MatMul(x, v) e = Exp(m) l = ReduceSum<keepdims = 1>(e, a) y = Div(e, l) }}", TopOne("y", 6)),
    (f"{VECTOR} {{ m = MatMul(x, v) y = BatchNormalization(m, b, b, b, b) }}", Cosine("y")),
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_detectors(onnx_file, name):
    graph, constants = DETECTORS[name]
    model = Model(onnx_file(graph.replace("HEIGHT", "8"), constants))
    assert metric_for(model) == Detections(LAYOUTS[name])
    assert metric_for(model, threshold=0.1) == Detections(LAYOUTS[name], 0.1)


def test_detectors_with_more_than_scores_or_with_labels(onnx_file):
    graph = (
        "f (float[N, 4, 50] x) => (float[N, 12, 50] y, float[N, 4, 9, 9] protos) "
        "{ b = Sigmoid(x) m = Neg(x) p = Slice(x, from, to, two) q = Reshape(p, s) protos = Expand(q, whole)\n"
        "y = Concat<axis = 1>(x, b, m) }"
    )
    constants = {"from": np.int64([0]), "to": np.int64([1]), "two": np.int64([2])}
    constants |= {"s": np.int64([0, 4, 1, 1]), "whole": np.int64([1, 4, 9, 9])}
    assert metric_for(Model(onnx_file(graph, constants))) == Detections(Layout("y", "y", 1, 4, 8, "classes"))
    graph = (
        "f (float[N, 300, 4] x) => (float[N, 300, 6] y) { s, k = TopK<axis = 2>(x, one) c = Cast<to = 1>(k)\n"
        "r = Relu(s) y = Concat<axis = 2>(x, r, c) }"
    )
    model = Model(onnx_file(graph, {"one": np.int64([1])}))
    assert metric_for(model) == Detections(Layout("y", "y", 2, 4, None, "labels"))
    for boxes, form in ((1000, "labels"), (1001, "objects")):  # no detector that suppresses boxes leaves so many
        model = Model(onnx_file(graph.replace("300", str(boxes)), {"one": np.int64([1])}))
        assert metric_for(model) == Detections(Layout("y", "y", 2, 4, None, form))


@pytest.mark.parametrize(("graph", "metric"), NETWORKS)
def test_what_is_taken(onnx_file, graph, metric):
    assert metric_for(Model(onnx_file(graph, W | {"a": np.int64([1])}))) == metric


def test_what_is_asked_for(onnx_file):
    model = Model(onnx_file(f"{VECTOR} {{ y = MatMul(x, v) }}", W))
    assert metric_for(model, name="cosine") == Cosine("y")
    with pytest.raises(ModelError, match=r"no output of .*model.onnx fits metric 'masks'; take another"):
        metric_for(model, name="masks")
    with pytest.raises(
        FastcalError, match="there is no metric 'f1'; take one of boxes, masks, sequences, cosine, top-1"
    ):
        metric_for(model, name="f1")
    with pytest.raises(FastcalError, match="the threshold is 1; it must be above 0 and below 1"):
        metric_for(model, threshold=1)
    two = "f (float[N, 3] x) => (float[N, 6] y, float[N, 6] z) { y = MatMul(x, v) z = Neg(y) }"
    assert metric_for(Model(onnx_file(two, W)), name="top-1") == TopOne("y", 6)


def test_shapes_that_only_a_run_tells(onnx_file):
    model = Model(onnx_file("f (float[N, 3, H, H] x) => (float[A, B, C] y) { m = Reshape(x, s)\n y = Softmax(m) }", {}))
    model.proto.graph.node[0].input[1] = "x2"  # of an unknown value
    assert metric_for(model) is None
    assert metric_for(model, {"x": (1, 3, 8, 8), "y": (1, 6, 32)}) == Sequences("y")


def value(metric, *batches):
    for exact, other in batches:
        metric.add({"y": np.asarray(exact)}, {"y": np.asarray(other)}, len(exact))
    return metric.value


def test_classes_that_agree():
    exact = [[0, 2, 1], [5, 1, 1], [np.nan, 0, 0]]
    other = [[0, 2, 1.9], [0, 1, 1], [1, 0, 0]]
    assert value(TopOne("y", 3), (exact, other)) == 0.5
    assert value(TopOne("y", 3), (exact, other), (exact[:2], exact[:2])) == 0.75
    assert value(TopOne("y", 3), (exact[:1], [[0, np.nan, 0]])) == 0
    assert value(TopOne("y", 1), ([[0.4], [0.6]], [[0.3], [0.4]])) == 0.5
    assert value(TopOne("y", 2, tokens=True), ([[[0, 1], [0, 1]]], [[[0, 1], [1, 0]]])) == 0.5
    assert TopOne("y", 3).value is None


def rows(text, classes="-ab"):
    """Return scores whose best path is `text`."""
    return np.eye(len(classes), dtype=np.float32)[[classes.index(letter) for letter in text]]


@pytest.mark.parametrize("classes", ["-ab", "ab-"])
def test_sequences_are_equal_without_repeats_and_blanks(classes):
    exact = np.stack([rows(text, classes) for text in ("--ab-", "-aab-", "a-a--", "b----")])
    other = np.stack([rows(text, classes) for text in ("aabbb", "-abb-", "-aa--", "--b--")])
    assert value(Sequences("y"), (exact, other)) == 3 / 4  # a-a is aa, and aa is a


def test_the_blank_is_the_one_of_the_first_batch():
    exact = np.stack([rows("--a--", "-ab")])
    assert value(Sequences("y"), (exact, exact), ([rows("bbbbb")], [rows("-----")])) == 0.5


def test_the_mean_cosine():
    exact = [[1, 0], [0, 2], [3, 0], [0, 0], [np.nan, 1]]
    other = [[9, 0], [3, 3], [-1, 0], [1, 1], [1, 1]]
    assert value(Cosine("y"), (exact[:2], other[:2]), (exact[2:], other[2:])) == pytest.approx((1 + 0.5**0.5 + 0) / 3)
    assert value(Cosine("y"), ([[1, 0]], [[0, 0]])) == 0
    assert value(Cosine("y"), ([[1, 0]], [[np.nan, 0]])) == 0


def test_masks_of_one_class():
    exact = np.float32([[[[0.9, 0.9], [0.1, 0.6]]], [[[0, 0], [0, 0.7]]], [[[0, 0], [0, 0]]]])
    other = np.float32([[[[0.9, 0.2], [0.5, 0.6]]], [[[0, 0], [0, 0.8]]], [[[0, 0], [0, 0]]]])
    assert value(Masks("y", 1, False), (exact, other)) == (2 / 4 + 1) / 2  # an image without a mask does not count
    assert value(Masks("y", 1, False, 0.65), (exact, other)) == (1 / 2 + 1) / 2
    assert value(Masks("y", None, False), (exact[:, 0], other[:, 0])) == (2 / 4 + 1) / 2
    logits = [np.log(each.clip(0.01, 0.99) / (1 - each.clip(0.01, 0.99))) for each in (exact, other)]
    assert value(Masks("y", 1, False, 0.65), logits) == (1 / 2 + 1) / 2
    assert value(Masks("y", 1, False), (exact[2:], exact[2:])) is None
    assert value(Masks("y", 1, False), (exact[2:], exact[:1])) == 0


def test_the_standard_error_of_masks():
    """Of masks whose IoUs are 1/4, 2/4 and 4/4: statistics.stdev divided by the root of three."""
    exact, other = np.ones((3, 1, 2, 2), "f4"), np.zeros((3, 1, 2, 2), "f4")
    for image, pixels in enumerate((1, 2, 4)):
        other[image].flat[:pixels] = 1
    metric = Masks("y", 1, False)
    assert metric.standard_error == 0
    metric.add({"y": exact[:1]}, {"y": other[:1]}, 1)
    assert metric.standard_error == 0  # one mask tells nothing
    metric.add({"y": exact[1:]}, {"y": other[1:]}, 2)
    assert metric.standard_error == pytest.approx(statistics.stdev([0.25, 0.5, 1]) / 3**0.5)
    assert metric.fresh().standard_error == 0


def test_masks_of_several_classes():
    exact, other = np.array([[[0, 0], [1, 2]]]), np.array([[[0, 1], [1, 3]]])
    scores = [np.moveaxis(np.eye(4)[each], 3, 1) for each in (exact, other)]
    assert value(Masks("y", 1, True), scores) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert value(Masks("y", 3, True), [np.moveaxis(each, 1, 3) for each in scores]) == pytest.approx(
        (1 / 2 + 1 / 2) / 3
    )
    assert value(Masks("y", 1, False), scores) == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)


def detections(*boxes, anchors=12, classes=3):
    """Return an output of (1, 4 + classes, anchors): boxes are (x, y, width, height, class, score)."""
    output = np.zeros((1, 4 + classes, anchors), np.float32)
    output[0, :4] = [[500], [500], [1], [1]]
    for index, (*box, label, score) in enumerate(boxes):
        output[0, :4, index] = box
        output[0, 4 + label, index] = score
    return output


YOLO = Layout("y", "y", 1, 4, None, "classes")
CUP, CAT = (100, 100, 40, 40, 0, 0.9), (200, 50, 30, 60, 1, 0.5)


def moved(box, x=0, score=None, label=None):
    left, top, width, height, own_label, own_score = box
    return left + x, top, width, height, own_label if label is None else label, score or own_score


@pytest.mark.parametrize(
    ("found", "f1"),
    [
        ([CUP, CAT], 1),
        ([CUP], 2 / 3),
        ([CUP, moved(CAT, score=0.24)], 2 / 3),
        ([CUP, moved(CAT, score=0.26)], 1),
        ([moved(CUP, x=13), CAT], 1),  # an IoU of 27 / 53
        ([moved(CUP, x=14), CAT], 1 / 2),  # of 26 / 54
        ([moved(CUP, label=2), CAT], 1 / 2),
        ([CUP, CAT, moved(CUP, x=9, score=0.8)], 1),  # suppressed: an IoU of 31 / 49
        ([CUP, CAT, moved(CUP, x=16, score=0.8)], 4 / 5),  # not suppressed: 24 / 56
        ([CUP, CAT, moved(CUP, x=9, score=0.8, label=2)], 4 / 5),
        ([], 0),
    ],
)
def test_boxes_that_agree(found, f1):
    assert value(Detections(YOLO), (detections(CUP, CAT), detections(*found))) == pytest.approx(f1)


def test_boxes_of_all_images_and_the_threshold():
    exact, other = detections(CUP, CAT), detections(CUP)
    assert value(Detections(YOLO), (exact, other), (exact, exact)) == pytest.approx(2 * 3 / (3 + 4))
    assert value(Detections(YOLO, threshold=0.6), (exact, other)) == 1
    assert value(Detections(YOLO), (detections(), detections())) is None
    assert value(Detections(YOLO), (detections(), other)) == 0


def test_one_box_agrees_with_one_only():
    near = moved(CUP, x=17, score=0.6)  # an IoU of 23 / 57 with CUP: none suppresses the other
    between = moved(CUP, x=8)
    assert value(Detections(YOLO), (detections(CUP, near), detections(between))) == pytest.approx(2 / 3)
    assert value(Detections(YOLO), (detections(between), detections(CUP, near))) == pytest.approx(2 / 3)


def test_other_layouts_find_the_same():
    exact, other = detections(CUP, CAT), detections(CUP, moved(CAT, label=0))
    expected = value(Detections(YOLO), (exact, other))
    assert expected == 0.5
    rows = [np.moveaxis(each, 1, 2) for each in (exact, other)]
    assert value(Detections(Layout("y", "y", 2, 4, None, "classes")), rows) == expected
    objects = [np.concatenate([each[..., :4], np.full((1, 12, 1), 0.9), each[..., 4:]], axis=2) for each in rows]
    assert value(Detections(Layout("y", "y", 2, 4, None, "objects")), objects) == expected
    assert value(Detections(Layout("y", "y", 2, 4, None, "objects"), threshold=0.5), objects) == 1  # 0.45 is too little
    labels = [
        np.concatenate(
            [each[..., :4], each[..., 4:].max(axis=2)[..., None], each[..., 4:].argmax(axis=2)[..., None]], axis=2
        )
        for each in rows
    ]
    assert value(Detections(Layout("y", "y", 2, 4, None, "labels")), labels) == expected
    corners = [each.copy() for each in rows]
    for each in corners:
        each[..., :4] = np.concatenate([each[..., :2] - each[..., 2:4] / 2, each[..., :2] + each[..., 2:4] / 2], axis=2)
    assert value(Detections(Layout("y", "y", 2, 4, None, "classes")), corners) == expected


@pytest.mark.parametrize("are_logits", [False, True])
def test_a_background_is_no_object(are_logits):
    boxes = np.moveaxis(detections(CUP, CAT), 1, 2)[..., :4]
    exact, other = (np.full((1, 12, 4), 0.01) for _ in range(2))
    exact[..., 3] = other[..., 3] = 0.97
    exact[0, :2, :3] = [[0.9, 0.01, 0.01], [0.05, 0.5, 0.05]]
    exact[0, :2, 3] = 0.08, 0.4
    metric = Detections(Layout("b", "s", 2, 0, None, "classes"))
    for each in (exact, other):
        given = [{"b": boxes, "s": np.log(values) if are_logits else values} for values in (exact, each)]
        metric.add(*given, 1)
    assert metric.value == pytest.approx(2 * 2 / (2 * 2 + 2))


@pytest.mark.parametrize(("count", "f1"), [(6, 2 * 2 / (7 + 2)), (7, 1)])
def test_a_background_is_the_class_of_most_boxes(count, f1):
    many = [(100 * (index + 2), 300, 40, 40, 2, 0.9) for index in range(count)]
    both = [np.moveaxis(detections(CUP, *found), 1, 2) for found in (many, many[:1])]
    given = [{"b": each[..., :4], "s": each[..., 4:]} for each in both]
    metric = Detections(Layout("b", "s", 2, 0, None, "classes"))
    metric.add(*given, 1)
    assert metric.value == pytest.approx(f1)


def test_a_fresh_metric_has_no_batches():
    for metric, exact in ((TopOne("y", 3), [[1, 0, 0]]), (Detections(YOLO, 0.3), detections(CUP))):
        unused = metric.fresh()
        assert value(metric, (exact, exact)) == 1
        assert metric.fresh() == unused != metric
        assert metric.fresh().value is None


def test_a_function_of_ones_own():
    def largest_error(exact, other):
        return np.abs(exact["y"] - other["y"]).max()

    metric = OwnMetric(largest_error)
    assert metric.name == "largest_error"
    assert value(metric, ([[1], [2]], [[1], [1]]), ([[5]], [[9]])) == (2 * 1 + 4) / 3
    assert metric.fresh().value is None


class Largest:
    def __init__(self):
        self.largest = 0

    def add(self, exact, other):
        self.largest = max(self.largest, np.abs(exact["y"] - other["y"]).max())

    def value(self):
        return self.largest


def test_a_class_of_ones_own():
    metric = OwnMetric(Largest)
    assert metric.value is None
    assert value(metric, ([[1], [2]], [[1], [1]]), ([[5]], [[9]])) == 4
    assert value(metric.fresh(), ([[1]], [[1]])) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda exact, other: exact["z"], "metric <lambda> failed: KeyError: 'z'; correct it"),
        (lambda exact, other: "much", "metric <lambda> returned 'much'; it must return a number"),
        (lambda exact, other: float("nan"), "metric <lambda> returned nan; it must return a finite number"),
    ],
)
def test_a_function_that_fails(function, message):
    with pytest.raises(FastcalError, match=re.escape(message)):
        value(OwnMetric(function), ([[1]], [[1]]))


def test_a_metric_from_a_file_or_module(tmp_path, monkeypatch):
    dataclass = "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: int = 1\n"
    (tmp_path / "own_metrics.py").write_text(f"{dataclass}def one(exact, other):\n    return 1")
    metric = load_metric(f"{tmp_path}/own_metrics.py:one")
    assert value(metric, ([[1]], [[2]])) == 1
    monkeypatch.syspath_prepend(tmp_path)
    assert load_metric("own_metrics:one").name == "one"
    (tmp_path / "broken.py").write_text("1 / 0")
    for place, message in (
        ("one", "metric 'one' is no function; write file.py:name or module:name"),
        ("no.py:one", "cannot load metric no.py:one: FileNotFoundError: no such file: no.py; write"),
        (f"{tmp_path}/broken.py:one", "broken.py:one: ZeroDivisionError: division by zero; write"),
        ("own_metrics:two", "cannot load metric own_metrics:two: AttributeError: "),
        ("own_metrics:__doc__", "metric own_metrics:__doc__ is of type NoneType; it must be a function or a class"),
    ):
        with pytest.raises(FastcalError, match=re.escape(message)):
            load_metric(place)
