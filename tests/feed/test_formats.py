"""Every format that is said to be decoded, against PIL; what cannot be is named before the first batch."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from fastcal import FastcalError, ImageFeed, Preprocess
from references import PRESETS, Exact, crop, difference_from_preset, open_upright, stretch

NATIVE = Preprocess(size=(160, 200))


def all_of(feed):
    with feed:
        return [batch["input"][0].copy() for batch in feed]


def check(difference, name):
    assert difference.mean() <= 1, name
    assert np.percentile(difference, 99.9) <= 8, name


def variants(photograph):
    """Files by name: a photograph in each format, as far as formats differ in how they store it."""
    rgb = open_upright(photograph).resize((200, 160))
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    palette = rgb.quantize(64)
    bilevel = grey.convert("1")
    cmyk = rgb.convert("CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "baseline.jpg": (rgb, {"quality": 95}),
        "coarse.jpg": (rgb, {"quality": 30, "subsampling": 2}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (cmyk, {}),
        "grey.jpg": (grey, {}),
        "rgb.jpg": (rgb, {"keep_rgb": True}),
        "turned.jpg": (rgb, {"exif": turned}),
        "rgb.png": (rgb, {}),
        "16.png": (deep, {}),
        "palette.png": (palette, {}),
        "transparent.png": (palette, {"transparency": 3}),
        "alpha.png": (alpha, {}),
        "grey alpha.png": (alpha.convert("LA"), {}),
        "bilevel.png": (bilevel, {}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (palette, {}),
        "lossy.webp": (rgb, {"quality": 80}),
        "lossless.webp": (rgb, {"lossless": True}),
        "alpha.webp": (alpha, {"lossless": True}),
        "rgb.tiff": (rgb, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tif": (rgb, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "fax.tif": (bilevel, {"compression": "group4"}),
        "16.tif": (deep, {}),
        "cmyk.tif": (cmyk, {}),
        "lossless.jp2": (rgb, {}),
        "lossy.jp2": (rgb, {"irreversible": True, "quality_mode": "dB", "quality_layers": [40]}),
        "alpha.jp2": (alpha, {}),
        "grey.jp2": (grey, {}),
        "16.jp2": (deep, {}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (grey, {}),
    }
    for name, (image, options) in images.items():
        encoded = io.BytesIO()
        image.save(encoded, Image.registered_extensions()["." + name.rpartition(".")[2]], **options)
        yield name, encoded.getvalue()


def reference(path):
    """PIL's image, upright; PIL itself cuts 16-bit values off at 255, where all others scale them."""
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            return open_upright(path)
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def in_each_format(real_photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name, encoded in variants(real_photographs[3]):
        (folder / name).write_bytes(encoded)
    return folder


@pytest.mark.parametrize("channels", ["RGB", "GRAY"])
def test_pixels_are_pils(in_each_format, channels):
    feed = ImageFeed(in_each_format, preprocess=Preprocess(size=NATIVE.size, channels=channels), batch_size=1)
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        if path.endswith("turned.jpg"):  # 200 high, 160 wide: resized
            continue
        image = reference(path)
        if channels == "GRAY":
            with Image.open(path) as opened:
                opened.draft("L", opened.size)  # of JPEG, the luma as it is stored
                image = (opened if path.endswith("jpg") else image).convert("L")
        pixels = np.asarray(image, np.float32)
        difference = np.abs(values.transpose(1, 2, 0) - pixels.reshape(*NATIVE.size, -1))
        assert difference.mean() <= (0.6 if channels == "GRAY" else 0.02), path  # DALI cuts off a grey value's fraction
        assert np.percentile(difference, 99.9) <= 1, path


def test_pixels_with_alpha_are_pils(in_each_format):
    feed = ImageFeed(in_each_format, preprocess=Preprocess(size=NATIVE.size, channels="RGBA"), batch_size=1)
    opaque = 0
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        if path.endswith("turned.jpg"):
            continue
        with Image.open(path) as image:
            image = reference(path) if image.mode.startswith("I") else image
            expected = np.asarray(image.convert("RGBA"))
        np.testing.assert_array_equal(values, expected.transpose(2, 0, 1), path)
        opaque += int((values[3] == 255).all())
    assert 0 < opaque < len(feed.paths) - 5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_every_format(in_each_format, preset):
    feed = ImageFeed(in_each_format, preprocess=preset, batch_size=1)
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        image = reference(path)
        if preset == "clip" and path.endswith(("bilevel.png", "fax.tif")):  # dithered: PIL clips after rows already
            image = Exact(image)
        check(difference_from_preset(preset, values, image), path)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_photographs(real_photographs, preset):
    feed = ImageFeed(real_photographs, preprocess=preset, batch_size=1)
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        check(difference_from_preset(preset, values, open_upright(path)), path)


@pytest.mark.parametrize("resize", [crop, stretch])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resizing_of_photographs(real_photographs, resize, interpolation):
    size = (199, 130)
    preprocess = Preprocess(size=size, resize=resize.__name__, interpolation=interpolation)
    feed = ImageFeed(real_photographs, preprocess=preprocess, batch_size=1)
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        expected = resize(open_upright(path), size, filter=Image.Resampling[interpolation.upper()])
        difference = np.abs(values.transpose(1, 2, 0) - expected)
        assert difference.mean() <= 1, path
        # See test_interpolations_are_pils.
        assert np.percentile(difference, 98 if interpolation == "nearest" else 99.9) <= 8, path


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_extreme_images(tmp_path, preset):
    """Single pixels, single rows and columns, ribbons, chessboards, and what needs no resizing, to the level."""
    sizes = [(1, 1), (1, 20), (20, 1), (2, 3), (60, 9), (9, 60), (224, 224), (256, 256), (225, 223), (640, 640)]
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"noise {width}x{height}.png")
        board = (np.indices((height, width)).sum(axis=0) % 2 * 255).astype(np.uint8)
        Image.fromarray(board).convert("RGB").save(tmp_path / f"board {width}x{height}.png")
    feed = ImageFeed(tmp_path, preprocess=preset, batch_size=1)
    for path, values in zip(feed.paths, all_of(feed), strict=True):
        image = open_upright(path)
        assert difference_from_preset(preset, values, image if preset == "yolo" else Exact(image)).max() < 1.01, path


@pytest.fixture
def undecodable(tmp_path, photographs):
    """JPEG files, and bilevel TIFF files without compression, which DALI decodes as little as it knows their like."""
    folder = tmp_path / "undecodable"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes((photographs / "0.jpg").read_bytes())
        Image.new("1", (20, 20)).save(folder / f"{number}.TIF")
    return folder


def test_what_cannot_be_decoded_is_named_before_the_first_batch(undecodable):
    paths = [*sorted(undecodable.glob("*.jpg")), *sorted(undecodable.glob("*.TIF"))]
    with ImageFeed(paths, preprocess=NATIVE, batch_size=2) as feed, pytest.raises(FastcalError) as raised:
        next(iter(feed))
    tried = ", ".join(str(undecodable / f"{number}.TIF") for number in range(3))
    assert str(raised.value) == f"DALI decodes no .tif image here: tried {tried}; convert them or leave them out"


def test_what_cannot_be_decoded_may_be_skipped(undecodable, caplog):
    options = {"preprocess": NATIVE, "batch_size": 2, "skip_unreadable": True}
    with ImageFeed(undecodable, **options, max_unreadable=50) as feed, caplog.at_level(logging.WARNING, "fastcal"):
        assert len(list(feed)) == 3
    assert len(feed.skipped) == 6
    with ImageFeed(undecodable, **options, max_unreadable=40) as feed, pytest.raises(FastcalError, match="5 of 12"):
        list(feed)


def test_one_damaged_image_does_not_condemn_its_kind(undecodable, photographs):
    (undecodable / "0.TIF").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(undecodable / "1.TIF")
    with ImageFeed(undecodable, preprocess=NATIVE, batch_size=1) as feed:
        batches = iter(feed)
        with pytest.raises(FastcalError, match=r"0.TIF cannot be decoded: it is a text file"):
            next(batches)
    paths = [undecodable / "0.jpg", undecodable / "0.TIF"]
    with (
        ImageFeed(paths, preprocess=NATIVE, batch_size=1) as feed,
        pytest.raises(FastcalError, match=r"^[^ ]*0.TIF cannot be decoded: it is a text file"),
    ):
        next(iter(feed))
