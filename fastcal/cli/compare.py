"""`fastcal compare`: the accuracy that a network keeps in INT8, as numbers."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import typer

import fastcal
from fastcal.cli.options import (
    ExactOption,
    FeedOptions,
    HistogramsOption,
    MemoryOption,
    QuantileOption,
    check_outputs,
    read_memory,
)
from fastcal.cli.terminal import Bar, finish, print_table, say, terminal

#: The most tensors, and the most channels of outputs, that are shown.
_SHOWN, _SHOWN_CHANNELS = 10, 5


def compare(
    *,
    options: FeedOptions,
    cache: Annotated[
        list[str] | None, typer.Option(metavar="CACHE", help="A further calibration cache to compare; may be repeated.")
    ] = None,
    quantized: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="A Q/DQ model of any tool with the same inputs and outputs."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The agreement to show: boxes, masks, sequences, cosine, top-1, or your own as file.py:function.",
            show_default="by the outputs",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="The least score of a box, or of a mask's pixel.", show_default="0.25, or 0.5 for masks"),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="Where INT8 rounds: explicit (as the model that quantize writes), or implicit (wherever TensorRT 8 to "
            "10 may round with a cache)."
        ),
    ] = "explicit",
    quantile: QuantileOption = 0.9999,
    exact: ExactOption = False,
    memory: MemoryOption = None,
    histograms: HistogramsOption = None,
) -> None:
    """Compare INT8 with FP32: each algorithm's scales, caches, and Q/DQ models."""
    with terminal() as console:
        make_comparison = fastcal.compare  # raises an error if a package is missing
        from fastcal.model import Model

        network = Model(options.model)
        check_outputs(network, {"histograms": histograms}, options)
        labels = _labels([*(cache or []), *(quantized or [])])
        feed = options.feed(network)
        with feed, Bar(console, "preparing the network", "comparing", "comparing") as progress:
            comparison = make_comparison(
                network, feed,
                caches={labels[path]: path for path in cache or []},
                quantized={labels[path]: path for path in quantized or []},
                metric=metric, threshold=threshold, rounding=rounding, quantile=quantile, exact=exact,
                threads=options.threads, memory=read_memory(memory), histograms=histograms, progress=progress,
            )  # fmt: skip
        _print_qualities(comparison)
        _print_outputs(comparison)
        say("")
        _print_tensors(comparison)
        say("")
        say(f"verdict: {comparison.verdict}")
        finish(**comparison.as_json())


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Return the name to show for each file: the file name, or the path if two have the same name."""
    names = [os.path.basename(path) for path in paths]
    return dict(zip(paths, names if len(set(names)) == len({*paths}) else paths, strict=True))


def _print_qualities(comparison: "fastcal.Comparison") -> None:
    rows = [("FP32", "", "", _percent(comparison.float_top1), "", "")]
    is_top1 = comparison.metric == "top-1"
    for label, quality in comparison.qualities.items():
        worst = "".join(f"{_decibels(quality.tensors[name].sqnr)} {name}" for name in quality.worst[:1])
        agreement = _percent(quality.metric) if is_top1 or comparison.metric is None else _number(quality.metric)
        shares = agreement, _percent(quality.top1)
        rows.append((label, _decibels(quality.sqnr), *shares, _decibels(quality.median_sqnr), worst))
    seen = "as FP32" if is_top1 or comparison.metric is None else comparison.metric
    columns = ("output", seen, "top-1", "tensors' median")
    print_table({"scales": "left", **dict.fromkeys(columns, "right"), "worst tensor": "left"}, rows)


def _print_outputs(comparison: "fastcal.Comparison") -> None:
    """Print the parts of the outputs, if there are several, and the worst channels."""
    best = comparison.qualities[comparison.best]
    channels = sorted(best.channels, key=best.channels.__getitem__)
    tables = {
        "part of the outputs": (list(best.parts), [quality.parts for quality in comparison.qualities.values()]),
        "worst channel": (channels[:_SHOWN_CHANNELS], [quality.channels for quality in comparison.qualities.values()]),
    }
    for title, (labels, found) in tables.items():
        if len(labels) > 1:
            say("")
            _print_decibels(title, labels, found, comparison)


def _print_tensors(comparison: "fastcal.Comparison") -> None:
    algorithms = {label: quality for label, quality in comparison.qualities.items() if quality.tensors}
    names = max(algorithms.values(), key=lambda quality: quality.sqnr).worst
    found = [
        {name: tensor.sqnr for name, tensor in quality.tensors.items()} for quality in comparison.qualities.values()
    ]
    _print_decibels("tensor", names[:_SHOWN], found, comparison)
    if len(names) > _SHOWN:
        say(f"and {len(names) - _SHOWN} tensors that keep more: --json has all")


def _print_decibels(
    title: str,
    labels: Iterable[str],
    found: Sequence[Mapping[str, float | None]],
    comparison: "fastcal.Comparison",
) -> None:
    """Print a table of SQNR with a column for each of the scales."""
    rows = [(label, *(_decibels(each.get(label)) for each in found)) for label in labels]
    print_table({title: "left", **dict.fromkeys(comparison.qualities, "right")}, rows)


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{round(value, 1) + 0.0:.1f} dB"  # no -0.0


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
