"""Decoding in a process of its own, for what may crash the process that decodes it.

Of damaged JPEG 2000 and PNM images some make the decoders of DALI 2.4 overwrite memory, and a process that decodes some
hundreds of them crashes. Thousands of damaged JPEG, PNG, BMP, WebP and TIFF images never did that.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from typing import IO, Any

from fastcal.errors import FastcalError

#: How many seconds an image may take.
_TIMEOUT = 60

# What an answer begins with; the image's pixels or what is wrong follow.
_DECODED, _FAILED, _CRASHED = b"+", b"-", b"!"

# The exit status of a child that nothing was left for.
_NO_MORE = 3

_HAZARDOUS = (".jp2", ".pbm", ".pgm", ".pnm", ".ppm")

# How a JPEG 2000 file begins, and the bare code stream.
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")

_PNM = tuple(b"P%d" % number for number in range(1, 8))

# The header of a PNM file of 8-bit pixels: their number of channels is 1 (P5) or 3 (P6).
_PLAIN_PNM = re.compile(rb"P([56])\s+(\d{1,6})\s+(\d{1,6})\s+255\s")


def is_hazardous(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name may be one that is to be decoded here."""
    return os.fspath(path).lower().endswith(_HAZARDOUS)


def _is_safe(content: bytes) -> bool:
    """Whether an image may be decoded anywhere: of another format, or a plain PNM file with all its pixels."""
    if not content.startswith(_PNM):
        return not content.startswith(_JPEG_2000)
    header = _PLAIN_PNM.match(content)
    if header is None:
        return False
    channels = 1 if header[1] == b"5" else 3
    return len(content) - header.end() >= int(header[2]) * int(header[3]) * channels > 0


class ContainedDecoder:
    """Decodes images that are not safe, in a process of its own, which may crash or hang."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def decode(self, content: bytes) -> bytes:
        """An image that is safe to decode: `content` itself where it is, else its pixels as a PPM file.

        Raises:
            ValueError: It cannot be decoded.
        """
        if _is_safe(content):
            return content
        if self._owner != os.getpid():
            self.close()
        is_first = self._process is None
        answer = self._ask(content)
        if answer.startswith(_CRASHED) and not is_first:  # it may be an earlier image's fault
            answer = self._ask(content)
        if not answer.startswith(_DECODED):
            raise ValueError(answer[1:].decode())
        return answer[1:]

    def __reduce__(self) -> tuple[Any, ...]:
        return ContainedDecoder, ()  # pickled without its process

    def close(self) -> None:
        """End the process; in a fork of the process that started it, only forget it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def __del__(self) -> None:
        self.close()

    def _ask(self, content: bytes) -> bytes:
        if self._process is None:
            self._process, self._owner = _start(), os.getpid()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, content)
            if not select.select([process.stdout], [], [], _TIMEOUT)[0]:
                self.close()
                return b"%stakes longer than %g s" % (_FAILED, _TIMEOUT)
            answer = _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            status = process.wait()
            self.close()
            raise FastcalError(f"the process that decodes JPEG 2000 and PNM ends with status {status}") from None
        if answer.startswith(_CRASHED):  # perhaps in freeing what it had answered: then another answer is to come
            self.close()
        return answer


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
    """Let children decode what comes on standard input and answer on standard output.

    A child ends with the first image that it cannot decode: what that may have overwritten must not become another
    image's pixels. The children are forked once DALI is imported, which is what takes long.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    import nvidia.dali  # noqa: F401

    while True:
        child = os.fork()
        if not child:
            os._exit(_decode_all(answers))
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            _send(answers, b"%scrashes the decoder (%s)" % (_CRASHED, name.encode()))
        elif os.WEXITSTATUS(status) == _NO_MORE:
            return


def _decode_all(answers: IO[bytes]) -> int:
    """Decode images up to the first that cannot be; returns the exit status."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipeline.build()
    while True:
        try:
            content = _receive(sys.stdin.buffer)
        except EOFError:
            return _NO_MORE
        try:
            pixels = _decode(pipeline, content)
        except RuntimeError:
            _send(answers, _FAILED + b"is damaged, or no image DALI knows")
            return 0
        _send(answers, _DECODED + b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes())


def _decode(pipeline: Any, content: bytes) -> Any:
    import numpy as np

    pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8)])
    return np.asarray(pipeline.run()[0].at(0))


if __name__ == "__main__":
    _work()
