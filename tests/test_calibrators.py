"""The calibrators on TensorRT 10.16.1's own Python bindings, without TensorRT or a GPU.

What TensorRT does with a calibrator is in test_calibrators_gpu.py.
"""

import io
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fastcal
from conftest import forget_modules_on
from fastcal.algorithm import ALGORITHMS, Algorithm
from fastcal.batch import UNNAMED
from fastcal.calibration import Calibration
from fastcal.errors import DataError, FastcalError
from fastcal.observe.backends import OnnxRuntimeBackend, TensorRTBackend

CACHE = b"TRT-101601-EntropyCalibration2\na: 3c010a14\n"


class OnDevice:
    """An array that says it lies on a GPU; nothing here reads it."""

    def __init__(self, address, shape=(4, 3, 8, 8), strides=None):
        self.shape, self.dtype = shape, np.dtype("f4")
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": "<f4", "version": 3, "strides": strides,
            "stream": None,  # nothing to wait for
        }  # fmt: skip


class Numbered(fastcal.Feed):
    """Batches whose addresses tell the batch and the input."""

    batch_size = 4

    def __init__(self, count=3, names=("a", "b"), error=None, announced=None, samples="same"):
        self.count, self.names, self.error, self.sample_digest = count, names, error, samples
        self.announced = announced or count

    def __len__(self):
        return self.announced

    def __iter__(self):
        for batch in range(self.count):
            yield {name: OnDevice(100 * (batch + 1) + place) for place, name in enumerate(self.names)}
        if self.error:
            raise self.error

    def describe(self):
        return {"samples": self.sample_digest}


def addresses(calibrator, names=("a", "b")):
    """Return the addresses of all batches that are left."""
    return list(iter(lambda: calibrator.get_batch(list(names)), None))


def serve(calibrator, names=("a", "b"), write=True):
    """Call a calibrator as TensorRT does; return the cache that it gave, or else the addresses of its batches."""
    cache = calibrator.read_calibration_cache()
    if cache is not None:
        return cache
    given = addresses(calibrator, names)
    assert calibrator.read_calibration_cache() is None  # it asks again
    if write and given:
        calibrator.write_calibration_cache(memoryview(CACHE))
    return given


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let the backend TensorRT run the network with ONNX Runtime, for want of a GPU."""
    monkeypatch.setattr(
        TensorRTBackend, "observer", lambda _, network, gpu: OnnxRuntimeBackend().observer(network, gpu)
    )


def test_all_five_are_instances_of_tensorrts_classes(trt_bindings):
    trt = trt_bindings
    assert trt.__version__ == "10.16.1.11"
    for name, algorithm in (
        ("EntropyCalibrator2", "ENTROPY_CALIBRATION_2"),
        ("EntropyCalibrator", "ENTROPY_CALIBRATION"),
        ("MinMaxCalibrator", "MINMAX_CALIBRATION"),
        ("LegacyCalibrator", "LEGACY_CALIBRATION"),
    ):
        calibrator = getattr(fastcal, name)(Numbered())
        assert isinstance(calibrator, getattr(trt, f"IInt8{name}"))
        assert isinstance(calibrator, trt.IInt8Calibrator)
        assert calibrator.get_algorithm().name == algorithm
        assert calibrator.get_batch_size() == 4
    for algorithm in trt.CalibrationAlgoType.__members__.values():
        calibrator = fastcal.Calibrator(Numbered(), algorithm=algorithm)
        assert isinstance(calibrator, trt.IInt8Calibrator)
        assert calibrator.get_algorithm() == algorithm
    legacy = fastcal.LegacyCalibrator(Numbered(), quantile=0.99, regression_cutoff=0.5)
    assert (legacy.get_quantile(), legacy.get_regression_cutoff()) == (0.99, 0.5)


def test_algorithms_that_the_plain_calibrator_rejects(trt_bindings):
    legacy = trt_bindings.CalibrationAlgoType.LEGACY_CALIBRATION
    with pytest.raises(FastcalError, match=r"^there is no algorithm 'entropy2'; give a tensorrt.CalibrationAlgoType$"):
        fastcal.Calibrator(Numbered(), algorithm="entropy2")
    with pytest.raises(
        FastcalError,
        match=r"^a cache of Legacy calibration names its quantile: use LegacyCalibrator, or keep no cache$",
    ):
        fastcal.Calibrator(Numbered(), algorithm=legacy, cache="x.cache")
    assert len(serve(fastcal.Calibrator(Numbered(), algorithm=legacy))) == 3


def test_a_second_build_does_not_calibrate_again(trt_bindings, caplog):
    caplog.set_level(logging.INFO)
    feed = Numbered()
    calibrator = fastcal.EntropyCalibrator2(feed)
    assert len(serve(calibrator)) == 3
    assert calibrator.read_calibration_cache() == CACHE
    with calibrator:
        assert serve(calibrator) == CACHE
    reused = "the cache of the last build is reused: it was made from the same model, samples and settings"
    assert caplog.messages == [reused, reused]
    feed.sample_digest = "others"
    with calibrator:
        assert len(serve(calibrator)) == 3
    assert "the cache of the last build is not reused, it was made from other samples" in caplog.messages[-1]
    calibrator.rewind()
    assert len(serve(calibrator)) == 3
    assert list(Path().iterdir()) == []


def test_a_build_that_failed_keeps_nothing(trt_bindings):
    feed = Numbered(error=OSError("the disk is gone"))
    calibrator = fastcal.EntropyCalibrator2(feed)
    assert len(serve(calibrator)) == 3
    feed.error = None
    assert len(serve(calibrator)) == 3
    assert serve(calibrator) == CACHE


def test_another_network_calibrates_again(trt_bindings, on_a_cpu, onnx_file):
    double = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }")
    square = onnx_file("f (float[N, 3] x) => (float[N, 3] z) { z = Mul(x, x) }", name="square.onnx")
    calibrator = fastcal.EntropyCalibrator2(Counted())
    for model, name in ((double, "y"), (square, "z"), (square, "z")):
        before = calibrator.feed.passes
        with calibrator:
            calibrator.calibrate(model)
            assert f"{name}: " in serve(calibrator).decode()
        calibrated = calibrator.feed.passes - before
    assert calibrated == 0


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_cache_in_an_open_file(trt_bindings, kind):
    stream = io.BytesIO() if kind == "memory" else open("x.cache", "w+b")  # noqa: SIM115 - closed below
    with stream:
        calibrator = fastcal.EntropyCalibrator2(Numbered(), cache=stream)
        assert len(serve(calibrator)) == 3
        stream.seek(0)
        assert stream.read() == CACHE
        assert serve(calibrator) == CACHE
        assert serve(fastcal.EntropyCalibrator2(Numbered(), cache=stream)) == CACHE
        assert len(serve(fastcal.MinMaxCalibrator(Numbered(), cache=stream))) == 3  # of another header
        stream.seek(0)
        stream.write(b"garbage that is longer than a cache" * 9)
        assert len(serve(fastcal.EntropyCalibrator2(Numbered(), cache=stream))) == 3
        stream.seek(0)
        assert stream.read() == CACHE
    assert sorted(map(str, Path().iterdir())) == (["x.cache"] if kind == "file" else [])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("rb", r"cache x.cache cannot be written to; open it with mode 'r\+b' or 'w\+b'"),
        ("r+", r"cache x.cache is open for text; open it as binary"),
        (None, r"cache x.cache: I/O operation on closed file"),
    ],
)
def test_an_open_file_that_keeps_no_cache(trt_bindings, mode, message):
    Path("x.cache").write_text("TRT-8600-EntropyCalibration2\na: 3c010a14\n")
    with open("x.cache", mode or "r+b") as stream:
        if mode is None:
            stream.close()
        calibrator = fastcal.EntropyCalibrator2(Numbered(), cache=stream)
        assert serve(calibrator) == []
    with pytest.raises(FastcalError, match=message):
        calibrator.check()
    with pytest.raises(FastcalError, match="cache is a int; name a file, or give an open binary file"):
        fastcal.EntropyCalibrator2(Numbered(), cache=3)


@pytest.mark.parametrize("value", [140_000_000_000, np.int64(4096), 3.0, [1, 2]])
def test_an_address_is_not_taken_for_a_number(trt_bindings, value):
    class Addresses(Numbered):
        def __iter__(self):
            return iter([{"a": value, "b": OnDevice(1)}])

    calibrator = fastcal.EntropyCalibrator2(Addresses())
    assert serve(calibrator) == []
    with pytest.raises(DataError, match=r"the network takes arrays, and input 'a' of a batch is .*; give an array"):
        calibrator.check()
    if isinstance(value, (int, np.integer)):
        calibrator = fastcal.EntropyCalibrator2([{"a": value, "b": np.ones(3)}])
        calibrator.read_calibration_cache()
        assert calibrator.get_batch(["a", "b"]) is None
        with pytest.raises(DataError, match=rf"batch 0, input 'a' is the number {value}; if it is a device address"):
            calibrator.check()


class Endless(Numbered):
    """A feed that never knows its length."""

    def __len__(self):
        raise TypeError("who knows")


def test_a_feed_that_never_knows_its_length(trt_bindings):
    with fastcal.EntropyCalibrator2(Endless(), cache="3.cache") as calibrator:
        assert len(serve(calibrator)) == 3
        assert Path("3.cache").exists()
        calibrator.check()
        calibrator.rewind()
    with fastcal.EntropyCalibrator2(Endless(count=0), cache="0.cache") as calibrator:
        assert serve(calibrator) == []
        assert not Path("0.cache").exists()
        with pytest.raises(DataError, match=r"^the feed gave no batches; a calibration needs at least one$"):
            calibrator.check()
        calibrator.rewind()


def test_addresses_come_in_the_order_asked_for_and_again_after_the_end(trt_bindings):
    calibrator = fastcal.EntropyCalibrator2(Numbered())
    assert serve(calibrator, ("b", "a")) == [[101, 100], [201, 200], [301, 300]]
    calibrator.rewind()
    assert serve(calibrator, ("a", "b")) == [[100, 101], [200, 201], [300, 301]]
    assert (calibrator.stats.batches, calibrator.stats.images) == (3, 12)
    calibrator.get_batch(["a", "b"])
    calibrator.rewind()
    assert calibrator.get_batch(["a", "b"]) == [100, 101]


def test_one_nameless_array_goes_to_the_one_input(trt_bindings):
    nameless = fastcal.EntropyCalibrator2(Numbered(count=1, names=(UNNAMED,)))
    assert serve(nameless, ("pixels",)) == [[100]]
    named = fastcal.EntropyCalibrator2(Numbered(count=1, names=("input",)))
    assert serve(named, ("pixels",)) == []
    with pytest.raises(
        DataError,
        match=r"^the network takes the inputs 'pixels', the batches have 'input'; "
        r"name the batches' arrays after the inputs$",
    ):
        named.check()


OTHER_NAMES = (
    "the network takes the inputs 'a', 'b', the batches have 'a', {}; name the batches' arrays after the inputs"
)


@pytest.mark.parametrize(
    ("feed", "batches", "kind", "message"),
    [
        ({"error": OSError("the disk is gone")}, 3, OSError, "the disk is gone"),
        ({"error": KeyboardInterrupt()}, 3, KeyboardInterrupt, ""),
        ({"count": 2, "announced": 5}, 2, DataError, "the feed ended after 2 of 5 batches; it was to give all"),
        ({"names": ("a", "c")}, 0, DataError, OTHER_NAMES.format("'c'")),
        ({"names": ("a", "b", "c")}, 0, DataError, OTHER_NAMES.format("'b', 'c'")),
    ],
)
def test_an_error_is_remembered_and_no_cache_is_written(trt_bindings, feed, batches, kind, message):
    calibrator = fastcal.EntropyCalibrator2(Numbered(**feed), cache="x.cache")

    def build():
        with calibrator:
            assert len(serve(calibrator)) == batches

    for attempt in (build, build, calibrator.check):  # once more, with the same object
        with pytest.raises(kind) as raised:
            attempt()
        assert type(raised.value) is kind
        assert str(raised.value) == message
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("of_the_feed", "of_the_build", "raised", "cause"),
    [
        (OSError("the disk is gone"), RuntimeError("no engine"), "of the feed", "of the build"),
        (KeyboardInterrupt(), RuntimeError("no engine"), "of the feed", "of the build"),
        (OSError("the disk is gone"), KeyboardInterrupt(), "of the build", None),
        (None, RuntimeError("no engine"), "of the build", None),
    ],
)
def test_the_first_error_is_raised_if_the_build_raises_too(trt_bindings, of_the_feed, of_the_build, raised, cause):
    errors = {"of the feed": of_the_feed, "of the build": of_the_build, None: None}

    def build():
        with fastcal.EntropyCalibrator2(Numbered(error=of_the_feed)) as calibrator:
            serve(calibrator)
            raise of_the_build

    with pytest.raises((OSError, RuntimeError, KeyboardInterrupt)) as caught:
        build()
    assert caught.value is errors[raised]
    assert caught.value.__cause__ is errors[cause]


def test_a_build_that_ends_before_its_cache_does_not_count_for_the_next(trt_bindings):
    calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="x.cache")
    assert len(serve(calibrator, write=False)) == 3
    assert calibrator.read_calibration_cache() is None
    calibrator.get_batch(["a", "b"])  # one of three
    calibrator.write_calibration_cache(b"x")
    assert calibrator.stats.batches == 1
    assert not Path("x.cache").exists()


def test_a_cache_of_some_batches_is_not_reused_for_all():
    all_of_them = Calibration(Numbered(), Algorithm(), None, TensorRTBackend(), "10.16.1")
    some_of_them = replace(all_of_them, until_stable=1)
    some_of_them.cache({"a": 1.0}, []).save("x.cache")
    reason = "it was made from other until_stable (1 then: perhaps not all batches)"
    assert all_of_them.reuse("x.cache") == (None, reason)
    all_of_them.cache({"a": 1.0}, []).save("x.cache")
    assert all_of_them.reuse("x.cache")[1] == ""
    all_of_them.cache({}, []).save("x.cache")
    assert all_of_them.reuse("x.cache") == (None, "it holds no scales")


def test_the_cache_is_reused_only_while_it_is_up_to_date(trt_bindings, caplog):
    caplog.set_level(logging.INFO)

    def calibrate(samples="same", kind=fastcal.EntropyCalibrator2):
        caplog.clear()
        with kind(Numbered(samples=samples), cache="x.cache") as calibrator:
            got = serve(calibrator)
        return [*caplog.messages, "served" if isinstance(got, bytes) else f"calibrated with {len(got)}"]

    def not_reused(reason):
        return [f"calibrating: x.cache is not reused, {reason}", "calibrated with 3"]

    reused = ["x.cache is reused: it was made from the same model, samples and settings", "served"]
    entropy2 = "TRT-101601-EntropyCalibration2"
    cache, record = Path("x.cache"), Path("x.cache.json")
    assert calibrate() == not_reused("there is none yet")
    assert calibrate() == reused
    assert calibrate("others") == not_reused("it was made from other samples")
    assert calibrate("others") == reused
    assert calibrate("others", fastcal.MinMaxCalibrator) == not_reused(
        f"its header is {entropy2}, not TRT-101601-MinMaxCalibration"
    )
    cache.write_text(cache.read_text().replace("101601", "8600"))
    assert calibrate("others") == not_reused(f"its header is TRT-8600-EntropyCalibration2, not {entropy2}")
    record.write_text(record.read_text().replace("FP32", "TF32"))
    assert calibrate("others") == not_reused("it was made from other precision (TF32 then, FP32 now)")
    record.unlink()
    assert calibrate("others") == not_reused(
        "nothing tells what it was made from: its record, x.cache.json, is missing"
    )
    cache.write_text("garbage")
    assert calibrate("others") == not_reused("x.cache is not a TensorRT calibration cache: its first line is 'garbage'")


def test_the_old_cache_is_kept_when_the_new_one_fails(trt_bindings):
    serve(fastcal.EntropyCalibrator2(Numbered(), cache="x.cache"))
    before = Path("x.cache").read_bytes()
    serve(fastcal.EntropyCalibrator2(Numbered(error=OSError(), samples="others"), cache="x.cache"))
    assert Path("x.cache").read_bytes() == before
    one = fastcal.EntropyCalibrator2(Numbered(samples="others"), cache="x.cache")
    one.read_calibration_cache()
    one.get_batch(["a", "b"])
    one.write_calibration_cache(b"TRT-101601-EntropyCalibration2\na: 0\n")  # a builder that stops after one batch
    assert Path("x.cache").read_bytes() == before


def test_a_cache_that_cannot_be_written_is_an_error_before_the_first_batch(trt_bindings):
    calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="nowhere/x.cache")
    assert serve(calibrator) == []
    with pytest.raises(FastcalError, match=r"^cannot write nowhere/x.cache: there is no folder"):
        calibrator.check()


def test_a_folder_that_is_gone_at_the_end_fails_the_calibration(trt_bindings):
    Path("here").mkdir()
    calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="here/x.cache")
    assert len(serve(calibrator, write=False)) == 3
    Path("here").rmdir()
    calibrator.write_calibration_cache(b"TRT-101601-EntropyCalibration2\na: 0\n")
    with pytest.raises(FastcalError, match=r"^cannot write here/x.cache: there is no folder"):
        calibrator.check()


def test_progress_counts_the_batches_that_tensorrt_has_finished(trt_bindings):
    reports, seen = [], []
    calibrator = fastcal.EntropyCalibrator2(Numbered(count=3), progress=reports.append)
    calibrator.read_calibration_cache()
    while calibrator.get_batch(["a", "b"]):
        seen.append((calibrator.stats.batches, len(reports)))
        time.sleep(0.05)
    assert seen == [(1, 0), (2, 1), (3, 2)]
    assert [(state.batches, state.images, state.total) for state in reports] == [(1, 4, 3), (2, 8, 3), (3, 12, 3)]
    assert all(state.waited > 0 for state in reports)
    assert all(state.seconds - state.waited >= 0.05 * state.batches for state in reports)  # the builder's time


def test_the_longest_wait_is_that_of_a_later_call(trt_bindings):
    class Slow(Numbered):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                time.sleep((0.2, 0.01, 0.05)[number])
                yield batch

    calibrator = fastcal.EntropyCalibrator2(Slow())
    assert len(addresses(calibrator)) == 3
    stats = calibrator.stats
    assert stats.waited_first >= 0.2
    assert 0.05 <= stats.waited_worst < stats.waited - stats.waited_first


def test_an_error_in_the_progress_report_is_an_error_of_the_calibration(trt_bindings):
    error = OSError("no terminal")

    def report(state):
        raise error

    calibrator = fastcal.EntropyCalibrator2(Numbered(), progress=report)
    assert len(serve(calibrator)) == 1
    with pytest.raises(OSError, match=r"^no terminal$") as raised:
        calibrator.check()
    assert raised.value is error


def test_batches_that_fail_where_tensorrt_asks_for_their_size(trt_bindings):
    def batches():
        raise OSError("no such host")
        yield

    calibrator = fastcal.EntropyCalibrator2(batches())
    assert (calibrator.get_batch_size(), calibrator.get_batch(["a"])) == (1, None)
    with pytest.raises(OSError, match=r"^no such host$"):
        calibrator.check()


def test_a_pass_that_another_pass_ends_is_incomplete(trt_bindings):
    feed = fastcal.ArrayFeed(lambda: ({"a": np.ones((2, 3), "f4")} for _ in range(5)), device="cpu")
    calibrator = fastcal.EntropyCalibrator2(feed)
    calibrator._handout._on_device = lambda name, array: OnDevice(1, array.shape)  # as if there were a GPU
    assert (calibrator.get_batch_size(), calibrator.get_batch(["a"])) == (2, [1])
    next(iter(feed))
    addresses(calibrator, ["a"])
    cut_off = "the pass was cut off: its feed was closed, or another pass begun, before this one had come to its end"
    with pytest.raises(FastcalError, match=f"^{cut_off}$"):
        calibrator.check()
    calibrator.rewind()
    assert len(addresses(calibrator, ["a"])) == 5
    calibrator.check()
    assert len(feed) == 5


def test_a_calibrator_by_the_name_of_its_algorithm(trt_bindings):
    from fastcal.calibrators import make_calibrator

    names = [name for name in ALGORITHMS if name != "best"]
    made = {name: make_calibrator(Algorithm.of(name, 0.25), Numbered(), cache="x.cache") for name in names}
    assert {name: calibrator.get_algorithm().name for name, calibrator in made.items()} == {
        "entropy2": "ENTROPY_CALIBRATION_2",
        "entropy": "ENTROPY_CALIBRATION",
        "minmax": "MINMAX_CALIBRATION",
        "percentile": "LEGACY_CALIBRATION",
        "mse": "ENTROPY_CALIBRATION_2",
    }
    quantiles = {name: made[name].get_quantile() for name in made if hasattr(made[name], "get_quantile")}
    assert quantiles == {"percentile": 0.25}
    with pytest.raises(FastcalError, match="no calibrator has algorithm best, which runs the network in INT8: take"):
        make_calibrator(Algorithm("best"), Numbered())
    with pytest.raises(
        FastcalError, match=r"^quantile 2.0 is not in \(0, 1\]; 0.9999 clips one value in ten thousand$"
    ):
        fastcal.LegacyCalibrator(Numbered(), quantile=2.0)


class Counted(fastcal.Feed):
    """Two batches; counts how often it described them."""

    batch_size = 4
    looked = passes = 0

    def __len__(self):
        return 2

    def __iter__(self):
        self.passes += 1
        return iter([{"x": np.linspace(-1, 3, 12, dtype="f4").reshape(4, 3) * scale} for scale in (1, 2)])

    def describe(self):
        self.looked += 1
        return {"samples": "same"}


@pytest.mark.parametrize(
    ("kind", "algorithm", "exact", "options"),
    [
        ("EntropyCalibrator2", "entropy2", True, {}),
        ("EntropyCalibrator2", "entropy2", False, {}),
        ("MinMaxCalibrator", "minmax", False, {}),
        ("LegacyCalibrator", "percentile", False, {"quantile": 0.9}),
    ],
)
def test_a_calibration_by_fastcal_describes_the_feed_once_and_is_handed_over(
    trt_bindings, on_a_cpu, onnx_file, kind, algorithm, exact, options
):
    model = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }")
    Path("x.cache").write_text("another calibration's")
    feed, reports = Counted(), []
    kind = getattr(fastcal, kind)
    with kind(feed, cache="x.cache", model=model, progress=reports.append, **options) as calibrator:
        calibrator.calibrate(model, exact=exact)
        assert feed.looked == 1
        served = serve(calibrator)
    version = trt_bindings.__version__
    expected = fastcal.calibrate(
        model, feed, algorithm=algorithm, exact=exact, backend="onnxruntime", tensorrt_version=version, **options
    )
    assert served == Path("x.cache").read_bytes() == expected.to_bytes()
    passes = feed.passes
    with calibrator:
        calibrator.calibrate(model, exact=exact)  # the cache is up to date
        assert serve(calibrator) == served
    with calibrator:  # of either kind, as far as TensorRT is to calibrate
        assert serve(calibrator) == served
    assert feed.passes == passes
    assert fastcal.CalibrationCache.load("x.cache").record == expected.record
    assert len(reports) == 2
    assert calibrator.stats.batches == 0


class Given(Numbered):
    """One batch, on the GPU or not, after an unreadable file."""

    batch_size, skipped, device = 4, ("bad.jpg",), False

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([{"x": OnDevice(1) if self.device else np.ones((4, 3), np.float32)}])


def test_the_record_has_the_precision_and_the_skipped_files(trt_bindings, on_a_cpu, onnx_file):
    feed = Given()
    calibrator = fastcal.EntropyCalibrator2(feed, cache="x.cache")

    def made_from(*entries):
        record = json.loads(Path("x.cache.json").read_text())["made_from"]
        return [record[name] for name in entries]

    with calibrator:
        calibrator.calibrate(onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }"), tf32=True)
        serve(calibrator, ["x"])
    assert made_from("precision", "skipped", "samples") == ["TF32", ["bad.jpg"], "same"]
    feed.device = True
    with calibrator:  # TensorRT calibrates
        assert len(serve(calibrator, ["x"])) == 1
    assert made_from("precision", "skipped", "samples") == ["FP32", ["bad.jpg"], "same"]
    feed.sample_digest = "others"
    with calibrator:
        assert len(serve(calibrator, ["x"])) == 1
    assert made_from("samples") == ["others"]


def test_legacy_calibration_with_a_regression_is_left_to_tensorrt(trt_bindings, caplog):
    caplog.set_level(logging.INFO)
    with fastcal.LegacyCalibrator(Numbered(), regression_cutoff=0.5) as calibrator:
        calibrator.calibrate("no such model")
        assert len(serve(calibrator)) == 3
    assert caplog.messages == [
        "TensorRT calibrates itself: Legacy calibration is a plain percentile with regression cutoff 1 only"
    ]


def test_a_dynamic_input_is_read_in_the_shape_its_calibration_profile_is_tuned_for(trt_bindings):
    profile = SimpleNamespace(get_shape=lambda name: [(1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)])
    config = SimpleNamespace(get_calibration_profile=lambda: profile)

    def network(name, shape):
        value = SimpleNamespace(name=name, shape=shape, dtype=trt_bindings.float32)
        return SimpleNamespace(num_inputs=1, get_input=lambda index: value)

    calibrator = fastcal.EntropyCalibrator2(Numbered(names=("a",)))
    calibrator.check_network(network("a", (-1, 3, 8, 8)), config)
    assert len(serve(calibrator, ["a"])) == 3
    calibrator.check()
    calibrator.check_network(network("b", (2, 3, 8, 8)), config)
    calibrator.check_network(network("a", (2, 3, 8, 8)), config)
    with calibrator:
        pass
    assert serve(calibrator, ["a"]) == []
    with pytest.raises(
        DataError,
        match=r"^TensorRT reads input 'a' as \(2, 3, 8, 8\), the batches are \(4, 3, 8, 8\); give batches, or a "
        "calibration profile, of that shape$",
    ):
        calibrator.check()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            OnDevice(1, strides=(1, 2, 3, 4)),
            "input 'a' is not contiguous in memory; TensorRT reads it as if it were",
        ),
        (
            OnDevice(1, shape=(2, 3, 8, 8)),
            "TensorRT reads input 'a' as (4, 3, 8, 8), the batches are (2, 3, 8, 8); give batches, or a calibration "
            "profile, of that shape",
        ),
    ],
)
def test_arrays_that_tensorrt_would_read_wrongly(trt_bindings, array, message):
    class Second(Numbered):
        def __iter__(self):
            return iter([{"a": OnDevice(1)}, {"a": array}])

    calibrator = fastcal.EntropyCalibrator2(Second())
    assert calibrator.get_batch(["a"]) == [1]
    assert calibrator.get_batch(["a"]) is None
    with pytest.raises(DataError) as raised:
        calibrator.check()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "raise ImportError('no libnvinfer')",
            "need TensorRT 8.6 to 10.16, which cannot be imported (no libnvinfer)",
        ),
        (
            "__version__ = '11.4.0'\nILogger = object",
            "TensorRT 11.4.0 has no calibrators (gone from 11.0): calibrate with fastcal calibrate",
        ),
    ],
)
def test_without_tensorrt_or_with_one_that_has_no_calibrators(tmp_path, monkeypatch, content, message):
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "fastcal.calibrators"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(fastcal.FastcalError) as raised:
        fastcal.EntropyCalibrator2  # noqa: B018 - imports it
    assert message in str(raised.value)
    if "tensorrt" in sys.modules:
        forget_modules_on(sys.modules.pop("tensorrt"))


class Smaller(fastcal.Feed):
    """Batches of two samples, the last one of one; `may_end_smaller` as given."""

    batch_size, samples = 2, 3

    def __init__(self, may_end_smaller, sizes=(2, 1)):
        self.is_smaller, self.sizes = may_end_smaller, sizes

    @property
    def may_end_smaller(self):
        return self.is_smaller

    def __len__(self):
        return len(self.sizes)

    def samples_of(self, batch):
        return len(batch["a"])

    def __iter__(self):
        for number, size in enumerate(self.sizes):
            first = 10 * number
            yield {"a": np.arange(first, first + size, dtype="f4").reshape(size, 1), "b": np.ones((5, 1), "f4")}


@pytest.mark.parametrize(
    ("sizes", "expected"), [((2, 1), [[0, 1], [10, 0]]), ((2, 2), [[0, 1], [10, 11]]), ((1,), [[0, 0, 0]])]
)
def test_tensorrt_reads_whole_batches(trt_bindings, monkeypatch, caplog, sizes, expected):
    caplog.set_level(logging.INFO)
    read = []

    def upload(array, name, kept):
        read.append((name, array.ravel().tolist()))
        return OnDevice(len(read), array.shape)

    monkeypatch.setattr("fastcal.handout.upload", upload)  # for want of a GPU
    feed = Smaller(True, sizes)
    feed.batch_size = len(expected[0])
    calibrator = fastcal.EntropyCalibrator2(feed)
    assert len(serve(calibrator)) == len(sizes)
    calibrator.check()
    assert read == [pair for values in expected for pair in (("a", values), ("b", [1.0] * 5))]
    assert calibrator.stats.images == sum(sizes)
    assert ("it is completed with the first" in caplog.text) == (sizes != (2, 2))


def test_a_smaller_batch_of_another_feed_is_an_error(trt_bindings, monkeypatch):
    monkeypatch.setattr("fastcal.handout.upload", lambda array, name, kept: OnDevice(1, array.shape))
    calibrator = fastcal.EntropyCalibrator2(Smaller(False))
    assert len(serve(calibrator)) == 1
    with pytest.raises(DataError, match=r"TensorRT reads input 'a' as \(2, 1\), the batches are \(1, 1\)"):
        calibrator.check()


def test_feeds_say_whether_their_last_batch_may_be_smaller(onnx_file, tmp_path):
    model = onnx_file("f (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = Relu(x) }")
    np.save(tmp_path / "x.npy", np.zeros((6, 3, 8, 8), "f4"))
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    images = str(tmp_path / "*.png")
    for kind, data in ((fastcal.ImageFeed, images), (fastcal.NumpyFeed, tmp_path / "x.npy")):
        sizes = {size: kind(data, model=model, batch_size=size, device="cpu").may_end_smaller for size in (3, 4, 9)}
        assert sizes == {3: False, 4: True, 9: False}
        assert not kind(data, model=model, batch_size=4, last_batch="wrap", device="cpu").may_end_smaller
    assert fastcal.ImageFeed(images, model=model, batch_size=3, skip_unreadable=True, device="cpu").may_end_smaller
