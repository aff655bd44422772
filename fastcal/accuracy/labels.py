"""Metrics of classes, of sequences of classes, and of embeddings."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Metric, Outputs, share

#: The class of what is not a number.
_NONE = -1


def _best(scores: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return the class of each row of scores; a single score is a probability."""
    best = scores.argmax(axis=-1) if scores.shape[-1] > 1 else (scores[..., 0] > 0.5).astype(np.intp)
    return np.asarray(np.where(np.isnan(scores).any(axis=-1), _NONE, best))


@dataclass
class TopOne(Metric):
    """The share of samples, or of their tokens, that get the same class; those whose exact class is NaN are left out.

    Attributes:
        output: The output's name.
        classes: The number of scores, along the second axis, or along the last if the output has tokens. A single score
            is a probability.
        tokens: Whether the output is (N, tokens, classes); else it is (N, classes), perhaps with dimensions of 1.
        decided: The exact classes, and those to judge, batch by batch.
    """

    name = "top-1"
    output: str
    classes: int
    tokens: bool = False
    decided: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = field(default_factory=list, init=False)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        one, two = (_best(each[self.output].reshape(-1, self.classes)) for each in (exact, other))
        self.decided.append((one, two))

    @property
    def value(self) -> float | None:
        """The share, as `Metric`."""
        known = [(two == one)[one >= 0] for one, two in self.decided]
        return share(sum(int(same.sum()) for same in known), sum(same.size for same in known))


@dataclass
class Sequences(Metric):
    """The share of samples whose best path is the same: the classes without repeats and blanks, as of CTC.

    The blank is the first or the last class: the one that the first exact batch has more often.

    Attributes:
        output: The output's name; its shape is (N, T, classes).
    """

    name = "sequences"
    output: str
    _blank: int | None = field(default=None, init=False)
    _same: int = field(default=0, init=False)
    _samples: int = field(default=0, init=False)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        one, two = _best(exact[self.output]), _best(other[self.output])
        if self._blank is None:
            last = exact[self.output].shape[-1] - 1
            self._blank = last if np.count_nonzero(one == last) > np.count_nonzero(one == 0) else 0
        paths = [[_path(row, self._blank) for row in rows] for rows in (one, two)]
        self._same += sum(map(np.array_equal, *paths))
        self._samples += len(one)

    @property
    def value(self) -> float | None:
        """The share, as `Metric`."""
        return share(self._same, self._samples)


def _path(classes: npt.NDArray[np.intp], blank: int) -> npt.NDArray[np.intp]:
    is_new = np.append(True, classes[1:] != classes[:-1])
    return np.asarray(classes[is_new & (classes != blank)])


@dataclass
class Cosine(Metric):
    """The mean cosine of the angle between the exact embeddings and those to judge, at least 0.

    Attributes:
        output: The output's name; its shape is (N, size), perhaps with dimensions of 1.
    """

    name = "cosine"
    output: str
    _sum: float = field(default=0.0, init=False)
    _samples: int = field(default=0, init=False)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        one, two = (
            np.asarray(each[self.output], np.float64).reshape(len(each[self.output]), -1) for each in (exact, other)
        )
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        known = np.isfinite(one).all(axis=1) & one.any(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = np.einsum("ni,ni->n", one, two) / lengths
        self._sum += float(np.maximum(np.nan_to_num(cosines[known]), 0).sum())
        self._samples += int(known.sum())

    @property
    def value(self) -> float | None:
        """The mean, as `Metric`."""
        return share(self._sum, self._samples)
