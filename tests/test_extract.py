"""The float model and the cache that `extract_scales` makes of a model with Q/DQ pairs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import fastcal
from conftest import DIGITS
from fastcal.model import Model

MODEL = DIGITS / "digits.onnx"


@pytest.fixture(scope="module")
def digits():
    with fastcal.ImageFeed(DIGITS / "images", model=MODEL, limit=32, batch_size=32) as feed:
        return MODEL, [{name: np.array(array) for name, array in batch.items()} for batch in feed]


#: A residual block behind a pooling, a Concat, and a classifier with a MatMul.
BLOCK = """f (float[N, 3, 16, 16] image) => (float[N, 5] y) {
  c0 = Conv<pads = [1, 1, 1, 1]>(image, w0)
  n0 = BatchNormalization(c0, scale, shift, mean, variance)
  r0 = Relu(n0)
  p0 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r0)
  c1 = Conv<pads = [1, 1, 1, 1]>(p0, w1, b)
  s1 = Add(c1, p0)
  r1 = Relu(s1)
  both = Concat<axis = 1>(r1, p0)
  t = ConvTranspose<strides = [2, 2]>(both, w_up, b)
  g = GlobalAveragePool(t)
  v = Flatten(g)
  d = Gemm<transB = 1>(v, w_dense, b)
  m = MatMul(d, w_last)
  y = Add(m, b_last)
}"""

#: Mobile networks' parts: a depthwise convolution, channel attention, a resized map beside another one.
MOBILE = """f (float[N, 3, 16, 16] image) => (float[N, 16, 8, 8] y, float[N, 8, 8, 8] z) {
  c0 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(image, w0)
  h0 = HardSwish(c0)
  c1 = Conv<pads = [1, 1, 1, 1], group = 8>(h0, w_depth)
  g1 = GlobalAveragePool(c1)
  c2 = Conv(g1, w_short, b)
  g2 = Sigmoid(c2)
  m1 = Mul(c1, g2)
  z = Conv(m1, w_short)
  a1 = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(z)
  u1 = Resize<mode = "nearest">(a1, , factors)
  y = Concat<axis = 1>(u1, h0)
}"""

#: Attention without a Softmax: products of activations, of three dimensions.
PRODUCTS = """f (float[N, 6, 8] x) => (float[N, 6, 6] y) {
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  kt = Transpose<perm = [0, 2, 1]>(k)
  y = MatMul(q, kt)
}"""


def values(shapes, seed=5):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, dtype=np.float32) / 4 for name, shape in shapes.items()}


@pytest.fixture
def block(onnx_file):
    weights = values({
        "w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w_up": (16, 8, 2, 2), "w_dense": (8, 8), "w_last": (8, 5), "b": (8,),
        "b_last": (5,), "scale": (8,), "shift": (8,), "mean": (8,),
    })  # fmt: skip
    path = onnx_file(BLOCK, weights | {"variance": np.full(8, 0.5, "f4")}, "block.onnx")
    return path, [{"image": np.random.default_rng(1).standard_normal((4, 3, 16, 16), dtype=np.float32)}]


@pytest.fixture
def mobile(onnx_file):
    weights = values({"w0": (8, 3, 3, 3), "w_depth": (8, 1, 3, 3), "w_short": (8, 8, 1, 1), "b": (8,)})
    path = onnx_file(MOBILE, weights | {"factors": np.array([1, 1, 2, 2], "f4")}, "mobile.onnx")
    return path, [{"image": np.random.default_rng(1).standard_normal((4, 3, 16, 16), dtype=np.float32)}]


@pytest.fixture
def products(onnx_file):
    path = onnx_file(PRODUCTS, values({"wq": (8, 8), "wk": (8, 8)}), "products.onnx")
    return path, [{"x": np.random.default_rng(1).standard_normal((4, 6, 8), dtype=np.float32)}]


@pytest.fixture(params=["digits", "block", "mobile", "products"])
def network(request):
    """The path of a network, and batches for it."""
    return request.getfixturevalue(request.param)


def run(model, batch):
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, batch)


def paired(model):
    """The scales of the pairs of a model, by the activation that the pair reads."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: constants[node.input[1]] for node in quantize if node.input[0] not in constants}


def has_pairs(model):
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def test_quantize_and_back(network, tmp_path):
    path, batches = network
    cache = fastcal.calibrate(path, fastcal.ArrayFeed(batches))
    quantized = fastcal.quantize(path, cache)
    onnx.save(quantized, tmp_path / "pairs.onnx")
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx", tensorrt_version="8.6.0")
    onnx.checker.check_model(extracted.model, full_check=True)
    assert not has_pairs(extracted.model)
    for ours, original in zip(run(extracted.model, batches[0]), run(path, batches[0]), strict=True):
        assert ours.tobytes() == original.tobytes()
    expected = paired(quantized)
    assert set(extracted.paired) == set(expected)
    for name in expected:
        assert extracted.cache.scales[name] == cache.scales[name], name
    assert extracted.cache.header == "TRT-8600-EntropyCalibration2"
    assert {*extracted.missing, *extracted.cache.scales} == {*Model(path).calibrated}
    assert not {*extracted.missing} & {*extracted.cache.scales}


def test_the_rest_is_calibrated_with_images(network, tmp_path):
    path, batches = network
    cache = fastcal.calibrate(path, fastcal.ArrayFeed(batches), algorithm="minmax")
    onnx.save(fastcal.quantize(path, cache), tmp_path / "pairs.onnx")
    missing = fastcal.extract_scales(tmp_path / "pairs.onnx").missing
    assert missing
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx", fastcal.ArrayFeed(batches))
    expected = fastcal.calibrate(path, fastcal.ArrayFeed(batches))
    assert extracted.missing == ()
    assert {name: extracted.cache.scales[name] for name in missing} == {name: expected.scales[name] for name in missing}
    assert all(extracted.cache.scales[name] == cache.scales[name] for name in extracted.paired)


def test_the_cache_is_up_to_date_for_the_model_as_it_is_saved(block, tmp_path):
    path, batches = block
    onnx.save(fastcal.quantize(path, fastcal.calibrate(path, fastcal.ArrayFeed(batches))), tmp_path / "pairs.onnx")
    for feed in (None, fastcal.ArrayFeed(batches)):
        extracted = fastcal.extract_scales(tmp_path / "pairs.onnx", feed)
        onnx.save(extracted.model, tmp_path / "float.onnx")
        extracted.cache.save(tmp_path / "x.cache")
        check = fastcal.check_cache(fastcal.CalibrationCache.load(tmp_path / "x.cache"), tmp_path / "float.onnx", feed)
        assert check.recorded
        assert (check.missing, check.unknown, check.invalid, check.stale) == (extracted.missing, (), (), ())


class Reader:
    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


def quantize_static(path, batches, output, **options):
    from onnxruntime.quantization import QuantType, quantize_static

    types = {name: options.pop(name, QuantType.QInt8) for name in ("activation_type", "weight_type")}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    quantize_static(path, output, Reader(batches), per_channel=True, extra_options=symmetric | options, **types)


def test_float_weights_of_onnxruntimes_quantizer(network, tmp_path):
    path, batches = network
    quantize_static(path, batches, tmp_path / "pairs.onnx", AddQDQPairToWeight=True, QuantizeBias=False)
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx")
    onnx.checker.check_model(extracted.model, full_check=True)
    for ours, original in zip(run(extracted.model, batches[0]), run(path, batches[0]), strict=True):
        assert ours.tobytes() == original.tobytes()
    expected = {
        name.removesuffix("_QuantizeLinear_Input"): scale
        for name, scale in paired(onnx.load(tmp_path / "pairs.onnx")).items()
    }
    assert {*extracted.paired} == {*expected}
    assert expected == {name: np.float32(extracted.cache.scales[name]) for name in expected}
    assert {value.name for value in onnx.load(path).graph.output} <= {*extracted.cache.scales}
