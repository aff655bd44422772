"""A metric of object detectors."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Metric, Outputs, are_logits, share, sigmoid

#: The least overlap, as intersection over union, of boxes that are the same one: in two networks, and in one.
_SAME, _SUPPRESSED = 0.5, 0.45

#: The most boxes of an image that are looked at, those with the highest scores.
_MOST = 1000


class Layout(NamedTuple):
    """The places of boxes and scores in the outputs, which are (N, boxes, values) or (N, values, boxes).

    Attributes:
        boxes: The output with the boxes: the first four values are a box.
        scores: The output with the scores.
        axis: The axis of the values of both, 1 or 2.
        first: The index of the first score.
        last: The index behind the last score; None for the last value.
        form: "classes" for a score per class, "objects" for the score of any object before those of the classes given
            an object, "labels" for one score and the class.
    """

    boxes: str
    scores: str
    axis: int
    first: int
    last: int | None
    form: str


class _Found(NamedTuple):
    """The boxes of an image, as corners, with their classes; the highest score first."""

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.intp]


@dataclass
class Detections(Metric):
    """The F1 score of the boxes found, against FP32's as the truth.

    Boxes with a score of at least the `threshold` are left after suppression (IoU above 0.45 with a better one of their
    class). Two boxes are the same if they have one class and an IoU of at least 0.5. The first exact batch tells
    whether boxes are corners or centres and sizes, whether scores are logits, and which class is the background: the
    class of more than half of the boxes.

    Attributes:
        layout: The places of boxes and scores.
        threshold: The least score.
    """

    name = "boxes' F1"
    layout: Layout
    threshold: float = 0.25
    _are_corners: bool | None = field(default=None, init=False)
    _are_logits: bool = field(default=False, init=False)
    _background: int | None = field(default=None, init=False)
    _same: int = field(default=0, init=False)
    _all: int = field(default=0, init=False)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        if self._are_corners is None:
            self._look(exact)
        for one, two in zip(self._found(exact), self._found(other), strict=True):
            self._same += _matches(one, two)
            self._all += len(one.boxes) + len(two.boxes)

    @property
    def value(self) -> float | None:
        """The F1 score, as `Metric`."""
        return share(2 * self._same, self._all)

    def _look(self, outputs: Outputs) -> None:
        boxes, scores = self._values(outputs)
        ordered = (boxes[..., 2] >= boxes[..., 0]) & (boxes[..., 3] >= boxes[..., 1])
        self._are_corners = bool(ordered.mean() > 0.9)
        self._are_logits = self.layout.form != "labels" and are_logits(scores)
        if self.layout.boxes == self.layout.scores or scores.shape[2] == 1:
            return
        scores = self._probabilities(scores)
        classes = scores.argmax(axis=2)[scores.max(axis=2) >= self.threshold]
        counts = np.bincount(classes, minlength=scores.shape[2])
        if 2 * counts.max() > scores.shape[0] * scores.shape[1]:
            self._background = int(counts.argmax())

    def _values(self, outputs: Outputs) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the boxes, (N, boxes, 4), and the scores, (N, boxes, scores); what is not a number as 0."""
        boxes, scores = (
            np.nan_to_num(np.moveaxis(_flat(outputs[name], self.layout.axis), self.layout.axis, 2).astype(np.float64))
            for name in (self.layout.boxes, self.layout.scores)
        )
        return boxes[:, :, :4], scores[:, :, self.layout.first : self.layout.last]

    def _probabilities(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        scores = sigmoid(scores) if self._are_logits else scores
        if self._background is not None:
            scores = np.delete(scores, self._background, axis=2)
        return scores

    def _found(self, outputs: Outputs) -> list[_Found]:
        """Return the boxes that are left, by image."""
        boxes, scores = self._values(outputs)
        if self.layout.form == "labels":
            best, classes = scores[:, :, 0], np.rint(scores[:, :, 1]).astype(np.intp)
        else:
            scores = self._probabilities(scores)
            if self.layout.form == "objects":
                scores = scores[:, :, :1] * scores[:, :, 1:]
            best, classes = scores.max(axis=2), scores.argmax(axis=2)
        if not self._are_corners:
            half = boxes[:, :, 2:] / 2
            boxes = np.concatenate([boxes[:, :, :2] - half, boxes[:, :, :2] + half], axis=2)
        return [self._left(*image) for image in zip(boxes, best, classes, strict=True)]

    def _left(
        self, boxes: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], classes: npt.NDArray[np.intp]
    ) -> _Found:
        order = np.argsort(-scores, kind="stable")[:_MOST]
        order = order[scores[order] >= self.threshold]
        boxes, classes = boxes[order], classes[order]
        hides = (_overlap(boxes, boxes) > _SUPPRESSED) & (classes[:, None] == classes)
        kept = np.ones(len(order), bool)
        for index in range(len(order)):
            if kept[index]:
                kept[index + 1 :] &= ~hides[index, index + 1 :]
        return _Found(boxes[kept], classes[kept])


def _flat(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Return an output with three axes: some have a further one of size 1, others none for a single score."""
    if array.ndim == 4:
        return array.reshape(array.shape[0], array.shape[1], array.shape[3])
    return np.expand_dims(array, axis) if array.ndim == 2 else array


def _overlap(ones: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the intersection over union of each of `ones` with each of `others`."""
    low = np.maximum(ones[:, None, :2], others[:, :2])
    high = np.minimum(ones[:, None, 2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    one, other = (np.prod(np.maximum(each[:, 2:] - each[:, :2], 0), axis=1) for each in (ones, others))
    return np.asarray(shared / np.maximum(one[:, None] + other - shared, 1e-12))


def _matches(ones: _Found, others: _Found) -> int:
    """Return the number of boxes that both have; each box of `others` in turn takes the one that it covers best."""
    overlap = np.where(ones.classes[:, None] == others.classes, _overlap(ones.boxes, others.boxes), 0)
    found = 0
    for column in overlap.T if len(ones.boxes) else ():
        best = int(column.argmax())
        if column[best] >= _SAME:
            found += 1
            overlap[best] = 0
    return found
