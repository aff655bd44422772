"""The command line as a user meets it."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from PIL import Image

import fastcal
from conftest import DIGITS
from fastcal.cache.record import Record
from fastcal.cli import app
from fastcal.device import resolve

MODEL = DIGITS / "digits.onnx"
ASSUMED = (
    f"note: the preprocessing imagenet is assumed, since {MODEL} names none; choose another with preprocess if it is "
    "not right\n"
)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((DIGITS / "images").rglob("*.jpg"))[::10]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("onnxruntime", marks=pytest.mark.gpu("onnxruntime-gpu")),
        pytest.param("tensorrt", marks=pytest.mark.gpu("TensorRT")),
    ],
)
def test_a_gpu_runs_the_network(spawn_fastcal, tmp_path, backend):
    options = ("--backend", backend, "--tactic-sources", "EDGE_MASK_CONVOLUTIONS,JIT_CONVOLUTIONS")
    for output, more in (("1.cache", ()), ("2.cache", ("--tf32",))):
        done = spawn_fastcal("calibrate", MODEL, DIGITS / "images", "-o", tmp_path / output, *options, *more)
        assert done.returncode == 0, done.stderr
    fp32, tf32 = (fastcal.CalibrationCache.load(tmp_path / name).scales for name in ("1.cache", "2.cache"))
    assert any(name.startswith("(Unnamed Layer*") for name in fp32) is (backend == "tensorrt")
    assert fp32.keys() == tf32.keys()
    assert fp32 != tf32


@pytest.mark.gpu
def test_an_error_while_the_gpu_starts_is_one_line(spawn_fastcal, tmp_path):
    done = spawn_fastcal("calibrate", MODEL, tmp_path / "nowhere", "-o", tmp_path / "c.cache")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nowhere.*\n", done.stderr)


def test_it_writes_the_cache_and_says_what_it_did(run_fastcal, tmp_path, images):
    output = tmp_path / "digits.cache"
    done = run_fastcal("calibrate", MODEL, images, "-o", output, "--batch-size", "8", "--tensorrt", "8.6.1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ASSUMED
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["images"] == "26 in 4 batches of 8"
    assert "crop 0.875 to 32x32" in said["prepared"]
    assert re.fullmatch(r"\d+ images/s, \d+% of the time waiting for data", said["speed"])
    cache = fastcal.CalibrationCache.load(output)
    assert cache.header == "TRT-8601-EntropyCalibration2"
    assert said["tensors"] == f"{len(cache.scales)}, scales by entropy2"
    assert said["clipped"].startswith("0.") or said["clipped"].startswith("less than 0.05 % of every tensor")
    assert str(output) in said["cache"]
    feed = fastcal.ImageFeed(images, model=MODEL, batch_size=8)
    assert fastcal.calibrate(MODEL, feed, algorithm="entropy2").scales == cache.scales


def test_it_says_what_int8_keeps_and_what_would_keep_more(run_fastcal, tmp_path, onnx_file):
    """The first sample of each batch is measured, as through the models that quantize writes."""
    random = np.random.default_rng(0)
    samples = random.standard_normal((40, 16)).astype("f4")
    samples[:, 0] *= 30  # one input carries next to everything, and entropy2 clips it
    np.save(tmp_path / "x.npy", samples)
    weights = {"w": np.eye(16, 12, dtype="f4"), "v": random.standard_normal((12, 4)).astype("f4")}
    model = onnx_file("net (float[N, 16] x) => (float[N, 4] y) { a = MatMul(x, w) y = MatMul(a, v) }", weights)
    done = run_fastcal("calibrate", model, tmp_path / "x.npy", "-o", tmp_path / "c", "--batch-size", "10", "--json")
    kept = json.loads(done.stdout.splitlines()[-1])["kept"]
    assert set(kept) == {"entropy2", "minmax", "percentile", "mse"}
    feed, first = fastcal.NumpyFeed(tmp_path / "x.npy", model=model, batch_size=10), samples[::10]
    exact = first.astype("f8") @ weights["w"] @ weights["v"]
    for name, decibels in kept.items():
        quantized = fastcal.quantize(model, fastcal.calibrate(model, feed, algorithm=name))
        (found,) = onnxruntime.InferenceSession(quantized.SerializeToString()).run(None, {"x": first})
        assert decibels == pytest.approx(
            10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum()), abs=0.05
        )
    best = max(kept, key=kept.get)
    assert kept[best] > kept["entropy2"] + 1
    again = run_fastcal("calibrate", model, tmp_path / "x.npy", "-o", tmp_path / "c", "--batch-size", "10")
    assert f"{kept['entropy2']:.1f} dB at the outputs with all layers in INT8" in again.stdout
    assert f"; --algorithm {best} would keep {kept[best]:.1f} dB" in again.stdout
    chosen = run_fastcal("calibrate", model, tmp_path / "x.npy", "-o", tmp_path / "c", "--algorithm", "best")
    assert "would keep" not in chosen.stdout


def test_a_model_without_layers_for_int8_is_calibrated_without_a_word_on_it(run_fastcal, tmp_path, onnx_file):
    np.save(tmp_path / "x.npy", np.ones((4, 3), "f4"))
    model = onnx_file("net (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    done = run_fastcal("calibrate", model, tmp_path / "x.npy", "-o", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "keeps" not in done.stdout


def test_it_stops_when_the_scales_are_stable(run_fastcal, tmp_path):
    words = ("-o", tmp_path / "x", "--algorithm", "minmax", "--batch-size", 8, "--until-stable", 20)
    done = run_fastcal("calibrate", MODEL, DIGITS / "images", *words)
    assert done.returncode == 0, done.stderr
    images = int(
        re.search(r"stable after (\d+) images: no scale moved by more than 20 % at the last \d", done.stderr)[1]
    )
    assert 32 <= images < 256
    assert f"images     {images} in {images // 8} batches of 8" in done.stdout


def test_a_sample_of_every_class(run_fastcal, tmp_path):
    data = DIGITS / "test"
    words = ("-o", tmp_path / "x", "--balance", "--limit", 20, "--batch-size", 20)
    done = run_fastcal("calibrate", MODEL, data, *words)
    assert done.returncode == 0, done.stderr
    by_class = [sorted((data / str(digit)).iterdir())[:2] for digit in range(10)]
    by_turns = [str(paths[turn]) for turn in (0, 1) for paths in by_class]
    assert fastcal.ImageFeed(data, model=MODEL, balance=True, limit=20).paths == by_turns
    feed = fastcal.ImageFeed(by_turns, model=MODEL, batch_size=20)
    assert fastcal.calibrate(MODEL, feed).scales == fastcal.CalibrationCache.load(tmp_path / "x").scales


def test_arrays_are_taken_as_they_are(run_fastcal, tmp_path, images):
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    with fastcal.ImageFeed(images, model=MODEL, batch_size=13) as feed:
        batches = [np.array(batch["image"]) for batch in feed]
        expected = fastcal.calibrate(MODEL, feed).scales
    np.save(arrays / "0.npy", batches[0])
    np.save(arrays / "1.npy", batches[1])
    np.savez(tmp_path / "all.npz", image=np.concatenate(batches), label=np.zeros(26))
    for data in (arrays, tmp_path / "all.npz"):
        done = run_fastcal("calibrate", MODEL, data, "-o", tmp_path / "x.cache", "--batch-size", 13)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("samples    26 in 2 batches of 13\nspeed ")
        assert fastcal.CalibrationCache.load(tmp_path / "x.cache").scales == expected
    for option in ("--preprocess=unit", "--balance"):
        done = run_fastcal("calibrate", MODEL, arrays, "-o", tmp_path / "y.cache", option)
        name = option.partition("=")[0]
        assert (done.returncode, done.stderr) == (
            2, f"error: {arrays} has arrays, which are taken as they are; {name} is for images\n"
        )  # fmt: skip
    np.save(images / "beside.npy", batches[0])
    assert run_fastcal("calibrate", MODEL, images, "-o", tmp_path / "y.cache").stdout.startswith("images ")


def test_preprocessing_from_a_file(run_fastcal, tmp_path, images):
    (tmp_path / "p.toml").write_text('preset = "unit"\ninterpolation = "bicubic"\n')
    done = run_fastcal("calibrate", MODEL, images, "-o", tmp_path / "x", "--preprocess", tmp_path / "p.toml")
    assert done.returncode == 0, done.stderr
    assert "stretch to 32x32, bicubic, RGB, (x * 0.00392156863 - 0) / 1, NCHW" in done.stdout


def test_python_and_command_line_agree_on_defaults(run_fastcal, tmp_path, images):
    outputs = tmp_path / "1.cache", tmp_path / "2.cache"
    options = "--algorithm percentile --quantile 0.99 --preprocess unit --shuffle --seed 3 --limit 20 --last-batch drop"
    for output in outputs:
        done = run_fastcal("calibrate", MODEL, images, "-o", output, *options.split(), "--batch-size", 16)
        assert done.returncode == 0, done.stderr
    feed = fastcal.ImageFeed(
        images, model=MODEL, preprocess="unit", shuffle=True, seed=3, limit=20, last_batch="drop", batch_size=16
    )
    cache = fastcal.calibrate(MODEL, feed, algorithm="percentile", quantile=0.99)
    assert outputs[0].read_bytes() == outputs[1].read_bytes() == cache.to_bytes()


def test_the_default_version_is_said(run_fastcal, tmp_path, images):
    if fastcal.versions.installed_tensorrt_version():
        pytest.skip("TensorRT is installed here")
    words = ("--batch-size", 26, "--algorithm", "minmax")
    done = run_fastcal("calibrate", MODEL, images, "-o", tmp_path / "x.cache", *words)
    said = "note: TensorRT is not installed here: the cache is written for TensorRT 10.16.1\n"
    assert done.stderr == ASSUMED + said
    assert fastcal.CalibrationCache.load(tmp_path / "x.cache").tensorrt_version == "10.16.1"


def test_preview_draws_what_the_network_gets(run_fastcal, tmp_path):
    sheet = tmp_path / "sheet.png"
    words = ("--balance", "--preprocess", "imagenet", "-o", sheet)
    done = run_fastcal("preview", DIGITS / "images", "--model", MODEL, *words)
    assert (done.returncode, done.stderr) == (0, "")
    feed = fastcal.ImageFeed(DIGITS / "images", model=MODEL, balance=True, limit=24, spread=True)
    with feed:
        preview = fastcal.preview(feed)
    assert done.stdout.splitlines() == [*preview.notes(), *map(str, preview.channels)]
    preview.save(tmp_path / "again.png")
    assert sheet.read_bytes() == (tmp_path / "again.png").read_bytes()
    without_model = run_fastcal("preview", DIGITS / "images", "-o", sheet, "--limit", 2, "--size", "48x64")
    assert "crop 0.875 to 48x64" in without_model.stdout
    assert sheet.read_bytes() != (tmp_path / "again.png").read_bytes()


def test_preview_shows_that_arrays_were_not_made_with_a_preprocessing(run_fastcal, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    for name, outside in (("raw", False), ("imagenet", True)):
        done = run_fastcal("preview", tmp_path / "pixels.npy", "-o", tmp_path / "x.png", "--preprocess", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert ("of the pixels are outside 0..255" in done.stdout) == outside
    done = run_fastcal("preview", tmp_path / "pixels.npy", "-o", tmp_path / "x.png", "--size", "8x8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has arrays, which are taken as they are; --size is for images" in done.stderr


def test_compare_prints_a_table_a_verdict_and_json(run_fastcal, tmp_path, images):
    words = ("--batch-size", 13, "--cache", tmp_path / "bgr.cache")
    (tmp_path / "p.toml").write_text('preset = "imagenet"\nchannels = "BGR"\n')
    options = ("-o", tmp_path / "bgr.cache", "--preprocess", tmp_path / "p.toml")
    assert run_fastcal("calibrate", MODEL, images, *options).returncode == 0
    table = run_fastcal("compare", MODEL, images, *words)
    assert (table.returncode, table.stderr) == (0, ASSUMED)
    done = run_fastcal("compare", MODEL, images, *words, "--json")
    assert (done.returncode, done.stderr) == (0, ASSUMED)
    *progress, said = map(json.loads, done.stdout.splitlines())
    assert {line["event"] for line in progress} == {"progress"}
    assert said["images"] == 26
    lines = table.stdout.splitlines()
    assert lines[-1] == f"verdict: {said['verdict']}"
    assert "bgr.cache" in said["verdict"]
    assert "its record has other preprocessing: crop 0.875 to 32x32, BGR" in said["verdict"]
    assert list(said["qualities"]) == ["entropy2", "minmax", "percentile", "mse", "bgr.cache"]
    for line, (label, quality) in zip(lines[3:], said["qualities"].items(), strict=False):
        name, *values = line.split()
        worst = min(quality["tensors"], key=lambda tensor: quality["tensors"][tensor]["sqnr"])
        assert name == label
        assert values[:2] == [f"{quality['sqnr']:.1f}", "dB"]
        assert values[2] == f"{quality['agreement']:.1%}"
        assert values[-1] == worst


def test_a_report_beside_the_cache(run_fastcal, tmp_path, images):
    output, report = tmp_path / "x.cache", tmp_path / "report.html"
    done = run_fastcal("calibrate", MODEL, images, "-o", output, "--report", report)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report     {report}"
    page = report.read_text()
    assert page.startswith("<!doctype html>")
    assert f"<dd>{images}</dd>" in page
    assert "<b>26</b>samples" in page  # in a batch of 32
    assert all(f'<span class="name">{name}</span>' in page for name in fastcal.CalibrationCache.load(output).scales)
    quantized = run_fastcal("quantize", MODEL, images, "-o", tmp_path / "x.onnx", "--report", tmp_path / "2.html")
    assert quantized.returncode == 0, quantized.stderr
    assert "<h2>Tensors</h2>" in (tmp_path / "2.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("preview", "images", "-o", "x.gif"), "cannot draw x.gif: name a file that ends in .png, .jpg, .webp, "),
        (("preview", "images", "-o", "no/x.png"), "cannot write no/x.png: there is no folder"),
        (("preview", "nowhere", "-o", "x.png"), "no such file or folder: nowhere"),
        (("preview", "images", "-o", "x.png", "--limit", "0"), "limit is 0; it must be at least 1"),
        (("preview", "images", "-o", "x.png", "--model", "no.onnx"), "cannot read model no.onnx"),
        (("compare", MODEL, "images", "--cache", "no.cache"), "cannot read calibration cache no.cache"),
        (("quantize", MODEL, "no.cache", "-o", "x"), "no such file: no.cache; name a calibration cache, or images"),
        (("compare", MODEL, "images", "--cache", MODEL), "digits.onnx is not a TensorRT calibration cache: its first"),
        (("compare", MODEL, "images", "--quantile", "0"), r"quantile 0.0 is not in \(0, 1\]"),
        (
            ("calibrate", MODEL, "images", "-o", "x", "--report", "x"),
            "x is the cache; name another file for the report",
        ),
        (("calibrate", MODEL, "images", "-o", "x", "--report", "no/x"), "cannot write no/x: there is no folder"),
        (("quantize", MODEL, "images", "-o", "x", "--report", "x"), "x is the quantized model; name another file for"),
    ],
)
def test_what_is_wrong_with_pictures_is_one_line(run_fastcal, tmp_path, images, words, message):
    done = run_fastcal(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match("error: .*" + message, done.stderr.splitlines()[-1])
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == done.stderr.splitlines()[-1:]
    assert os.listdir(tmp_path) == ["images"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("calibrate", "m.onnx", "images", "-o", "images/00.jpg"), "images/00.jpg is among the data"),
        (("preview", "images", "-o", "images/00.jpg"), "images/00.jpg is among the data"),
        (("calibrate", "m.onnx", "images/0*.jpg", "-o", "images/00.jpg"), "images/00.jpg is among the data"),
        (("calibrate", "m.onnx", "image=images", "-o", "images/00.jpg"), "images/00.jpg is among the data"),
        (("preview", "images.txt", "-o", "images/00.jpg"), "images/00.jpg is among the data"),
        (("calibrate", "m.onnx", "images/00.jpg", "-o", "images/00.jpg"), "images/00.jpg is the data"),
        (("calibrate", "m.onnx", "images", "--preprocess", "p.json", "-o", "p.json"), "p.json is the preprocessing"),
        (("calibrate", "m.onnx", "images", "--preprocess", "p.json", "-o", "p"), "p.json is the preprocessing"),
        (("calibrate", "m.onnx", "images", "-o", "w.bin"), "w.bin is the model's external data"),
        (("quantize", "m.onnx", "images", "-o", "x", "--report", "w.bin"), "w.bin is the model's external data"),
        (("calibrate", "m.onnx", "arrays", "-o", "arrays/0.npz"), "arrays/0.npz is among the data"),
        (
            ("calibrate", "m.onnx", "arrays/*.npz", "-o", "x", "--report", "arrays/0.npz"),
            "arrays/0.npz is among the data",
        ),
        (("calibrate", "m.onnx", "list.txt", "-o", "page"), "page is among the data"),
        (("quantize", "m.onnx", "x.cache", "-o", "x.cache.json"), "x.cache.json is the record of x.cache"),
    ],
)
def test_what_is_read_is_not_written_over(run_fastcal, tmp_path, images, words, message):
    model = onnx.load(MODEL)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "p.json").write_text('{"preset": "unit"}')
    shutil.copy(sorted(images.iterdir())[0], images / "00.jpg")
    (tmp_path / "images.txt").write_text("images/00.jpg\n")
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "0.npz", image=np.zeros((4, 3, 32, 32), np.float32))
    shutil.copy(images / "00.jpg", tmp_path / "page")
    (tmp_path / "list.txt").write_text("page\n")
    fastcal.CalibrationCache({"image": 1.0}, record=Record({"images": 1})).save(tmp_path / "x.cache")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run_fastcal(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}; name another file")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def break_nothing(tmp_path, images):
    pass


def truncate_an_image(tmp_path, images):
    first = sorted(images.iterdir())[0]
    first.write_bytes(first.read_bytes()[:700])


def make_an_image_a_pipe(tmp_path, images):
    first = sorted(images.iterdir())[0]
    first.unlink()
    os.mkfifo(first)


def remove_all_images(tmp_path, images):
    for path in images.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (break_nothing, {"model": "none.onnx"}, r"cannot read model none.onnx: No such file or directory; check"),
        (break_nothing, {"model": sys.executable}, r"python\S* is not an ONNX model; export"),
        (break_nothing, {"data": "nowhere"}, r"no such file or folder: nowhere; name a folder"),
        (remove_all_images, {}, r"images is empty; name a folder with"),
        (truncate_an_image, {}, r"images/\d+.jpg cannot be decoded: damaged, or no image DALI knows; replace"),
        (make_an_image_a_pipe, {}, r"images/\d+.jpg is no regular file; replace or remove it"),
        (break_nothing, {"--preprocess": "imagnet"}, r"no preset 'imagnet'; choose one of imagenet, clip, "),
        (break_nothing, {"--algorithm": "kl"}, r"no algorithm 'kl'; choose one of entropy2, entropy, minmax, .*, mse"),
        (break_nothing, {"--quantile": "2", "--algorithm": "percentile"}, r"quantile 2.0 is not in \(0, 1\]"),
        (break_nothing, {"--size": "big"}, r"--size big is not a size; write height x width"),
        (break_nothing, {"--batch-size": "0"}, r"batch_size is 0; it must be at least 1"),
        (break_nothing, {"--input-name": "pixels"}, r"takes the inputs 'image', and none of the name 'pixels'"),
        (break_nothing, {"data": ""}, "the name of the data is empty; name a folder, a pattern, a list file or a file"),
        (break_nothing, {"data": "image=images,image=images"}, "names an input twice; give each input its data once"),
        (break_nothing, {"--size": "64x96"}, r"digits.onnx takes images of 32x32 alone; leave out --size 64x96"),
        (
            break_nothing,
            {"--batch-size": 10**9, "--last-batch": "wrap"},
            r"2 batches of 1000000000 samples take 22888.2 GiB of memory, and \d",
        ),
        (break_nothing, {"--report": "old.cache.json"}, r"old.cache.json is the report; name another file for the cac"),
        (break_nothing, {"--tensorrt": "11.0"}, r"TensorRT 11.0 takes no calibration cache"),
        (break_nothing, {"--threads": "0"}, r"threads is 0; it must be from 1 to 1024"),
        (break_nothing, {"--threads": "100000"}, r"threads is 100000; it must be from 1 to 1024"),
        (break_nothing, {"--memory": "much"}, r"--memory much is not a number of bytes; write 500M or 4G"),
        (break_nothing, {"--memory": "0"}, r"memory is 0; it must be at least 1"),
        (break_nothing, {"-o": "nowhere/x.cache"}, r"cannot write nowhere/x.cache: there is no folder"),
        (break_nothing, {"-o": "x" * 238}, r"cannot write x{238}.json: File name too long"),
        (break_nothing, {"-o": ""}, "the name of the cache is empty; name a file"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_cache(run_fastcal, tmp_path, images, change, arguments, message):
    change(tmp_path, images)
    (tmp_path / "old.cache").write_text("old")
    words = {"model": MODEL, "data": images, "-o": tmp_path / "old.cache", "--batch-size": 26} | arguments
    positional = [words.pop("model"), words.pop("data")]
    done = run_fastcal("calibrate", *positional, *[word for pair in words.items() for word in pair], cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert re.match(r"error: .*" + message, errors[0])
    assert done.stdout == ""
    assert (tmp_path / "old.cache").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["images", "old.cache"]


def test_a_list_that_can_be_read_only_once(run_fastcal, tmp_path, images):
    listed = "\n".join(f"{images}/{path.name}" for path in sorted(images.iterdir()))
    for _ in range(2):  # the second time the output is there
        reader, writer = os.pipe()
        with open(reader), open(writer, "w") as pipe:
            pipe.write(listed)
            pipe.close()
            list_file = f"/dev/fd/{reader}"  # as shells write <(command)
            done = run_fastcal("calibrate", MODEL, list_file, "-o", "x.cache", "--preprocess", "raw", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_names_that_the_terminal_cannot_show(run_fastcal, spawn_fastcal, tmp_path, images, onnx_file):
    """Names of files may be any bytes, names of tensors any characters."""
    model = onnx_file("f (float[N, 3, 32, 32] x) => (float[N, 3, 32, 32] y) { y = Relu(x) }")
    named = onnx.load(model)
    named.graph.node[0].output[0] = named.graph.output[0].name = "\u03b1"
    onnx.save(named, model)
    done = run_fastcal("calibrate", model, images, "-o", "\udcff.cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\udcff.cache, TRT-" in done.stdout
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = spawn_fastcal("cache", "show", "\udcff.cache", cwd=tmp_path, env=ascii)
    assert done.returncode == 0, done.stderr
    assert "\\u03b1 " in done.stdout
    shutil.copy(sorted(images.iterdir())[0], images / "\udcff.jpg")
    assert run_fastcal("preview", images / "\udcff.jpg", "-o", "sheet.svg", cwd=tmp_path).returncode == 0
    assert "<!-- \\udcff.jpg -->" in (tmp_path / "sheet.svg").read_text()
    (images / "\udcff.jpg").write_bytes(b"no image")
    done = run_fastcal("calibrate", MODEL, images, "-o", "x.cache", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: .*/\\udcff.jpg cannot be decoded: ", done.stderr.splitlines()[-1])


def test_a_shard_is_not_read_as_a_cache(run_fastcal, tmp_path):
    (tmp_path / "x.tar").touch()
    os.truncate(tmp_path / "x.tar", 2**40)  # more than there is memory for
    done = run_fastcal("quantize", MODEL, "x.tar", "-o", "x.onnx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: x.tar has no sample with an image; the images' extension is the key, by default .jpg, .png, ...\n"
    )


def test_a_model_that_does_not_fit_the_preprocessing(run_fastcal, tmp_path, images, onnx_file):
    grey = onnx_file("f (float[1, 1, 28, 28] x) => (float[1, 1, 28, 28] y) { y = Relu(x) }", name="grey.onnx")
    vectors = onnx_file("f (float[N, 10] x) => (float[N, 10] y) { y = Relu(x) }", name="vectors.onnx")
    for model, message in (
        (grey, "mean (0.485, 0.456, 0.406) has 3 values, GRAY needs 1"),
        (vectors, "input 'x' (?, 10): it takes no images of 1 or 3 channels; feed it arrays instead"),
    ):
        done = run_fastcal("calibrate", model, images, "-o", tmp_path / "x.cache")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {model}")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.cache").exists()


def test_the_model_is_not_overwritten(run_fastcal, tmp_path, images):
    model = tmp_path / "model.onnx"
    shutil.copy(MODEL, model)
    done = run_fastcal("calibrate", model, images, "-o", model)
    assert done.returncode == 2
    assert "is the model itself" in done.stderr
    assert model.read_bytes() == MODEL.read_bytes()


def test_a_full_disk(tmp_path, images):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=16k none '{disk}' && echo old > '{disk}/old.cache' && "
        f"head -c 1M /dev/zero > '{disk}/filler' 2>/dev/null; "
        f"'{sys.executable}' -m fastcal calibrate '{MODEL}' '{images}' -o '{disk}/old.cache' --batch-size 26; "
        f"echo status $?; ls -A '{disk}'; cat '{disk}/old.cache'"
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process mount a small disk")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines() == [
        f"error: cannot write {disk}/old.cache: No space left on device; make room or choose another place"
    ]
    assert done.stdout.split() == ["status", "2", "filler", "old.cache", "old"]


def start_listening_to_ctrl_c(command, **options):
    """Start a process that Ctrl-C reaches even where these tests run in the background, which ignores it."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3])
def test_ctrl_c_leaves_nothing_behind(tmp_path, seconds):
    listed = [str(path) for path in sorted((DIGITS / "images").rglob("*.jpg"))]
    (tmp_path / "list.txt").write_text("\n".join(listed * 40))
    command = [sys.executable, "-m", "fastcal", "calibrate", MODEL, "list.txt", "-o", "x.cache"]
    process = start_listening_to_ctrl_c(command, cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    # Shells show 130 for both; which it is depends on where in an import the signal met the interpreter.
    assert process.returncode in (130, -signal.SIGINT)
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["list.txt"]


def test_ctrl_c_tells_what_is_written_already(tmp_path):
    program = """
import time
from fastcal import files, interrupt
interrupt.end_soon_after_ctrl_c()
files.write_atomically("x.cache", b"scales")
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
    process = start_listening_to_ctrl_c([sys.executable, "-c", program], cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert (process.returncode, stderr) == (130, "interrupted; already written: x.cache\n")


def test_ctrl_c_raises_nothing_in_an_import(tmp_path):
    (tmp_path / "slow.py").write_text("""
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except BaseException:
    print("raised", flush=True)
""")
    program = "from fastcal import interrupt; interrupt.end_soon_after_ctrl_c(); import slow"
    process = start_listening_to_ctrl_c([sys.executable, "-c", program], cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "interrupted; nothing was written\n")
    assert process.returncode == 130


def test_commands_that_calibrate_share_their_options():
    commands = typer.main.get_command(app).commands
    calibrate, build = ({option.name: option for option in commands[name].params} for name in ("calibrate", "build"))
    shared = calibrate.keys() & build.keys() - {"data", "output", "help", "algorithm"}
    assert set(calibrate) - shared == {
        "data", "output", "backend", "tensorrt", "memory", "until_stable", "workers", "ray_address", "histograms",
        "report", "target", "algorithm",
    }  # fmt: skip
    for name in shared:
        for what in ("opts", "help", "default", "required", "show_default", "metavar"):
            assert getattr(calibrate[name], what) == getattr(build[name], what), name


@pytest.mark.skipif(resolve("auto") is not None, reason="there is a GPU here")
def test_a_backend_that_is_unavailable(run_fastcal, tmp_path, images):
    for backend, message in (
        ("tensorrt", r"backend tensorrt: .*; backend onnxruntime works here"),
        ("trt", "there is no backend 'trt'; choose one of auto, tensorrt, onnxruntime"),
    ):
        done = run_fastcal("calibrate", MODEL, images, "-o", "x.cache", "--backend", backend)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.match(f"error: {message}", done.stderr.splitlines()[-1])


def test_a_cluster_that_is_not_there(run_fastcal, tmp_path):
    pytest.importorskip("ray")
    options = ("-o", tmp_path / "x.cache", "--workers", 2, "--ray-address", "127.0.0.1:1")
    done = run_fastcal("calibrate", MODEL, DIGITS / "images", *options)
    assert done.returncode == 2
    assert re.search("error: cannot connect to Ray at 127.0.0.1:1: .*Connection refused", done.stderr)


@pytest.mark.skipif(bool(fastcal.versions.installed_tensorrt_version()), reason="TensorRT is installed here")
def test_build_without_tensorrt(run_fastcal, tmp_path, images):
    done = run_fastcal("build", MODEL, images, "-o", tmp_path / "x.engine")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: builder tensorrt needs the module tensorrt, which cannot be imported \(No module .*\): pip install "
        r"tensorrt, or pip install 'tensorrt<11' for calibrators; without it, fastcal calibrate writes a cache\n",
        done.stderr,
    )


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed here")
def test_build_without_cupy(run_fastcal, trt_bindings, tmp_path, images):
    done = run_fastcal("build", MODEL, images, "-o", tmp_path / "x.engine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: fastcal build needs CuPy and an NVIDIA GPU, and CuPy is not installed "
        "(pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12); fastcal calibrate works here\n"
    )


def test_version_and_help(run_fastcal):
    assert run_fastcal("--version").stdout.startswith("fastcal 0.")
    assert "calibrate" in run_fastcal("--help").stdout
    assert run_fastcal("cache", "show", "-h").stdout == run_fastcal("cache", "show", "--help").stdout != ""
    helped = run_fastcal("calibrate", "--help", env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}).stdout
    for option in ("--algorithm", "--preprocess", "--batch-size", "--tensorrt"):
        assert option in helped
    for default in ("entropy2", "the model's, else 128 on a GPU", "one per core", "the one installed, else 10.16.1"):
        assert re.search(rf"default: \(?{default}", helped)


def shown_on_a_terminal(*arguments, env=os.environ, **options):
    """Run the command line with a terminal for its standard error; return exit status and text without its colours."""
    import pty

    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcal", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=terminal, env={**env, "COLUMNS": "150"}, **options,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(main)
    return process.wait(60), re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()


def test_progress_is_shown_on_a_terminal(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted((DIGITS / "images").rglob("*.jpg")) * 2)))
    status, text = shown_on_a_terminal("calibrate", MODEL, "list.txt", "-o", "x.cache", cwd=tmp_path)
    assert status == 0
    assert re.search(r"calibrating .* \d+/16 batches, \d+ images/s, \d+% of the time waiting for data, .* left", text)


def test_the_doctor_shows_on_a_terminal_what_it_tries(without_libraries):
    _, text = shown_on_a_terminal("doctor", env=without_libraries)
    tried = list(dict.fromkeys(re.findall(r"trying ([A-Za-z ]+)", text)))
    assert {"ONNX Runtime", "numba", "DALI", "Matplotlib"} <= set(tried)


def test_no_traceback_follows_ctrl_c_from_where_none_can_be_handled():
    program = """
import os, signal, sys, time
from fastcal import interrupt
interrupt.end_soon_after_ctrl_c()
from fastcal.cli import app
app(["--version"], standalone_mode=False)
class Half:
    def __del__(self):
        raise AttributeError("half made")
def fail():
    Half()
    sys.excepthook(ValueError, ValueError("not passed on"), None)  # as a library in C does
fail()
print("now", file=sys.stderr)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    fail()
    time.sleep(60)
"""
    process = start_listening_to_ctrl_c([sys.executable, "-c", program])
    before, _, after = process.communicate(timeout=60)[1].partition("now\n")
    assert "half made" in before
    assert before.endswith("ValueError: not passed on\n")
    assert (process.returncode, after) == (130, "interrupted; nothing was written\n")


def test_ctrl_c_ends_what_does_not_listen(tmp_path):
    program = """
import signal, time
from fastcal import interrupt
signal.signal(signal.SIGINT, lambda *_: None)
interrupt.end_soon_after_ctrl_c()
print("ready", flush=True)
time.sleep(60)
"""
    process = start_listening_to_ctrl_c([sys.executable, "-c", program])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert (process.returncode, stderr) == (130, "interrupted; nothing was written\n")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path, images, onnx_file, closed):
    model = onnx_file("f (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = Relu(x) }")  # a report of two histograms
    command = f"{sys.executable} -m fastcal calibrate {model} {images} -o {tmp_path}/c.cache --report {tmp_path}/r.html"
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("tensors " in done.stdout, "note: " in done.stderr) == (">&-" not in closed.split(), "2>&-" not in closed)
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    expected = fastcal.calibrate(model, fastcal.ImageFeed(images, model=model, device="cpu"), backend="onnxruntime")
    assert (tmp_path / "c.cache").read_bytes() == expected.to_bytes()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "status"), [("calibrate none.onnx images -o c", 2), ("--help", 0)])
def test_closed_streams_change_no_exit_status(tmp_path, words, closed, status):
    done = subprocess.run(
        f"{sys.executable} -m fastcal {words} {closed}", shell=True, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == status
    assert [*tmp_path.iterdir()] == []


def test_preview_spreads_its_images_over_all(run_fastcal, tmp_path):
    for kind in ("a", "b", "c"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / kind / f"{number}.png")
    np.save(tmp_path / "x.npy", np.arange(12, dtype="f4").repeat(192).reshape(12, 3, 8, 8))
    done = run_fastcal("preview", tmp_path / "images", "-o", tmp_path / "s.svg", "--limit", "3", "--size", "8")
    assert done.returncode == 0, done.stderr
    drawn = re.findall(r"<!-- (\w/\d.png) -->", (tmp_path / "s.svg").read_text())
    assert drawn == ["a/0.png", "b/0.png", "c/0.png"]
    done = run_fastcal("preview", tmp_path / "x.npy", "-o", tmp_path / "s.svg", "--limit", "3", "--preprocess", "raw")
    assert "R: 0 to 8, mean 4" in done.stdout  # samples 0, 4 and 8
    done = run_fastcal("calibrate", MODEL, tmp_path / "images", "-o", tmp_path / "c.cache", "--limit", "3")
    assert "images     3 in 1 batch of 3" in done.stdout


def test_what_deserves_a_look_is_in_the_summary(run_fastcal, tmp_path, onnx_file):
    values = np.concatenate([np.full(9800, 0.01), np.linspace(1, 2, 200)]).astype("f4")
    np.save(tmp_path / "x.npy", values.reshape(100, 100))
    model = onnx_file("f (float[N, 100] x) => (float[N, 100] y, float[N, 100] z) { n = Neg(x) y = Relu(n) z = Abs(x) }")
    words = ("calibrate", model, tmp_path / "x.npy", "-o", tmp_path / "c", "--exact", "--algorithm", "percentile")
    words = (*words, "--quantile")
    done = run_fastcal(*words, "0.99")
    share = float(re.search(r"clipped    (\d\.\d\d) % of x, and 0.05 % or more of 2 other tensors", done.stdout)[1])
    assert share == pytest.approx(1, abs=0.02)
    assert "always 0   y\n" in done.stdout
    *_, last = map(json.loads, run_fastcal(*words, "0.99", "--json").stdout.splitlines())
    assert list(last["clipped"]) == ["x", "n", "z"]
    assert last["clipped"]["x"] == pytest.approx(share / 100, abs=1e-4)
    assert last["always_0"] == ["y"]
    done = run_fastcal(*words, "1")
    assert "clipped    less than 0.05 % of every tensor\n" in done.stdout


@pytest.mark.parametrize(("count", "size", "said"), [(1, 1, "1 in 1 batch of 1"), (2, 1, "2 in 2 batches of 1")])
def test_nouns_agree_with_their_numbers(run_fastcal, tmp_path, images, count, size, said):
    words = ("calibrate", MODEL, images, "-o", tmp_path / "c", "--limit", count, "--batch-size", size)
    assert f"images     {said}\n" in run_fastcal(*words).stdout
    words = (*words[:-1], 8, "--last-batch", "wrap")
    noun = "1 image" if count == 1 else "2 images"
    assert f"note: {noun} in batches of 8: repeated to complete one\n" in run_fastcal(*words).stderr


@pytest.mark.parametrize(("asked", "header"), [(None, "TRT-101601"), ("8.6.1", "TRT-8601")])
def test_with_tensorrt_11_the_cache_is_for_an_earlier_one(
    spawn_fastcal, tensorrt_11_bindings, images, tmp_path, asked, header
):
    environment = {**os.environ, **tensorrt_11_bindings}
    given = [] if asked is None else ["--tensorrt", asked]
    done = spawn_fastcal("calibrate", MODEL, images, "-o", tmp_path / "c.cache", *given, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.cache").read_text().startswith(f"{header}-EntropyCalibration2\n")
    notes = [line for line in done.stderr.splitlines() if "TensorRT 11" in line]
    expected = "note: TensorRT 11.4.0 reads no caches: the cache is written for TensorRT 10.16.1"
    assert notes == ([expected] if asked is None else [])
