"""What the `fastcal` command can do."""

from __future__ import annotations  # the helpers' annotations name what is to be imported late

import contextlib
import functools
import importlib.util
import inspect
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner

import fastcal
from fastcal import interrupt
from fastcal.cache import ALGORITHMS, DEFAULT_TENSORRT_VERSION, ENGINES, largest_size
from fastcal.errors import FastcalError
from fastcal.feed.preprocess import PRESETS
from fastcal.files import check_writable, write_atomically

if TYPE_CHECKING:
    from onnx import ModelProto

    from fastcal.calibrators import FeedCalibrator
    from fastcal.model import Model

#: Exit status for what the user can put right.
FAILED = 2

#: How many of TensorRT's warnings are shown; it may have one for every layer.
_MOST_WARNINGS = 5

EngineOption = Annotated[
    str, typer.Option(help=f"What runs the network: {', '.join(ENGINES)} (TensorRT where it and a GPU are).")
]
UntilStableOption = Annotated[
    float | None, typer.Option(metavar="PERCENT", help="Stop when no scale moves by more than this any longer.")
]

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


@dataclass
class CalibrationOptions:
    """What every command that calibrates asks for: the model, its images, and how scales are picked."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX model.")]
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A folder of images, a pattern, or a list file with one image path a line."
        ),
    ]
    algorithm: Annotated[str, typer.Option(help=f"How scales are picked: {', '.join(ALGORITHMS)}.")] = "entropy2"
    quantile: Annotated[float, typer.Option(help="For percentile: the share of values that is not clipped.")] = 0.9999
    preprocess: Annotated[
        str,
        typer.Option(help=f"What the network was trained with: {', '.join(PRESETS)}, or a file that describes it."),
    ] = "imagenet"
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size to prepare images in, where the model's is dynamic.")
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in a batch.", show_default="the model's, else 32"),
    ] = None
    input_name: Annotated[str | None, typer.Option(help="The input that takes the images.")] = None
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffle the images before --limit.")] = False
    seed: Annotated[int, typer.Option(help="Decides the shuffled order.")] = 0
    balance: Annotated[
        bool, typer.Option("--balance", help="Take images by turns from each class, a folder of DATA, before --limit.")
    ] = False
    limit: Annotated[int | None, typer.Option(help="Use this many images at most.")] = None
    last_batch: Annotated[
        str, typer.Option(help="wrap: complete the last batch with the first images; drop: leave it out.")
    ] = "wrap"
    threads: Annotated[int | None, typer.Option(help="Threads to use.", show_default="one per core")] = None
    tf32: Annotated[bool, typer.Option("--tf32", help="On a GPU: run the network in TF32, which is faster.")] = False
    tactic_sources: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Where TensorRT takes kernels from, e.g. JIT_CONVOLUTIONS,CUDNN."),
    ] = None

    def feed(self, network: Model) -> fastcal.ImageFeed:
        """The images as batches for the model."""
        return fastcal.ImageFeed(
            self.data,
            preprocess=_preprocess(self.preprocess, self.size),
            model=network,
            batch_size=self.batch_size,
            input_name=self.input_name,
            shuffle=self.shuffle,
            seed=self.seed,
            balance=self.balance,
            limit=self.limit,
            last_batch=self.last_batch,
            threads=self.threads,
        )

    def for_tensorrt(self) -> dict[str, Any]:
        """What `calibrate` and `build_engine` are told for TensorRT."""
        tactic_sources = None if self.tactic_sources is None else self.tactic_sources.split(",")
        return {"tf32": self.tf32, "tactic_sources": tactic_sources}


@dataclass
class QuantizeOptions(CalibrationOptions):
    """What `quantize` asks for: what a calibration does, and a cache will do for the images."""

    data: Annotated[
        str, typer.Argument(metavar="CACHE|DATA", help="A calibration cache, or images as calibrate takes them.")
    ]
    engine: EngineOption = "auto"
    until_stable: UntilStableOption = None

    def has_cache(self) -> bool:
        """Whether the second argument is a calibration cache.

        Raises:
            FastcalError: It is a damaged one, or one that is given together with options for a calibration.
        """
        path = Path(self.data)
        if not path.is_file():
            return False
        content = path.read_bytes()
        try:
            fastcal.CalibrationCache.from_bytes(content, self.data)
        except FastcalError:
            if content.startswith(b"TRT-"):
                raise
            return False
        given = [field for field in fields(self)[2:] if getattr(self, field.name) != field.default]
        if given:
            option = "--" + given[0].name.replace("_", "-")
            raise FastcalError(f"{self.data} is a calibration cache, and {option} is for images; leave one of them out")
        return True


@dataclass
class EngineOptions:
    """How TensorRT builds: what `build_engine` takes, as the command line has it."""

    calibration: Annotated[
        str, typer.Option(help="Who calibrates: fastcal, or tensorrt in its builder, which takes long.")
    ] = "fastcal"
    fp16: Annotated[bool, typer.Option(help="Let TensorRT run layers in FP16 where that is faster.")] = True
    min_batch: Annotated[
        int | None,
        typer.Option(help="Where the model's batch is dynamic: the smallest that the engine runs.", show_default="1"),
    ] = None
    opt_batch: Annotated[
        int | None,
        typer.Option(help="The batch that the engine is tuned for.", show_default="that of the images"),
    ] = None
    max_batch: Annotated[
        int | None,
        typer.Option(help="The largest batch that the engine runs.", show_default="the largest of these"),
    ] = None
    workspace: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="GPU memory for TensorRT's scratch, in MiB.", show_default="all"),
    ] = None
    timing_cache: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="TensorRT's timings, used and extended: makes builds faster."),
    ] = None
    optimization_level: Annotated[
        int | None,
        typer.Option(help="0 (fastest build) to 5 (fastest engine).", show_default="TensorRT's, 3"),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The arguments of `build_engine`."""
        workspace = None if self.workspace is None else self.workspace * 2**20
        return vars(self) | {"workspace": workspace}


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of a command's parameters that are dataclasses in their place, as parameters."""
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            group: Any = parameter.annotation
            groups[parameter.name] = group
            inner = inspect.signature(group, eval_str=True).parameters.values()
            shown += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in inner]
        else:
            shown.append(parameter)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


@app.command()
@_with_options
def calibrate(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="CACHE", help="Where to write the cache.")],
    options: CalibrationOptions,
    engine: EngineOption = "auto",
    until_stable: UntilStableOption = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Version that will read the cache.", show_default="the one installed, else 10.16.1"),
    ] = None,
) -> None:
    """Write the calibration cache TensorRT would write, from a model and images."""
    with _terminal() as console:
        from fastcal.model import Model

        network = Model(options.model)
        _check_outputs(network, {"cache": output})
        check_writable(output, largest_size(network.activations))
        feed = options.feed(network)
        cache, progress = _calibrate(
            console, network, feed, options, engine=engine, until_stable=until_stable, tensorrt_version=tensorrt
        )
        cache.save(output)
        _print_summary(cache, feed, progress, cache=f"{output}, {cache.header}")


@app.command()
@_with_options
def quantize(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="MODEL", help="Where to write the quantized model.")],
    options: QuantizeOptions,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|TYPE", help="A layer, or type of layer, to keep in float; may be repeated."),
    ] = None,
) -> None:
    """Write the model with QuantizeLinear and DequantizeLinear layers, which TensorRT 11 needs for INT8."""
    with _terminal() as console:
        from fastcal.model import Model
        from fastcal.qdq import check_quantizable

        network = Model(options.model)
        excluded = exclude or ()
        check_quantizable(network, excluded)
        has_cache = options.has_cache()
        _check_outputs(network, {"calibration cache": options.data if has_cache else None, "quantized model": output})
        check_writable(output, network.path.stat().st_size)
        if has_cache:
            quantized = fastcal.quantize(network, options.data, exclude=excluded)
            _write_model(quantized, output)
            _print_rows(scales=options.data, **_quantized_rows(quantized, output))
        else:
            feed = options.feed(network)
            # Any version: the cache is not written, and the TensorRT installed here may be one that reads none.
            cache, progress = _calibrate(
                console, network, feed, options,
                engine=options.engine, until_stable=options.until_stable, tensorrt_version=DEFAULT_TENSORRT_VERSION,
            )  # fmt: skip
            quantized = fastcal.quantize(network, cache, exclude=excluded)
            _write_model(quantized, output)
            _print_summary(cache, feed, progress, **_quantized_rows(quantized, output))


def _calibrate(
    console: Console, network: Model, feed: fastcal.ImageFeed, options: CalibrationOptions, **more: Any
) -> tuple[fastcal.CalibrationCache, fastcal.Progress]:
    """Calibrate with a progress bar; returns the cache and how far it came."""
    with feed, _progress_bar(console, "preparing the network", "picking the scales") as progress:
        cache = fastcal.calibrate(
            network,
            feed,
            algorithm=options.algorithm,
            quantile=options.quantile,
            threads=options.threads,
            progress=progress,
            **options.for_tensorrt(),
            **more,
        )
    return cache, progress.last


def _write_model(model: ModelProto, output: str) -> None:
    from google.protobuf.message import EncodeError

    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise FastcalError(f"cannot write {output}: it is over 2 GB; fastcal.quantize in Python returns it") from error
    write_atomically(output, data)


def _quantized_rows(model: ModelProto, output: str) -> dict[str, str]:
    from fastcal.qdq import WEIGHTED, count_quantized

    quantized, layers = count_quantized(model)
    return {"INT8": f"{quantized} of {layers} {', '.join(WEIGHTED)}", "model": output}


@app.command()
@_with_options
def build(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="ENGINE", help="Where to write the engine.")],
    options: CalibrationOptions,
    cache: Annotated[
        str | None, typer.Option(metavar="CACHE", help="Where to keep the cache; used again while it is true.")
    ] = None,
    engine_options: EngineOptions,
) -> None:
    """Build an INT8 engine with TensorRT, from a model and images to calibrate with."""
    with _terminal() as console:
        from fastcal.build import build_engine
        from fastcal.calibrators import make_calibrator
        from fastcal.model import Model

        _check_gpu()
        network = Model(options.model)
        _check_outputs(network, {"engine": output, "cache": cache, "timing cache": engine_options.timing_cache})
        check_writable(output, network.path.stat().st_size // 4)  # an INT8 weight takes a quarter of a float32
        if cache is not None and not os.path.exists(cache):  # one that is there may be used, and need not be written
            check_writable(cache, largest_size(network.activations))
        feed = options.feed(network)
        with feed, _progress_bar(console, "preparing TensorRT", "TensorRT is building") as progress:
            calibrator = make_calibrator(
                options.algorithm, feed, quantile=options.quantile, cache=cache, model=network, progress=progress
            )
            started = time.perf_counter()
            engine = build_engine(network, calibrator, **engine_options.keywords(), **options.for_tensorrt())
            seconds = time.perf_counter() - started
        write_atomically(output, engine)
        made = f"{output}, {decimal(len(engine))}, built in {seconds:.0f} s"
        _print_build_summary(calibrator, feed, progress.last, made, cache)


def _check_gpu() -> None:
    """Fail now where TensorRT is installed but cannot calibrate."""
    from fastcal.feed.device import resolve

    if resolve("auto") is None:
        missing = "CUDA sees none here"
        if importlib.util.find_spec("cupy") is None:
            missing = "CuPy is not installed (pip install 'fastcal[cuda13]' or 'fastcal[cuda12]')"
        raise FastcalError(f"fastcal build needs CuPy and an NVIDIA GPU, and {missing}; fastcal calibrate works here")


def _check_outputs(network: Model, outputs: Mapping[str, str | None]) -> None:
    """Fail now if one file would be written over another; `outputs` says what each is."""
    taken = {os.path.realpath(network.path): "the model itself"}
    for what, path in outputs.items():
        if path is None:
            continue
        other = taken.setdefault(os.path.realpath(path), f"the {what}")
        if other != f"the {what}":
            raise FastcalError(f"{path} is {other}; name another file for the {what}")


def _preprocess(name: str, size: str | None) -> fastcal.Preprocess:
    is_file = name not in PRESETS and os.path.splitext(name)[1] in (".toml", ".json")
    preprocess = fastcal.Preprocess.load(name) if is_file else fastcal.Preprocess.preset(name)
    if size is None:
        return preprocess
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise FastcalError(f"--size {size} is not a size; write height x width, like 224x224")
    return replace(preprocess, size=(int(match[1]), int(match[2] or match[1])))


class _Display(Progress):
    """A progress bar, and a spinner with a text in its place before the first and after the last batch."""

    def __init__(self, *columns: ProgressColumn, before: str, after: str, **options: Any) -> None:
        self._before, self._after = before, after
        self._spinner = Spinner("dots")
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich shows at the moment."""
        task = self.tasks[0] if self.tasks else None
        if task is None or 0 < task.completed < (task.total or 0):
            yield from super().get_renderables()
        else:
            self._spinner.update(text=f"{self._after if task.completed else self._before}, {task.elapsed or 0:.0f} s")
            yield self._spinner


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
def _progress_bar(console: Console, before: str, after: str) -> Iterator[_Bar]:
    """A progress bar for batches; the two texts say what is done before and after them."""
    columns = [
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, {task.fields[rate]}, {task.fields[wait]},"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with _Display(
        *columns, before=before, after=after, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield _Bar(bar)


def _print_summary(
    cache: fastcal.CalibrationCache, feed: fastcal.ImageFeed, progress: fastcal.Progress, /, **written: str
) -> None:
    nonzero = [name for name in cache.scales if cache.scales[name]]
    widest = max(nonzero, key=lambda name: cache.scales[name], default=None)
    narrowest = min(nonzero, key=lambda name: cache.scales[name], default=None)
    _print_rows(
        images=f"{min(len(feed.paths), progress.images)} in {progress.batches} batches of {feed.batch_size}",
        prepared=f"{feed.preprocess}",
        speed=f"{_rate(progress)}, {_waiting(progress)}",
        tensors=f"{len(cache.scales)}, scales by {cache.algorithm}",
        widest=f"{cache.scales[widest]:.6g} for {widest}" if widest else "all scales are 0",
        narrowest=f"{cache.scales[narrowest]:.6g} for {narrowest}" if narrowest else "all scales are 0",
        **written,
    )


def _print_build_summary(
    calibrator: FeedCalibrator, feed: fastcal.ImageFeed, progress: fastcal.Progress, engine: str, cache: str | None
) -> None:
    stats = calibrator.stats
    rows = {"images": "none: the scales are those of the cache"}
    if progress.batches:
        rows = {
            "images": f"{len(feed.paths)} in {progress.batches} batches of {feed.batch_size}",
            "prepared": f"{feed.preprocess}",
            "speed": f"{_rate(progress)}, {_waiting(progress)}",
        }
    if stats.batches:
        first, worst = stats.waited_first * 1e3, stats.waited_worst * 1e3
        rows["get_batch"] = f"{first:.1f} ms for the first batch, {worst:.2f} ms at most for the others"
    _print_rows(**rows, engine=engine, **({} if cache is None else {"cache": cache}))


def _print_rows(**rows: str) -> None:
    for name, text in rows.items():
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
        else:
            handler.show_rest()
        finally:
            os.dup2(copy, 2)
            sys.stderr = stderr
            logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    """Prints log records above the progress bar.

    Errors are kept back: what ends the work says so itself. TensorRT's warnings are shown once each, and only some.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._errors: list[str] = []
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())  # TensorRT's messages have line ends
        if record.levelno >= logging.ERROR:
            self._errors.append(text)
        elif record.name != "fastcal.tensorrt":
            self._print(record.levelno, text)
        elif text not in self._warnings:
            self._warnings.add(text)
            if len(self._warnings) <= _MOST_WARNINGS:
                self._print(record.levelno, text)

    def show_rest(self) -> None:
        """Show errors that did not end the work, and how many warnings were not shown."""
        for text in self._errors:
            self._print(logging.WARNING, text)
        if len(self._warnings) > _MOST_WARNINGS:
            more = len(self._warnings) - _MOST_WARNINGS
            self._print(logging.WARNING, f"TensorRT: {more} more warnings (logger fastcal.tensorrt)")

    def _print(self, level: int, text: str) -> None:
        self._console.print(f"{'note' if level == logging.INFO else logging.getLevelName(level).lower()}: {text}")
