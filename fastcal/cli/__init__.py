"""The `fastcal` command: a module for each subcommand, and modules that they share."""

from importlib.metadata import version
from typing import Annotated

import typer

from fastcal.cli.build import build
from fastcal.cli.cache import app as cache
from fastcal.cli.calibrate import calibrate
from fastcal.cli.compare import compare
from fastcal.cli.doctor import doctor
from fastcal.cli.options import with_options
from fastcal.cli.preview import preview
from fastcal.cli.quantize import quantize
from fastcal.cli.tune import tune

_STATUS = (
    "Exit status: 0 done; 1 a check failed (caches differ, a cache is not in order, the doctor found something to "
    "repair); 2 an error that you can correct, explained in one line; 70 a bug in fastcal; 130 Ctrl-C; 141 the reader "
    "of the output is gone."
)

app = typer.Typer(
    help="INT8 calibration for TensorRT at the speed of the data.",
    epilog=_STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
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


for _command, _example in (
    (preview, "fastcal preview images/ --model model.onnx -o sheet.png"),
    (calibrate, "fastcal calibrate model.onnx images/ -o model.cache --limit 500"),
    (compare, "fastcal compare model.onnx images/ --cache model.cache"),
    (quantize, "fastcal quantize model.onnx images/ -o model.qdq.onnx"),
    (tune, "fastcal tune model.onnx images/ --target 99% -o model.tuned.json"),
    (build, "fastcal build model.onnx images/ -o model.engine --cache model.cache"),
    (doctor, "fastcal doctor > report.txt"),
):
    app.command(epilog=f"Example: {_example}")(with_options(_command))
app.add_typer(cache, name="cache")
