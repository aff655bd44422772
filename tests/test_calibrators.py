"""The calibrators on TensorRT 10.16.1's own Python bindings, without TensorRT or a GPU.

What TensorRT does with a calibrator is in test_calibrators_gpu.py.
"""

import subprocess
import sys

import pytest

PRELUDE = """
import json, logging, sys
from pathlib import Path
import numpy as np
import tensorrt as trt
import fastcal

class OnDevice:
    "An array that says it lies on a GPU; nothing here reads it."
    def __init__(self, address, shape=(4, 3, 8, 8), strides=None):
        self.shape, self.dtype = shape, np.dtype("f4")
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": "<f4", "version": 3, "strides": strides,
            "stream": None}  # nothing to wait for

class Numbered(fastcal.Feed):
    "Batches whose addresses tell which batch and which input it is."
    batch_size = 4
    def __init__(self, count=3, names=("a", "b"), error=None, says=None, samples="same"):
        self.count, self.names, self.error, self.says, self.samples = count, names, error, says or count, samples
    def __len__(self):
        return self.says
    def __iter__(self):
        for batch in range(self.count):
            yield {name: OnDevice(100 * (batch + 1) + place) for place, name in enumerate(self.names)}
        if self.error:
            raise self.error
    def describe(self):
        return {"samples": self.samples}

def serve(calibrator, names=("a", "b"), write=True):
    "What TensorRT does: returns the addresses it was given, or the cache it was."
    cache = calibrator.read_calibration_cache()
    if cache is not None:
        return cache
    given = list(iter(lambda: calibrator.get_batch(list(names)), None))
    assert calibrator.read_calibration_cache() is None  # it asks again
    if write and given:
        calibrator.write_calibration_cache(memoryview(b"TRT-101601-EntropyCalibration2\\na: 3c010a14\\n"))
    return given

def error_of(function):
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def run(run_on_bindings):
    """A function that runs a program after the prelude and returns what it printed."""

    def run(program):
        done = run_on_bindings(PRELUDE + program)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_all_five_are_instances_of_tensorrts_classes(run):
    printed = run("""
print(trt.__version__)
for name in ("EntropyCalibrator2", "EntropyCalibrator", "MinMaxCalibrator", "LegacyCalibrator"):
    calibrator = getattr(fastcal, name)(Numbered())
    assert isinstance(calibrator, getattr(trt, "IInt8" + name)) and isinstance(calibrator, trt.IInt8Calibrator)
    print(name, calibrator.get_algorithm().name, calibrator.get_batch_size())
for algorithm in trt.CalibrationAlgoType.__members__.values():
    calibrator = fastcal.Calibrator(Numbered(), algorithm=algorithm)
    assert isinstance(calibrator, trt.IInt8Calibrator)
    assert calibrator.get_algorithm() == algorithm
legacy = fastcal.LegacyCalibrator(Numbered(), quantile=0.99, regression_cutoff=0.5)
print(legacy.get_quantile(), legacy.get_regression_cutoff())
""")
    assert printed.splitlines() == [
        "10.16.1.11",
        "EntropyCalibrator2 ENTROPY_CALIBRATION_2 4",
        "EntropyCalibrator ENTROPY_CALIBRATION 4",
        "MinMaxCalibrator MINMAX_CALIBRATION 4",
        "LegacyCalibrator LEGACY_CALIBRATION 4",
        "0.99 0.5",
    ]


def test_algorithms_that_the_plain_calibrator_does_not_take(run):
    printed = run("""
legacy = trt.CalibrationAlgoType.LEGACY_CALIBRATION
print(error_of(lambda: fastcal.Calibrator(Numbered(), algorithm="entropy2")))
print(error_of(lambda: fastcal.Calibrator(Numbered(), algorithm=legacy, cache="x.cache")))
print(len(serve(fastcal.Calibrator(Numbered(), algorithm=legacy))))
""")
    assert printed.splitlines() == [
        "FastcalError: there is no algorithm 'entropy2'; give a tensorrt.CalibrationAlgoType",
        "FastcalError: a cache of Legacy calibration names its quantile: use LegacyCalibrator, or keep no cache",
        "3",
    ]


def test_a_feed_that_never_knows_its_length(run):
    printed = run("""
class Endless(Numbered):
    def __len__(self):
        raise TypeError("who knows")
for count in (3, 0):
    with fastcal.EntropyCalibrator2(Endless(count=count), cache=f"{count}.cache") as calibrator:
        print(len(serve(calibrator)), Path(f"{count}.cache").exists(), error_of(calibrator.check))
        calibrator.rewind()
""")
    assert printed.splitlines() == [
        "3 True None",
        "0 False DataError: the feed gave no batches; a calibration needs at least one",
    ]


def test_addresses_come_in_the_order_asked_for_and_again_after_the_end(run):
    printed = run("""
calibrator = fastcal.EntropyCalibrator2(Numbered())
print(serve(calibrator, ("b", "a")))
print(serve(calibrator, ("a", "b")))
print(calibrator.stats.batches, calibrator.stats.images)
calibrator.get_batch(["a", "b"])
calibrator.rewind()
print(calibrator.get_batch(["a", "b"]))
""")
    assert printed.splitlines() == [
        "[[101, 100], [201, 200], [301, 300]]",
        "[[100, 101], [200, 201], [300, 301]]",
        "3 12",
        "[100, 101]",
    ]


def test_one_nameless_array_goes_to_the_one_input(run):
    printed = run("""
from fastcal.batch import UNNAMED
feed = Numbered(count=1, names=(UNNAMED,))
print(serve(fastcal.EntropyCalibrator2(feed), ("pixels",)))
feed = Numbered(count=1, names=("input",))
calibrator = fastcal.EntropyCalibrator2(feed)
print(serve(calibrator, ("pixels",)), error_of(calibrator.check))
""")
    assert printed.splitlines()[0] == "[[100]]"
    assert printed.splitlines()[1] == (
        "[] DataError: the network takes the inputs 'pixels', the batches have 'input'; name the batches' arrays "
        "after the inputs"
    )


def test_what_goes_wrong_is_remembered_and_nothing_is_written(run, tmp_path):
    printed = run("""
for feed in (
    Numbered(error=OSError("the disk is gone")), Numbered(error=KeyboardInterrupt()), Numbered(count=2, says=5),
    Numbered(names=("a", "c")), Numbered(names=("a", "b", "c")),
):
    calibrator = fastcal.EntropyCalibrator2(feed, cache="x.cache")
    def build():
        with calibrator:
            print(len(serve(calibrator)), "batches")
    print(error_of(build))
    print(error_of(build) == error_of(calibrator.check))  # once more, with the same object
print(list(Path().iterdir()))
""")
    other_names = "DataError: the network takes the inputs 'a', 'b', the batches have 'a', {}; name the batches' arrays"
    expected = []
    for batches, error in (
        (3, "OSError: the disk is gone"),
        (3, "KeyboardInterrupt: "),
        (2, "DataError: the feed ended after 2 of 5 batches; it was to give all"),
        (0, other_names.format("'c'") + " after the inputs"),
        (0, other_names.format("'b', 'c'") + " after the inputs"),
    ):
        expected += [f"{batches} batches", error, f"{batches} batches", "True"]
    assert printed.splitlines() == [*expected, "[]"]


def test_what_came_first_is_raised_where_the_build_itself_raises(run):
    printed = run("""
def build(feed, error):
    with fastcal.EntropyCalibrator2(feed) as calibrator:
        serve(calibrator)
        raise error
for feed, error in (
    (Numbered(error=OSError("the disk is gone")), RuntimeError("no engine")),
    (Numbered(error=KeyboardInterrupt()), RuntimeError("no engine")),
    (Numbered(error=OSError("the disk is gone")), KeyboardInterrupt()),
    (Numbered(), RuntimeError("no engine")),
):
    try:
        build(feed, error)
    except BaseException as error:
        print(repr(error), repr(error.__cause__))
""")
    assert printed.splitlines() == [
        "OSError('the disk is gone') RuntimeError('no engine')",
        "KeyboardInterrupt() RuntimeError('no engine')",
        "KeyboardInterrupt() None",
        "RuntimeError('no engine') None",
    ]


def test_a_build_that_ends_before_its_cache_leaves_the_next_no_excuse(run):
    assert run("""
calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="x.cache")
assert len(serve(calibrator, write=False)) == 3
assert calibrator.read_calibration_cache() is None
calibrator.get_batch(["a", "b"])  # one of three
calibrator.write_calibration_cache(b"x")
print(calibrator.stats.batches, Path("x.cache").exists())
""").split() == ["1", "False"]


def test_a_cache_of_as_many_batches_as_it_took_is_not_that_of_all(run):
    printed = run("""
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.cache.reuse import reuse
all_of_them = Record.of(Numbered().describe(), None, algorithm="entropy2")
cache = CalibrationCache({"a": 1.0}, "entropy2", "10.16.1")
Record.of(Numbered().describe(), None, algorithm="entropy2", until_stable=1).save("x.cache", cache.to_bytes())
print(reuse("x.cache", cache.header, all_of_them)[1])
all_of_them.save("x.cache", cache.to_bytes())
print(reuse("x.cache", cache.header, all_of_them)[1] == "")
""")
    assert printed.splitlines() == [
        "it was made from other until_stable (1 then: perhaps not all batches)", "True",
    ]  # fmt: skip


def test_the_cache_is_used_only_while_it_is_true(run, tmp_path):
    printed = run("""
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
def calibrate(kind=fastcal.EntropyCalibrator2, **feed):
    with kind(Numbered(**feed), cache="x.cache") as calibrator:
        got = serve(calibrator)
    print("served" if isinstance(got, bytes) else f"calibrated with {len(got)}")
calibrate()
calibrate()
calibrate(samples="others")
calibrate(samples="others")
calibrate(fastcal.MinMaxCalibrator, samples="others")
Path("x.cache").write_text(Path("x.cache").read_text().replace("101601", "8600"))
calibrate(samples="others")
record = Path("x.cache.json").read_text()
Path("x.cache.json").write_text(record.replace("FP32", "TF32"))
calibrate(samples="others")
Path("x.cache.json").unlink()
calibrate(samples="others")
Path("x.cache").write_text("garbage")
calibrate(samples="others")
""")
    entropy2 = "TRT-101601-EntropyCalibration2"
    assert printed.splitlines() == [
        "calibrating: x.cache is not reused, there is none yet",
        "calibrated with 3",
        "x.cache is reused: it was made from the same model, samples and settings",
        "served",
        "calibrating: x.cache is not reused, it was made from other samples",
        "calibrated with 3",
        "x.cache is reused: it was made from the same model, samples and settings",
        "served",
        f"calibrating: x.cache is not reused, its header is {entropy2}, not TRT-101601-MinMaxCalibration",
        "calibrated with 3",
        f"calibrating: x.cache is not reused, its header is TRT-8600-EntropyCalibration2, not {entropy2}",
        "calibrated with 3",
        "calibrating: x.cache is not reused, it was made from other precision (TF32 then, FP32 now)",
        "calibrated with 3",
        "calibrating: x.cache is not reused, nothing tells what it was made from: its record, x.cache.json, is missing",
        "calibrated with 3",
        "calibrating: x.cache is not reused, x.cache is not a TensorRT calibration cache: its first line is 'garbage'",
        "calibrated with 3",
    ]


def test_the_old_cache_is_kept_when_the_new_one_fails(run, tmp_path):
    run("""
serve(fastcal.EntropyCalibrator2(Numbered(), cache="x.cache"))
before = Path("x.cache").read_bytes()
serve(fastcal.EntropyCalibrator2(Numbered(error=OSError(), samples="others"), cache="x.cache"))
assert Path("x.cache").read_bytes() == before
one = fastcal.EntropyCalibrator2(Numbered(samples="others"), cache="x.cache")
one.read_calibration_cache()
one.get_batch(["a", "b"])
one.write_calibration_cache(b"TRT-101601-EntropyCalibration2\\na: 0\\n")  # a builder that stops after one batch
assert Path("x.cache").read_bytes() == before
""")


def test_a_cache_that_cannot_be_written_is_found_out_before_the_work(run):
    printed = run("""
calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="nowhere/x.cache")
print(serve(calibrator), error_of(calibrator.check))
""")
    assert printed.startswith("[] FastcalError: cannot write nowhere/x.cache: there is no folder")


def test_a_folder_that_is_gone_at_the_end_fails_the_calibration(run):
    printed = run("""
Path("here").mkdir()
calibrator = fastcal.EntropyCalibrator2(Numbered(), cache="here/x.cache")
assert len(serve(calibrator, write=False)) == 3
Path("here").rmdir()
calibrator.write_calibration_cache(b"TRT-101601-EntropyCalibration2\\na: 0\\n")
print(error_of(calibrator.check))
""")
    assert printed.startswith("FastcalError: cannot write here/x.cache: there is no folder")


def test_progress_is_what_tensorrt_is_through_with(run):
    printed = run("""
reports = []
calibrator = fastcal.EntropyCalibrator2(Numbered(count=3), progress=reports.append)
import time
calibrator.read_calibration_cache()
while calibrator.get_batch(["a", "b"]):
    print(calibrator.stats.batches, [(state.batches, state.images, state.total) for state in reports])
    time.sleep(0.05)
print([(state.batches, state.images, state.total) for state in reports])
print(all(state.seconds >= 0.05 * state.batches > 0.04 > state.waited > 0 for state in reports))
""")
    assert printed.splitlines() == [
        "1 []",
        "2 [(1, 4, 3)]",
        "3 [(1, 4, 3), (2, 8, 3)]",
        "[(1, 4, 3), (2, 8, 3), (3, 12, 3)]",
        "True",
    ]


def test_an_error_in_the_progress_report_is_an_error_of_the_calibration(run):
    printed = run("""
def report(state):
    raise OSError("no terminal")
calibrator = fastcal.EntropyCalibrator2(Numbered(), progress=report)
print(len(serve(calibrator)), error_of(calibrator.check))
""")
    assert printed == "1 OSError: no terminal\n"


def test_batches_that_fail_where_tensorrt_asks_for_their_size(run):
    printed = run("""
def batches():
    raise OSError("no such host")
    yield
calibrator = fastcal.EntropyCalibrator2(batches())
print(calibrator.get_batch_size(), calibrator.get_batch(["a"]), error_of(calibrator.check))
""")
    assert printed == "1 None OSError: no such host\n"


def test_a_pass_that_another_ends_is_no_whole_one(run):
    printed = run("""
feed = fastcal.ArrayFeed(lambda: ({"a": np.ones((2, 3), "f4")} for _ in range(5)), device="cpu")
calibrator = fastcal.EntropyCalibrator2(feed)
calibrator._handout._on_device = lambda name, array: OnDevice(1, array.shape)  # as if there were a GPU
print(calibrator.get_batch_size(), calibrator.get_batch(["a"]))
next(iter(feed))
while calibrator.get_batch(["a"]):
    pass
print(error_of(calibrator.check))
calibrator.rewind()
print(len(list(iter(lambda: calibrator.get_batch(["a"]), None))), error_of(calibrator.check), len(feed))
""")
    assert printed.splitlines() == [
        "2 [1]",
        "FastcalError: the pass was cut off: its feed was closed, or another pass begun, before this one had come to "
        "its end",
        "5 None 5",
    ]


def test_a_calibrator_by_the_name_of_its_algorithm(run):
    printed = run("""
from fastcal.calibrators import make_calibrator
for algorithm in fastcal.algorithm.ALGORITHMS:
    calibrator = make_calibrator(fastcal.algorithm.Algorithm.of(algorithm, 0.25), Numbered(), cache="x.cache")
    print(algorithm, calibrator.get_algorithm().name, getattr(calibrator, "get_quantile", lambda: None)())
print(error_of(lambda: fastcal.LegacyCalibrator(Numbered(), quantile=2.0)))
""")
    assert printed.splitlines() == [
        "entropy2 ENTROPY_CALIBRATION_2 None",
        "entropy ENTROPY_CALIBRATION None",
        "minmax MINMAX_CALIBRATION None",
        "percentile LEGACY_CALIBRATION 0.25",
        "FastcalError: quantile 2.0 is not in (0, 1]; 0.9999 clips one value in ten thousand",
    ]


def test_a_calibration_of_our_own_looks_at_the_samples_once_and_is_handed_over(run, onnx_file):
    path = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }")
    printed = run(f"""
from fastcal.observe.backends import OnnxRuntimeBackend, TensorRTBackend
TensorRTBackend.observer = lambda _, network, gpu: OnnxRuntimeBackend().observer(network, gpu)  # as if on a GPU

class Counted(fastcal.Feed):
    batch_size = 4
    looked = 0
    def __len__(self):
        return 2
    def __iter__(self):
        return iter([{{"x": np.linspace(-1, 3, 12, dtype="f4").reshape(4, 3) * scale}} for scale in (1, 2)])
    def describe(self):
        self.looked += 1
        return {{"samples": "same"}}

model, version = {str(path)!r}, trt.__version__
for kind, algorithm, options in (
    (fastcal.EntropyCalibrator2, "entropy2", {{}}), (fastcal.MinMaxCalibrator, "minmax", {{}}),
    (fastcal.LegacyCalibrator, "percentile", {{"quantile": 0.9}}),
):
    Path("x.cache").write_text("another calibration's")
    feed, reports = Counted(), []
    with kind(feed, cache="x.cache", model=model, progress=reports.append, **options) as calibrator:
        calibrator.calibrate(model)
        looked = feed.looked
        served = serve(calibrator)
    options |= {{"backend": "onnxruntime", "tensorrt_version": version}}
    expected = fastcal.calibrate(model, feed, algorithm=algorithm, **options)
    assert served == Path("x.cache").read_bytes() == expected.to_bytes()
    assert fastcal.CalibrationCache.load("x.cache").record == expected.record
    print(looked, len(reports), calibrator.stats.batches)
""")
    assert printed.splitlines() == ["1 2 0"] * 3


def test_the_record_says_in_which_precision_and_what_was_left_out(run, onnx_file):
    path = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }")
    printed = run(f"""
from fastcal.observe.backends import OnnxRuntimeBackend, TensorRTBackend
TensorRTBackend.observer = lambda _, network, gpu: OnnxRuntimeBackend().observer(network, gpu)  # as if on a GPU

class Given(Numbered):
    batch_size, skipped, device = 4, ["bad.jpg"], False
    def __len__(self):
        return 1
    def __iter__(self):
        return iter([{{"x": OnDevice(1) if self.device else np.ones((4, 3), np.float32)}}])

feed = Given()
calibrator = fastcal.EntropyCalibrator2(feed, cache="x.cache")
def made_from(*entries):
    record = json.loads(Path("x.cache.json").read_text())["made_from"]
    print(*(record[name] for name in entries))
with calibrator:
    calibrator.calibrate({str(path)!r}, tf32=True)
    serve(calibrator, ["x"])
made_from("precision", "skipped", "samples")
feed.device = True
with calibrator:  # TensorRT calibrates
    print(len(serve(calibrator, ["x"])))
made_from("precision", "skipped", "samples")
feed.samples = "others"
with calibrator:
    print(len(serve(calibrator, ["x"])))
made_from("samples")
""")
    assert printed.splitlines() == [
        "TF32 ['bad.jpg'] same", "1", "FP32 ['bad.jpg'] same", "1", "others",
    ]  # fmt: skip


def test_legacy_calibration_with_a_regression_is_left_to_tensorrt(run):
    printed = run("""
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with fastcal.LegacyCalibrator(Numbered(), regression_cutoff=0.5) as calibrator:
    calibrator.calibrate("no such model")
    print(len(serve(calibrator)))
""")
    assert printed.splitlines() == [
        "TensorRT calibrates itself: Legacy calibration is a plain percentile with regression cutoff 1 only", "3",
    ]  # fmt: skip


def test_a_dynamic_input_is_read_in_the_shape_its_calibration_profile_is_tuned_for(run):
    printed = run("""
from types import SimpleNamespace
profile = SimpleNamespace(get_shape=lambda name: [(1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)])
config = SimpleNamespace(get_calibration_profile=lambda: profile)
network = SimpleNamespace(
    num_inputs=1, get_input=lambda index: SimpleNamespace(name="a", shape=(-1, 3, 8, 8), dtype=trt.float32))
calibrator = fastcal.EntropyCalibrator2(Numbered(names=("a",)))
calibrator.check_network(network, config)
print(len(serve(calibrator, ["a"])), error_of(calibrator.check))
network.get_input = lambda index: SimpleNamespace(name="b", shape=(2, 3, 8, 8), dtype=trt.float32)
calibrator.check_network(network, config)
network.get_input = lambda index: SimpleNamespace(name="a", shape=(2, 3, 8, 8), dtype=trt.float32)
calibrator.check_network(network, config)
with calibrator:
    pass
print(serve(calibrator, ["a"]), error_of(calibrator.check))
""")
    assert printed.splitlines() == [
        "3 None",
        "[] DataError: TensorRT reads input 'a' as (2, 3, 8, 8), the batches are (4, 3, 8, 8); give batches, or a "
        "calibration profile, of that shape",
    ]


def test_arrays_that_tensorrt_would_read_wrongly(run):
    printed = run("""
class Given(Numbered):
    def __iter__(self):
        return iter([{"a": OnDevice(1)}, {"a": self.names}])
for array in (OnDevice(1, strides=(1, 2, 3, 4)), OnDevice(1, shape=(2, 3, 8, 8))):
    calibrator = fastcal.EntropyCalibrator2(Given(names=array))
    assert calibrator.get_batch(["a"]) == [1]
    assert calibrator.get_batch(["a"]) is None
    print(error_of(calibrator.check))
""")
    assert printed.splitlines() == [
        "DataError: input 'a' is not contiguous in memory; TensorRT reads it as if it were",
        "DataError: TensorRT reads input 'a' as (4, 3, 8, 8), the batches are (2, 3, 8, 8); give batches, or a "
        "calibration profile, of that shape",
    ]


def test_without_tensorrt_or_with_one_that_has_no_calibrators(tmp_path):
    for content, message in (
        ("raise ImportError('no libnvinfer')", "need TensorRT 8.6 to 10.16, which cannot be imported (no libnvinfer)"),
        (
            "__version__ = '11.4.0'",
            "TensorRT 11.4.0 has no calibrators (gone from 11.0): calibrate with fastcal calibrate",
        ),
    ):
        (tmp_path / "tensorrt.py").write_text(content)
        program = "import fastcal\ntry: fastcal.EntropyCalibrator2\nexcept fastcal.FastcalError as error: print(error)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert message in done.stdout
