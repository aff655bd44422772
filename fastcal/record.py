"""What a calibration cache was made from: written beside it, and compared before it is used again."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcal.cache import CalibrationCache, largest_size
from fastcal.errors import FastcalError
from fastcal.feed.feed import Feed
from fastcal.files import check_writable, write_together
from fastcal.model import Model

#: How long a value may be to be shown where it differs.
_LONG = 100


@dataclass(frozen=True)
class Record:
    """What a calibration cache was made from.

    Attributes:
        entries: Name to value, e.g. "model": the file's SHA-256, "preprocess": the preprocessing. What is not known is
            not an entry.
    """

    entries: Mapping[str, Any]

    @classmethod
    def of(cls, feed: Feed | None, model: Model | None, **settings: Any) -> "Record":
        """The record of a calibration of `model` (None: not known) with the batches of `feed` and some settings."""
        entries = {} if feed is None else feed.describe()
        if model is not None:
            entries["model"] = model.digest
        entries |= {name: value for name, value in settings.items() if value is not None}
        return cls(json.loads(json.dumps(entries)))

    def after(self, feed: Feed) -> "Record":
        """This record once there were passes over `feed`: it lists the samples that these left out.

        They need no comparing: the same files are as readable as they were.
        """
        return Record({**self.entries, "skipped": feed.skipped}) if feed.skipped else self

    def differences(self, earlier: "Record") -> list[str]:
        """What of this record an earlier one has otherwise, or not at all; empty where it all agrees."""
        found = []
        for name, value in self.entries.items():
            if name not in earlier.entries:
                found.append(f"{name} (not recorded)")
            elif earlier.entries[name] != value:
                short = len(str(value)) <= _LONG and name not in ("model", "samples", "first_batch")
                found.append(f"{name} ({earlier.entries[name]} then, {value} now)" if short else name)
        return found

    def save(self, cache_path: str | os.PathLike[str], cache: bytes) -> None:
        """Write a cache with the contents `cache`, and this record beside it: both or none.

        Raises:
            FastcalError: One of them cannot be written.
        """
        text = json.dumps({"cache": hashlib.sha256(cache).hexdigest(), "made_from": dict(self.entries)}, indent=1)
        write_together({cache_path: cache, record_path(cache_path): text.encode() + b"\n"})


def check_cache_writable(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Find out now whether a cache of tensors of these names, and its record, can be written to `path` later.

    Raises:
        FastcalError: One of them cannot be written.
    """
    check_writable(path, largest_size(names))
    check_writable(record_path(path), 1)


def precision(tf32: bool) -> str:
    """What a record says of the precision in which the network was observed."""
    return "TF32" if tf32 else "FP32"


def record_path(cache_path: str | os.PathLike[str]) -> Path:
    """Where the record of a cache lies: beside it, with ".json" added to its name."""
    return Path(f"{os.fspath(cache_path)}.json")


def check_is_no_record(output: str | os.PathLike[str], cache_path: str | os.PathLike[str]) -> None:
    """Raise FastcalError if a file to write is the record of a cache that is read."""
    if os.path.realpath(output) == os.path.realpath(record_path(cache_path)):
        raise FastcalError(f"{output} is the record of {cache_path}; name another file")


def read_record(cache_path: str | os.PathLike[str], cache: bytes) -> Record | None:
    """The record beside a cache with the contents `cache`; None where there is none, or it is of another cache."""
    try:
        content = json.loads(record_path(cache_path).read_bytes())
        if content["cache"] != hashlib.sha256(cache).hexdigest():
            return None
        return Record(dict(content["made_from"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def why_no_record(cache_path: str | os.PathLike[str]) -> str:
    """Why `read_record` finds none for a cache."""
    path = record_path(cache_path)
    return f"its record, {path}, is damaged or of another cache" if path.exists() else f"its record, {path}, is missing"


def usable_cache(path: str | os.PathLike[str], header: str, record: Record) -> tuple[bytes | None, str]:
    """The cache at `path` if it is what a calibration would make now.

    Args:
        path: The cache.
        header: The header it must have.
        record: What a calibration would be made from now.

    Returns:
        Its contents and "", or None and why it is not used.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return None, "there is none yet"
    except OSError as error:
        return None, f"it cannot be read ({error.strerror})"
    try:
        found = CalibrationCache.from_bytes(data, str(path))
    except FastcalError as error:
        return None, str(error)
    if found.header != header:
        return None, f"its header is {found.header}, not {header}"
    if not found.scales:
        return None, "it holds no scales"
    earlier = read_record(path, data)
    if earlier is None:
        return None, f"nothing tells what it was made from: {why_no_record(path)}"
    differences = record.differences(earlier)
    if "until_stable" in earlier.entries and "until_stable" not in record.entries:
        differences.append(f"until_stable ({earlier.entries['until_stable']} then: perhaps not all batches)")
    return (None, "it was made from other " + ", ".join(differences)) if differences else (data, "")
