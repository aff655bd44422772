"""A network observed by TensorRT: its own calibration's scales, without its calibration."""

import logging

import numpy as np
import pytest

import fastcal
from conftest import DATA, DIGITS, SQUEEZENET, needs_squeezenet, squeezenet_batches
from fastcal import ArrayFeed, FastcalError, ImageFeed
from fastcal.cache.cache import CalibrationCache

pytestmark = pytest.mark.gpu("TensorRT")


@pytest.fixture
def calibrate(tactics):
    def calibrate(*arguments, **options):
        return fastcal.calibrate(*arguments, backend="tensorrt", tactic_sources=tactics, **options)

    return calibrate


@needs_squeezenet
@pytest.mark.parametrize(("algorithm", "most", "tolerance"), [("minmax", 0, 1e-6), ("entropy2", 4, 1e-5)])
def test_squeezenet_has_tensorrts_scales(calibrate, algorithm, most, tolerance):
    theirs = CalibrationCache.load(DATA / f"squeezenet1_1.{algorithm}.cache").scales
    ours = calibrate(SQUEEZENET, list(squeezenet_batches()), algorithm=algorithm, exact=True).scales
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if ours[name] != pytest.approx(theirs[name], rel=tolerance)]) <= most


def test_the_builder_takes_the_cache_without_a_batch_or_a_missing_scale(trt, calibrate, caplog):
    from int8 import CLASSES, build, make_calibrator

    from fastcal.network import Logger, parse

    with ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=64, device="cuda") as feed:
        cache = calibrate(DIGITS / "digits.onnx", feed)
    builder = trt.Builder(logger := Logger())
    network = parse(builder, fastcal.model.Model(DIGITS / "digits.onnx"), logger)
    network.get_input(0).shape = (64, *tuple(network.get_input(0).shape)[1:])
    calibrator = make_calibrator(CLASSES["entropy2"], [], 64, cache.to_bytes())
    with caplog.at_level(logging.WARNING, "fastcal"):
        build(builder, network, calibrator)
    assert calibrator.asked == 0
    assert not [record for record in caplog.records if "scale" in record.getMessage().lower()]


GRAPH = "f (float[N, 2, 8, 8] x) => (float[N, 2, 8, 8] y) <float[1] k = {2.0}> { r = Relu(x) y = Mul(r, k) }"


def test_the_feeds_arrays_are_read_where_they_are_and_results_do_not_depend_on_where(onnx_file, calibrate):
    import cupy

    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((3, 2, 8, 8), dtype="f4")} for _ in range(3)]
    path = onnx_file(GRAPH)
    on_device = [{"x": cupy.asarray(batch["x"])} for batch in batches]
    ours = calibrate(path, batches, algorithm="minmax").scales
    assert ours == calibrate(path, on_device, algorithm="minmax").scales
    amax = max(float(abs(batch["x"]).max()) for batch in batches)
    top = max(float(batch["x"].max()) for batch in batches)
    assert {name: ours[name] * 127 for name in "xry"} == pytest.approx({"x": amax, "r": top, "y": 2 * top})
    assert sorted(scale * 127 for name, scale in ours.items() if name not in "xry") == pytest.approx([2, 2])


def test_constants_of_many_elements_have_the_scales_of_their_values(onnx_file, calibrate):
    random = np.random.default_rng(0)
    values = {"w": random.standard_normal((1000, 64), dtype="f4"), "c": random.standard_normal(1000, dtype="f4")}
    path = onnx_file("f (float[4, 64] x) => (float[4, 1000] y) { y = Gemm<transB = 1>(x, w, c) }", values)
    batches = [{"x": random.standard_normal((4, 64), dtype="f4")} for _ in range(3)]
    scales = calibrate(path, batches, algorithm="minmax").scales
    products = [batch["x"] @ values["w"].T for batch in batches]
    sums = [product + values["c"] for product in products]
    tensors = [[batch["x"] for batch in batches], products, sums, [values["w"]], [values["c"]], [values["c"]]]
    expected = sorted(max(float(abs(array).max()) for array in arrays) / 127 for arrays in tensors)
    assert sorted(scales.values()) == pytest.approx(expected, rel=1e-5)  # c as it is, and as a row


def test_inputs_of_half_precision(onnx_file, calibrate):
    import cupy

    path = onnx_file("f (float16[N, 2] x) => (float[N, 2] y) { f = Cast<to = 1>(x) y = Relu(f) }")
    batch = np.float16([[-3, 2], [1, 0.5]])
    for given in (batch, cupy.asarray(batch)):
        scales = calibrate(path, [{"x": given}], algorithm="minmax").scales
        assert {name: scales[name] * 127 for name in "xy"} == pytest.approx({"x": 3, "y": 2})
    for beyond in (np.float32([[1e6, 0]]), cupy.asarray(np.float32([[1e6, 0]]))):
        with pytest.raises(FastcalError, match=r"takes input 'x' as float16, which cannot hold 1000000.0; give values"):
            calibrate(path, [{"x": beyond}], algorithm="minmax")


def test_batches_of_different_sizes(onnx_file, calibrate):
    batches = [{"x": np.full((size, 2, 8, 8), size, "f4")} for size in (2, 5, 2)]
    cache = calibrate(onnx_file(GRAPH), batches, algorithm="percentile", quantile=0.5)
    # 4 of 9 samples are 2, the rest 5; the range is 2, then 4, then 8: the bin of 5 ends at 5 + 1/256
    assert cache.scales["x"] == pytest.approx((5 + 8 / 2048) / 127)


def test_tensors_that_do_not_fit_the_memory_are_seen_in_several_passes(onnx_file, tactics, caplog):
    from fastcal.model import Model
    from fastcal.observe.with_tensorrt import TensorRTObserver

    batch = {"x": np.random.default_rng(0).standard_normal((4, 2, 8, 8), dtype="f4")}
    found = []
    for memory in (None, 2500):
        with (
            caplog.at_level(logging.WARNING, "fastcal"),
            TensorRTObserver(Model(onnx_file(GRAPH)), memory=memory, tactic_sources=tactics) as observer,
        ):
            observer.observe(batch)
            found.append({name: histogram.counts.tolist() for name, histogram in observer.histograms().items()})
            blocks = {array.data.mem.ptr for engine in observer._runners for array in engine._shown.values()}
            assert len(blocks) == 1  # the engines share it
            if memory is not None:
                assert max(engine.bytes for engine in observer._runners) <= memory
    assert found[0] == found[1]
    assert [record.getMessage() for record in caplog.records if "runs 2 times" in record.getMessage()]
    with (
        pytest.raises(FastcalError, match=r"'r' of a batch takes .* smaller batch size"),
        TensorRTObserver(Model(onnx_file(GRAPH)), memory=100, tactic_sources=tactics) as observer,
    ):
        observer.observe(batch)


def test_a_network_definition_is_left_as_it_was(trt, calibrate):
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    x = network.add_input("x", trt.float32, (-1, 4))
    relu = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    relu.name = "relu"
    sigmoid = network.add_activation(relu, trt.ActivationType.SIGMOID).get_output(0)
    sigmoid.name = "sigmoid"
    network.mark_output(sigmoid)
    asking, free = network.get_layer(0), network.get_layer(1)
    asking.precision = trt.int8
    asking.set_output_type(0, trt.int8)
    cache = calibrate(network, [{"x": np.float32([[-4, 3, 0, 1]])}], algorithm="minmax")
    assert {name: round(scale * 127, 3) for name, scale in cache.scales.items()} == {
        "x": 4, "relu": 3, "sigmoid": 0.953,
    }  # fmt: skip
    assert [network.get_output(index).name for index in range(network.num_outputs)] == ["sigmoid"]
    assert tuple(network.get_input(0).shape) == (-1, 4)
    assert (asking.precision, asking.get_output_type(0)) == (trt.int8, trt.int8)
    assert not free.precision_is_set


def test_a_gpu_that_is_not_the_first(calibrate):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    caches = []
    for number in (0, 1):
        with ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=64, device=f"cuda:{number}") as feed:
            caches.append(calibrate(DIGITS / "digits.onnx", feed, algorithm="minmax").scales)
    assert caches[0] == pytest.approx(caches[1], rel=1e-6)
    assert cupy.cuda.runtime.getDevice() == 0


def test_auto_takes_tensorrt_where_it_is(onnx_file, monkeypatch):
    monkeypatch.setattr("fastcal.observe.with_tensorrt.TensorRTObserver", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastcal.calibrate(onnx_file(GRAPH), [{"x": np.ones((1, 2, 8, 8), "f4")}])


def test_a_model_that_tensorrt_cannot_parse_is_named(onnx_file, calibrate):
    path = onnx_file("f (float[N, 4] x) => (float[N, 4] y) { y = NoSuchOperator(x) }")
    with pytest.raises(FastcalError, match=r"TensorRT cannot parse .*model.onnx: .*NoSuchOperator"):
        calibrate(path, [{"x": np.ones((1, 4), "f4")}])


def test_nan_is_reported_by_tensor(onnx_file, calibrate, caplog):
    path = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Sqrt(x) }")
    with caplog.at_level(logging.WARNING, "fastcal"):
        calibrate(path, [{"x": np.float32([[-1, 4, 9]])}], algorithm="minmax")
    assert "y (1 NaN, 0 Inf)" in caplog.text


class Announced(ArrayFeed):
    """Batches of a feed that says how many there are."""

    def __init__(self, batches, count):
        super().__init__(batches)
        self.count = count

    def __len__(self):
        return self.count


def test_many_samples_are_worth_a_better_engine(calibrate, monkeypatch):
    from fastcal.observe import with_tensorrt

    levels = []

    class Observer(with_tensorrt.TensorRTObserver):
        def __init__(self, *arguments, optimization_level, **options):
            levels.append(optimization_level)
            super().__init__(*arguments, optimization_level=optimization_level, **options)

    monkeypatch.setattr(with_tensorrt, "TensorRTObserver", Observer)
    batches = [{"image": np.ones((50, 3, 32, 32), np.float32)}]
    for count, chosen in ((1_999, {}), (2_000, {}), (2_000, {"optimization_level": 0})):
        calibrate(DIGITS / "digits.onnx", Announced(batches, count), algorithm="minmax", **chosen)
    assert levels == [0, 1, 0]
