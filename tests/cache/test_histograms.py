"""Histograms that are kept: one run of a network serves all algorithms, and stale ones and other files are named."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

import fastcal
from conftest import DIGITS
from fastcal.errors import CacheError, FastcalError

MODEL = DIGITS / "digits.onnx"


@pytest.fixture
def batches():
    random = np.random.default_rng(0)
    return [{"image": random.standard_normal((4, 3, 8, 8), dtype="f4") * (1 + number)} for number in range(3)]


@pytest.fixture
def calibrate(tmp_path, onnx_file):
    """A function that calibrates a network with kept histograms, and counts the batches that the network runs."""
    model = onnx_file(
        "f (float[N, 3, 8, 8] image) => (float[N, 2, 8, 8] y) { c = Conv(image, w) r = Relu(c) y = Conv(r, v) }",
        {"w": np.ones((2, 3, 1, 1), "f4"), "v": np.ones((2, 2, 1, 1), "f4")},
    )

    def run(feed, **options):
        seen = []
        settings = {"backend": "onnxruntime", "tensorrt_version": "10.3.0", "histograms": tmp_path / "h.npz"} | options
        cache = fastcal.calibrate(model, feed, progress=lambda state: seen.append(state.batches), **settings)
        return cache, len(seen)

    return run


def test_one_run_serves_all_algorithms(calibrate, batches):
    batches[1]["image"][0, 0, 0, :3] = np.nan, np.inf, np.abs(batches[0]["image"]).max()
    for number, algorithm in enumerate(("entropy2", "minmax", "percentile", "mse")):
        options = {"algorithm": algorithm, "quantile": 0.99}
        cache, runs = calibrate(batches, **options)
        assert runs == (0 if number else 3)
        plain, _ = calibrate(batches, **options, histograms=None)
        assert cache.to_bytes() == plain.to_bytes()
        assert cache.record == plain.record
    kept, fresh = ({name: vars(found) for name, found in each.observed.histograms.items()} for each in (cache, plain))
    np.testing.assert_equal(kept, fresh)
    assert kept["image"]["nan"] == kept["image"]["inf"] == 1
    for name in ("network", "backend", "precision", "shared_scales", "least_thresholds", "skipped"):
        assert getattr(cache.observed, name) == getattr(plain.observed, name)
    assert [state.images for state in cache.observed.progress] == [4, 8, 12]


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        ({}, {"exact": True}, None),
        ({}, {"until_stable": 1000}, "until_stable (not recorded), algorithm (not recorded)"),
        ({"until_stable": 1000}, {"until_stable": 1000, "exact": True}, None),
        ({"until_stable": 1000}, {}, "algorithm (entropy2 then), until_stable (1000 then)"),
        (
            {"until_stable": 1000},
            {"until_stable": 1000, "algorithm": "minmax"},
            "algorithm (entropy2 then, minmax now)",
        ),
        ({"until_stable": 1000}, {"until_stable": 1000}, None),
        ({"algorithm": "best"}, {}, "held_out (32 then)"),
        ({}, {"algorithm": "best"}, "held_out (not recorded)"),
        ({"algorithm": "best"}, {"algorithm": "best"}, None),
    ],
)
def test_settings_that_change_the_run(calibrate, batches, caplog, first, then, reason):
    caplog.set_level(logging.INFO, "fastcal")
    calibrate(batches, **first)
    caplog.clear()
    cache, runs = calibrate(batches, **then)
    assert (runs > 0) == (reason is not None)
    if reason is None:
        assert "are reused: they were made from the same model, samples and settings" in caplog.text
    else:
        assert reason in caplog.text
    assert cache.to_bytes() == calibrate(batches, **then, histograms=None)[0].to_bytes()


def test_other_samples_and_another_model(calibrate, batches, caplog, onnx_file, tmp_path):
    caplog.set_level(logging.INFO, "fastcal")
    calibrate(batches)
    _, runs = calibrate(batches[:2])
    assert runs == 2
    assert "h.npz are not reused, they were made from other batches (3 then, 2 now), samples" in caplog.text
    path = onnx_file("f (float[N, 3, 8, 8] image) => (float[N, 3, 8, 8] y) { y = Relu(image) }", name="other.onnx")
    cache = fastcal.calibrate(path, batches[:2], backend="onnxruntime", histograms=tmp_path / "h.npz")
    assert list(cache.scales) == ["image", "y"]
    assert "they were made from other model" in caplog.text
    moved = shutil.copy(path, tmp_path / "copy.onnx")
    cache = fastcal.calibrate(moved, batches[:2], backend="onnxruntime", histograms=tmp_path / "h.npz")
    assert cache.observed.network == str(moved)
    assert "are reused: they were made from the same model, samples and settings" in caplog.text


def test_unreadable_images_stay_named(calibrate, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(DIGITS / "images" / "0", folder)
    (folder / "none.jpg").write_bytes(b"no image")
    small = replace(fastcal.Preprocess.preset("imagenet"), size=(8, 8))
    caches = []
    for _ in range(2):
        with fastcal.ImageFeed(folder, preprocess=small, skip_unreadable=True, max_unreadable=50) as feed:
            cache, runs = calibrate(feed)
        caches.append(cache)
    assert runs == 0
    assert caches[0].record == caches[1].record
    assert [path.endswith("none.jpg") for path in caches[1].record.entries["skipped"]] == [True]


@pytest.mark.parametrize("kind", ["array", "arrays", "text", "empty", "cut", "changed", "tensors"])
def test_another_file_is_not_lost(calibrate, batches, tmp_path, kind):
    path = tmp_path / "h.npz"
    if kind in ("array", "arrays"):
        with path.open("wb") as file:
            np.save(file, np.ones(3)) if kind == "array" else np.savez(file, about=np.ones(3))
    elif kind in ("text", "empty"):
        path.write_text("a text" if kind == "text" else "")
    else:
        calibrate(batches)
        data = path.read_bytes()
        if kind == "tensors":
            with np.load(path) as file:
                arrays = dict(file)
            arrays["counts"] = arrays["counts"][:2]
            np.savez(path, **arrays)
        else:
            path.write_bytes(data[: len(data) // 2] if kind == "cut" else data[:300] + b"?" + data[301:])
    before = path.read_bytes()
    with pytest.raises(
        CacheError, match=r"h.npz holds no histograms of a calibration; remove it, or name another file"
    ):
        calibrate(batches)
    assert path.read_bytes() == before


def test_files_that_cannot_be_read_or_written(calibrate, batches, tmp_path):
    with pytest.raises(FastcalError, match=f"cannot read histograms {tmp_path}: Is a directory; name another file"):
        calibrate(batches, histograms=tmp_path)
    for place in ("no/h.npz", "h.npz/h.npz"):
        (tmp_path / "h.npz").write_bytes(b"")
        with pytest.raises(FastcalError, match=rf"cannot (write|read histograms) .*{place}: "):
            calibrate(batches, histograms=tmp_path / place)


@pytest.fixture
def work(tmp_path):
    """A folder with images."""
    for path in sorted((DIGITS / "images").rglob("*.jpg"))[::10]:
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "images" / f"{path.parent.name}_{path.name}")
    return tmp_path


def test_the_commands_share_them(run_fastcal, work):
    def run(*words):
        done = run_fastcal(*words, "--histograms", "h.npz", "--batch-size", 13, cwd=work)
        assert done.returncode == 0, done.stderr
        return done

    reused = "images     none: the histograms were reused\n"
    first = run("calibrate", MODEL, "images", "-o", "1.cache", "--report", "1.html")
    assert "images     26 in 2 batches of 13" in first.stdout
    assert "histograms h.npz\n" in first.stdout
    again = run("calibrate", MODEL, "images", "-o", "2.cache", "--algorithm", "minmax", "--report", "2.html")
    assert again.stdout.startswith(reused + "tensors    20, scales by minmax\n")
    assert "<b>26</b>samples" in (work / "2.html").read_text()
    quantized = run("quantize", MODEL, "images", "-o", "3.onnx", "--algorithm", "minmax", "--cache", "3.cache")
    assert quantized.stdout.startswith(reused)
    assert fastcal.CalibrationCache.load(work / "3.cache").scales == fastcal.CalibrationCache.load(
        work / "2.cache").scales  # fmt: skip
    *progress, last = map(json.loads, run("compare", MODEL, "images", "--json").stdout.splitlines())
    assert {line["total"] for line in progress} == {2}
    assert last["images"] == 26
    plain = run_fastcal("compare", MODEL, "images", "--batch-size", 13, "--json", cwd=work)
    assert json.loads(plain.stdout.splitlines()[-1]) == last
    outcome = json.loads(run("calibrate", MODEL, "images", "-o", "2.cache", "--json").stdout.splitlines()[-1])
    assert (outcome["histograms"], outcome["batches"], outcome["tensors"]) == ("h.npz", 0, 20)


def test_tuning_keeps_those_of_all_tensors(run_fastcal, work):
    words = ("images", "--histograms", "h.npz", "--batch-size", 13)
    first = run_fastcal("quantize", MODEL, *words, "-o", "z.onnx", cwd=work)
    assert first.returncode == 0, first.stderr
    done = run_fastcal("quantize", MODEL, *words, "-o", "x.onnx", "--report", "r.html", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("images     none: the histograms were reused\n")
    words = ("images", "--cache", "y.cache", "--batch-size", 13)
    plain = run_fastcal("quantize", MODEL, *words, "-o", "y.onnx", cwd=work)
    assert plain.returncode == 0, plain.stderr
    assert (work / "x.onnx").read_bytes() == (work / "y.onnx").read_bytes()


@pytest.mark.parametrize(
    ("words", "histograms", "message"),
    [
        (("calibrate", "-o", "x"), "images/0_0001.jpg", "images/0_0001.jpg is among the data; name another file for"),
        (("calibrate", "-o", "x"), "", "the name of the histograms is empty; name a file"),
        (("calibrate", "-o", "x"), "no/h.npz", "cannot write no/h.npz: there is no folder"),
        (("quantize", "-o", "x"), "model.onnx", "model.onnx is the model itself; name another file for the histograms"),
        (("quantize", "-o", "x"), "x", "x is the quantized model; name another file for the histograms"),
        (("tune", "-o", "x"), "model.onnx", "model.onnx is the model itself; name another file for the histograms"),
        (("compare",), "model.onnx", "model.onnx is the model itself; name another file for the histograms"),
    ],
)
def test_where_they_cannot_be_kept(run_fastcal, work, words, histograms, message):
    shutil.copy(MODEL, work / "model.onnx")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    command, *more = words
    options = (*more, "--histograms", histograms, "--preprocess", "imagenet")
    done = run_fastcal(command, "model.onnx", "images", *options, cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
