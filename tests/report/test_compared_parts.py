"""The comparison of a detector whose boxes and scores share an output: large boxes do not hide the scores."""

import math

import numpy as np
import pytest

import fastcal
from fastcal.cache.cache import CalibrationCache

DETECTOR = """f (float[N, 3, 8, 8] x) => (float[N, 9, 64] y) {
  fb = Conv(x, wfb) rb = Relu(fb) cb = Conv(rb, wb) ab = Abs(cb) pixels = Mul(ab, stride) boxes = Reshape(pixels, flatb)
  fs = Conv(x, wfs) rs = Relu(fs) cs = Conv(rs, ws) logits = Sub(cs, three) scores = Sigmoid(logits)
  flat = Reshape(scores, flats)
  y = Concat<axis = 1>(boxes, flat)
}"""


@pytest.fixture
def detector(onnx_file):
    random = np.random.default_rng(3)
    shapes = {"wfb": (8, 3, 1, 1), "wb": (4, 8, 1, 1), "wfs": (8, 3, 1, 1), "ws": (5, 8, 1, 1)}
    weights = {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    weights["ws"] *= np.float32(0.3)  # no class is sure or silent
    sizes = {"flatb": np.array([0, 4, -1]), "flats": np.array([0, 5, -1])}
    return onnx_file(DETECTOR, weights | sizes | {"stride": np.float32(64), "three": np.float32(3)})


@pytest.fixture
def images():
    return [{"x": np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype("f4")} for seed in range(2)]


@pytest.fixture
def caches(detector, images):
    """A cache that clips what the scores are made from, and one that rounds what the boxes are made from coarsely."""
    scales = fastcal.calibrate(detector, images, backend="onnxruntime", algorithm="minmax").scales
    return {
        "scores": CalibrationCache(scales | {"rs": scales["rs"] / 20}),
        "boxes": CalibrationCache(scales | {"rb": scales["rb"] * 4}),
    }


def test_the_scores_decide(detector, images, caches):
    result = fastcal.compare(detector, images, caches=caches)
    scores, boxes = (result.qualities[name] for name in ("scores", "boxes"))
    assert scores.outputs["y"] > boxes.outputs["y"] + 10  # as a whole, the scores do not count
    assert [*scores.parts] == ["y[:, 0:4]", "y[:, 4:]"]
    assert (scores.worst_part, boxes.worst_part) == ("y[:, 4:]", "y[:, 0:4]")
    assert scores.sqnr == scores.parts["y[:, 4:]"] < boxes.sqnr - 5
    assert result.metric == "boxes' F1"
    assert scores.metric < boxes.metric < 1
    assert result.best not in caches
    most = result.qualities[result.best]
    assert result.verdict.startswith(
        f"scores loses {most.sqnr - scores.sqnr:.1f} dB against {result.best}; "
        f"boxes loses {most.sqnr - boxes.sqnr:.1f} dB against {result.best}; "
        f"{result.best} keeps most: {most.sqnr:.1f} dB at {most.worst_part} and boxes' F1 {most.metric:.4g}"
    )


def test_channels_belong_to_a_part(detector, images, caches):
    quality = fastcal.compare(detector, images, caches=caches).qualities["scores"]
    assert [*quality.channels] == [f"y[:, {channel}]" for channel in range(9)]
    by_channel = [quality.channels[f"y[:, {channel}]"] for channel in range(9)]
    assert max(by_channel[4:]) < min(by_channel[:4])


def test_a_quantized_model_has_parts_and_no_tensors(detector, images, caches, tmp_path):
    import onnx

    onnx.save(fastcal.quantize(detector, caches["scores"]), tmp_path / "theirs.onnx")
    result = fastcal.compare(detector, images, caches=caches, quantized={"theirs": tmp_path / "theirs.onnx"})
    theirs, ours = result.qualities["theirs"], result.qualities["scores"]
    assert (theirs.outputs, theirs.parts, theirs.channels) == (ours.outputs, ours.parts, ours.channels)
    assert (theirs.metric, theirs.tensors, theirs.median_sqnr) == (ours.metric, {}, None)
    assert "theirs loses" in result.verdict


def test_all_of_a_metrics_settings_reach_it(detector, images):
    found = fastcal.compare(detector, images, threshold=0.9999)
    assert {quality.metric for quality in found.qualities.values()} == {None}  # no box has such a score
    seen = []

    def largest(exact, int8):
        seen.append((exact["y"].shape, int8["y"].shape))
        return np.abs(exact["y"] - int8["y"]).max()

    found = fastcal.compare(detector, images, metric=largest)
    assert found.metric == "largest"
    assert seen == [((4, 9, 64), (4, 9, 64))] * 8  # two batches, four algorithms
    assert all(0 < quality.metric < math.inf for quality in found.qualities.values())
    cosine = fastcal.compare(detector, images, metric=f"{__file__}:Cosine")
    assert cosine.metric == "Cosine"
    assert 0.9 < cosine.qualities["minmax"].metric < 1


class Cosine:
    """The cosine over all batches together."""

    def __init__(self):
        self.products = np.zeros(3)

    def add(self, exact, int8):
        one, two = (np.asarray(each["y"], np.float64).ravel() for each in (exact, int8))
        self.products += one @ two, one @ one, two @ two

    def value(self):
        return self.products[0] / np.sqrt(self.products[1] * self.products[2])
