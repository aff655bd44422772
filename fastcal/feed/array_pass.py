"""A pass over batches that the caller has or makes."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastcal.device import add_array, kept_type
from fastcal.errors import DataError
from fastcal.feed.array_plan import ArrayPlan
from fastcal.feed.buffers import Allocator, Buffer
from fastcal.feed.plan import FirstBatch, Pass, Passes

_log = logging.getLogger("fastcal")


class ArrayPass(Pass):
    """One pass over the caller's batches: by input, the arrays that make one if put one after another."""

    def __init__(self, batches: Iterator[Mapping[str, Sequence[Any]]]) -> None:
        self._batches = batches

    def fill(self, index: int, buffer: Buffer, ended: Callable[[], bool]) -> bool:
        """Fill a buffer with the next batch."""
        with buffer.filling():  # on a GPU, the caller's code too finds it current
            batch = next(self._batches, None)
            for name, parts in (batch or {}).items():
                _put(buffer, name, parts)
        return batch is not None


class ArrayPasses(Passes):
    """The state that passes over the caller's batches share."""

    def __init__(self, plan: ArrayPlan) -> None:
        self.first: FirstBatch | None = None
        self._count: int | None = None  # known when a pass is complete
        self._kept: Buffer | None = None  # a copy of the first batch, which completes the last one
        self._plan = plan
        self._has_begun = False

    def begin(self, allocator: Allocator) -> ArrayPass:
        """Begin a pass; raise DataError if the batches can be gone through only once, and were."""
        if self._has_begun and isinstance(self._plan.batches, Iterator):
            raise DataError(
                f"a {type(self._plan.batches).__name__} can be gone through only once; give a list, or the function "
                "that makes it"
            )
        self._has_begun = True
        allocator.synchronize()  # the caller's arrays on the GPU are complete
        return ArrayPass(self._whole_batches(allocator))

    def length(self) -> int | None:
        """Return the number of batches in a pass; None if it is not known yet."""
        return self._plan.hint() if self._count is None else self._count

    def describe(self) -> dict[str, Any]:
        """Return a digest of the first batch, and the number of batches if it is known before a pass."""
        known = {"last_batch": self._plan.last_batch, "first_batch": "" if self.first is None else self.first.digest}
        hint = self._plan.hint()
        return known if hint is None else {"batches": hint, **known}

    def close(self) -> None:
        """Release the copy of the first batch."""
        self._kept = None

    def _whole_batches(self, allocator: Allocator) -> Iterator[dict[str, list[Any]]]:
        """Yield the batches: by input, the arrays that make one if put one after another."""
        count = 0
        first: FirstBatch | None = None
        uneven: tuple[int, int] | None = None  # number and samples of a batch that must be smaller, and the last
        for number, batch in enumerate(self._plan.source()):
            arrays = self._plan.arrays(number, batch)
            samples = _count_samples(number, arrays)
            first = first or self._see_first(arrays, samples, allocator)
            _check_types(number, arrays, first)
            parts, size = {name: [array] for name, array in arrays.items()}, first.batch_size
            is_whole = self._plan.last_batch == "keep" or samples == size
            if uneven is None and not is_whole:
                uneven = number, samples
            if uneven is not None and (uneven[0] < number or samples > size):
                raise DataError(
                    f"batch {uneven[0]} has {uneven[1]} samples, batch 0 has {size}; only the last may have fewer"
                )
            if not is_whole:
                if self._plan.last_batch == "drop":
                    _log.info("the last %d samples make no batch of %d and are dropped", samples, size)
                    continue
                assert self._kept is not None
                _log.info("the last batch has %d samples of %d: it is completed with the first", samples, size)
                parts = _complete(number, arrays, size - samples, self._kept.arrays)
            if number or not self._plan.is_first_extra:
                count += 1
                yield parts
        if not count:
            raise DataError("there are no batches; give at least one")
        self._count = count

    def _see_first(self, arrays: Mapping[str, Any], samples: int, allocator: Allocator) -> FirstBatch:
        """Keep a copy of the first batch, if the last one may need it, and its form."""
        if self._plan.last_batch == "wrap":
            if self._kept is None:
                (self._kept,) = allocator.allocate(1)
            with self._kept.filling():
                for name, array in arrays.items():
                    _put(self._kept, name, [array])
        if self.first is None:  # else an earlier pass has seen it
            digest = hashlib.sha256()
            for name, array in sorted(arrays.items()):
                add_array(digest, name, array)
            self.first = FirstBatch(
                batch_size=samples,
                shapes={name: tuple(array.shape) for name, array in arrays.items()},
                types={name: kept_type(array.dtype) for name, array in arrays.items()},
                digest=digest.hexdigest(),
            )
        return self.first


def _complete(number: int, arrays: Mapping[str, Any], missing: int, kept: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the arrays of an incomplete batch, each with the `missing` first samples of the first batch."""
    parts = {}
    for name, array in arrays.items():
        first = kept[name]
        if first.shape[1:] != array.shape[1:]:
            raise DataError(
                f"batch {number} has {name!r} of shape {array.shape}, which samples of batch 0, of shape "
                f"{first.shape}, cannot complete; drop or keep the last batch"
            )
        parts[name] = [array, first[:missing]] if array.shape else [array]
    return parts


def _check_types(number: int, arrays: Mapping[str, Any], first: FirstBatch) -> None:
    """Raise DataError unless a batch has the inputs and types of the first batch."""
    if arrays.keys() != first.types.keys():
        raise DataError(f"batch {number} has the inputs {sorted(arrays)}, batch 0 has {sorted(first.types)}")
    for name, array in arrays.items():
        if kept_type(array.dtype) != first.types[name]:
            raise DataError(
                f"batch {number} has {name!r} of {array.dtype}, batch 0 of {first.types[name]}; all need one type"
            )


def _put(buffer: Buffer, name: str, parts: Sequence[Any]) -> None:
    """Copy arrays into a buffer, one after another along their first dimension."""
    shape = parts[0].shape
    if len(parts) > 1:
        shape = (sum(len(part) for part in parts), *shape[1:])
    buffer.reserve(name, shape, kept_type(parts[0].dtype))
    begin = 0
    for part in parts:
        end = begin + len(part) if part.shape else None
        buffer.put(name, slice(begin, end) if part.shape else ..., part)
        begin = end or 0


def _count_samples(number: int, arrays: Mapping[str, Any]) -> int:
    sizes = {array.shape[0] for array in arrays.values() if array.shape}
    if len(sizes) != 1:
        raise DataError(
            f"the arrays of batch {number} have first dimensions {sorted(sizes)}; one size is needed, the number of "
            "samples: repeat what is the same for all, or derive a class from fastcal.Feed, which may give any arrays"
        )
    (samples,) = sizes
    if not samples:
        raise DataError(f"batch {number} has no samples; leave it out")
    return int(samples)
