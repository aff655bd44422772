"""`fastcal calibrate`: a calibration cache from a model and images."""

import contextlib
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fastcal
from fastcal.cli.options import (
    BackendOption,
    CalibrationOptions,
    HistogramsOption,
    MemoryOption,
    ReportOption,
    TargetOption,
    TensorRTOption,
    UntilStableOption,
    check_outputs,
    read_memory,
)
from fastcal.cli.summary import kept_row, outcome, print_summary
from fastcal.cli.terminal import Bar, finish, spinner, terminal
from fastcal.errors import FastcalError, ModelError
from fastcal.feed.deepstream import calibration_file
from fastcal.files import check_writable

if TYPE_CHECKING:
    from fastcal.feed.sampled import Sampled
    from fastcal.model import Model


def calibrate(
    *,
    options: CalibrationOptions,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="CACHE",
            help="The cache to write.",
            show_default="the int8-calib-file of DeepStream's file in --preprocess",
        ),
    ] = None,
    backend: BackendOption = "auto",
    memory: MemoryOption = None,
    until_stable: UntilStableOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Share the batches among N Ray actors.", show_default="none, this process alone"
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="For --workers: the Ray cluster, auto or host:port.",
            show_default="one started here",
        ),
    ] = None,
    tensorrt: TensorRTOption = None,
    target: TargetOption = None,
    histograms: HistogramsOption = None,
    report: ReportOption = None,
) -> None:
    """Write the calibration cache that TensorRT would write, from a model and images."""
    with terminal() as console:
        from fastcal.algorithm import Algorithm
        from fastcal.cache.record import check_cache_writable
        from fastcal.dla import check_target
        from fastcal.feed.sampled import HELD_OUT, Sampled
        from fastcal.model import Model
        from fastcal.observe.backends import start_early

        network = Model(options.model)
        output = _named_in(options.preprocess) if output is None else output
        check_outputs(network, {"cache": output, "histograms": histograms, "report": report}, options)
        check_cache_writable(output, network.activations)
        check_report(report)
        check_target(target, Algorithm.of(options.algorithm))
        if workers is None and (histograms is None or not os.path.exists(histograms)):
            start_early(network, backend, tf32=options.tf32, batch_size=options.batch_size)
        with options.feed(network) as feed:
            held_out = HELD_OUT if options.algorithm == "best" else 0
            sampled = Sampled(feed, network.inputs, held_out) if workers is None and feed.gpu is None else None
            cache, progress = calibrate_on(
                console, network, sampled or feed, options,
                backend=backend, memory=read_memory(memory), until_stable=until_stable,
                workers=workers, ray_address=ray_address, tensorrt_version=tensorrt, histograms=histograms,
                target=target,
            )  # fmt: skip
            cache.save(output)
        kept = _kept(console, network, sampled, cache, options)
        files = {} if histograms is None else {"histograms": histograms}
        written = {"cache": f"{output}, {cache.header}", **files, **save_report(report, cache, options)}
        print_summary(cache, feed, progress, **kept_row(kept, cache.algorithm.name), **written)
        unfit = {} if target is None else {"unfit_for_dla": fastcal.unfit_for_dla(network)}
        finish(cache=output, report=report, kept=kept, **files, **unfit, **outcome(cache, feed, progress))


def _named_in(preprocess: str | None) -> str:
    """Return the cache that DeepStream's configuration names; raise FastcalError if there is no such name."""
    named = calibration_file(preprocess)
    if named is None:
        raise FastcalError("there is no file to write: name the cache with -o")
    return named


def _kept(
    console: Console,
    network: "Model",
    sampled: "Sampled | None",
    cache: "fastcal.CalibrationCache",
    options: CalibrationOptions,
) -> dict[str, float]:
    """Return what INT8 keeps at the outputs by algorithm, in dB; nothing on a GPU, since the CPU takes longer."""
    if sampled is None:
        return {}
    from fastcal.tuning.choice import kept

    with spinner(console) as status, contextlib.suppress(ModelError):  # for instance, no layer can be in INT8
        status.update("measuring what INT8 keeps")
        return kept(network, sampled, cache, options.threads)
    return {}


def calibrate_on(
    console: Console, network: "Model", feed: "fastcal.Feed", options: CalibrationOptions, **more: Any
) -> "tuple[fastcal.CalibrationCache, fastcal.Progress]":
    """Calibrate with a progress bar; return the cache and the last state of the progress."""
    with Bar(console, "preparing the network", "picking the scales") as progress:
        cache = fastcal.calibrate(
            network, feed, algorithm=options.algorithm, quantile=options.quantile, exact=options.exact,
            threads=options.threads, progress=progress, **options.for_tensorrt(), **more,
        )  # fmt: skip
    return cache, progress.last


def check_report(path: str | None) -> None:
    """Raise FastcalError if a report is asked for and could not be written."""
    if path is not None:
        _ = fastcal.write_report  # raises an error if a package is missing
        check_writable(path, 1)


def save_report(
    path: str | None, cache: "fastcal.CalibrationCache | fastcal.Tuning", options: CalibrationOptions
) -> dict[str, str]:
    """Write the report if one is asked for; return the row of the summary that names it."""
    if path is None:
        return {}
    fastcal.write_report(cache, path, about={"data": options.data})
    return {"report": path}
