"""The calibrators inside TensorRT's builder."""

import threading

import numpy as np
import pytest

import fastcal
from conftest import DIGITS, SQUEEZENET, needs_squeezenet
from fastcal import FastcalError, Feed, ImageFeed, Preprocess

pytestmark = pytest.mark.gpu("TensorRT")

CLASSES = ["EntropyCalibrator2", "EntropyCalibrator", "MinMaxCalibrator", "LegacyCalibrator", "Calibrator"]
SHAPE = (4, 3, 64, 64)


@pytest.fixture(scope="session")
def builder(trt):
    return trt.Builder(trt.Logger(trt.Logger.ERROR))


def resident(trt, name, batches):
    """The least calibrator there can be: addresses of batches that lie on the GPU already; keeps the cache."""
    base = {"Calibrator": trt.IInt8Calibrator}.get(name) or getattr(trt, f"IInt8{name}")

    class Resident(base):
        def __init__(self):
            base.__init__(self)
            self.left = list(batches)
            self.cache = None

        def get_batch_size(self):
            return SHAPE[0]

        def get_batch(self, names):
            return [self.left.pop(0).data.ptr] if self.left else None

        def read_calibration_cache(self):
            return None

        def write_calibration_cache(self, cache):
            self.cache = bytes(cache)

        def get_algorithm(self):
            return base.get_algorithm(self) if name != "Calibrator" else trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2

        def get_quantile(self):
            return 0.9999

        def get_regression_cutoff(self):
            return 1.0

        def read_histogram_cache(self, *_):
            return None

        def write_histogram_cache(self, *_):
            pass

    return Resident()


def one_layer(trt, builder):
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    layer = network.add_activation(network.add_input("input", trt.float32, SHAPE), trt.ActivationType.CLIP)
    layer.alpha, layer.beta = -3e38, 3e38
    network.mark_output(layer.get_output(0))
    return network


def build(trt, builder, network, calibrator, tactics):
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.builder_optimization_level = 0
    config.set_tactic_sources(tactics)
    config.int8_calibrator = calibrator
    return builder.build_serialized_network(network, config)


@pytest.fixture
def feed(photographs):
    with ImageFeed(photographs, preprocess=Preprocess(size=(64, 64)), batch_size=4, device="cuda") as feed:
        yield feed


@pytest.mark.parametrize("name", CLASSES)
def test_tensorrt_writes_the_same_cache_as_from_resident_batches(trt, builder, tactics, feed, tmp_path, name):
    batches = [batch["input"].copy() for batch in feed]
    theirs = resident(trt, name, batches)
    assert build(trt, builder, one_layer(trt, builder), theirs, tactics) is not None
    ours = getattr(fastcal, name)(feed, cache=tmp_path / "x.cache")
    with ours:
        assert build(trt, builder, one_layer(trt, builder), ours, tactics) is not None
    assert theirs.cache is not None
    assert (tmp_path / "x.cache").read_bytes() == theirs.cache
    assert (ours.stats.batches, ours.stats.images) == (len(batches), 4 * len(batches))
    # A second build takes the cache; one without it calibrates again from the first batch.
    with ours:
        assert build(trt, builder, one_layer(trt, builder), ours, tactics) is not None
    assert ours.stats.batches == 0
    (tmp_path / "x.cache").unlink()
    with ours:
        assert build(trt, builder, one_layer(trt, builder), ours, tactics) is not None
    assert (tmp_path / "x.cache").read_bytes() == theirs.cache


@pytest.mark.parametrize("name", CLASSES)
@needs_squeezenet
def test_scales_of_squeezenet_are_those_from_resident_batches(trt, builder, tactics, photographs, tmp_path, name):
    from fastcal.cache.cache import CalibrationCache

    def network():
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(SQUEEZENET))
        return network

    with ImageFeed(photographs, model=SQUEEZENET, device="cuda") as feed:
        theirs = resident(trt, name, [batch["input"].copy() for batch in feed])
        assert build(trt, builder, network(), theirs, tactics) is not None
        ours = getattr(fastcal, name)(feed, cache=tmp_path / "x.cache", model=SQUEEZENET)
        with ours:
            assert build(trt, builder, network(), ours, tactics) is not None
    expected = CalibrationCache.from_bytes(theirs.cache).scales
    scales = CalibrationCache.load(tmp_path / "x.cache").scales
    assert scales.keys() == expected.keys()
    differ = [key for key, scale in scales.items() if scale != pytest.approx(expected[key], rel=1e-6)]
    # TensorRT picks the kernels it calibrates with by timing them, so its activations differ by rounding from build to
    # build, and where the divergence has a flat minimum another bin wins: of builds from the same resident batches, in
    # one process or each in its own, up to 25 of 91 scales differed. A timing cache does not change that, and an
    # algorithm selector is not asked before the cache is written. The input is no kernel's, an amax leaves no choice.
    assert scales["input"] == expected["input"]
    assert len(differ) <= (0 if name == "MinMaxCalibrator" else len(scales) // 2), differ


def test_arrays_reach_tensorrt_from_wherever_they_are(trt, builder, tactics, tmp_path):
    import cupy

    random = np.random.default_rng(0)
    batches = [random.standard_normal(SHAPE, dtype=np.float32) for _ in range(3)]
    theirs = resident(trt, "EntropyCalibrator2", [cupy.asarray(batch) for batch in batches])
    build(trt, builder, one_layer(trt, builder), theirs, tactics)
    labelled = [(batch, np.arange(len(batch))) for batch in batches]  # as a DataLoader gives them
    on_device = [cupy.asarray(batch) for batch in batches]
    for given in ([{"input": batch} for batch in batches], (pair for pair in labelled), lambda: on_device):
        ours = fastcal.EntropyCalibrator2(given, cache=tmp_path / "x.cache")
        with ours:
            build(trt, builder, one_layer(trt, builder), ours, tactics)
        assert (tmp_path / "x.cache").read_bytes() == theirs.cache
        (tmp_path / "x.cache").unlink()


def test_two_inputs_are_handed_over_in_tensorrts_order(trt, builder, tactics, tmp_path):
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    small, large = (
        network.add_input("small", trt.float32, (2, 1, 8, 8)),
        network.add_input("large", trt.float32, (2, 1, 8, 8)),
    )
    network.mark_output(network.add_elementwise(small, large, trt.ElementWiseOperation.SUM).get_output(0))
    batch = {"large": np.full((2, 1, 8, 8), 127, np.float32), "small": np.full((2, 1, 8, 8), 1.27, np.float32)}
    calibrator = fastcal.MinMaxCalibrator([batch], cache=tmp_path / "x.cache")
    with calibrator:
        assert build(trt, builder, network, calibrator, tactics) is not None
    scales = fastcal.CalibrationCache.load(tmp_path / "x.cache").scales
    assert scales["large"] == 1
    assert scales["small"] == pytest.approx(0.01)


class Failing(Feed):
    """Three batches promised; after one comes an error, or the end."""

    batch_size = 4

    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 3

    def __iter__(self):
        yield {"input": np.ones(SHAPE, np.float32)}
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "message"), [(OSError("the disk is gone"), "disk is gone"), (None, "ended after 1 of 3 batches")]
)
def test_what_tensorrt_swallows_is_raised_and_no_cache_written(trt, builder, tactics, tmp_path, error, message):
    calibrator = fastcal.EntropyCalibrator2(Failing(error), cache=tmp_path / "x.cache")
    engine = None
    with pytest.raises((OSError, FastcalError), match=message), calibrator:
        engine = build(trt, builder, one_layer(trt, builder), calibrator, tactics)
    assert engine is not None  # TensorRT took the error for the end of the data
    with pytest.raises((OSError, FastcalError), match=message):
        calibrator.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("calibration", "asked"), [("tensorrt", (4, 256)), ("fastcal", (0, 0))])
def test_an_engine_from_a_model_and_images(trt, tactics, tmp_path, calibration, asked):
    with ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=64) as feed:
        calibrator = fastcal.EntropyCalibrator2(feed, cache=tmp_path / "x.cache", model=DIGITS / "digits.onnx")
        engine = fastcal.build_engine(
            DIGITS / "digits.onnx", calibrator, calibration=calibration, optimization_level=0, tactic_sources=tactics,
            timing_cache=tmp_path / "timings",
        )  # fmt: skip
    assert (calibrator.stats.batches, calibrator.stats.images) == asked
    assert (tmp_path / "timings").stat().st_size > 0
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    assert runtime.deserialize_cuda_engine(engine).get_tensor_shape("image")[0] == -1


def test_batches_of_another_shape_than_tensorrt_reads(trt, builder):
    config = builder.create_builder_config()
    calibrator = fastcal.EntropyCalibrator2([{"input": np.zeros((2, *SHAPE[1:]), np.float32)}])
    calibrator.check_network(one_layer(trt, builder), config)
    assert calibrator.get_batch(["input"]) is None
    with pytest.raises(
        FastcalError, match=r"reads input 'input' as \(4, 3, 64, 64\), the batches are \(2, 3, 64, 64\)"
    ):
        calibrator.check()


def test_build_engine_raises_the_feeds_own_error(tactics, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((DIGITS / "images").rglob("*.jpg"))[:12]):
        data = path.read_bytes()
        (images / f"{number:02}.jpg").write_bytes(data[:700] if number == 9 else data)
    feed = ImageFeed(images, model=DIGITS / "digits.onnx", batch_size=4)
    calibrator = fastcal.EntropyCalibrator2(feed, cache=tmp_path / "x.cache")
    with feed, pytest.raises(FastcalError, match=r"09.jpg cannot be decoded"):
        fastcal.build_engine(DIGITS / "digits.onnx", calibrator, optimization_level=0, tactic_sources=tactics)
    assert not (tmp_path / "x.cache").exists()


def test_a_builder_that_stops_after_one_batch(feed, tmp_path):
    calibrator = fastcal.EntropyCalibrator2(feed, cache=tmp_path / "x.cache")
    assert calibrator.read_calibration_cache() is None
    assert calibrator.get_batch(["input"])
    calibrator.write_calibration_cache(b"TRT-8600-EntropyCalibration2\ninput: 0\n")
    assert list(tmp_path.iterdir()) == []
    del calibrator
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")]


class Given(Feed):
    """One batch of one array, handed on as it is."""

    batch_size = 4

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([{"input": self.array}])


def test_arrays_of_others_are_waited_for():
    import cupy

    # The copy takes long and is only enqueued; what is handed out must be what it leaves.
    source, target = cupy.ones(1 << 28, cupy.float32), cupy.zeros(1 << 28, cupy.float32)

    class Foreign:
        shape, dtype = (1 << 28,), np.dtype(np.float32)
        __cuda_array_interface__ = {**target.__cuda_array_interface__, "version": 2}  # noqa: RUF012

    del Foreign.__cuda_array_interface__["stream"]
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream.null:
        for _ in range(20):
            cupy.copyto(target, source)
        ended = cupy.cuda.Event()
        ended.record()
    calibrator = fastcal.EntropyCalibrator2(Given(Foreign))
    assert calibrator.get_batch(["input"]) == [target.data.ptr]
    assert ended.done


def test_torch_tensors_or_others_with_the_cuda_array_interface_are_read_where_they_are():
    import cupy

    array = cupy.zeros(SHAPE, cupy.float32)
    calibrator = fastcal.EntropyCalibrator2(Given(array))
    assert calibrator.get_batch(["input"]) == [array.data.ptr]
    calibrator = fastcal.EntropyCalibrator2(Given(array.transpose(0, 1, 3, 2)))
    assert calibrator.get_batch(["input"]) is None
    with pytest.raises(FastcalError, match="not contiguous"):
        calibrator.check()
