"""`Metric`: the agreement of two networks in what users see, added up over batches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

#: Arrays by the names of outputs, the first axis for the samples.
Outputs = Mapping[str, npt.NDArray[Any]]


@dataclass
class Metric(ABC):
    """A metric: the fields that its construction takes are settings, the others are sums over batches.

    Settings that only values can tell, such as whether scores are logits, are taken from the first exact batch.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name to show."""

    @abstractmethod
    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch: the exact outputs and those to judge, of the same shapes, without padding."""

    @property
    @abstractmethod
    def value(self) -> float | None:
        """The agreement so far: 1 if both see the same. None if there is nothing to see."""

    @property
    def standard_error(self) -> float:
        """The standard error of `value` as the mean of independent samples; 0 if it is not such a mean."""
        return 0.0

    def fresh(self) -> "Metric":
        """Return a metric of the same settings, without batches."""
        return replace(self)


def share(part: float, whole: float) -> float | None:
    """Return the share that a part has of a whole; None if there is no whole."""
    return float(part / whole) if whole else None


def sigmoid(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the probabilities of logits."""
    return np.asarray(1 / (1 + np.exp(-np.clip(np.asarray(values, np.float64), -60, 60))))


def are_logits(values: npt.NDArray[Any]) -> bool:
    """Return True if finite values leave 0 to 1, by more than rounding."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and (finite.min() < -1e-3 or finite.max() > 1 + 1e-3))
