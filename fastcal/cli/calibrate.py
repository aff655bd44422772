"""`fastcal calibrate`: images to a calibration cache."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fastcal
from fastcal.cli.options import (
    BackendOption,
    CalibrationOptions,
    ReportOption,
    UntilStableOption,
    check_outputs,
    data_rows,
    data_used,
)
from fastcal.cli.terminal import finish, print_rows, progress_bar, rate, terminal, waiting
from fastcal.files import check_writable

if TYPE_CHECKING:
    from fastcal.model import Model


def calibrate(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="CACHE", help="Where to write the cache.")],
    options: CalibrationOptions,
    backend: BackendOption = "auto",
    until_stable: UntilStableOption = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Share the batches among N Ray actors.", show_default="none: this process"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="For --workers: a Ray cluster, auto or host:port.", show_default="one started here"
        ),
    ] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Version that will read the cache.", show_default="the one installed, else 10.16.1"),
    ] = None,
    report: ReportOption = None,
) -> None:
    """Write the calibration cache TensorRT would write, from a model and images."""
    with terminal() as console:
        from fastcal.cache.record import check_cache_writable
        from fastcal.model import Model

        network = Model(options.model)
        check_outputs(network, {"cache": output, "report": report}, options)
        check_cache_writable(output, network.activations)
        check_report(report)
        feed = options.feed(network)
        cache, progress = calibrate_on(
            console, network, feed, options,
            backend=backend, until_stable=until_stable, workers=workers, ray_address=ray_address,
            tensorrt_version=tensorrt,
        )  # fmt: skip
        cache.save(output)
        written = {"cache": f"{output}, {cache.header}", **save_report(report, cache, options)}
        print_summary(cache, feed, progress, **written)
        finish(cache=output, report=report, **outcome(cache, feed, progress))


def calibrate_on(
    console: Console, network: "Model", feed: "fastcal.Feed", options: CalibrationOptions, **more: Any
) -> tuple[fastcal.CalibrationCache, fastcal.Progress]:
    """Calibrate with a progress bar; returns the cache and how far it came."""
    with feed, progress_bar(console, "preparing the network", "picking the scales") as progress:
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


def check_report(path: str | None) -> None:
    """Fail now where a report that is asked for could not be written later."""
    if path is not None:
        _ = fastcal.write_report  # raises if what it needs is not installed
        check_writable(path, 1)


def save_report(path: str | None, cache: fastcal.CalibrationCache, options: CalibrationOptions) -> dict[str, str]:
    """Write the report if one is asked for; returns the row that says so."""
    if path is None:
        return {}
    fastcal.write_report(cache, path, about={"data": options.data})
    return {"report": path}


def print_summary(
    cache: fastcal.CalibrationCache,
    feed: "fastcal.ImageFeed | fastcal.NumpyFeed",
    progress: fastcal.Progress,
    /,
    **written: str,
) -> None:
    """Print what was calibrated, and the rows of what was written."""
    nonzero = [name for name in cache.scales if cache.scales[name]]
    widest = max(nonzero, key=lambda name: cache.scales[name], default=None)
    narrowest = min(nonzero, key=lambda name: cache.scales[name], default=None)
    print_rows(
        **data_rows(feed, progress),
        speed=f"{rate(progress)}, {waiting(progress)}",
        tensors=f"{len(cache.scales)}, scales by {cache.algorithm.name}",
        widest=f"{cache.scales[widest]:.6g} for {widest}" if widest else "all scales are 0",
        narrowest=f"{cache.scales[narrowest]:.6g} for {narrowest}" if narrowest else "all scales are 0",
        **written,
    )


def outcome(
    cache: fastcal.CalibrationCache, feed: "fastcal.ImageFeed | fastcal.NumpyFeed", progress: fastcal.Progress
) -> dict[str, Any]:
    """What was calibrated, as JSON has it."""
    return {
        "header": cache.header,
        "algorithm": cache.algorithm.name,
        "tensors": len(cache.scales),
        **data_used(feed, progress),
        "batches": progress.batches,
        "batch_size": feed.batch_size,
        "seconds": progress.seconds,
        "waited": progress.waited,
    }
