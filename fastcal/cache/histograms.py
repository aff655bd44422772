"""The histograms of a calibration in a file: further algorithms pick from them without a new run of the network."""

import json
import os
from dataclasses import asdict
from typing import BinaryIO

import numpy as np

from fastcal.cache.record import Record
from fastcal.errors import CacheError
from fastcal.files import write_together
from fastcal.observe.histogram import BINS, Histogram, Observations
from fastcal.progress import Progress

#: The fields of `Observations` that are stored as they are.
_PLAIN = ("network", "backend", "precision", "shared_scales", "least_thresholds", "skipped")


def save_histograms(path: str | os.PathLike[str], observed: Observations, record: Record) -> None:
    """Write histograms, and the record of what they were made from, to an .npz file; raise FastcalError if it fails."""
    found = observed.histograms.values()
    about = {name: getattr(observed, name) for name in _PLAIN} | {
        "made_from": dict(record.entries),
        "tensors": list(observed.histograms),
        "clamped": [list(histogram.clamped.items()) for histogram in found],
        "progress": [asdict(state) for state in observed.progress],
    }
    stored = np.frombuffer(json.dumps(about, default=dict).encode(), np.uint8)
    counts = np.stack([histogram.counts for histogram in found])
    ranges = np.array([(histogram.start, histogram.range, histogram.amax) for histogram in found])
    left_out = np.array([(histogram.nan, histogram.inf) for histogram in found])

    def write(file: BinaryIO) -> None:
        np.savez_compressed(file, about=stored, counts=counts, ranges=ranges, left_out=left_out)

    write_together({path: write})


def reuse_histograms(path: str | os.PathLike[str], record: Record) -> tuple[Observations | None, str]:
    """Return the histograms in a file and "" if they were made from what `record` names, else None and the reason.

    Raises:
        CacheError: The file cannot be read, or holds something else, which would be lost if histograms replaced it.
    """
    try:
        observed, earlier = _load(path)
    except FileNotFoundError:
        return None, "there are none yet"
    except OSError as error:
        raise CacheError(f"cannot read histograms {path}: {error.strerror}; name another file") from error
    except Exception as error:  # of many kinds, by the place that is damaged
        raise CacheError(f"{path} holds no histograms of a calibration; remove it, or name another file") from error
    added = [f"{name} ({earlier.entries[name]} then)" for name in earlier.entries.keys() - record.entries.keys()]
    differences = [*record.differences(earlier), *sorted(added)]
    return (None, "they were made from other " + ", ".join(differences)) if differences else (observed, "")


def _load(path: str | os.PathLike[str]) -> tuple[Observations, Record]:
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("about", "counts", "ranges", "left_out")}
    about = json.loads(arrays["about"].tobytes())
    histograms = {}
    for index, name in enumerate(about["tensors"]):
        histogram = histograms[name] = Histogram()
        histogram.counts = arrays["counts"][index].astype(np.int64).reshape(BINS)
        histogram.start, histogram.range, histogram.amax = map(float, arrays["ranges"][index])
        histogram.nan, histogram.inf = map(int, arrays["left_out"][index])
        histogram.clamped = {float(value): int(count) for value, count in about["clamped"][index]}
    timeline = [Progress(**state) for state in about["progress"]]
    plain = {name: about[name] for name in _PLAIN}
    plain["skipped"] = tuple(plain["skipped"])
    return Observations(**plain, histograms=histograms, progress=timeline), Record(dict(about["made_from"]))
