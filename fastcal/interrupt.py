"""Ctrl-C on the command line: the process ends within a second, in any state. Imports the standard library alone."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

#: Exit status after Ctrl-C, as shells have it.
INTERRUPTED = 130

#: The file name of the code that imports a module.
_IMPORTING = "<frozen importlib._bootstrap>"

_GRACE_SECONDS = 0.6
_received = threading.Event()
_said = threading.Event()
_written: list[str] = []


def received() -> bool:
    """Return whether Ctrl-C was pressed: then it is the cause of any exception, also of a decoder's own errors."""
    return _received.is_set()


def wrote(path: str | os.PathLike[str]) -> None:
    """Remember a file that is complete, for the message after Ctrl-C."""
    if str(path) not in _written:
        _written.append(str(path))


def say() -> None:
    """Print once that the work was interrupted, and the files that are complete, a cache without its engine perhaps."""
    if not _said.is_set():
        _said.set()
        outcome = f"already written: {', '.join(_written)}" if _written else "nothing was written"
        print(f"interrupted; {outcome}", file=sys.stderr, flush=True)


def end_soon_after_ctrl_c() -> None:
    """Make Ctrl-C end the process even if KeyboardInterrupt does not.

    KeyboardInterrupt may be swallowed (by the imports of many libraries), may interrupt the acquisition of a lock that
    is then never released, or may have to wait until a decoder has finished an image of a gigapixel.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # by the C handler, also while Python waits

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell ignores it for background processes
        signal.signal(signal.SIGINT, _handle)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        time.sleep(_GRACE_SECONDS)
        say()
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    sys.unraisablehook = _unless_interrupted(sys.__unraisablehook__)
    sys.excepthook = _unless_interrupted(sys.__excepthook__)  # C libraries call it for exceptions that they swallow


def _handle(number: int, frame: FrameType | None) -> None:
    _received.set()
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:  # an exception there can crash a library that is half imported
            say()
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _unless_interrupted(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that prints exceptions as `hook` does, except after Ctrl-C."""
    return lambda *error: None if received() else hook(*error)
