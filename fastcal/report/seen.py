"""`Seen`: the differences between a network's outputs in float and in INT8."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Metric, Outputs
from fastcal.accuracy.labels import TopOne
from fastcal.accuracy.noise import Noise, decibels
from fastcal.accuracy.outputs import Part, Shapes, channels_of
from fastcal.report.quality import Quality, TensorQuality

#: A channel with less than this share of the mean power of its part's channels is not listed.
_SILENT = 0.01

#: The classes of samples.
Classes = npt.NDArray[np.intp]


class Seen:
    """The noise of outputs, of their parts and of their channels, and the metrics of what users see.

    Attributes:
        noise: The noise.
        metric: The metric to show, if there is one.
        classes: The classes, if the network is a classifier; may be the metric.
    """

    def __init__(
        self,
        outputs: Sequence[str],
        parts: Sequence[Part],
        shapes: Shapes,
        metric: Metric | None,
        classes: TopOne | None,
    ) -> None:
        channels = {part.label: channels_of(part, shapes[part.output]) for part in parts}
        wholes = [Part(name, name) for name in outputs]
        self._outputs, self._parts = outputs, [part.label for part in parts]
        self._channels = [[channel.label for channel in found] for found in channels.values()]
        self.noise = Noise(tuple(dict.fromkeys([*wholes, *parts, *chain(*channels.values())])))
        self.metric, self.classes = metric, classes

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch without padding."""
        self.noise.add(exact, other)
        for metric in (self.metric, None if self.classes is self.metric else self.classes):
            if metric is not None:
                metric.add(exact, other, samples)

    def quality(self, tensors: Mapping[str, TensorQuality], paths: Sequence[str]) -> Quality:
        """Return the quality of the network, given that of its tensors and the paths of the samples."""
        sqnr = {label: decibels(error) for label, error in self.noise.errors.items()}
        return Quality(
            {name: sqnr[name] for name in self._outputs if name in sqnr},
            tensors,
            self.classes.value if self.classes else None,
            self._share_of_folders(1, paths),
            {label: sqnr[label] for label in self._parts if label in sqnr},
            {label: sqnr[label] for label in self._loud_channels() if label in sqnr},
            self.metric.value if self.metric else None,
        )

    def float_top1(self, paths: Sequence[str]) -> float | None:
        """Return the share of the samples that float gives the class of their folder, or None if that is not known."""
        return self._share_of_folders(0, paths)

    def _share_of_folders(self, index: int, paths: Sequence[str]) -> float | None:
        """Return the share of the exact classes (0) or of the others (1) that are those of the folders."""
        if self.classes is None:
            return None
        decided = np.concatenate([both[index] for both in self.classes.decided])
        folders = _folders(paths[: decided.size], self.classes.classes)
        return None if folders is None else float(np.mean(decided == folders))

    def _loud_channels(self) -> list[str]:
        """Return the labels of the channels that are not silent."""
        power = self.noise.signal
        return [
            label
            for labels in self._channels
            for label in labels
            if power[label] > _SILENT * sum(power[each] for each in labels) / len(labels)
        ]


def _folders(paths: Sequence[str], classes: int) -> npt.NDArray[np.intp] | None:
    """Return the classes of the samples by their folders; None if there is not one folder for each class."""
    folders = [Path(os.path.abspath(path)).parent for path in paths]
    if len(set(folders)) <= 1 or len({folder.parent for folder in folders}) > 1 or not folders[0].parent.is_dir():
        return None
    names = sorted(entry.name for entry in folders[0].parent.iterdir() if entry.is_dir())
    if len(names) != classes or not {folder.name for folder in folders} <= {*names}:
        return None
    return np.array([names.index(folder.name) for folder in folders])
