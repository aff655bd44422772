"""`fastcal build`: an INT8 engine from a model and images."""

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

import fastcal
from fastcal.cli.calibrate import calibrate_on
from fastcal.cli.options import check_outputs
from fastcal.cli.scales import ScalesOptions
from fastcal.cli.summary import data_rows, run_rows, speed
from fastcal.cli.terminal import Bar, finish, print_rows, terminal
from fastcal.errors import CUPY, UnavailableError
from fastcal.files import check_writable, write_atomically
from fastcal.versions import DEFAULT_TENSORRT_VERSION, is_installed

if TYPE_CHECKING:
    from fastcal.feed_calibrator import FeedCalibrator
    from fastcal.model import Model


@dataclass
class BuildOptions:
    """Options of the build itself: arguments of `build_engine`."""

    builder: Annotated[
        str, typer.Option(help="tensorrt, or rtx: TensorRT for RTX, which builds without a GPU too.")
    ] = "tensorrt"
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N.N",
            help="For rtx: a GPU to build for, 8.9 for instance; may be repeated.",
            show_default="its own choice",
        ),
    ] = None
    explicit: Annotated[
        bool | None,
        typer.Option(
            "--explicit/--implicit",
            help="Build from a model with Q/DQ layers, or let TensorRT before 11 choose the layers in INT8.",
            show_default="explicit for rtx and from TensorRT 11 on",
        ),
    ] = None
    calibration: Annotated[
        str, typer.Option(help="The library that calibrates: fastcal, or tensorrt, which is slow.")
    ] = "fastcal"
    fp16: Annotated[bool, typer.Option(help="Run layers in FP16 that are not in INT8, or let TensorRT do so.")] = True
    bf16: Annotated[bool, typer.Option("--bf16", help="In an explicit build: BF16 in place of FP16.")] = False
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
        typer.Option(
            metavar="MIB", help="GPU memory for TensorRT's scratch data, in MiB.", show_default="its own choice"
        ),
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
        capabilities = vars(self) | {"compute_capabilities": self.compute_capability or ()}
        del capabilities["compute_capability"]
        return capabilities | {"workspace": workspace}

    @property
    def is_explicit(self) -> bool:
        """Whether the build is explicit; errors as `build_engine`, also for options that do not go together."""
        from fastcal.build import check_calibration, is_explicit
        from fastcal.engine.explicit import check_compute_capabilities
        from fastcal.library import load_library

        library = load_library(self.builder)
        found = is_explicit(library, self.explicit)
        check_calibration(self.calibration, is_known=found)
        check_compute_capabilities(library, self.compute_capability or ())
        return found


def build(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.")],
    options: ScalesOptions,
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The calibration cache: reused if it is up to date, else written."),
    ] = None,
    build_options: BuildOptions,
) -> None:
    """Build an INT8 engine with TensorRT, from a model and images to calibrate with, or scales that are known."""
    with terminal() as console:
        from fastcal.cache.record import check_cache_writable
        from fastcal.model import Model

        is_explicit = build_options.is_explicit
        if build_options.builder == "tensorrt":
            _check_gpu()
        network = Model(options.model)
        has_cache = options.has_cache(None if cache is None else "--cache")
        check_outputs(network, {"engine": output, "cache": cache, "timing cache": build_options.timing_cache}, options)
        check_writable(output, network.path.stat().st_size // 4)  # an INT8 weight takes a quarter of a float32
        if cache is not None and not os.path.exists(cache):  # an existing one may be reused
            check_cache_writable(cache, network.activations)
        building = _Building(console, network, options, build_options, output, cache)
        if has_cache:
            building.from_scales()
        elif is_explicit:
            building.explicit()
        else:
            building.implicit()


@dataclass
class _Building:
    """Builds an engine in one of three ways, and prints what was built."""

    console: Console
    network: "Model"
    options: ScalesOptions
    build_options: BuildOptions
    output: str
    cache: str | None

    def from_scales(self) -> None:
        """Build with the scales of a cache or a tuning."""
        made, entries = self._write(tuning=self.options.data)
        print_rows(scales=self.options.data, engine=made)
        finish(**entries)

    def explicit(self) -> None:
        """Calibrate, and build from a model with pairs."""
        with self.options.feed(self.network) as feed:
            scales, progress = calibrate_on(
                self.console, self.network, feed, self.options, cache=self.cache,
                tensorrt_version=DEFAULT_TENSORRT_VERSION,
            )  # fmt: skip
            made, entries = self._write(feed, tuning=scales)
        rows = {} if self.cache is None else {"cache": self.cache}
        print_rows(**run_rows(scales, feed, progress), engine=made, **rows)
        finish(**entries, cache=self.cache, skipped=feed.skipped, calibrated=_calibrated(progress))

    def implicit(self) -> None:
        """Let TensorRT quantize, with one of fastcal's calibrators."""
        from fastcal.algorithm import Algorithm
        from fastcal.calibrators import make_calibrator

        options, feed = self.options, self.options.feed(self.network)
        with feed, Bar(self.console, "preparing TensorRT", "TensorRT is building") as progress:
            calibrator = make_calibrator(
                Algorithm.of(options.algorithm, options.quantile), feed, cache=self.cache, model=self.network,
                progress=progress,
            )  # fmt: skip
            made, entries = self._write(calibrator, exact=options.exact, **options.for_tensorrt())
        _print_build_summary(calibrator, feed, progress.last, made, self.cache)
        finish(**entries, cache=self.cache, skipped=feed.skipped, calibrated=_calibrated(progress.last))

    def _write(self, calibrator: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """Build and write the engine; return a text about it, and JSON entries."""
        from fastcal.build import build_engine

        started = time.perf_counter()
        engine = build_engine(self.network, calibrator, **self.build_options.keywords(), **more)
        seconds = time.perf_counter() - started
        write_atomically(self.output, engine)
        text = f"{self.output}, {decimal(len(engine))}, built in {seconds:.0f} s"
        return text, {"engine": self.output, "bytes": len(engine), "build_seconds": seconds}


def _calibrated(progress: fastcal.Progress) -> dict[str, Any] | None:
    return asdict(progress) if progress.batches else None


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
