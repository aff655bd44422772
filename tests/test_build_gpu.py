"""Engines as TensorRT builds them, and `fastcal build` as a user meets it: in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastcal
from conftest import DIGITS

pytestmark = pytest.mark.gpu("TensorRT")

MODEL = DIGITS / "digits.onnx"
IMAGES = DIGITS / "images"

#: What runs without cuBLAS and cuDNN, in as little time as TensorRT can.
TACTICS = "EDGE_MASK_CONVOLUTIONS,JIT_CONVOLUTIONS"
FAST = ("--tactic-sources", TACTICS, "--optimization-level", 0)


def load(trt, path):
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(Path(path).read_bytes())
    assert engine is not None
    return engine


def accuracy(trt, engine):
    """The share of the sample's test images that an engine classifies correctly."""
    import cupy

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    output = next(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
    context, stream = engine.create_execution_context(), cupy.cuda.Stream()
    feed = fastcal.ImageFeed(DIGITS / "test", model=MODEL, batch_size=45, device="cuda")
    found = []
    with feed, stream:
        for batch in feed:
            context.set_input_shape("image", batch["image"].shape)
            scores = cupy.empty(tuple(context.get_tensor_shape(output)), cupy.float32)
            context.set_tensor_address("image", batch["image"].data.ptr)
            context.set_tensor_address(output, scores.data.ptr)
            assert context.execute_async_v3(stream.ptr)
            found += scores.get().argmax(axis=1).tolist()
    right = [int(Path(path).parent.name) for path in feed.paths]
    assert len(found) == len(right)
    return np.mean(np.equal(found, right))


def rows(stdout):
    return dict(line.split(maxsplit=1) for line in stdout.splitlines())


@pytest.mark.parametrize("calibration", ["fastcal", "tensorrt"])
def test_it_builds_an_engine_and_says_what_it_did(trt, spawn_fastcal, tmp_path, calibration):
    paths = {"-o": tmp_path / "x.engine", "--cache": tmp_path / "x.cache", "--timing-cache": tmp_path / "timings"}
    words = [word for pair in paths.items() for word in pair]
    words += ["--calibration", calibration]
    batches = ("--batch-size", 60, "--min-batch", 2, "--opt-batch", 45, "--max-batch", 90, "--workspace", 256)
    done = spawn_fastcal("build", MODEL, IMAGES, *words, *batches, *FAST)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^(error|Traceback)", done.stderr, re.MULTILINE)
    assert all(re.match("note: |warning: ", line) for line in done.stderr.splitlines()), done.stderr
    said = rows(done.stdout)
    if calibration == "tensorrt":
        first, worst = re.fullmatch(
            r"([\d.]+) ms for the first batch, ([\d.]+) ms at most for the others", said.pop("get_batch")
        ).groups()
        assert float(first) > 0
        assert float(worst) > 0
    said.pop("float", None)  # weighted layers that TensorRT runs in FP16
    assert list(said) == ["images", "prepared", "speed", "engine", "layers", "cache"]
    assert re.search(r"(^|, )[1-9]\d* in INT8", said["layers"])
    assert said["images"] == "256 in 5 batches of 60"
    assert re.fullmatch(r"\d+ images/s, \d+% of the time waiting for data", said["speed"])
    assert said["engine"].startswith(f"{paths['-o']}, ")
    assert said["cache"] == str(paths["--cache"])
    assert set(os.listdir(tmp_path)) == {"x.engine", "x.cache", "x.cache.json", "timings"}
    engine = load(trt, paths["-o"])
    assert [shape[0] for shape in engine.get_tensor_profile_shape("image", 0)] == [2, 45, 90]
    assert accuracy(trt, engine) > 0.98

    before = {name: (tmp_path / name).stat().st_mtime_ns for name in ("x.cache", "x.cache.json")}
    again = spawn_fastcal("build", MODEL, IMAGES, *words, *batches, *FAST)
    assert again.returncode == 0, again.stderr
    assert "x.cache is reused" in again.stderr
    assert "is not reused" not in again.stderr
    assert [name for name in rows(again.stdout) if name != "float"] == ["images", "engine", "layers", "cache"]
    assert rows(again.stdout)["images"] == "none: the cache was reused"
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    assert accuracy(trt, load(trt, paths["-o"])) > 0.98


def test_batches_on_another_gpu_than_tensorrt_builds_on():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=64, device="cuda:1") as feed:
        message = (
            r"the batches are on GPU 1, but TensorRT builds on the current GPU, 0; make the feed with device='cuda:0'"
        )
        with pytest.raises(fastcal.FastcalError, match=message):
            fastcal.build_engine(MODEL, feed)


@pytest.mark.parametrize(
    "graph",
    [
        None,  # the sample, which ends in a Gemm
        "f (float[N, 8] x) => (float[N, 3] y) { r = Relu(x) g = Gemm<transB = 1>(r, w, c) y = HardSwish(g) }",
        "f (float[N, 2, 8] x) => (float[N, 3, 3] y) { v = Conv(x, k) r = Relu(v) y = MaxPool<kernel_shape = [4]>(r) }",
    ],
)
def test_the_builder_takes_onnxruntimes_observations_without_a_batch_or_a_missing_scale(
    trt, onnx_file, monkeypatch, caplog, graph
):
    monkeypatch.setattr("fastcal.feed_calibrator.has_cuda_provider", lambda: True)
    monkeypatch.setattr("fastcal.observe.with_tensorrt.TensorRTObserver", lambda *_, **__: 1 / 0)
    values = {"w": np.eye(3, 8, dtype="f4"), "c": np.ones(3, "f4"), "k": np.ones((3, 2, 2), "f4")}
    path = MODEL if graph is None else onnx_file(graph, values)
    if graph is None:
        feed = fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=64)
    else:
        shape = (4, 8) if "Gemm" in graph else (4, 2, 8)
        batches = [np.random.default_rng(number).standard_normal(shape, dtype="f4") for number in range(3)]
        feed = fastcal.ArrayFeed(batches, ["x"])
    with feed, caplog.at_level("WARNING", "fastcal"):
        calibrator = fastcal.EntropyCalibrator2(feed, model=path)
        fastcal.build_engine(path, calibrator, tactic_sources=TACTICS.split(","), optimization_level=0)
    assert calibrator.stats.batches == 0
    assert [record.getMessage() for record in caplog.records if "scal" in record.getMessage().lower()] == []


def test_a_feed_is_enough(trt, tmp_path):
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=64) as feed:
        engine = fastcal.build_engine(MODEL, feed, tactic_sources=TACTICS.split(","), optimization_level=0)
    (tmp_path / "x.engine").write_bytes(engine)
    loaded = load(trt, tmp_path / "x.engine")
    assert [shape[0] for shape in loaded.get_tensor_profile_shape("image", 0)] == [1, 64, 64]


@pytest.mark.parametrize(
    ("algorithm", "header"),
    [
        ("entropy", r"TRT-\d+-EntropyCalibration$"),
        ("minmax", r"TRT-\d+-MinMaxCalibration$"),
        ("percentile", r"0 3ff0000000000000 3fefae147ae147ae$"),  # cutoff 1, quantile 0.99
    ],
)
def test_the_algorithm_is_the_one_asked_for(trt, spawn_fastcal, tmp_path, algorithm, header):
    done = spawn_fastcal(
        "build", MODEL, IMAGES, "-o", tmp_path / "x.engine", "--cache", tmp_path / "x.cache", "--no-fp16",
        "--algorithm", algorithm, "--quantile", 0.99, *FAST,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(header, (tmp_path / "x.cache").read_text().splitlines()[0])
    load(trt, tmp_path / "x.engine")


@pytest.mark.parametrize("calibration", ["fastcal", "tensorrt"])
def test_a_dynamic_size_is_that_of_the_images(trt, spawn_fastcal, tmp_path, onnx_file, calibration):
    model = onnx_file("f (float[N, 3, H, W] image) => (float[N, 3, H, W] y) { y = Relu(image) }")
    batches = ("--batch-size", 32, "--max-batch", 40)
    words = ("-o", tmp_path / "x.engine", "--calibration", calibration, "--size", "24x40", *batches)
    done = spawn_fastcal("build", model, IMAGES, *words, *FAST)
    assert done.returncode == 0, done.stderr
    shapes = load(trt, tmp_path / "x.engine").get_tensor_profile_shape("image", 0)
    assert [tuple(shape) for shape in shapes] == [(batch, 3, 24, 40) for batch in (1, 32, 40)]


def test_a_timing_cache_that_is_none_is_replaced(spawn_fastcal, tmp_path):
    (tmp_path / "timings").write_bytes(b"garbage")
    words = ("-o", tmp_path / "x.engine", "--timing-cache", tmp_path / "timings")
    done = spawn_fastcal("build", MODEL, IMAGES, *words, *FAST)
    assert done.returncode == 0, done.stderr
    assert "timings was rejected: it is of another TensorRT or GPU, or is not a timing cache" in done.stderr
    assert len((tmp_path / "timings").read_bytes()) > len(b"garbage")


def test_what_is_wrong_is_one_line_and_no_engine(spawn_fastcal, tmp_path, onnx_file):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(IMAGES.rglob("*.jpg"))[:12]):
        data = path.read_bytes()
        (images / f"{number:02}.jpg").write_bytes(data[:700] if number == 9 else data)
    unknown = onnx_file("f (float[N, 3, 32, 32] image) => (float[N, 3, 32, 32] y) { y = NoSuchLayer(image) }")
    (tmp_path / "x.engine").write_text("old")
    cache, nowhere = tmp_path / "x.cache", tmp_path / "nowhere" / "x"
    for arguments, message in (
        ((MODEL, images, "--batch-size", 4, "--cache", cache, *FAST), r".*images/09.jpg cannot be decoded"),
        ((unknown, IMAGES, *FAST), r"TensorRT cannot parse .*model.onnx: \S"),
        ((MODEL, IMAGES, "--tactic-sources", "FASTEST"), r"there is no tactic source 'FASTEST'; TensorRT [\d.]+ has "),
        ((MODEL, IMAGES, "--algorithm", "kl"), r"there is no algorithm 'kl'; choose one of entropy2, "),
        ((MODEL, IMAGES, "--cache", nowhere, *FAST), r"cannot write .*nowhere/x: there is no folder"),
        (
            (MODEL, IMAGES, "--cache", tmp_path / "x.engine"),
            r".*x.engine is the engine; name another file for the cache",
        ),
        ((MODEL, IMAGES, "--timing-cache", MODEL), r".*digits.onnx is the model itself; name another file for the tim"),
        (
            (MODEL, IMAGES, "--min-batch", 0, "--batch-size", 32),
            r"the engine's batches are min_batch 0, opt_batch 32, max_batch 32; they",
        ),
    ):
        done = spawn_fastcal("build", "-o", tmp_path / "x.engine", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        errors = [line for line in done.stderr.splitlines() if not re.match("note: |warning: ", line)]
        assert len(errors) == 1, done.stderr
        assert re.match(r"error: " + message, errors[0])
        assert (tmp_path / "x.engine").read_text() == "old"
    assert not cache.exists()


def test_a_gpu_that_cuda_does_not_see(spawn_fastcal, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = spawn_fastcal("build", MODEL, IMAGES, "-o", tmp_path / "x.engine", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: fastcal build needs CuPy and an NVIDIA GPU, and CUDA sees none here; fastcal calibrate works here\n"
    )


def interrupt_build(folder, data, moment, *options):
    """Press Ctrl-C at a moment, and return the last line said."""
    command = [sys.executable, "-m", "fastcal", "build", MODEL, data, "-o", "x.engine", "--cache", "x.cache"]
    process = subprocess.Popen(
        [*command, *options, "--tactic-sources", TACTICS], cwd=folder, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    moment()
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]  # the calibration would take longer
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


@pytest.mark.parametrize("calibration", ["fastcal", "tensorrt"])
def test_ctrl_c_during_the_calibration_leaves_nothing_behind(tmp_path, calibration):
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(IMAGES.rglob("*.jpg")) * 400)))
    last = interrupt_build(tmp_path, "list.txt", lambda: time.sleep(20), "--calibration", calibration)
    assert last == "interrupted; nothing was written"
    assert os.listdir(tmp_path) == ["list.txt"]


def test_ctrl_c_while_the_engine_is_built_leaves_the_cache(tmp_path):
    def cache_is_written():
        end = time.monotonic() + 100
        while not (tmp_path / "x.cache.json").exists():
            assert time.monotonic() < end
            time.sleep(0.005)

    last = interrupt_build(tmp_path, IMAGES, cache_is_written)
    assert last == "interrupted; already written: x.cache, x.cache.json"
    assert set(os.listdir(tmp_path)) == {"x.cache", "x.cache.json"}


def test_a_calibrator_makes_scales_equal_for_the_dla(trt):
    found = {}
    for target in (None, "dla"):
        with fastcal.ImageFeed(IMAGES, model=MODEL, limit=64, batch_size=64) as feed:
            calibrator = fastcal.EntropyCalibrator2(feed, model=MODEL)
            with calibrator:
                calibrator.calibrate(MODEL, target=target)
                found[target] = fastcal.CalibrationCache.from_bytes(calibrator.read_calibration_cache())
    assert found["dla"].scales == fastcal.for_dla(MODEL, found[None]).scales != found[None].scales
    with pytest.raises(fastcal.UnavailableError, match="dla is 0, and TensorRT finds 0 DLA cores here"):
        fastcal.build_engine(MODEL, tuning=found[None], min_batch=1, max_batch=1, dla=0)
