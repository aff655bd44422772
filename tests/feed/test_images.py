"""What the feed delivers, against PIL and NumPy doing what the networks' trainers do."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import alter, is_unnamed
from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.buffers import Allocator
from fastcal.feed.pipeline import ImagePipeline
from references import PRESETS, crop, difference_from_preset, letterbox, open_upright, stretch


def all_of(feed):
    with feed:
        return [batch["input"].copy() for batch in feed]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_the_trainers_do(photographs, preset):
    feed = ImageFeed(photographs, preprocess=preset, batch_size=1)
    for path, batch in zip(feed.paths, all_of(feed), strict=True):
        difference = difference_from_preset(preset, batch[0], open_upright(path))
        assert difference.mean() < 0.5
        assert np.percentile(difference, 99.9) <= 2.01


@pytest.mark.parametrize("reference", [crop, stretch])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolations_are_pils(photographs, reference, interpolation):
    preprocess = Preprocess(size=(100, 100), resize=reference.__name__, interpolation=interpolation)
    feed = ImageFeed(photographs, preprocess=preprocess, batch_size=1)
    for path, batch in zip(feed.paths, all_of(feed), strict=True):
        filter = Image.Resampling[interpolation.upper()]
        difference = np.abs(batch[0].transpose(1, 2, 0) - reference(open_upright(path), (100, 100), filter=filter))
        assert difference.mean() < 1
        # A pixel's centre that falls between two others goes to the one or the other: PIL adds its steps up in floating
        # point, so that is its rounding's choice.
        assert np.percentile(difference, 99 if interpolation == "nearest" else 99.9) <= 8


@pytest.mark.parametrize("size", [(64, 100), (100, 64), (65, 33), (65, 65)])
@pytest.mark.parametrize("reference", [crop, letterbox, stretch])
def test_sizes_odd_and_not_square(photographs, reference, size):
    preprocess = Preprocess(size=size, resize=reference.__name__, antialias=reference is not letterbox)
    feed = ImageFeed(photographs, preprocess=preprocess, batch_size=1)
    for path, batch in zip(feed.paths, all_of(feed), strict=True):
        difference = np.abs(batch[0].transpose(1, 2, 0) - reference(open_upright(path), size))
        assert difference.mean() < 0.5
        assert np.percentile(difference, 99.9) <= 8  # sharp edges shrunk a lot: DALI's filter is not PIL's to the bit


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_images_are_turned_upright_as_pil_does(tmp_path, orientation, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = image.resize((90, 60), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"image.{kind}", exif=exif)
    upright = open_upright(tmp_path / f"image.{kind}")
    feed = ImageFeed(tmp_path, preprocess=Preprocess(size=upright.size[::-1]), batch_size=1)
    (batch,) = all_of(feed)
    assert np.abs(batch[0].transpose(1, 2, 0) - np.asarray(upright, np.float32)).max() <= 2


def test_channels_and_layout(photographs):
    rgb = Preprocess(size=(32, 48))

    def batches(**changes):
        return np.concatenate(all_of(ImageFeed(photographs, preprocess=replace(rgb, **changes), batch_size=6)))

    plain = batches()
    np.testing.assert_array_equal(batches(channels="BGR"), plain[:, ::-1])
    np.testing.assert_array_equal(batches(layout="NHWC"), plain.transpose(0, 2, 3, 1))
    grey = batches(channels="GRAY")
    assert grey.shape == (6, 1, 32, 48)
    luma = (plain * np.float32([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(axis=1, keepdims=True)
    assert np.abs(grey - luma).max() < 2


def test_values(photographs):
    plain = Preprocess(size=(32, 48))
    changed = replace(plain, scale=0.5, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))
    (raw,) = all_of(ImageFeed(photographs, preprocess=plain, batch_size=6))
    (out,) = all_of(ImageFeed(photographs, preprocess=changed, batch_size=6))
    expected = (raw * 0.5 - np.float32([1, 2, 3]).reshape(1, 3, 1, 1)) / np.float32([2, 4, 8]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert out.dtype == np.float32


SMALL = Preprocess(size=(16, 16))


def test_the_last_batch_wraps_round_to_the_first_images(photographs, caplog):
    singles = all_of(ImageFeed(photographs, preprocess=SMALL, batch_size=1))
    with caplog.at_level(logging.INFO, "fastcal"):
        feed = ImageFeed(photographs, preprocess=SMALL, batch_size=4)
    assert "the last is completed with the first 2" in caplog.text
    assert len(feed) == 2
    first, last = all_of(feed)
    np.testing.assert_array_equal(first, np.concatenate(singles[:4]))
    np.testing.assert_array_equal(last, np.concatenate(singles[4:] + singles[:2]))


def test_a_batch_may_be_larger_than_all_images(photographs):
    feed = ImageFeed(photographs, preprocess=SMALL, batch_size=15)
    (batch,) = all_of(feed)
    np.testing.assert_array_equal(batch[:6], batch[6:12])
    np.testing.assert_array_equal(batch[:3], batch[12:])


def test_the_last_batch_can_be_dropped(photographs, caplog):
    with caplog.at_level(logging.INFO, "fastcal"):
        feed = ImageFeed(photographs, preprocess=SMALL, batch_size=4, last_batch="drop")
    assert "the last 2 are dropped" in caplog.text
    assert len(feed) == len(all_of(feed)) == 1
    with pytest.raises(FastcalError, match="6 images: no batch of 7 is left"):
        ImageFeed(photographs, preprocess=SMALL, batch_size=7, last_batch="drop")


def test_large_batches_are_prepared_in_several_chunks(photographs):
    few = all_of(ImageFeed(photographs, preprocess=SMALL, batch_size=30, threads=1))
    many = all_of(ImageFeed(photographs, preprocess=SMALL, batch_size=30, threads=4))
    singles = all_of(ImageFeed(photographs, preprocess=SMALL, batch_size=1))
    np.testing.assert_array_equal(few[0], np.concatenate(singles * 5))
    np.testing.assert_array_equal(many[0], few[0])


def test_large_files_are_prepared_in_smaller_chunks(tmp_path, photographs, monkeypatch):
    for index in range(5):
        image = (photographs / f"{index}.{'png' if index % 2 else 'jpg'}").read_bytes()
        (tmp_path / f"{index}.jpg").write_bytes(image + bytes(3 << 20))  # decoders stop at the image's end
    whole = all_of(ImageFeed(photographs, preprocess=SMALL, batch_size=5, limit=5, threads=2))
    chunks, submit = [], ImagePipeline.submit
    monkeypatch.setattr(
        ImagePipeline, "submit", lambda self, chunk, data: chunks.append(chunk.numbers) or submit(self, chunk, data)
    )
    np.testing.assert_array_equal(all_of(ImageFeed(tmp_path, preprocess=SMALL, batch_size=5, threads=2)), whole)
    assert chunks == [[0, 1], [2, 3], [4]]


def test_shuffle_and_limit(photographs):
    feed = ImageFeed(photographs, preprocess=SMALL, batch_size=1, shuffle=True, seed=4, limit=3)
    everything = ImageFeed(photographs, preprocess=SMALL, batch_size=1)
    assert len(feed) == 3
    assert set(feed.paths) < set(everything.paths)
    by_path = dict(zip(everything.paths, all_of(everything), strict=True))
    for path, batch in zip(feed.paths, all_of(feed), strict=True):
        np.testing.assert_array_equal(batch, by_path[path])


def test_every_iteration_is_a_fresh_pass(photographs):
    with ImageFeed(photographs, preprocess=SMALL, batch_size=2) as feed:
        first = [batch["input"].copy() for batch in feed]
        for batch in feed:
            np.testing.assert_array_equal(batch["input"], first[0])
            break
        again = [batch["input"].copy() for batch in feed]
    after_closing = [batch["input"].copy() for batch in feed]
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(after_closing, first)


def test_a_pass_that_has_ended_begins_no_work(photographs):
    with ImageFeed(photographs, preprocess=SMALL, batch_size=2, device="cpu") as feed:
        (buffer,) = Allocator(None).allocate(1, feed._plan.filled)
        assert feed._passes.begin(Allocator(None)).fill(0, buffer, lambda: True)
        assert feed._passes.pipeline is None


def test_a_new_pass_cuts_off_the_one_before(photographs):
    with ImageFeed(photographs, preprocess=SMALL, batch_size=2) as feed:
        first = iter(feed)
        next(first)
        second = iter(feed)
        assert len(list(second)) == 3
        with pytest.raises(FastcalError, match="another pass begun, before this one"):
            next(first)
        assert next(second, "ended") == "ended"


def test_buffers_are_allocated_once_and_taken_in_turn(photographs):
    with ImageFeed(photographs, preprocess=SMALL, batch_size=1, depth=3) as feed:
        addresses = [batch["input"].ctypes.data for _ in range(2) for batch in feed]
    assert addresses == addresses[:3] * 4
    assert len(set(addresses)) == 3


def test_deleting_the_feed_midway_leaves_no_thread(photographs):
    feed = ImageFeed(photographs, preprocess=SMALL, batch_size=1)
    batches = iter(feed)
    next(batches)
    del feed, batches
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")]


@pytest.mark.parametrize("midway", [False, True])
def test_a_feed_used_before_a_fork_says_so_in_the_child(photographs, midway):
    program = f"""
import os, sys, threading
import fastcal
feed = fastcal.ImageFeed({str(photographs)!r}, preprocess=fastcal.Preprocess(size=(32, 32)), batch_size=1)
batches = iter(feed)
first = next(batches)["input"].copy()
if not {midway}:
    list(batches)
if child := os.fork():
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3, status
    assert len(list(feed)) == 6  # the parent goes on
else:
    try:
        next(iter(feed))
    except fastcal.FastcalError as error:
        assert "make the feed in the child" in str(error)
    same = next(iter(fastcal.ImageFeed(feed.paths, preprocess=feed.preprocess, batch_size=1)))["input"]
    assert (same == first).all()
    del batches
    sys.stdout.flush()
    os._exit(3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def damaged(folder, kind):
    path = folder / f"1 {kind}.jpg"
    if kind == "truncated":
        Image.effect_noise((200, 200), 80).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "garbage":
        path.write_bytes(b"no image at all")
    elif kind == "empty":
        path.touch()
    return path


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "vanished"])
def test_the_image_that_cannot_be_read_is_named(photographs, tmp_path, kind):
    (tmp_path / "0.jpg").write_bytes((photographs / "0.jpg").read_bytes())
    path = damaged(tmp_path, kind)
    path.touch()
    (tmp_path / "2.jpg").write_bytes((photographs / "2.jpg").read_bytes())
    feed = ImageFeed(tmp_path, preprocess=SMALL, batch_size=1)
    if kind == "vanished":
        path.unlink()
    with feed:
        batches = iter(feed)
        next(batches)
        with pytest.raises(FastcalError, match=rf"1 {kind}.jpg") as raised:
            next(batches)
        assert "\n" not in str(raised.value)
        if kind != "vanished":
            path.write_bytes((photographs / "4.jpg").read_bytes())
            assert len(list(feed)) == 3  # the feed goes on once the file is put right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"limit": 0}, "limit is 0"),
        ({"depth": 1}, "depth is 1; it must be at least 2"),
        ({"last_batch": "pad"}, "no last_batch 'pad'; choose wrap, drop or keep"),
        ({"preprocess": "imagnet"}, "no preset 'imagnet'"),
    ],
)
def test_wrong_arguments_are_named(photographs, arguments, message):
    with pytest.raises(FastcalError, match=message):
        ImageFeed(photographs, **arguments)


def test_the_model_gives_size_layout_batch_size_and_name(photographs, onnx_file):
    model = onnx_file("f (float[2, 20, 30, 1] pixels) => (float[2, 20, 30, 1] y) { y = Relu(pixels) }")
    with ImageFeed(photographs, preprocess="unit", model=model) as feed:
        for batch in feed:
            assert {name: array.shape for name, array in batch.items()} == {"pixels": (2, 20, 30, 1)}
            assert not is_unnamed(batch)


def test_a_model_of_several_inputs_needs_a_name(photographs, onnx_file):
    model = onnx_file("f (float[N, 3, 8, 8] left, float[N, 3, 9, 9] right) => (float[N, 3, 8, 8] y) { y = Relu(left) }")
    with pytest.raises(FastcalError, match="takes the inputs 'left', 'right'; name the data of each"):
        ImageFeed(photographs, preprocess="unit", model=model)
    assert ImageFeed(photographs, preprocess="unit", model=model, input_name="right").preprocess.size == (9, 9)


def test_what_a_feed_is_made_from_is_told_apart(photographs, tmp_path, monkeypatch):
    def described(data=photographs, preprocess=SMALL, **options):
        return ImageFeed(data, preprocess=preprocess, batch_size=2, **options).describe()

    plain = described()
    assert plain == described()
    elsewhere = shutil.copytree(photographs, tmp_path / "elsewhere")  # keeps all but the folder
    assert plain == described(elsewhere)
    monkeypatch.chdir(elsewhere)
    assert plain == described(
        [*sorted(os.listdir())[:3], *sorted(str(path.resolve()) for path in elsewhere.iterdir())[3:]]
    )
    assert plain["samples"] != described(limit=5)["samples"]
    assert plain["samples"] != described(shuffle=True)["samples"]
    assert plain["preprocess"] != described(preprocess=Preprocess(size=(16, 17)))["preprocess"]
    (elsewhere / "0.jpg").touch()
    assert plain == described(elsewhere)
    assert plain["samples_by"] == "names and contents"
    alter(elsewhere / "0.jpg")
    assert plain["samples"] != described(elsewhere)["samples"]
    feed = ImageFeed(elsewhere, preprocess=SMALL)
    (elsewhere / "0.jpg").unlink()
    with pytest.raises(FastcalError, match=r"cannot read .*0.jpg: No such file"):
        feed.describe()


MODELS = {
    "dynamic": "f (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = Relu(x) }",
    "fixed": "f (float[4, 3, 8, 8] x) => (float[4, 3, 8, 8] y) { y = Relu(x) }",
}


@pytest.mark.parametrize(
    ("model", "options", "sizes"),
    [
        ("dynamic", {"batch_size": 4}, [4, 2]),
        ("dynamic", {"batch_size": 3}, [3, 3]),
        ("dynamic", {}, [6]),
        ("dynamic", {"batch_size": 4, "last_batch": "wrap"}, [4, 4]),
        ("dynamic", {"batch_size": 4, "last_batch": "drop"}, [4]),
        ("dynamic", {"batch_size": 2, "limit": 5}, [2, 2, 1]),
        ("fixed", {}, [4, 4]),
        ("fixed", {"last_batch": "drop"}, [4]),
        (None, {"batch_size": 4}, [4, 4]),
        (None, {"batch_size": 4, "last_batch": "keep"}, [4, 2]),
    ],
)
def test_the_last_batch_of_a_dynamic_model_is_smaller(photographs, onnx_file, caplog, model, options, sizes):
    caplog.set_level(logging.INFO, "fastcal")
    path = model and onnx_file(MODELS[model])
    single = ImageFeed(photographs, preprocess=Preprocess(size=(8, 8)), batch_size=1, device="cpu")
    images = [batch["input"][0].copy() for batch in single]
    for _ in range(2):
        with ImageFeed(
            photographs, preprocess=Preprocess(size=(8, 8)), model=path, device="cpu", threads=1, **options
        ) as feed:
            batches = [next(iter(batch.values())).copy() for batch in feed]
            assert [len(batch) for batch in batches] == sizes == [feed.batch_size] * (len(sizes) - 1) + sizes[-1:]
            assert (len(feed), feed.batch_size) == (len(sizes), sizes[0])
            for number, image in enumerate(np.concatenate(batches)):
                np.testing.assert_array_equal(image, images[number % 6])
    assert ("completed" in caplog.text) == (sum(sizes) > 6)


def test_what_is_unreadable_makes_the_last_batch_smaller(tmp_path):
    for number in range(7):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    for bad in (1, 6):
        (tmp_path / f"{bad}.png").write_bytes(b"no image")
    feed = ImageFeed(
        tmp_path, preprocess=Preprocess(size=(8, 8)), batch_size=3, last_batch="keep", skip_unreadable=True,
        max_unreadable=50, device="cpu",
    )  # fmt: skip
    for _ in range(2):
        assert [batch["input"][:, 0, 0, 0].tolist() for batch in feed] == [[0, 2, 3], [4, 5]]
    assert (len(feed), feed.samples) == (2, 5)
    feed.close()


def test_parts_of_a_feed_with_a_smaller_last_batch(photographs, onnx_file):
    feed = ImageFeed(photographs, model=onnx_file(MODELS["dynamic"]), batch_size=4, device="cpu")
    parts = [feed.part(range(number, number + 1), gpu=None, threads=1) for number in range(2)]
    whole = [batch["x"].copy() for batch in feed]
    for part, expected in zip(parts, whole, strict=True):
        (batch,) = part
        np.testing.assert_array_equal(batch["x"], expected)
        part.close()
    feed.close()


def test_a_record_without_a_last_batch_of_its_own_is_that_of_any(photographs, onnx_file):
    model = onnx_file(MODELS["dynamic"])

    def described(**options):
        return ImageFeed(photographs, model=model, device="cpu", **options).describe()["last_batch"]

    assert [described(batch_size=3), described(batch_size=3, last_batch="wrap")] == ["wrap", "wrap"]
    assert [described(batch_size=4), described(batch_size=4, last_batch="wrap")] == ["keep", "wrap"]


def test_constants_of_every_sample_are_as_many_as_the_samples(photographs, onnx_file):
    model = onnx_file(
        """f (float[N, 3, 8, 8] x, float[N, 1] s, float[4, 1] t) => (float[N, 1] y) { y = Identity(s) }"""
    )
    constants = {"s": np.ones((1, 1)), "t": np.ones((4, 1))}
    with ImageFeed(photographs, model=model, batch_size=4, constants=constants, device="cpu") as feed:
        shapes = [{name: array.shape[0] for name, array in batch.items()} for batch in feed]
    assert shapes == [{"x": 4, "s": 4, "t": 4}, {"x": 2, "s": 2, "t": 4}]
