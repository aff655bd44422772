"""The `fastcal` command; `python -m fastcal` is the same."""

import sys
import traceback

from fastcal import interrupt
from fastcal.wake import wake_gpu

#: Exit status of a bug in fastcal. Python's own, 1, has another meaning here: two caches differ, for instance.
_BUG = 70


def main() -> None:
    """Run the command line."""
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
        traceback.print_exc()
        sys.exit(_BUG)


if __name__ == "__main__":
    main()
