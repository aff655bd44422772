"""Going on without images that cannot be read, and what is said of them."""

import gc
import json
import logging
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

import fuzz
from conftest import DIGITS
from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.image_pass import ImagePass
from fastcal.feed.image_plan import Decoding
from fastcal.feed.pipeline import ImagePipeline
from fastcal.feed.sources import UnreadableError

SMALL = Preprocess(size=(8, 8))


def write_numbered(folder, count, broken=()):
    """Images whose every pixel is 5 times their number, some of them broken in different ways."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        path = folder / f"{number:02}.jpg"
        Image.effect_noise((64, 64), 0).point(lambda _, n=number: n * 5).save(path, quality=95)
        if number in broken:
            data = path.read_bytes()
            broken_data = [data[: len(data) - len(data) // 4], b"no image", b""][number % 3]
            path.write_bytes(broken_data)
    return folder


def numbers(batch):
    return np.rint(batch["input"].mean(axis=(1, 2, 3)) / 5).astype(int).tolist()


def feed_of(folder, **options):
    options = {
        "preprocess": SMALL,
        "batch_size": 4,
        "skip_unreadable": True,
        "max_unreadable": 50,
        "device": "cpu",
    } | options
    return ImageFeed(folder, **options)


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize(
    ("broken", "wrap", "drop"),
    [
        ({3}, [[0, 1, 2, 4], [5, 6, 7, 8], [9, 0, 1, 2]], [[0, 1, 2, 4], [5, 6, 7, 8]]),
        ({0, 1, 2, 3, 4}, [[5, 6, 7, 8], [9, 5, 6, 7]], [[5, 6, 7, 8]]),
        ({8, 9}, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({0, 9}, [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ],
)
def test_the_next_images_fill_up(tmp_path, monkeypatch, ahead, broken, wrap, drop):
    monkeypatch.setattr(Decoding, "ahead", ahead)  # as on a GPU
    write_numbered(tmp_path, 10, broken)
    for last_batch, expected in (("wrap", wrap), ("drop", drop)):
        with feed_of(tmp_path, last_batch=last_batch) as feed:
            for _ in range(3):
                assert [numbers(batch) for batch in feed] == expected
                assert len(feed) == len(expected)
                assert feed.samples == 10 - len(feed.skipped)
                assert feed.sample_names == [path for path in feed.paths if path not in feed.skipped]
            tried = broken if last_batch == "wrap" else broken - {8, 9}
            assert set(feed.skipped) >= {str(tmp_path / f"{number:02}.jpg") for number in tried}
            assert set(feed.skipped) <= {str(tmp_path / f"{number:02}.jpg") for number in broken}
        assert [numbers(batch) for batch in feed] == expected  # after closing too
        feed.close()


def test_a_pipeline_is_used_on_unless_it_was_started_near_the_end_of_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(Decoding, "ahead", 3)  # as on a GPU
    write_numbered(tmp_path, 10, {9})
    with feed_of(tmp_path, batch_size=2) as feed:
        list(feed)
        assert feed._passes.pipeline.ahead == 1
        list(feed)
        used = feed._passes.pipeline
        assert used.ahead == 3
        list(feed)
        assert feed._passes.pipeline is used


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("broken", [{3}, {0, 1, 2, 3, 4}, {8, 9}, {0, 9}])
def test_suspects_do_not_reach_the_pipeline(tmp_path, monkeypatch, broken, threads):
    write_numbered(tmp_path, 10, broken)
    with feed_of(tmp_path, threads=threads) as feed:
        expected = [numbers(batch) for batch in feed]
    monkeypatch.setattr(ImagePass, "_recover", lambda *_: pytest.fail("the pipeline got what is unreadable"))
    with feed_of(tmp_path, threads=threads) as feed:
        feed._passes.suspects = 100  # as on a GPU, after a failure
        for _ in range(2):
            assert [numbers(batch) for batch in feed] == expected
        assert feed.skipped == [str(tmp_path / f"{number:02}.jpg") for number in sorted(broken)]
        assert feed._passes.suspects <= 100 - 2 * 4 * len(expected)


def test_a_pass_left_midway_and_begun_again(tmp_path):
    write_numbered(tmp_path, 10, {1, 6})
    with feed_of(tmp_path) as feed:
        assert numbers(next(iter(feed))) == [0, 2, 3, 4]
        assert [numbers(batch) for batch in feed] == [[0, 2, 3, 4], [5, 7, 8, 9]]


def test_what_is_gone_or_locked_is_skipped_too(tmp_path):
    write_numbered(tmp_path, 6)
    feed = feed_of(tmp_path, batch_size=2)
    (tmp_path / "01.jpg").unlink()
    (tmp_path / "02.jpg").unlink()
    (tmp_path / "02.jpg").mkdir()
    with feed:
        assert [numbers(batch) for batch in feed] == [[0, 3], [4, 5]]


def test_too_many_are_an_error_as_soon_as_they_are_known(tmp_path):
    write_numbered(tmp_path, 20, {0, 1, 19})
    with (
        feed_of(tmp_path, max_unreadable=10) as feed,
        pytest.raises(
            FastcalError, match=r"^3 of 20 samples cannot be read, more than max_unreadable allows \(10 %\); .*19.jpg"
        ),
    ):
        list(feed)
    with feed_of(tmp_path, max_unreadable=15) as feed:
        assert len(list(feed)) == 5
    with feed_of(tmp_path, max_unreadable=5) as feed, pytest.raises(FastcalError, match=r"2 of 20 .*01.jpg"):
        next(iter(feed))


def test_none_that_can_be_read_is_an_error_whatever_is_allowed(tmp_path):
    write_numbered(tmp_path, 6, range(6))
    with feed_of(tmp_path, max_unreadable=100) as feed, pytest.raises(FastcalError, match="6 of 6 samples"):
        list(feed)


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_a_percentage_that_is_none(tmp_path, percent):
    with pytest.raises(FastcalError, match=r"max_unreadable is .*; it is a percentage from 0 to 100"):
        feed_of(write_numbered(tmp_path, 1), max_unreadable=percent)


def test_the_first_are_logged_with_their_reasons(tmp_path, caplog):
    write_numbered(tmp_path, 12, {1, 2, 4, 6, 8})
    with feed_of(tmp_path) as feed, caplog.at_level(logging.WARNING, "fastcal"):
        list(feed)
        list(feed)
    assert [record.getMessage().replace(str(tmp_path), "") for record in caplog.records] == [
        "skipped: /01.jpg cannot be decoded: it is a text file; replace or remove it",
        "skipped: /02.jpg is empty (0 bytes); replace or remove it",
        "skipped: /04.jpg cannot be decoded: it is a text file; replace or remove it",
    ]
    assert len(feed.skipped) == 5


def test_passes_change_nothing_in_what_a_feed_is_made_from(tmp_path):
    write_numbered(tmp_path, 10, {3})
    with feed_of(tmp_path) as feed:
        before = feed.describe()
        list(feed)
        assert feed.describe() == before
    assert feed_of(tmp_path).describe() == before
    assert feed_of(tmp_path, skip_unreadable=False).describe()["skip_unreadable"] != before["skip_unreadable"]
    shutil.copy(tmp_path / "02.jpg", tmp_path / "03.jpg")
    assert feed_of(tmp_path).describe() != before
    present = feed_of(tmp_path)
    described = present.describe()
    (tmp_path / "05.jpg").unlink()
    assert present.describe() != described


@pytest.fixture
def digits(tmp_path):
    """Sixty of the sample's images, three of them broken."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, path in enumerate(sorted((DIGITS / "images").rglob("*.jpg"))[:60]):
        data = path.read_bytes()
        (folder / f"{number:02}.jpg").write_bytes(data[: len(data) // 2] if number in (0, 31, 59) else data)
    return folder


def test_the_command_says_and_records_it(digits, tmp_path, run_fastcal):
    arguments = ["calibrate", DIGITS / "digits.onnx", digits, "-o", tmp_path / "a.cache", "--batch-size", 19,
                 "--preprocess", "unit"]  # fmt: skip
    done = run_fastcal(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {digits / '00.jpg'} cannot be decoded")
    done = run_fastcal(*arguments, "--skip-unreadable", "--max-unreadable", 4)
    assert done.returncode == 2
    assert "2 of 60 samples" not in done.stderr
    assert "3 of 60 samples cannot be read, more than max_unreadable allows (4 %)" in done.stderr
    done = run_fastcal(*arguments, "--skip-unreadable")
    assert done.returncode == 0, done.stderr
    assert "images     57 in 3 batches of 19; 3 skipped as unreadable\n" in done.stdout
    record = json.loads((tmp_path / "a.cache.json").read_text())["made_from"]
    assert record["skipped"] == [str(digits / name) for name in ("00.jpg", "31.jpg", "59.jpg")]
    only_good = digits.parent / "good"
    shutil.copytree(digits, only_good)
    for name in ("00.jpg", "31.jpg", "59.jpg"):
        (only_good / name).unlink()
    again = ["calibrate", DIGITS / "digits.onnx", only_good, "-o", tmp_path / "b.cache", *arguments[5:]]
    assert run_fastcal(*again).returncode == 0
    assert (tmp_path / "a.cache").read_bytes() == (tmp_path / "b.cache").read_bytes()
    assert "skipped" not in json.loads((tmp_path / "b.cache.json").read_text())["made_from"]


@pytest.mark.parametrize("extension", fuzz.FORMATS)
def test_mutated_images(tmp_path, extension):
    intact = fuzz.write_images(tmp_path, extension, 32, seed=3)
    assert 0 < fuzz.read_images(tmp_path, intact) <= 32 - len(intact)


@pytest.mark.parametrize("extension", ["jpg", "webp", "ppm"])
def test_no_pipeline_is_kept_for_what_cannot_be_read(tmp_path, extension):
    fuzz.write_images(tmp_path, extension, 48, seed=3)

    def count_pipelines():
        return [*map(type, gc.get_objects())].count(ImagePipeline)

    gc.collect()
    gc.disable()
    try:
        before = count_pipelines()
        with feed_of(tmp_path, max_unreadable=100) as feed:
            for _ in range(2):
                assert sum(len(batch["input"]) for batch in feed) > 0
                assert feed.skipped
                assert count_pipelines() == before + 1
        assert count_pipelines() == before
    finally:
        gc.enable()


def test_what_cannot_be_read_can_be_told_to_another_process():
    error = pickle.loads(pickle.dumps(UnreadableError(3, "cannot read 3.jpg; replace or remove it")))
    assert (type(error), error.number, str(error)) == (UnreadableError, 3, "cannot read 3.jpg; replace or remove it")
