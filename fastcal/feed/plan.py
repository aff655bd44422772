"""The plan of a feed, the passes over it, and the feed, which has them fill a ring of buffers ahead of the consumer.

A `Plan` is a frozen value that says which batches there are; it can be pickled. A `Pass` goes through it once. `Passes`
has the state that outlives a pass: a pipeline that can be used again, unreadable samples, the shapes of a first batch.
"""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcal.errors import MOST_THREADS, FastcalError, check_range
from fastcal.feed.buffers import Allocator, Batches, Buffer, Shape
from fastcal.feed.feed import Batch, Feed
from fastcal.feed.prefetch import Prefetcher
from fastcal.feed.preprocess import Preprocess

#: The default batch size if the model has none either: on a GPU, smaller ones leave it idle between kernels.
_BATCH_SIZE, _BATCH_SIZE_ON_GPU = 32, 128


class Plan(ABC):
    """The batches of a feed. For attributes not described here, see `Feed`."""

    gpu: int | None
    depth: int  # the number of buffers
    batch_size: int | None  # None: a first batch must tell
    preprocess: Preprocess | Mapping[str, Preprocess] | None
    constants: Mapping[str, Any] | None  # the same in all batches, by input
    repeated: frozenset[str]  # the constants that every sample of a batch has one of
    filled: Mapping[str, Shape] | None  # the other arrays of a batch, by input; None: a first batch must tell
    samples: int | None
    sample_names: Sequence[str] | None
    counting: frozenset[str] | None = None  # the inputs whose first dimension counts samples; None: of all alike

    @property
    def may_end_smaller(self) -> bool:
        """True if the last batch may be smaller than the others."""
        return False

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

    def take_over(self, earlier: "Passes") -> None:  # noqa: B027 - most have nothing to take over
        """Use what the passes over another part of the same feed have left."""

    @abstractmethod
    def close(self) -> None:
        """Release everything that only a pass needs."""


class PlannedFeed(Feed):
    """A feed that goes through a plan, with the passes that `make_passes` makes of it; pickled as its plan alone."""

    def __init__(self, plan: Plan, make_passes: Callable[[Any], Passes]) -> None:
        self._plan = plan
        self.gpu = plan.gpu
        self.preprocess = plan.preprocess
        self._make_passes = make_passes
        self._passes = make_passes(plan)
        self._lock = threading.RLock()  # passes begin and end one at a time
        self._allocator = Allocator(plan.gpu)
        self._buffers: list[Buffer] = []
        self._peeked: Batches | None = None  # a pass that the next iteration goes on with
        self._running: weakref.ref[Batches] | None = None  # the last pass begun, while somebody has it
        self._end_pass: Callable[[], None] | None = None

    def __getstate__(self) -> tuple[Plan, Callable[[Any], Passes]]:
        return self._plan, self._make_passes

    def __setstate__(self, state: tuple[Plan, Callable[[Any], Passes]]) -> None:
        PlannedFeed.__init__(self, *state)  # a class's own constructor takes something else

    def __len__(self) -> int:
        """Return the number of batches in a pass; raise TypeError if it is not known yet."""
        length = self._passes.length()
        if length is None:
            raise TypeError("how many batches there are is not known before a pass has come to its end")
        return length

    def __iter__(self) -> Iterator[Batch]:
        with self._lock:
            peeked, self._peeked = self._peeked, None
            return self._begin() if peeked is None else peeked

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The number of samples in a batch, or in the first one; a pass is begun if that is necessary."""
        return self._plan.batch_size or self._peek().batch_size

    @property
    def samples(self) -> int | None:  # type: ignore[override]
        """The number of samples in a pass, without unreadable ones; None if it is not known."""
        return None if self._plan.samples is None else self._plan.samples - len(self._passes.unreadable)

    @property
    def sample_names(self) -> Sequence[str] | None:  # type: ignore[override]
        """The names of the samples in order, without unreadable ones; None if they have none."""
        names, unreadable = self._plan.sample_names, self._passes.unreadable
        return None if names is None else [name for number, name in enumerate(names) if number not in unreadable]

    @property
    def skipped(self) -> list[str]:
        """The names of the samples that passes have found unreadable and left out, in order."""
        return [(self._plan.sample_names or [])[number] for number in sorted(self._passes.unreadable)]

    def samples_of(self, batch: Batch) -> int:
        """Return the number of samples in `batch`."""
        names = self._plan.counting or self._plan.filled or batch
        return super().samples_of({name: array for name, array in batch.items() if name in names})

    @property
    def may_end_smaller(self) -> bool:
        """True if the last batch may be smaller than the others."""
        return self._plan.may_end_smaller

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array of the first batch, by input name; a pass is begun if that is necessary."""
        if self._plan.filled is None:
            return dict(self._peek().shapes)
        filled = {name: shape for name, (shape, _) in self._plan.filled.items()}
        return filled | {name: values.shape for name, values in (self._plan.constants or {}).items()}

    def part(self, batches: range, *, gpu: int | None, threads: int) -> Feed:
        """Return a feed of `batches`: see `Feed.part` for `gpu` and `threads`. Arrays stay in host memory."""
        return PlannedFeed(self._plan.part(batches, gpu=gpu, threads=threads), self._make_passes)

    def take_over(self, earlier: Feed) -> None:
        """Use the pipeline and the buffers of an earlier part of the same feed.

        Args:
            earlier: The part, whose pass has ended.
        """
        if isinstance(earlier, PlannedFeed):
            self._allocator, self._buffers = earlier._allocator, earlier._buffers
            self._passes.take_over(earlier._passes)

    def describe(self) -> dict[str, Any]:
        """Return the origin of the batches: see `Feed.describe`."""
        described = self._plan.describe()
        if not described:
            self._peek()
            described = self._passes.describe()
        return described

    def close(self) -> None:
        """End a pass that is under way, and release buffers and pipelines; a new iteration takes them again."""
        with self._lock:
            self._end()
            self._peeked = self._running = None
            self._buffers = []
            self._passes.close()

    def _begin(self) -> Batches:
        self._end()
        started = self._passes.begin(self._allocator)
        if not self._buffers:
            self._buffers = self._allocator.allocate(
                self._plan.depth, self._plan.filled, self._plan.constants, self._plan.repeated
            )
        # Neither the thread nor the iterator refers to this feed: it can be deleted during a pass.
        batches = Batches(Prefetcher(self._buffers, started.fill, started.count, started.prepare))
        self._end_pass = batches.close
        self._running = weakref.ref(batches)
        return batches

    def _end(self) -> None:
        if self._end_pass is not None:
            self._end_pass()
            self._end_pass = None  # it refers to the buffers

    def _peek(self) -> FirstBatch:
        """Return the first batch of the pass under way, or else of a pass that the next iteration goes on with."""
        with self._lock:
            if self._passes.first is None:
                running = None if self._running is None else self._running()
                if running is None:
                    running = self._peeked = self._begin()
                try:
                    running.peek()
                except BaseException:
                    self._peeked = None  # it has ended with this error
                    raise
            assert self._passes.first is not None
            return self._passes.first


def default_batch_size(gpu: int | None) -> int:
    """Return the batch size of a feed whose model leaves it open, for batches on this GPU; None: in host memory."""
    return _BATCH_SIZE if gpu is None else _BATCH_SIZE_ON_GPU


def check_settings(last_batch: str | None, known: Sequence[str], **numbers: int | None) -> None:
    """Raise FastcalError if `last_batch` is given and not known, or a numeric setting is out of range."""
    if last_batch is not None and last_batch not in known:
        choices = f"{', '.join(known[:-1])} or {known[-1]}"
        raise FastcalError(f"there is no last_batch {last_batch!r}; choose {choices}")
    for name, value in numbers.items():
        check_range(name, value, 2 if name == "depth" else 1, MOST_THREADS if name == "threads" else None)
