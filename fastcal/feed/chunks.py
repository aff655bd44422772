"""The order of the samples in a pass, in chunks that are prepared at once."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fastcal.errors import DataError, counted

#: The fates of a last batch of fewer samples.
LAST_BATCHES = ("wrap", "drop", "keep")

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class ChunkSize:
    """The largest size of a chunk: `most` samples, and of more than `few` samples `most_bytes` bytes."""

    most: int
    few: int
    most_bytes: int
    size_of: Callable[[int], int]


@dataclass(frozen=True)
class Chunk:
    """Samples that are prepared at once, all for one batch.

    Attributes:
        at: The place of the chunk's beginning in the endless row of all samples: after the last sample comes the first.
        filled: The number of samples that come before in the batch.
        arrays: The samples' arrays for inputs that take no images.
    """

    numbers: list[int]
    at: int
    filled: int
    arrays: dict[str, Any] = field(default_factory=dict)


class Order:
    """The chunks of one pass in order, without the samples that become known as unreadable.

    Args:
        last_batch: The fate of a last batch of fewer samples: see `fastcal.ImageFeed`.
        unreadable: The samples to leave out. It may grow; `go_back` takes that into account.
        size: The largest size of a chunk; None for chunks as large as a batch.
    """

    def __init__(
        self, count: int, batch_size: int, last_batch: str, unreadable: Collection[int], size: ChunkSize | None
    ) -> None:
        self._count = count
        self._batch_size = batch_size
        self._wrap = last_batch == "wrap"
        self._needed = batch_size if last_batch == "drop" else 1  # samples of a last batch
        self._unreadable = unreadable
        self._size = size
        self._at = 0
        self._filled = 0

    def next_chunk(self) -> Chunk | None:
        """Return the next samples; None at the end of the pass."""
        if self._filled == 0 and not self._has_another_batch():
            return None
        chunk, encoded = Chunk([], self._at, self._filled), 0
        while self._filled < self._batch_size and (self._wrap or self._at < self._count):
            number = self._at % self._count
            if number not in self._unreadable:
                if self._size is not None:
                    encoded += self._size.size_of(number)
                    is_large = len(chunk.numbers) >= self._size.few and encoded > self._size.most_bytes
                    if is_large or len(chunk.numbers) == self._size.most:
                        return chunk
                chunk.numbers.append(number)
                self._filled += 1
            self._at += 1
        self._filled %= self._batch_size
        return chunk if chunk.numbers else None

    def go_back(self, chunk: Chunk) -> None:
        """Begin again with the samples of a chunk."""
        self._at, self._filled = chunk.at, chunk.filled

    def _has_another_batch(self) -> bool:
        left = self._count - self._at
        if left - len(self._unreadable) >= self._needed:
            return True
        return left - sum(number >= self._at for number in self._unreadable) >= self._needed


def count_batches(count: int, batch_size: int, last_batch: str) -> int:
    """Return the number of batches that `count` samples make."""
    return (count if last_batch == "drop" else count + batch_size - 1) // batch_size


def log_last_batch(count: int, batch_size: int, last_batch: str, what: str) -> None:
    """Log the fate of a last batch of fewer samples; raise DataError if the only batch would be dropped.

    `what` is the noun for the samples, in the singular.
    """
    over = count % batch_size
    if over and last_batch == "wrap":
        lacking = batch_size - over
        how = f"the last is completed with the first {lacking}" if lacking <= count else "repeated to complete one"
        _log.info("%s in batches of %d: %s", counted(count, what), batch_size, how)
    elif over and last_batch == "drop":
        _log.info("%s in batches of %d: the last %d are dropped", counted(count, what), batch_size, over)
        if over == count:
            raise DataError(
                f"{counted(count, what)}: no batch of {batch_size} is left when the last one is dropped; use a smaller "
                "batch size, or wrap"
            )
