"""The `fastcal` command; `python -m fastcal` is the same."""

import sys

from fastcal import interrupt


def main() -> None:
    """Run the command line."""
    interrupt.end_soon_after_ctrl_c()
    try:
        from fastcal.cli import app

        app()
    except BaseException:
        if not interrupt.received():
            raise
        interrupt.say()
        sys.exit(interrupt.INTERRUPTED)


if __name__ == "__main__":
    main()
