"""Caches for the DLA: which scales become equal, and which layers are named."""

import json
import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DIGITS
from fastcal.errors import CacheError

#: A residual block, a Concat of its end and of a pooled tensor, a Sigmoid.
BLOCK = """f (float[1, 4, 8, 8] x) => (float[1, 8, 4, 4] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w)
  b = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(b, w)
  d = Add(c, b)
  e = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
  f = Conv<pads = [1, 1, 1, 1]>(e, w)
  g = Mul(f, half)
  h = Concat<axis = 1>(g, e)
  y = Sigmoid(h)
}"""


@pytest.fixture
def block(onnx_file):
    weights = np.random.default_rng(0).standard_normal((4, 4, 3, 3), dtype="f4")
    return onnx_file(BLOCK, {"w": weights, "half": np.full((1, 4, 1, 1), 0.5, "f4")})


def cache_of(**scales):
    return fastcal.CalibrationCache({name: float(np.float32(scale)) for name, scale in scales.items()})


SCALES = {"x": 1, "a": 9, "b": 2, "c": 3, "d": 5, "e": 4, "f": 6, "g": 7, "h": 8, "y": 0.1}


def test_scales_that_must_be_equal(block):
    cache = replace(cache_of(**SCALES), record=fastcal.Record({"model": "m"}))
    changed = fastcal.for_dla(block, cache)
    # Both inputs of the Add; the pooling, which shares its output with the Concat.
    expected = SCALES | dict.fromkeys("bc", 3) | dict.fromkeys("degh", 8)
    assert changed.scales == cache_of(**expected).scales
    assert list(changed.scales) == list(cache.scales)
    assert changed.header == cache.header
    assert changed.record.entries == {"model": "m", "target": "dla"}
    assert cache.scales == cache_of(**SCALES).scales
    assert fastcal.for_dla(block, changed) == changed


def test_what_the_dla_lacks_is_named(block, caplog):
    scales = {name: scale for name, scale in SCALES.items() if name != "f"} | {"x": 0}
    with caplog.at_level(logging.WARNING, "fastcal"):
        changed = fastcal.for_dla(block, cache_of(**scales))
    assert "f" not in changed.scales
    assert caplog.messages == [
        "the DLA does not run 1 layer in INT8: a Sigmoid runs in FP16 (y)",
        "the DLA does not run in INT8 what touches x, f: no scale, or 0",
    ]


def test_layers_are_named_by_the_reason(onnx_file, caplog):
    layers = "a = Sigmoid(x) b = Erf(a) c = Sigmoid(b) d = Erf(c) y = Sigmoid(d)"
    path = onnx_file(f"f (float[1, 4] x) => (float[1, 4] y) {{ {layers} }}")
    with caplog.at_level(logging.WARNING, "fastcal"):
        fastcal.for_dla(path, cache_of())
    assert caplog.messages == [
        "the DLA does not run 5 layers in INT8: "
        "a Sigmoid runs in FP16 (a, c and 1 more); there is no Erf on the DLA (b, d)"
    ]


def test_a_layer_that_does_not_run_there_needs_no_equal_scales(onnx_file):
    path = onnx_file(
        "f (float[1, 4, 8, 8] a, float[1, 4, 8, 8] b) => (float[1, 4, 16, 8] y) { y = Concat<axis = 2>(a, b) }"
    )
    assert fastcal.for_dla(path, cache_of(a=1, b=2, y=3)).scales == {"a": 1, "b": 2, "y": 3}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("Softmax(x)", "a Softmax runs in FP16"),
        ("HardSwish(x)", "there is no HardSwish on the DLA"),
        ("GlobalAveragePool(x)", "there is no GlobalAveragePool on the DLA"),
        ("Conv(x, z)", "its second input, z, is no constant"),
        ("Conv<strides = [9, 1]>(x, w)", "its strides has 9, not 1 to 8"),
        ("Conv<strides = [8, 1]>(x, w)", ""),
        ("Conv<dilations = [1, 33], pads = [31, 31, 31, 31]>(x, w)", "its dilations has 33, not 1 to 32"),
        ("Conv<pads = [32, 1, 1, 1]>(x, w)", "its pads has 32, not 0 to 31"),
        ("ConvTranspose<group = 2>(x, w2)", "its group has 2, not 1 to 1"),
        ("ConvTranspose(x, w)", ""),
        ("ConvTranspose<pads = [1, 1, 1, 1]>(x, w)", "its pads has 1, not 0 to 0"),
        ("MaxPool<kernel_shape = [9, 3]>(x)", "its kernel_shape has 9, not 1 to 8"),
        ("AveragePool<kernel_shape = [8, 3]>(x)", ""),
        ("Concat<axis = 1>(x, x)", ""),
        ("Concat<axis = -1>(x, x)", "it is along axis -1, not along the channels"),
        ("Relu(x)", ""),
        ("Identity(x)", ""),
        ("PRelu(x, z)", "its second input, z, is no constant"),
        ("MatMul(x, z)", "its second input, z, is no constant"),
    ],
)
def test_layers_that_the_dla_does_not_run_in_int8(onnx_file, layer, reason):
    graph = f"f (float[1, 4, 32, 32] x, float[4, 4, 3, 3] z) => (float[A, B, C, D] y) {{ [layer] y = {layer} }}"
    path = onnx_file(graph, {"w": np.ones((4, 4, 3, 3), "f4"), "w2": np.ones((4, 2, 3, 3), "f4")})
    assert fastcal.unfit_for_dla(path) == ({"layer": reason} if reason else {})


@pytest.mark.parametrize(
    ("dims", "kernel", "output"), [("16", "[3]", "A, B, C"), ("8, 8, 8", "[3, 3, 3]", "A, B, C, D, E")]
)
def test_other_dimensions(onnx_file, dims, kernel, output):
    graph = f"f (float[1, 4, {dims}] x) => (float[{output}] y) {{ y = MaxPool<kernel_shape = {kernel}>(x) }}"
    count = kernel.count("3")
    assert fastcal.unfit_for_dla(onnx_file(graph)) == {"y": f"it has {count} spatial dimensions, not 2"}


def test_what_computes_shapes_is_no_layer(onnx_file):
    graph = "f (float[1, 4, 8, 8] x) => (float[A, B] y) { s = Shape(x) t = Slice(s, zero, two) y = Reshape(x, t) }"
    assert fastcal.unfit_for_dla(onnx_file(graph, {"zero": np.array([0]), "two": np.array([2])})) == {}


@pytest.mark.parametrize("algorithm", ["entropy", "minmax", "percentile"])
def test_other_headers_are_refused(block, algorithm):
    version = None if algorithm == "percentile" else "8.6.0"
    cache = fastcal.CalibrationCache({}, fastcal.Algorithm(algorithm), version)
    with pytest.raises(CacheError, match=f"the DLA takes caches of Entropy calibration 2 alone, not of {algorithm}"):
        fastcal.for_dla(block, cache)


def test_the_command(run_fastcal, tmp_path):
    words = ("calibrate", DIGITS / "digits.onnx", DIGITS / "images", "--limit", 64)
    done = run_fastcal(*words, "-o", "plain.cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_fastcal(*words, "-o", "dla.cache", "--target", "dla", "--tensorrt", "8.6.1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["unfit_for_dla"] == {}
    plain, changed = (fastcal.CalibrationCache.load(tmp_path / f"{name}.cache") for name in ("plain", "dla"))
    assert changed.header == "TRT-8601-EntropyCalibration2"
    assert changed.scales == fastcal.for_dla(DIGITS / "digits.onnx", plain).scales != plain.scales
    record = json.loads((tmp_path / "dla.cache.json").read_text())["made_from"]
    assert record["target"] == "dla"
    check = run_fastcal(
        "cache", "check", "dla.cache", DIGITS / "digits.onnx", DIGITS / "images", "--limit", 64, cwd=tmp_path
    )
    assert check.returncode == 0, check.stdout
    for options, message in (
        (("--algorithm", "minmax", "--target", "dla"), "the DLA takes caches of Entropy calibration 2 alone"),
        (("--target", "cpu"), "there is no target 'cpu'; choose dla, or leave it out for a GPU"),
    ):
        done = run_fastcal(*words, "-o", "no.cache", *options, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: {message}" in done.stderr
        assert not (tmp_path / "no.cache").exists()


def test_a_cache_is_up_to_date_for_its_target_alone(block, tmp_path, caplog):
    batches = [{"x": np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype="f4")}]
    kept = {"cache": tmp_path / "x.cache", "histograms": tmp_path / "x.npz"}
    found, said = {}, {}
    for run, target in enumerate(("dla", "dla", None, "dla")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastcal"):
            found[run] = fastcal.calibrate(block, fastcal.ArrayFeed(batches), target=target, **kept).scales
        said[run] = [text.replace(str(tmp_path), "") for text in caplog.messages if "reused" in text]
    assert found[0] == found[1] == found[3] != found[2]
    assert found[2] == fastcal.calibrate(block, fastcal.ArrayFeed(batches)).scales
    same = "made from the same model, samples and settings"
    assert said[1] == [f"/x.cache is reused: it was {same}"]
    of_histograms = f"the histograms in /x.npz are reused: they were {same}"
    assert said[2] == ["calibrating: /x.cache is not reused, it was made from other target (dla then)", of_histograms]
    assert said[3] == [
        "calibrating: /x.cache is not reused, it was made from other target (not recorded)",
        of_histograms,
    ]


@pytest.mark.parametrize("make", [fastcal.calibrate, fastcal.extract_scales])
def test_other_targets(block, make):
    with pytest.raises(fastcal.FastcalError, match="there is no target 'cpu'; choose dla, or leave it out for a GPU"):
        make(block, [], target="cpu")


def test_pairs_for_the_dla(run_fastcal, tmp_path, onnx_file):
    graph = (
        "f (float[1, 4, 8, 8] x) => (float[A, B, C, D] y) { a = Conv(x, w) c = Concat<axis = 1>(a, x) y = Conv(c, v) }"
    )
    path = onnx_file(graph, {"w": np.ones((4, 4, 1, 1), "f4"), "v": np.ones((4, 8, 1, 1), "f4")})
    onnx.save(fastcal.quantize(path, cache_of(x=1, a=3, c=2)), tmp_path / "pairs.onnx")
    assert fastcal.extract_scales(tmp_path / "pairs.onnx").cache.scales == {"x": 1, "a": 2, "c": 2}
    done = run_fastcal("cache", "extract", "pairs.onnx", "-o", "x.cache", "--target", "dla", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fastcal.CalibrationCache.load(tmp_path / "x.cache").scales == {"x": 2, "a": 2, "c": 2}
