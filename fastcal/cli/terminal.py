"""The output of every command: the log, a progress bar, the outcome, the exit status; or JSON lines for programs."""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.status import Status
from rich.table import Table

import fastcal
from fastcal import interrupt
from fastcal.errors import FastcalError, missing

#: Exit statuses: of a check that fails, of an error that the user can correct, and if the reader of the output is gone.
NOT_OK, FAILED, READER_GONE = 1, 2, 128 + signal.SIGPIPE  # shells show the last one for SIGPIPE

#: The error handler for characters that the terminal's encoding lacks: names of files may be any bytes.
UNPRINTABLE = "backslashreplace"

#: The least number of seconds between two lines of JSON that report progress.
_BETWEEN_EVENTS = 0.1

#: The most of TensorRT's warnings that are shown; there may be one for every layer.
_MOST_WARNINGS = 5


@dataclass
class Output:
    """Options that decide what is printed."""

    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print warnings and errors only; with --json also the last line.")
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines for programs: progress, then the outcome.")] = (
        False
    )


#: The options of the command that runs.
output = Output()


@contextlib.contextmanager
def terminal() -> Iterator[Console]:
    """Yield a console on the standard error that shows the log, and turn an error into a line and an exit status.

    Text that C libraries print to the standard error meanwhile is shown only before an unexpected error's traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # None if it is closed
        sys.stdout.reconfigure(errors=UNPRINTABLE)
    stderr, copy = sys.stderr, os.dup(2)
    with tempfile.TemporaryFile() as aside, os.fdopen(copy, "w", buffering=1, errors=UNPRINTABLE) as terminal:
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
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it at the exit
                raise typer.Exit(READER_GONE) from error
            error = missing("fastcal", error)
            if isinstance(error, FastcalError):
                console.print(f"error: {error}")
                with contextlib.suppress(FastcalError):
                    _print_event("error", message=str(error))
                raise typer.Exit(FAILED) from error
            aside.seek(0)
            terminal.write(aside.read().decode(errors="replace"))
            raise
        else:
            handler.show_rest()
        finally:
            os.dup2(copy, 2)
            sys.stderr = stderr
            logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    """Prints log records above the progress bar: of TensorRT's warnings only the first few different ones.

    Errors are kept back, since an error that ends the work is printed anyway.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._errors: list[str] = []
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())  # TensorRT's messages contain line breaks
        if record.levelno >= logging.ERROR:
            self._errors.append(text)
        elif record.name != "fastcal.tensorrt":
            self._print(record.levelno, text)
        elif text not in self._warnings:
            self._warnings.add(text)
            if len(self._warnings) <= _MOST_WARNINGS:
                self._print(record.levelno, text)

    def show_rest(self) -> None:
        """Show the errors that did not end the work, and the number of warnings that were not shown."""
        for text in self._errors:
            self._print(logging.WARNING, text)
        if len(self._warnings) > _MOST_WARNINGS:
            more = len(self._warnings) - _MOST_WARNINGS
            self._print(logging.WARNING, f"TensorRT: {more} more warnings (logger fastcal.tensorrt)")

    def _print(self, level: int, text: str) -> None:
        if output.quiet and level < logging.WARNING:
            return
        self._console.print(f"{'note' if level == logging.INFO else logging.getLevelName(level).lower()}: {text}")


class Bar(Progress):
    """A bar that shows a `fastcal.Progress`, or prints it as JSON; `last` is the latest one.

    The texts name the work before, after and during the batches. Before the first batch and after the last one, a
    spinner takes the bar's place.
    """

    def __init__(self, console: Console, before: str, after: str, during: str = "calibrating") -> None:
        self.last = fastcal.Progress()
        self._told = 0.0
        self._before, self._after = before, after
        self._spinner = Spinner("dots")
        numbers = TextColumn("batches, {task.fields[rate]}, {task.fields[wait]},")
        columns = (
            TextColumn(during),
            BarColumn(),
            MofNCompleteColumn(),
            numbers,
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        super().__init__(*columns, console=console, transient=True, disable=not _shows_movement(console))
        self._batches = self.add_task("", total=None, rate="", wait="")

    def __call__(self, state: fastcal.Progress) -> None:
        """Show `state`."""
        self.last = state
        if not output.quiet and time.monotonic() > self._told + _BETWEEN_EVENTS:
            self._told = time.monotonic()
            _print_event("progress", **asdict(state))
        self.update(self._batches, total=state.total, completed=state.batches, rate=rate(state), wait=waiting(state))

    def status(self, text: str) -> None:
        """Show what is done after the batches."""
        self._after = text

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the parts that rich shows now."""
        task = self.tasks[0] if self.tasks else None
        if task is None or 0 < task.completed < (task.total or 0):
            yield from super().get_renderables()
        else:
            self._spinner.update(text=f"{self._after if task.completed else self._before}, {task.elapsed or 0:.0f} s")
            yield self._spinner


def spinner(console: Console) -> Status:
    """Return a spinner, which shows nothing where nothing should move."""
    return Status("", console=console if _shows_movement(console) else Console(quiet=True))


def _shows_movement(console: Console) -> bool:
    return console.is_terminal and not output.quiet


def say(text: str) -> None:
    """Print a line for people on the standard output."""
    if not (output.quiet or output.json):
        _write(text)


def print_rows(**rows: str) -> None:
    """Print a line for each row: its name and its text."""
    width = max(10, *map(len, rows)) + 1
    for name, text in rows.items():
        say(f"{name:<{width}}{text}")


def print_table(columns: Mapping[str, JustifyMethod], rows: Iterable[Sequence[str]]) -> None:
    """Print a table for people; `columns` has the alignment of each column by its name."""
    if output.quiet or output.json or sys.stdout is None:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Lines are not folded for a file or another program.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with _writing():
        console.print(table)


def finish(**outcome: Any) -> None:
    """Print the outcome as the last line of JSON."""
    _print_event("done", **outcome)


def _print_event(event: str, /, **content: Any) -> None:
    if output.json:
        _write(json.dumps({"event": event} | content))


def _write(text: str) -> None:
    with _writing():
        print(text, flush=True)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Raise FastcalError if writing to the standard output fails; BrokenPipeError, if the reader is gone, passes."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes its buffer there at the exit
        raise FastcalError(
            f"cannot write to the standard output: {error.strerror}; make room, or write to another place"
        ) from error


def rate(progress: fastcal.Progress) -> str:
    """Return the number of images a second, as text."""
    return f"{progress.images / progress.seconds:.0f} images/s"


def waiting(progress: fastcal.Progress) -> str:
    """Return the share of the time spent waiting for data, as text."""
    return f"{progress.waited / progress.seconds:.0%} of the time waiting for data"
