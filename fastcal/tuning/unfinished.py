"""`Unfinished`: the ranking of layers in a file, layer by layer, so that a tuning that was stopped goes on."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcal.errors import FastcalError


class Unfinished:
    """The noises of the first layers of a ranking, kept in a file if there is one.

    Attributes:
        noises: The noises so far, also those that an earlier tuning of the same has left in the file.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, made_from: Mapping[str, Any], layers: Sequence[str]
    ) -> None:
        """Begin with what the file has; `made_from` says what decides on the noises, apart from the `layers`' names.

        Raises:
            FastcalError: The file cannot be read or written.
        """
        self._path = None if path is None else Path(path)
        key = json.dumps([dict(made_from), list(layers)], sort_keys=True)
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self.noises: list[float] = []
        if self._path is not None:
            self.noises = self._read(self._path)[: len(layers)]
            self._write("w", [self._key, *self.noises])

    def add(self, noise: float) -> None:
        """Add the noise of the next layer."""
        self.noises.append(noise)
        self._write("a", [noise])

    def finish(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> list[float]:
        """Return the noises in the file; none if it is of another tuning."""
        try:
            lines = path.read_text(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FastcalError(f"cannot read {path}: {error.strerror}; remove it") from error
        noises = []
        for line in lines[1:] if lines[:1] == [json.dumps(self._key) + "\n"] else ():
            try:
                noises.append(float(line))
            except ValueError:
                break
        return noises[: len([line for line in lines[1:] if line.endswith("\n")])]  # the last line may be cut off

    def _write(self, mode: str, values: Sequence[Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(mode) as file:
                file.writelines(f"{json.dumps(value)}\n" for value in values)
        except OSError as error:
            raise FastcalError(f"cannot write {self._path}: {error.strerror}; free some space there") from error
