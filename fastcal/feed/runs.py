"""Which samples a pass goes through, and in which parts they are prepared."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fastcal.errors import FastcalError

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class RunSize:
    """How large a run may be.

    Attributes:
        most: The largest number of samples.
        few: So many samples may join whatever their size.
        most_bytes: More than these few have so many bytes at most.
        size_of: A sample's bytes.
    """

    most: int
    few: int
    most_bytes: int
    size_of: Callable[[int], int]


@dataclass(frozen=True)
class Run:
    """Samples that are prepared at once.

    Attributes:
        numbers: The samples.
        at: Where in the endless row of all samples the run began: the n-th sample follows the last one's as n + count.
        filled: How many samples of its batch came before it.
        arrays: What its samples have besides images, by input.
    """

    numbers: list[int]
    at: int
    filled: int
    arrays: dict[str, Any] = field(default_factory=dict)


class Pass:
    """One pass over the samples, leaving out the unreadable ones as they become known.

    Args:
        count: How many samples there are.
        batch_size: Samples in a batch.
        wrap: Whether the last batch is completed with the first samples, or else left out.
        unreadable: The samples that are left out; it may grow, and `go_back` takes that into account.
        size: How large a run may be, where it may not be as large as a batch.
    """

    def __init__(
        self, count: int, batch_size: int, wrap: bool, unreadable: Collection[int], size: RunSize | None
    ) -> None:
        self._count = count
        self._batch_size = batch_size
        self._wrap = wrap
        self._unreadable = unreadable
        self._size = size
        self._at = 0
        self._filled = 0

    def next_run(self) -> Run | None:
        """The next samples, none of them in two batches; None at the end of the pass."""
        if self._filled == 0 and not self._has_another_batch():
            return None
        run, encoded = Run([], self._at, self._filled), 0
        while self._filled < self._batch_size and (self._wrap or self._at < self._count):
            number = self._at % self._count
            if number not in self._unreadable:
                if self._size is not None:
                    encoded += self._size.size_of(number)
                    large = len(run.numbers) >= self._size.few and encoded > self._size.most_bytes
                    if large or len(run.numbers) == self._size.most:
                        return run
                run.numbers.append(number)
                self._filled += 1
            self._at += 1
        self._filled %= self._batch_size
        return run if run.numbers else None

    def go_back(self, run: Run) -> None:
        """Begin again with the samples of a run."""
        self._at, self._filled = run.at, run.filled

    def _has_another_batch(self) -> bool:
        needed = 1 if self._wrap else self._batch_size
        left = self._count - self._at
        if left - len(self._unreadable) >= needed:
            return True
        return left - sum(number >= self._at for number in self._unreadable) >= needed


def count_batches(count: int, batch_size: int, wrap: bool) -> int:
    """How many batches so many samples make."""
    return (count + batch_size - 1 if wrap else count) // batch_size


def say_how_it_ends(count: int, batch_size: int, last_batch: str, what: str) -> None:
    """Log what becomes of samples, called `what`, that make no whole batch: see `last_batch` of `fastcal.ArrayFeed`.

    Raises:
        FastcalError: They are all there are, and are dropped.
    """
    over = count % batch_size
    if over and last_batch == "wrap":
        lacking = batch_size - over
        how = f"the last is completed with the first {lacking}" if lacking <= count else "repeated to complete one"
        _log.info("%d %s in batches of %d: %s", count, what, batch_size, how)
    elif over and last_batch == "drop":
        _log.info("%d %s in batches of %d: the last %d are dropped", count, what, batch_size, over)
        if over == count:
            raise FastcalError(
                f"{count} {what} make no batch of {batch_size} when the last one is dropped; use a smaller batch size, "
                "or wrap"
            )
