"""What every feed is."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from fastcal.errors import MOST_THREADS, FastcalError, check_range
from fastcal.feed.preprocess import Preprocess

#: The batch size where neither the caller nor the model says one.
BATCH_SIZE = 32

#: Arrays by input name. The first dimension of each counts samples.
Batch = Mapping[str, Any]


class Feed(ABC):
    """Batches by input name: iterate over it, and every iteration is a fresh pass over the same batches.

    A batch is valid until the next one is asked for; copy what is to be kept. Who reads arrays of CuPy's may only have
    enqueued its reading by then, on CuPy's current stream. A context manager that releases what the feed holds.

    Attributes:
        batch_size: Samples in a batch.
        gpu: The number of the GPU that the batches lie on; None for host memory.
        samples: The number of samples that a pass goes through, skipped ones left out; None if it is not known.
        sample_names: The names of these samples in order, the paths of image files for instance; None if they have
            none.
        preprocess: How images are prepared; a dict by input name for several inputs that take images; None for other
            data.
    """

    batch_size: int
    gpu: int | None = None
    samples: int | None = None
    sample_names: Sequence[str] | None = None
    preprocess: Preprocess | Mapping[str, Preprocess] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in a pass; TypeError where it is not known yet."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Start a pass. An earlier one that has not come to its end is cut off: its iterator raises FastcalError."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the first batch, by input name; where it must be seen first, a pass is begun."""
        return {name: tuple(array.shape) for name, array in next(iter(self), {}).items()}

    def samples_of(self, batch: Batch) -> int:
        """The number of samples in `batch`: the largest size of a first dimension, unless a feed knows better."""
        return max((array.shape[0] for array in batch.values() if array.shape), default=0)

    @property
    def skipped(self) -> list[str]:
        """The names of the samples that passes have found unreadable and left out."""
        return []

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "Feed":
        """A feed of some of the batches, the same to the last bit, that can be pickled and used on another machine.

        Args:
            batches: Their numbers in a pass of this feed.
            gpu: The number that the GPU to work on has there; None for the CPU.
            threads: How many threads the part may use, unless this feed was told how many.

        Raises:
            FastcalError: The feed cannot be divided.
        """
        raise FastcalError(f"a {type(self).__name__} cannot be divided among workers; leave workers out")

    def describe(self) -> dict[str, Any]:
        """What the batches are made from, as JSON has it: equal for two feeds only if their batches are.

        Passes change nothing in it. An empty dict, where that is not known, is equal to anything.
        """
        return {}

    def close(self) -> None:  # noqa: B027 - a feed may hold nothing
        """Release what the feed holds; a new iteration takes it again."""

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Turns:
    """A lock under which passes of a feed begin and end, one at a time; a copy of the feed has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Turns, ()


def check_settings(last_batch: str, known: Sequence[str], **numbers: int | None) -> None:
    """Check what a feed is told.

    Args:
        last_batch: What becomes of a last batch of fewer samples.
        known: What can become of it.
        **numbers: Other settings by name, where they are given; each is at least 1, `depth` at least 2, `threads` at
            most `MOST_THREADS`.

    Raises:
        FastcalError: A setting is out of its range.
    """
    if last_batch not in known:
        choices = f"{', '.join(known[:-1])} or {known[-1]}"
        raise FastcalError(f"there is no last_batch {last_batch!r}; choose {choices}")
    for name, value in numbers.items():
        check_range(name, value, 2 if name == "depth" else 1, MOST_THREADS if name == "threads" else None)


def length(feed: Feed) -> int | None:
    """The number of batches in a pass; None where the feed does not know it yet."""
    try:
        return len(feed)
    except TypeError:
        return None


def kept_type(dtype: Any) -> np.dtype[Any]:
    """The type in which a batch has arrays of a type: float64 as float32, the others in this machine's byte order."""
    kept: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    return np.dtype(np.float32) if kept == np.float64 else kept


def as_array(values: Any) -> Any:
    """The values as a NumPy array of the type in which a batch has them."""
    array = np.asarray(values)
    return array.astype(kept_type(array.dtype), copy=False)
