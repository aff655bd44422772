"""`fastcal compare` with its options: what is printed, and that each option reaches the comparison."""

import json
import re

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DIGITS
from fastcal.cache.record import Record

DETECTOR = """f (float[N, 3, 8, 8] x) => (float[N, 9, 64] y) {
  b = Conv(x, wb) boxes = Reshape(b, flatb) c = Conv(x, wc) s = Sigmoid(c) scores = Reshape(s, flatc)
  y = Concat<axis = 1>(boxes, scores)
}"""

METRICS = """import numpy as np
def mean_error(exact, int8):
    return float(np.abs(exact["y"] - int8["y"]).mean())
def words(exact, int8):
    return "good"
"""


@pytest.fixture
def work(tmp_path, onnx_file):
    """A folder with a detector, arrays for it, a cache, a Q/DQ model and metrics."""
    random = np.random.default_rng(0)
    weights = {"wb": random.standard_normal((4, 3, 1, 1)), "wc": random.standard_normal((5, 3, 1, 1))}
    constants = {name: array.astype("f4") for name, array in weights.items()}
    model = onnx_file(DETECTOR, constants | {"flatb": np.array([0, 4, -1]), "flatc": np.array([0, 5, -1])})
    x = random.standard_normal((12, 3, 8, 8)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    cache = fastcal.calibrate(model, [x], backend="onnxruntime", algorithm="minmax")
    cache.scales["x"] *= 2
    fastcal.CalibrationCache(cache.scales, record=Record({"images": 1})).save(tmp_path / "mine.cache")
    onnx.save(fastcal.quantize(model, cache), tmp_path / "theirs.onnx")
    (tmp_path / "metrics.py").write_text(METRICS)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--exact", "--quantile", "0.9"), {"exact": True, "quantile": 0.9}),
        (("--rounding", "implicit"), {"rounding": "implicit"}),
        (("--threshold", "0.6"), {"threshold": 0.6}),
        (("--metric", "boxes"), {"metric": "boxes"}),
        (("--metric", "metrics.py:mean_error"), {"metric": "metrics.py:mean_error"}),
        (("--quantized", "theirs.onnx"), {"quantized": {"theirs.onnx": "theirs.onnx"}}),
        (
            ("--cache", "mine.cache", "--quantized", "theirs.onnx"),
            {"caches": {"mine.cache": "mine.cache"}, "quantized": {"theirs.onnx": "theirs.onnx"}},
        ),
        (("--memory", "4K", "--threads", 1), {"memory": 4096, "threads": 1}),
    ],
)
def test_the_options_are_those_of_the_library(run_fastcal, work, monkeypatch, words, options):
    monkeypatch.chdir(work)
    given = []
    with monkeypatch.context() as patch:
        patch.setattr(
            fastcal, "compare", lambda *arguments, **named: given.append(named) or compare(*arguments, **named)
        )
        from fastcal.report.comparison import compare

        done = run_fastcal("compare", "model.onnx", "x.npy", "--batch-size", 4, "--json", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    with fastcal.NumpyFeed("x.npy", model="model.onnx", batch_size=4) as feed:
        expected = fastcal.compare("model.onnx", feed, **options)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("event") == "done"
    assert said == json.loads(json.dumps(expected.as_json()))
    assert {name: given[0][name] for name in options} == options


def test_parts_channels_and_the_metric_are_printed(run_fastcal, work):
    words = ("--batch-size", 4, "--cache", "mine.cache", "--quantized", "theirs.onnx", "--threshold", "0.6")
    done = run_fastcal("compare", "model.onnx", "x.npy", *words, cwd=work)
    assert (done.returncode, done.stderr) == (0, "")
    *_, last = run_fastcal("compare", "model.onnx", "x.npy", *words, "--json", cwd=work).stdout.splitlines()
    qualities = json.loads(last)["qualities"]
    tables = [table.splitlines() for table in done.stdout.split("\n\n")]
    assert [re.split("  +", table[0].strip())[0] for table in tables[:-1]] == [
        "scales", "part of the outputs", "worst channel", "tensor",
    ]  # fmt: skip
    rows, parts, channels = ([re.split("  +", row.strip()) for row in table[2:]] for table in tables[:3])
    assert re.split("  +", tables[0][0].strip())[:3] == ["scales", "output", "boxes' F1"]
    assert [row[0] for row in rows] == ["FP32", *qualities]
    for row, quality in zip(rows[1:], qualities.values(), strict=True):
        assert row[1:3] == [f"{quality['sqnr']:.1f} dB", f"{quality['metric']:.4g}"]
    for table, kind in ((parts, "parts"), (channels, "channels")):
        for label, *values in table:
            assert values == [f"{quality[kind][label]:.1f} dB" for quality in qualities.values()]
    assert [row[0] for row in parts] == ["y[:, 0:4]", "y[:, 4:]"]
    best = qualities[json.loads(last)["best"]]["channels"]
    assert [row[0] for row in channels] == sorted(best, key=best.get)[:5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "f1"), "there is no metric 'f1'; take one of boxes, masks, sequences, cosine, top-1, or a fun"),
        (("--metric", "masks"), "no output of model.onnx fits metric 'masks'; take another, or a function of your own"),
        (("--metric", "no.py:f"), "cannot load metric no.py:f: FileNotFoundError: no such file: no.py; write file.py:"),
        (("--metric", "metrics.py:words"), "metric words returned 'good'; it must return a number"),
        (("--metric", "metrics.py:words", "--threshold", "0.5"), "metric words takes no threshold; leave the thresh"),
        (("--metric", "top-1"), "no output of model.onnx fits metric 'top-1'; take another, or"),
        (("--threshold", "1"), "the threshold is 1.0; it must be above 0 and below 1"),
        (("--rounding", "both"), "rounding is 'both'; it must be explicit or implicit"),
        (("--memory", "much"), "--memory much is not a number of bytes; write 500M or 4G, for instance"),
        (("--memory", "0"), "memory is 0; it must be at least 1"),
        (("--quantized", "no.onnx"), "cannot read model no.onnx: No such file or directory; check the path"),
        (
            ("--quantized", DIGITS / "digits.onnx"),
            "digits.onnx has the inputs 'image', and model.onnx has 'x'; compare",
        ),
        (("--quantized", "other.onnx"), r"output 'y' is \(4, 9, 64\) in model.onnx and \(4, 9, 1\) in other.onnx; com"),
        (("--quantized", "integers.onnx"), "output 'y' of integers.onnx is not float; add a DequantizeLinear at its"),
        (("--quantized", "mine.cache"), "mine.cache is not an ONNX model; export the network to ONNX first"),
        (("--cache", "theirs.onnx"), "theirs.onnx is not a TensorRT calibration cache"),
    ],
)
def test_what_is_wrong_is_one_line(run_fastcal, work, onnx_file, words, message):
    head = "f (float[N, 3, 8, 8] x) =>"
    one = {"axes": np.array([2, 3]), "w": np.ones((9, 3, 1, 1), "f4"), "s": np.array([0, 0, 1])}
    onnx_file(f"{head} (float[N, 9, 1] y) {{ c = Conv(x, w) m = ReduceMax<axes = [2, 3]>(c) y = Reshape(m, s) }}", one,
              "other.onnx")  # fmt: skip
    onnx_file(f"{head} (int64[N, 9, 64] y) {{ c = Conv(x, w) k = Cast<to = 7>(c) y = Reshape(k, t) }}",
              one | {"t": np.array([0, 9, 64])}, "integers.onnx")  # fmt: skip
    done = run_fastcal("compare", "model.onnx", "x.npy", "--batch-size", 4, *words, cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert re.match(f"error: .*{message}", done.stderr)
