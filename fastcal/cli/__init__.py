"""The `fastcal` command: a module for each of its commands, and what they share."""

from importlib.metadata import version
from typing import Annotated

import typer

from fastcal.cli.build import build
from fastcal.cli.calibrate import calibrate
from fastcal.cli.options import with_options
from fastcal.cli.quantize import quantize

app = typer.Typer(
    help="INT8 calibration for TensorRT at the speed of the data.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastcal {version('fastcal')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (calibrate, quantize, build):
    app.command()(with_options(_command))
