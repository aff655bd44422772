"""What the `fastcal` command can do."""

from __future__ import annotations  # the helpers' annotations name what is to be imported late

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastcal
from fastcal import interrupt
from fastcal.cache import ALGORITHMS
from fastcal.errors import FastcalError
from fastcal.files import check_writable

#: Exit status for what the user can put right.
FAILED = 2


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


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX model.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder of images, or a list file with one image path a line.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="CACHE", help="Where to write the cache.")],
    algorithm: Annotated[str, typer.Option(help=f"How scales are picked: {', '.join(ALGORITHMS)}.")] = "entropy2",
    quantile: Annotated[float, typer.Option(help="For percentile: the share of values that is not clipped.")] = 0.9999,
    preprocess: Annotated[
        str, typer.Option(help="What the network was trained with: imagenet, yolo, unit (0..1) or raw (0..255).")
    ] = "imagenet",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size to prepare images in, where the model's is dynamic.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in a batch. [default: the model's, else 32]", show_default=False)
    ] = None,
    input_name: Annotated[str | None, typer.Option(help="The input that takes the images.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffle the images before --limit.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the shuffled order.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use this many images at most.")] = None,
    last_batch: Annotated[
        str, typer.Option(help="wrap: complete the last batch with the first images; drop: leave it out.")
    ] = "wrap",
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Version that will read the cache. [default: the one installed, else 10.16.1]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to use. [default: one per core]")] = None,
) -> None:
    """Write the calibration cache TensorRT would write, from a model and images."""
    with _terminal() as console:
        from fastcal.model import Model

        network = Model(model)
        _check_output(output, network)
        feed = fastcal.ImageFeed(
            data,
            preprocess=_preprocess(preprocess, size),
            model=network,
            batch_size=batch_size,
            input_name=input_name,
            shuffle=shuffle,
            seed=seed,
            limit=limit,
            last_batch=last_batch,
            threads=threads,
        )
        with feed, _progress_bar(console) as progress:
            cache = fastcal.calibrate(
                network,
                feed,
                algorithm=algorithm,
                quantile=quantile,
                tensorrt_version=tensorrt,
                threads=threads,
                progress=progress,
            )
        cache.save(output)
        _print_summary(cache, feed, progress.last, output)


def _check_output(output: str, network: Any) -> None:
    """Fail now, not after the work, if the cache cannot be written."""
    if os.path.realpath(output) == os.path.realpath(network.path):
        raise FastcalError(f"{output} is the model itself; name another file for the cache")
    longest_line = len(": ffffffff\n")
    check_writable(output, sum(len(os.fsencode(name)) + longest_line for name in ["header" * 8, *network.activations]))


def _preprocess(name: str, size: str | None) -> fastcal.Preprocess:
    preprocess = fastcal.Preprocess.preset(name)
    if size is None:
        return preprocess
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise FastcalError(f"--size {size} is not a size; write height x width, like 224x224")
    return replace(preprocess, size=(int(match[1]), int(match[2] or match[1])))


class _Bar:
    """Shows a `fastcal.Progress` on the terminal."""

    def __init__(self, bar: Progress) -> None:
        self.last = fastcal.Progress()
        self._bar = bar
        self._task = bar.add_task("", total=None, rate="", wait="")

    def __call__(self, state: fastcal.Progress) -> None:
        self.last = state
        self._bar.update(
            self._task,
            total=state.total,
            completed=state.batches,
            rate=_rate(state),
            wait=_waiting(state),
        )


@contextlib.contextmanager
def _progress_bar(console: Console) -> Iterator[_Bar]:
    columns = [
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, {task.fields[rate]}, {task.fields[wait]},"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar)


def _print_summary(
    cache: fastcal.CalibrationCache, feed: fastcal.ImageFeed, progress: fastcal.Progress, output: str
) -> None:
    nonzero = [name for name in cache.scales if cache.scales[name]]
    widest = max(nonzero, key=lambda name: cache.scales[name], default=None)
    narrowest = min(nonzero, key=lambda name: cache.scales[name], default=None)
    for name, text in (
        ("images", f"{len(feed.paths)} in {progress.batches} batches of {feed.batch_size}"),
        ("prepared", f"{feed.preprocess}"),
        ("speed", f"{_rate(progress)}, {_waiting(progress)}"),
        ("tensors", f"{len(cache.scales)}, scales by {cache.algorithm}"),
        ("widest", f"{cache.scales[widest]:.6g} for {widest}" if widest else "all scales are 0"),
        ("narrowest", f"{cache.scales[narrowest]:.6g} for {narrowest}" if narrowest else "all scales are 0"),
        ("cache", f"{output}, {cache.header}"),
    ):
        typer.echo(f"{name:<11}{text}")


def _rate(progress: fastcal.Progress) -> str:
    return f"{progress.images / progress.seconds:.0f} images/s"


def _waiting(progress: fastcal.Progress) -> str:
    return f"{progress.waited / progress.seconds:.0%} of the time waiting for data"


@contextlib.contextmanager
def _terminal() -> Iterator[Console]:
    """A console on the standard error that shows the log, and how the work ends when it does not end well.

    A FastcalError becomes one line and status 2, Ctrl-C one line and status 130. What C libraries print to the
    standard error meanwhile (a decoder's complaints, say) is kept aside, and shown only when the work ends in an error
    that is not understood.
    """
    stderr, copy = sys.stderr, os.dup(2)
    with tempfile.TemporaryFile() as aside, os.fdopen(copy, "w", buffering=1) as terminal:
        console = Console(file=terminal, soft_wrap=True, highlight=False, markup=False)
        handler = _ConsoleHandler(console)
        logger = logging.getLogger("fastcal")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        os.dup2(aside.fileno(), 2)
        sys.stderr = terminal
        try:
            yield console
        except BaseException as error:
            if interrupt.received():
                interrupt.say()
                raise typer.Exit(interrupt.INTERRUPTED) from error
            if isinstance(error, FastcalError):
                console.print(f"error: {error}")
                raise typer.Exit(FAILED) from error
            aside.seek(0)
            terminal.write(aside.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(copy, 2)
            sys.stderr = stderr
            logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    """Prints log records above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        level = "note" if record.levelno == logging.INFO else record.levelname.lower()
        self._console.print(f"{level}: {record.getMessage()}")
