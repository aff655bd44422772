import json

import onnx
import pytest

import fastcal
from conftest import DIGITS

MODEL, IMAGES = DIGITS / "digits.onnx", DIGITS / "images"


def events(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_model_is_tuned_and_quantized(run_fastcal, tmp_path):
    tuned = run_fastcal(
        "tune", MODEL, IMAGES, "-o", "tuned.json", "--preprocess", "imagenet", "--limit", "64", cwd=tmp_path
    )
    assert tuned.returncode == 0, tuned.stderr
    rows = dict(line.split(maxsplit=1) for line in tuned.stdout.splitlines()[:6])
    assert rows["images"].startswith("48 in 2 batches of 32")
    assert " dB at the outputs, top-1 1, on 16 held-out samples" in rows["keeps"]
    assert rows["repaired"].startswith("0 layers in float (0% of the multiply-adds)")
    assert "/8/Gemm" in tuned.stdout
    quantized = run_fastcal("quantize", MODEL, "tuned.json", "-o", "q.onnx", cwd=tmp_path)
    assert quantized.returncode == 0, quantized.stderr
    expected = fastcal.quantize(MODEL, fastcal.Tuning.load(tmp_path / "tuned.json"))
    assert onnx.load(tmp_path / "q.onnx") == expected


def test_quantize_tunes_by_default_and_says_what_int8_keeps(run_fastcal, tmp_path):
    options = ("--preprocess", "imagenet", "--limit", "64", "--json")
    made = run_fastcal("quantize", MODEL, IMAGES, "-o", "q.onnx", *options, cwd=tmp_path)
    done = events(made)[-1]
    assert (done["event"], done["samples"], done["held_out"], done["images"]) == ("done", 16, True, 48)
    assert done["sqnr"] > 30
    tuned = run_fastcal("tune", MODEL, IMAGES, "-o", "tuned.json", *options, cwd=tmp_path)
    assert {name: events(tuned)[-1][name] for name in ("sqnr", "in_float", "biases")} == {
        name: done[name] for name in ("sqnr", "in_float", "biases")
    }


def test_another_algorithm_is_not_measured(run_fastcal, tmp_path):
    options = ("--preprocess", "imagenet", "--limit", "64", "--algorithm", "minmax")
    made = run_fastcal("quantize", MODEL, IMAGES, "-o", "q.onnx", *options, cwd=tmp_path)
    assert "keeps" not in made.stdout
    cache = fastcal.calibrate(
        MODEL, fastcal.ImageFeed(IMAGES, preprocess="imagenet", model=MODEL, limit=64), algorithm="minmax"
    )
    assert onnx.load(tmp_path / "q.onnx") == fastcal.quantize(MODEL, cache)


def test_a_target_out_of_reach_is_told(run_fastcal, tmp_path):
    (tmp_path / "own.py").write_text("def half(exact, other):\n    return 0.5\n")
    options = ("--preprocess", "imagenet", "--limit", "64", "--target", "99%", "--metric", "own.py:half")
    tuned = run_fastcal("tune", MODEL, IMAGES, "-o", "tuned.json", *options, cwd=tmp_path)
    assert tuned.returncode == 0
    assert "half 0.5, on 16 held-out samples; the target 0.99 is out of reach" in tuned.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "much"], "--target much is no share; write 99% or 0.99"),
        (["--target", "200%"], "target is 2.0; it must be above 0 and at most 1"),
        (["--float-share", "2"], "float_share is 2.0; it must be from 0 to 1"),
        (["--metric", "beauty"], "no metric 'beauty'; take one of"),
        (["--exclude", "Nowhere"], "has no layer, type or tensor 'Nowhere' to exclude"),
        (["-o", "digits.onnx"], "digits.onnx is the model itself"),
        (["--cache", "tuned.json"], "tuned.json is the "),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(run_fastcal, tmp_path, arguments, message):
    model = tmp_path / "digits.onnx"
    model.write_bytes(MODEL.read_bytes())
    result = run_fastcal("tune", "digits.onnx", IMAGES, "-o", "tuned.json", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "tuned.json").exists()


def test_options_for_images_do_not_go_with_a_tuning(run_fastcal, tmp_path):
    fastcal.Tuning(fastcal.CalibrationCache({"x": 1.0})).save(tmp_path / "tuned.json")
    for option in (["--float-share", "0.5"], ["--no-bias-correction"], ["--limit", "3"]):
        result = run_fastcal("quantize", MODEL, "tuned.json", "-o", "q.onnx", *option, cwd=tmp_path)
        assert f"tuned.json is a calibration cache, and {option[0]} is for images" in result.stderr
