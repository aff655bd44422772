"""Batches whose tensors do not fit the memory together."""

import logging

import numpy as np
import pytest

import fastcal
from conftest import DIGITS
from fastcal import FastcalError, memory
from fastcal.cli.options import read_memory
from fastcal.model import Model
from fastcal.observe.segments import cut
from fastcal.observe.with_onnxruntime import OnnxRuntimeObserver, OnnxRuntimeRunner, PartedRunner

MODEL = DIGITS / "digits.onnx"


@pytest.fixture
def batches():
    random = np.random.default_rng(0)
    return [{"image": random.standard_normal((7, 3, 32, 32), dtype="f4") * (1 + number)} for number in range(3)]


def test_sizes_are_those_of_the_arrays(batches):
    with OnnxRuntimeRunner(Model(MODEL)) as runner:
        values = runner.run(batches[0])
        expected = {name: values[name].nbytes for name in runner.activations}
    sizes = Model(MODEL).sizes({"image": (7, 3, 32, 32)})
    assert {name: sizes[name] for name in expected} == expected


def test_sizes_that_depend_on_the_data_are_not_known(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[M, 2] y) { i = NonZero(x) j = Transpose(i) y = Cast<to = 1>(j) }")
    assert Model(path).sizes({"x": (3, 2)}) == {}


def test_segments_see_what_the_whole_does(batches, caplog):
    found = []
    largest = max(Model(MODEL).sizes({"image": (7, 3, 32, 32)}).values())
    for most in (None, 3 * largest, 1):
        with caplog.at_level(logging.WARNING, "fastcal"), OnnxRuntimeObserver(Model(MODEL), memory=most) as observer:
            for batch in batches:
                observer.observe(batch)
            found.append(observer.histograms())
    assert list(found[0]) == list(found[1]) == list(found[2])
    for name, histogram in found[0].items():
        assert found[1][name].counts.tolist() == found[2][name].counts.tolist() == histogram.counts.tolist(), name
    assert not caplog.records


def test_a_tensor_that_does_not_fit_by_itself_is_named(batches, monkeypatch):
    monkeypatch.setattr("fastcal.observe.with_onnxruntime.free_memory", lambda: 1000)
    message = r"tensor '/0/Conv_output_0' of a batch takes .* of the memory may be used; use a smaller batch size"
    with OnnxRuntimeObserver(Model(MODEL)) as observer, pytest.raises(FastcalError, match=message):
        observer.observe(batches[0])


def test_batches_of_several_sizes_in_segments(batches):
    small = max(Model(MODEL).sizes({"image": (2, 3, 32, 32)}).values())
    with OnnxRuntimeObserver(Model(MODEL), memory=8 * small) as observer:
        for batch in (batches[0], {"image": batches[1]["image"][:2]}, batches[2]):
            observer.observe(batch)
        counted = int(observer.histograms()["image"].counts.sum())
    assert counted == 16 * 3 * 32 * 32


def test_free_memory_is_that_of_the_machine_or_less():
    free = memory.free_memory()
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < free <= total


@pytest.mark.parametrize(("limit", "expected"), [("1000", [670]), ("max", [])])
def test_a_control_group_allows_what_is_left_and_what_is_only_cached(tmp_path, limit, expected):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 50\nactive_file 20\n")
    names = ("memory.max", "memory.current", "")
    assert list(memory._allowance(tmp_path, *names)) == expected
    assert list(memory._allowance(tmp_path / "none", *names)) == []


def test_a_calibration_that_has_little_memory_finds_the_same_scales(batches, monkeypatch):
    calm = fastcal.calibrate(MODEL, batches, backend="onnxruntime").scales
    largest = max(Model(MODEL).sizes({"image": (7, 3, 32, 32)}).values())
    for free in (int(largest / memory.SHARE) + 1, largest):
        monkeypatch.setattr("fastcal.observe.with_onnxruntime.free_memory", lambda free=free: free)
        assert fastcal.calibrate(MODEL, batches, backend="onnxruntime").scales == calm
    monkeypatch.setattr("fastcal.observe.with_onnxruntime.free_memory", lambda: largest - 1)
    with pytest.raises(FastcalError, match="of the memory may be used; use a smaller batch size"):
        fastcal.calibrate(MODEL, batches, backend="onnxruntime")


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ({"a": 2, "b": 2, "c": 2}, 4, [["a", "b"], ["c"]]),
        ({"a": 3, "b": 2, "c": 1}, 4, [["a"], ["b", "c"]]),
        ({"a": 4, "b": 0}, 4, [["a", "b"]]),
        ({}, 4, [[]]),
    ],
)
def test_groups_are_as_few_as_fit_in_order(sizes, most, expected):
    assert memory.groups(sizes, most, "the memory") == expected


def test_what_would_not_fit_is_said_before_it_is_begun(monkeypatch, photographs):
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    feed = fastcal.ImageFeed(photographs, batch_size=4, device="cpu", depth=3)
    message = r"3 batches of 4 samples take 0.0 GiB of memory, and 0.0 GiB are free; use a smaller batch size, or make"
    with feed, pytest.raises(FastcalError, match=message):
        next(iter(feed))
    with fastcal.ImageFeed(photographs, batch_size=1, preprocess=fastcal.Preprocess(size=(100, 100))) as feed:
        assert len(fastcal.preview(feed, count=1).names) == 1
        with pytest.raises(FastcalError, match=r"6 images of 100x100 and their drawing take 0.0 GiB"):
            fastcal.preview(feed)


def test_what_just_fits_is_begun(monkeypatch, photographs):
    monkeypatch.setattr(memory, "free_memory", lambda: 3 * 4 * 3 * 100 * 100 * 4)
    preprocess = fastcal.Preprocess(size=(100, 100))
    with fastcal.ImageFeed(photographs, batch_size=4, device="cpu", depth=3, preprocess=preprocess) as feed:
        assert next(iter(feed))["input"].shape == (4, 3, 100, 100)
        feed.close()
        monkeypatch.setattr(memory, "free_memory", lambda: 3 * 4 * 3 * 100 * 100 * 4 - 1)
        with pytest.raises(FastcalError, match="3 batches of 4 samples take"):
            next(iter(feed))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("1000", 1000),
        ("2k", 2048),
        ("500M", 500 << 20),
        ("1.5GB", 3 << 29),
        ("4GiB", 4 << 30),
        ("1T", 1 << 40),
    ],
)
def test_the_option_in_bytes(text, expected):
    assert read_memory(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1", "2 G", "2X", "1e9", "inf"])
def test_the_option_that_is_no_number_of_bytes(text):
    with pytest.raises(FastcalError, match=f"--memory {text} is not a number of bytes; write 500M or 4G"):
        read_memory(text)


def test_the_setting_reaches_the_segments(batches, monkeypatch):
    asked = []
    monkeypatch.setattr("fastcal.observe.with_onnxruntime.cut", lambda *given: asked.append(given[-1]) or cut(*given))
    calm = fastcal.calibrate(MODEL, batches, backend="onnxruntime").scales
    assert asked == []
    assert fastcal.calibrate(MODEL, batches, backend="onnxruntime", memory=200_000).scales == calm
    assert asked == [200_000]


def test_by_default_a_segment_takes_two_gibibytes(monkeypatch, onnx_file):
    path = onnx_file("f (float[N] x) => (float[N] y) { a = Relu(x) b = Relu(a) y = Relu(b) }")
    asked = []
    monkeypatch.setattr("fastcal.observe.with_onnxruntime.cut", lambda *given: asked.append(given[-1]) or [])
    for free, expected in ((1 << 40, 2 << 30), (1 << 31, int(memory.SHARE * (1 << 31)))):
        monkeypatch.setattr("fastcal.observe.with_onnxruntime.free_memory", lambda free=free: free)
        with PartedRunner(Model(path)) as runner:
            runner._fit({"x": np.broadcast_to(np.float32(0), (1 << 28,))})
        assert asked.pop() == expected
