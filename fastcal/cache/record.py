"""The record of what a calibration cache was made from: written beside the cache, compared before it is reused."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcal.errors import FastcalError
from fastcal.files import check_writable, write_together

#: The most characters of a value that is shown if it differs.
_LONG = 100


@dataclass(frozen=True)
class Record:
    """The entries that say what a calibration cache was made from.

    Attributes:
        entries: Name to value, e.g. "model": the file's SHA-256, "preprocess": the preprocessing. A value that is not
            known has no entry.
    """

    entries: Mapping[str, Any]

    @classmethod
    def of(cls, batches: Mapping[str, Any], model: str | None, **settings: Any) -> "Record":
        """Return the record of a calibration.

        `batches` is what `Feed.describe` returns, `model` the model's digest; `settings` that are None are left out.
        """
        others = {"model": model, **settings}
        entries = {**batches} | {name: value for name, value in others.items() if value is not None}
        return cls(json.loads(json.dumps(entries)))

    def skipping(self, samples: Sequence[str]) -> "Record":
        """Return this record with `samples`, which a calibration found unreadable and left out, if there are any.

        `differences` ignores the samples that only an earlier record lists: a file that was unreadable still is.
        """
        return Record({**self.entries, "skipped": list(samples)}) if samples else self

    def differences(self, earlier: "Record") -> list[str]:
        """Return the entries of this record that differ from `earlier` or are missing there, a text each."""
        found = []
        for name, value in self.entries.items():
            if name not in earlier.entries:
                found.append(f"{name} (not recorded)")
            elif earlier.entries[name] != value:
                short = len(str(value)) <= _LONG and name not in ("model", "samples", "first_batch")
                found.append(f"{name} ({earlier.entries[name]} then, {value} now)" if short else name)
        return found

    def save(self, cache_path: str | os.PathLike[str], cache: bytes) -> None:
        """Write `cache` to `cache_path` and this record beside it: both, or neither, and then raise FastcalError."""
        text = json.dumps({"cache": hashlib.sha256(cache).hexdigest(), "made_from": dict(self.entries)}, indent=1)
        write_together({cache_path: cache, record_path(cache_path): text.encode() + b"\n"})


def check_cache_writable(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise FastcalError if a cache with scales of these tensors, or its record, could not be written to `path`."""
    longest_line = len(": ffffffff\n")
    check_writable(path, sum(len(os.fsencode(name)) + longest_line for name in ["header" * 8, *names]))
    check_writable(record_path(path), 1)


def record_path(cache_path: str | os.PathLike[str]) -> Path:
    """Return the path of a cache's record: the cache's path with ".json" added."""
    return Path(f"{os.fspath(cache_path)}.json")


def check_is_no_record(output: str | os.PathLike[str], cache_path: str | os.PathLike[str]) -> None:
    """Raise FastcalError if a file to write is the record of a cache that is read."""
    if os.path.realpath(output) == os.path.realpath(record_path(cache_path)):
        raise FastcalError(f"{output} is the record of {cache_path}; name another file")


def read_record(cache_path: str | os.PathLike[str], cache: bytes) -> Record | None:
    """Return the record beside a cache with the contents `cache`; None if it is missing, damaged or another cache's."""
    try:
        content = json.loads(record_path(cache_path).read_bytes())
        if content["cache"] != hashlib.sha256(cache).hexdigest():
            return None
        return Record(dict(content["made_from"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def why_no_record(cache_path: str | os.PathLike[str]) -> str:
    """Return the reason why `read_record` finds no record."""
    path = record_path(cache_path)
    return f"its record, {path}, is damaged or of another cache" if path.exists() else f"its record, {path}, is missing"
