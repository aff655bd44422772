"""The float model and the cache that `extract_scales` makes of a model with Q/DQ pairs."""

import contextlib
import logging
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import fastcal
from conftest import DIGITS
from fastcal.errors import ModelError
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


def test_integer_weights_of_onnxruntimes_quantizer(block, tmp_path):
    path, batches = block
    quantize_static(path, batches, tmp_path / "pairs.onnx")
    pairs = onnx.load(tmp_path / "pairs.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in pairs.initializer}
    assert {array.dtype.name for name, array in stored.items() if name.endswith("_quantized")} == {"int8", "int32"}
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx").model
    assert run(extracted, batches[0])[0].dtype == np.float32
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in extracted.graph.initializer}
    (layer,) = [node for node in extracted.graph.node if node.op_type == "ConvTranspose"]
    bias = layer.input[2]
    for name, scale, integers in (
        (layer.input[1], stored["w_up_scale"].reshape(1, 8, 1, 1), stored["w_up_quantized"]),
        (bias, stored[f"{bias}_quantized_scale"], stored[f"{bias}_quantized"]),
    ):
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], integers.astype("f4") * scale)


#: An export of PyTorch's after quantization-aware training: scales and zero points are nodes, weights have pairs of one
#: scale per channel, a Linear has its weights transposed behind the pair, and the output has a pair.
PYTORCH = """f (float[N, 3, 8, 8] image) => (float[N, 5] y) {
  s1 = Constant<value = float {0.02}>()
  z1 = Constant<value = int8 {0}>()
  q1 = QuantizeLinear(image, s1, z1)
  d1 = DequantizeLinear(q1, s1, z1)
  wq = QuantizeLinear<axis = 0>(w, w_scale, w_zero)
  wd = DequantizeLinear<axis = 0>(wq, w_scale, w_zero)
  c = Conv(d1, wd, b)
  r = Relu(c)
  s2 = Constant<value = float {0.03}>()
  z2 = Constant<value = int8 {0}>()
  q2 = QuantizeLinear(r, s2, z2)
  d2 = DequantizeLinear(q2, s2, z2)
  g = GlobalAveragePool(d2)
  v = Flatten(g)
  s3 = Constant<value = float {0.005}>()
  q3 = QuantizeLinear(v, s3, z2)
  d3 = DequantizeLinear(q3, s3, z2)
  lq = QuantizeLinear<axis = 0>(l, l_scale, l_zero)
  ld = DequantizeLinear<axis = 0>(lq, l_scale, l_zero)
  t = Transpose<perm = [1, 0]>(ld)
  m = MatMul(d3, t)
  a = Add(m, lb)
  s4 = Constant<value = float {0.04}>()
  q4 = QuantizeLinear(a, s4, z2)
  y = DequantizeLinear(q4, s4, z2)
}"""

#: The same network without the pairs.
WITHOUT = """f (float[N, 3, 8, 8] image) => (float[N, 5] y) {
  c = Conv(image, w, b)
  r = Relu(c)
  g = GlobalAveragePool(r)
  v = Flatten(g)
  t = Transpose<perm = [1, 0]>(l)
  m = MatMul(v, t)
  y = Add(m, lb)
}"""


def test_an_export_of_pytorchs(onnx_file):
    weights = values({"w": (8, 3, 3, 3), "b": (8,), "l": (5, 8), "lb": (5,)})
    more = {"w_scale": np.full(8, 0.004, "f4"), "w_zero": np.zeros(8, "i1"), "l_scale": np.full(5, 0.005, "f4")}
    pairs = onnx_file(PYTORCH, weights | more | {"l_zero": np.zeros(5, "i1")}, "pairs.onnx")
    path, batch = onnx_file(WITHOUT, weights), {"image": values({"x": (2, 3, 8, 8)})["x"]}
    extracted = fastcal.extract_scales(pairs)
    assert run(extracted.model, batch)[0].tobytes() == run(path, batch)[0].tobytes()
    scales = {name: np.float32(scale) for name, scale in extracted.cache.scales.items()}
    assert extracted.paired == ("image", "r", "v", "y")
    # c: the Relu behind it rounds alike; g: a Flatten is all that follows.
    expected = {"image": 0.02, "c": 0.03, "r": 0.03, "g": 0.005, "v": 0.005, "y": 0.04}
    assert scales == {name: np.float32(scale) for name, scale in expected.items()}
    assert extracted.missing == ("m",)
    left = {tensor.name for tensor in extracted.model.graph.initializer}
    assert left == {"w", "b", "l", "lb"}
    assert [node.op_type for node in extracted.model.graph.node] == [
        node.op_type for node in onnx.load(path).graph.node
    ]


#: A model of ModelOpt's: inner layers in FP16 between Casts, and scales of their own for each node of a pair.
MODELOPT = """f (float[N, 3, 8, 8] image) => (float[N, 8, 8, 8] y) {
  h = Cast<to = 10>(image)
  wq = QuantizeLinear<axis = 0>(w, w_scale_1, w_zero_1)
  q = QuantizeLinear(h, h_scale_1, h_zero_1)
  wd = DequantizeLinear<axis = 0>(wq, w_scale_2, w_zero_2)
  d = DequantizeLinear(q, h_scale_2, h_zero_2)
  c = Conv<pads = [1, 1, 1, 1]>(d, wd, b)
  y = Cast<to = 1>(c)
}"""


def test_a_model_of_modelopts_in_fp16(onnx_file):
    weights = {name: array.astype("f2") for name, array in values({"w": (8, 3, 3, 3), "b": (8,)}).items()}
    more = {f"w_scale_{number}": np.full(8, 0.004, "f2") for number in (1, 2)}
    more |= {f"w_zero_{number}": np.zeros(8, "i1") for number in (1, 2)}
    more |= {f"h_scale_{number}": np.array(0.02, "f2") for number in (1, 2)}
    more |= {f"h_zero_{number}": np.array(0, "i1") for number in (1, 2)}
    pairs = onnx_file(MODELOPT, weights | more)
    model = onnx.load(pairs)
    model.opset_import[0].version = 19  # the first whose pairs may be FP16
    onnx.save(model, pairs)
    extracted = fastcal.extract_scales(pairs)
    assert [node.op_type for node in extracted.model.graph.node] == ["Cast", "Conv", "Cast"]
    assert extracted.model.graph.node[1].input == ["h", "w", "b"]
    assert extracted.cache.scales == dict.fromkeys(("image", "h"), float(np.float16(0.02)))


#: Pairs in unusual places: stored unsigned weights, a DequantizeLinear for each reader, INT8 between the two nodes of a
#: pair, an input and a tensor with two names as outputs, and two pairs on one tensor.
UNUSUAL = """f (float[N, 4] x) => (float[N, 4] same, float[N, 8] y, float[N, 8] z, float[2, M] u) {
  q0 = QuantizeLinear(x, s, middle)
  same = DequantizeLinear(q0, s, middle)
  d0 = DequantizeLinear(q0, s, middle)
  w = DequantizeLinear(w_stored, w_scale, middle)
  m = MatMul(d0, w)
  q1 = QuantizeLinear(m, s1, zero)
  y = DequantizeLinear(q1, s1, zero)
  z = DequantizeLinear(q1, s1, zero)
  q2 = QuantizeLinear(y, s2, zero)
  moved = Reshape(q2, shape)
  d2 = DequantizeLinear(moved, s2, zero)
  u = Relu(d2)
}"""


def test_pairs_in_unusual_places(onnx_file, caplog):
    constants = {
        "s": np.array(0.01, "f4"), "s1": np.array(0.03, "f4"), "s2": np.array(0.02, "f4"), "zero": np.array(0, "i1"),
        "middle": np.array(128, "u1"), "w_stored": np.arange(100, 132, dtype="u1").reshape(4, 8),
        "w_scale": np.array(0.5, "f4"), "shape": np.array([2, -1]),
    }  # fmt: skip
    path = onnx_file(UNUSUAL, constants)
    model = onnx.load(path)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("moved", onnx.TensorProto.INT8, [2, None]))
    onnx.save(model, path)
    with caplog.at_level(logging.WARNING, "fastcal"):
        extracted = fastcal.extract_scales(path)
    onnx.checker.check_model(extracted.model, full_check=True)
    x = values({"x": (2, 4)})["x"]
    m = x @ ((np.arange(100, 132, dtype="f4").reshape(4, 8) - 128) * 0.5)
    same, y, z, u = run(extracted.model, {"x": x})
    assert np.array_equal(same, x)
    assert np.allclose(y, m, rtol=1e-6)
    assert np.array_equal(z, y)
    assert np.array_equal(u, np.maximum(y, 0).reshape(2, -1))
    scales = {"x": 0.01, "same": 0.01, "y": 0.03, "z": 0.03, "moved": 0.02, "u": 0.02}
    assert {name: np.float32(scale) for name, scale in extracted.cache.scales.items()} == {
        name: np.float32(scale) for name, scale in scales.items()
    }
    assert [text for text in caplog.messages if "several scales" in text] == [
        "pairs of several scales read m, 0.03 and 0.02: the larger one counts"
    ]


ACTIVATION = """f (float[N, 4] x) => (float[N, 4] y) {{
  [quantize] q = QuantizeLinear(x, {0}, {1})
  [dequantize] d = DequantizeLinear(q, {2}, {1})
  y = Relu(d)
}}"""
WEIGHTS = """f (float[N, 4] x) => (float[N, 4] y) {{
  q = QuantizeLinear(x, s, i8)
  d = DequantizeLinear(q, s, i8)
  [weights] w = DequantizeLinear({0}, s, {1})
  y = MatMul(d, w)
}}"""


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (ACTIVATION.format("s", "u8", "s"), r"QuantizeLinear quantize is not symmetric: its zero point is 3 \(uint8\)"),
        (ACTIVATION.format("s", "", "s"), r"QuantizeLinear quantize is not symmetric: its zero point is 0 \(uint8\)"),
        (
            ACTIVATION.format("s", "i8_5", "s"),
            r"Linear quantize is not symmetric: its zero point is 5 \(int8\)",
        ),
        (ACTIVATION.format("s", "i8", "s2"), "DequantizeLinear dequantize has another scale than quantize"),
        (ACTIVATION.format("none", "i8", "none"), "QuantizeLinear quantize has a scale that is 0"),
        (ACTIVATION.format("several", "i8s", "several"), "QuantizeLinear quantize has 4 scales for the activation x"),
        (
            WEIGHTS.format("stored_u8", "u8"),
            r"Linear weights is not symmetric: its zero point is 3 \(uint8\)",
        ),
        (
            "f (float[N, 4] x) => (float[N, 4] y) { s1 = ReduceMax(x) [q] q = QuantizeLinear(x, s1, i8) "
            "y = DequantizeLinear(q, s1, i8) }",
            "QuantizeLinear q has a scale that is computed",
        ),
        (
            "f (int8[N, 4] x, float[N, 4] x2) => (float[N, 4] y) { [d] d = DequantizeLinear(x, s, i8) y = Add(d, x2) }",
            "DequantizeLinear d reads x, which no QuantizeLinear gives",
        ),
        (
            "f (float[N, 4] x) => (float[N, 4] y) { q = QuantizeLinear(x, s, i8) "
            "[product] p = QLinearMatMul(q, s, i8, stored_i8, s, i8, s, i8) y = DequantizeLinear(p, s, i8) }",
            "QLinearMatMul product computes in int8",
        ),
        ("f (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }", "has no QuantizeLinear and DequantizeLinear of activ"),
        (
            "f (float[N, 4] x) => (int8[N, 4] y) { y = QuantizeLinear(x, s, i8) }",
            "has an INT8 output, y; export the network with outputs in float",
        ),
        (
            "f (float[N, 4] x, bool c) => (float[N, 4] y) { y = If (c) <then_branch = t () => (float[N, 4] a) { "
            "[inner] q = QuantizeLinear(x, s, i8) a = DequantizeLinear(q, s, i8) }, "
            "else_branch = e () => (float[N, 4] b) { b = Relu(x) }> }",
            "has inner in an If, a Loop or a Scan",
        ),
    ],
)
def test_pairs_that_no_cache_can_stand_for(onnx_file, graph, message):
    constants = {
        "s": np.array(0.1, "f4"), "s2": np.array(0.2, "f4"), "none": np.array(0, "f4"), "u8": np.array(3, "u1"),
        "i8": np.array(0, "i1"), "i8_5": np.array(5, "i1"), "several": np.full(4, 0.1, "f4"), "i8s": np.zeros(4, "i1"),
        "stored_u8": np.ones((4, 4), "u1"), "stored_i8": np.ones((4, 4), "i1"),
    }  # fmt: skip
    path = onnx_file(graph.replace(", )", ")"), constants)
    with pytest.raises(ModelError, match=f"^{re.escape(str(path))}.*{message}"):
        fastcal.extract_scales(path)


def test_pairs_of_16_bits(onnx_file):
    path = onnx_file(ACTIVATION.format("s", "z", "s"), {"s": np.array(0.1, "f4"), "z": np.array(0, "i2")})
    model = onnx.load(path)
    model.opset_import[0].version = 21
    onnx.save(model, path)
    with pytest.raises(ModelError, match="QuantizeLinear quantize is of int16"):
        fastcal.extract_scales(path)


def test_the_command(run_fastcal, block, tmp_path):
    path, batches = block
    onnx.save(fastcal.quantize(path, fastcal.calibrate(path, fastcal.ArrayFeed(batches))), tmp_path / "pairs.onnx")
    expected = fastcal.extract_scales(tmp_path / "pairs.onnx", tensorrt_version="8.6.0")
    words = ("cache", "extract", "pairs.onnx", "-o", "x.cache", "--model", "float.onnx", "--tensorrt", "8.6.0")
    done = run_fastcal(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "float.onnx").read_bytes() == expected.model.SerializeToString()
    assert (tmp_path / "x.cache").read_bytes() == expected.cache.to_bytes()
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows == {
        "pairs": f"scales of {len(expected.paired)} tensors", "tensors": str(len(expected.cache.scales)),
        "missing": f"{len(expected.missing)} tensors: {', '.join(expected.missing)}", "model": "float.onnx",
        "cache": "x.cache, TRT-8600-EntropyCalibration2",
    }  # fmt: skip
    np.save(tmp_path / "batch.npy", batches[0]["image"])
    done = run_fastcal(*words, "--data", "batch.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stdout
    check = run_fastcal("cache", "check", "x.cache", "float.onnx", "batch.npy", cwd=tmp_path)
    assert (check.returncode, check.stdout) == (0, "in order: 0 missing, 0 unknown, 0 invalid, 0 stale\n")
    for words, message in (
        (("pairs.onnx", "-o", "pairs.onnx"), "pairs.onnx is the model itself; name another file for the cache"),
        (
            ("pairs.onnx", "-o", "x.cache", "--model", "x.cache"),
            "x.cache is the cache; name another file for the",
        ),
        (("float.onnx", "-o", "y.cache"), "float.onnx has no QuantizeLinear and DequantizeLinear of activations"),
        (("pairs.onnx", "-o", "y.cache", "--tensorrt", "11.0.0"), "TensorRT 11.0.0 takes no calibration cache"),
    ):
        done = run_fastcal("cache", "extract", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.match(f"error: {message}", done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "y.cache").exists()


def test_external_weights_come_with_the_model(block, tmp_path):
    path, batches = block
    quantized = fastcal.quantize(path, fastcal.calibrate(path, fastcal.ArrayFeed(batches)))
    onnx.save(quantized, tmp_path / "pairs.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    extracted = fastcal.extract_scales(tmp_path / "pairs.onnx")
    (tmp_path / "weights").unlink()
    assert run(extracted.model, batches[0])[0].tobytes() == run(path, batches[0])[0].tobytes()


def test_a_model_too_large_for_one_file(block, tmp_path, monkeypatch):
    path, batches = block
    quantized = fastcal.quantize(path, fastcal.calibrate(path, fastcal.ArrayFeed(batches)), int8_weights=True)
    onnx.save(quantized, tmp_path / "pairs.onnx")
    size = sum(4 * np.prod(weights.dims) for weights in onnx.load(path).graph.initializer)
    for most in (size / 2, size * 2):  # in INT8, the weights take a quarter
        monkeypatch.setattr("fastcal.unpaired.MOST_IN_A_FILE", most)
        with contextlib.nullcontext() if most > size else pytest.raises(ModelError, match="GB in float"):
            fastcal.extract_scales(tmp_path / "pairs.onnx")
