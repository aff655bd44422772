"""`fastcal cache` as a user meets it, and what every command prints for programs and for nobody."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import DATA, DIGITS
from fastcal import Algorithm, CalibrationCache

MODEL = DIGITS / "digits.onnx"
SQUEEZENET = DATA / "squeezenet1_1.entropy2.cache"
CACHE_COMMANDS = ("show", "diff", "convert", "check")


@pytest.fixture
def work(tmp_path):
    """A folder with a cache, and with one that has a scale moved by one percent."""
    cache = CalibrationCache.load(SQUEEZENET)
    cache.save(tmp_path / "a.cache")
    moved = cache.scales | {"input": cache.scales["input"] * 1.01}
    replace(cache, scales=moved).save(tmp_path / "b.cache")
    return tmp_path


@pytest.fixture(scope="module")
def calibrated(run_fastcal, tmp_path_factory):
    """A folder with a cache of the digits and its record, as the command line makes them."""
    folder = tmp_path_factory.mktemp("calibrated")
    run_fastcal("calibrate", MODEL, DIGITS / "images", "-o", "digits.cache", cwd=folder).check_returncode()
    return folder


def test_show(run_fastcal, work):
    done = run_fastcal("cache", "show", "a.cache", cwd=work)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^input +0\.0371246 +4\.71482$", done.stdout, re.MULTILINE)
    assert re.search(r"^\(Unnamed Layer\* 0\) \[Constant\]_output +0 +0$", done.stdout, re.MULTILINE)
    assert "header     TRT-8600-EntropyCalibration2\ntensors    91\nmade from  not known" in done.stdout
    assert done.stdout.endswith(": its record, a.cache.json, is missing\n")
    (work / "a.cache.json").write_text("{")
    done = run_fastcal("cache", "show", "a.cache", cwd=work)
    assert done.stdout.endswith(": its record, a.cache.json, is damaged or of another cache\n")


def test_names_are_shown_whole(run_fastcal, tmp_path):
    name = "/".join(["block"] * 40)
    CalibrationCache({name: 1.0}).save(tmp_path / "x")
    assert re.search(f"^{name} +1 +127$", run_fastcal("cache", "show", "x", cwd=tmp_path).stdout, re.MULTILINE)


def test_show_with_a_record(run_fastcal, calibrated):
    done = run_fastcal("cache", "show", "digits.cache", cwd=calibrated)
    assert re.search(r"made from\n  images +256\n", done.stdout)
    shown = json.loads(run_fastcal("cache", "show", "digits.cache", "--json", cwd=calibrated).stdout)
    assert shown["scales"] == CalibrationCache.load(calibrated / "digits.cache").scales
    assert shown["made_from"]["images"] == 256


def test_a_cache_does_not_differ_from_itself(run_fastcal, work):
    done = run_fastcal("cache", "diff", "a.cache", "a.cache", cwd=work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal: none of 91 scales moved\n", "")


def test_one_scale_that_moved_is_named_alone(run_fastcal, work):
    done = run_fastcal("cache", "diff", "a.cache", "b.cache", cwd=work)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == "different: 1 of 91 scales moved, most: input, 1.01"
    assert re.fullmatch(r"input +0.0371246 +0.0374958 +1\.01 *", lines[2])
    assert len(lines) == 4  # the table's head, a rule, the tensor, the verdict
    done = run_fastcal("cache", "diff", "a.cache", "b.cache", "--tolerance", "1.1", cwd=work)
    assert (done.returncode, done.stdout) == (0, "equal: none of 91 scales moved by more than 1.1 %\n")


def test_tensors_in_only_one_and_other_headers(run_fastcal, work):
    CalibrationCache({"input": 0.0, "new": 1.0}, "minmax").save(work / "c.cache")
    done = run_fastcal("cache", "diff", "a.cache", "c.cache", cwd=work)
    assert done.returncode == 1
    assert re.search(r"^new +none +1 *$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-2:] == [
        "headers: TRT-8600-EntropyCalibration2 and TRT-101601-MinMaxCalibration",
        "different: 1 of 1 scales moved, most: input, 0; 90 only in A; 1 only in B",
    ]
    told = json.loads(run_fastcal("cache", "diff", "c.cache", "b.cache", "--json", cwd=work).stdout)
    assert (told["differ"], told["removed"], len(told["added"])) == (True, ["new"], 90)
    assert told["moved"] == {"input": [0, CalibrationCache.load(work / "b.cache").scales["input"]]}


def test_convert(run_fastcal, calibrated):
    for arguments in (
        "digits.cache -o digits.json",
        "digits.json -o newer.cache --tensorrt 10.3.0",
        "digits.cache -o older.cache --tensorrt 8.6.1",
        "digits.cache -o minmax.cache --algorithm minmax",
    ):
        done = run_fastcal("cache", "convert", *arguments.split(), cwd=calibrated)
        assert (done.returncode, done.stderr) == (0, "")
    first = CalibrationCache.load(calibrated / "digits.cache")
    newer = CalibrationCache.load(calibrated / "newer.cache")
    assert (newer.scales, newer.header) == (first.scales, "TRT-100300-EntropyCalibration2")
    older = CalibrationCache.load(calibrated / "older.cache")
    assert (older.scales, older.header, older.record) == (first.scales, "TRT-8601-EntropyCalibration2", first.record)
    assert CalibrationCache.load(calibrated / "minmax.cache").header.endswith("-MinMaxCalibration")
    assert json.loads((calibrated / "digits.json").read_text())["made_from"] == first.record.entries
    assert not (calibrated / "digits.json.json").exists()


def test_legacy_calibration_under_another_header(run_fastcal, tmp_path):
    CalibrationCache({"x": 1.0}, Algorithm("percentile", 0.9999, 1.0), None).save(tmp_path / "legacy.cache")
    options = "-o x.json --algorithm entropy2 --tensorrt 10.3.0"
    assert run_fastcal("cache", "convert", "legacy.cache", *options.split(), cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "algorithm": "entropy2", "tensorrt_version": "10.3.0", "scales": {"x": 1.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show none.cache", "cannot read calibration cache none.cache: No such file or directory; check the path"),
        ("diff a.cache b.cache --tolerance -1", "tolerance -1 is not a percentage from 0 on"),
        ("convert a.cache -o a.cache.json", "a.cache.json is the record of a.cache; name another file"),
        ("convert a.cache -o x --tensorrt 11.0", "TensorRT 11.0 takes no calibration cache"),
        ("convert a.cache -o x --algorithm percentile", "there is no header for algorithm 'percentile'; choose one of"),
        ("convert legacy.cache -o x --tensorrt 10.3.0", "legacy.cache is of Legacy calibration, whose header has no"),
        ("convert legacy.cache -o x --algorithm minmax", "the header of legacy.cache names no TensorRT version; name"),
        ("convert a.cache -o none/x", "cannot write none/x: there is no folder"),
        ("check a.cache none.onnx", "cannot read model none.onnx"),
        ("check a.cache model.onnx nowhere", "no such file or folder: nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(run_fastcal, work, arguments, message):
    CalibrationCache({"x": 1.0}, Algorithm("percentile", 0.9999, 1.0), None).save(work / "legacy.cache")
    shutil.copy(MODEL, work / "model.onnx")
    before = sorted(os.listdir(work))
    done = run_fastcal("cache", *arguments.split(), cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(work)) == before


def test_check(run_fastcal, calibrated, tmp_path):
    for data in ((), (DIGITS / "images",)):
        done = run_fastcal("cache", "check", "digits.cache", MODEL, *data, cwd=calibrated)
        assert (done.returncode, done.stdout) == (0, "in order: 0 missing, 0 unknown, 0 invalid, 0 stale\n"), (
            done.stderr
        )
    done = run_fastcal("cache", "check", "digits.cache", MODEL, DIGITS / "images", "--limit", "64", cwd=calibrated)
    assert done.returncode == 1
    assert "stale      images (256 then, 64 now)\n" in done.stdout
    done = run_fastcal("cache", "check", SQUEEZENET, MODEL)
    assert done.returncode == 1
    assert "missing    image\n" in done.stdout
    assert "unknown    input\n" in done.stdout
    assert "entropy2.cache.json, is missing\n" in done.stdout
    told = json.loads(run_fastcal("cache", "check", SQUEEZENET, MODEL, "--json").stdout)
    assert not told["ok"]
    assert told["missing"][0] == "image"
    assert not told["recorded"]


def test_quantize_takes_a_cache_in_any_form(run_fastcal, calibrated, tmp_path):
    CalibrationCache.load(calibrated / "digits.cache").save(tmp_path / "digits.json", form="json")
    for cache, output in ((calibrated / "digits.cache", "1.onnx"), (tmp_path / "digits.json", "2.onnx")):
        done = run_fastcal("quantize", MODEL, cache, "-o", tmp_path / output)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    (tmp_path / "bad.json").write_text("{}")
    done = run_fastcal("quantize", MODEL, tmp_path / "bad.json", "-o", tmp_path / "3.onnx")
    assert done.returncode == 2
    assert 'it has no "scales"' in done.stderr


def test_json_lines_tell_the_progress_and_the_outcome(run_fastcal, tmp_path):
    words = ("calibrate", MODEL, DIGITS / "images", "-o", "x.cache", "--batch-size", 48, "--last-batch", "wrap")
    done = run_fastcal(*words, "--json", cwd=tmp_path)
    *progress, last = map(json.loads, done.stdout.splitlines())
    assert progress
    for event in progress:
        assert (event["event"], event["images"], event["total"]) == ("progress", 48 * event["batches"], 6)
        assert 0 <= event["waited"] <= event["seconds"]
    cache = CalibrationCache.load(tmp_path / "x.cache")
    assert last.items() >= {
        "event": "done", "cache": "x.cache", "header": cache.header, "algorithm": "entropy2", "batches": 6,
        "tensors": len(cache.scales), "images": 256, "batch_size": 48,
    }.items()  # fmt: skip
    assert "note: 256 images in batches of 48: the last is completed" in done.stderr  # still for people

    done = run_fastcal("quantize", MODEL, "x.cache", "-o", "x.onnx", "--json", "--quiet", cwd=tmp_path)
    assert json.loads(done.stdout) == {
        "event": "done",
        "model": "x.onnx",
        "quantized": 8,
        "layers": 8,
        "int8_weights": False,
        "other_layers": "FP32",
        "bytes": (tmp_path / "x.onnx").stat().st_size,
    }
    done = run_fastcal(*words, "--json", "--quiet", cwd=tmp_path)
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["done"]
    done = run_fastcal(*words, "--json", "--algorithm", "kl", cwd=tmp_path)
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert told["event"] == "error"
    assert done.stderr.splitlines()[-1] == f"error: {told['message']}"


def test_quiet_leaves_only_what_is_wrong(run_fastcal, tmp_path, work):
    words = ("calibrate", MODEL, DIGITS / "images", "-o", tmp_path / "x.cache", "--batch-size", 48, "-q")
    done = run_fastcal(*words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "x.cache").exists()
    done = run_fastcal(*words, "--algorithm", "kl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    done = run_fastcal("cache", "diff", "a.cache", "b.cache", "--quiet", cwd=work)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_fault_of_our_own_is_not_taken_for_a_difference(spawn_fastcal, tmp_path, work):
    (tmp_path / "sitecustomize.py").write_text("import fastcal.cache.diff as d\nd.diff_caches = None\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = spawn_fastcal("cache", "diff", "a.cache", "b.cache", cwd=work, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 70
    assert "TypeError" in done.stderr


@pytest.mark.parametrize(
    "command", ["calibrate", "quantize", "build", "doctor", *(f"cache {name}" for name in CACHE_COMMANDS)]
)
def test_every_command_has_an_example_and_the_same_last_options(run_fastcal, command):
    shown = run_fastcal(*command.split(), "--help", env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert f"Example: fastcal {command}" in shown
    assert re.search(r"--quiet +-q .*\n.*--json .*\n.*--help", shown)


def test_help_tells_the_exit_status(run_fastcal):
    shown = " ".join(run_fastcal("--help", env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}).stdout.split())
    for status in ("0 done", "1 a check failed", "2 an error", "70 a bug", "130 Ctrl-C"):
        assert status in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(run_fastcal, shell):
    environment = {
        **os.environ, "_FASTCAL_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "fastcal calibrate --algo",
        "COMP_WORDS": "fastcal calibrate --algo", "COMP_CWORD": "2", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    done = run_fastcal(env=environment)
    assert "--algorithm" in done.stdout


def test_a_version_that_reads_no_cache_replaces_nothing(run_fastcal, work):
    (work / "keep.json").write_text("precious")
    done = run_fastcal("cache", "convert", "a.cache", "-o", "keep.json", "--tensorrt", "11.0", cwd=work)
    assert (done.returncode, done.stderr) == (
        2, "error: TensorRT 11.0 takes no calibration cache; only 5.x to 10.x do\n",
    )  # fmt: skip
    assert (work / "keep.json").read_text() == "precious"


def test_a_cache_does_not_become_its_own_record(run_fastcal, calibrated, tmp_path):
    CalibrationCache.load(calibrated / "digits.cache").save(tmp_path / "x.json", form="json")
    before = (tmp_path / "x.json").read_bytes()
    done = run_fastcal("cache", "convert", "x.json", "-o", "x", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "error: x.json would become the record of x; name another file\n",
    )  # fmt: skip
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.json": before}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", [["cache", "show", "a.cache"], ["cache", "show", "a.cache", "--json"], ["doctor"]])
def test_where_nothing_can_be_written(work, without_libraries, words):
    command = [sys.executable, "-m", "fastcal", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=work, env=without_libraries, stdout=full, stderr=subprocess.PIPE, timeout=60)
    text = (
        b"error: cannot write to the standard output: No space left on device; make room, or write to another place\n"
    )
    assert (done.returncode, done.stderr) == (2, text)


@pytest.mark.parametrize("words", ["cache show a.cache", "cache show a.cache --json"])
def test_a_closed_output_is_none(work, words):
    command = f"{sys.executable} -m fastcal {words} >&-"
    done = subprocess.run(command, shell=True, cwd=work, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_where_nobody_reads_on_that_is_no_answer(work, options):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastcal", "cache", "diff", "a.cache", "a.cache", *options]
    with os.fdopen(writer) as gone:
        done = subprocess.run(command, cwd=work, stdout=gone, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("TRT-5105-EntropyCalibration2", "5.1.5"),
        ("TRT-7000-MinMaxCalibration", "7.0.0"),
        ("TRT-8502-EntropyCalibration2", "8.5.2"),
    ],
)
def test_caches_of_older_versions(run_fastcal, tmp_path, header, version):
    (tmp_path / "calib.table").write_bytes(f"{header}\r\ndata: 3c010a14\r\nconv1: 3d008912\r\n".encode("utf-8-sig"))
    (tmp_path / "other.table").write_text("TRT-101601-EntropyCalibration2\ndata: 3c010a14\nconv1: 3d008913\n")
    done = run_fastcal("cache", "show", "calib.table", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["header"] == header
    done = run_fastcal("cache", "diff", "calib.table", "other.table", cwd=tmp_path)
    assert (done.returncode, f"headers: {header} and TRT-101601-EntropyCalibration2\n" in done.stdout) == (1, True)
    assert run_fastcal("cache", "convert", "calib.table", "-o", "c.json", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "c.json").read_text())["tensorrt_version"] == version
    done = run_fastcal("cache", "convert", "c.json", "-o", "new.cache", "--tensorrt", "10.3.0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new.cache").read_text().split("\n", 1) == [
        header.replace(header[4:8], "100300"), "data: 3c010a14\nconv1: 3d008912\n",
    ]  # fmt: skip
    done = run_fastcal("cache", "convert", "new.cache", "-o", "old.cache", "--tensorrt", version, cwd=tmp_path)
    assert (tmp_path / "old.cache").read_text().splitlines()[0] == header
