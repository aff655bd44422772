"""The cache that `extract_scales` makes of a model with Q/DQ pairs, as TensorRT's builder takes it."""

import onnx
import pytest
from test_qdq_gpu import Builder, convolutions, decibels, digits, outputs, resnet, squeezenet

import fastcal
from conftest import needs_squeezenet

pytestmark = pytest.mark.gpu("TensorRT")


def reader_of(trt, cache):
    """A calibrator that has a cache and no batches."""

    class Reader(trt.IInt8EntropyCalibrator2):
        def __init__(self):
            trt.IInt8EntropyCalibrator2.__init__(self)
            self.asked, self.written = 0, []

        def get_batch_size(self):
            return 1

        def get_batch(self, names):
            self.asked += 1

        def read_calibration_cache(self):
            return cache

        def write_calibration_cache(self, data):
            self.written.append(bytes(data))

        def check_network(self, network, config):
            assert config.get_flag(trt.BuilderFlag.INT8)

        def calibrate(self, network, tactic_sources):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    return Reader()


@pytest.mark.parametrize("make", [digits, pytest.param(squeezenet, marks=needs_squeezenet), resnet])
def test_the_builder_takes_the_cache_without_calibrating(trt, tactics, tmp_path, make):
    path, batches = make(tmp_path)
    version = ".".join(trt.__version__.split(".")[:3])
    cache = fastcal.calibrate(path, fastcal.ArrayFeed(batches), tensorrt_version=version)
    onnx.save(fastcal.quantize(path, cache), tmp_path / "pairs.onnx")
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx", fastcal.ArrayFeed(batches), tensorrt_version=version)
    assert extracted.missing == ()
    onnx.save(extracted.model, tmp_path / "float.onnx")

    shapes = {name: array.shape for name, array in batches[0].items()}
    engines, readers = {}, {}
    for name, source, contents in (
        ("extracted", tmp_path / "float.onnx", extracted.cache.to_bytes()),
        ("calibrated", path, cache.to_bytes()),
    ):
        builder = Builder(trt, tactics, shapes)
        readers[name] = reader_of(trt, contents)
        engines[name] = builder.build(source, calibrator=readers[name])
    assert [reader.asked for reader in readers.values()] == [0, 0]
    plain = outputs(trt, Builder(trt, tactics, shapes).build(path, int8=False), batches[0])
    layers, quantized = convolutions(trt, engines["extracted"])
    noise = {name: decibels(plain, outputs(trt, engine, batches[0])) for name, engine in engines.items()}
    print(f"\n{path.stem}: convolutions {layers}, INT8 {quantized}; noise to FP32 {noise}")
    # TensorRT picks the fastest kernel, and in FP32 there would be no noise.
    assert quantized > layers / 2
    assert convolutions(trt, engines["calibrated"])[1] > layers / 2
    assert abs(noise["extracted"] - noise["calibrated"]) < 1


def test_a_cache_that_is_not_complete_is_taken_too(trt, tactics, tmp_path):
    path, batches = digits(tmp_path)
    cache = fastcal.calibrate(path, fastcal.ArrayFeed(batches))
    onnx.save(fastcal.quantize(path, cache), tmp_path / "pairs.onnx")
    version = ".".join(trt.__version__.split(".")[:3])
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx", tensorrt_version=version)
    assert extracted.missing
    onnx.save(extracted.model, tmp_path / "float.onnx")
    reader = reader_of(trt, extracted.cache.to_bytes())
    builder = Builder(trt, tactics, {name: array.shape for name, array in batches[0].items()})
    engine = builder.build(tmp_path / "float.onnx", calibrator=reader)
    assert reader.asked == 0
    assert convolutions(trt, engine)[1] > 0
