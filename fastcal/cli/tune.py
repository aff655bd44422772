"""`fastcal tune`: the scales, the layers in float and the biases with which INT8 keeps a network's accuracy."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fastcal
from fastcal.cli.calibrate import check_report, save_report
from fastcal.cli.options import (
    CalibrationOptions,
    HistogramsOption,
    MemoryOption,
    ReportOption,
    TuningOptions,
    check_outputs,
    read_memory,
)
from fastcal.cli.summary import run_rows, tuning_rows
from fastcal.cli.terminal import Bar, finish, print_rows, print_table, say, terminal
from fastcal.errors import FastcalError, decibels_text
from fastcal.files import check_writable

if TYPE_CHECKING:
    from fastcal.model import Model

#: The most layers of the ranking that are shown.
_SHOWN = 10


@dataclass
class TuneOptions(CalibrationOptions):
    """Options of `tune`: those of a calibration."""

    algorithm: Annotated[
        str,
        typer.Option(
            help="How scales are picked: best (what keeps most on held-out images), entropy2, entropy, minmax, "
            "percentile, mse."
        ),
    ] = "best"


def tune(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="JSON", help="The tuning to write.")],
    options: TuneOptions,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="The agreement with FP32 to reach, 99% for instance, at any cost in time."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the target is measured in, as compare takes it.",
            show_default="by the outputs",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="The least score of a box, or of a mask's pixel.", show_default="0.25, or 0.5 for masks"),
    ] = None,
    tuning_options: TuningOptions,
    memory: MemoryOption = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The calibration cache: reused if it is up to date, else written."),
    ] = None,
    report: ReportOption = None,
    histograms: HistogramsOption = None,
) -> None:
    """Find the scales and the layers in float with which INT8 keeps most, or a target; quantize takes the result."""
    with terminal() as console:
        from fastcal.model import Model

        network = Model(options.model)
        check_outputs(network, {"tuning": output, "report": report, "cache": cache, "histograms": histograms}, options)
        check_writable(output, 1)
        check_report(report)
        with options.feed(network) as feed:
            tuning, progress = tune_on(
                console, network, feed, options, tuning_options, target=read_target(target), metric=metric,
                threshold=threshold, curve=True, unfinished=f"{output}.unfinished",
                memory=read_memory(memory), cache=cache, histograms=histograms,
            )  # fmt: skip
        tuning.save(output)
        written = {"tuning": output, **save_report(report, tuning, options)}
        print_rows(**run_rows(tuning.cache, feed, progress), **tuning_rows(tuning), **written)
        _print_tuning(tuning)
        finish(tuning=output, report=report, **tuning_outcome(tuning))


def tune_on(
    console: Console,
    network: "Model",
    feed: "fastcal.Feed",
    options: CalibrationOptions,
    tuning_options: TuningOptions,
    **more: Any,
) -> "tuple[fastcal.Tuning, fastcal.Progress]":
    """Tune with a progress bar; return the tuning and the last state of the progress."""
    with Bar(console, "preparing the network", "picking the scales") as progress:
        tuning = fastcal.tune(
            network, feed, algorithm=options.algorithm, quantile=options.quantile, exact=options.exact,
            tf32=options.tf32, threads=options.threads, progress=progress, status=progress.status,
            **vars(tuning_options) | {"exclude": tuning_options.exclude or ()}, **more,
        )  # fmt: skip
    return tuning, progress.last


def tuning_outcome(tuning: "fastcal.Tuning") -> dict[str, Any]:
    """Return what was tuned as JSON entries."""
    result = tuning.result
    return {
        "header": tuning.cache.header,
        "metric": tuning.metric,
        "kept": None if result is None else result.metric,
        "sqnr": None if result is None else result.sqnr,
        "samples": tuning.samples,
        "held_out": tuning.are_held_out,
        "in_float": list(tuning.in_float or ()),
        "int8_share": None if result is None else result.int8_share,
        "biases": len(tuning.bias),
        "target": tuning.target,
    }


def read_target(text: str | None) -> float | None:
    """Return --target as a share: 99%, 99 and 0.99 are the same."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text)
    if match is None:
        raise FastcalError(f"--target {text} is no share; write 99% or 0.99")
    value = float(match[1])
    return value / 100 if match[2] or value > 1 else value


def _print_tuning(tuning: "fastcal.Tuning") -> None:
    """Print the layers that cost most, and the choices that were measured."""
    in_float = set(tuning.in_float or ())
    noise, work = sum(layer.noise for layer in tuning.ranking), sum(layer.multiply_adds for layer in tuning.ranking)
    worst = sorted(tuning.ranking, key=lambda layer: -layer.noise)[:_SHOWN]
    say("")
    print_table(
        {"layer": "left", "of the noise": "right", "of the multiply-adds": "right", "runs in": "left"},
        [
            (
                layer.name, f"{layer.noise / noise:.1%}" if noise else "-",
                f"{layer.multiply_adds / work:.1%}" if work else "-", "float" if layer.output in in_float else "INT8",
            )
            for layer in worst
        ],
    )  # fmt: skip
    say("")
    name = tuning.metric or "metric"
    rows = [
        (str(point.in_float), f"{point.int8_share:.1%}", decibels_text(point.sqnr),
         "-" if point.metric is None else f"{point.metric:.4g}")
        for point in tuning.curve
    ]  # fmt: skip
    print_table({"layers in float": "right", "INT8": "right", "outputs": "right", name: "right"}, rows)
