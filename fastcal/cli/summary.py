"""The summary of a calibration, for people and as JSON."""

from collections.abc import Mapping
from typing import Any

import fastcal
from fastcal.cli.terminal import print_rows, rate, waiting


def print_summary(
    cache: "fastcal.CalibrationCache", feed: "fastcal.Feed", progress: fastcal.Progress, /, **written: str
) -> None:
    """Print the data, the speed and the scales of a calibration, and a row for each file that was written."""
    nonzero = {name: scale for name, scale in cache.scales.items() if scale} or {"": 0.0}
    names = (pick(nonzero, key=nonzero.__getitem__) for pick in (max, min))
    widest, narrowest = (f"{nonzero[name]:.6g} for {name}" if name else "all scales are 0" for name in names)
    print_rows(
        **data_rows(feed, progress),
        speed=speed(progress),
        tensors=f"{len(cache.scales)}, scales by {cache.algorithm.name}",
        widest=widest,
        narrowest=narrowest,
        **written,
    )


def outcome(cache: "fastcal.CalibrationCache", feed: "fastcal.Feed", progress: fastcal.Progress) -> dict[str, Any]:
    """Return the data, the speed and the number of scales of a calibration as JSON entries."""
    return {
        "header": cache.header,
        "algorithm": cache.algorithm.name,
        "tensors": len(cache.scales),
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
    rows = {kind: f"{count} in {progress.batches} batches of {feed.batch_size}"}
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
