"""JPEG 2000 and odd PNM images are decoded in a process of its own, whose crash costs one image."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed import contained
from fastcal.feed.contained import ContainedDecoder

NATIVE = Preprocess(size=(20, 30))


def encode(level, kind="JPEG2000", **options):
    encoded = io.BytesIO()
    Image.new("RGB", (30, 20), (level, 0, 255)).save(encoded, kind, **options)
    return encoded.getvalue()


def start(program):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program], **pipes, start_new_session=True)


@pytest.fixture
def decoder():
    decoder = ContainedDecoder()
    yield decoder
    decoder.close()


def pixels(ppm):
    with Image.open(io.BytesIO(ppm)) as image:
        return np.asarray(image)[0, 0].tolist()


def test_what_is_not_safe_comes_out_as_pixels_and_all_else_as_it_is(decoder):
    for safe in (
        encode(7, "JPEG"),
        encode(7, "PNG"),
        encode(7, "PPM"),
        b"",
        b"P6 2 1 255 123456 and more",
        b"P5\n1\t1 255\n1",
    ):
        assert decoder.decode(safe) is safe
    assert decoder._process is None
    assert pixels(decoder.decode(b"P3 1 1 255 3 4 5\n")) == [3, 4, 5]
    assert pixels(decoder.decode(b"P6 #odd\n1 1 255\n\3\4\5")) == [3, 4, 5]
    for unsafe in (b"P6 2 1 255 12345", b"P6 0 1 255 1", b"P5 9999999 1 255 ", b"P6"):
        with pytest.raises(ValueError, match=r"is damaged, or no image"):
            decoder.decode(unsafe)
    assert pixels(decoder.decode(encode(7))) == [7, 0, 255]
    process = decoder._process
    assert pixels(decoder.decode(encode(8, no_jp2=True))) == [8, 0, 255]
    assert decoder._process is process


#: The process with a decoder that crashes at what ends in "crash", and on everything that comes after "overwrite".
CRASHING = """
import os, signal
from fastcal.feed import contained
decode, overwritten = contained._decode, []
def crash_or_decode(pipeline, content):
    if content.endswith(b"crash") or overwritten:
        os.kill(os.getpid(), signal.SIGABRT)
    if content.endswith(b"overwrite"):
        overwritten.append(content)
    return decode(pipeline, content)
contained._decode = crash_or_decode
contained._work()
"""


def test_what_cannot_be_decoded_is_told_from_what_crashes(decoder, monkeypatch):
    monkeypatch.setattr(contained, "_start", lambda: start(CRASHING))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^is damaged, or no image DALI knows$"):
            decoder.decode(encode(7)[:90])
        assert pixels(decoder.decode(encode(9))) == [9, 0, 255]
        with pytest.raises(ValueError, match=r"^crashes the decoder \(SIGABRT\)$"):
            decoder.decode(encode(7) + b"crash")
    assert pixels(decoder.decode(encode(10) + b"overwrite")) == [10, 0, 255]
    assert pixels(decoder.decode(encode(11))) == [11, 0, 255]  # it is not to blame


#: The process with a decoder that crashes once it has answered: at what ends in "overwrite".
CRASHING_AFTERWARDS = """
import os, signal
from fastcal.feed import contained
decode, send, overwritten = contained._decode, contained._send, []
def decode_and_overwrite(pipeline, content):
    overwritten.extend([content] * content.endswith(b"overwrite"))
    return decode(pipeline, content)
def answer_and_crash(stream, content):
    send(stream, content)
    if overwritten:
        os.kill(os.getpid(), signal.SIGABRT)
contained._decode, contained._send = decode_and_overwrite, answer_and_crash
contained._work()
"""


def test_a_crash_after_an_answer_is_no_answer_to_the_next_image(decoder, monkeypatch):
    monkeypatch.setattr(contained, "_start", lambda: start(CRASHING_AFTERWARDS))
    assert pixels(decoder.decode(encode(20) + b"overwrite")) == [20, 0, 255]
    for level in (21, 22, 23):
        assert pixels(decoder.decode(encode(level))) == [level, 0, 255]
    with pytest.raises(ValueError, match=r"^is damaged, or no image DALI knows$"):
        decoder.decode(encode(24)[:90] + b"overwrite")
    for level in (25, 26, 27):
        assert pixels(decoder.decode(encode(level))) == [level, 0, 255]


def test_a_fork_has_a_process_of_its_own(decoder):
    decoder.decode(encode(7))
    process = decoder._process
    child = os.fork()
    if not child:
        try:
            decoder.close()
            del decoder
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert process.poll() is None
    child = os.fork()
    if not child:
        status = 1
        try:
            status = int(pixels(decoder.decode(encode(8))) != [8, 0, 255] or decoder._process is process)
            decoder.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert pixels(decoder.decode(encode(9))) == [9, 0, 255]
    assert decoder._process is process


def test_what_takes_too_long_is_given_up(decoder, monkeypatch):
    monkeypatch.setattr(contained, "_start", lambda: start("import time; time.sleep(60)"))
    monkeypatch.setattr(contained, "_TIMEOUT", 0.1)
    with pytest.raises(ValueError, match=r"^takes longer than 0.1 s$"):
        decoder.decode(encode(7))
    assert decoder._process is None


def test_a_process_that_cannot_be_started_is_no_crash(decoder, monkeypatch):
    monkeypatch.setattr(contained, "_start", lambda: start("import sys; sys.exit(3)"))
    with pytest.raises(FastcalError, match="the process that decodes JPEG 2000 and PNM ends with status 3"):
        decoder.decode(encode(7))


def test_the_image_that_crashes_is_named_or_skipped(tmp_path, monkeypatch):
    """With a crash of our own in the process: OpenJPEG's come at some image after the one that overwrote memory."""
    monkeypatch.setattr(contained, "_start", lambda: start(CRASHING))
    for number in range(6):
        (tmp_path / f"{number}.jp2").write_bytes(encode(number))
    (tmp_path / "3.jp2").write_bytes(encode(3) + b"crash")
    with (
        ImageFeed(tmp_path, preprocess=NATIVE, batch_size=2) as feed,
        pytest.raises(
            FastcalError, match=r"3.jp2 cannot be decoded: it crashes the decoder \(SIGABRT\); replace or remove it"
        ),
    ):
        list(feed)
    feed = ImageFeed(tmp_path, preprocess=NATIVE, batch_size=1, skip_unreadable=True, max_unreadable=20)
    with feed:
        assert [int(batch["input"][0, 0, 0, 0]) for batch in feed] == [0, 1, 2, 4, 5]
    assert feed.skipped == [str(tmp_path / "3.jp2")]
