"""What the markers of JPEG files say, of files that PIL wrote."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from fastcal import ImageFeed
from fastcal.feed.jpeg import has_end_of_image, has_rgb_components


def encoded(mode="RGB", exif=None, **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if exif is not None:
        options["exif"] = exif
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "is_rgb"),
    [
        ({}, False),
        ({"keep_rgb": True}, True),
        ({"keep_rgb": True, "progressive": True}, True),
        ({"keep_rgb": True, "exif": b"Exif\0\0" + bytes(60000)}, True),
        ({"progressive": True}, False),
        ({"mode": "L"}, False),
        ({"mode": "CMYK"}, False),
    ],
)
def test_rgb_components_are_told(options, is_rgb):
    assert has_rgb_components(encoded(**options)) is is_rgb


def test_components_names_tell_where_no_marker_does():
    jpeg = encoded(keep_rgb=True)
    place = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    plain = jpeg[:place] + jpeg[place + 16 :]
    assert has_rgb_components(plain)  # PIL names them R, G and B
    frame = plain.index(b"\xff\xc0") + 10
    numbered = bytearray(plain)
    numbered[frame], numbered[frame + 3], numbered[frame + 6] = 1, 2, 3
    assert not has_rgb_components(bytes(numbered))
    jfif = b"\xff\xe0\x00\x10JFIF\0" + bytes(9)
    assert not has_rgb_components(jpeg[:2] + jfif + jpeg[2:])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 20, 80])
def test_a_file_that_breaks_off_tells_nothing(size):
    whole = encoded(keep_rgb=True)
    assert not has_rgb_components(whole[:size])
    assert not has_end_of_image(whole[:size])


def test_an_end_of_image_within_a_segment_is_none():
    assert has_end_of_image(encoded())
    exif = b"Exif\0\0\xff\xd9"
    assert has_end_of_image(encoded(exif=exif))
    assert not has_end_of_image(encoded(exif=exif)[:-2])


@pytest.mark.parametrize(("number", "is_found"), [(0, True), (2, True), (3, False)])
def test_a_feed_looks_at_the_first_images(tmp_path, caplog, number, is_found):
    for other in range(5):
        (tmp_path / f"{other}.jpg").write_bytes(encoded(keep_rgb=other == number) if other != 1 else b"no image")
    feed = ImageFeed(tmp_path, preprocess="unit", device="cpu", hw_decoder_load=0.5)
    assert feed._plan.decodes_on_cpu is is_found
    part = ImageFeed(tmp_path, preprocess="unit", hw_decoder_load=0.5).part(range(1), gpu=0, threads=1)
    assert part._plan.decoding.on_cpu is is_found
    assert part._plan.decoding.is_part
    said = [record.getMessage() for record in caplog.records if "RGB" in record.getMessage()]
    assert [text.split()[0] for text in said] == [str(tmp_path / f"{number}.jpg")] * 2 * is_found


@pytest.mark.parametrize(("megabytes", "options", "is_small"), [
    (55, {}, True), (65, {}, False), (55, {"hw_decoder_load": 0.9}, False),
])  # fmt: skip
def test_the_cpu_decodes_what_it_decodes_before_a_gpus_decoder_has_started(tmp_path, megabytes, options, is_small):
    cores = len(os.sched_getaffinity(0))
    for number in range(200):
        (tmp_path / f"{number:03}.jpg").write_bytes(encoded())
        os.truncate(tmp_path / f"{number:03}.jpg", megabytes * cores * 5_000)  # 200 of these; takes no space
    feed = ImageFeed(tmp_path, preprocess="unit", device="cpu", **options)
    assert feed._plan.decodes_on_cpu is is_small
    part = ImageFeed(tmp_path, preprocess="unit", **options).part(range(1), gpu=0, threads=30)
    assert part._plan.decoding.on_cpu is is_small
    assert part._plan.thread_count == (30 if is_small else 8)
