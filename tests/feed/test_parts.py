"""Parts of feeds, as workers on other machines get them: the same batches, pickled on the way."""

import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fastcal
from conftest import DIGITS, is_unnamed
from fastcal.feed.image_plan import Decoding


def arrays(count):
    return [np.random.default_rng(number).standard_normal((3, 2), dtype="f4") for number in range(count)]


def with_a_short_last(make=lambda array: array):
    return [make(array) for array in [*arrays(4), arrays(5)[-1][:1]]]


def numpy_files(tmp_path, **options):
    for number, array in enumerate(arrays(4)):
        np.save(tmp_path / f"{number}.npy", array)
    return fastcal.NumpyFeed(tmp_path, batch_size=5, shuffle=True, device="cpu", **options)


def images(**options):
    return fastcal.ImageFeed(DIGITS / "images", preprocess="unit", batch_size=3, limit=13, device="cpu", **options)


def mixed_formats(tmp_path):
    listed = sorted((DIGITS / "images").rglob("*.jpg"))[:9]
    for number, path in enumerate(listed):  # the second batch has a format that DALI must not read
        Image.open(path).save(tmp_path / f"{number}.{'ppm' if number == 4 else 'png'}")
    return fastcal.ImageFeed(tmp_path, preprocess="unit", batch_size=3, device="cpu")


def images_and_arrays(tmp_path):
    listed = sorted((DIGITS / "images").rglob("*.jpg"))[:7]
    for number in range(7):
        np.save(tmp_path / f"{number}.npy", np.float32([number, 1]))
        Image.open(listed[number]).save(tmp_path / f"{number}.tif")  # a format that DALI decodes with another library
    data = {"picture": str(tmp_path / "*.tif"), "numbers": str(tmp_path / "*.npy")}
    return fastcal.ImageFeed(data, preprocess="unit", batch_size=3, shuffle=True, device="cpu")


def shards(tmp_path):
    listed = sorted((DIGITS / "images").rglob("*.jpg"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for path in listed[number * 4 :][:4]:
                shard.add(path, path.name)
    return fastcal.ImageFeed(tmp_path, preprocess="unit", batch_size=3, shuffle=True, device="cpu")


FEEDS = {
    "nameless arrays, wrapped": lambda tmp_path: fastcal.ArrayFeed(with_a_short_last(), device="cpu"),
    "arrays, wrapped": lambda tmp_path: fastcal.ArrayFeed(with_a_short_last(lambda x: {"a": x, "b": x}), device="cpu"),
    "arrays, kept": lambda tmp_path: fastcal.ArrayFeed(
        with_a_short_last(lambda x: (x, 2 * x, "label")), ["a", "b"], last_batch="keep", device="cpu"
    ),
    "one batch": lambda tmp_path: fastcal.ArrayFeed(arrays(1), ["a"], device="cpu"),
    "files, wrapped": numpy_files,
    "files, kept": lambda tmp_path: numpy_files(tmp_path, last_batch="keep"),
    "images, wrapped": lambda tmp_path: images(shuffle=True, constants={"k": np.ones(2)}),
    "images and arrays": images_and_arrays,
    "mixed formats": mixed_formats,
    "shards": shards,
    "images, dropped": lambda tmp_path: images(last_batch="drop"),
}


def copied(feed):
    return [{name: np.array(array) for name, array in batch.items()} for batch in feed]


@pytest.mark.parametrize("name", FEEDS)
def test_parts_have_the_batches_of_the_whole(tmp_path, name):
    with FEEDS[name](tmp_path) as feed:
        whole = copied(feed)
        for start in range(len(feed)):
            for stop in range(start + 1, len(feed) + 1):
                with pickle.loads(pickle.dumps(feed.part(range(start, stop), gpu=None, threads=1))) as part:
                    assert len(part) == stop - start
                    for found, expected in zip(copied(part), whole[start:stop], strict=True):
                        assert found.keys() == expected.keys()
                        assert is_unnamed(found) == is_unnamed(expected)
                        for key in expected:
                            assert found[key].dtype == expected[key].dtype
                            np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("name", FEEDS)
def test_a_feed_is_pickled_as_its_plan(tmp_path, name):
    with FEEDS[name](tmp_path) as feed:
        whole = copied(feed)
        next(iter(feed))  # neither a pass under way nor its buffers travel
        with pickle.loads(pickle.dumps(feed)) as other:
            assert type(other) is type(feed)
            assert other.describe() == feed.describe()
            assert (other.batch_size, other.samples, other.shapes()) == (feed.batch_size, feed.samples, feed.shapes())
            for found, expected in zip(copied(other), whole, strict=True):
                np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("name", FEEDS)
def test_a_part_goes_on_with_what_an_earlier_one_has_left(tmp_path, name):
    with FEEDS[name](tmp_path) as feed, FEEDS[name](tmp_path) as same:
        whole = copied(same)
        parts = [feed.part(range(start, len(whole)), gpu=None, threads=1) for start in range(min(len(whole), 3))]
        earlier = None
        for start, part in enumerate(parts):
            if earlier is not None:
                left = getattr(earlier._passes, "pipeline", None)
                part.take_over(earlier)
                is_fed_otherwise = name == "mixed formats" and start == 2
                assert getattr(part._passes, "pipeline", None) is (None if is_fed_otherwise else left)
            pipeline = getattr(part._passes, "pipeline", None)
            buffers = part._buffers
            for found, expected in zip(copied(part), whole[start:], strict=True):
                np.testing.assert_equal(found, expected)
            assert earlier is None or part._buffers is buffers
            assert pipeline is None or part._passes.pipeline is pipeline
            earlier = part


@pytest.mark.parametrize("ahead", [2, 3, 5])
def test_parts_of_any_length_use_one_pipeline(monkeypatch, ahead):
    monkeypatch.setattr(Decoding, "ahead", ahead)  # as on a GPU
    whole = copied(images())
    earlier = None
    for batches in (range(1), range(1, 5), range(4, 5), range(1, 3), range(5)):
        part = images().part(batches, gpu=None, threads=1)
        if earlier is not None:
            pipeline = earlier._passes.pipeline
            part.take_over(earlier)
        found = copied(part)
        np.testing.assert_equal(found, whole[batches.start : batches.stop])
        assert part._passes.pipeline.ahead == ahead
        assert earlier is None or part._passes.pipeline is pipeline
        earlier = part


def test_a_part_has_the_threads_of_its_machine_unless_the_feed_was_told():
    def threads(part):
        return part._plan.thread_count

    assert threads(images().part(range(1), gpu=None, threads=3)) == 3
    assert images().part(range(1), gpu=0, threads=30).gpu is None  # it was to be on the CPU
    assert threads(images(threads=2).part(range(1), gpu=None, threads=3)) == 2
    on_any = fastcal.ImageFeed(DIGITS / "images", hw_decoder_load=0.9).part(range(1), gpu=0, threads=30)
    assert (on_any.gpu, threads(on_any)) == (0, 8)


@pytest.mark.parametrize("batches", [lambda: iter(arrays(2)), iter(arrays(2)), set()])
def test_what_is_no_list_cannot_be_divided(batches):
    with pytest.raises(fastcal.FastcalError, match="batches that are no list cannot be divided among workers"):
        fastcal.ArrayFeed(batches, device="cpu").part(range(1), gpu=None, threads=1)


def test_what_depends_on_batches_before_cannot_be_divided():
    with pytest.raises(fastcal.FastcalError, match="leave skip_unreadable or workers out"):
        images(skip_unreadable=True).part(range(1), gpu=None, threads=1)


def test_a_part_of_batches_that_share_memory_has_its_own_copies():
    class Reused(Sequence):
        memory = np.zeros((2, 1), "f4")

        def __len__(self):
            return 3

        def __getitem__(self, number):
            self.memory[:] = range(3)[number]
            return self.memory

    part = fastcal.ArrayFeed(Reused(), ["x"], device="cpu").part(range(1, 3), gpu=None, threads=1)
    assert [batch["x"].tolist() for batch in part] == [[[1], [1]], [[2], [2]]]


@pytest.mark.parametrize("name", ["files, wrapped", "arrays, wrapped"])
def test_parts_of_arrays_stay_in_host_memory(tmp_path, name):
    on_gpu = replace(FEEDS[name](tmp_path)._plan, gpu=0)
    assert on_gpu.part(range(1), gpu=0, threads=1).gpu is None


def test_a_part_carries_no_file_that_is_open(tmp_path):
    np.save(tmp_path / "all.npy", np.zeros((100, 1000)))
    with fastcal.NumpyFeed(tmp_path, batch_size=4, device="cpu") as feed:
        next(iter(feed))
        assert len(pickle.dumps(feed.part(range(1), gpu=None, threads=1))) < 10_000


def test_a_part_for_a_gpu_carries_its_own_samples_alone():
    paths = sorted(map(str, (DIGITS / "images").rglob("*.jpg"))) * 100
    feed = fastcal.ImageFeed(paths, preprocess="unit", batch_size=4)
    assert len(pickle.dumps(feed.part(range(1), gpu=0, threads=1))) < 10_000
