import json

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DIGITS
from fastcal.errors import CacheError, DataError, FastcalError, ModelError

RANDOM = np.random.default_rng(11)


def fragile_constants():
    """Constants of `FRAGILE`: the second layer's input has one channel of 300 times the others', which it weighs least.

    One scale for all channels rounds the others to next to nothing; any other layer is harmless.
    """
    first, second = RANDOM.standard_normal((8, 3, 1, 1)), RANDOM.standard_normal((8, 8, 1, 1))
    first[3] *= 300
    second[:, 3] /= 3000
    others = RANDOM.standard_normal((16, 8, 5, 5)) / 14, RANDOM.standard_normal((16, 16, 5, 5)) / 20
    head = RANDOM.standard_normal((16, 10)) / 4
    depthwise = RANDOM.standard_normal((16, 1, 3, 3)) / 3
    values = (first, second, *others, depthwise, head)
    return {name: value.astype("f4") for name, value in zip(WEIGHTS, values, strict=True)}


WEIGHTS = ("w1", "w2", "w3", "w4", "w5", "w6")

FRAGILE = """
net (float[N, 3, 12, 12] x) => (float[N, 10] y) {
    a = Conv(x, w1) b = Conv(a, w2) r = Relu(b) c = Conv<pads = [2, 2, 2, 2]>(r, w3)
    d = Conv<pads = [2, 2, 2, 2]>(c, w4)
    e = Conv<group = 16, pads = [1, 1, 1, 1]>(d, w5) g = GlobalAveragePool(e) f = Flatten(g) y = MatMul(f, w6)
}
"""


def batches(count=6, size=16):
    return [{"x": RANDOM.standard_normal((size, 3, 12, 12)).astype("f4")} for _ in range(count)]


@pytest.fixture
def fragile(onnx_file):
    return onnx_file(FRAGILE, fragile_constants())


def quantized_layers(model):
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {node.output[0] for node in model.graph.node if set(node.input[:2]) <= dequantized and len(node.input) > 1}


def run(model, batch):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, batch)[0]


def sqnr(exact, other):
    return 10 * np.log10(np.square(exact, dtype="f8").sum() / np.square(exact - other, dtype="f8").sum())


def test_the_layer_that_costs_most_stays_in_float_and_the_others_run_in_int8(fragile):
    tuning = fastcal.tune(fragile, batches())
    assert [layer.name for layer in tuning.ranking] == ["a", "b", "c", "d", "e", "g", "y"]
    assert max(tuning.ranking, key=lambda layer: layer.noise).name == "b"
    assert "b" in tuning.in_float
    model = fastcal.quantize(fragile, tuning)
    assert quantized_layers(model) == {"a", "b", "c", "d", "e", "y"} - set(tuning.in_float)
    assert {"c", "d"} <= quantized_layers(model)
    batch, exact = batches(1)[0], onnx.load(fragile)
    plain = fastcal.quantize(fragile, tuning.cache)  # the same scales, all in INT8
    assert sqnr(run(exact, batch), run(model, batch)) > sqnr(run(exact, batch), run(plain, batch)) + 6


def test_the_result_is_what_the_model_keeps_on_the_samples_held_out(fragile):
    given = batches()
    tuning = fastcal.tune(fragile, given, curve=True)
    exact, model = onnx.load(fragile), fastcal.quantize(fragile, tuning)
    # A quarter at most, 24 of 96 samples, the last ones of each batch but the last: 4 or 5.
    counts = [24 * (number + 1) // 5 - 24 * number // 5 for number in range(5)]
    held_out = {"x": np.concatenate([batch["x"][16 - count :] for batch, count in zip(given, counts, strict=False)])}
    assert tuning.samples == len(held_out["x"]) == 24
    assert tuning.are_held_out
    assert tuning.result.sqnr == pytest.approx(sqnr(run(exact, held_out), run(model, held_out)), abs=1e-3)
    agreement = np.mean(run(exact, held_out).argmax(1) == run(model, held_out).argmax(1))
    assert (tuning.metric, tuning.result.metric) == ("top-1", pytest.approx(agreement))
    work = {layer.name: layer.multiply_adds for layer in tuning.ranking}
    share = sum(work[name] for name in work if name not in tuning.in_float) / sum(work.values())
    assert tuning.result.int8_share == pytest.approx(share)
    assert share >= 0.85


def test_the_calibration_does_not_see_what_is_held_out(fragile):
    given = batches()
    for batch in given[:5]:
        batch["x"][-1] = 1000.0  # the last sample of each batch but the last is held out
    scales = fastcal.tune(fragile, given, algorithm="minmax", float_share=0).cache.scales
    assert 127 * scales["x"] < 10


def test_a_tuning_runs_optimized_graphs_and_no_thread_spins(fragile, monkeypatch):
    """Either costs as much CPU time again. What keeps a cache runs as a calibration does, with the same values."""
    import onnxruntime

    session, settings = onnxruntime.InferenceSession, []

    def start(data, options, **others):
        spins = options.get_session_config_entry("session.intra_op.allow_spinning") != "0"
        settings.append((options.graph_optimization_level.name, spins))
        return session(data, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    fastcal.tune(fragile, batches(2))
    assert not any(spins for _, spins in settings)
    unoptimized = [level for level, _ in settings if level == "ORT_DISABLE_ALL"]
    assert len(unoptimized) == 1  # shows all tensors, for their shapes
    settings.clear()
    fastcal.calibrate(fragile, batches(2), algorithm="minmax")
    assert settings == [("ORT_DISABLE_ALL", False)]


def test_the_same_batches_give_the_same_tuning(fragile, tmp_path):
    given = batches(4)
    one, other = (fastcal.tune(fragile, given) for _ in range(2))
    assert one.to_json() == other.to_json()
    one.save(tmp_path / "tuned.json")
    read = fastcal.Tuning.load(tmp_path / "tuned.json")
    assert read.to_json() == one.to_json()
    assert (list(read.in_float), read.result) == (list(one.in_float), one.result)
    model = fastcal.quantize(fragile, tmp_path / "tuned.json")
    assert model.SerializeToString() == fastcal.quantize(fragile, one).SerializeToString()


def test_a_tuning_is_a_cache_too(fragile, tmp_path):
    tuning = fastcal.tune(fragile, batches(2))
    tuning.save(tmp_path / "tuned.json")
    assert fastcal.CalibrationCache.load(tmp_path / "tuned.json").scales == tuning.cache.scales


def test_only_what_layers_in_int8_read_is_observed(fragile):
    given = batches(2)
    assert set(fastcal.tune(fragile, given).cache.scales) == {"x", "a", "r", "c", "d", "e", "f"}
    assert {"b", "g", "y"} < set(fastcal.tune(fragile, given, all_tensors=True).cache.scales)


def test_a_target_is_reached_with_as_few_layers_in_float_as_it_takes(fragile):
    given = batches()
    tuning = fastcal.tune(fragile, given, target=0.9995, metric=agreement_of_outputs, bias_correction=False)
    assert tuning.metric == "agreement_of_outputs"
    assert tuning.result.metric >= 0.9995
    fewer = [point for point in tuning.curve if point.in_float < tuning.result.in_float]
    assert fewer
    assert all(point.metric < 0.9995 for point in fewer)
    (same,) = (point for point in tuning.curve if point.in_float == tuning.result.in_float)
    assert same.sqnr == pytest.approx(tuning.result.sqnr, abs=0.01)  # simulated, and as the model that is written
    assert same.metric == pytest.approx(tuning.result.metric, abs=1e-4)


def agreement_of_outputs(exact, other):
    return 1 - np.square(exact["y"] - other["y"]).sum() / np.square(exact["y"]).sum()


def test_a_target_out_of_reach_says_so(fragile):
    tuning = fastcal.tune(fragile, batches(2), target=1.0, metric=lambda exact, other: 0.5)
    assert not tuning.is_reached
    assert len(tuning.in_float) == 6  # all but the weighted layer that costs least
    assert len(quantized_layers(fastcal.quantize(fragile, tuning))) == 1


def test_repairs_are_switched_off(fragile):
    given = batches(3)
    tuning = fastcal.tune(fragile, given, float_share=0, bias_correction=False)
    assert (list(tuning.in_float), tuning.bias) == ([], {})
    assert quantized_layers(fastcal.quantize(fragile, tuning)) == {"a", "b", "c", "d", "e", "y"}
    without_depthwise = fastcal.tune(fragile, given, float_share=0, bias_correction=False, depthwise=False)
    assert list(without_depthwise.in_float) == ["e"]
    assert quantized_layers(fastcal.quantize(fragile, without_depthwise)) == {"a", "b", "c", "d", "y"}
    excluded = fastcal.tune(fragile, given, float_share=0, bias_correction=False, exclude=["c"])
    assert list(excluded.in_float) == ["c"]


@pytest.mark.parametrize("is_alike", [True, False])
def test_biases_are_corrected_if_that_keeps_more(onnx_file, is_alike):
    """The weights' rounding errors all have one sign, and so have the inputs: the outputs shift.

    If the samples that are held out have the other sign, their outputs shift the other way.
    """
    weights = np.full((4, 3, 1, 1), 2.45 / 127, "f4")
    weights[:, 0] = 1  # a step is 1 / 127, so the others become 2 / 127
    model = onnx_file("net (float[N, 3, 4, 4] x) => (float[N, 4, 4, 4] y) { y = Conv(x, w) }", {"w": weights})
    given = [{"x": (4 + RANDOM.random((8, 3, 4, 4))).astype("f4")} for _ in range(4)]
    for batch in given:
        batch["x"][5:] *= 1 if is_alike else -1  # the last two or three of a batch are held out
    tuning = fastcal.tune(model, given, float_share=0, algorithm="minmax")
    plain = fastcal.tune(model, given, float_share=0, algorithm="minmax", bias_correction=False)
    assert set(tuning.bias) == ({"y"} if is_alike else set())
    assert (tuning.result.sqnr > plain.result.sqnr + 3) == is_alike
    assert (tuning.result.sqnr == plain.result.sqnr) == (not is_alike)


def test_a_cache_is_kept_and_reused(fragile, tmp_path, caplog):
    given, kept = batches(4), tmp_path / "model.cache"
    one = fastcal.tune(fragile, given, cache=kept)
    seen = []
    other = fastcal.tune(fragile, given, cache=kept, progress=seen.append)
    assert not seen
    assert other.cache.observed is None
    assert (other.in_float, other.result) == (one.in_float, one.result)
    assert kept.read_bytes().startswith(b"TRT-101601-EntropyCalibration2\n")
    fastcal.tune(fragile, given, cache=kept, progress=seen.append, algorithm="minmax")
    assert len(seen) == 4


def test_the_best_algorithm_is_the_one_that_keeps_most(fragile):
    given = batches()
    tuning = fastcal.tune(fragile, given, float_share=0, bias_correction=False)
    kept = {
        name: fastcal.tune(fragile, given, float_share=0, bias_correction=False, algorithm=name)
        for name in ("entropy2", "minmax", "percentile", "mse")
    }
    best = max(kept, key=lambda name: kept[name].result.sqnr)
    assert tuning.cache.scales == kept[best].cache.scales
    calibrated = fastcal.calibrate(fragile, given, algorithm="best").scales
    scales = {name: calibrated[name] for name in tuning.cache.scales}
    assert scales == pytest.approx(tuning.cache.scales, rel=1e-5)  # all tensors shown, so in another order of sums


def test_the_digits_need_no_repair():
    feed = fastcal.ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", preprocess="imagenet", limit=64)
    with feed:
        tuning = fastcal.tune(DIGITS / "digits.onnx", feed)
    assert tuning.result.in_float == 0
    assert tuning.result.sqnr > 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 0}, FastcalError, "target is 0; it must be above 0 and at most 1"),
        ({"target": 1.5}, FastcalError, "target is 1.5; it must be above 0"),
        ({"float_share": -0.1}, FastcalError, "float_share is -0.1; it must be from 0 to 1"),
        ({"algorithm": "worst"}, FastcalError, "no algorithm 'worst'; choose one of"),
        ({"metric": "beauty"}, FastcalError, "no metric 'beauty'; take one of"),
        ({"exclude": ["z"]}, FastcalError, "no layer, type or tensor 'z' to exclude"),
        ({"exclude": ["Conv", "MatMul"]}, ModelError, "no layer left to run in INT8; exclude fewer"),
        ({"threads": 0}, FastcalError, "threads is 0"),
    ],
)
def test_wrong_settings(fragile, options, error, message):
    with pytest.raises(error, match=message):
        fastcal.tune(fragile, batches(1), **options)


def test_no_batches(fragile):
    with pytest.raises(DataError, match="no batches"):
        fastcal.tune(fragile, [])


def test_tunings_that_do_not_fit(fragile, tmp_path, onnx_file):
    tuning = fastcal.tune(fragile, batches(2))
    tuning.save(tmp_path / "tuned.json")
    other = onnx_file(
        "net (float[N, 3] x) => (float[N, 2] y) { y = MatMul(x, w6) }", {"w6": np.ones((3, 2), "f4")}, "o.onnx"
    )
    with pytest.raises(CacheError, match="calibrated with another model"):
        fastcal.quantize(other, tmp_path / "tuned.json")
    content = json.loads((tmp_path / "tuned.json").read_text())
    for change, message in (
        ({"in_float": ["nowhere"]}, "layers that .* lacks: nowhere; tune this model"),
        ({"bias": {"r": [1.0]}}, "corrects the bias of r, which has none"),
        ({"bias": {"b": ["much"]}}, "damaged tuning: the correction of b is not finite; tune again"),
        ({"in_float": [3]}, "damaged tuning: a layer's name is no text"),
        ({"curve": 3}, "damaged tuning"),
        ({"unknown": 3}, "damaged tuning"),
    ):
        changed = content | {"tuning": content["tuning"] | change}
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(CacheError, match=message):
            fastcal.quantize(fragile, tmp_path / "changed.json")


def test_a_tuning_that_was_stopped_goes_on(fragile, tmp_path):
    given, kept, texts = batches(4), tmp_path / "unfinished", []

    def stop(text):
        if text == "ranking layers, 4 of 7":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastcal.tune(fragile, given, curve=True, unfinished=kept, status=stop)
    assert len(kept.read_text().splitlines()) == 5  # what it is of, and four layers
    kept.write_text(kept.read_text()[:-4])  # the last line was cut off
    other = tmp_path / "other"
    other.write_bytes(kept.read_bytes())
    resumed = fastcal.tune(fragile, given, curve=True, unfinished=kept, status=texts.append)
    assert [text for text in texts if "of 7" in text] == [f"ranking layers, {number} of 7" for number in (4, 5, 6, 7)]
    assert resumed.to_json() == fastcal.tune(fragile, given, curve=True).to_json()
    assert not kept.exists()
    texts.clear()
    fastcal.tune(
        fragile, batches(4), curve=True, unfinished=other, status=texts.append
    )  # other batches: it begins anew
    assert "ranking layers, 1 of 7" in texts


def test_a_comparison_takes_a_tuning(fragile, tmp_path):
    given = batches()
    tuning = fastcal.tune(fragile, given)
    tuning.save(tmp_path / "tuned.json")
    compared = fastcal.compare(fragile, given, caches={"tuned": tmp_path / "tuned.json", "scales": tuning.cache})
    assert compared.qualities["tuned"].sqnr > compared.qualities["scales"].sqnr + 6
    assert compared.qualities["tuned"].sqnr > max(compared.qualities[name].sqnr for name in ("entropy2", "mse")) + 6
