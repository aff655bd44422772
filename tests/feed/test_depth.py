"""Images of 16 bits a channel, and of four channels, on their way to the network."""

import io
import logging
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

import fastcal
from fastcal import DataError, ImageFeed, Preprocess

tifffile = pytest.importorskip("tifffile")

RANDOM = np.random.default_rng(3)


def deep(*shape):
    return RANDOM.integers(0, 2**16, shape).astype(np.uint16)


def png(pixels):
    """A PNG file of 16-bit pixels, grey or RGB; Pillow writes no RGB of that depth."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 * (pixels.ndim == 3), 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def all_of(feed):
    with feed:
        return np.concatenate([batch["input"].copy() for batch in feed])


@pytest.fixture
def folder(tmp_path):
    """Files of 16 bits in every format that has them, one of 8 bits, and the pixels of each by name."""
    grey, rgb, coarse = deep(9, 12), deep(9, 12, 3), RANDOM.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    (tmp_path / "grey.png").write_bytes(png(grey))
    (tmp_path / "rgb.png").write_bytes(png(rgb))
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    Image.fromarray(grey).save(tmp_path / "grey.jp2")
    (tmp_path / "grey.pgm").write_bytes(b"P5 12 9 65535\n" + grey.astype(">u2").tobytes())
    (tmp_path / "rgb.ppm").write_bytes(b"P6 12 9 65535\n" + rgb.astype(">u2").tobytes())
    Image.fromarray(coarse).save(tmp_path / "coarse.png")
    pixels = {"coarse.png": coarse.astype(np.uint16) * 257}
    for path in tmp_path.iterdir():
        if path.name != "coarse.png":
            pixels[path.name] = rgb if path.stem == "rgb" else grey[..., None].repeat(3, 2)
    return tmp_path, pixels


def test_all_values_of_16_bits_reach_the_network(folder):
    path, pixels = folder
    feed = ImageFeed(path, preprocess=Preprocess(size=(9, 12), bits=16, scale=257.0), device="cpu", batch_size=1)
    found = all_of(feed)
    assert found.dtype == np.float32
    for name, values in zip(feed.paths, found, strict=True):
        np.testing.assert_array_equal(values, pixels[name.rpartition("/")[2]].transpose(2, 0, 1), name)


def test_presets_mean_the_same_with_16_bits(folder):
    path, pixels = folder
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    preprocess = Preprocess(size=(9, 12), bits=16, channels="BGR", scale=1 / 255, mean=mean, std=std, layout="NHWC")
    feed = ImageFeed(path, preprocess=preprocess, device="cpu", batch_size=1)
    for name, values in zip(feed.paths, all_of(feed), strict=True):
        expected = (pixels[name.rpartition("/")[2]][..., ::-1] / 65535 - mean) / std
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_grey_values_of_16_bits(folder):
    path, pixels = folder
    preprocess = Preprocess(size=(9, 12), bits=16, channels="GRAY", scale=257.0)
    (values,) = all_of(ImageFeed(path / "grey.tif", preprocess=preprocess, device="cpu", batch_size=1))
    np.testing.assert_array_equal(values[0], pixels["grey.tif"][..., 0])


def test_resizing_and_padding_keep_16_bits(tmp_path):
    y, x = np.mgrid[:60, :90]
    smooth = (30000 + 20000 * np.sin(x / 20) + 10000 * np.cos(y / 15)).astype(np.uint16)
    (tmp_path / "smooth.png").write_bytes(png(smooth))
    preprocess = Preprocess(size=(40, 40), resize="letterbox", bits=16, channels="GRAY", scale=257.0, fill=100)
    ((values,),) = all_of(ImageFeed(tmp_path, preprocess=preprocess, device="cpu", batch_size=1))
    resized = np.asarray(Image.fromarray(smooth.astype("f4")).resize((40, 27), Image.Resampling.BILINEAR))
    inner = np.abs(values[6:33] - resized)[2:-2, 2:-2]  # DALI and PIL treat the edges differently
    assert inner.max() < 16  # one step of 8 bits is 257
    assert (values[[0, 5, 33, 39]] == 25700).all()


@pytest.mark.parametrize("name", ["grey.png", "rgb.png", "grey.tif", "rgb.tif", "grey.jp2", "grey.pgm", "rgb.ppm"])
def test_lost_bits_are_told(folder, caplog, name):
    path, _ = folder
    with caplog.at_level(logging.INFO, "fastcal"):
        ImageFeed([path / "coarse.png", path / name] if name[-3:] != "png" else path / name, preprocess="raw").close()
    assert [record.levelname for record in caplog.records if "16 bits" in record.message] == ["WARNING"]
    assert f"{name} has 16 bits a channel, and 8 of them are kept; to keep all, set bits to 16" in caplog.text


def test_nothing_is_told_if_no_bits_are_lost(folder, photographs, caplog):
    path, _ = folder
    for data, preprocess in ((photographs, "raw"), (path, Preprocess(bits=16))):
        ImageFeed(data, preprocess=preprocess).close()
    assert "16 bits" not in caplog.text


def test_settings_that_exclude_each_other():
    for settings in ({"dtype": "uint8"}, {"channels": "RGBA"}):
        with pytest.raises(DataError, match="bits 16 is for float32 and the channels RGB, BGR or GRAY; use 8, or feed"):
            Preprocess(bits=16, **settings)
    with pytest.raises(DataError, match="there is no bits 12; choose one of 8, 16"):
        Preprocess(bits=12)
    assert "RGB of 16 bits" in str(Preprocess(bits=16))
    assert "bits" not in str(Preprocess())


@pytest.fixture
def translucent(tmp_path):
    pixels = RANDOM.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    opaque = pixels.copy()
    opaque[..., 3] = 255
    return tmp_path, np.stack([pixels, opaque])


def test_a_network_of_four_channels(translucent, onnx_file):
    path, pixels = translucent
    model = onnx_file("f (float[N, 4, 6, 8] x) => (float[N, 4, 6, 8] y) { y = Relu(x) }")
    preprocess = Preprocess(channels="RGBA", mean=(1.0, 2.0, 3.0, 4.0), std=(1.0, 2.0, 4.0, 8.0))
    with ImageFeed(path, model=model, preprocess=preprocess, device="cpu", batch_size=2) as feed:
        (batch,) = [{name: array.copy() for name, array in batch.items()} for batch in feed]
    expected = (pixels.astype("f4") - [1, 2, 3, 4]) / [1, 2, 4, 8]
    np.testing.assert_array_equal(batch["x"], expected.transpose(0, 3, 1, 2))
    cache = fastcal.calibrate(
        model, ImageFeed(path, model=model, preprocess=preprocess), algorithm="minmax", tensorrt_version="10.3.0"
    )
    assert cache.scales["x"] == pytest.approx(np.abs(expected).max() / 127)


def test_four_channels_last_and_as_they_are(translucent, onnx_file):
    path, pixels = translucent
    model = onnx_file("f (uint8[N, 6, 8, 4] x) => (float[N, 6, 8, 4] y) { y = Cast<to = 1>(x) }")
    with ImageFeed(path, model=model, preprocess=Preprocess(channels="RGBA"), device="cpu", batch_size=2) as feed:
        (batch,) = [{name: array.copy() for name, array in batch.items()} for batch in feed]
    assert batch["x"].dtype == np.uint8
    np.testing.assert_array_equal(batch["x"], pixels)


def test_four_channels_from_a_shard_and_from_a_file_of_settings(translucent, tmp_path):
    path, pixels = translucent
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.add(path / name, name)
    (tmp_path / "p.toml").write_text("channels = 'RGBA'\nsize = [6, 8]\n")
    feed = ImageFeed(tmp_path / "x.tar", preprocess=Preprocess.load(tmp_path / "p.toml"), device="cpu", batch_size=1)
    np.testing.assert_array_equal(all_of(feed), pixels.transpose(0, 3, 1, 2))


def test_four_channels_are_taken_only_if_asked_for(translucent, onnx_file):
    path, _ = translucent
    model = onnx_file("f (float[N, 4, 6, 8] x) => (float[N, 4, 6, 8] y) { y = Relu(x) }")
    with pytest.raises(
        DataError, match=r"takes no images of 1 or 3 channels; feed it arrays instead \(or set channels"
    ):
        ImageFeed(path, model=model)
    six = onnx_file("f (float[N, 6, 6, 8] x) => (float[N, 6, 6, 8] y) { y = Relu(x) }")
    with pytest.raises(DataError, match=r"takes no images of 1 or 3 channels; feed it arrays instead$"):
        ImageFeed(path, model=six, preprocess=Preprocess(channels="RGBA"))
    with pytest.raises(DataError, match="has 3 values, RGBA needs 1 or 4"):
        Preprocess(channels="RGBA", mean=(1.0, 2.0, 3.0))


def test_a_damaged_image_with_alpha_is_named(translucent):
    path, _ = translucent
    encoded = io.BytesIO()
    Image.new("RGBA", (99, 99)).save(encoded, "PNG")
    (path / "c.png").write_bytes(encoded.getvalue()[:60])
    with pytest.raises(DataError, match=r"c\.png cannot be decoded: .*; replace or remove it"):
        all_of(ImageFeed(path, preprocess=Preprocess(size=(6, 8), channels="RGBA"), device="cpu", batch_size=1))


def test_a_preview_of_four_channels(translucent, tmp_path):
    path, pixels = translucent
    with ImageFeed(path, preprocess=Preprocess(size=(6, 8), channels="RGBA"), device="cpu", batch_size=2) as feed:
        sheet = fastcal.preview(feed)
    assert [channel.name for channel in sheet.channels] == ["R", "G", "B", "A"]
    assert sheet.channels[3].mean == pytest.approx(pixels[..., 3].mean())
    sheet.save(tmp_path / "sheet.png")
