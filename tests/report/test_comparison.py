"""The quality of INT8: the numbers against ONNX Runtime's own rounding, and the verdict on wrong inputs."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

import fastcal
from conftest import DIGITS
from fastcal.errors import DataError, ModelError
from fastcal.model import Model
from fastcal.report.quality import TensorQuality

MODEL = DIGITS / "digits.onnx"
IMAGENET = fastcal.Preprocess.preset("imagenet")

#: What goes wrong when a network is prepared for: the colours swapped, nothing normalized.
SWAPPED = replace(IMAGENET, channels="BGR")
NOT_NORMALIZED = replace(IMAGENET, scale=1.0, mean=(0.0,), std=(1.0,))

GRAPH = """f (float[N, 3, 4, 4] x) => (float[N, 5, 4, 4] y) {
  [conv] c = Conv(x, w)
  r = Relu(c)
  [last] y = Conv(r, v)
}"""


def digits(preprocess=IMAGENET, **options):
    return fastcal.ImageFeed(DIGITS / "images", model=MODEL, preprocess=preprocess, device="cpu", **options)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Files of caches of the digits sample, by how its images were prepared."""
    folder = tmp_path_factory.mktemp("caches")
    for name, preprocess in (("right", IMAGENET), ("swapped", SWAPPED), ("not_normalized", NOT_NORMALIZED)):
        with digits(preprocess) as feed:
            fastcal.calibrate(MODEL, feed, backend="onnxruntime", tensorrt_version="10.3.0").save(folder / name)
    return folder


@pytest.fixture
def network(onnx_file):
    random = np.random.default_rng(0)
    return onnx_file(
        GRAPH,
        {
            "w": random.standard_normal((4, 3, 1, 1), dtype=np.float32),
            "v": random.standard_normal((5, 4, 1, 1), dtype=np.float32),
        },
    )


def batches(count=3, samples=2):
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((samples, 3, 4, 4), dtype=np.float32)} for _ in range(count)]


class Once(fastcal.Feed):
    """A feed whose second pass is what the first has left."""

    batch_size = 2

    def __init__(self, batches):
        self._batches = iter(batches)

    def __len__(self):
        return 2

    def __iter__(self):
        return self._batches


def outputs_of(model, name, values):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model.graph.output.extend([onnx.ValueInfoProto(name=name)] if name not in ("y",) else [])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.concatenate([session.run([name], batch)[0] for batch in values]).astype(np.float64)


def decibels(signal, noisy):
    return 10 * math.log10(np.sum(signal**2) / np.sum((signal - noisy) ** 2))


@pytest.mark.parametrize("exact", [False, True])
def test_the_ratios_are_those_of_onnxruntimes_rounding(network, onnx_file, exact):
    values = batches()
    result = fastcal.compare(network, values, quantile=0.98, exact=exact)
    assert list(result.qualities) == ["entropy2", "minmax", "percentile", "mse"]
    assert result.images == 6
    rounding = onnx_file(
        "f (float[N, 4, 4, 4] r, float s) => (float[N, 4, 4, 4] y) { q = QuantizeLinear(r, s, z)\n"
        "y = DequantizeLinear(q, s, z) }",
        {"z": np.int8(0)},
        "rounding.onnx",
    )
    session = onnxruntime.InferenceSession(rounding)
    activations = {name: outputs_of(onnx.load(network), name, values).astype(np.float32) for name in ("c", "r")}
    for algorithm, quality in result.qualities.items():
        options = {"algorithm": algorithm, "quantile": 0.98, "exact": exact, "backend": "onnxruntime"}
        cache = fastcal.calibrate(network, values, **options)
        assert {name: tensor.scale for name, tensor in quality.tensors.items()} == cache.scales
        for name, activation in activations.items():
            scale = np.float32(cache.scales[name])
            rounded = session.run(None, {"r": activation, "s": np.array(scale)})[0]
            tensor = quality.tensors[name]
            assert tensor.sqnr == pytest.approx(decibels(activation.astype(float), rounded), abs=1e-4)
            assert tensor.clipped == np.mean(np.abs(activation) > 127 * scale)
        int8 = outputs_of(fastcal.quantize(network, cache), "y", values)
        assert quality.outputs["y"] == pytest.approx(
            decibels(outputs_of(onnx.load(network), "y", values), int8), abs=1e-4
        )
        assert quality.sqnr == quality.outputs["y"]
        assert quality.agreement is None  # (N, 5, 4, 4) is no classifier's output
    assert result.qualities["percentile"].tensors["r"].clipped > 0.01


def test_the_worst_and_the_best_are_named(network):
    values = batches()
    coarse = fastcal.calibrate(network, values, backend="onnxruntime")
    coarse.scales = {name: scale * 40 for name, scale in coarse.scales.items()}
    result = fastcal.compare(network, values, caches={"coarse": coarse})
    by_output = {label: quality.sqnr for label, quality in result.qualities.items()}
    assert min(by_output, key=by_output.get) == "coarse"
    assert by_output[result.best] == max(by_output.values())
    quality = result.qualities["coarse"]
    in_order = [quality.tensors[name].sqnr for name in quality.worst]
    assert in_order == sorted(in_order)
    assert quality.median_sqnr == np.median(in_order)


def test_what_is_always_0_or_exact(onnx_file):
    network = onnx_file(
        "f (float[N, 2, 2, 2] x) => (float[N, 2, 2, 2] y) { zero = Sub(x, x)\n c = Conv(x, w)\n y = Add(c, zero) }",
        {"w": np.ones((2, 2, 1, 1), np.float32)},
    )
    x = np.array([127, -127, 1, 0, 64, 3, -8, 2], np.float32).reshape(1, 2, 2, 2)
    result = fastcal.compare(network, [{"x": x}])
    minmax = result.qualities["minmax"].tensors
    assert (minmax["zero"].scale, minmax["zero"].sqnr, minmax["zero"].clipped) == (0, None, 0)
    assert (minmax["x"].scale, minmax["x"].sqnr) == (1, math.inf)
    assert "zero" not in result.qualities["minmax"].worst
    text = json.dumps(result.as_json(), allow_nan=False)
    assert json.loads(text)["qualities"]["minmax"]["tensors"]["x"] == {"scale": 1.0, "sqnr": None, "clipped": 0.0}


def test_a_scale_of_0_rounds_nothing(network):
    values = batches()
    cache = fastcal.calibrate(network, values, backend="onnxruntime")
    cache.scales["r"] = 0.0
    quality = fastcal.compare(network, values, caches={"other": cache}).qualities["other"]
    assert quality.tensors["r"] == TensorQuality(0.0, None, 0.0)
    assert "r" not in quality.worst


def test_nan_is_left_out(network):
    values = batches()
    broken = [{"x": values[0]["x"].copy()}, *values[1:]]
    broken[0]["x"][0, 0, :2, 0] = np.nan, np.inf
    quality = fastcal.compare(network, broken).qualities["minmax"]
    assert math.isfinite(quality.tensors["x"].sqnr)
    assert math.isfinite(quality.sqnr)


def test_a_classifier_and_its_folders():
    with digits() as feed:
        result = fastcal.compare(MODEL, feed)
    assert result.images == 256
    assert result.float_top1 == 1.0
    for quality in result.qualities.values():
        assert quality.agreement == quality.top1 == 1.0
    assert result.verdict.startswith(
        f"{result.best} keeps most: {result.qualities[result.best].sqnr:.1f} dB at the output"
    )


def test_a_wrong_channel_order_changes_the_verdict(caches):
    with digits(SWAPPED) as feed:
        result = fastcal.compare(MODEL, feed, caches={"right": caches / "right"})
    assert result.float_top1 < 0.5
    assert result.verdict.startswith(f"FP32 gives {result.float_top1:.1%} of the images their folder's class: is this")
    assert "right keeps" in result.verdict
    assert "its record has other preprocessing: crop 0.875 to 32x32, RGB" in result.verdict


def test_a_missing_normalization_changes_the_verdict(caches):
    files = {name: caches / name for name in ("right", "swapped", "not_normalized")}
    with digits() as feed:
        result = fastcal.compare(MODEL, feed, caches=files)
    assert result.qualities["right"].sqnr == result.qualities["entropy2"].sqnr
    lost = result.qualities[result.best].sqnr - result.qualities["not_normalized"].sqnr
    assert lost > 20
    assert result.qualities["not_normalized"].agreement < 0.9
    wrong, other, right, *_ = result.verdict.split("; ")
    assert wrong.startswith("swapped keeps as much as")
    assert "BGR" in wrong
    assert other.startswith(f"not_normalized loses {lost:.1f} dB against {result.best}, and its record has other prep")
    assert right == f"right keeps as much as {result.best}"


def test_a_missing_normalization_is_seen_without_a_record(caches, tmp_path):
    shutil.copy(caches / "not_normalized", tmp_path / "bare")
    with digits() as feed:
        verdict = fastcal.compare(MODEL, feed, caches={"bare": tmp_path / "bare"}).verdict
    bare, right = (fastcal.CalibrationCache.load(caches / name).scales["image"] for name in ("not_normalized", "right"))
    assert f"its scale of input 'image' is {bare / right:.3g} times what these images need" in verdict


def test_folders_are_classes_only_if_there_is_one_for_each(tmp_path):
    paths = [str(path) for path in sorted((DIGITS / "test").rglob("*.jpg"))[::50]]
    for path in paths:
        shutil.copy(path, tmp_path)
    two_classes = tmp_path / "two"
    for path in paths[:2]:
        folder = two_classes / path.split("/")[-2]
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
    mixed = [*paths, tmp_path / paths[0].split("/")[-1]]
    for data, known in ((paths, True), (str(tmp_path / "*.jpg"), False), (two_classes, False), (mixed, False)):
        feed = fastcal.ImageFeed(data, model=MODEL, batch_size=4, device="cpu")
        with feed:
            result = fastcal.compare(MODEL, feed)
        assert result.images == len(feed.paths)  # 9 or 10 in batches of 4: the last is completed with the first again
        assert (result.float_top1 is not None) == known
        assert result.qualities["minmax"].agreement is not None


def test_unreadable_images_do_not_shift_the_classes(tmp_path):
    folder = shutil.copytree(DIGITS / "test", tmp_path / "test")
    for path in sorted(folder.rglob("*.jpg"))[::45]:
        path.write_bytes(b"no image")
    settings = {"skip_unreadable": True, "max_unreadable": 50, "batch_size": 55, "device": "cpu"}
    with fastcal.ImageFeed(folder, model=MODEL, **settings) as feed:
        result = fastcal.compare(MODEL, feed)
    assert result.images == 440
    assert result.float_top1 > 0.99


def test_samples_that_complete_the_last_batch_are_not_counted(network, tmp_path):
    np.save(tmp_path / "x.npy", np.concatenate([batch["x"] for batch in batches()])[:5])
    with fastcal.NumpyFeed(tmp_path / "x.npy", model=network, batch_size=2, device="cpu") as feed:
        assert fastcal.compare(network, feed).images == 5


def test_progress_counts_both_passes(network):
    seen = []
    fastcal.compare(network, batches(), progress=lambda state: seen.append(replace(state)))
    assert [state.batches for state in seen] == [1, 2, 3, 4, 5, 6]
    assert [state.images for state in seen] == [2, 4, 6, 8, 10, 12]
    assert {state.total for state in seen} == {6}
    assert [state.seconds for state in seen] == sorted(state.seconds for state in seen)


def test_what_cannot_be_compared(network, onnx_file, caches):
    chosen = onnx_file(
        "f (float[N, 3] x) => (int64[N, 1] y) { z = MatMul(x, w)\n y = ArgMax<axis = 1>(z) }",
        {"w": np.eye(3, dtype=np.float32)},
        "chosen.onnx",
    )
    with pytest.raises(ModelError, match=r"chosen.onnx has no float output to compare; export it without"):
        fastcal.compare(chosen, [{"x": np.ones((1, 3), np.float32)}])
    with pytest.raises(DataError, match="gone after one pass, and compare needs two; pass list"):
        fastcal.compare(network, iter(batches()))
    with pytest.raises(DataError, match="gone after one pass, and compare needs two; pass list"):
        fastcal.compare(network, Once(batches(count=2)))
    with pytest.raises(fastcal.FastcalError, match="a cache is named 'minmax' as an algorithm is; name it otherwise"):
        fastcal.compare(network, batches(), caches={"minmax": caches / "right"})
    with pytest.raises(fastcal.FastcalError, match=r"right was calibrated with another model than .*model.onnx"):
        fastcal.compare(network, batches(), caches={"x": caches / "right"}, progress=pytest.fail)  # before any batch
    with pytest.raises(DataError, match="takes input 'x'"):
        fastcal.compare(network, [{"x": np.zeros((1, 3, 9, 9), np.float32)}])


def test_outputs_that_are_no_classifiers(onnx_file):
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(5, 3, 3, 3)).astype("f4")}
    batches = [random.normal(size=(2, 3, 8, 8)).astype("f4")] * 2
    head = "g (float[N, 3, 8, 8] x) => (float"
    loss = onnx_file(f"{head} y) {{ c = Conv(x, w) y = ReduceMean<keepdims = 0>(c) }}", weights)
    for quality in fastcal.compare(loss, batches).qualities.values():
        assert quality.agreement is None
        assert quality.sqnr > 0
    found = "c = Conv(x, w) g = Greater(c, z) n = NonZero(g) t = Transpose(n) y = Cast<to = 1>(t)"
    path = onnx_file(f"{head}[K, 4] y) {{ {found} }}", weights | {"z": np.float32(1e9)})
    assert fastcal.compare(path, batches).images == 4  # where there is nothing to find
    path = onnx_file(f"{head}[K, 4] y) {{ {found} }}", weights | {"z": np.float32(3)})
    with pytest.raises(ModelError, match=r"output 'y' .* its size depends on the values"):
        fastcal.compare(path, batches)
    path = onnx_file(f"{head}[2] b) {{ c = Conv(x, w) }}", weights | {"b": np.float32([1, 2])})
    with pytest.raises(ModelError, match="computes no float output: there is nothing to compare"):
        fastcal.compare(path, batches)


def test_little_memory_changes_nothing(monkeypatch):
    images = [{"image": np.random.default_rng(0).standard_normal((9, 3, 32, 32), dtype="f4")}] * 2
    calm = fastcal.compare(DIGITS / "digits.onnx", images)
    largest = max(Model(DIGITS / "digits.onnx").sizes({"image": (9, 3, 32, 32)}).values())
    monkeypatch.setattr("fastcal.observe.with_onnxruntime.free_memory", lambda: largest)
    assert fastcal.compare(DIGITS / "digits.onnx", images) == calm


def test_the_verdict_on_an_exact_output(onnx_file):
    path = onnx_file(
        "f (float[N, 2] x) => (float[N, 2] y) { y = MatMul(x, w) }", {"w": np.diag(np.float32([127, 127]))}
    )
    x = np.float32([[127, -127], [1, 3]])
    right = fastcal.calibrate(path, [x], backend="onnxruntime", algorithm="minmax")
    coarse = fastcal.CalibrationCache({name: 40 * scale for name, scale in right.scales.items()})
    result = fastcal.compare(path, [x], caches={"coarse": coarse, "right": right})
    assert result.qualities["minmax"].sqnr == result.qualities["right"].sqnr == math.inf
    lost, same, most = result.verdict.split("; ")
    kept = result.qualities["coarse"].sqnr
    assert lost.startswith(f"coarse keeps {kept:.1f} dB where minmax keeps the exact output, and its scale of input")
    assert same == "right keeps as much as minmax"
    assert most == (
        "minmax keeps most: the exact output and FP32's class for 100.0% of the images, percentile and mse too"
    )


@pytest.mark.parametrize(("factor", "is_doubted"), [(1.4, False), (1.6, True), (1 / 1.4, False), (1 / 1.6, True)])
def test_from_when_on_a_scale_of_the_input_is_another(network, factor, is_doubted):
    cache = fastcal.calibrate(network, batches(), backend="onnxruntime")
    cache.scales["x"] *= factor
    cache.record = None
    verdict = fastcal.compare(network, batches(), caches={"other": cache}).verdict
    assert ("its scale of input 'x' is" in verdict) == is_doubted
