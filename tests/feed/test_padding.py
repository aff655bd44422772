"""Padding on the right and below, to multiples of a divisor, and images as uint8."""

import logging

import numpy as np
import pytest
from PIL import Image

import fastcal
from fastcal import FastcalError, ImageFeed, Preprocess
from references import open_upright

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def prepared(data, preprocess, **options):
    with ImageFeed(data, preprocess=preprocess, batch_size=2, device="cpu", **options) as feed:
        images = [image.copy() for batch in feed for image in next(iter(batch.values()))]
    return [(path, image) for path, image in zip(feed.paths, images[: len(feed.paths)], strict=True)]


def padded(image, size, shape, fill):
    """Resized by Pillow to fit `size`, at the top left of an image of `shape`."""
    ratio = min(size[0] / image.height, size[1] / image.width)
    new = round(image.width * ratio), round(image.height * ratio)
    out = np.full((*shape, 3), fill, np.float32)
    out[: new[1], : new[0]] = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    return out


@pytest.mark.parametrize(
    ("size", "divisor", "shape"),
    [((64, 96), 1, (64, 96)), ((50, 83), 32, (64, 96)), ((100, 167), 7, (105, 168)), ((33, 31), 16, (48, 32))],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_image_lies_at_the_top_left(photographs, size, divisor, shape, layout):
    preprocess = Preprocess(size=size, resize="letterbox", padding="end", divisor=divisor, fill=7, layout=layout)
    assert preprocess.padded == shape
    for path, image in prepared(photographs, preprocess):
        image = image.transpose(1, 2, 0) if layout == "NCHW" else image
        difference = np.abs(image - padded(open_upright(path), size, shape, 7))
        assert difference.mean() < 0.6, path
        assert np.percentile(difference, 99) <= 3, path


@pytest.mark.parametrize("padding", ["both", "end"])
def test_padding_of_the_mean_is_0(tmp_path, padding):
    Image.new("RGB", (40, 20), (255, 0, 128)).save(tmp_path / "wide.png")
    preprocess = Preprocess(
        size=(40, 40), resize="letterbox", padding=padding, fill="mean", mean=MEAN, std=STD, divisor=32
    )
    ((_, image),) = prepared(tmp_path, preprocess)
    assert image.shape == (3, 64, 64)
    rows, columns = (slice(0, 20), slice(0, 40)) if padding == "end" else (slice(22, 42), slice(12, 52))
    inside = image[:, rows, columns]
    expected = (np.array([255, 0, 128]) - MEAN) / STD
    np.testing.assert_allclose(inside, np.broadcast_to(expected[:, None, None], inside.shape), rtol=1e-5)
    image[:, rows, columns] = 0
    assert (image == 0).all()


def test_a_models_size_is_that_after_padding(onnx_file, photographs):
    model = onnx_file("f (float[N, 3, 96, 160] x) => (float[N, 3, 96, 160] y) { y = Relu(x) }")
    preprocess = Preprocess(size=(80, 133), resize="letterbox", padding="end", divisor=32)
    feed = ImageFeed(photographs, preprocess=preprocess, model=model, device="cpu")
    assert (feed.preprocess.size, feed.preprocess.padded) == ((80, 133), (96, 160))
    other = onnx_file("f (float[N, 3, 64, 64] x) => (float[N, 3, 64, 64] y) { y = Relu(x) }", name="other.onnx")
    feed = ImageFeed(photographs, preprocess=preprocess, model=other, device="cpu")
    assert (feed.preprocess.size, feed.preprocess.padded) == ((64, 64), (64, 64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"padding": "left"}, "there is no padding 'left'; choose one of both, end"),
        ({"divisor": 0}, "divisor 0 is not a number of pixels, e.g. 32"),
        ({"divisor": 1.5}, "divisor 1.5 is not a number of pixels"),
        ({"divisor": True}, "divisor True is not a number"),
        ({"fill": "median"}, "fill 'median' is not a pixel value from 0 to 255, nor 'mean'"),
        ({"fill": -1}, "fill -1 is not a pixel value"),
        ({"dtype": "int8"}, "there is no dtype 'int8'; choose one of float32, uint8"),
        ({"dtype": "uint8", "scale": 1 / 255}, "dtype uint8 holds pixels as they are; leave out scale, mean and std"),
        ({"dtype": "uint8", "mean": (1.0, 0.0, 0.0)}, "dtype uint8 holds pixels as they are"),
        ({"dtype": "uint8", "std": (2.0,)}, "dtype uint8 holds pixels as they are"),
    ],
)
def test_values_that_are_none(values, message):
    with pytest.raises(FastcalError, match=message):
        Preprocess(**values)


def test_a_file_says_it(tmp_path):
    (tmp_path / "p.toml").write_text(
        'size = [800, 1333]\nresize = "letterbox"\npadding = "end"\ndivisor = 32\nfill = "mean"\n'
    )
    preprocess = Preprocess.load(tmp_path / "p.toml")
    assert str(preprocess) == (
        "letterbox mean right and below to 800x1333, padded to a multiple of 32, RGB, (x * 1 - 0) / 1, NCHW"
    )
    assert str(Preprocess(resize="letterbox")) == "letterbox 114 to 224x224, RGB, (x * 1 - 0) / 1, NCHW"


NORMALIZING = """f (uint8[N, 16, 24, 3] pixels) => (float[N, 16, 24, 3] y)
{ x = Cast<to = 1>(pixels) s = Sub(x, mean) y = Div(s, std) }"""
CONSTANTS = {"mean": np.array(MEAN, "f4"), "std": np.array(STD, "f4")}


@pytest.mark.parametrize("preprocess", ["imagenet", "tf", "raw", Preprocess(dtype="uint8"), None])
def test_uint8_for_a_network_that_normalizes(onnx_file, photographs, caplog, preprocess):
    model = onnx_file(NORMALIZING, CONSTANTS)
    with caplog.at_level(logging.INFO, "fastcal"):
        found = prepared(photographs, preprocess, model=model)
    resize = "crop" if preprocess in ("imagenet", None) else "stretch"
    same = dict(prepared(photographs, Preprocess(size=(16, 24), resize=resize, layout="NHWC")))
    for path, image in found:
        assert (image.dtype, image.shape) == (np.uint8, (16, 24, 3))
        np.testing.assert_array_equal(image, np.rint(same[path]))
    said = "input 'pixels' takes uint8: it gets the pixels as they are, for the network to normalize" in caplog.text
    assert said == (not isinstance(preprocess, Preprocess))


def test_a_calibration_of_uint8_images(onnx_file, tmp_path, run_fastcal):
    Image.new("RGB", (24, 16), (255, 0, 0)).save(tmp_path / "i.png")
    model = onnx_file(NORMALIZING, CONSTANTS)
    done = run_fastcal("calibrate", model, tmp_path / "i.png", "-o", tmp_path / "c.cache", "--algorithm", "minmax")
    assert done.returncode == 0, done.stderr
    scales = fastcal.CalibrationCache.load(tmp_path / "c.cache").scales
    assert {name: 127 * scale for name, scale in scales.items()} == pytest.approx(
        {"x": 255, "s": 255 - MEAN[0], "y": (255 - MEAN[0]) / STD[0]}, rel=1e-5
    )


def test_padding_with_the_mean_as_uint8(onnx_file, tmp_path):
    Image.new("RGB", (24, 8), (255, 0, 0)).save(tmp_path / "i.png")
    preprocess = Preprocess(resize="letterbox", padding="end", fill="mean", scale=1 / 255, mean=(0.5,), std=(0.5,))
    ((_, image),) = prepared(tmp_path, preprocess, model=onnx_file(NORMALIZING, CONSTANTS))
    assert (image[8:] == 128).all()
    assert (image[:8] == (255, 0, 0)).all()


def test_other_types_take_no_images(onnx_file, photographs):
    model = onnx_file("f (int8[N, 3, 8, 8] x) => (int8[N, 3, 8, 8] y) { y = Identity(x) }")
    with pytest.raises(FastcalError, match=r"takes int8 for input .*, images are prepared as float32 or uint8"):
        ImageFeed(photographs, model=model)
