"""`Sampled`: a feed that keeps copies of some samples, to measure what INT8 costs on them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.batch import Input
from fastcal.device import to_host
from fastcal.feed.feed import Batch, Feed, length

#: Samples in host memory by input.
Samples = dict[str, npt.NDArray[Any]]

#: The number of samples that are held out by default.
HELD_OUT = 32

#: The share of the samples that may be held out.
_SHARE = 0.25

#: Fewer samples are not held out: a calibration needs them more than a measurement.
_FEWEST = 4

#: The samples of a batch that measuring takes at once, if the batch is dynamic.
_TOGETHER = 8


class Sampled(Feed):
    """The batches of another feed; a pass keeps copies of some samples, and holds others out.

    Samples that are held out are left out of the batches, so a calibration does not see them. If the network's batch is
    dynamic, they are the last ones of each batch; else whole batches are held out. If there are too few samples, none
    is held out.

    Attributes:
        held_out: The samples that are held out, in batches of at most 8, or of the network's size.
        shown: As many of the others.
        passed: The number of samples of the last pass that were not held out.
    """

    def __init__(self, feed: Feed, inputs: Sequence[Input], most: int) -> None:
        """Hold out at most `most` samples of a feed, a quarter of them at most; 0 holds none out.

        `inputs` are the network's.
        """
        self._feed, self._most = feed, most
        self.batch_size, self.gpu, self.preprocess = feed.batch_size, feed.gpu, feed.preprocess
        self.sample_names = None
        self._divided = [value.name for value in inputs if value.shape[:1] == (None,)]
        self.held_out: list[Samples] = []
        self.shown: list[Samples] = []
        self._held = self.passed = 0

    def __len__(self) -> int:
        """Return the number of batches in a pass of the other feed."""
        return len(self._feed)

    def __iter__(self) -> Iterator[Batch]:
        self.held_out, self.shown, self._held, self.passed = [], [], 0, 0
        count = length(self._feed)
        wanted, shown = self._wanted(count), 0
        for number, batch in enumerate(self._feed):
            size = self._feed.samples_of(batch)
            left = wanted - self._held
            if self._is_divided(batch, size):
                taken = min(self._of_batch(number, wanted, count), left, size - 1)
                if shown < max(wanted, _TOGETHER):
                    first = min(max(taken, 1), size - taken)
                    self._keep(self.shown, self._part(batch, slice(0, first)))
                    shown += first
                if taken:
                    self._keep(self.held_out, self._part(batch, slice(size - taken, size)))
                    self._held += taken
                    batch, size = self._part(batch, slice(0, size - taken)), size - taken
            elif left >= size and number % round(1 / _SHARE) == 1:
                self.held_out.append(_copied(batch))
                self._held += size
                continue
            elif shown < max(wanted, 1):
                self.shown.append(_copied(batch))
                shown += size
            self.passed += size
            yield batch

    @property
    def samples(self) -> int | None:  # type: ignore[override]
        """The number of samples that are not held out, if the other feed knows its own number."""
        return None if self._feed.samples is None else self._feed.samples - self._held

    @property
    def skipped(self) -> list[str]:
        """The samples of the other feed that were unreadable."""
        return self._feed.skipped

    def samples_of(self, batch: Batch) -> int:
        """Return the number of samples in `batch`."""
        return self._feed.samples_of(batch)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the other feed's first batch."""
        return self._feed.shapes()

    def describe(self) -> dict[str, Any]:
        """Return the origin of the batches, and the number of samples to hold out if there is one."""
        described = self._feed.describe()
        return described | {"held_out": self._most} if described and self._most else described

    def close(self) -> None:
        """Release what the other feed holds."""
        self._feed.close()

    def _wanted(self, count: int | None) -> int:
        """Return the number of samples to hold out, for a pass of `count` batches."""
        samples = self._feed.samples
        if samples is None and count is not None:
            samples = count * self.batch_size
        wanted = self._most if samples is None else min(self._most, int(_SHARE * samples))
        return wanted if wanted >= _FEWEST else 0

    def _of_batch(self, number: int, wanted: int, count: int | None) -> int:
        """Return the number of samples to hold out of a batch: as many of each batch, but none of the last."""
        if count is None:
            return max(1, int(_SHARE * self.batch_size))
        batches = max(count - 1, 1)
        return (number + 1) * wanted // batches - number * wanted // batches

    def _is_divided(self, batch: Batch, size: int) -> bool:
        """Return True if a batch can be divided: the network and the batch agree on which arrays count samples."""
        return bool(self._divided) and all(batch[name].shape[:1] == (size,) for name in self._divided if name in batch)

    def _part(self, batch: Batch, part: slice) -> dict[str, Any]:
        return {name: array[part] if name in self._divided else array for name, array in batch.items()}

    def _keep(self, batches: list[Samples], batch: Batch) -> None:
        """Add the samples of a batch to batches of at most 8, those of one form together."""
        for part in self._parts(_copied(batch)):
            last = batches[-1] if batches else None
            if last is None or not self._fit(last, part):
                batches.append(part)
                continue
            joined = {name: np.concatenate([last[name], part[name]]) for name in self._divided if name in part}
            batches[-1] = last | joined

    def _parts(self, samples: Samples) -> Iterator[Samples]:
        """Yield the samples one by one."""
        size = max(len(samples[name]) for name in self._divided if name in samples)
        for index in range(size):
            yield self._part(samples, slice(index, index + 1))

    def _fit(self, last: Samples, new: Samples) -> bool:
        """Return True if the arrays of both make one batch."""
        names = [name for name in self._divided if name in new]
        return all(last[name].shape[1:] == new[name].shape[1:] and len(last[name]) < _TOGETHER for name in names)


def _copied(batch: Batch) -> Samples:
    return {name: np.array(to_host(array)) for name, array in batch.items()}
