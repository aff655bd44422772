"""`fastcal build`: an INT8 engine from a model and images."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

import fastcal
from fastcal.cli.calibrate import calibrate_on
from fastcal.cli.engine import contents_rows, speed_rows
from fastcal.cli.options import TuningOptions, check_outputs
from fastcal.cli.scales import ScalesOptions, is_measured
from fastcal.cli.summary import data_rows, run_rows, speed, tuning_rows
from fastcal.cli.terminal import Bar, finish, print_rows, terminal
from fastcal.cli.tune import tune_on, tuning_outcome
from fastcal.errors import CUPY, UnavailableError
from fastcal.files import check_writable, write_atomically
from fastcal.versions import DEFAULT_TENSORRT_VERSION, is_installed

if TYPE_CHECKING:
    from fastcal.engine.settings import BuildSettings
    from fastcal.feed_calibrator import FeedCalibrator
    from fastcal.model import Model


@dataclass
class BuildScalesOptions(ScalesOptions):
    """Options of the calibration or the tuning before a build."""

    algorithm: Annotated[
        str,
        typer.Option(
            help="As for calibrate, and in an explicit build as for quantize; auto is entropy2, or best in an explicit "
            "build."
        ),
    ] = "auto"


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

    dla: Annotated[
        int | None,
        typer.Option(metavar="CORE", help="Build for this core of NVIDIA's DLA, 0 or 1.", show_default="for the GPU"),
    ] = None
    gpu_fallback: Annotated[
        bool, typer.Option("--gpu-fallback", help="With --dla: let the GPU run what the DLA does not.")
    ] = False
    time: Annotated[
        bool,
        typer.Option("--time", help="Measure the engine's speed beside the network's in FP16 and FP32, built too."),
    ] = False

    def keywords(self) -> dict[str, Any]:
        """Return the options as arguments of `build_engine`."""
        workspace = None if self.workspace is None else self.workspace * 2**20
        given = {name: value for name, value in vars(self).items() if name not in ("compute_capability", "time")}
        return given | {"compute_capabilities": self.compute_capability or (), "workspace": workspace}

    def settings(self, tactic_sources: Any) -> "BuildSettings":
        """Return the settings that engines to compare with are built with."""
        from fastcal.engine.settings import BuildSettings

        names = {field.name for field in fields(BuildSettings)} - {"dla", "gpu_fallback"}
        given = {name: value for name, value in self.keywords().items() if name in names}
        return BuildSettings(**given, tactic_sources=tactic_sources)

    @property
    def library(self) -> Any:
        """The Python module of the builder."""
        from fastcal.library import load_library

        return load_library(self.builder)

    @property
    def is_explicit(self) -> bool:
        """True if the build is explicit; errors as `build_engine`, also for options that do not go together."""
        from fastcal.build import check_calibration, is_explicit
        from fastcal.engine.explicit import check_compute_capabilities

        found = is_explicit(self.library, self.explicit)
        check_calibration(self.calibration, is_known=found)
        check_compute_capabilities(self.library, self.compute_capability or ())
        return found


def build(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.")],
    options: BuildScalesOptions,
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
        if build_options.builder == "tensorrt" or build_options.time:
            _check_gpu()
        network = Model(options.model)
        has_cache = options.has_cache(None if cache is None else "--cache")
        check_outputs(network, {"engine": output, "cache": cache, "timing cache": build_options.timing_cache}, options)
        check_writable(output, network.path.stat().st_size // 4)  # an INT8 weight takes a quarter of a float32
        if cache is not None and not os.path.exists(cache):  # an existing one may be reused
            check_cache_writable(cache, network.activations)
        building = _Building(console, network, options, build_options, output, cache)
        if options.algorithm == "auto":
            options.algorithm = "best" if is_explicit else "entropy2"
        if has_cache:
            building.from_scales()
        elif is_explicit and is_measured(network, options):
            building.tuned()
        elif is_explicit:
            building.explicit()
        else:
            building.implicit()


@dataclass
class _Building:
    """Builds an engine in one of four ways, and prints what was built."""

    console: Console
    network: "Model"
    options: BuildScalesOptions
    build_options: BuildOptions
    output: str
    cache: str | None

    def from_scales(self) -> None:
        """Build with the scales of a cache or a tuning."""
        rows, entries = self._write(tuning=self.options.data)
        print_rows(scales=self.options.data, **rows)
        finish(**entries)

    def explicit(self) -> None:
        """Calibrate, and build from a model with pairs."""
        with self.options.feed(self.network) as feed:
            scales, progress = calibrate_on(
                self.console, self.network, feed, self.options, cache=self.cache,
                tensorrt_version=DEFAULT_TENSORRT_VERSION,
            )  # fmt: skip
            rows, entries = self._write(feed, tuning=scales)
        print_rows(**run_rows(scales, feed, progress), **rows, **self._cache_row())
        finish(**entries, cache=self.cache, skipped=feed.skipped, calibrated=_calibrated(progress))

    def tuned(self) -> None:
        """Tune, and build from a model with pairs."""
        from fastcal.build import pair_options

        places = TuningOptions(**pair_options(self.build_options.library, self.network))
        with self.options.feed(self.network) as feed:
            tuning, progress = tune_on(
                self.console, self.network, feed, self.options, places, cache=self.cache, all_tensors=True
            )
            rows, entries = self._write(feed, tuning=tuning)
        print_rows(**run_rows(tuning.cache, feed, progress), **rows, **tuning_rows(tuning), **self._cache_row())
        entries = tuning_outcome(tuning) | entries
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
            rows, entries = self._write(calibrator, exact=options.exact, **options.for_tensorrt())
        print_rows(**_calibration_rows(calibrator, feed, progress.last), **rows, **self._cache_row())
        finish(**entries, cache=self.cache, skipped=feed.skipped, calibrated=_calibrated(progress.last))

    def _cache_row(self) -> dict[str, str]:
        return {} if self.cache is None else {"cache": self.cache}

    def _write(self, calibrator: Any = None, **more: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Build and write the engine; return rows and JSON entries about it."""
        from fastcal.build import build_engine

        started = time.perf_counter()
        engine = build_engine(self.network, calibrator, **self.build_options.keywords(), **more)
        seconds = time.perf_counter() - started
        write_atomically(self.output, engine)
        rows = {"engine": f"{self.output}, {decimal(len(engine))}, built in {seconds:.0f} s"}
        entries: dict[str, Any] = {"engine": self.output, "bytes": len(engine), "build_seconds": seconds}
        for found, entry in self._outcome(engine, getattr(calibrator, "feed", calibrator), more.get("tuning")):
            rows |= found
            entries |= entry
        return rows, entries

    def _outcome(self, engine: bytes, feed: Any, tuning: Any) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """Yield rows and entries about the engine's layers and its speed, as far as they can be known here."""
        from fastcal.engine.contents import contents_of
        from fastcal.engine.speed import speeds
        from fastcal.qdq import largest_values
        from fastcal.tuning.tuned import Tuning

        library = self.build_options.library
        yield contents_rows(contents_of(library, engine, self.network))
        if self.build_options.time:
            settings = self.build_options.settings(self.options.for_tensorrt()["tactic_sources"])
            largest = {} if tuning is None else largest_values(Tuning.of(tuning).cache)
            yield speed_rows(speeds(library, self.network, engine, feed, settings, largest))


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


def _calibration_rows(calibrator: "FeedCalibrator", feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, str]:
    """Return the rows that describe a calibrator's calibration, or that it was not needed."""
    stats = calibrator.stats
    rows = {"images": "none: the cache was reused"}
    if progress.batches:
        rows = data_rows(feed, progress) | {"speed": speed(progress)}
    if stats.batches:
        first, worst = stats.waited_first * 1e3, stats.waited_worst * 1e3
        rows["get_batch"] = f"{first:.1f} ms for the first batch, {worst:.2f} ms at most for the others"
    return rows
