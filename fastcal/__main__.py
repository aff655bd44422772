"""The `fastcal` command; `python -m fastcal` is the same."""

import os
import sys
import traceback

from fastcal import interrupt
from fastcal.wake import wake_gpu

#: Exit status of a bug in fastcal. Python's own, 1, has another meaning here: two caches differ, for instance.
_BUG = 70

#: Exit status of errors that the user can correct.
_UNAVAILABLE = 2


def main() -> None:
    """Run the command line."""
    _open_closed()
    interrupt.end_soon_after_ctrl_c()
    if sys.argv[1:2] == ["calibrate"]:
        wake_gpu()
    try:
        from fastcal.cli import app

        app(prog_name="fastcal")
    except BaseException as error:
        if interrupt.received():
            interrupt.say()
            sys.exit(interrupt.INTERRUPTED)
        if isinstance(error, SystemExit):
            raise
        from fastcal.errors import missing

        if (known := missing("fastcal", error)) is not error:
            print(f"error: {known}", file=sys.stderr)
            sys.exit(_UNAVAILABLE)
        traceback.print_exc()
        sys.exit(_BUG)


def _open_closed() -> None:
    """Open standard streams that are closed, to nothing: the next file opened would become one of them."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115 - stays open


if __name__ == "__main__":
    main()
