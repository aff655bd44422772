"""The examples on the digits sample: what they print and write. test_readme.py runs them as a user does."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fastcal
from conftest import DIGITS, ROOT, run_script

EXAMPLES = ROOT / "examples"

#: What runs without cuBLAS and cuDNN.
TACTICS = ("--tactic-sources", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")

needs_cpu_extra = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="fastcal calibrate needs numba and onnxruntime",
)


def build_with(script, folder):
    """Run an example's script twice; returns the engine it made, and what it said of it both times."""
    said = []
    for _ in range(2):
        done = run_script(str(EXAMPLES / script), *TACTICS, cwd=folder, env=None)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
    assert set(os.listdir(folder)) == {"digits.engine", "digits.cache", "digits.cache.json"}
    return (folder / "digits.engine").read_bytes(), said


@pytest.mark.gpu("TensorRT")
@pytest.mark.parametrize("script", ["tensorrt/build.py", "polygraphy/build.py"])
@pytest.mark.usefixtures("quick_engines")
def test_it_builds_an_engine(trt, tmp_path, script):
    if script.startswith("polygraphy"):
        pytest.importorskip("polygraphy")
    data, (first, second) = build_with(script, tmp_path)
    form = r"digits.engine: (\d+) bytes, calibrated with (\d) batches of 32, ([\d.]+) ms waited for them"
    size, batches, waited = re.fullmatch(form, first).groups()
    assert int(size) > 0
    assert batches == "8"
    assert float(waited) > 0
    size, batches, waited = re.fullmatch(form, second).groups()
    assert int(size) == len(data)
    assert (batches, float(waited)) == ("0", 0)  # the cache was used
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    assert [shape[0] for shape in engine.get_tensor_profile_shape("image", 0)] == [1, 32, 64]
    cache = fastcal.CalibrationCache.load(tmp_path / "digits.cache")
    assert cache.algorithm.name == "entropy2"
    assert 0 < cache.scales["image"] < 0.1


@pytest.fixture
def commands(tmp_path):
    """A folder for PATH, with what the scripts call; `run_shell` adds fastcal."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("basename", "dirname", "head", "sed", "wc"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def build_with_trtexec(run_shell, tmp_path, commands, *options, **variables):
    """Run the script; returns how it ended, and the folder it wrote to."""
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {**os.environ, "PATH": str(commands), **variables}
    command = [shutil.which("sh"), EXAMPLES / "trtexec" / "build.sh", *options]
    return run_shell(command, commands, cwd=folder, env=environment), folder


@needs_cpu_extra
def test_without_trtexec_the_cache_is_written(run_shell, tmp_path, commands):
    done, folder = build_with_trtexec(run_shell, tmp_path, commands, TENSORRT="10.3.0")
    assert done.returncode == 1
    note, *errors = done.stderr.splitlines()
    assert note.startswith("note: the preprocessing imagenet is assumed")
    assert errors == [
        "build.sh: no trtexec in PATH (TensorRT's archives and containers have it); digits.cache is written for it"
    ]
    assert "images     256 in 8 batches of 32" in done.stdout
    assert fastcal.CalibrationCache.load(folder / "digits.cache").header == "TRT-100300-EntropyCalibration2"
    assert sorted(os.listdir(folder)) == ["digits.cache", "digits.cache.json"]


@needs_cpu_extra
@pytest.mark.parametrize(("banner", "number"), [("v8601", "8601"), ("v100300", "100300")])
def test_the_cache_is_for_the_version_that_trtexec_names(run_shell, tmp_path, commands, banner, number):
    """With a stand-in for trtexec: one that names its version, and answers --saveEngine with its arguments."""
    (commands / "trtexec").write_text(
        f'#!/bin/sh\necho "&&&& RUNNING TensorRT.trtexec [TensorRT {banner}] [b1] # trtexec $*"\n'
        '[ "$1" = --help ] || echo "$@" > digits.engine\n'
    )
    (commands / "trtexec").chmod(0o755)
    done, folder = build_with_trtexec(run_shell, tmp_path, commands, "--tacticSources=-CUBLAS")
    assert done.returncode == 0, done.stderr
    cache = fastcal.CalibrationCache.load(folder / "digits.cache")
    assert cache.header == f"TRT-{number}-EntropyCalibration2"
    arguments = (folder / "digits.engine").read_text().split()
    assert {"--int8", "--calib=digits.cache", "--optShapes=image:32x3x32x32", "--tacticSources=-CUBLAS"} <= set(
        arguments
    )
    assert re.search(r"^digits.engine: \d+ bytes, with the scales of digits.cache$", done.stdout, re.MULTILINE)


@needs_cpu_extra
def test_trtexecs_failure_is_one_line(run_shell, tmp_path, commands):
    (commands / "trtexec").write_text("#!/bin/sh\necho no GPU\nexit 3\n")
    (commands / "trtexec").chmod(0o755)
    done, folder = build_with_trtexec(run_shell, tmp_path, commands, TENSORRT="8.6.1")
    assert (done.returncode, done.stderr.splitlines()[1:]) == (1, ["build.sh: trtexec failed; digits.log says why"])
    assert (folder / "digits.log").read_text() == "no GPU\n"


@pytest.mark.gpu
@needs_cpu_extra
@pytest.mark.skipif(shutil.which("trtexec") is None, reason="no trtexec in PATH")
def test_trtexec_builds_an_engine(run_shell, tmp_path, commands):
    (commands / "trtexec").symlink_to(shutil.which("trtexec"))
    done, folder = build_with_trtexec(run_shell, tmp_path, commands, "--tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN")
    assert done.returncode == 0, done.stderr
    assert (folder / "digits.engine").stat().st_size > 0
    assert "PASSED" in (folder / "digits.log").read_text()


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """A function that runs an example's script in this process, in an empty folder, and returns the text it printed."""
    monkeypatch.chdir(tmp_path)

    def run(script):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script)])
        runpy.run_path(EXAMPLES / script, run_name="__main__")
        return capsys.readouterr().out

    return run


@needs_cpu_extra
def test_quantized_digits_are_recognized_as_well(tmp_path, run_example):
    said = run_example("quantize/compare.py")
    top1 = {name: float(share.rstrip("%")) for name, share in map(str.split, said.splitlines())}
    assert list(top1) == ["FP32", "minmax", "entropy2", "percentile"]
    assert top1["FP32"] == 99.8  # what examples/digits/README.md says of PyTorch on the same images
    assert max(list(top1.values())[1:]) >= top1["FP32"] - 1
    assert sorted(os.listdir(tmp_path)) == ["digits.entropy2.onnx", "digits.minmax.onnx", "digits.percentile.onnx"]


@needs_cpu_extra
def test_shards_make_the_cache_that_the_images_make(tmp_path, run_example):
    said = run_example("webdataset/calibrate.py")
    scales = fastcal.CalibrationCache.load(tmp_path / "digits.cache").scales
    assert said == (
        f"digits.cache: {len(scales)} scales from 256 images, shards/digits-000000.tar:00000000.jpg and so on\n"
    )
    assert sorted(os.listdir(tmp_path / "shards")) == [f"digits-{number:06}.tar" for number in range(3)]
    with fastcal.ImageFeed(EXAMPLES / "digits" / "images", model=EXAMPLES / "digits" / "digits.onnx") as feed:
        assert fastcal.calibrate(EXAMPLES / "digits" / "digits.onnx", feed).scales == scales


@needs_cpu_extra
def test_both_inputs_of_a_network_are_fed(tmp_path, run_example):
    said = run_example("two_inputs/calibrate.py")
    scales = fastcal.CalibrationCache.load(tmp_path / "pairs.cache").scales
    assert re.fullmatch(rf"pairs.cache: {len(scales)} scales from 256 pairs; scores are up to [\d.]+ apart\n", said)
    both = {name.removeprefix("left_"): scale for name, scale in scales.items() if name.startswith("left_")}
    assert len(both) > 5
    for name, scale in both.items():  # of the same images in another order
        assert scales[f"right_{name}"] == pytest.approx(scale, rel=0.2)
    assert scales["difference"] > 0


def calibrate_with(example, folder):
    """Run an example without a GPU; returns what it said, and the scales it found."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = run_script(str(EXAMPLES / example / "calibrate.py"), cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(folder)) == {"digits.cache", "digits.cache.json"}
    return done.stdout, fastcal.CalibrationCache.load(folder / "digits.cache").scales


@needs_cpu_extra
def test_a_dataloader_gives_the_scales_of_its_batches(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    said, scales = calibrate_with("dataloader", tmp_path)
    monkeypatch.syspath_prepend(DIGITS)
    from prepare import prepare

    images = np.stack([prepare(path) for path in sorted((DIGITS / "images").rglob("*.jpg"))])
    batches = [{"image": images[first : first + 32]} for first in range(0, 256, 32)]
    assert scales == fastcal.calibrate(DIGITS / "digits.onnx", batches, backend="onnxruntime").scales
    assert said == f"digits.cache: {len(scales)} scales from 256 images\n"


@needs_cpu_extra
def test_a_pipeline_that_does_what_an_image_feed_does_gives_its_scales(tmp_path):
    said, scales = calibrate_with("dali_pipeline", tmp_path)
    with fastcal.ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", device="cpu") as feed:
        assert scales == pytest.approx(
            fastcal.calibrate(DIGITS / "digits.onnx", feed, backend="onnxruntime").scales, rel=1e-3
        )
    assert said == f"digits.cache: {len(scales)} scales from 8 batches of 32\n"


def test_deepstream_gets_the_cache_that_its_configuration_names(run_shell, tmp_path, commands):
    """With a stand-in for GStreamer, which says what it is told to run; test_readme.py runs the script without one."""
    folder = tmp_path / "deepstream"
    shutil.copytree(EXAMPLES / "deepstream", folder)
    shutil.copy(DIGITS / "digits.onnx", folder / "model.onnx")
    (folder / "images").symlink_to(DIGITS / "images")
    (commands / "gst-launch-1.0").write_text('#!/bin/sh\necho "$@"\n')
    (commands / "gst-launch-1.0").chmod(0o755)
    environment = {**os.environ, "PATH": str(commands), "TENSORRT": "8.6.2"}
    done = run_shell([shutil.which("sh"), folder / "run.sh"], commands, env=environment)
    assert done.returncode == 0, done.stderr
    assert "nvinfer config-file-path=config_infer_primary.txt" in done.stdout.splitlines()[-1]
    cache = fastcal.CalibrationCache.load(folder / "model.cache")
    assert cache.header == "TRT-8602-EntropyCalibration2"
    assert cache.record.entries["preprocess"].startswith("letterbox 0, rounded down, to 32x32, not antialiased, RGB")


def test_onnxruntime_classifies(tmp_path):
    script = EXAMPLES / "onnxruntime" / "classify.py"
    done = run_script(str(script), "--tensorrt", "10.3.0", cwd=tmp_path, env=None)
    assert done.returncode == 0, done.stderr
    right, total = re.match(r"(\d+) of (\d+) images classified correctly by \w+", done.stdout).groups()
    assert int(total) == sum(1 for path in (DIGITS / "test").rglob("*.jpg"))
    assert int(right) > 0.98 * int(total)
    assert (tmp_path / "digits.cache").read_text().startswith("TRT-100300-EntropyCalibration2\n")


def test_tritons_repository_has_the_files_that_its_configuration_names(run_shell, tmp_path, commands):
    shutil.copytree(EXAMPLES / "triton", tmp_path / "triton")
    (tmp_path / "digits").symlink_to(DIGITS)
    for name in ("cp", "mkdir"):
        (commands / name).symlink_to(shutil.which(name))
    environment = {**os.environ, "PATH": str(commands), "TENSORRT": "10.3.0"}
    done = run_shell([shutil.which("sh"), tmp_path / "triton" / "prepare.sh"], commands, env=environment)
    assert done.returncode == 0, done.stderr
    repository = tmp_path / "triton" / "repository"
    configuration = (repository / "digits" / "config.pbtxt").read_text()
    parameters = dict(re.findall(r'key: "(\w+)" value: "([^"]+)"', configuration))
    folder = repository / os.path.relpath(parameters["trt_engine_cache_path"], "/models")
    cache = fastcal.CalibrationCache.load(folder / parameters["int8_calibration_table_name"])
    assert cache.header == "TRT-100300-EntropyCalibration2"
    model = fastcal.Model(repository / "digits" / "1" / "model.onnx")
    assert fastcal.check_cache(cache, model).missing == ()
    declared = dict(re.findall(r'name: "(\w+)" data_type: TYPE_FP32 dims: \[ ([\d, ]+) \]', configuration))
    inputs = {value.name: ", ".join(map(str, value.shape[1:])) for value in model.inputs}
    assert declared == inputs | {"logits": "10"}
    assert [value.name for value in model.proto.graph.output] == ["logits"]


def test_ultralytics_export_and_its_cache(tmp_path):
    pytest.importorskip("ultralytics")
    command = [sys.executable, EXAMPLES / "ultralytics" / "export.py", "--weights", "yolo11n.yaml", "--size", "64"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, "--limit", "4", "--tensorrt", "8.6.1", "--dla"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images are prepared as letterbox 114 to 64x64, not antialiased, RGB, (x * 0.0039215" in done.stdout
    cache = fastcal.CalibrationCache.load(tmp_path / "yolo11n.cache")
    assert cache.header == "TRT-8601-EntropyCalibration2"
    assert fastcal.check_cache(cache, tmp_path / "yolo11n.onnx").missing == ()
    assert cache.scales == fastcal.for_dla(tmp_path / "yolo11n.onnx", cache).scales
