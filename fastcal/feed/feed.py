"""`Feed`: the base of every feed, and all that consumers of batches rely on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastcal.errors import DataError
from fastcal.feed.preprocess import Preprocess

#: Arrays by input name. The first dimension of each counts samples.
Batch = Mapping[str, Any]


class Feed(ABC):
    """Batches by input name. Every iteration is a fresh pass over the same batches.

    A batch is valid until the next one is asked for; copy it to keep it. For CuPy arrays, enqueuing the read on CuPy's
    current stream before that is enough. A feed is a context manager that releases everything it holds.

    Attributes:
        batch_size: The number of samples in a batch.
        gpu: The number of the GPU that the batches lie on; None for host memory.
        samples: The number of samples in a pass, without unreadable ones; None if it is not known.
        sample_names: The names of these samples in order, the paths of image files for instance; None if they have
            none.
        preprocess: The preprocessing of images; a dict by input name for several inputs that take images; None if it is
            not known.
    """

    batch_size: int
    gpu: int | None = None
    samples: int | None = None
    sample_names: Sequence[str] | None = None
    preprocess: Preprocess | Mapping[str, Preprocess] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in a pass; raise TypeError if it is not known yet."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Begin a pass. An earlier pass that is not complete is cut off: its iterator raises FastcalError."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array of the first batch, by input name; a pass is begun if that is necessary."""
        return {name: tuple(array.shape) for name, array in next(iter(self), {}).items()}

    @property
    def may_end_smaller(self) -> bool:
        """True if the last batch may be smaller than the others, and the number of samples is known."""
        return False

    def samples_of(self, batch: Batch) -> int:
        """Return the number of samples in `batch`: by default the largest size of a first dimension."""
        return max((array.shape[0] for array in batch.values() if array.shape), default=0)

    @property
    def skipped(self) -> list[str]:
        """The names of the samples that passes have found unreadable and left out."""
        return []

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "Feed":
        """Return a feed of some of the batches, identical to the last bit, to be pickled and used on another machine.

        Args:
            batches: The numbers of the batches in a pass of this feed.
            gpu: The number of the GPU to work on there; None for the CPU.
            threads: The number of threads that the part may use, unless this feed was given a number.

        Raises:
            DataError: The feed cannot be divided.
        """
        raise DataError(f"a {type(self).__name__} cannot be divided among workers; leave workers out")

    def take_over(self, earlier: "Feed") -> None:  # noqa: B027 - a feed may have nothing to take over
        """Use what an earlier part of the same feed holds: its pipeline, for instance.

        Args:
            earlier: The part, whose pass has ended.
        """

    def describe(self) -> dict[str, Any]:
        """Return the origin of the batches as JSON values: equal for two feeds only if their batches are equal.

        Passes do not change it. An empty dict means that the origin is not known, and is equal to any other.
        """
        return {}

    def close(self) -> None:  # noqa: B027 - a feed may hold nothing
        """Release everything that the feed holds; a new iteration takes it again."""

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def length(feed: Feed) -> int | None:
    """Return the number of batches in a pass; None if the feed does not know it yet."""
    try:
        return len(feed)
    except TypeError:
        return None
