"""Whole networks: which tensors get which scales, and what goes wrong."""

import functools
import logging
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DATA, DIGITS, SQUEEZENET, needs_squeezenet, squeezenet_batches
from fastcal.algorithm import Algorithm
from fastcal.model import Model
from fastcal.observe.backends import OnnxRuntimeBackend, TensorRTBackend
from fastcal.observe.histogram import Histograms
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner
from fastcal.thresholds import divergences

#: What is tested here, also where TensorRT and a GPU are.
calibrate = functools.partial(fastcal.calibrate, backend="onnxruntime")


@needs_squeezenet
def test_minmax_scales_of_squeezenet_are_tensorrts():
    theirs = fastcal.CalibrationCache.load(DATA / "squeezenet1_1.minmax.cache").scales
    feed = fastcal.ArrayFeed(list(squeezenet_batches()))
    ours = calibrate(SQUEEZENET, feed, algorithm="minmax").scales
    assert len(ours) == 84
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-6)


@needs_squeezenet
def test_entropy2_scales_of_squeezenet_are_tensorrts_or_diverge_as_little():
    theirs = fastcal.CalibrationCache.load(DATA / "squeezenet1_1.entropy2.cache").scales
    feed = fastcal.ArrayFeed(list(squeezenet_batches()))
    ours = calibrate(SQUEEZENET, feed, algorithm="entropy2", exact=True).scales
    differ = [name for name, scale in ours.items() if scale != pytest.approx(theirs[name], rel=1e-5)]
    assert len(ours) == 84
    assert len(differ) <= 3
    with OnnxRuntimeRunner(Model(SQUEEZENET)) as runner, Histograms() as histograms:
        for batch in feed:
            histograms.update_all(runner.run(batch))
    for name in differ:
        bins = round(theirs[name] * 127 / histograms[name].width - 0.5)
        (divergence,) = divergences(histograms[name].counts[None])
        assert divergence[bins - 128] <= 1.001 * divergence.min()


SCALED = "f (float[N, 2] x) => (float[N, 2] y) { two = Constant<value_float = 2.0>() y = Mul(x, two) }"


def test_minmax_of_a_known_network(onnx_file):
    feed = fastcal.ArrayFeed([{"x": np.array([[1, -3]], "f4")}, {"x": np.array([[2, 0]], "f4")}])
    cache = calibrate(onnx_file(SCALED), feed, algorithm="minmax", tensorrt_version="8.6.1")
    assert cache.scales == {"x": float(np.float32(3) / np.float32(127)), "y": float(np.float32(6) / np.float32(127))}
    assert (cache.algorithm.name, cache.tensorrt_version) == ("minmax", "8.6.1")


def test_percentile_writes_legacy_calibrations_header(onnx_file):
    feed = fastcal.ArrayFeed([{"x": np.ones((1, 2), "f4")}])
    cache = calibrate(onnx_file(SCALED), feed, algorithm="percentile", quantile=0.99)
    again = fastcal.CalibrationCache.from_bytes(cache.to_bytes())
    assert again.algorithm == Algorithm("percentile", 0.99, 1.0)


def test_a_max_pool_takes_its_inputs_scale(onnx_file):
    path = onnx_file(
        "f (float[N, 1, 4, 4] x) => (float[N, 1, 1, 1] z) {"
        "  n = Neg(x) y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(n) z = MaxPool<kernel_shape = [2, 2]>(y) }"
    )
    images = np.arange(16, dtype="f4").reshape(1, 1, 4, 4)  # the pools of -x see small values only
    scales = calibrate(path, fastcal.ArrayFeed([{"x": images}]), algorithm="minmax").scales
    assert scales["y"] == scales["z"] == scales["n"] == float(np.float32(15) / np.float32(127))


def test_only_float_tensors_have_scales(onnx_file):
    path = onnx_file(
        "f (float[N, 3] x, int64[N, 1] i) => (float[N, 1] y) { s = Shape(x) g = GatherElements<axis = 1>(x, i)"
        "  y = Relu(g) }"
    )
    batch = {"x": np.ones((2, 3), "f4"), "i": np.zeros((2, 1), "i8")}
    assert list(calibrate(path, fastcal.ArrayFeed([batch])).scales) == ["x", "g", "y"]


def test_float16_activations_are_observed(onnx_file):
    path = onnx_file("f (float16[N, 2] x) => (float16[N, 2] y) { y = Add(x, x) }")
    scales = calibrate(path, fastcal.ArrayFeed([{"x": np.array([[1, 2]], "f4")}]), algorithm="minmax").scales
    assert scales == {"x": float(np.float32(2) / np.float32(127)), "y": float(np.float32(4) / np.float32(127))}


def test_external_data(onnx_file, tmp_path, monkeypatch):
    weights = np.full((2, 3), 2, np.float32)
    path = onnx_file("f (float[N, 2] x) => (float[N, 3] y) { y = MatMul(x, w) }", {"w": weights})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert weights.tobytes() not in path.read_bytes()
    monkeypatch.chdir("/")
    feed = fastcal.ArrayFeed([{"x": np.ones((1, 2), "f4")}])
    assert calibrate(path, feed, algorithm="minmax").scales["y"] == float(np.float32(4) / np.float32(127))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(fastcal.FastcalError, match=r"cannot load .*model.onnx.*weights.bin"):
        calibrate(path, feed)


def test_nan_and_infinity_are_reported_by_tensor(onnx_file, caplog):
    path = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Sqrt(x) }")
    feed = fastcal.ArrayFeed([{"x": np.array([[-1, 4, np.inf]], "f4")}])
    with caplog.at_level(logging.WARNING, "fastcal"):
        cache = calibrate(path, feed, algorithm="minmax")
    assert cache.scales == {"x": float(np.float32(4) / np.float32(127)), "y": float(np.float32(2) / np.float32(127))}
    assert "x (0 NaN, 1 Inf), y (1 NaN, 1 Inf)" in caplog.text


def test_progress_counts_batches_and_images(onnx_file):
    seen = []
    feed = fastcal.ArrayFeed([{"x": np.ones((3, 2), "f4")}] * 2)
    calibrate(onnx_file(SCALED), feed, progress=lambda p: seen.append((p.batches, p.images, p.total)))
    assert seen == [(1, 3, 2), (2, 6, 2)]


def test_any_iterable_of_batches_will_do(onnx_file):
    batches = ({"x": np.full((1, 2), value, "f4")} for value in (1, 5))
    assert calibrate(onnx_file(SCALED), batches, algorithm="minmax").scales["y"] == float(
        np.float32(10) / np.float32(127)
    )


def test_a_loader_s_labels_are_left_out_and_its_last_batch_is_as_it_is(onnx_file):
    seen = []
    loader = [(np.full((size, 2), size, "f4"), np.arange(size)) for size in (3, 3, 1)]
    cache = calibrate(
        onnx_file(SCALED), lambda: iter(loader), algorithm="percentile", quantile=0.5,
        progress=lambda state: seen.append((state.images, state.total)),
    )  # fmt: skip
    assert seen == [(3, None), (6, None), (7, None)]
    assert cache.scales["x"] == pytest.approx(3 / 127, rel=1e-3)


def test_two_inputs_take_a_tuples_arrays_in_the_models_order(onnx_file):
    path = onnx_file("f (float[N, 2] left, float[N, 2] right) => (float[N, 2] y) { y = Sub(left, right) }")
    left, right, label = np.full((3, 2), 5, "f4"), np.full((3, 2), 2, "f4"), np.zeros(3)
    for batch in ((left, right, label), {"right": right, "label": label, "left": left}):
        scales = calibrate(path, [batch], algorithm="minmax").scales
        assert {name: round(scale * 127) for name, scale in scales.items()} == {"left": 5, "right": 2, "y": 3}
    with pytest.raises(fastcal.FastcalError, match="batch 0 has 1 arrays without names, and none for input 'right'"):
        calibrate(path, [left])
    with pytest.raises(fastcal.FastcalError, match="the batches have 'left'; give 'right' too"):
        calibrate(path, fastcal.ArrayFeed([{"left": left}]))


def test_types_are_converted_to_the_models_but_no_float_is_cut_off(onnx_file):
    path = onnx_file("f (float[N, 2] x, int32[N, 1] i) => (float[N, 1] y) { y = GatherElements<axis = 1>(x, i) }")
    batch = {"x": np.uint8([[255, 3]]), "i": np.int64([[1]])}
    assert calibrate(path, [batch], algorithm="minmax").scales["y"] == float(np.float32(3) / np.float32(127))
    with pytest.raises(fastcal.FastcalError, match="takes input 'i' as int32, the batches are float32; convert them"):
        calibrate(path, [batch | {"i": np.float32([[1]])}])


FIXED = "f (float[4, 3, 8, 8] image) => (float[4, 3, 8, 8] y) { y = Relu(image) }"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("image", (2, 3, 8, 8), r"'image' \(4, 3, 8, 8\), the batches are \(2, 3, 8, 8\); use batch size 4"),
        ("image", (4, 3, 9, 8), r"\(4, 3, 8, 8\), the batches are \(4, 3, 9, 8\); choose the preprocessing"),
        ("image", (4, 3, 8), r"the batches are \(4, 3, 8\); give arrays of 4 dimensions"),
        ("picture", (4, 3, 8, 8), r"takes the inputs 'image', the batches have 'picture'; name the batches' arrays"),
    ],
)
def test_batches_that_do_not_fit_are_shown_beside_the_model(onnx_file, name, shape, message):
    with pytest.raises(fastcal.FastcalError, match=message):
        calibrate(onnx_file(FIXED), fastcal.ArrayFeed([{name: np.zeros(shape, "f4")}]))


def test_it_stops_when_no_scale_moves_any_longer(onnx_file, caplog):
    used = []

    def run(values, percent):
        used.clear()
        batches = ({"x": np.full((10, 2), value, "f4")} for value in values)
        return calibrate(
            onnx_file(SCALED), batches, algorithm="minmax", until_stable=percent,
            progress=lambda state: used.append(state.images),
        )  # fmt: skip

    with caplog.at_level(logging.INFO, "fastcal"):
        cache = run([1, 1, 2, 2, 2, 2, 2, 9], 1)
    assert len(used) == 6  # moved at the third, and not at the three after it
    assert cache.record.entries.items() >= {"until_stable": 1, "precision": "FP32"}.items()
    assert cache.scales["y"] == float(np.float32(4) / np.float32(127))
    assert "stable after 60 images" in caplog.text
    assert run([1, 1.02, 1.04, 1.06, 1.08], 1).scales["x"] == float(np.float32(1.08) / np.float32(127))
    assert len(used) == 5
    run([1, 1.02, 1.04, 1.06, 1.08], 5)
    assert len(used) == 4
    run([0] * 9, 1)
    assert len(used) == 3
    # Looks come after 10, 20, ... 110 images; then after 130, 150: 2 at the eleventh batch is seen at once and
    # three looks later, after 170 images, it ends.
    run([*range(1, 12)] + [11] * 20, 1)
    assert len(used) == 17


@pytest.mark.parametrize("percent", [0, -1, float("nan")])
def test_no_percentage(onnx_file, percent):
    with pytest.raises(fastcal.FastcalError, match=r"until_stable is .*; it is a percentage above 0"):
        calibrate(onnx_file(SCALED), [{"x": np.ones((1, 2), "f4")}], until_stable=percent)


def test_what_is_no_file_is_no_model():
    for backend in ("auto", "onnxruntime", "tensorrt"):
        with pytest.raises(fastcal.FastcalError, match="the model is a ModelProto; name an ONNX file"):
            fastcal.calibrate(onnx.ModelProto(), [{"x": np.ones((1, 2), "f4")}], backend=backend)
    with pytest.raises(fastcal.FastcalError, match="backend onnxruntime runs ONNX files, not an INetworkDefinition"):
        calibrate(SimpleNamespace(num_inputs=0), [{"x": np.ones((1, 2), "f4")}])


def test_a_version_is_no_number(onnx_file):
    with pytest.raises(fastcal.FastcalError, match=r"10.3 is not a TensorRT version; write it like 10.16.1"):
        calibrate(onnx_file(SCALED), [{"x": np.ones((1, 2), "f4")}], tensorrt_version=10.3)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_threads_that_no_machine_has(onnx_file, threads):
    with pytest.raises(fastcal.FastcalError, match=f"threads is {threads}; it must be from 1 to 1024"):
        calibrate(onnx_file(SCALED), [{"x": np.ones((1, 2), "f4")}], threads=threads)


def test_no_batches_at_all(onnx_file):
    with pytest.raises(fastcal.FastcalError, match="no batches"):
        calibrate(onnx_file(SCALED), iter([]))


def test_a_failing_network_is_named(onnx_file):
    path = onnx_file("f (float[N, M] x) => (float[N, 3] y) { y = MatMul(x, w) }", {"w": np.ones((2, 3), "f4")})
    with pytest.raises(fastcal.FastcalError, match=r"cannot run .*model.onnx"):
        calibrate(path, fastcal.ArrayFeed([{"x": np.ones((1, 5), "f4")}]))


def test_a_failing_feed_raises_its_own_error(onnx_file):
    def batches():
        yield {"x": np.ones((1, 2), "f4")}
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        calibrate(onnx_file(SCALED), batches())


def test_scales_are_those_of_the_histograms(onnx_file):
    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((64, 2), dtype=np.float32)} for _ in range(3)]
    with Histograms() as histograms:
        for batch in batches:
            histograms.update_all({"x": batch["x"], "y": 2 * batch["x"]})
    for algorithm in ("entropy2", "entropy", "minmax", "percentile"):
        cache = calibrate(onnx_file(SCALED), fastcal.ArrayFeed(batches), algorithm=algorithm)
        assert cache.scales == Algorithm.of(algorithm).pick_all(histograms)


def test_what_was_seen_is_kept(onnx_file, tmp_path):
    network = onnx_file(
        "f (float[N, 1, 2, 2] x) => (float[N, 1, 1, 1] y) { r = Relu(x)\n y = MaxPool<kernel_shape = [2, 2]>(r) }"
    )
    random = np.random.default_rng(0)
    feed = fastcal.ArrayFeed([{"x": random.standard_normal((8, 1, 2, 2), np.float32)} for _ in range(5)])
    seen = []
    cache = calibrate(network, feed, algorithm="minmax", progress=lambda state: seen.append(state.seconds))
    observed = cache.observed
    assert (observed.network, observed.backend, observed.shared_scales) == (str(network), "onnxruntime", {"y": "r"})
    assert [(state.batches, state.images) for state in observed.progress] == [(n, 8 * n) for n in range(1, 6)]
    assert [state.seconds for state in observed.progress] == seen
    assert {name: histogram.counts.sum() for name, histogram in observed.histograms.items()} == {
        "x": 160, "r": 160, "y": 40,
    }  # fmt: skip
    for algorithm, quantile in (("minmax", 1.0), ("entropy2", 1.0), ("percentile", 0.9)):
        anew = calibrate(network, feed, algorithm=algorithm, quantile=quantile).scales
        assert Algorithm.of(algorithm, quantile, exact=False).scales(observed) == anew
        assert anew["y"] == anew["r"]
    cache.save(tmp_path / "x.cache")
    assert fastcal.CalibrationCache.load(tmp_path / "x.cache").observed is None


class Begun(fastcal.Feed):
    """One batch, and whether it was asked for."""

    batch_size, begun = 1, False

    def __len__(self):
        return 1

    def __iter__(self):
        self.begun = True
        return iter([{"x": np.ones((1, 2), np.float32)}])


def test_the_feed_starts_before_the_backend(onnx_file, monkeypatch):
    from fastcal.observe import with_onnxruntime

    feed, begun = Begun(), []

    class Observer(with_onnxruntime.OnnxRuntimeObserver):
        def __init__(self, *arguments, **settings):
            begun.append(feed.begun)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(with_onnxruntime, "OnnxRuntimeObserver", Observer)
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    calibrate(path, feed)
    assert begun == [True]


def test_a_pass_ends_if_the_backend_does_not_start(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = NoSuchOperator(x) }")
    with pytest.raises(fastcal.FastcalError, match="NoSuchOperator") as raised:
        calibrate(path, ({"x": np.ones((1, 2), np.float32)} for _ in range(9)))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")] == []
    del raised  # whose traceback holds what was begun


def test_a_network_that_computes_nothing_in_float(onnx_file):
    path = onnx_file("g (float[N, 4] x) => (int64[N, 1] y) { y = ArgMax<axis = 1>(x) }")
    cache = calibrate(path, [np.full((2, 4), 3, "f4")], backend="onnxruntime", algorithm="minmax")
    assert cache.scales == {"x": pytest.approx(3 / 127)}


@pytest.mark.parametrize(
    ("kind", "values", "held"),
    [("int32", np.full((1, 4), 2**32 + 9), "4294967305"), ("int8", np.full((1, 4), -129, "i2"), "-129"),
     ("float16", np.full((1, 4), 1e6, "f4"), "1000000.0")],
)  # fmt: skip
def test_values_that_an_input_cannot_hold(onnx_file, tmp_path, kind, values, held):
    path = onnx_file(f"g ({kind}[N, 4] x) => (float[N, 4] y) {{ y = Cast<to = 1>(x) }}")
    np.save(tmp_path / "x.npy", values)
    for feed in ([values], fastcal.NumpyFeed(tmp_path / "x.npy", model=path, device="cpu")):
        with pytest.raises(fastcal.FastcalError, match=f"input 'x' as {kind}, which cannot hold {held}; give values"):
            fastcal.calibrate(path, feed, backend="onnxruntime")
    cache = calibrate(path, [np.full_like(values, 7)], backend="onnxruntime", algorithm="minmax")
    assert cache.scales["y"] == pytest.approx(7 / 127)


def test_a_network_without_a_float(onnx_file):
    path = onnx_file("g (int64[N, 4] x) => (int64[N, 4] y) { y = Add(x, x) }")
    with pytest.raises(
        fastcal.FastcalError, match=r"model.onnx has no float tensor: there is nothing to calibrate; ex"
    ):
        calibrate(path, [np.ones((2, 4), np.int64)])


def test_a_network_that_is_quantized_already(onnx_file, tmp_path, caplog):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = MatMul(x, w) }", {"w": np.ones((2, 2), "f4")})
    batches = [np.ones((1, 2), "f4")]
    cache = calibrate(path, batches, tensorrt_version="10.3.0")
    onnx.save(fastcal.quantize(path, cache), tmp_path / "int8.onnx")
    assert caplog.text == ""
    calibrate(tmp_path / "int8.onnx", batches, tensorrt_version="10.3.0")
    ((_, level, text),) = caplog.record_tuples
    assert level == logging.WARNING
    assert text.startswith(
        f"{tmp_path / 'int8.onnx'} has QuantizeLinear or DequantizeLinear already, and TensorRT take"
    )
    assert text.endswith("; calibrate the float model it was made from")


RELU = "f (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"


def test_all_that_onnxruntime_says_is_in_one_line(onnx_file):
    fixed = Model(onnx_file(RELU.replace("N", "4")))
    with OnnxRuntimeRunner(fixed) as runner, pytest.raises(fastcal.FastcalError) as raised:
        runner.run({"x": np.ones((3, 3), "f4")})
    text = str(raised.value)
    assert f"cannot run {fixed.path}: " in text
    assert "input: x for the following indices index: 0 Got: 3 Expected: 4 " in text
    assert text.endswith("; give arrays of the expected sizes")
    with pytest.raises(fastcal.FastcalError) as raised:
        OnnxRuntimeRunner(Model(onnx_file(RELU.replace("Relu(x)", f"NoSuchOperator({', '.join(100 * 'x')})"))))
    text = str(raised.value)
    assert "cannot load " in text
    assert " ... " in text
    assert "No Op registered for NoSuchOperator with domain_version of 17; update ONNX Runtime" in text
    assert len(text) < 800


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"ir_version": 99}, "update ONNX Runtime, or export the network with an older onnx"),
        ({"opset": 99}, "update ONNX Runtime, or export the network with an older opset"),
        ({"operator": "NoSuchOperator"}, "update ONNX Runtime, or export the network with ONNX's own operators"),
        ({"operator": "Not"}, "export it again"),
    ],
)
def test_what_to_do_about_a_network_that_onnxruntime_does_not_take(onnx_file, change, remedy):
    path = onnx_file(RELU)
    proto = onnx.load(path)
    proto.ir_version = change.get("ir_version", 8)
    proto.opset_import[0].version = change.get("opset", 17)
    proto.graph.node[0].op_type = change.get("operator", "Relu")
    onnx.save(proto, path)
    with pytest.raises(fastcal.FastcalError, match=rf"^ONNX Runtime cannot load .*model.onnx.*; {remedy}$"):
        calibrate(path, [np.ones((1, 3), "f4")])


def test_a_batch_for_which_onnxruntime_finds_no_memory(onnx_file):
    path = onnx_file("f (float[N] x, int64[2] s) => (float[A, B] y) { y = Expand(x, s) }")
    batch = {"x": np.ones(1, "f4"), "s": np.array([1 << 20, 1 << 24])}
    with OnnxRuntimeRunner(Model(path)) as runner, pytest.raises(fastcal.FastcalError, match="; use a smaller batch s"):
        runner.run(batch)


@pytest.mark.parametrize(
    ("graph", "remedy"),
    [
        ("f (float[N, 3] x) => (float[N, 3] y) { y = Relu(z) z = Relu(y) }", "export it again"),
        (
            "f (double[N, 1, 3, 3] x, double[1, 1, 1, 1] w) => (double[N, 1, 3, 3] y) { y = Conv(x, w) }",
            "update ONNX Runtime, or export the network in float32",
        ),
    ],
)
def test_what_to_do_about_a_graph_that_onnxruntime_does_not_take(onnx_file, graph, remedy):
    with pytest.raises(fastcal.FastcalError, match=rf"^ONNX Runtime cannot load .*model.onnx.*; {remedy}$"):
        OnnxRuntimeRunner(Model(onnx_file(graph)))


def test_ctrl_c_stops_a_run(onnx_file):
    path = onnx_file(
        """f (float[256, 256] x, int64 n) => (float[256, 256] y) {
            y = Loop(n, , x) <body = step (int64 i, bool c, float[256, 256] a) => (bool d, float[256, 256] b) {
                d = Identity(c)
                b = MatMul(a, a)
            }>
        }"""
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background processes
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    with OnnxRuntimeRunner(Model(path), 1) as runner:
        begin = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            runner.run({"x": np.zeros((256, 256), "f4"), "n": np.array(20_000)})
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 3


def test_the_record_names_the_percentiles_settings(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    cache = calibrate(path, [np.ones((1, 2), "f4")], algorithm="percentile", quantile=0.99)
    expected = {"algorithm": "percentile", "quantile": 0.99, "regression_cutoff": 1.0}
    assert expected.items() <= cache.record.entries.items()


class Telling(fastcal.Feed):
    """Batches of ones, of which it announces another number; describes how many passes were begun before."""

    batch_size = 50

    def __init__(self, given, announced):
        self.given, self.announced, self.passes = given, announced, 0

    def __len__(self):
        return self.announced

    def __iter__(self):
        self.passes += 1
        return iter([{"x": np.ones((50, 2), "f4")}] * self.given)

    def describe(self):
        return {"passes": self.passes}


def test_a_feed_without_batches(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    with pytest.raises(fastcal.DataError, match=r"^the feed gave no batches; a calibration needs at least one$"):
        calibrate(path, Telling(0, 0))


def test_the_record_describes_the_batches_before_the_pass(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    assert calibrate(path, Telling(2, 2)).record.entries["passes"] == 0


@pytest.mark.parametrize(("announced", "level"), [(1999, 0), (2000, 1)])
def test_an_engine_for_many_samples_is_built_longer(onnx_file, monkeypatch, announced, level):
    levels = []

    def observer(backend, network, gpu):
        levels.append(backend.optimization_level)
        return OnnxRuntimeBackend().observer(network, gpu)

    monkeypatch.setattr(TensorRTBackend, "observer", observer)
    model = Model(onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }"))
    TensorRTBackend().observe(model, Telling(1, announced), lambda state: None)
    assert levels == [level]


def test_names_of_tactic_sources_can_be_read_more_than_once() -> None:
    backend = TensorRTBackend(tactic_sources=(name for name in ["CUBLAS", "CUDNN"]))
    assert backend.tactic_sources == ("CUBLAS", "CUDNN")


def test_a_string_of_tactic_sources_is_not_split_into_letters() -> None:
    assert TensorRTBackend(tactic_sources="CUDNN").tactic_sources == "CUDNN"  # refused with a hint when TensorRT starts


def test_the_total_is_less_once_samples_are_skipped(tmp_path):
    for number, path in enumerate(sorted((DIGITS / "images").rglob("*.jpg"))[:12]):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"no JPEG" if number == 9 else path.read_bytes())
    model, reports = DIGITS / "digits.onnx", []
    feed = fastcal.ImageFeed(tmp_path, model=model, batch_size=1, skip_unreadable=True, max_unreadable=50)
    calibrate(model, feed, progress=lambda state: reports.append(replace(state)))
    assert (reports[0].total, reports[-1].total, reports[-1].batches) == (12, 11, 11)
