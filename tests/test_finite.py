"""Values at the ends of what float32 holds, and values that are not finite: scales, verdicts, reports and checks."""

import json
import logging
import math
import struct

import numpy as np
import pytest

import fastcal
from fastcal.algorithm import ALGORITHMS, Algorithm, fault_of_scale
from fastcal.errors import CacheError, ModelError
from fastcal.observe.histogram import Histogram
from fastcal.report.plots import draw_histogram

LARGEST, SMALLEST = np.finfo(np.float32).max, np.float32(1e-45)

LINEAR = "f (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"
WEIGHTS = {"w": np.random.default_rng(0).standard_normal((4, 3), dtype="f4")}

#: A detector whose padding is set to the lowest number before the maximum is taken.
MASKED = """f (float[N, 4] x, float[N, 3] lowest) => (float[N, 3] y) {
  s = MatMul(x, w)
  masked = Min(s, lowest)
  e = Softmax(masked)
  y = MatMul(e, v)
}"""


def masked_batches():
    random = np.random.default_rng(1)
    lowest = np.full((2, 3), LARGEST)
    lowest[1, 2] = -LARGEST
    return [{"x": random.standard_normal((2, 4), dtype="f4"), "lowest": lowest} for _ in range(3)]


@pytest.fixture
def masked(onnx_file):
    return onnx_file(MASKED, WEIGHTS | {"v": np.eye(3, dtype="f4")})


def calibrate(*arguments, **options):
    return fastcal.calibrate(*arguments, backend="onnxruntime", **options)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "best"])
@pytest.mark.parametrize(
    "batches",
    [
        [[1, LARGEST]],
        [[LARGEST, -LARGEST]],
        [[0.7 * LARGEST], [LARGEST]],  # the range doubles beyond what float32 holds
        [[SMALLEST], [LARGEST]],
        [[1, np.inf, np.nan], [-np.inf, LARGEST]],
    ],
)
def test_every_scale_is_finite(algorithm, batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(np.float32(batch))
    scale = Algorithm(algorithm).pick(histogram)
    assert 0 < scale <= LARGEST / np.float32(127)
    assert np.float32(scale) == scale
    if algorithm != "percentile":
        assert scale >= 0.9 * LARGEST / 127


def test_a_float64_beyond_float32_counts_as_infinite():
    histogram = Histogram()
    histogram.update(np.array([1e300, -1e39, 2.0]))
    assert (histogram.inf, histogram.amax) == (2, 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_mask_of_the_lowest_number_leaves_all_else_working(masked, tmp_path, caplog, algorithm):
    cache = calibrate(masked, masked_batches(), algorithm=algorithm)
    assert all(math.isfinite(scale) for scale in cache.scales.values())
    (warning,) = caplog.messages
    assert "INT8 keeps nothing but the extreme values of lowest (3.4e+38), masked (3.4e+38): if these" in warning
    assert "clamp it in the network" in warning
    cache.save(tmp_path / "c.json", form="json")
    fastcal.write_report(cache, tmp_path / "r.html")
    assert fastcal.CalibrationCache.load(tmp_path / "c.json").scales == cache.scales
    assert set(fastcal.check_cache(cache, masked).invalid) == {
        f"{name} ({cache.scales[name]:g}, absurdly large)" for name in ("lowest", "masked")
    }


def test_a_mask_of_the_lowest_number_is_compared(masked):
    result = fastcal.compare(masked, masked_batches())
    for quality in result.qualities.values():
        assert math.isfinite(quality.sqnr)
        assert quality.tensors["masked"].sqnr > 0
    json.dumps(result.as_json(), allow_nan=False)


def test_differences_beyond_float32_are_compared(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { m = MatMul(x, w) y = Mul(m, huge) }", {
        "w": np.float32([[1, 0.3], [0.4, 1]]), "huge": np.float32([1e38])})  # fmt: skip
    x = np.random.default_rng(0).uniform(-1, 1, (64, 2)).astype("f4")
    for label, sqnr in ((label, each.sqnr) for label, each in fastcal.compare(path, [x]).qualities.items()):
        assert 10 < sqnr < 60, label


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_without_a_finite_value_is_named(onnx_file, caplog, value):
    path = onnx_file("f (float[N, 2] a, float[N, 2] b) => (float[N, 2] y) { y = Add(a, b) }")
    batch = {"a": np.ones((2, 2), "f4"), "b": np.full((2, 2), value, "f4")}
    assert calibrate(path, [batch] * 2, algorithm="minmax").scales == {"a": 1 / np.float32(127), "b": 0, "y": 0}
    assert caplog.messages[0] == (
        f"the batches hold nothing but NaN or infinite values for input 'b' of {path}, so its scale is 0: check what "
        "reads and prepares them"
    )
    assert caplog.messages[1].startswith("left NaN and Inf out of the histograms of b (")
    caplog.clear()
    calibrate(path, [batch, batch | {"b": np.ones((2, 2), "f4")}])
    assert len(caplog.messages) == 1


def test_an_input_that_is_always_0_is_named(onnx_file, caplog):
    path = onnx_file("f (float[N, 2] a, float[N, 2] b, int64[N, 2] c) => (float[N, 2] y) { y = Add(a, b) z = Neg(c) }")
    batch = {"a": np.ones((2, 2), "f4"), "b": np.zeros((2, 2), "f4"), "c": np.zeros((2, 2), "i8")}
    assert calibrate(path, [batch]).scales["b"] == 0
    (message,) = caplog.messages
    assert message.startswith("the batches hold nothing but 0 for input 'b' of ")
    caplog.clear()
    calibrate(path, [batch, batch | {"b": np.float32([[0, 0], [0, 1e-3]])}])
    assert caplog.messages == []


def test_no_verdict_on_an_output_that_is_nan(onnx_file):
    path = onnx_file("f (float[N, 4] x) => (float[N, 3] y) { m = MatMul(x, w) n = Sub(x, x) l = Log(n) s = "
                     "ReduceSum<keepdims = 1>(l) z = Sub(s, s) y = Add(m, z) }", WEIGHTS)  # fmt: skip
    x = np.random.default_rng(0).standard_normal((5, 4), dtype="f4")
    with pytest.raises(ModelError, match=r"model.onnx gives nothing but NaN .* in FP32 \(output 'y'\), so INT8 cannot"):
        fastcal.compare(path, [x])


def test_what_is_nan_in_float_is_left_out_of_the_comparison(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 4] x) => (float[N, 3] y, float[N, 4] r) { y = MatMul(x, w) q = Sub(x, x) r = Div(q, q) }", WEIGHTS
    )
    x = np.random.default_rng(0).standard_normal((5, 4), dtype="f4")
    result = fastcal.compare(path, [x])
    for quality in result.qualities.values():
        assert list(quality.outputs) == ["y"]
        assert math.isfinite(quality.sqnr)
    assert "NaN and infinite values of FP32's outputs are not compared: r (20 of 20 values)" in caplog.messages


def test_samples_whose_output_is_nan_have_no_class(onnx_file):
    path = onnx_file("f (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", WEIGHTS)
    x = np.random.default_rng(0).standard_normal((6, 4), dtype="f4")
    x[:3, 0] = np.nan
    first = fastcal.compare(path, [x]).qualities["minmax"].agreement
    assert first == fastcal.compare(path, [x[3:]]).qualities["minmax"].agreement


@pytest.mark.parametrize("divided", ["one", "m"])  # 1 / 0 is infinite, 0 / 0 is NaN
def test_an_output_that_int8_makes_infinite(onnx_file, divided):
    graph = f"f (float[N, 2] x) => (float[N, 2] y) {{ m = MatMul(x, w) y = Div({divided}, m) }}"
    path = onnx_file(graph, {"w": np.eye(2, dtype="f4"), "one": np.float32([1])})
    result = fastcal.compare(path, [np.float32([[127, 0.01]])])  # 0.01 becomes 0
    assert result.qualities["minmax"].sqnr == -math.inf
    assert result.verdict.startswith("no scales keep anything: in INT8 the output is NaN or infinite")
    json.dumps(result.as_json(), allow_nan=False)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -0.01, 1e-42, 3e38])
def test_a_cache_with_such_a_scale_is_compared_without_it(onnx_file, scale):
    path = onnx_file("f (float[N, 4] x) => (float[N, 3] y) { m = MatMul(x, w) y = MatMul(m, v) }", WEIGHTS | {
        "v": np.eye(3, dtype="f4")})  # fmt: skip
    x = np.random.default_rng(0).standard_normal((5, 4), dtype="f4")
    cache = calibrate(path, [x])
    cache.scales["x"] = scale
    result = fastcal.compare(path, [x], caches={"broken": cache})
    assert f"its scale of input 'x' is {fault_of_scale(scale)}" in result.verdict
    assert math.isfinite(result.qualities["broken"].sqnr)
    assert (result.qualities["broken"].tensors["x"].sqnr is None) == (not 0 < scale < math.inf)
    json.dumps(result.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("scale", "fault"),
    [
        (math.nan, "NaN"),
        (-math.inf, "infinite"),
        (-1e-9, "negative"),
        (0.0, "0"),
        (1e-36, "1e-36, absurdly small"),
        (1e31, "1e+31, absurdly large"),
        (1e-29, ""),
        (1e29, ""),
    ],
)
def test_scales_of_no_use(onnx_file, scale, fault):
    path = onnx_file(LINEAR, WEIGHTS)
    found = fastcal.check_cache(fastcal.CalibrationCache({"x": scale, "y": 0.1}), path)
    assert found.invalid == ((f"x ({fault})",) if fault else ())
    assert bool(found) == bool(fault)
    assert (found.missing, found.unknown) == ((), ())


def test_a_constant_may_have_scale_0_but_no_other(onnx_file):
    path = onnx_file(LINEAR, WEIGHTS)
    scales = {"x": 0.1, "y": 0.1, "w": 0.0, "(Unnamed Layer* 3) [Constant]_output": 0.0}
    assert not fastcal.check_cache(fastcal.CalibrationCache(scales), path)
    assert fastcal.check_cache(fastcal.CalibrationCache(scales | {"w": math.nan}), path).invalid == ("w (NaN)",)


TWICE = {
    "c.cache": "TRT-8601-MinMaxCalibration\nx: 3c010a14\ny: 3c010a14\nx: 3c010a15\n",
    "c.json": '{"scales": {"x": 1, "y": 0.0078740157186985016, "x": 0.007875938899815083}}',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_that_is_given_twice(run_fastcal, onnx_file, tmp_path, caplog, name):
    path = onnx_file(LINEAR, WEIGHTS)
    (tmp_path / name).write_text(TWICE[name])
    done = run_fastcal("cache", "check", tmp_path / name, path)
    assert done.returncode == 1
    assert "invalid    x (given twice)\n" in done.stdout
    caplog.clear()
    cache = fastcal.CalibrationCache.load(tmp_path / name)
    assert cache.scales["x"] == struct.unpack(">f", bytes.fromhex("3c010a15"))[0]
    assert caplog.messages == [f"{tmp_path / name} gives x more than one scale: the last one counts here"]


def test_a_cache_with_a_broken_scale_is_not_written_or_used_again(onnx_file, tmp_path):
    for form in ("tensorrt", "json"):
        for scale in (math.nan, math.inf, -1.0):
            with pytest.raises(CacheError, match=r"the scale of 'x' is .*; it must be a finite number from 0 on"):
                fastcal.CalibrationCache({"x": scale}).save(tmp_path / "c.cache", form=form)
    assert list(tmp_path.glob("c.cache*")) == []
    from fastcal.calibration import Calibration
    from fastcal.feed.arrays import as_feed
    from fastcal.model import Model
    from fastcal.observe.backends import OnnxRuntimeBackend

    model = Model(onnx_file(LINEAR, WEIGHTS))
    with as_feed([np.ones((1, 4), "f4")], model, "cpu") as feed:
        calibration = Calibration(feed, Algorithm(), model, OnnxRuntimeBackend(), "10.3.0")
        for hexadecimal, reason in (
            ("7f800000", "the scale of x is infinite"),
            ("1", "the scale of x is 1.4013e-45, absurdly small"),
            ("0", "nothing tells what it was made from"),
        ):
            (tmp_path / "c.cache").write_text(f"{calibration.header}\nx: {hexadecimal}\n")
            found, why = calibration.reuse(tmp_path / "c.cache")
            assert found is None
            assert reason in why


def test_a_layer_with_an_absurd_scale_stays_in_float(onnx_file, caplog):
    path = onnx_file("f (float[N, 4] x) => (float[N, 4] y) { [a] m = MatMul(x, w) [b] y = MatMul(m, w) }", {
        "w": np.eye(4, dtype="f4")})  # fmt: skip
    fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "m": 2e36}))
    assert caplog.record_tuples == [
        ("fastcal", logging.WARNING, "layers that stay in float: b (the scale of m is 2e+36)")
    ]


@pytest.mark.parametrize("values", [[0], [SMALLEST], [LARGEST, 1], [1, 2]])
@pytest.mark.parametrize("threshold", [0, 0.5, float(LARGEST)])
def test_histograms_of_any_size_are_drawn(values, threshold):
    histogram = Histogram()
    histogram.update(np.float32(values))
    assert draw_histogram(histogram, threshold).startswith("<svg ")
