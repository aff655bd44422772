"""Ctrl-C on the command line: the process is gone within a second, whatever it is doing. Imports next to nothing."""

import os
import signal
import sys
import threading
import time
import types

#: Exit status after Ctrl-C, as shells have it.
INTERRUPTED = 130

_GRACE_SECONDS = 0.6
_received = threading.Event()
_said = threading.Event()
_written: list[str] = []


def received() -> bool:
    """Whether Ctrl-C was pressed: whatever exception ends the work then, that is its cause.

    A compiler or a decoder interrupted in one of its callbacks raises errors of its own.
    """
    return _received.is_set()


def wrote(path: str | os.PathLike[str]) -> None:
    """Remember a file that is there, whole, whatever happens now."""
    if str(path) not in _written:
        _written.append(str(path))


def say() -> None:
    """Tell the user, once, and which files there are already: a cache stays when its engine is not built."""
    if not _said.is_set():
        _said.set()
        outcome = f"already written: {', '.join(_written)}" if _written else "nothing was written"
        print(f"interrupted; {outcome}", file=sys.stderr, flush=True)


def end_soon_after_ctrl_c() -> None:
    """See to it that Ctrl-C ends the process even where its exception does not.

    The exception it raises may be raised where it is swallowed (many libraries' imports), or in the middle of a lock's
    acquisition, which then is never released, or wait for a decoder to end with an image of a gigapixel.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # told by the system's handler, not when Python comes to it

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background, shells have it ignored
        signal.signal(signal.SIGINT, _handle)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        time.sleep(_GRACE_SECONDS)
        say()
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    sys.unraisablehook = _report_unraisable
    sys.excepthook = _report_uncaught  # libraries in C call it for exceptions they do not pass on


def _handle(number: int, frame: object) -> None:
    _received.set()
    raise KeyboardInterrupt


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what was raised where it cannot be handled, unless after Ctrl-C: see `received`."""
    if not received():
        sys.__unraisablehook__(unraisable)


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """Print what nobody caught, unless after Ctrl-C."""
    if not received():
        sys.__excepthook__(kind, error, traceback)
