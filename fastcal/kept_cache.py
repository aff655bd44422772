"""The places where a calibrator keeps its cache: a file with a record beside it, an open file, or memory."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record, check_cache_writable
from fastcal.calibration import Calibration
from fastcal.errors import CacheError, FastcalError

_SAME = "it was made from the same model, samples and settings"


class KeptCache(ABC):
    """A place for a cache."""

    @abstractmethod
    def reuse(self, calibration: Calibration) -> tuple[bytes | None, str]:
        """Return the cache if it may be reused for a calibration, else None, and the reason to be logged, if any."""

    @abstractmethod
    def save(self, record: Record, data: bytes) -> None:
        """Keep a cache; raise FastcalError if that fails."""

    def check_writable(self, names: Iterable[str]) -> None:  # noqa: B027 - memory can always be written
        """Raise FastcalError if a cache with scales of these tensors could not be kept."""

    def forget(self) -> None:  # noqa: B027 - a file stays
        """Forget a cache that is nowhere but in memory."""


def keep_cache(place: Any) -> KeptCache:
    """Return the place that a path, an open binary file or None (memory) stands for."""
    if place is None:
        return _InMemory()
    if hasattr(place, "read") or hasattr(place, "write"):
        return _InStream(place)
    if not isinstance(place, str | os.PathLike):
        raise FastcalError(f"cache is a {type(place).__name__}; name a file, or give an open binary file")
    return _InFile(Path(place))


class _InFile(KeptCache):
    """A file, with a record beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def reuse(self, calibration: Calibration) -> tuple[bytes | None, str]:
        data, reason = calibration.reuse(self._path)
        return data, reason if data is None else _SAME

    def save(self, record: Record, data: bytes) -> None:
        record.save(self._path, data)

    def check_writable(self, names: Iterable[str]) -> None:
        check_cache_writable(self._path, names)


class _InStream(KeptCache):
    """An open binary file. It has no record, so its header alone decides on its reuse."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __str__(self) -> str:
        return f"cache {getattr(self._stream, 'name', type(self._stream).__name__)}"

    def reuse(self, calibration: Calibration) -> tuple[bytes | None, str]:
        data = self._read()
        if not data:
            return None, "it is empty"
        try:
            found = CalibrationCache.from_bytes(data, str(self))
        except CacheError as error:
            return None, str(error)
        if found.header != calibration.header:
            return None, f"its header is {found.header}, not {calibration.header}"
        return (data, "its header fits, and it has no record") if found.scales else (None, "it holds no scales")

    def _read(self) -> bytes:
        """Return the contents from the beginning; nothing of a file that is open for writing alone."""
        try:
            if not self._stream.readable():
                return b""
            if self._stream.seekable():
                self._stream.seek(0)
            data = self._stream.read()
        except (OSError, ValueError) as error:
            raise FastcalError(f"cannot read {self}: {error}; give an open binary file") from error
        if not isinstance(data, bytes):
            raise FastcalError(f"{self} is open for text; open it as binary, with mode 'r+b' or 'w+b'")
        return data

    def save(self, record: Record, data: bytes) -> None:
        self.check_writable(())
        try:
            if self._stream.seekable():
                self._stream.seek(0)
                self._stream.truncate()
            self._stream.write(data)
            self._stream.flush()
        except (OSError, ValueError, TypeError) as error:
            raise FastcalError(f"cannot write {self}: {error}; give another open binary file") from error

    def check_writable(self, names: Iterable[str]) -> None:
        if self._stream.closed or not self._stream.writable():
            raise FastcalError(f"{self} cannot be written to; open it with mode 'r+b' or 'w+b'")


class _InMemory(KeptCache):
    """The memory of this process."""

    def __init__(self) -> None:
        self._kept: tuple[Record, bytes] | None = None

    def __str__(self) -> str:
        return "the cache of the last build"

    def reuse(self, calibration: Calibration) -> tuple[bytes | None, str]:
        if self._kept is None:
            return None, ""
        record, data = self._kept
        differences = calibration.record.differences(record)
        return (None, "it was made from other " + ", ".join(differences)) if differences else (data, _SAME)

    def save(self, record: Record, data: bytes) -> None:
        self._kept = record, data

    def forget(self) -> None:
        self._kept = None
