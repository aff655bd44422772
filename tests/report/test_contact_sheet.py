"""Previews: that what a network gets is undone to the pixels it was made from, and that mistakes can be seen."""

import io
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fastcal
from conftest import DIGITS
from fastcal.errors import DataError

IMAGENET = fastcal.Preprocess.preset("imagenet")
MODEL = DIGITS / "digits.onnx"


@pytest.fixture
def red(tmp_path):
    """A folder with one red image."""
    folder = tmp_path / "red"
    folder.mkdir()
    Image.new("RGB", (40, 40), (250, 20, 10)).save(folder / "red.png")
    return folder


def commonest_colour(sheet):
    """The colour that most pixels of a drawn sheet have, white and greys left out."""
    with Image.open(sheet) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    return max((count, colour) for count, colour in colours if len(set(colour)) > 1)[1]


@pytest.mark.parametrize(
    "preprocess",
    [
        IMAGENET,
        replace(IMAGENET, channels="BGR"),
        fastcal.Preprocess.preset("caffe"),
        fastcal.Preprocess.preset("tf"),
        replace(fastcal.Preprocess.preset("unit"), layout="NHWC"),
        fastcal.Preprocess(channels="GRAY", mean=(100.0,), std=(50.0,)),
    ],
)
def test_the_preprocessing_is_undone(photographs, preprocess):
    with fastcal.ImageFeed(photographs, preprocess=preprocess, batch_size=1, device="cpu") as feed:
        preview = fastcal.preview(feed)
    assert list(preview.names) == sorted(os.listdir(photographs))
    raw = fastcal.Preprocess(resize=preprocess.resize, channels=preprocess.channels, layout="NHWC")
    with fastcal.ImageFeed(photographs, preprocess=raw, batch_size=6, device="cpu") as feed:
        pixels = next(iter(feed))["input"].copy()
    assert preview.pixels.shape == pixels.shape
    np.testing.assert_allclose(preview.pixels, pixels, atol=0.02)
    assert preview.outside == 0
    for channel, name in enumerate(["GRAY"] if preprocess.channels == "GRAY" else preprocess.channels):
        said, values = preview.channels[channel], preview.values[..., channel]
        assert (said.name, said.min, said.max) == (name, values.min(), values.max())
        assert (said.mean, said.std) == pytest.approx((values.mean(), values.std()), rel=1e-4)


def test_a_wrong_channel_order_is_seen(red, tmp_path):
    for name, channels, drawn in (("right", "RGB", (250, 20, 10)), ("wrong", "BGR", (10, 20, 250))):
        preprocess = replace(IMAGENET, channels=channels)
        with fastcal.ImageFeed(red, preprocess=preprocess, device="cpu", batch_size=1) as feed:
            preview = fastcal.preview(feed)
        preview.save(tmp_path / f"{name}.png")
        assert commonest_colour(tmp_path / f"{name}.png") == drawn
        assert [note for note in preview.notes() if note.startswith("blue comes first")] == (
            [] if channels == "RGB" else ["blue comes first and is drawn red, as a network trained on RGB takes it; "
                                          "right for one trained on BGR"]
        )  # fmt: skip


def test_a_missing_normalization_is_seen():
    notes = {}
    for name in ("imagenet", "raw"):
        with fastcal.ImageFeed(DIGITS / "images", model=MODEL, preprocess=name, device="cpu", limit=8) as feed:
            preview = fastcal.preview(feed)
        notes[name] = preview.notes()[1]
        spread = max(abs(channel.mean) for channel in preview.channels)
        assert (spread < 3) == (name == "imagenet")
    assert notes == {name: f"colours and values: those of preset {name}" for name in ("imagenet", "raw")}


def test_the_sheet_tells_normalized_values_from_others(red, tmp_path):
    """The chart of values has one axis for all, so what is not normalized lies elsewhere on it."""
    charts = []
    for name in ("imagenet", "raw"):
        with fastcal.ImageFeed(red, preprocess=replace(fastcal.Preprocess.preset(name), size=(64, 64))) as feed:
            fastcal.preview(feed, count=1).save(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            chart = np.asarray(image.convert("RGB"), int)[140:345, 30:750]
        lines = chart[..., 0] > chart[..., 1:].max(axis=-1) + 60  # the first channel's is red
        charts.append(np.flatnonzero(lines.any(axis=0)).mean() / chart.shape[1])
    normalized, raw = charts
    assert 0.4 < normalized < 0.75
    assert raw > 0.85


def test_batches_that_were_not_made_with_the_preprocessing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16)).astype(np.float32)
    normalized = (pixels / 255 - np.float32(IMAGENET.mean).reshape(3, 1, 1)) / np.float32(IMAGENET.std).reshape(3, 1, 1)
    right = fastcal.preview(fastcal.ArrayFeed([{"x": normalized}]), preprocess="imagenet")
    assert (right.outside, len(right.names), right.names[3]) == (0, 4, "sample 3")
    np.testing.assert_allclose(right.pixels, pixels.transpose(0, 2, 3, 1), atol=0.01)
    assert right.preprocess.size == (16, 16)
    wrong = fastcal.preview([{"x": pixels}], preprocess="imagenet")
    undone = pixels * np.float32(IMAGENET.std).reshape(3, 1, 1) + np.float32(IMAGENET.mean).reshape(3, 1, 1)
    assert wrong.outside == pytest.approx(np.mean(undone * 255 > 255.5))
    assert (
        wrong.notes()[-1]
        == f"{wrong.outside:.1%} of the pixels are outside 0..255: another preprocessing made these values"
    )
    broken = fastcal.preview([{"x": np.full((1, 3, 4, 4), np.nan, np.float32)}], preprocess="imagenet")
    assert broken.outside == 1
    broken.save(tmp_path / "broken.png")


def test_which_images_and_how_many(photographs):
    with fastcal.ImageFeed(photographs, batch_size=4, device="cpu", preprocess="unit") as feed:
        assert len(fastcal.preview(feed, count=3).names) == 3
        all_of_them = fastcal.preview(feed, count=100)  # the last batch is completed with the first two
        assert len(all_of_them.names) == len(all_of_them.values) == 6
    mask = {"mask": np.ones((1, 3, 8, 8), np.float32)}
    images = {"image": np.zeros((1, 3, 8, 8), np.float32)}
    chosen = fastcal.preview([mask | images], preprocess="unit", input_name="image")
    assert chosen.pixels.max() == 0


def test_of_several_inputs_one_is_shown(photographs):
    data = {"left": photographs, "right": photographs}
    preprocess = {"left": "unit", "right": "caffe"}
    with fastcal.ImageFeed(data, preprocess=preprocess, batch_size=2, device="cpu") as feed:
        left, right = fastcal.preview(feed), fastcal.preview(feed, input_name="right")
        with pytest.raises(fastcal.FastcalError, match="there are no images for input 'up', but for 'left', 'right'"):
            fastcal.preview(feed, input_name="up")
    assert (left.preprocess.channels, right.preprocess.channels) == ("RGB", "BGR")
    np.testing.assert_allclose(left.pixels, right.pixels[..., ::-1], atol=0.01)


def test_unreadable_images_are_not_named(photographs, tmp_path):
    folder = shutil.copytree(photographs, tmp_path / "images")
    (folder / "1.png").write_bytes(b"no image")
    settings = {"preprocess": "unit", "batch_size": 1, "device": "cpu", "skip_unreadable": True, "max_unreadable": 50}
    with fastcal.ImageFeed(folder, **settings) as feed:
        preview = fastcal.preview(feed)
    assert list(preview.names) == [name for name in sorted(os.listdir(folder)) if name != "1.png"]
    assert len(preview.values) == 5


def test_what_cannot_be_previewed(photographs, tmp_path):
    images = [{"x": np.zeros((1, 3, 8, 8), np.float32)}]
    for feed, options, message in (
        (images, {}, "the preprocessing of the batches is not known; name it"),
        (images, {"preprocess": "unit", "count": 0}, "count is 0; it must be at least 1"),
        (images, {"preprocess": "imagnet"}, "there is no preset 'imagnet'"),
        (images, {"preprocess": "unit", "input_name": "y"}, "the batches have the inputs 'x'; say which one"),
        (
            [{"x": images[0]["x"], "y": images[0]["x"]}],
            {"preprocess": "unit"},
            "have the inputs 'x', 'y'; say which one",
        ),
        (
            [{"x": np.zeros((1, 10))}],
            {"preprocess": "unit"},
            "none of the batches' arrays, 'x', has the four dimensions",
        ),
        (
            [{"x": np.zeros((1, 9, 9, 9))}],
            {"preprocess": "unit"},
            r"array of shape \(1, 9, 9, 9\): it takes no images of 1 or 3",
        ),
        ([], {"preprocess": "unit"}, "there are no batches"),
    ):
        is_setting = options.get("count") == 0 or options.get("preprocess") == "imagnet" or not feed
        with pytest.raises(fastcal.FastcalError if is_setting else DataError, match=message):
            fastcal.preview(feed, **options)
    preview = fastcal.preview(images, preprocess="unit")
    for name, message in (
        ("sheet.gif", "cannot draw .*sheet.gif: name a file that ends in .png, .jpg"),
        ("sheet", "cannot draw .*sheet: name a file"),
        ("nowhere/sheet.png", "cannot write .*nowhere/sheet.png: there is no folder"),
    ):
        with pytest.raises(fastcal.FastcalError, match=message):
            preview.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "pdf", "svg"])
def test_every_format_and_any_name(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a$_{x^$.png", "漢字.png", "a name that is much longer than its picture is wide.png"):
        Image.new("RGB", (9, 9)).save(folder / name)
    with fastcal.ImageFeed(folder, preprocess="unit", device="cpu", batch_size=3) as feed:
        fastcal.preview(feed).save(tmp_path / f"sheet.{kind}")
    data = (tmp_path / f"sheet.{kind}").read_bytes()
    if kind in ("png", "jpg", "webp"):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
            assert image.width == 1500
    else:
        assert data.startswith(b"%PDF" if kind == "pdf" else b"<?xml")


@pytest.mark.parametrize("size", [(32, 1024), (16, 512), (1, 3000), (1500, 10), (3000, 1)])
def test_images_of_any_shape(tmp_path, size):
    blue = np.zeros((7, 3, *size), np.float32)
    blue[:, 2] = 1
    fastcal.preview([{"x": blue}], preprocess="unit").save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 1500
        assert image.height < 3000
        drawn = (np.asarray(image.convert("RGB"))[390:] == (0, 0, 255)).all(axis=-1)  # below the chart
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    # Two rows of images, six of them and one, each as wide or as tall as there is room for.
    assert (np.diff(rows) > 1).sum() == 1
    assert (np.diff(columns) > 1).sum() == 5
    longest = drawn.sum(axis=1).max() / 6 if size[0] < size[1] else drawn.sum(axis=0).max() / 2
    assert longest == pytest.approx(231 if size[0] < size[1] else 4 * 231, abs=2)


@pytest.mark.parametrize(("kind", "most"), [("webp", 16383), ("jpg", 65500), ("png", 65500)])
def test_more_images_than_a_sheet_can_show(tmp_path, kind, most):
    preview = fastcal.preview([{"x": np.zeros((1, 3, 30, 5), np.float32)}], preprocess="unit")
    count = 600 if kind == "webp" else 1200
    many = replace(preview, names=["x"] * count, values=preview.values.repeat(count, axis=0))
    with pytest.raises(
        fastcal.FastcalError, match=rf"pixels in height, and a .{kind} has {most} at most; show"
    ) as raised:
        many.save(tmp_path / f"sheet.{kind}")
    (fitting,) = re.findall(r"show (\d+) images or fewer, or draw a .pdf$", str(raised.value))
    fewer = replace(many, names=["x"] * int(fitting), values=many.values[: int(fitting)])
    one_row_more = replace(many, names=["x"] * (int(fitting) + 6), values=many.values[: int(fitting) + 6])
    assert int(fitting) + 6 <= count
    with pytest.raises(fastcal.FastcalError, match=f"show {fitting} images"):
        one_row_more.save(tmp_path / f"sheet.{kind}")
    if kind == "webp":
        fewer.save(tmp_path / "sheet.webp")
        with Image.open(tmp_path / "sheet.webp") as image:
            assert most - 1000 < image.height <= most


class Closing(fastcal.Feed):
    """Batches that are no images, and whether their pass was closed."""

    batch_size, closed = 1, False

    def __len__(self):
        return 1

    def __iter__(self):
        return self

    def __next__(self):
        return {"x": np.zeros((1, 9, 9, 9), np.float32)}

    def close(self):
        self.closed = True


def test_a_pass_is_closed_where_it_fails():
    feed = Closing()
    with pytest.raises(fastcal.FastcalError, match="it takes no images"):
        fastcal.preview(feed, preprocess="unit")
    assert feed.closed
