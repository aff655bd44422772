"""The tensors that TensorRT's parser adds, observed with ONNX Runtime: as TensorRT for RTX parses networks."""

from dataclasses import replace

import numpy as np
import pytest

import fastcal
from fastcal.algorithm import Algorithm
from fastcal.definition import Definition
from fastcal.model import Model

pytest.importorskip("tensorrt_rtx")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


@pytest.fixture
def parse(rtx):
    """A function that returns an ONNX file's `Model`, and its `Definition` by NVIDIA's parser."""
    from fastcal.network import Logger
    from fastcal.network import parse as parse_with

    held = []

    def parse(path):
        logger = Logger()
        builder = rtx.Builder(logger)
        held.extend([logger, builder])
        model = Model(path)
        return model, Definition(parse_with(builder, model, logger))

    return parse


def minmax_scales(parse, path, batches):
    """Return the scales of a calibration of what `parse` makes of a file."""
    from fastcal.calibration import Calibration
    from fastcal.observe.backends import OnnxRuntimeBackend
    from fastcal.observe.parsed import Parsed, ParsedBackend

    model, definition = parse(path)
    backend = ParsedBackend(Parsed(definition, model), OnnxRuntimeBackend())
    with fastcal.ArrayFeed(batches, model.input_names, device="cpu") as feed:
        return Calibration(feed, Algorithm.of("minmax"), definition, backend, "10.3.0").run().scales


def amaxes(parse, path, batches):
    """Return the largest |x| of every tensor that TensorRT asks for, as `ParsedBackend` observes them."""
    from fastcal.network import float_names
    from fastcal.observe.backends import OnnxRuntimeBackend
    from fastcal.observe.parsed import Parsed, ParsedBackend

    model, definition = parse(path)
    parsed = Parsed(definition, model)
    assert parsed.unknown == []
    with fastcal.ArrayFeed(batches, model.input_names, device="cpu") as feed:
        observed = ParsedBackend(parsed, OnnxRuntimeBackend()).observe(definition, feed, lambda state: None)
    asked = float_names(definition.raw)
    assert set(asked) <= observed.histograms.keys()
    assert observed.network == definition.label
    scales = Algorithm.of("minmax").scales(observed)
    assert set(asked) <= scales.keys()
    return {name: observed.histograms[name].amax for name in asked}


def test_a_gemms_product_is_seen_apart_from_its_sum(onnx_file, parse):
    values = {"w": normal(3, 8), "c": 10 * normal(3, seed=1)}
    path = onnx_file(
        "f (float[4, 8] x) => (float[4, 3] y) { r = Relu(x) g = Gemm<transB = 1>(r, w, c) y = Sigmoid(g) }", values
    )
    batches = [{"x": normal(4, 8, seed=seed)} for seed in range(3)]
    found = amaxes(parse, path, batches)
    products = [np.maximum(batch["x"], 0) @ values["w"].T for batch in batches]
    product = max(float(abs(array).max()) for array in products)
    total = max(float(abs(array + values["c"]).max()) for array in products)
    named = {"x", "r", "g", "y"}
    others = sorted(amax for name, amax in found.items() if name not in named)
    largest = {name: float(abs(array).max()) for name, array in values.items()}
    assert found["g"] == pytest.approx(total, rel=1e-5)
    # the weights, the constant as it is and as a row, and the product
    assert others == pytest.approx(sorted([largest["w"], largest["c"], largest["c"], product]), rel=1e-5)


def test_a_gemm_with_factors_has_its_product_and_the_multiple(onnx_file, parse):
    values = {"w": normal(8, 3), "c": normal(3, seed=1)}
    path = onnx_file("f (float[4, 8] x) => (float[4, 3] g) { g = Gemm<alpha = 0.25>(x, w, c) }", values)
    batches = [{"x": normal(4, 8)}]
    found = amaxes(parse, path, batches)
    product = float(abs(batches[0]["x"] @ values["w"]).max())
    others = [amax for name, amax in found.items() if name not in ("x", "g")]
    assert sum(amax == pytest.approx(product, rel=1e-5) for amax in others) == 1
    assert sum(amax == pytest.approx(product / 4, rel=1e-5) for amax in others) == 1


def test_the_factor_within_a_hard_swish(onnx_file, parse):
    path = onnx_file("f (float[4, 8] x) => (float[4, 8] y) { y = HardSwish(x) }")
    batches = [{"x": normal(4, 8)}]
    found = amaxes(parse, path, batches)
    factor = float(np.clip(batches[0]["x"] / 6 + 0.5, 0, 1).max())
    assert sorted(found.values()) == pytest.approx(
        sorted([float(abs(batches[0]["x"]).max()), found["y"], factor]), rel=1e-5
    )


def test_what_is_only_moved_has_the_values_of_its_source(onnx_file, parse):
    path = onnx_file(
        """f (float[2, 2, 8] x) => (float[2, 3, 5] y)
        { c = Conv(x, w) r = Relu(c) y = MaxPool<kernel_shape = [2]>(r) }""",
        {"w": normal(3, 2, 3)},
    )
    found = amaxes(parse, path, [{"x": normal(2, 2, 8, seed=seed)} for seed in range(2)])
    # x and c with a dimension more, r with one more, y with one more
    assert sorted(found.values()) == pytest.approx(sorted([found[name] for name in "xcry"] * 2), rel=1e-6)


def test_a_pooling_layers_output_shares_its_inputs_scale(onnx_file, parse):
    from fastcal.observe.parsed import Parsed

    graph = (
        "f (float[1, 2, 8, 8] x) => (float[1, 2, 4, 4] y) { y = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(x) }"
    )
    path = onnx_file(graph)
    found = amaxes(parse, path, [{"x": normal(1, 2, 8, 8)}])
    assert found["y"] < found["x"]
    model, definition = parse(path)
    assert Parsed(definition, model).shared_scales == {"y": "x"}
    assert minmax_scales(parse, path, [{"x": normal(1, 2, 8, 8)}])["y"] == pytest.approx(found["x"] / 127)


def test_known_ranges_are_those_of_the_file(onnx_file, parse):
    """Scores behind a Sigmoid within the network, and the parser's own tensors with their values, are not clipped."""
    from fastcal.calibration import Calibration
    from fastcal.feed.arrays import ArrayFeed
    from fastcal.observe.backends import OnnxRuntimeBackend
    from fastcal.observe.parsed import Parsed, ParsedBackend

    path = onnx_file(
        "f (float[4, 2, 8] x) => (float[4, 3, 3] y) { s = Sigmoid(x) y = Conv(s, w) }", {"w": normal(3, 2, 6)}
    )
    model, definition = parse(path)
    parsed = Parsed(definition, model)
    (moved,) = (name for name, source in parsed.copies.items() if source == "s")
    backend = ParsedBackend(parsed, OnnxRuntimeBackend())
    assert definition.least_thresholds == {"y": 0.0}  # TensorRT's network alone tells no more
    assert replace(definition, file=model).least_thresholds == {"y": 0.0, "s": 1.0}
    with ArrayFeed([{"x": normal(4, 2, 8) - 4}], model=model) as feed:
        for keeps_ranges in (True, False):
            algorithm = Algorithm("percentile", 0.9, keeps_ranges=keeps_ranges)
            calibration = Calibration(feed, algorithm, replace(definition, file=model), backend, "10.3.0")
            cache = calibration.run()
            whole = {"s": 1, moved: 1, "y": cache.observed.histograms["y"].amax}
            kept = {cache.scales[name] == np.float32(amax) / np.float32(127) for name, amax in whole.items()}
            assert kept == {keeps_ranges}


def test_a_network_without_counterparts_is_told(onnx_file, parse):
    from fastcal.observe.parsed import Parsed

    path = onnx_file(
        """f (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y)
        { a = LogSoftmax<axis = 1>(x) y = Relu(a) }"""
    )
    model, definition = parse(path)
    unknown = Parsed(definition, model).unknown
    assert len(unknown) >= 1
    assert not {"x", "a", "y"} & set(unknown)


def test_another_file_than_the_network_was_parsed_from_lacks_tensors(onnx_file, parse):
    from fastcal.observe.parsed import Parsed

    _, definition = parse(onnx_file("f (float[4, 8] x) => (float[4, 8] y) { r = Relu(x) t = Cos(r) y = Tanh(t) }"))
    other = Model(onnx_file("f (float[4, 8] x) => (float[4, 8] y) { y = Tanh(x) }", name="other.onnx"))
    assert Parsed(definition, other).unknown == ["t"]


def test_constants_are_counted_without_numba_too(monkeypatch):
    from fastcal.observe.histogram import Histogram

    values = np.concatenate([normal(5000), [0, 3, -3, 1e-30]]).astype("f4")
    counted, without = Histogram(), Histogram()
    counted.update(values)
    monkeypatch.setitem(__import__("sys").modules, "fastcal.observe.count", None)
    monkeypatch.delattr("fastcal.observe.count", raising=False)
    without.update(values)
    assert without.counts.tolist() == counted.counts.tolist()
    assert (without.range, without.amax, without.clamped) == (counted.range, counted.amax, counted.clamped)


def test_scales_of_a_file_are_completed(parse, onnx_file):
    from fastcal.network import float_names
    from fastcal.observe.parsed import completed_scales

    path = onnx_file(
        "f (float[4, 8] x) => (float[4, 3] y) { r = Relu(x) g = Gemm<transB = 1>(r, w, c) y = Tanh(g) }",
        {"w": 2 * np.eye(3, 8, dtype="f4"), "c": np.zeros(3, "f4")},
    )
    model, definition = parse(path)
    scales = completed_scales(definition.raw, {"x": 0.5, "g": 0.25, "y": 0.125}, model)
    added = {name: scales[name] for name in float_names(definition.raw) if name in scales and name not in "xgy"}
    assert set(float_names(definition.raw)) - scales.keys() == {"r"}  # no tensor of the file gets one
    assert sorted(set(added.values())) == [0.0, pytest.approx(2 / 127), 0.25]
