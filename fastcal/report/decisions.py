"""`Decisions`: the classes that the float network and its INT8 variants give to the images."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: The label of the float network among those of the INT8 variants.
FLOAT = None


class Decisions:
    """The class of every sample, by each variant of a network.

    Args:
        paths: The samples' paths; None if they have none.
    """

    def __init__(self, paths: Sequence[str] | None) -> None:
        self._paths = paths or []
        self._decided: dict[str | None, list[npt.NDArray[np.intp]]] = {}
        self._classes = 0

    def add(self, label: str | None, output: npt.NDArray[Any]) -> None:
        """Keep the class of each sample of a batch if the output is a classifier's: of shape (N, classes, 1, ...)."""
        if output.ndim >= 2 and output.shape[1] > 1 and math.prod(output.shape[2:]) == 1:
            self._classes = output.shape[1]
            classes = output.reshape(-1, self._classes).argmax(axis=1)
            self._decided.setdefault(label, []).append(classes)

    def agreement(self, label: str | None) -> float | None:
        """Return the share of samples to which a variant gives the float network's class; None for no classifier."""
        return self._share(label, self._all_of(FLOAT))

    def top1(self, label: str | None) -> float | None:
        """Return the share of samples to which a variant gives their folder's class; None if that is not known."""
        return self._share(label, self._folders())

    def _share(self, label: str | None, right: npt.NDArray[np.intp] | None) -> float | None:
        decided = self._all_of(label)
        return None if decided is None or right is None else float(np.mean(decided == right))

    def _all_of(self, label: str | None) -> npt.NDArray[np.intp] | None:
        return np.concatenate(self._decided[label]) if self._decided else None

    def _folders(self) -> npt.NDArray[np.intp] | None:
        """Return the classes of the samples by their folders; None if there is not one folder for each class."""
        decided = self._all_of(FLOAT)
        if decided is None or not self._paths:
            return None
        folders = [Path(os.path.abspath(path)).parent for path in self._paths[: decided.size]]
        root = folders[0].parent
        if len(set(folders)) == 1 or {folder.parent for folder in folders} != {root} or not root.is_dir():
            return None
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if len(names) != self._classes or not {folder.name for folder in folders} <= {*names}:
            return None
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[folder.name] for folder in folders])
