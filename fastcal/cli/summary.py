"""The summary of a calibration, for people and as JSON."""

from collections.abc import Mapping
from typing import Any

import fastcal
from fastcal.cli.terminal import print_rows, rate, waiting
from fastcal.errors import counted, decibels_text, first_few

#: What INT8 keeps, in dB: differences of less are none, and less than this is little.
_ALIKE, _LITTLE = 1.0, 20.0


def print_summary(
    cache: "fastcal.CalibrationCache", feed: "fastcal.Feed", progress: fastcal.Progress, /, **written: str
) -> None:
    """Print the data, the speed and the scales of a calibration, and a row for each file that was written."""
    print_rows(
        **run_rows(cache, feed, progress),
        tensors=f"{len(cache.scales)}, scales by {cache.algorithm.name}",
        **_remarkable(cache),
        **written,
    )


def run_rows(cache: "fastcal.CalibrationCache", feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, str]:
    """Return the rows that describe the data and the speed of a run, or what was reused in its place."""
    if progress.batches:
        return data_rows(feed, progress) | {"speed": speed(progress)}
    return {"images": f"none: the {'cache was' if cache.observed is None else 'histograms were'} reused"}


def _remarkable(cache: "fastcal.CalibrationCache") -> dict[str, str]:
    """Return the rows that name the tensors which deserve a look."""
    from fastcal.observe.histogram import MANY_CLIPPED

    clipped, dead = _clipped(cache), _dead(cache)
    most, *others = clipped.items() or [("", 0.0)]
    text = f"{100 * most[1]:.2f} % of {most[0]}" if clipped else f"less than {100 * MANY_CLIPPED:g} % of every tensor"
    if others:
        text += f", and {100 * MANY_CLIPPED:g} % or more of {counted(len(others), 'other tensor')}"
    return {"clipped": text} | ({"always 0": first_few(dead)} if dead else {})


def _clipped(cache: "fastcal.CalibrationCache") -> dict[str, float]:
    """Return the share of values that INT8 clips, of the tensors of which it clips many, the largest first."""
    from fastcal.observe.histogram import MANY_CLIPPED

    histograms = {} if cache.observed is None else cache.observed.histograms
    shares = {name: histograms[name].clipped(127 * scale) for name, scale in cache.scales.items() if name in histograms}
    many = {name: share for name, share in shares.items() if share >= MANY_CLIPPED}
    return dict(sorted(many.items(), key=lambda item: -item[1]))


def _dead(cache: "fastcal.CalibrationCache") -> list[str]:
    """Return the tensors whose values are always 0."""
    histograms = {} if cache.observed is None else cache.observed.histograms
    return [name for name in cache.scales if name in histograms and not histograms[name].amax]


def tuning_rows(tuning: "fastcal.Tuning") -> dict[str, str]:
    """Return the row of a summary that says what INT8 keeps, and what to do if it is little."""
    result, text = tuning.result, tuning.text
    if result is None:
        return {}
    changes = [f"{counted(result.in_float, 'layer')} in float ({1 - result.int8_share:.0%} of the multiply-adds)"]
    if tuning.bias:
        changes.append(f"{counted(len(tuning.bias), 'bias')} corrected")
    if tuning.target is not None and not tuning.is_reached:
        text += f"; the target {tuning.target:.4g} is out of reach, even with every layer in float that costs something"
    elif tuning.target is None and not tuning.is_good:
        text += "; fastcal tune --target 99% leaves as many layers in float as it takes"
    return {"keeps": text, "repaired": ", ".join(changes)}


def kept_row(kept: Mapping[str, float], algorithm: str) -> dict[str, str]:
    """Return the row that says what INT8 keeps with an algorithm's scales, and what would keep more."""
    if not kept:
        return {}
    text = f"{decibels_text(kept[algorithm])} at the outputs with all layers in INT8"
    best = max(kept, key=lambda name: kept[name])
    if kept[best] > kept[algorithm] + _ALIKE:
        text += f"; --algorithm {best} would keep {decibels_text(kept[best])}"
    if kept[best] < _LITTLE:
        text += "; fastcal tune finds the layers to leave in float"
    return {"keeps": text}


def outcome(cache: "fastcal.CalibrationCache", feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, Any]:
    """Return the data, the speed and the number of scales of a calibration as JSON entries."""
    return {
        "header": cache.header,
        "algorithm": cache.algorithm.name,
        "tensors": len(cache.scales),
        "clipped": _clipped(cache),
        "always_0": _dead(cache),
        **_data_used(feed, progress),
        "batches": progress.batches,
        "batch_size": feed.batch_size,
        "seconds": progress.seconds,
        "waited": progress.waited,
    }


def data_rows(feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, str]:
    """Return the rows of a summary that describe the data."""
    used = _data_used(feed, progress)
    preprocess, skipped = used.pop("preprocess", None), used.pop("skipped", [])
    ((kind, count),) = used.items()
    rows = {kind: f"{count} in {counted(progress.batches, 'batch')} of {feed.batch_size}"}
    if skipped:
        rows[kind] += f"; {len(skipped)} skipped as unreadable"
    return rows if preprocess is None else rows | {"prepared": preprocess}


def speed(progress: fastcal.Progress) -> str:
    """Return the speed and the time spent waiting for data, as text."""
    return f"{rate(progress)}, {waiting(progress)}"


def _data_used(feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, Any]:
    """Return the number of samples; for images also those that were skipped, and the preprocessing."""
    used = progress.images if feed.samples is None else min(feed.samples, progress.images)
    if feed.preprocess is None:
        return {"samples": used}
    prepared = str(feed.preprocess)
    if isinstance(feed.preprocess, Mapping):
        prepared = "; ".join(f"{name}: {preprocess}" for name, preprocess in feed.preprocess.items())
    return {"images": used, "skipped": feed.skipped, "preprocess": prepared}
