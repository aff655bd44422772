"""DALI pipelines of the caller's own, on the CPU. On a GPU they are in test_arrays_gpu.py."""

import threading

import numpy as np
import pytest

from conftest import DIGITS
from fastcal import ArrayFeed, FastcalError, ImageFeed, calibrate

dali = pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, types  # noqa: E402

IMAGES = sorted(map(str, (DIGITS / "images").rglob("*.jpg")))[:50]


@dali.pipeline_def(num_threads=2, device_id=None)
def prepared(shards=1, shard=0, pad=False, stick=False):
    """Images as ImageFeed prepares them with "unit", and their numbers."""
    encoded, numbers = fn.readers.file(
        files=IMAGES, labels=list(range(len(IMAGES))), num_shards=shards, shard_id=shard, pad_last_batch=pad,
        stick_to_shard=stick, name="images",
    )  # fmt: skip
    images = fn.resize(fn.decoders.image(encoded), size=(16, 16), antialias=True)
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, std=[255.0] * 3), numbers


@dali.pipeline_def(num_threads=1, device_id=None, batch_size=2)
def external(source, cycle=None):
    return fn.external_source(source=source, batch=True, cycle=cycle)


def numbers(feed):
    return [batch["number"].ravel().tolist() for batch in feed]


def test_outputs_go_to_the_inputs_in_their_order_and_what_is_left_over_is_left_out():
    with ImageFeed(IMAGES, preprocess=_unit(), batch_size=10, device="cpu") as feed:
        expected = [batch["input"].copy() for batch in feed]
    for names, name in ((["image"], "image"), (None, "input"), ({0: "x"}, "x")):
        feed = ArrayFeed(prepared(batch_size=10), names)
        assert len(feed) == 5
        for batch, images in zip(feed, expected, strict=True):
            assert batch.keys() == {name}
            assert np.abs(batch[name] - images).max() < 1 / 255
    (first, *_) = numbers(ArrayFeed(prepared(batch_size=10), {1: "number"}))
    assert first == list(range(10))


def _unit():
    from fastcal import Preprocess

    return Preprocess(size=(16, 16), scale=1 / 255)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    ("last_batch", "last"), [("wrap", [48, 49, *range(14)]), ("keep", [48, 49]), ("drop", list(range(32, 48)))]
)
def test_an_epoch_has_every_sample_once(pad, last_batch, last):
    feed = ArrayFeed(prepared(batch_size=16, pad=pad), {1: "number"}, last_batch=last_batch)
    found = numbers(feed)
    assert found[:3] == [list(range(start, start + 16)) for start in (0, 16, 32)]
    assert found[-1] == last
    assert len(feed) == len(found)


@pytest.mark.parametrize(
    ("shards", "shard", "expected"), [(3, 0, range(16)), (3, 1, range(16, 33)), (3, 2, range(33, 50))]
)
def test_a_shard_is_an_epoch(shards, shard, expected):
    pipeline = prepared(batch_size=4, shards=shards, shard=shard, stick=True)
    found = numbers(ArrayFeed(pipeline, {1: "number"}, last_batch="keep"))
    assert [number for batch in found for number in batch] == list(expected)


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"batch_size": 10}, True),
        ({"batch_size": 16, "pad": True}, True),
        ({"batch_size": 16}, False),  # its last batch has begun the next epoch
        ({"batch_size": 16, "pad": True, "shards": 2, "stick": True}, True),
        ({"batch_size": 16, "pad": True, "shards": 2}, False),  # the next epoch is the other shard's
    ],
)
def test_a_second_pass_is_the_same_or_an_error(options, again):
    feed = ArrayFeed(prepared(**options), {1: "number"})
    first = numbers(feed)
    if again:
        assert numbers(feed) == numbers(feed) == first
    else:
        with pytest.raises(FastcalError, match=r"stands in the middle of an epoch.*give ArrayFeed the function"):
            numbers(feed)
    feed = ArrayFeed(lambda: prepared(**options), {1: "number"})
    assert numbers(feed) == numbers(feed) == first


def test_a_pass_left_midway_leaves_the_pipeline_there():
    feed = ArrayFeed(prepared(batch_size=10), {1: "number"})
    next(iter(feed))
    with pytest.raises(FastcalError, match="stands in the middle of an epoch"):
        numbers(feed)
    feed = ArrayFeed(lambda: prepared(batch_size=10), {1: "number"})
    next(iter(feed))
    assert [len(batch) for batch in numbers(feed)] == [10] * 5


def test_sources_end_the_epoch_of_a_pipeline_without_readers():
    given = [np.full((size, 3), index, "f4") for index, size in enumerate((2, 2, 1))]
    feed = ArrayFeed(external(given, cycle="raise"), ["number"], last_batch="keep")
    for _ in range(2):
        for batch, expected in zip(feed, given, strict=True):
            assert np.array_equal(batch["number"], expected)
    assert len(feed) == 3


def test_a_source_that_does_not_begin_again_gives_no_second_pass():
    feed = ArrayFeed(external([np.zeros((2, 3), "f4")]), ["number"])
    assert len(numbers(feed)) == 1
    with pytest.raises(FastcalError, match="there are no batches"):
        numbers(feed)


def test_outputs_of_different_shapes_are_an_error_unless_they_are_left_out():
    @dali.pipeline_def(num_threads=1, device_id=None, batch_size=2)
    def boxes():
        def source():
            return np.zeros((2, 3), "f4"), [np.zeros((1, 4), "f4"), np.zeros((2, 4), "f4")]

        return tuple(fn.external_source(source=source, num_outputs=2, batch=True))

    assert next(iter(ArrayFeed(boxes(), ["number"])))["number"].shape == (2, 3)
    with pytest.raises(
        FastcalError, match=r"output 1 .* of different shapes, \(1, 4\) and \(2, 4\); make them one shape"
    ):
        next(iter(ArrayFeed(boxes(), ["number", "boxes"])))


def test_readers_of_different_sizes():
    @dali.pipeline_def(num_threads=1, device_id=None, batch_size=2)
    def pairs():
        left, _ = fn.readers.file(files=IMAGES[:4], name="left")
        right, _ = fn.readers.file(files=IMAGES[:6], name="right")
        return left, right

    with pytest.raises(FastcalError, match="epochs of different sizes: 'left' 4, 'right' 6 samples"):
        ArrayFeed(pairs())


def test_errors_of_the_callers_sources_come_through():
    def source(number):
        if number == 3:
            raise ZeroDivisionError("mine")
        return np.zeros((2, 3), "f4")

    batches = iter(ArrayFeed(external(source), ["number"]))
    next(batches)
    with pytest.raises(ZeroDivisionError, match="mine"):
        list(batches)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")] == []


def test_a_pipeline_calibrates_as_it_is(onnx_file):
    path = onnx_file("f (float[N, 3, 16, 16] image) => (float[N, 3, 16, 16] y) { y = Relu(image) }")
    scales = calibrate(path, prepared(batch_size=20), algorithm="minmax", backend="onnxruntime").scales
    with ImageFeed(IMAGES, preprocess=_unit(), model=path, batch_size=10, device="cpu") as feed:
        assert scales["image"] == pytest.approx(
            calibrate(path, feed, algorithm="minmax", backend="onnxruntime").scales["image"], abs=1 / 255 / 127
        )
