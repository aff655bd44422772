"""The `fastcal` command; `python -m fastcal` is the same."""

import sys
import traceback

from fastcal import interrupt

#: Exit status of what should not happen; Python's own, 1, says that two caches differ, for instance.
_FAULT = 70


def main() -> None:
    """Run the command line."""
    interrupt.end_soon_after_ctrl_c()
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
        sys.exit(_FAULT)


if __name__ == "__main__":
    main()
