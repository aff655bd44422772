"""Typed models, FP16 or BF16 between the pairs: of small networks of many structures, and of the shipped sample."""

import json
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from typed_networks import NETWORKS, write_network

import fastcal
from conftest import DIGITS
from fastcal.errors import FastcalError, ModelError
from fastcal.half import BF16, FP16
from fastcal.model import Model
from fastcal.qdq import WEIGHTED, count_quantized

HALVES = {"fp16": FP16, "bf16": BF16}


class Made:
    """A network, its batches, its cache, and its quantized models by the type of the layers between the pairs."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches
        self.cache = fastcal.calibrate(path, batches, algorithm="minmax", backend="onnxruntime")
        self.models = {
            kind: fastcal.quantize(path, self.cache, depthwise=True, **({kind: True} if kind in HALVES else {}))
            for kind in ("fp32", *HALVES)
        }

    def run(self, model):
        """The float outputs at ONNX Runtime's default optimization level, all batches in one array each."""
        data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        runs = zip(*[session.run(None, batch) for batch in self.batches], strict=True)
        return [np.concatenate(values) for values in runs if values[0].dtype.kind == "f"]


@pytest.fixture(scope="module", params=[*NETWORKS, "digits"])
def made(request, tmp_path_factory):
    if request.param == "digits":
        with fastcal.ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=32, limit=64) as feed:
            return Made(DIGITS / "digits.onnx", [{"image": np.array(batch["image"])} for batch in feed])
    return Made(*write_network(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def build():
    """A function that builds with TensorRT for RTX, which needs no GPU, and returns the layers of the engine."""
    rtx = pytest.importorskip("tensorrt_rtx")
    from fastcal.engine.contents import contents_of
    from fastcal.engine.explicit import build_typed
    from fastcal.engine.settings import BuildSettings

    def build(path, model, batch):
        is_dynamic = Model(path).inputs[0].shape[0] is None
        settings = BuildSettings(*[len(next(iter(batch.values())))] * 3) if is_dynamic else BuildSettings()
        engine = build_typed(rtx, Model(path), model, None, settings, compute_capabilities=["8.9"])
        return contents_of(rtx, engine, Model(path))

    return build


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_nvidias_builder_runs_every_weighted_layer_in_int8(made, build, kind):
    """TensorRT for RTX 1.7 has no ConvTranspose in INT8."""
    contents = build(made.path, made.models[kind], made.batches[0])
    in_float = "FP16" if kind == "fp16" else "FP32"
    assert contents.weighted == {
        node.name or node.output[0]: in_float if node.op_type == "ConvTranspose" else "INT8"
        for node in Model(made.path).proto.graph.node
        if node.op_type in WEIGHTED
    }


def decibels(exact, rounded):
    noise = np.square(exact.astype(np.float64) - rounded).sum()
    return 10 * np.log10(np.square(exact.astype(np.float64)).sum() / noise)


def test_onnxruntimes_outputs_are_as_exact_in_fp16(made):
    """ONNX Runtime's CPU provider has no pairs of BF16."""
    exact, fp32, fp16 = made.run(made.path), made.run(made.models["fp32"]), made.run(made.models["fp16"])
    for reference, with_fp32, with_fp16 in zip(exact, fp32, fp16, strict=True):
        assert with_fp16.dtype == reference.dtype
        assert decibels(reference, with_fp16) > decibels(reference, with_fp32) - 1


@pytest.mark.parametrize("kind", HALVES)
def test_layers_weights_and_scales_have_the_type(made, kind):
    half, model = HALVES[kind], made.models[kind]
    onnx.checker.check_model(model, full_check=True)
    before = Model(made.path).proto
    assert model.graph.input == before.graph.input
    assert model.graph.output == before.graph.output
    assert model.opset_import[0].version == half.opset
    assert count_quantized(model) == count_quantized(made.models["fp32"])
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    in_fp32 = [node for node in model.graph.node if node.op_type in WEIGHTED and types[node.input[0]] != half.kind]
    assert {node.op_type for node in in_fp32} <= ({"ConvTranspose"} if kind == "bf16" else set())
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[0]] == types[node.input[1]] != TensorProto.UNDEFINED
    stored = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= stored


@pytest.mark.parametrize("kind", HALVES)
def test_weights_are_rounded_once(made, kind):
    """The INT8 weights are those of the exact weights, whatever the type of 16 bits does to them before."""
    half, model = HALVES[kind], made.models[kind]
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in Model(made.path).proto.graph.initializer}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or stored.get(node.input[0], TensorProto()).data_type != half.kind:
            continue
        count += 1
        weights, scales = (half.values(np.frombuffer(stored[name].raw_data, "u2")) for name in node.input[:2])
        weights = weights.reshape(stored[node.input[0]].dims)
        axis = next((value.i for value in node.attribute if value.name == "axis"), None)
        if axis is not None:
            scales = scales.reshape([-1 if axis == other else 1 for other in range(weights.ndim)])
        original = exact[node.input[0].removesuffix(f"_{half.name}")]
        assert np.rint(weights / scales).tolist() == np.rint(original / scales).tolist()
        assert np.abs(np.rint(original / scales)).max() <= 127
    assert count


def kept_in_fp32(caplog, path, cache, **options):
    """The layers that the log names, with the reasons, and the model."""
    with caplog.at_level(logging.DEBUG, "fastcal"):
        caplog.clear()
        model = fastcal.quantize(path, cache, **options)
    (text,) = [text for text in caplog.messages if text.startswith("all layers that stay in FP32: ")] or [": "]
    return dict(part.rstrip(")").split(" (", 1) for part in text.partition(": ")[2].split(", ") if part), model


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    path, batches = write_network("attention", tmp_path_factory.mktemp("attention"))
    return path, fastcal.calibrate(path, batches, algorithm="minmax", backend="onnxruntime")


def test_sums_and_small_constants_stay_in_fp32(attention, caplog):
    kept, model = kept_in_fp32(caplog, *attention, fp16=True)
    assert kept == {"m": "ReduceMean", "d2": "Pow", "var": "ReduceMean", "ve": "eps holds 1e-12"}
    assert "layers that stay in FP32: m (ReduceMean), d2 (Pow), var (ReduceMean), ve (eps holds 1e-12)" in caplog.text
    types = types_in(model)
    assert types["sd"] == TensorProto.FLOAT  # the root of what stays in FP32
    assert types["d"] == types["n"] == TensorProto.FLOAT16
    assert kept_in_fp32(caplog, *attention, bf16=True)[0].keys() == {"m", "d2", "var"}
    assert kept_in_fp32(caplog, *attention)[0] == {}


def types_in(model):
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


OVERFLOWING = """f (float[N, 4] x) => (float[N, 4] y) {
  [first] a = MatMul(x, w) [large] b = Mul(a, thousand) [still] c = Neg(b) [small] d = Tanh(c)
  [second] e = MatMul(d, w) y = Relu(e)
}"""


@pytest.mark.parametrize(("factor", "kept"), [(1000, []), (30000, ["large", "still", "small"])])
def test_what_could_overflow_stays_in_fp32(onnx_file, caplog, factor, kept):
    path = onnx_file(OVERFLOWING, {"w": np.eye(4, dtype="f4"), "thousand": np.float32(factor)})
    batches = [{"x": np.linspace(-1, 1, 32, dtype="f4").reshape(8, 4)}]
    cache = fastcal.calibrate(path, batches, algorithm="entropy2", backend="onnxruntime")
    cache.scales["b"] = cache.scales["c"] = 1.0  # less than what was observed
    found, model = kept_in_fp32(caplog, path, cache, fp16=True)
    assert list(found) == kept
    assert {types_in(model)[name] for name in "bc"} == {TensorProto.FLOAT if kept else TensorProto.FLOAT16}
    assert types_in(model)["e"] == TensorProto.FLOAT16
    assert kept_in_fp32(caplog, path, cache, bf16=True)[0] == {}
    unseen = fastcal.CalibrationCache(cache.scales)  # as from a file: with scales alone
    assert kept_in_fp32(caplog, path, unseen, fp16=True)[0] == {}
    unseen.scales["b"] = factor / 127
    assert list(kept_in_fp32(caplog, path, unseen, fp16=True)[0]) == kept[:2]


def test_a_scale_that_fp16_does_not_hold_keeps_the_layers_that_read_it(onnx_file, caplog):
    path = onnx_file(
        "f (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { r = Relu(x) n = Neg(x) [one] a = MatMul(x, w)"
        "  [two] y = MatMul(r, w) [three] b = MatMul(x, v) z = Relu(b) [four] m = MatMul(n, u) c = Tanh(m) }",
        {"w": np.eye(4, dtype="f4"), "u": np.eye(4, dtype="f4"), "v": 1e-7 * np.eye(4, dtype="f4")},
    )
    kept, model = kept_in_fp32(caplog, path, fastcal.CalibrationCache({"x": 0.1, "n": 0.1, "r": 1.3e-7}), fp16=True)
    assert kept == {
        "two": "r_scale is 1.3e-07",
        "three": "v_scale is 7.87e-10",
        "one": "it shares x_DequantizeLinear_Output with a layer in FP32",
    }
    types = types_in(model)
    assert (types["c"], types["b"], types["z"]) == (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT)


def test_what_branches_and_outputs_read_keeps_its_type(onnx_file):
    path = onnx_file(
        """f (float[N, 4] x, bool b) => (float[N, 4] a, float[N, 4] y) {
            a = MatMul(x, w) r = Relu(a) s = Neg(r)
            t = If(b) <then_branch = g1 () => (float[N, 4] u) { u = Mul(s, w1) },
                       else_branch = g2 () => (float[N, 4] e) { e = Identity(s) }>
            y = MatMul(t, w)
        }""",
        {"w": np.eye(4, dtype="f4"), "w1": np.ones(4, "f4")},
    )
    proto = onnx.load(path)
    proto.opset_import[0].version = 22
    onnx.save(proto, path)
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.01, "t": 0.01}), fp16=True)
    onnx.checker.check_model(model, full_check=True)
    batch = {"x": np.linspace(-1, 1, 8, dtype="f4").reshape(2, 4), "b": np.array(True)}
    runs = [
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, batch)
        for each in (proto, model)
    ]
    for exact, found in zip(*runs, strict=True):
        assert found.dtype == np.float32
        assert found == pytest.approx(exact, abs=0.02)
    assert types_in(model)["r"] == TensorProto.FLOAT16


def test_a_model_that_cannot_be_of_the_opset_says_so(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { t = MatMul(x, w) y = EfficientNMS_TRT(t) }")
    with pytest.raises(ModelError, match=r"has opset 17, and FP16 needs opset 19; export the network with opset 19 an"):
        fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.5}), fp16=True)


def test_one_type_is_asked_for(attention):
    with pytest.raises(FastcalError, match=r"^both fp16 and bf16 are asked for; choose one$"):
        fastcal.quantize(*attention, fp16=True, bf16=True)


@pytest.mark.parametrize("kind", HALVES)
def test_the_command_writes_a_typed_model(run_fastcal, tmp_path, attention, kind):
    path, cache = attention
    cache.save(tmp_path / "x.cache")
    done = run_fastcal("quantize", path, tmp_path / "x.cache", "-o", tmp_path / "y.onnx", f"--{kind}", "--json")
    assert done.returncode == 0, done.stderr
    assert onnx.load(tmp_path / "y.onnx") == fastcal.quantize(path, tmp_path / "x.cache", **{kind: True})
    assert json.loads(done.stdout)["other_layers"] == HALVES[kind].label
    done = run_fastcal("quantize", path, tmp_path / "x.cache", "-o", tmp_path / "y.onnx", f"--{kind}")
    assert f"weights in {HALVES[kind].label}; --int8-weights stores INT8" in done.stdout
    done = run_fastcal("quantize", path, tmp_path / "x.cache", "-o", tmp_path / "z.onnx", "--fp16", "--bf16")
    assert (done.returncode, done.stderr) == (2, "error: both fp16 and bf16 are asked for; choose one\n")


def as_half(path):
    """Write a model beside another in which all that was float32 is float16; return its path."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    scales = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[2:3]}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(model, path.with_suffix(".half.onnx"))
    return path.with_suffix(".half.onnx")


@pytest.mark.parametrize("name", ["residual", "concat", "gemm"])
def test_a_model_of_float16_stays_one(tmp_path, build, name):
    path, batches = write_network(name, tmp_path)
    half = Made.__new__(Made)
    half.path, half.batches = as_half(path), [{"x": batch["x"].astype(np.float16)} for batch in batches]
    cache = fastcal.calibrate(half.path, half.batches, algorithm="minmax", backend="onnxruntime")
    model = fastcal.quantize(half.path, cache)
    onnx.checker.check_model(model, full_check=True)
    before = onnx.load(half.path).graph
    assert [model.graph.input, model.graph.output] == [before.input, before.output]
    assert count_quantized(model)[0] == count_quantized(model)[1] > 0
    kinds = [tensor.data_type for tensor in model.graph.initializer]
    assert TensorProto.FLOAT not in kinds or name == "concat"  # the scales of a Resize
    whole = Made(path, batches)
    exact, found, fp16 = half.run(half.path), half.run(model), whole.run(whole.models["fp16"])
    floats = whole.run(path)
    for reference, rounded, exact_float, rounded_float in zip(exact, found, floats, fp16, strict=True):
        assert rounded.dtype == np.float16
        assert decibels(reference, rounded) > decibels(exact_float, rounded_float) - 2
    assert set(build(half.path, model, half.batches[0]).weighted.values()) == {"INT8"}
    with pytest.raises(FastcalError, match=r"half.onnx is float16; leave out bf16, or export the network in float32$"):
        fastcal.quantize(half.path, cache, bf16=True)


def test_a_model_of_float16_is_tuned_and_compared(tmp_path):
    path, batches = write_network("residual", tmp_path)
    path, batches = as_half(path), [{"x": batch["x"].astype(np.float16)} for batch in batches]
    tuning = fastcal.tune(path, batches)
    assert tuning.result.sqnr > 30
    onnx.save(fastcal.quantize(path, tuning), typed := tmp_path / "typed.onnx")
    assert fastcal.compare(path, batches, caches={"mine": tuning}, quantized={"typed": typed}).best
    assert [value.type.tensor_type.elem_type for value in onnx.load(typed).graph.output] == [TensorProto.FLOAT16]


def test_outputs_of_float16_that_fp32_computes(onnx_file):
    """Pow stays in FP32, and Casts are no layers of their own."""
    path = onnx_file(
        "f (float16[N, 4] x) => (float16[N, 4] y, float16[N, 4] z) { m = MatMul(x, w) c = Cast<to = 1>(m)"
        "  s = Mul(c, c) h = Cast<to = 10>(s) y = Pow(h, two) z = MatMul(y, w) }",
        {"w": np.eye(4, dtype="f2"), "two": np.float16(2)},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.01, "y": 0.01}))
    onnx.checker.check_model(model, full_check=True)
    batch = {"x": np.linspace(-1, 1, 8, dtype="f2").reshape(2, 4)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found in session.run(None, batch):
        assert found.dtype == np.float16
        assert found == pytest.approx(batch["x"] ** 4, abs=0.05)
    assert types_in(model)["s"] == TensorProto.FLOAT16


@pytest.mark.parametrize("opset", [9, 11])
def test_a_model_of_an_old_opset_becomes_typed(tmp_path, opset):
    path, batches = write_network("residual", tmp_path, opset)
    cache = fastcal.calibrate(path, batches, algorithm="minmax", backend="onnxruntime")
    old = fastcal.quantize(path, cache, fp16=True)
    onnx.checker.check_model(old, full_check=True)
    path, _ = write_network("residual", tmp_path, 17)
    new = fastcal.quantize(path, fastcal.CalibrationCache(cache.scales), fp16=True)
    assert [node.output for node in old.graph.node] == [node.output for node in new.graph.node]
    values = [{tensor.name: tensor.raw_data for tensor in each.graph.initializer} for each in (old, new)]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("graph", "weights", "shape"),
    [
        ("[a] t = Conv(x, w, b) r = Relu(t) [b] y = Conv(r, w, b)", (8, 8, 1, 1), (4, 8, 4, 4)),
        ("[a] t = ConvTranspose(x, w, b) [b] y = ConvTranspose(t, w, b)", (8, 8, 1, 1), (4, 8, 4, 4)),
        ("[a] t = Gemm<transB = 1>(x, w, b) [b] y = Gemm<beta = 0.5>(t, w, b)", (8, 8), (4, 8)),
        ("[a] m = MatMul(x, w) t = Add(m, b) [b] n = MatMul(t, w) y = Add(b, n)", (8, 8), (4, 8)),
    ],
)
def test_large_biases_do_not_overflow(onnx_file, graph, weights, shape):
    """ONNX Runtime divides them by the product of the scales: by 1e-6 and less here."""
    random = np.random.default_rng(0)
    values = {
        "w": random.standard_normal(weights, dtype="f4") / 100,
        "b": 20 * np.abs(random.standard_normal(8, dtype="f4")),
    }
    dims = ", ".join(["N", *map(str, shape[1:])])
    path = onnx_file(f"f (float[{dims}] x) => (float[{dims}] y) {{ {graph} }}", values)
    found = Made(path, [{"x": random.standard_normal(shape, dtype="f4")}])
    (exact,), (fp16,) = found.run(path), found.run(found.models["fp16"])
    assert decibels(exact, fp16) > 60
    assert count_quantized(found.models["fp16"]) == (2, 2)
    assert {"a", "b"} <= {node.name for node in found.models["fp16"].graph.node}
    same = [node.op_type for node in found.models["bf16"].graph.node if node.op_type in ("Add", "Sub")]
    assert same == (["Add", "Add"] if "MatMul" in graph else [])


def test_layers_go_back_to_fp16_as_soon_as_they_can(onnx_file, caplog):
    """After what stays in FP32, and for constants: tables, and weights with a few small values."""
    path = onnx_file(
        "f (int64[N] i, float[N, 8] x) => (float[N, 8] y, float[N, 8] z) { e = Gather(table, i) p = Pow(x, two)"
        "  r = Relu(p) s = Add(r, e) [plain] y = MatMul(r, v) [int8] z = MatMul(s, w) }",
        {
            "table": np.ones((4, 8), "f4"), "two": np.float32(2), "w": np.eye(8, dtype="f4"),
            "v": np.eye(8, dtype="f4") + np.float32(1e-9),
        },
    )  # fmt: skip
    cache = fastcal.CalibrationCache({"x": 0.01, "r": 0.01, "s": 0.01})
    kept, model = kept_in_fp32(caplog, path, cache, fp16=True, exclude=["plain"])
    assert kept == {"p": "Pow"}
    types = types_in(model)
    assert {types[name] for name in "pr"} == {TensorProto.FLOAT}
    assert {types[name] for name in "es"} == {TensorProto.FLOAT16}
    (plain,) = [node for node in model.graph.node if node.name == "plain"]
    assert plain.input[1] == "v_float16"


def test_a_type_that_an_attribute_names_stays(onnx_file):
    path = onnx_file(
        "f (float[2, 2] x) => (float[2, 2] y) { n = Neg(x) c = Cast<to = 1>(n) i = EyeLike<dtype = 1>(c)"
        "  k = Cast<to = 6>(n) f = Cast<to = 1>(k) s = Add(c, i) t = Add(s, f) y = MatMul(t, w) }",
        {"w": np.eye(2, dtype="f4")},
    )
    model = fastcal.quantize(path, fastcal.CalibrationCache({"t": 0.05}), fp16=True)
    onnx.checker.check_model(model, full_check=True)
    types = types_in(model)
    assert types["n"] == TensorProto.FLOAT16
    assert {types[name] for name in "cif"} == {TensorProto.FLOAT}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.float32([[-1, 2], [0.5, 0]])
    assert session.run(None, {"x": x})[0] == pytest.approx(np.eye(2) - x + np.trunc(-x), abs=0.05)


def test_channels_of_hardly_any_weight_have_scales_above_0(onnx_file):
    weights = np.eye(4, dtype="f4")
    weights[:, 2] *= 1e-9
    path = onnx_file("f (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, w) }", {"w": weights})
    model = fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.01}), fp16=True)
    batch = {"x": np.linspace(-1, 1, 8, dtype="f4").reshape(2, 4)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, batch)[0] == pytest.approx(batch["x"] @ weights, abs=0.01)
    (scales,) = [numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "w_scale_float16"]
    assert scales.min() == 2.0**-24
