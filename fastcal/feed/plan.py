"""The plan of a feed, and the passes over it.

A `Plan` is a frozen value that says which batches there are; it can be pickled. A `Pass` goes through it once. `Passes`
has the state that outlives a pass: a pipeline that can be used again, unreadable samples, the shapes of a first batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcal.errors import MOST_THREADS, FastcalError, check_range
from fastcal.feed.buffers import Allocator, Buffer, Shape
from fastcal.feed.preprocess import Preprocess

#: The default batch size, if the model has none either.
BATCH_SIZE = 32


class Plan(ABC):
    """The batches of a feed. For attributes not described here, see `Feed`."""

    gpu: int | None
    depth: int  # the number of buffers
    batch_size: int | None  # None: a first batch must tell
    preprocess: Preprocess | Mapping[str, Preprocess] | None
    constants: Mapping[str, Any] | None  # the same in all batches, by input
    filled: Mapping[str, Shape] | None  # the other arrays of a batch, by input; None: a first batch must tell
    samples: int | None
    sample_names: Sequence[str] | None

    @abstractmethod
    def part(self, batches: range, *, gpu: int | None, threads: int) -> "Plan":
        """Return the plan of some of the batches: see `Feed.part`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the origin of the batches: see `Feed.describe`. An empty dict if a first batch must tell."""


class Pass(ABC):
    """One pass over a plan, in a thread of its own."""

    count: int | None = None  # of batches; None: the end must tell

    def prepare(self, index: int) -> None:  # noqa: B027 - most have nothing to prepare
        """Begin the work on batch `index` as far as it needs no buffer."""

    @abstractmethod
    def fill(self, index: int, buffer: Buffer, ended: Callable[[], bool]) -> bool:
        """Fill a buffer with batch `index`, the next in each call: see `fastcal.feed.prefetch.Fill`."""


@dataclass(frozen=True)
class FirstBatch:
    """The form of the first batch; `digest` is one of names, types, shapes and values."""

    batch_size: int
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, Any]
    digest: str


class Passes(ABC):
    """The state that the passes over a plan share."""

    first: FirstBatch | None = None  # None before a pass has found it, or if the plan tells everything
    unreadable: Collection[int] = ()

    @abstractmethod
    def begin(self, allocator: Allocator) -> Pass:
        """Begin a pass; the one before has ended."""

    @abstractmethod
    def length(self) -> int | None:
        """Return the number of batches in a pass; None if it is not known yet."""

    def describe(self) -> dict[str, Any]:
        """Return the origin of the batches, if the first batch is known and the plan alone cannot tell."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Release everything that only a pass needs."""


def check_settings(last_batch: str, known: Sequence[str], **numbers: int | None) -> None:
    """Raise FastcalError if `last_batch` is not among the known values, or a numeric setting is out of range."""
    if last_batch not in known:
        choices = f"{', '.join(known[:-1])} or {known[-1]}"
        raise FastcalError(f"there is no last_batch {last_batch!r}; choose {choices}")
    for name, value in numbers.items():
        check_range(name, value, 2 if name == "depth" else 1, MOST_THREADS if name == "threads" else None)
