"""Decoding in a process of its own, for what crashes the process that decodes it.

Of 2,000 damaged JPEG 2000 images, 22 crashed the decoder that DALI 2.4 has for them, OpenJPEG, by overwriting memory;
none of as many JPEG, PNG, BMP, WebP, TIFF or PNM images did theirs.
"""

import os
import select
import signal
import subprocess
import sys
from typing import IO, Any

from fastcal.errors import FastcalError

#: How many seconds an image may take.
_TIMEOUT = 60

# How a JPEG 2000 file begins, and the bare code stream.
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")


def is_hazardous(path: str | os.PathLike[str]) -> bool:
    """Whether files of this name are to be decoded here."""
    return os.path.splitext(path)[1].lower() == ".jp2"


class ContainedDecoder:
    """Decodes JPEG 2000 images in a process of its own, which starts with the first and may crash or hang."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, content: bytes) -> bytes:
        """An image that is safe to decode: `content` itself or, of JPEG 2000, its pixels as a PPM file.

        Raises:
            ValueError: It cannot be decoded.
        """
        if not content.startswith(_JPEG_2000):
            return content
        for is_fresh in (self._process is None, True):
            try:
                return self._ask(content)
            except _CrashError as error:
                if is_fresh:  # else an earlier image may have done it
                    raise ValueError(f"it crashes the decoder ({error})") from None
        raise AssertionError

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _ask(self, content: bytes) -> bytes:
        self._process = process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, content)
            if not select.select([process.stdout], [], [], _TIMEOUT)[0]:
                self.close()
                raise ValueError(f"it takes longer than {_TIMEOUT} s")
            pixels = _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            status = process.wait()
            self.close()
            if status >= 0:
                raise FastcalError(f"no process for JPEG 2000 can be started: it ends with status {status}") from None
            raise _CrashError(signal.Signals(-status).name) from None
        if not pixels:
            self.close()  # what it may have overwritten must not become another image's pixels
            raise ValueError("damaged, or no image DALI knows")
        return pixels


class _CrashError(Exception):
    """A signal ended the process."""


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "fastcal.feed.contained"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for this process, which ends that
    )


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """The next message; raises EOFError where there is none, or not all of it."""
    header = stream.read(8)
    content = stream.read(int.from_bytes(header, "little"))
    if len(header) < 8 or len(content) < int.from_bytes(header, "little"):
        raise EOFError
    return content


def _work() -> None:
    """Decode what comes on standard input, and answer on standard output; nothing for what cannot be decoded."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    pipeline = None
    while True:
        try:
            content = _receive(sys.stdin.buffer)
        except EOFError:
            return
        pipeline = pipeline or _define()
        try:
            pixels = _decode(pipeline, content)
        except RuntimeError:
            _send(answers, b"")
            return
        _send(answers, b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes())


def _define() -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipeline.build()
    return pipeline


def _decode(pipeline: Any, content: bytes) -> Any:
    import numpy as np

    pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8)])
    return np.asarray(pipeline.run()[0].at(0))


if __name__ == "__main__":
    _work()
