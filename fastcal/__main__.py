"""`python -m fastcal` is `fastcal`."""

from fastcal.cli import main

main()
