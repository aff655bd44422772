"""Models with Q/DQ pairs: where the pairs are, what they hold, and how much the output suffers."""

import logging
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import fastcal
from conftest import DIGITS, SQUEEZENET, needs_squeezenet, squeezenet_batches
from fastcal.errors import CacheError, FastcalError, ModelError
from fastcal.model import Model
from fastcal.qdq import count_quantized

#: Two blocks as ResNet has them, the first with a convolution in its shortcut; Inception's pooling; a classifier.
RESIDUAL = """f (float[N, 3, 16, 16] image) => (float[N, 5] y) {
  [stem] c0 = Conv<pads = [1, 1, 1, 1]>(image, w0)
  n0 = BatchNormalization(c0, scale, shift, mean, variance)
  r0 = Relu(n0)
  p0 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r0)
  [down] short = Conv(p0, w_short, b)
  [a1] c1 = Conv<pads = [1, 1, 1, 1]>(p0, w1)
  n1 = BatchNormalization(c1, scale, shift, mean, variance)
  r1 = Relu(n1)
  [a2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2, b)
  n2 = BatchNormalization(c2, scale, shift, mean, variance)
  [add1] s1 = Add(short, n2)
  x1 = Relu(s1)
  [b1] c3 = Conv<pads = [1, 1, 1, 1]>(x1, w1)
  r3 = Relu(c3)
  [b2] c4 = Conv<pads = [1, 1, 1, 1]>(r3, w2, b)
  [add2] s2 = Add(c4, x1)
  x2 = Relu(s2)
  [branch] c5 = Conv(x2, w_short)
  [pool] p5 = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x2)
  both = Concat<axis = 1>(c5, p5)
  [up] t = ConvTranspose<strides = [2, 2]>(both, w_up, b)
  [gap] g = GlobalAveragePool(t)
  v = Flatten(g)
  [dense] d = Gemm<transB = 1, beta = 0.5>(v, w_dense, b)
  e = Sigmoid(d)
  [last] m = MatMul(e, w_last)
  y = Add(m, b_last)
}"""

#: What the layers of RESIDUAL read in INT8: all that has a pair.
RESIDUAL_PAIRS = {
    "stem": ["image"],
    "down": ["p0"],
    "a1": ["p0"],
    "a2": ["r1"],
    "add1": ["short"],
    "b1": ["x1"],
    "b2": ["r3"],
    "add2": ["x1"],
    "branch": ["x2"],
    "pool": ["x2"],
    "up": ["both"],
    "gap": ["t"],
    "dense": ["v"],
    "last": ["e"],
}


@pytest.fixture
def residual(onnx_file):
    random = np.random.default_rng(5)
    weights = {
        "w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "w_short": (8, 8, 1, 1), "w_up": (16, 8, 2, 2),
        "w_dense": (8, 8), "w_last": (8, 5), "b": (8,), "b_last": (5,), "scale": (8,), "shift": (8,), "mean": (8,),
    }  # fmt: skip
    values = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()}
    values |= {name: array / np.float32(np.prod(array.shape[1:]) ** 0.5) for name, array in values.items()}
    return onnx_file(RESIDUAL, values | {"variance": random.uniform(0.5, 2, 8).astype("f4")}, "residual.onnx")


def residual_batches():
    for seed in range(3):
        yield {"image": np.random.default_rng(seed).standard_normal((4, 3, 16, 16), dtype=np.float32)}


def digits_batches(folder="images", size=32):
    with fastcal.ImageFeed(DIGITS / folder, model=DIGITS / "digits.onnx", batch_size=size) as feed:
        return [{name: np.array(array) for name, array in batch.items()} for batch in feed]


def calibrate(model, batches, algorithm="minmax"):
    return fastcal.calibrate(
        model, fastcal.ArrayFeed(list(batches)), algorithm=algorithm, backend="onnxruntime", tensorrt_version="10.16.1"
    )


def run(model, batches):
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, batch)[0] for batch in batches])


class Pairs:
    """The Q/DQ pairs of a model by the name of what leaves them."""

    def __init__(self, model):
        self.nodes = {node.name: node for node in model.graph.node}
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        producers = {name: node for node in model.graph.node for name in node.output}
        self.all = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                quantize = producers[node.input[0]]
                assert quantize.op_type == "QuantizeLinear"
                assert quantize.input[1:] == node.input[1:]
                assert quantize.attribute == node.attribute
                self.all[node.output[0]] = (quantize.input[0], *[self.values[name] for name in node.input[1:]])

    def read_by(self, node):
        """What a node reads through pairs."""
        return [self.all[name][0] for name in node.input if name in self.all]


def channels_first(node, weights):
    """Weights with the output channels along the first axis, as ONNX defines the operators."""
    transposed = any(value.name == "transB" and value.i for value in node.attribute)
    if node.op_type == "Conv" or transposed:
        return weights
    return weights.swapaxes(0, 1)


def check_pairs(path, model, cache):
    """What holds of every quantized model: what the pairs hold, and that every weighted layer has them."""
    onnx.checker.check_model(model, full_check=True)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    pairs = Pairs(model)
    for name, scale, zero_point in pairs.all.values():
        assert scale.dtype == np.float32
        assert zero_point.dtype == np.int8
        assert zero_point.shape == scale.shape
        assert not zero_point.any()
        if name not in before:
            assert scale.shape == ()
            assert scale.tobytes() == np.float32(cache.scales[name]).tobytes()
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            assert node.input[0] in pairs.all
            name, scale, _ = pairs.all[node.input[1]]
            amax = np.array([np.abs(channel).max() for channel in channels_first(node, before[name])])
            assert scale.tolist() == (amax.astype(np.float64) / 127).astype(np.float32).tolist()
            assert not set(node.input[2:]) & pairs.all.keys()
        elif node.op_type not in ("Add", "AveragePool", "GlobalAveragePool", "DequantizeLinear"):
            assert not set(node.input) & pairs.all.keys()
    return pairs


def test_pairs_of_the_digits():
    path = DIGITS / "digits.onnx"
    cache = calibrate(path, digits_batches(), "entropy2")
    pairs = check_pairs(path, fastcal.quantize(path, cache), cache)
    assert {name: pairs.read_by(pairs.nodes[name]) for name in ("/3/Add", "/5/Add", "/6/AveragePool")} == {
        "/3/Add": ["/3/shortcut/Conv_output_0"],
        "/5/Add": ["/5/shortcut/Conv_output_0"],
        "/6/AveragePool": ["/5/Relu_1_output_0"],
    }


def test_pairs_of_a_residual_network(residual):
    cache = calibrate(residual, residual_batches())
    model = fastcal.quantize(residual, cache)
    pairs = check_pairs(residual, model, cache)
    weights = {tensor.name for tensor in onnx.load(residual).graph.initializer}
    read = {name: [each for each in pairs.read_by(node) if each not in weights] for name, node in pairs.nodes.items()}
    assert {name: inputs for name, inputs in read.items() if inputs and name in RESIDUAL_PAIRS} == RESIDUAL_PAIRS
    activations = {name for name, *_ in pairs.all.values()} - weights
    assert activations == {name for inputs in RESIDUAL_PAIRS.values() for name in inputs}
    batches = list(residual_batches())
    assert sqnr(run(residual, batches), run(model, batches)) > 25
    assert count_quantized(model) == (10, 10)
    assert model.ir_version == onnx.load(residual).ir_version
    pairs.nodes["last"].input[1] = "w_last"
    assert count_quantized(model) == (9, 10)


def test_the_model_that_is_read_stays_as_it_is(residual):
    model, cache = Model(residual), calibrate(residual, residual_batches())
    assert fastcal.quantize(model, cache) == fastcal.quantize(model, cache)
    assert model.proto == onnx.load(residual)


@needs_squeezenet
def test_pairs_of_squeezenet():
    cache = calibrate(SQUEEZENET, squeezenet_batches())
    pairs = check_pairs(SQUEEZENET, fastcal.quantize(SQUEEZENET, cache), cache)
    # The average of the last layer is what the network gives: nothing is quantized there.
    assert not [node for node in pairs.nodes.values() if node.op_type == "GlobalAveragePool" and pairs.read_by(node)]


def sqnr(reference, quantized):
    """Signal to quantization noise in dB."""
    noise = np.square(reference.astype(np.float64) - quantized).sum()
    return 10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise)


#: What ONNX Runtime's quantizer is told for symmetric INT8, and what else for pairs as TensorRT wants them.
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
LAYERS = ["Conv", "Gemm", "MatMul"]
FOR_TENSORRT = SYMMETRIC | {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": LAYERS}


def quantize_with_onnxruntime(path, batches, method, output, layers, options):
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    class Reader:
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            return next(self.batches, None)

    quantize_static(
        path, output, Reader(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method], op_types_to_quantize=layers, extra_options=options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "method", "algorithm"),
    [
        ("digits", "MinMax", "minmax"),
        ("digits", "Entropy", "entropy"),
        pytest.param("squeezenet", "MinMax", "minmax", marks=needs_squeezenet),
    ],
)
def test_the_output_suffers_no_more_than_with_onnxruntimes_quantizer(tmp_path, network, method, algorithm):
    path = DIGITS / "digits.onnx" if network == "digits" else SQUEEZENET
    batches = digits_batches() if network == "digits" else list(squeezenet_batches())[:2]
    tested = digits_batches("test", 45) if network == "digits" else batches
    reference = run(path, tested)
    ours = sqnr(reference, run(fastcal.quantize(path, calibrate(path, batches, algorithm)), tested))
    for layers, options in ((None, SYMMETRIC), (LAYERS, FOR_TENSORRT)):
        quantize_with_onnxruntime(path, batches, method, tmp_path / "theirs.onnx", layers, options)
        theirs = sqnr(reference, run(tmp_path / "theirs.onnx", tested))
        print(f"{network} {method}: {ours:.2f} dB, ONNX Runtime's quantizer {theirs:.2f} dB")
        assert ours > theirs - 0.5, layers


@pytest.mark.parametrize(
    ("exclude", "in_float"),
    [
        (["add2", "pool"], {"add2", "pool"}),
        (["b2"], {"b2", "add2"}),  # the Add has no convolution in INT8 to be fused into
        (["a1", "Gemm"], {"a1", "dense", "gap"}),  # an average is not quantized for what reads it in float
        (["Conv"], {"stem", "down", "a1", "a2", "b1", "b2", "branch", "add1", "add2", "pool"}),
    ],
)
def test_what_is_excluded_stays_in_float(residual, exclude, in_float):
    pairs = Pairs(fastcal.quantize(residual, calibrate(residual, residual_batches()), exclude=exclude))
    assert {name for name in RESIDUAL_PAIRS if not pairs.read_by(pairs.nodes[name])} == in_float


@pytest.mark.parametrize(
    ("exclude", "in_float"),
    [
        (["a*"], {"a1", "a2", "add1", "add2"}),  # layers, and not the tensors of such names
        (["[ab]2"], {"a2", "b2", "add2"}),
        (["Co?v"], {"stem", "down", "a1", "a2", "b1", "b2", "branch", "add1", "add2", "pool"}),
    ],
)
def test_patterns_of_what_to_exclude(residual, exclude, in_float):
    pairs = Pairs(fastcal.quantize(residual, calibrate(residual, residual_batches()), exclude=exclude))
    assert {name for name in RESIDUAL_PAIRS if not pairs.read_by(pairs.nodes[name])} == in_float


@pytest.mark.parametrize("exclude", ["r1", "r[1]"])
def test_a_tensor_to_exclude_is_read_in_float(residual, exclude):
    """No pair is on the tensor that `compare` and the report name."""
    quantized = fastcal.quantize(residual, calibrate(residual, residual_batches()), exclude=[exclude])
    read = {node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    assert "r1" not in read
    assert read


@pytest.mark.parametrize(
    ("scale", "reason"), [(0.0, "the scale of r1 is 0"), (np.inf, "the scale of r1 is inf"), (None, "no scale for r1")]
)
def test_a_layer_without_a_scale_stays_in_float(residual, caplog, scale, reason):
    cache = calibrate(residual, residual_batches())
    cache.scales.pop("r1")
    if scale is not None:
        cache.scales["r1"] = scale
    model = fastcal.quantize(residual, cache)
    pairs = Pairs(model)
    assert pairs.read_by(pairs.nodes["a2"]) == []
    assert pairs.read_by(pairs.nodes["add1"]) == ["n2"]  # the Add goes into the convolution that is quantized
    assert pairs.read_by(pairs.nodes["b1"]) == ["x1", "w1"]
    assert count_quantized(model) == (9, 10)
    assert caplog.record_tuples == [("fastcal", logging.WARNING, f"layers that stay in float: a2 ({reason})")]


def test_weights_that_are_computed_or_in_other_types(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 2, 4, 4] x, float[2, 2, 1, 1] k) => (float[N, 2, 4, 4] z, float16[N, 2, 4, 4] h) {"
        "  one = Identity(w) [kept] y = Conv(x, one) [computed] z = Conv(y, k)"
        "  x16 = Cast<to = 10>(x) [half] h = Conv(x16, w16) }",
        {"w": np.float32([127, 254, 381, 508]).reshape(2, 2, 1, 1), "w16": np.ones((2, 2, 1, 1), "f2")},
    )
    cache = fastcal.CalibrationCache({"x": 0.5, "y": 0.5, "x16": 0.5})
    pairs = Pairs(fastcal.quantize(path, cache))
    assert pairs.all["one_DequantizeLinear_Output"][1].tolist() == [2, 4]
    assert {name: pairs.read_by(pairs.nodes[name]) for name in ("kept", "computed", "half")} == {
        "kept": ["x", "one"],
        "computed": [],
        "half": [],
    }
    assert "computed (its weights k are computed), half (x16 is float16)" in caplog.text


def test_a_transposed_weight_a_dead_channel_and_both_sides_of_a_product(onnx_file):
    weights = np.float32([[1, 0, -4], [2, 0, 3]])
    path = onnx_file(
        "f (float[N, 2] x, float[3, N] z) => (float[3, 3] p, float[N, 2] q) {"
        "  [first] y = MatMul(x, w) [both] p = MatMul(z, y) wt = Transpose<perm = [1, 0]>(w) [second] q = MatMul(y, wt)"
        "}",
        {"w": weights},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "y": 0.25, "z": 0.125}))
    onnx.checker.check_model(model, full_check=True)
    pairs = Pairs(model)
    scales = {name: [pairs.all[each][1].tolist() for each in pairs.nodes[name].input] for name in ("first", "both")}
    assert scales["first"] == [0.5, [np.float32(2) / np.float32(127), 1, np.float32(4) / np.float32(127)]]
    assert scales["both"] == [0.125, 0.25]
    assert pairs.all[pairs.nodes["second"].input[1]][1].tolist() == (np.float32([4, 3]) / np.float32(127)).tolist()
    x = np.float32([[0.5, -1.5], [3, 1]])
    (session,) = [onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])]
    _, q = session.run(None, {"x": x, "z": np.ones((3, 2), "f4")})
    assert q == pytest.approx(x @ weights @ weights.T, abs=2)


def test_what_is_fused_is_all_that_reads_a_convolution_and_every_pair_is_made_once(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 2, 8, 8] x) => (float[N, 2, 6, 6] z, float[N, 2, 8, 8] s, float[N, 2, 8, 8] t) {"
        "  [first] c = Conv(x, w) [twice] s = Add(c, x) r = Relu(c) [second] d = Conv(r, w) [plus] t = Add(d, one)"
        "  n = Neg(x) [pool1] p = AveragePool<kernel_shape = [2, 2]>(n)"
        "  [pool2] q = AveragePool<kernel_shape = [2, 2]>(p) [third] z = Conv(q, w)"
        "  [unread] u = GlobalAveragePool(z) }",
        {"w": np.ones((2, 2, 1, 1), "f4"), "one": np.ones(1, "f4"), "w_scale": np.ones(1, "f4")},
    )
    cache = fastcal.CalibrationCache(dict.fromkeys(["x", "n", "c", "r", "d", "p", "q"], 0.5))
    model = fastcal.quantize(path, cache)
    onnx.checker.check_model(model, full_check=True)
    pairs = Pairs(model)
    read = {name: pairs.read_by(node) for name, node in pairs.nodes.items() if pairs.read_by(node)}
    assert read == {
        "first": ["x", "w"], "second": ["r", "w"], "third": ["q", "w"], "pool1": ["n"], "pool2": ["p"],
    }  # fmt: skip
    assert sorted(name for name, *_ in pairs.all.values()) == ["n", "p", "q", "r", "w", "x"]
    assert caplog.text == ""
    assert pairs.values["w_scale"].shape == (1,)


def test_external_weights_come_with_the_model(residual):
    cache = calibrate(residual, residual_batches())
    want = fastcal.quantize(residual, cache)
    onnx.save(onnx.load(residual), residual, save_as_external_data=True, location="weights.bin", size_threshold=0)
    got = fastcal.quantize(residual, fastcal.CalibrationCache(cache.scales))
    batches = list(residual_batches())
    assert run(got, batches).tobytes() == run(want, batches).tobytes()
    (residual.parent / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"cannot load .*residual.onnx: .*weights.bin.*; keep its external"):
        fastcal.quantize(residual, fastcal.CalibrationCache(cache.scales))


def test_models_that_cannot_be_quantized(residual, onnx_file, tmp_path):
    cache = calibrate(residual, residual_batches())
    onnx.save(fastcal.quantize(residual, cache), tmp_path / "twice.onnx")
    old = onnx.load(residual)
    old.opset_import[0].version = 12
    old.graph.node.append(onnx.helper.make_node("EfficientNMS_TRT", ["y"], ["boxes"]))
    onnx.save(old, tmp_path / "old.onnx")
    del old.graph.node[-1]
    old.graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], then_branch=old.graph, else_branch=old.graph))
    onnx.save(old, tmp_path / "branches.onnx")
    lone = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    for path, message in (
        (tmp_path / "twice.onnx", r"twice.onnx has QuantizeLinear or DequantizeLinear already; quantize the float"),
        (
            tmp_path / "old.onnx",
            r"old.onnx has opset 12, and a scale per channel needs opset 13; export the network with opset 17 and "
            r"calibrate again, since it cannot be converted: .*",
        ),
        (
            tmp_path / "branches.onnx",
            r"cannot be converted: ONNX does not convert what lies in an If, a Loop or a Scan",
        ),
        (lone, r"model.onnx has no layer to quantize: no node is a Conv, ConvTranspose, Gemm or MatMul$"),
    ):
        with pytest.raises(ModelError, match=message):
            fastcal.quantize(path, fastcal.CalibrationCache(cache.scales))
    for name, near in (("stm", "stem"), ("Gem", "Gemm"), ("Softmax", "Conv")):
        with pytest.raises(FastcalError, match=rf"no layer, type or tensor '{name}' to exclude; similar: .*{near}"):
            fastcal.quantize(residual, cache, exclude=["Relu", name])


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"c2": [0.5] * 7}, "the tuning has 7 corrections for c2, which has 8 channels; tune this model"),
        ({"t": [0.5] * 16}, "the tuning has 16 corrections for t, which has 8 channels; tune this model"),
        ({"d": [0.5]}, "the tuning corrects the bias of d, which has none; tune this model"),
        ({"m": [0.5] * 8}, "the tuning has 8 corrections for m, which has 5 channels; tune this model"),
        ({"p0": [0.5]}, "the tuning corrects the bias of p0, which has none; tune this model"),
    ],
)
def test_corrections_that_fit_no_layer(residual, bias, message):
    cache = calibrate(residual, residual_batches())
    with pytest.raises(CacheError, match=message):
        fastcal.quantize(residual, fastcal.Tuning(cache, bias=bias))


def test_if_all_is_excluded_the_error_says_so(residual):
    cache = calibrate(residual, residual_batches())
    with pytest.raises(ModelError, match=r"residual.onnx has no layer left to quantize: all of them are excluded"):
        fastcal.quantize(residual, cache, exclude=["Conv", "ConvTranspose", "Gemm", "MatMul"])


def test_what_to_exclude_is_a_list(residual):
    with pytest.raises(FastcalError, match="exclude is 'Gemm'; give a list of names or types"):
        fastcal.quantize(residual, fastcal.CalibrationCache(), exclude="Gemm")


def test_caches_of_another_model(residual, tmp_path):
    cache = calibrate(residual, residual_batches())
    names = dict.fromkeys(["image", "p0", "r1", "x1", "conv1"], 0.1)
    with pytest.raises(CacheError, match=r"scales for 4 of the 9 tensors .*residual.onnx read: the cache belongs to"):
        fastcal.quantize(residual, fastcal.CalibrationCache(names))
    cache.save(tmp_path / "x.cache")
    other = onnx.load(residual)
    other.doc_string = "trained anew"
    onnx.save(other, tmp_path / "other.onnx")
    assert fastcal.quantize(residual, tmp_path / "x.cache") == fastcal.quantize(residual, cache)
    with pytest.raises(CacheError, match=r"^the cache was calibrated with another model than .*; calibrate"):
        fastcal.quantize(tmp_path / "other.onnx", cache)
    with pytest.raises(CacheError, match=r"x.cache was calibrated with .* or remove .*x.cache.json if"):
        fastcal.quantize(tmp_path / "other.onnx", tmp_path / "x.cache")
    (tmp_path / "x.cache.json").unlink()
    fastcal.quantize(tmp_path / "other.onnx", tmp_path / "x.cache")


def test_the_command_takes_a_cache_or_images(run_fastcal, tmp_path):
    model, images = DIGITS / "digits.onnx", DIGITS / "images"
    assert run_fastcal("calibrate", model, images, "-o", tmp_path / "x.cache", "--algorithm", "minmax").returncode == 0
    done = run_fastcal("quantize", model, tmp_path / "x.cache", "-o", tmp_path / "1.onnx", "--exclude", "Gemm")
    assert (done.returncode, done.stderr) == (0, "")
    size = os.path.getsize(tmp_path / "1.onnx")
    assert done.stdout.splitlines() == [
        f"scales     {tmp_path / 'x.cache'}",
        "INT8       7 of 8 Conv, ConvTranspose, Gemm, MatMul",
        f"model      {tmp_path / '1.onnx'}",
        f"size       {size / 1e6:.3g} MB, weights in float32, since TensorRT rounds them itself; --int8-weights stores "
        "INT8",
    ]
    options = ("--exclude", "/8/Gemm", "--algorithm", "minmax", "--preprocess", "imagenet")
    done = run_fastcal("quantize", model, images, "-o", tmp_path / "2.onnx", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "images     256 in 8 batches of 32"
    want = fastcal.quantize(model, tmp_path / "x.cache", exclude=["/8/Gemm"])
    assert onnx.load(tmp_path / "1.onnx") == onnx.load(tmp_path / "2.onnx") == want
    assert sorted(os.listdir(tmp_path)) == ["1.onnx", "2.onnx", "x.cache", "x.cache.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.onnx", "x.cache", "-o", "y.onnx"], "cannot read model nothing.onnx"),
        (["m.onnx", "nothing", "-o", "y.onnx"], "no such file or folder: nothing"),
        (["m.onnx", "broken.cache", "-o", "y.onnx"], "broken.cache, line 2: 'image' is not"),
        (["m.onnx", "x.cache", "-o", "m.onnx"], "m.onnx is the model itself"),
        (["m.onnx", "x.cache", "-o", "x.cache"], "x.cache is the calibration cache; name another file"),
        (["m.onnx", "x.cache", "-o", "nowhere/y.onnx"], "cannot write nowhere/y.onnx"),
        (["m.onnx", "x.cache", "-o", "y.onnx", "--batch-size", "8"], "is a calibration cache, and --batch-size is for"),
        (
            ["m.onnx", "x.cache", "-o", "y.onnx", "--backend", "tensorrt"],
            "is a calibration cache, and --backend is for",
        ),
        (
            ["m.onnx", "x.cache", "-o", "y.onnx", "--exclude", "Gem"],
            "no layer, type or tensor 'Gem' to exclude; similar: Gemm",
        ),
        (
            ["m.onnx", "images", "-o", "y.onnx", "--exclude", "Gem"],
            "no layer, type or tensor 'Gem' to exclude; similar: Gemm",
        ),
        (["m.onnx", "x.cache", "-o", "y.onnx"], "the cache has scales for 0 of the"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_model(run_fastcal, tmp_path, arguments, message):
    shutil.copy(DIGITS / "digits.onnx", tmp_path / "m.onnx")
    (tmp_path / "x.cache").write_text("TRT-8601-MinMaxCalibration\nother: 3f800000\n")
    (tmp_path / "broken.cache").write_text("TRT-8601-MinMaxCalibration\nimage\n")
    before = sorted(os.listdir(tmp_path))
    done = run_fastcal("quantize", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "m.onnx").read_bytes() == (DIGITS / "digits.onnx").read_bytes()


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[N, 4] x) => (float[N, 6] y) { t = MatMul(x, w) y = Add(t, x_zero_point) }",
        "g (float[N, 4] x, float[N, 6] x_QuantizeLinear_Output) => (float[N, 6] y)"
        "{ t = MatMul(x, w) y = Add(t, x_QuantizeLinear_Output) }",
        "g (float[N, 4] x) => (float[N, 6] y) { [x_QuantizeLinear] t = MatMul(x, w) y = Relu(t) }",
        "g (float[N, 4] x, float[1] x_scale) => (float[N, 6] y) { y = MatMul(x, w) }",
        """g (float[N, 4] x, bool b) => (float[N, 6] y) {
            t = MatMul(x, w)
            y = If(b) <then_branch = g1 () => (float[N, 6] x_scale) { x_scale = Neg(t) },
                       else_branch = g2 () => (float[N, 6] e) { e = Identity(t) }>
        }""",
    ],
)
def test_names_that_are_taken(onnx_file, graph):
    weights = {"w": np.ones((4, 6), "f4"), "x_zero_point": np.float32([3])}
    path = onnx_file(graph, {name: values for name, values in weights.items() if name in graph})
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.02}))
    onnx.checker.check_model(model)
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert count_quantized(model) == (1, 1)
    names = [node.name for node in model.graph.node if node.name]
    assert len(names) == len(set(names))


def test_weights_that_two_layers_read_along_different_axes(onnx_file):
    path = onnx_file(
        "f (float[N, 2] x) => (float[N, 2] y) { [left] t = MatMul(x, w) [right] y = Gemm<transB = 1>(t, w) }",
        {"w": np.float32([[127, 254], [381, 508]])},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "t": 0.5}))
    onnx.checker.check_model(model, full_check=True)
    pairs = Pairs(model)
    scales = {name: pairs.all[pairs.nodes[name].input[1]][1].tolist() for name in ("left", "right")}
    assert scales == {"left": [3, 4], "right": [2, 4]}


def test_an_average_that_is_an_output_stays_in_float(onnx_file):
    path = onnx_file(
        "f (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] c, float[N, 2, 3, 3] p, float[N, 2, 3, 3] y) {"
        "  c = Conv(x, w) n = Neg(c) [pool] p = AveragePool<kernel_shape = [2, 2]>(n) y = Conv(p, w) }",
        {"w": np.ones((2, 2, 1, 1), "f4")},
    )
    pairs = Pairs(fastcal.quantize(path, fastcal.CalibrationCache(dict.fromkeys("xcnp", 0.5))))
    assert pairs.read_by(pairs.nodes["pool"]) == []


@pytest.mark.parametrize(
    ("count", "end"), [(5, "n4 (the scale of z is 0)"), (6, "n4 (the scale of z is 0) and 1 more")]
)
def test_five_layers_in_float_are_named(onnx_file, caplog, count, end):
    layers = " ".join(f"n{number} = MatMul(z, w)" for number in range(count))
    path = onnx_file(
        f"f (float[N, 2] x, float[N, 2] z) => (float[N, 2] y) {{ y = MatMul(x, w) {layers} }}",
        {"w": np.ones((2, 2), "f4")},
    )
    assert count_quantized(fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "z": 0.0}))) == (1, 1 + count)
    assert caplog.messages[0].startswith("layers that stay in float: n0 (the scale of z is 0), n1 (")
    assert caplog.messages[0].endswith(end)


def test_a_tensor_of_unknown_type_and_a_node_without_outputs(onnx_file):
    path = onnx_file(
        """f (float[N, 2] x) => (float[N, 2] y) { t = custom.Op(x) y = MatMul(t, w) }""", {"w": np.ones((2, 2), "f4")}
    )
    proto = onnx.load(path)
    proto.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    proto.graph.value_info.append(onnx.ValueInfoProto(name="t", type=onnx.TypeProto(tensor_type={})))
    proto.graph.node.append(onnx.helper.make_node("Probe", ["x"], [], domain="custom"))
    onnx.save(proto, path)
    cache = fastcal.CalibrationCache({"t": 0.5})
    assert count_quantized(fastcal.quantize(path, cache, exclude=["Probe"])) == (1, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        ("Gemm<transA = 1>(w, x)", (4, 3), 1),
        ("Gemm<transA = 0>(w, x)", (3, 4), 0),
        ("MatMul(w, x)", (3, 4), 0),
        ("MatMul(w, x)", (2, 3, 4), 1),
        ("MatMul(w, x)", (4,), None),
    ],
)
def test_channels_of_a_constant_on_the_left(onnx_file, layer, shape, axis):
    weights = np.arange(1, np.prod(shape) + 1, dtype="f4").reshape(shape)
    path = onnx_file(
        f"f (float[4, N] x) => (float y) {{ [layer] m = {layer} y = ReduceMean<keepdims = 0>(m) }}", {"w": weights}
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}))
    onnx.checker.check_model(model, full_check=True)
    pairs = Pairs(model)
    others = None if axis is None else tuple(other for other in range(len(shape)) if other != axis)
    _, scales, _ = pairs.all[pairs.nodes["layer"].input[0]]
    assert scales.tolist() == (weights.max(axis=others) / np.float32(127)).tolist()
    quantizing = next(node for node in model.graph.node if node.input[0] == "w")
    assert [value.i for value in quantizing.attribute] == ([] if axis is None else [axis])


def test_weights_that_are_not_finite(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 2] x) => (float[N, 2] y) { [kept] t = MatMul(x, w) [broken] y = MatMul(t, v) }",
        {"w": np.ones((2, 2), "f4"), "v": np.float32([[1, np.inf], [1, 1]])},
    )
    assert count_quantized(fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "t": 0.5}))) == (1, 2)
    assert "layers that stay in float: broken (its weights v are not all finite)" in caplog.text


def test_a_convolution_that_is_an_output_is_not_fused(onnx_file):
    path = onnx_file(
        "f (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] c, float[N, 2, 4, 4] y) { c = Conv(x, w) [plus] y = Add(c, x) }",
        {"w": np.ones((2, 2, 1, 1), "f4")},
    )
    pairs = Pairs(fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5, "c": 0.5})))
    assert pairs.read_by(pairs.nodes["plus"]) == []


def test_a_model_whose_nodes_go_round_in_circles(onnx_file):
    for loop, label in (("[loop] w = Identity(w)", "loop"), ("w = Identity(v) v = Transpose(w)", "[vw]")):
        path = onnx_file(f"f (float[N, 2] x) => (float[N, 2] y) {{ {loop} y = MatMul(x, w) }}")
        with pytest.raises(
            ModelError, match=rf"model.onnx is not a valid .*: node '{label}' depends on its own output; export"
        ):
            fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}))


@pytest.mark.parametrize(
    "node",
    [
        "v = Constant()",
        "v = Transpose<perm = [0, 0]>(w)",
        "t = Transpose(w) v = Reshape(t, t)",
        "v = custom.Unpack(w)",
    ],
)
def test_weights_of_an_unknown_value(onnx_file, node):
    path = onnx_file(
        f"f (float[N, 2] x) => (float[N, 2] y) {{ {node} y = MatMul(x, v) }}", {"w": np.ones((2, 2), "f4")}
    )
    proto = onnx.load(path)
    proto.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"has no layer to quantize: y \(its weights v are of an unknown value\)"):
        fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}))


def test_a_model_of_the_oldest_format(onnx_file):
    path = onnx_file(
        "f (float[N, 2] x, float[2, 2] w) => (float[N, 2] y) { y = MatMul(x, w) }", {"w": np.ones((2, 2), "f4")}
    )
    proto = onnx.load(path)
    proto.ir_version = 3
    onnx.save(proto, path)
    onnx.checker.check_model(proto, full_check=True)
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}))
    onnx.checker.check_model(model, full_check=True)
    assert count_quantized(model) == (1, 1)


def stored_weights(model):
    """The INT8 weights of a model by the names of the float ones, and the scales and the axis of each."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            name = node.input[0].removesuffix("_QuantizeLinear_Output")
            axis = next((value.i for value in node.attribute), 1)
            yield name, values[node.input[0]], *[values[each] for each in node.input[1:]], axis


def quantized_by_onnxruntime(weights, scales, zero_point, axis):
    node = onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], axis=axis)
    tensors = [numpy_helper.from_array(scales, "scale"), numpy_helper.from_array(zero_point, "zero")]
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, weights.shape)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, weights.shape)
    graph = onnx.helper.make_graph([node], "g", [value], [output], tensors)
    return run(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), [{"x": weights}]
    )


def test_weights_stored_as_int8(residual, tmp_path):
    cache = calibrate(residual, residual_batches())
    pairs, model = fastcal.quantize(residual, cache), fastcal.quantize(residual, cache, int8_weights=True)
    onnx.checker.check_model(model, full_check=True)
    batches = list(residual_batches())
    assert run(model, batches).tobytes() == run(pairs, batches).tobytes()
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(residual).graph.initializer}
    stored = list(stored_weights(model))
    assert sorted(name for name, *_ in stored) == ["w0", "w1", "w2", "w_dense", "w_last", "w_short", "w_up"]
    for name, values, scales, zero_point, axis in stored:
        assert values.dtype == np.int8
        assert values.tobytes() == quantized_by_onnxruntime(floats[name], scales, zero_point, axis).tobytes()
    kept = {tensor.name for tensor in model.graph.initializer} & floats.keys()
    assert kept == {"b", "b_last", "scale", "shift", "mean", "variance"}
    assert count_quantized(model) == (10, 10)
    assert Model.of(residual).proto == onnx.load(residual)
    onnx.save(model, tmp_path / "twice.onnx")
    with pytest.raises(ModelError, match="has QuantizeLinear or DequantizeLinear already"):
        fastcal.quantize(tmp_path / "twice.onnx", fastcal.CalibrationCache(cache.scales))


def test_int8_weights_are_rounded_half_to_even(onnx_file):
    weights = np.float32([[127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0], [0] * 10, [1e-42] * 10])
    path = onnx_file("f (float[N, 10] x) => (float[N, 3] y) { y = Gemm<transB = 1>(x, w) }", {"w": weights})
    ((_, values, scales, zero_point, axis),) = stored_weights(
        fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}), int8_weights=True)
    )
    assert values[0].tolist() == [127, -127, 0, 2, 2, 0, -2, -2, 126, 0]
    assert not values[1:].any()
    assert values.tobytes() == quantized_by_onnxruntime(weights, scales, zero_point, axis).tobytes()


def test_float_weights_stay_only_where_a_layer_reads_them(onnx_file):
    path = onnx_file(
        "f (float[N, 4] x) => (float[N, 4] y, float[N, 4] z, float[4, 4] out) {"
        "  c = Constant<value = float[4, 4] {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}>()"
        "  wt = Transpose<perm = [1, 0]>(w) a = MatMul(x, wt) b = MatMul(a, c) [kept] t = MatMul(b, v)"
        "  y = Relu(t) z = MatMul(y, v) out = Identity(u) d = MatMul(y, u) }",
        {name: np.eye(4, dtype="f4") * (1 + number) for number, name in enumerate("wvu")},
    )
    proto = onnx.load(path)
    proto.ir_version = 3
    proto.graph.input.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (4, 4)) for name in "wvu")
    onnx.save(proto, path)
    cache = fastcal.CalibrationCache(dict.fromkeys("xabyt", 0.5))
    model = fastcal.quantize(path, cache, exclude=["kept"], int8_weights=True)
    onnx.checker.check_model(model, full_check=True)
    assert sorted(name for name, *_ in stored_weights(model)) == ["c", "u", "v", "wt"]
    floats = {each.name for each in model.graph.initializer} & {"w", "wt", "v", "u", "c"}
    assert floats == {"v", "u"}  # "kept" reads one, and the other is an output
    assert [value.name for value in model.graph.input] == ["x", "v", "u"]
    assert not {"Transpose", "Constant"} & {node.op_type for node in model.graph.node}
    batches = [{"x": np.random.default_rng(1).standard_normal((3, 4), dtype="f4")}]
    pairs = fastcal.quantize(path, cache, exclude=["kept"])
    assert run(model, batches).tobytes() == run(pairs, batches).tobytes()


def test_int8_weights_of_external_data(residual):
    cache = fastcal.CalibrationCache(calibrate(residual, residual_batches()).scales)
    want = fastcal.quantize(residual, cache, int8_weights=True)
    onnx.save(onnx.load(residual), residual, save_as_external_data=True, location="weights.bin", size_threshold=0)
    batches = list(residual_batches())
    found = fastcal.quantize(residual, cache, int8_weights=True)
    assert run(found, batches).tobytes() == run(want, batches).tobytes()


@pytest.mark.parametrize("int8_weights", [False, True])
def test_tensorrt_builds_either_form_of_weights(residual, rtx, int8_weights):
    model = fastcal.quantize(residual, calibrate(residual, residual_batches()), int8_weights=int8_weights)
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
    profile.set_shape("image", *[(4, 3, 16, 16)] * 3)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_the_command_stores_int8_weights(run_fastcal, tmp_path):
    path = DIGITS / "digits.onnx"
    cache = calibrate(path, digits_batches())
    cache.save(tmp_path / "x.cache")
    for options in ([], ["--int8-weights"]):
        done = run_fastcal("quantize", path, tmp_path / "x.cache", "-o", tmp_path / "y.onnx", *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert onnx.load(tmp_path / "y.onnx") == fastcal.quantize(path, cache, int8_weights=bool(options))
    size = os.path.getsize(tmp_path / "y.onnx")
    assert done.stdout.splitlines()[-1] == f"size       {size / 1e6:.3g} MB, weights in INT8"
    assert size < path.stat().st_size / 3


def test_depthwise_convolutions_stay_in_float_if_asked_for(onnx_file):
    graph = "net (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) { a = Conv<group = 4>(x, d) y = Conv(a, w) }"
    path = onnx_file(graph, {"d": np.ones((4, 1, 1, 1), "f4"), "w": np.ones((4, 4, 1, 1), "f4")})
    cache = fastcal.CalibrationCache({"x": 0.1, "a": 0.1})
    for options, expected in (({}, ["a", "y"]), ({"depthwise": False}, ["y"])):
        model = fastcal.quantize(path, cache, **options)
        dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        found = [node.output[0] for node in model.graph.node if node.op_type == "Conv" and node.input[1] in dequantized]
        assert found == expected
