"""What every feed is, and the feed of arrays that the caller has."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any

import numpy as np

from fastcal.errors import FastcalError
from fastcal.feed.device import to_host

#: Arrays by input name. The first dimension of each counts samples.
Batch = Mapping[str, Any]


class Feed(ABC):
    """Batches by input name: iterate over it, and every iteration is a fresh pass over the same batches.

    A batch is valid until the next one is asked for; copy what is to be kept. A context manager that releases what the
    feed holds.

    Attributes:
        batch_size: Samples in a batch.
        anonymous: Whether its batches hold one array that was given no name and goes to whatever single input a
            network has.
        gpu: The number of the GPU that the batches lie on; None for host memory.
    """

    batch_size: int
    anonymous: bool = False
    gpu: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in a pass."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Start a pass; an earlier one that has not reached its end is over."""

    @property
    def skipped(self) -> list[str]:
        """Names of the samples that passes have found unreadable and left out."""
        return []

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


class ArrayFeed(Feed):
    """Batches that the caller has, as they are.

    Args:
        batches: Dicts of arrays by input name. All have the same names and the same first dimension. float64 arrays
            become float32; other types stay.

    Raises:
        FastcalError: There are no batches, they can be gone through only once (a generator), or names or first
            dimensions differ.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if not isinstance(batches, Sized) or isinstance(batches, Mapping):
            raise FastcalError(f"ArrayFeed takes a list of dicts, not a {type(batches).__name__}; pass list(...) of it")
        self._batches = [{name: as_array(values) for name, values in batch.items()} for batch in batches]
        if not self._batches:
            raise FastcalError("ArrayFeed got no batches; give it at least one")
        first = self._batches[0]
        sizes = {array.shape[0] for array in first.values() if array.shape}
        if len(sizes) != 1:
            raise FastcalError(f"the arrays of batch 0 have first dimensions {sorted(sizes)}; one size is needed")
        self.batch_size = sizes.pop()
        for index, batch in enumerate(self._batches):
            if batch.keys() != first.keys():
                raise FastcalError(f"batch {index} has the inputs {sorted(batch)}, batch 0 has {sorted(first)}")
            for name, array in batch.items():
                if array.shape != first[name].shape:
                    raise FastcalError(
                        f"batch {index} has {name!r} of shape {array.shape}, batch 0 of shape {first[name].shape}; "
                        "all batches need one shape"
                    )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def describe(self) -> dict[str, Any]:
        """A digest of all names, types, shapes and values."""
        digest = hashlib.sha256()
        for batch in self._batches:
            for name, array in sorted(batch.items()):
                add_to_digest(digest, name, to_host(array))
        return {"batches": len(self), "batch_size": self.batch_size, "samples": digest.hexdigest()}


def add_to_digest(digest: Any, name: str, array: Any) -> None:
    """Add a NumPy array, its name, type and shape to a hash of `hashlib`."""
    digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def as_array(values: Any) -> Any:
    """The values as an array of the type that a batch has them in: float32 in place of float64."""
    array = values if hasattr(values, "__cuda_array_interface__") else np.asarray(values)
    return array.astype("float32") if array.dtype == np.float64 else array
