"""`fastcal quantize --cache`: the cache is kept, and a second run does without the network."""

import json

import numpy as np
import onnx
import pytest
from PIL import Image

import fastcal
from conftest import DIGITS
from fastcal import CalibrationCache

MODEL = DIGITS / "digits.onnx"
REUSED = "none: the cache was reused"


@pytest.fixture
def quantize(run_fastcal, tmp_path):
    """A function that quantizes with --cache in a folder with images, and returns what the command prints."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.effect_noise((40, 36), 50 + number).convert("RGB").save(tmp_path / "images" / f"{number}.png")

    def run(*more, output="x.onnx", cache="model.cache", status=0):
        done = run_fastcal("quantize", MODEL, "images", "-o", output, "--cache", cache, *more, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        return done

    return run


def test_a_second_run_reuses_the_cache(quantize, tmp_path):
    first = quantize()
    assert REUSED not in first.stdout
    assert "images     5 in 1 batch" in first.stdout
    written = [(tmp_path / name).read_bytes() for name in ("model.cache", "model.cache.json", "x.onnx")]
    second = quantize(output="y.onnx")
    assert REUSED in second.stdout
    assert second.stdout.endswith("cache      model.cache\n")
    assert [(tmp_path / name).read_bytes() for name in ("model.cache", "model.cache.json", "y.onnx")] == written
    assert len(onnx.load(tmp_path / "y.onnx").graph.node) > len(onnx.load(MODEL).graph.node)


def test_the_outcome_for_programs(quantize):
    first, second = (json.loads(quantize("--json").stdout.splitlines()[-1]) for _ in range(2))
    assert (first["cache"], first["batches"]) == (second["cache"], 1) == ("model.cache", 1)
    assert second["batches"] == 0
    for name in ("quantized", "layers", "tensors", "header"):
        assert first[name] == second[name]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--algorithm", "minmax"), "its header is TRT-101601-EntropyCalibration2, not TRT-101601-MinMaxCalibration"),
        (("--limit", "3"), "it was made from other images"),
        (("--preprocess", "clip"), "it was made from other preprocess"),
        (("--until-stable", "1"), "it was made from other until_stable"),
    ],
)
def test_what_is_not_up_to_date_is_replaced(quantize, tmp_path, more, reason):
    quantize()
    before = (tmp_path / "model.cache.json").read_bytes()
    done = quantize(*more)
    assert f"note: calibrating: model.cache is not reused, {reason}" in done.stderr
    assert REUSED not in done.stdout
    assert (tmp_path / "model.cache.json").read_bytes() != before
    assert REUSED in quantize(*more).stdout


def test_a_changed_image_and_a_lost_record(quantize, tmp_path):
    quantize()
    Image.effect_noise((40, 36), 90).convert("RGB").save(tmp_path / "images" / "0.png")
    assert "it was made from other samples" in quantize().stderr
    (tmp_path / "model.cache.json").unlink()
    assert "nothing tells what it was made from: its record, model.cache.json, is missing" in quantize().stderr
    (tmp_path / "model.cache").write_bytes(b"no cache")
    assert "calibrating: model.cache is not reused" in quantize().stderr
    assert REUSED in quantize().stdout


def test_the_cache_of_a_calibration_for_any_tensorrt(quantize, run_fastcal, tmp_path):
    words = ("calibrate", MODEL, "images", "-o", "model.cache", "--tensorrt", "8.6.1")
    run_fastcal(*words, cwd=tmp_path).check_returncode()
    before = (tmp_path / "model.cache").read_bytes()
    assert REUSED in quantize("--algorithm", "entropy2").stdout
    assert (tmp_path / "model.cache").read_bytes() == before
    assert CalibrationCache.load(tmp_path / "model.cache").tensorrt_version == "8.6.1"


def test_a_report_needs_the_network(quantize, tmp_path):
    quantize()
    assert REUSED not in quantize("--report", "r.html").stdout
    assert "<h2>Tensors</h2>" in (tmp_path / "r.html").read_text()
    assert REUSED in quantize().stdout


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("x.onnx", "x.onnx is the quantized model; name another file for the cache"),
        ("no/model.cache", "cannot write no/model.cache: there is no folder"),
        ("images/0.png", "images/0.png is among the data; name another file for the cache"),
        ("", "the name of the cache is empty; name a file"),
    ],
)
def test_a_cache_that_cannot_be_kept(quantize, tmp_path, cache, message):
    (line,) = quantize(cache=cache, status=2).stderr.splitlines()  # before the images are looked at
    assert message in line
    assert not (tmp_path / "x.onnx").exists()


def test_two_caches(quantize, run_fastcal, tmp_path):
    quantize()
    words = ("quantize", MODEL, "model.cache", "-o", "y.onnx", "--cache", "other.cache")
    done = run_fastcal(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.cache is a calibration cache, and --cache is for images; leave one of them out" in done.stderr


def test_in_python(tmp_path):
    batches = [np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype="f4")] * 2
    runs = []
    settings = {"backend": "onnxruntime", "tensorrt_version": "10.3.0", "cache": tmp_path / "x.cache"}
    first = fastcal.calibrate(MODEL, batches, **settings, progress=runs.append)
    assert len(runs) == 2
    again = fastcal.calibrate(MODEL, batches, **settings, progress=runs.append)
    assert len(runs) == 2
    assert (again.observed, again.record) == (None, first.record)
    assert again.to_bytes() == first.to_bytes() == (tmp_path / "x.cache").read_bytes()
    fastcal.calibrate(MODEL, batches[:1], **settings, progress=runs.append)
    assert len(runs) == 3
    with pytest.raises(fastcal.FastcalError, match=r"cannot write .*no/x.cache: there is no folder"):
        fastcal.calibrate(MODEL, batches, **settings | {"cache": tmp_path / "no" / "x.cache"}, progress=runs.append)
    assert len(runs) == 3
