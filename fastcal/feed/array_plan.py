"""The plan of a feed of batches that the caller has or makes, and the passes over it."""

import hashlib
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fastcal.batch import UNNAMED
from fastcal.device import add_array, as_array, as_cupy, is_on_gpu, kept_type, to_host, with_interface
from fastcal.errors import DataError, FastcalError, counted, quoted
from fastcal.feed.buffers import Allocator, Buffer
from fastcal.feed.plan import FirstBatch, Pass, Passes, Plan

_log = logging.getLogger("fastcal")


@dataclass(frozen=True, eq=False)
class ArrayPlan(Plan):
    """Batches that the caller has or makes; `fastcal.ArrayFeed` describes their forms."""

    batches: Any
    names: Sequence[str] | Mapping[Any, str] | None
    last_batch: str
    gpu: int | None
    depth: int
    samples: int | None = None
    counting: frozenset[str] | None = None
    is_first_extra: bool = False  # the first batch only completes the last one, and is not handed out itself
    repeated: ClassVar[frozenset[str]] = frozenset()  # type: ignore[misc]
    batch_size = preprocess = constants = filled = sample_names = None  # a first batch must tell, or there are none

    @property
    def listed(self) -> Sequence[Any] | None:
        """The batches as they were given, if that is a list."""
        return self.batches if isinstance(self.batches, Sequence) else None

    def hint(self) -> int | None:
        """Return the number of batches, as the batches themselves give it; None if they do not."""
        length = operator.length_hint(self.batches, -1)
        return None if length < 0 or self.last_batch == "drop" else length - self.is_first_extra

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "ArrayPlan":
        """Return the plan of some batches of a list, copied to host memory."""
        if self.listed is None:
            raise DataError(
                "batches that are no list cannot be divided among workers; leave workers out, or give list(...) of them"
            )
        is_completed = self.last_batch == "wrap" and batches.stop == len(self.listed) > 1
        copied = []
        for number in [0] * is_completed + list(batches):
            arrays = self.arrays(number, self.listed[number])
            copied.append({name: np.array(as_array(to_host(array))) for name, array in arrays.items()})
        last_batch = "wrap" if self.last_batch == "wrap" and batches.stop == len(self.listed) else "keep"
        return replace(self, batches=copied, names=None, last_batch=last_batch, gpu=None, is_first_extra=is_completed)

    def describe(self) -> dict[str, Any]:
        """Return a digest of all batches of a list; an empty dict for anything else."""
        if self.listed is None:
            return {}
        digest = hashlib.sha256()
        for number, batch in enumerate(self.listed):
            for name, array in sorted(self.arrays(number, batch).items()):
                add_array(digest, name, array)
        return {"batches": len(self.listed), "last_batch": self.last_batch, "samples": digest.hexdigest()}

    def source(self) -> Any:
        """Return an iterable of the batches of one pass."""
        if not callable(self.batches) or hasattr(type(self.batches), "__iter__"):
            return self.batches
        made = self.batches()
        if not is_source(made):
            raise DataError(
                f"the function that makes batches returned a {type(made).__name__}; let it return a list, a loader "
                "or a DALI pipeline"
            )
        return iterable(made)

    def arrays(self, number: int, batch: Any) -> dict[str, Any]:
        """Return the arrays of batch `number`, NumPy's or CuPy's, by input name."""
        by_key = isinstance(batch, Mapping)
        if not by_key and not isinstance(batch, Sequence):
            batch = (batch,)
        if isinstance(self.names, Mapping):
            names = self.names
        elif by_key:
            names = {name: name for name in (batch if self.names is None else self.names)}
        else:
            names = dict(enumerate((UNNAMED,) if self.names is None else self.names))
        arrays = {}
        for key, name in names.items():
            try:
                values = batch[key]
            except (KeyError, IndexError, TypeError) as error:
                has = quoted(batch) if by_key else f"{len(batch)} arrays without names"
                raise DataError(
                    f"batch {number} has {has or 'no arrays'}, and none for input {name!r}; name the arrays after the "
                    "inputs, or say which is which with ArrayFeed(batches, names)"
                ) from error
            arrays[name] = self._array(f"batch {number}, input {name!r}", values)
        return arrays

    def _array(self, place: str, values: Any) -> Any:
        if isinstance(values, int | np.integer) and not isinstance(values, bool):
            raise DataError(
                f"{place} is the number {values}; if it is a device address, give an array over it (CuPy, PyTorch, "
                "Polygraphy's DeviceView), else numpy.array of it"
            )
        try:
            values = with_interface(values)
            array = as_cupy(values) if is_on_gpu(values) else _as_numpy(values)
        except FastcalError:
            raise
        except Exception as error:  # of NumPy's or CuPy's, or of the array's own library
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{place} is no array that can be read: {reason}") from error
        if not isinstance(array, np.ndarray) and self.gpu not in (None, array.device.id):
            raise DataError(
                f"{place} lies on GPU {array.device.id}, the feed's buffers on GPU {self.gpu}; use "
                f"ArrayFeed(batches, device='cuda:{array.device.id}')"
            )
        if array.dtype.kind not in "biuf":
            raise DataError(f"{place} holds {array.dtype}, {type(values).__name__}; arrays of numbers are needed")
        return array


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
            samples = _count_samples(number, arrays, self._plan.counting)
            first = first or self._see_first(arrays, samples, allocator)
            _check_types(number, arrays, first)
            parts, size = {name: [array] for name, array in arrays.items()}, first.batch_size
            is_whole = self._plan.last_batch == "keep" or samples == size
            if uneven is None and not is_whole:
                uneven = number, samples
            if uneven is not None and (uneven[0] < number or samples > size):
                raise DataError(
                    f"batch {uneven[0]} has {counted(uneven[1], 'sample')}, batch 0 has {size}; only the last may have "
                    "fewer"
                )
            if not is_whole:
                if self._plan.last_batch == "drop":
                    _log.info("the last %s make no batch of %d and are dropped", counted(samples, "sample"), size)
                    continue
                assert self._kept is not None
                _log.info(
                    "the last batch has %s of %d: it is completed with the first", counted(samples, "sample"), size
                )
                parts = _complete(number, arrays, samples, size, self._kept.arrays)
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


def _complete(
    number: int, arrays: Mapping[str, Any], samples: int, size: int, kept: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Return the arrays of a batch of fewer `samples` than `size`, each with the first samples of the first batch."""
    parts = {}
    for name, array in arrays.items():
        first = kept[name]
        if first.shape[1:] != array.shape[1:] or first.ndim != array.ndim:
            raise DataError(
                f"batch {number} has {name!r} of shape {array.shape}, which samples of batch 0, of shape "
                f"{first.shape}, cannot complete; drop or keep the last batch"
            )
        counts = array.shape[:1] == (samples,) and first.shape[:1] == (size,)
        parts[name] = [array, first[: size - samples]] if counts else [array]
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


def _count_samples(number: int, arrays: Mapping[str, Any], counting: frozenset[str] | None) -> int:
    """Return the number of samples in a batch; `counting` as in `ArrayPlan`."""
    sizes = {name: array.shape[0] for name, array in arrays.items() if array.shape}
    if len(set(sizes.values())) != 1 and counting is not None:
        sizes = {name: size for name, size in sizes.items() if name in counting} or {"": 1}
    if len(set(sizes.values())) != 1:
        raise DataError(
            f"the arrays of batch {number} have first dimensions {sorted(set(sizes.values()))}; one size is needed, "
            "the number of samples: repeat what is the same for all, or name the model that takes these sizes with "
            "ArrayFeed(batches, model=...)"
        )
    samples = next(iter(sizes.values()))
    if not samples:
        raise DataError(f"batch {number} has no samples; leave it out")
    return int(samples)


def is_source(batches: Any) -> bool:
    """Return whether an `ArrayPlan` can get batches from an object."""
    if isinstance(batches, str | bytes | Mapping):
        return False
    has_items = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    return has_items or callable(batches) or _is_pipeline(batches)


def iterable(batches: Any) -> Any:
    """Return the batches themselves, or the epochs of a DALI pipeline."""
    if not _is_pipeline(batches):
        return batches
    from fastcal.feed.epochs import Epochs  # which needs DALI

    return Epochs(batches)


def _is_pipeline(batches: Any) -> bool:
    """Return whether an object is a pipeline of DALI's, without importing DALI."""
    dali = sys.modules.get("nvidia.dali")
    return dali is not None and isinstance(batches, dali.Pipeline)


def _as_numpy(values: Any) -> Any:
    only_dlpack = hasattr(values, "__dlpack__") and not hasattr(values, "__array__")
    return np.from_dlpack(values) if only_dlpack else np.asarray(values)
