"""JPEG 2000 and odd PNM images are decoded with Pillow: the same pixels as DALI's, and an error for damaged files."""

import io

import numpy as np
import pytest
from PIL import Image

from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed import decode
from fastcal.feed.decode import is_hazardous, make_safe

NATIVE = Preprocess(size=(20, 30))


def encode(image, kind="JPEG2000", **options):
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def flat(level):
    return Image.new("RGB", (30, 20), (level, 0, 255))


def pixels(pnm):
    """The 8-bit RGB pixels of a file: those of 16 bits are scaled as DALI does."""
    with Image.open(io.BytesIO(pnm)) as image:
        if image.mode == "I":
            return np.rint(np.asarray(image) / 257)[..., None].repeat(3, axis=2)
        assert image.mode == "RGB"
        return np.asarray(image)


def noise(mode, size=(31, 19)):
    """A smooth image with colours of all levels; of a mode or, for "16", of 16 bits."""
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if mode == "16":
        return Image.fromarray(random.integers(0, 2**16, size[::-1]).astype(np.uint16))
    image = rgb.convert(mode.replace("A", ""))
    if mode.endswith("A"):
        image.putalpha(rgb.convert("L"))
    return image


@pytest.mark.parametrize("content", [encode(flat(7), "JPEG"), encode(flat(7), "PNG"), encode(flat(7), "PPM"), b"",
                                     b"P6 2 1 255 123456 and more", b"P5\n1\t1 255\n1", b"P5 2 1 65535 1234",
                                     b"P6 1 1 65535\n123456"])  # fmt: skip
def test_safe_images_stay_as_they_are(content):
    assert make_safe(content) is content


@pytest.mark.parametrize("size", [(31, 19), (1, 1), (64, 3)])
@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (16, 16)}, {"progression": "RPCL"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_jpeg_2000(mode, options, size):
    image = noise(mode, size)
    np.testing.assert_array_equal(pixels(make_safe(encode(image, **options))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG2000", "PPM"])
def test_16_bits_are_kept(kind):
    image = noise("16")
    with Image.open(io.BytesIO(make_safe(encode(image, kind)))) as kept:
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(image))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"P3 1 1 255 3 4 5\n", [3, 4, 5]),
        (b"P6 #odd\n1 1 255\n\3\4\5", [3, 4, 5]),
        (b"P6 1 1 65535\n\3\3\4\4\xff\xff", [3, 4, 255]),
        (b"P5 1 1 15\n\5", [85, 85, 85]),
        (b"P5 1 1 4095\n\x0f\xff", [255, 255, 255]),
        (b"P4 1 1\n\0", [255, 255, 255]),
        (b"P1 1 1\n1", [0, 0, 0]),
    ],
)
def test_pnm(content, expected):
    assert pixels(make_safe(content)).tolist() == [[expected]]


@pytest.mark.parametrize(
    "content",
    [b"P6 2 1 255 12345", b"P6 2 1 65535 12345678901", b"P5 2 1 65535 123", b"P6 0 1 255 1",
     b"P5 9999999 1 255 ", b"P6", b"P7\nWIDTH 1\n", encode(flat(7))[:90],
     encode(flat(7))[:-9], encode(flat(7), no_jp2=True)[:60], encode(flat(7), no_jp2=True)[:42]],
)  # fmt: skip
def test_damaged_images_are_an_error(content):
    with pytest.raises(ValueError, match=r"^\S.*\S$"):
        make_safe(content)


def test_colours_of_more_than_8_bits_are_rejected_since_pillow_turns_their_white_to_black():
    stream = bytearray(encode(flat(7), no_jp2=True))
    assert stream[42:51:3] == bytes([7, 7, 7])  # bits of the channels, less one
    stream[45] = 11
    with pytest.raises(ValueError, match="several channels of 12 bits are not supported, convert it to 8 bits"):
        make_safe(bytes(stream))


def test_images_larger_than_the_memory_are_rejected(monkeypatch):
    header = b"P6 20000 10000 65535\n"
    monkeypatch.setattr(decode, "free_memory", lambda: 20000 * 10000 * 16 - 1)
    with pytest.raises(ValueError, match="20000x10000 pixels do not fit the free memory"):
        make_safe(header)
    monkeypatch.setattr(decode, "free_memory", lambda: 16)
    assert pixels(make_safe(b"P3 1 1 255 3 4 5\n")).tolist() == [[[3, 4, 5]]]


def test_names_of_files_that_may_be_hazardous():
    assert is_hazardous("a/B.JP2")
    assert is_hazardous("b.pnm")
    assert not is_hazardous("b.jpg")


def test_a_damaged_image_is_named_or_skipped(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.jp2").write_bytes(encode(flat(number)))
    (tmp_path / "3.jp2").write_bytes(encode(flat(3))[:-9])
    with (
        ImageFeed(tmp_path, preprocess=NATIVE, batch_size=2) as feed,
        pytest.raises(FastcalError, match=r"3.jp2 cannot be decoded: broken data stream .*; replace or remove it"),
    ):
        list(feed)
    feed = ImageFeed(tmp_path, preprocess=NATIVE, batch_size=1, skip_unreadable=True, max_unreadable=20)
    with feed:
        assert [int(batch["input"][0, 0, 0, 0]) for batch in feed] == [0, 1, 2, 4, 5]
    assert feed.skipped == [str(tmp_path / "3.jp2")]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "BMP", "WEBP", "GIF", "JPEG2000", "PPM"])
def test_images_with_alpha_are_pils(kind, mode):
    image = noise("RGB").quantize(7) if mode == "P" else noise(mode)
    try:
        encoded = encode(image, kind)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    with Image.open(io.BytesIO(encoded)) as opened:
        if opened.mode.startswith("I"):
            opened = Image.fromarray(np.rint(np.asarray(opened) / 257).astype("u1"))
        expected = np.asarray(opened.convert("RGBA"))
    with Image.open(io.BytesIO(make_safe(encoded, has_alpha=True))) as safe:
        assert (safe.format, safe.mode) == ("PNG", "RGBA")
        np.testing.assert_array_equal(np.asarray(safe), expected)


@pytest.mark.parametrize("values", [np.ones((2, 2), "f4"), np.full((2, 2), 70000, "i4")])
def test_32_bits_are_no_pixels_with_alpha(values):
    with pytest.raises(ValueError, match="32 bits are not supported, convert it to 8 bits"):
        make_safe(encode(Image.fromarray(values), "TIFF"), has_alpha=True)
