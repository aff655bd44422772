"""`fastcal build`: an INT8 engine from a model and images."""

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

import fastcal
from fastcal.cli.options import CalibrationOptions, check_outputs
from fastcal.cli.summary import data_rows, speed
from fastcal.cli.terminal import Bar, finish, print_rows, terminal
from fastcal.errors import CUPY, UnavailableError
from fastcal.files import check_writable, write_atomically
from fastcal.versions import is_installed

if TYPE_CHECKING:
    from fastcal.feed_calibrator import FeedCalibrator


@dataclass
class BuildOptions:
    """Options of the build itself: arguments of `build_engine`."""

    calibration: Annotated[
        str, typer.Option(help="The library that calibrates: fastcal, or tensorrt, which is slow.")
    ] = "fastcal"
    fp16: Annotated[bool, typer.Option(help="Let TensorRT run layers in FP16 if that is faster.")] = True
    min_batch: Annotated[
        int | None,
        typer.Option(help="The smallest batch that the engine runs, if the model's is dynamic.", show_default="1"),
    ] = None
    opt_batch: Annotated[
        int | None, typer.Option(help="The batch that the engine is tuned for.", show_default="the images' batch size")
    ] = None
    max_batch: Annotated[
        int | None,
        typer.Option(help="The largest batch that the engine runs.", show_default="the largest of the others"),
    ] = None
    workspace: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="GPU memory for TensorRT's scratch data, in MiB.", show_default="all"),
    ] = None
    timing_cache: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File of TensorRT's timings, read and extended; makes builds faster."),
    ] = None
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (fastest build) to 5 (fastest engine).", show_default="TensorRT's, 3")
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Return the options as arguments of `build_engine`."""
        workspace = None if self.workspace is None else self.workspace * 2**20
        return vars(self) | {"workspace": workspace}


def build(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.")],
    options: CalibrationOptions,
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The calibration cache: reused if it is up to date, else written."),
    ] = None,
    build_options: BuildOptions,
) -> None:
    """Build an INT8 engine with TensorRT, from a model and images to calibrate with."""
    with terminal() as console:
        from fastcal.algorithm import Algorithm
        from fastcal.build import build_engine
        from fastcal.cache.record import check_cache_writable
        from fastcal.calibrators import make_calibrator
        from fastcal.model import Model

        _check_gpu()
        network = Model(options.model)
        check_outputs(network, {"engine": output, "cache": cache, "timing cache": build_options.timing_cache}, options)
        check_writable(output, network.path.stat().st_size // 4)  # an INT8 weight takes a quarter of a float32
        if cache is not None and not os.path.exists(cache):  # an existing one may be reused
            check_cache_writable(cache, network.activations)
        feed = options.feed(network)
        with feed, Bar(console, "preparing TensorRT", "TensorRT is building") as progress:
            calibrator = make_calibrator(
                Algorithm.of(options.algorithm, options.quantile), feed, cache=cache, model=network, progress=progress
            )
            started = time.perf_counter()
            engine = build_engine(
                network, calibrator, exact=options.exact, **build_options.keywords(), **options.for_tensorrt()
            )
            seconds = time.perf_counter() - started
        write_atomically(output, engine)
        made = f"{output}, {decimal(len(engine))}, built in {seconds:.0f} s"
        _print_build_summary(calibrator, feed, progress.last, made, cache)
        finish(
            engine=output, bytes=len(engine), build_seconds=seconds, cache=cache, skipped=feed.skipped,
            calibrated=asdict(progress.last) if progress.last.batches else None,
        )  # fmt: skip


def _check_gpu() -> None:
    """Raise UnavailableError if there is no GPU, or CuPy is missing."""
    from fastcal.device import resolve

    if resolve("auto") is None:
        missing = "CUDA sees none here" if is_installed("cupy") else f"CuPy is not installed ({CUPY})"
        raise UnavailableError(
            f"fastcal build needs CuPy and an NVIDIA GPU, and {missing}; fastcal calibrate works here"
        )


def _print_build_summary(
    calibrator: "FeedCalibrator", feed: "fastcal.Feed", progress: fastcal.Progress, engine: str, cache: str | None
) -> None:
    stats = calibrator.stats
    rows = {"images": "none: the cache was reused"}
    if progress.batches:
        rows = data_rows(feed, progress) | {"speed": speed(progress)}
    if stats.batches:
        first, worst = stats.waited_first * 1e3, stats.waited_worst * 1e3
        rows["get_batch"] = f"{first:.1f} ms for the first batch, {worst:.2f} ms at most for the others"
    print_rows(**rows, engine=engine, **({} if cache is None else {"cache": cache}))
