"""Engines from Q/DQ models, built by TensorRT for RTX, which needs no GPU and has TensorRT 11's interface."""

import json
import logging
import os
import re

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DIGITS, start_rtx
from fastcal.errors import DataError, FastcalError, ModelError
from fastcal.external import ExternalData
from fastcal.library import logger_of, parse_with
from fastcal.model import Model

rtx = pytest.importorskip("tensorrt_rtx")
start_rtx()

MODEL, IMAGES = DIGITS / "digits.onnx", DIGITS / "images"
RTX = {"builder": "rtx", "compute_capabilities": ["8.9"]}

#: What TensorRT for RTX runs in float anyway: the pooling of the sample.
FLOAT = ["AveragePool"]


@pytest.fixture(scope="module")
def cache():
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=32, limit=64) as feed:
        return fastcal.calibrate(MODEL, feed, backend="onnxruntime", tensorrt_version="10.3.0")


@pytest.fixture
def parsed(monkeypatch):
    """The models that TensorRT parses."""
    from fastcal.engine import explicit

    found, parse = [], explicit.parse_with
    monkeypatch.setattr(explicit, "parse_with", lambda *arguments: found.append(arguments[-1]) or parse(*arguments))
    return found


@pytest.fixture
def profiles(monkeypatch):
    """The profiles that engines get: shapes by input, and batches."""
    from fastcal.engine import explicit

    found, make = [], explicit.make_profile

    def make_profile(builder, shapes, batches):
        found.append((shapes, batches))
        profile = make(builder, shapes, batches)
        for name, shape in shapes.items():
            assert [tuple(each) for each in profile.get_shape(name)] == [(batch, *shape[1:]) for batch in batches]
        return profile

    monkeypatch.setattr(explicit, "make_profile", make_profile)
    return found


@pytest.mark.parametrize(
    ("options", "form"),
    [({}, {"fp16": True}), ({"bf16": True}, {"bf16": True}), ({"fp16": False}, {})],
)
def test_the_engine_is_that_of_the_typed_model(cache, parsed, options, form):
    engine = fastcal.build_engine(MODEL, tuning=cache, **RTX, **options)
    assert len(engine) > 100_000
    assert parsed == [fastcal.quantize(MODEL, cache, exclude=FLOAT, **form)]


def test_tensorrt_11_has_this_way_alone(cache, rtx, parsed, tmp_path):
    """TensorRT for RTX stands in for TensorRT 11, whose interface it has."""
    cache.save(tmp_path / "x.cache")
    fastcal.build_engine(MODEL, tuning=tmp_path / "x.cache", optimization_level=0)
    assert parsed == [fastcal.quantize(MODEL, cache, fp16=True, exclude=FLOAT)]
    with pytest.raises(FastcalError, match=r"^TensorRT 1\.7\.\S+ has no implicit quantization; leave out explicit$"):
        fastcal.build_engine(MODEL, tuning=cache, explicit=False)
    with pytest.raises(
        FastcalError, match=r"^TensorRT itself calibrates in an implicit build alone, up to TensorRT 10"
    ):
        fastcal.build_engine(MODEL, tuning=cache, calibration="tensorrt")


def test_the_network_is_tuned_on_batches(parsed, profiles):
    batches = [{"image": np.random.default_rng(number).standard_normal((3, 3, 32, 32), "f4")} for number in range(2)]
    fastcal.build_engine(MODEL, batches, max_batch=5, exact=True, **RTX)
    expected = fastcal.tune(MODEL, batches, exact=True, exclude=FLOAT, all_tensors=True)
    assert parsed == [fastcal.quantize(MODEL, expected, fp16=True, exclude=FLOAT)]
    assert profiles == [({"image": (-1, 3, 32, 32)}, (1, 3, 5))]
    fastcal.build_engine(MODEL, batches, max_batch=2, tuning=expected, **RTX)
    assert profiles[1][1] == (1, 2, 2)


def test_a_tuning_is_exact_if_asked_for(onnx_file, parsed):
    path = onnx_file(
        "f (float[N, 4] x) => (float[N, 4] y) { m = MatMul(x, w) s = Sigmoid(m) y = MatMul(s, w) }",
        {"w": np.eye(4, dtype="f4")},
    )
    batches = [{"x": np.random.default_rng(0).standard_normal((64, 4), "f4")}]
    for exact in (False, True):
        fastcal.build_engine(path, batches, exact=exact, **RTX)
        tuning = fastcal.tune(path, batches, exact=exact, all_tensors=True)
        assert parsed[-1] == fastcal.quantize(path, tuning, fp16=True)
    assert parsed[0] != parsed[1]


def test_the_engine_is_for_the_named_gpus(cache, monkeypatch):
    from fastcal.engine.settings import BuildSettings

    found, build = [], BuildSettings.build

    def record(settings, builder, network, config, *more):
        found.extend(config.get_compute_capability(index).name for index in range(config.num_compute_capabilities))
        return build(settings, builder, network, config, *more)

    monkeypatch.setattr(BuildSettings, "build", record)
    fastcal.build_engine(MODEL, tuning=cache, builder="rtx", compute_capabilities=["8.9", "12.0"])
    assert found == ["SM89", "SM120"]


def test_a_tuning_decides_on_layers_and_biases(cache, parsed):
    tuning = fastcal.Tuning(cache, in_float=["/3/first/Conv_output_0"], bias={"/0/Conv_output_0": [0.5] * 16})
    fastcal.build_engine(MODEL, tuning=tuning, min_batch=2, **RTX)
    assert parsed == [fastcal.quantize(MODEL, tuning, fp16=True, exclude=FLOAT)]
    assert parsed != [fastcal.quantize(MODEL, cache, fp16=True, exclude=FLOAT)]


def test_dynamic_sizes_are_those_of_the_batches(onnx_file, profiles):
    path = onnx_file(
        "f (float[N, 3, H, W] image) => (float[N, 3, H, W] y) { y = Conv(image, w) }",
        {"w": np.eye(3, dtype="f4").reshape(3, 3, 1, 1)},
    )
    scales = fastcal.CalibrationCache({"image": 0.1})
    fastcal.build_engine(path, [{"image": np.zeros((2, 3, 24, 40), "f4")}], tuning=scales, max_batch=4, **RTX)
    assert profiles == [({"image": (-1, 3, 24, 40)}, (1, 2, 4))]
    with pytest.raises(DataError, match=r"^input 'image' is dynamic in more than its batch; give batches, whose sizes"):
        fastcal.build_engine(path, tuning=scales, **RTX)


def test_a_large_model_is_parsed_from_a_file(cache, monkeypatch, tmp_path):
    model = onnx.load(MODEL)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    plain = fastcal.CalibrationCache(cache.scales)
    engine = fastcal.build_engine(tmp_path / "m.onnx", tuning=plain, **RTX)
    moved, move = [], ExternalData.move
    monkeypatch.setattr(ExternalData, "move", lambda *arguments: moved.append(arguments) or move(*arguments))
    monkeypatch.setattr("fastcal.library.MOST_IN_A_FILE", 1)
    assert abs(len(fastcal.build_engine(tmp_path / "m.onnx", tuning=plain, **RTX)) - len(engine)) < 2000
    assert len(moved) == 1


def test_what_tensorrt_cannot_parse_is_named(onnx_file, cache):
    path = onnx_file(
        "f (float[N, 2] x) => (float[N, 2] y) { t = MatMul(x, w) y = NoSuchLayer(t) }", {"w": np.eye(2, dtype="f4")}
    )
    with pytest.raises(ModelError, match=r"^TensorRT cannot parse .*model.onnx: NoSuchLayer node of 'y': \S"):
        fastcal.build_engine(path, tuning=fastcal.CalibrationCache({"x": 0.1}), fp16=False, **RTX)
    assert logger_of(rtx).errors
    fastcal.build_engine(MODEL, tuning=cache, **RTX)
    assert logger_of(rtx).errors == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"builder": "trtexec"}, "there is no builder 'trtexec'; choose tensorrt or rtx"),
        (
            {"compute_capabilities": ["9.0"]},
            "there is no compute capability '9.0'; this TensorRT for RTX has 7.5, 8.0,",
        ),
        ({"compute_capabilities": "8.9"}, "compute_capabilities is '8.9'; give a list of names like '8.9'"),
        ({"explicit": False}, "has no implicit quantization; leave out explicit"),
        ({"tuning": None}, "there are neither batches nor scales; give a feed, or a calibration cache as tuning"),
        ({"calibration": "tensorrt"}, "TensorRT itself calibrates in an implicit build alone"),
        ({"calibration": "mine"}, "there is no calibration 'mine'; choose fastcal or tensorrt"),
        ({"workspace": 0}, "workspace is 0; it must be at least 1"),
        ({"timing_cache": "timings"}, "TensorRT for RTX keeps no timings; leave out timing_cache"),
        ({"tactic_sources": ["CUDNNN"]}, "there is no tactic source 'CUDNNN'; TensorRT 1.7"),
        ({"min_batch": 3, "max_batch": 2}, "the engine's batches are min_batch 3, opt_batch 3, max_batch 2; they must"),
        ({"bf16": True, "tuning": fastcal.CalibrationCache({"a": 1.0})}, "the cache has scales for 0 of the"),
    ],
)
def test_what_is_wrong_is_named(cache, options, message):
    with pytest.raises(FastcalError) as raised:
        fastcal.build_engine(MODEL, **RTX | {"tuning": cache} | options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_variant_of_a_model_is_parsed_as_it_is():
    logger = logger_of(rtx)
    builder = rtx.Builder(logger)

    def layers(model):
        return parse_with(rtx, builder, logger, model).num_layers

    model, shorter = Model(MODEL), onnx.load(MODEL)
    del shorter.graph.node[-1]  # the Gemm
    shorter.graph.output[0].name = shorter.graph.node[-1].output[0]
    whole = layers(model)
    assert layers(model.showing(["image"])) == whole
    assert layers(model.replaced(shorter)) < whole
    assert layers(model.replaced(shorter).showing(["image"])) < whole


def test_compute_capabilities_are_for_rtx(cache, trt_bindings):
    with pytest.raises(FastcalError, match=r"^TensorRT builds for the GPU that is there; leave out compute_capabil"):
        fastcal.build_engine(MODEL, tuning=cache, compute_capabilities=["8.9"])


@pytest.mark.parametrize("options", [{}, {"explicit": True}, {"explicit": True, "bf16": True}])
def test_tensorrt_before_11_has_both_ways(cache, trt_bindings, options):
    """Without a GPU, TensorRT does not start in either."""
    with pytest.raises(fastcal.UnavailableError, match=r"^TensorRT cannot start here"):
        fastcal.build_engine(MODEL, tuning=cache, **options)
    with pytest.raises(FastcalError, match=r"^bf16 is for an explicit build; set explicit too$"):
        fastcal.build_engine(MODEL, tuning=cache, bf16=True)


def test_an_explicit_build_takes_no_calibrator(trt_bindings):
    calibrator = fastcal.MinMaxCalibrator([np.zeros((2, 3, 32, 32), "f4")], model=MODEL)
    with pytest.raises(FastcalError, match=r"^an explicit build takes no calibrator; give its feed, or a calibration"):
        fastcal.build_engine(MODEL, calibrator, explicit=True)


def test_without_the_builder(monkeypatch, cache):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = r"^builder rtx needs the module tensorrt_rtx, which cannot .*: pip install tensorrt-rtx-cu13$"
    with pytest.raises(fastcal.UnavailableError, match=message):
        fastcal.build_engine(MODEL, tuning=cache, **RTX)


def test_the_command_builds_with_images(run_fastcal, tmp_path, parsed, profiles):
    paths = ("-o", tmp_path / "x.engine", "--cache", tmp_path / "x.cache")
    options = ("--builder", "rtx", "--compute-capability", "8.9", "--compute-capability", "12.0", "--max-batch", 64)
    done = run_fastcal("build", MODEL, IMAGES, *paths, *options, "--limit", 64)
    assert done.returncode == 0, done.stderr
    assert not re.search("^warning", done.stderr, re.MULTILINE)
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["images"] == "48 in 2 batches of 32"  # and 16 held out
    assert said["engine"].startswith(f"{tmp_path / 'x.engine'}, ")
    assert re.fullmatch(r"[\d.]+ dB at the outputs, top-1 1, on 16 held-out samples", said["keeps"])
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=32, limit=64) as feed:
        tuning = fastcal.tune(MODEL, feed, exclude=FLOAT, all_tensors=True)
    assert parsed == [fastcal.quantize(MODEL, tuning, fp16=True)]
    assert profiles == [({"image": (-1, 3, 32, 32)}, (1, 32, 64))]
    assert sorted(os.listdir(tmp_path)) == ["x.cache", "x.cache.json", "x.engine"]
    done = run_fastcal("build", MODEL, tmp_path / "x.cache", "-o", tmp_path / "y.engine", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "y.engine").stat().st_size > 100_000
    assert parsed[1] == fastcal.quantize(MODEL, tmp_path / "x.cache", fp16=True, exclude=FLOAT)
    done = run_fastcal("build", MODEL, IMAGES, *paths[:2], *options, "--limit", 64, "--algorithm", "minmax")
    assert done.returncode == 0, done.stderr
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=32, limit=64) as feed:
        minmax = fastcal.calibrate(MODEL, feed, algorithm="minmax")
    assert parsed[2] == fastcal.quantize(MODEL, minmax, fp16=True, exclude=FLOAT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onnx", "x.cache", "--calibration", "tensorrt"], "TensorRT itself calibrates in an implicit build alone"),
        (["m.onnx", "x.cache", "--implicit"], "has no implicit quantization"),
        (["m.onnx", "x.cache", "--compute-capability", "9"], "there is no compute capability '9'"),
        (["m.onnx", "x.cache", "--cache", "y.cache"], "x.cache is a calibration cache, and --cache is for images"),
        (["m.onnx", "x.cache", "--limit", "3"], "x.cache is a calibration cache, and --limit is for images"),
        (["m.onnx", "nothing.cache"], "no such file: nothing.cache"),
        (["m.onnx", "x.cache"], "the cache has scales for 0 of the"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_engine(run_fastcal, tmp_path, arguments, message):
    (tmp_path / "m.onnx").write_bytes(MODEL.read_bytes())
    (tmp_path / "x.cache").write_text("TRT-8601-MinMaxCalibration\nother: 3f800000\n")
    done = run_fastcal("build", *arguments, "-o", "x.engine", "--builder", "rtx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "x.cache"]


def test_expected_warnings_are_no_warnings(cache, caplog):
    with caplog.at_level(logging.DEBUG, "fastcal.tensorrt"):
        fastcal.build_engine(MODEL, tuning=cache, **RTX)
    texts = [record for record in caplog.records if "scales to fp32" in record.getMessage()]
    assert {record.levelname for record in texts} == {"DEBUG"}


#: Blocks of networks, between whose layers INT8 stays: the parts of YOLO, and a residual block.
BLOCKS = {
    "pooling": """c = Conv(x, w) s = Sigmoid(c) a = Mul(c, s)
        m1 = MaxPool<kernel_shape = [5, 5], pads = [2, 2, 2, 2]>(a)
        m2 = MaxPool<kernel_shape = [5, 5], pads = [2, 2, 2, 2]>(m1) t = Concat<axis = 1>(a, m1, m2, m2)
        d = Conv(t, v) y = Relu(d)""",
    "residual": """c = Conv<pads = [1, 1, 1, 1]>(x, k) a = Relu(c) d = Conv<pads = [1, 1, 1, 1]>(a, k) e = Relu(d)
        g = Conv<pads = [1, 1, 1, 1]>(e, k) h = Add(g, a) i = Relu(h) j = Conv(i, w) y = Relu(j)""",
    "split": """c = Conv(x, w) s = Sigmoid(c) a = Mul(c, s) l, r = Split<axis = 1>(a, halves) p = Conv(r, u)
        q = Sigmoid(p) z = Mul(p, q) n = Add(r, z) t = Concat<axis = 1>(l, r, n, l) d = Conv(t, v2) y = Relu(d)""",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_int8_stays_between_layers(onnx_file, name):
    """No kernel of the engine reads a tensor of FP16: they read INT8, or the sums of products."""
    from fastcal.engine.contents import contents_of
    from fastcal.model import Model

    shapes = {"w": (32, 32, 1, 1), "v": (32, 128, 1, 1), "v2": (32, 64, 1, 1), "u": (16, 16, 1, 1), "k": (32, 32, 3, 3)}
    text = BLOCKS[name]
    weights = {key: np.ones(shape, "f4") for key, shape in shapes.items() if f", {key})" in text}
    weights |= {"halves": np.int64([16, 16])} if "halves" in text else {}
    path = onnx_file(f"f (float[1, 32, 16, 16] x) => (float[1, 32, 16, 16] y) {{ {text} }}", weights)
    model = Model(path)
    scales = fastcal.CalibrationCache(dict.fromkeys([*model.input_names, *model.activations], 0.03))
    contents = contents_of(rtx, fastcal.build_engine(path, tuning=scales, **RTX), model)
    assert set(contents.weighted.values()) == {"INT8"}
    assert contents.layers.get("FP16", 0) == 0


def test_layers_that_rtx_runs_in_float_have_no_pair(onnx_file, parsed):
    path = onnx_file(
        "f (float[1, 8, 8, 8] x) => (float[1, 8, 15, 15] y) { c = Conv(x, w) n = Neg(c)"
        "  p = AveragePool<kernel_shape = [2, 2], pads = [0, 0, 1, 1]>(n) d = Conv(p, w) t = ConvTranspose(d, u)"
        "  y = Relu(t) }",
        {"w": np.ones((8, 8, 1, 1), "f4"), "u": np.ones((8, 8, 8, 8), "f4")},
    )
    scales = fastcal.CalibrationCache(dict.fromkeys("xcnpdty", 0.03))
    fastcal.build_engine(path, tuning=scales, **RTX)
    (model,) = parsed
    read = [node.input[0].removesuffix("_float16") for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(read) == ["p", "w", "x"]
