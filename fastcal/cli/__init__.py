"""The `fastcal` command: a module for each of its commands, and what they share."""

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

_STATUS = (
    "Exit status: 0 done; 1 the answer is no (caches differ, a cache is not in order, the doctor found something to "
    "mend); 2 something that you can put right, said in one line; 70 a fault of fastcal's own; 130 Ctrl-C; 141 "
    "nobody reads the output any more."
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
    (quantize, "fastcal quantize model.onnx model.cache -o model.qdq.onnx"),
    (build, "fastcal build model.onnx images/ -o model.engine --cache model.cache"),
    (doctor, "fastcal doctor > report.txt"),
):
    app.command(epilog=f"Example: {_example}")(with_options(_command))
app.add_typer(cache, name="cache")
