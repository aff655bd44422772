"""A metric of segmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Metric, Outputs, are_logits, share


@dataclass
class Masks(Metric):
    """The intersection of masks over their union (IoU): the mean over all images, and over the classes of each.

    Attributes:
        output: The output's name; the first axis is for the images.
        axis: The axis of the classes; None if the output has one class and no axis for it.
        exclusive: Whether a pixel has the class with the largest score; else each class has a mask of its own, of the
            pixels with at least the `threshold`. If it is, the classes of an image are those that the exact one has;
            else those that either has.
        threshold: The least probability of a mask's pixel. The first exact batch tells whether scores are logits.
    """

    name = "mask IoU"
    output: str
    axis: int | None
    exclusive: bool
    threshold: float = 0.5
    _least: float | None = field(default=None, init=False)
    _sum: float = field(default=0.0, init=False)
    _squares: float = field(default=0.0, init=False)
    _masks: int = field(default=0, init=False)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        if self._least is None:
            odds = self.threshold / (1 - self.threshold)
            self._least = float(np.log(odds)) if are_logits(exact[self.output]) else self.threshold
        for one, two in zip(exact[self.output], other[self.output], strict=True):
            shared, ours, theirs = self._sizes(one, two)
            union = ours + theirs - shared
            seen = (ours if self.exclusive else union) > 0
            found = shared[seen] / union[seen]
            self._sum += float(found.sum())
            self._squares += float((found**2).sum())
            self._masks += len(found)

    def _sizes(self, one: npt.NDArray[Any], two: npt.NDArray[Any]) -> Sequence[npt.NDArray[np.intp]]:
        """Return the pixels that the masks of each class share in two images, and those of either."""
        rows, others = (self._rows(image) for image in (one, two))
        if not self.exclusive:
            masks, theirs = rows >= self._least, others >= self._least
            return [each.sum(axis=1) for each in (masks & theirs, masks, theirs)]
        classes, decided = rows.argmax(axis=0), others.argmax(axis=0)
        return [np.bincount(each, minlength=len(rows)) for each in (classes[classes == decided], classes, decided)]

    def _rows(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the scores of an image, a row for each class."""
        scores = image[None] if self.axis is None else np.moveaxis(image, self.axis - 1, 0)
        return scores.reshape(len(scores), -1)

    @property
    def value(self) -> float | None:
        """The mean, as `Metric`."""
        return share(self._sum, self._masks)

    @property
    def standard_error(self) -> float:
        """The standard error, as `Metric`: s / sqrt(n), with the standard deviation s of n masks."""
        if self._masks < 2:
            return 0.0
        variance = (self._squares - self._sum**2 / self._masks) / (self._masks - 1)
        return math.sqrt(max(variance, 0.0) / self._masks)
