"""`fastcal compare`: the accuracy that a network keeps in INT8, as numbers."""

import math
import os
from collections.abc import Sequence
from typing import Annotated

import typer

import fastcal
from fastcal.cli.options import FeedOptions, QuantileOption
from fastcal.cli.terminal import Bar, finish, print_table, say, terminal

#: The most tensors that are shown.
_SHOWN = 10


def compare(
    *,
    options: FeedOptions,
    cache: Annotated[
        list[str] | None, typer.Option(metavar="CACHE", help="A further calibration cache to compare; may be repeated.")
    ] = None,
    quantile: QuantileOption = 0.9999,
) -> None:
    """Compare INT8 with FP32, with the scales of each algorithm and of caches."""
    with terminal() as console:
        make_comparison = fastcal.compare  # raises an error if a package is missing
        from fastcal.model import Model

        network = Model(options.model)
        caches = _labelled(cache or [])
        feed = options.feed(network)
        with feed, Bar(console, "preparing the network", "comparing", "comparing") as progress:
            comparison = make_comparison(
                network, feed, caches=caches, quantile=quantile, threads=options.threads, progress=progress
            )
        _print_qualities(comparison)
        say("")
        _print_tensors(comparison)
        say("")
        say(f"verdict: {comparison.verdict}")
        finish(**comparison.as_json())


def _labelled(paths: Sequence[str]) -> dict[str, str]:
    """Return the caches by file name, or by path if two have the same name."""
    names = [os.path.basename(path) for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def _print_qualities(comparison: "fastcal.Comparison") -> None:
    rows = [("FP32", "", "", _percent(comparison.float_top1), "", "")]
    for label, quality in comparison.qualities.items():
        worst = "".join(f"{_decibels(quality.tensors[name].sqnr)} {name}" for name in quality.worst[:1])
        shares = _percent(quality.agreement), _percent(quality.top1)
        rows.append((label, _decibels(quality.sqnr), *shares, _decibels(quality.median_sqnr), worst))
    columns = ("output", "as FP32", "top-1", "tensors' median")
    print_table({"scales": "left", **dict.fromkeys(columns, "right"), "worst tensor": "left"}, rows)


def _print_tensors(comparison: "fastcal.Comparison") -> None:
    names = comparison.qualities[comparison.best].worst
    rows = []
    for name in names[:_SHOWN]:
        tensors = (quality.tensors.get(name) for quality in comparison.qualities.values())
        rows.append((name, *(_decibels(tensor.sqnr if tensor else None) for tensor in tensors)))
    print_table({"tensor": "left", **dict.fromkeys(comparison.qualities, "right")}, rows)
    if len(names) > _SHOWN:
        say(f"and {len(names) - _SHOWN} tensors that keep more: --json has all")


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{round(value, 1) + 0.0:.1f} dB"  # no -0.0


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
