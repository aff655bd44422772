"""Goes through batches of the caller's, whatever form they have, and copies them into buffers."""

import hashlib
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastcal.batch import UNNAMED
from fastcal.device import as_cupy, is_on_gpu, to_host
from fastcal.errors import FastcalError, quoted
from fastcal.feed.buffers import Buffer, DeviceBuffer
from fastcal.feed.digest import add_array
from fastcal.feed.feed import kept_type
from fastcal.feed.prefetch import Fill

_log = logging.getLogger("fastcal")


def is_source(batches: Any) -> bool:
    """Whether `Reader` can get batches from it."""
    if isinstance(batches, str | bytes | Mapping):
        return False
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    return iterable or callable(batches) or _is_pipeline(batches)


class Reader:
    """Fills buffers with what the caller gives, pass after pass; `ArrayFeed` describes the arguments.

    The thread that fills refers to this object and not to the feed, which can so be deleted meanwhile.

    Attributes:
        batch_size: Samples in the first batch; 0 before it was seen.
        shapes: The shape of each array of the first batch, by input name.
        names: As it was given.
        last_batch: As it was given.
    """

    def __init__(
        self, batches: Any, names: Sequence[str] | Mapping[Any, str] | None, last_batch: str, gpu: int | None
    ) -> None:
        self.batch_size = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._batches = _iterable(batches)
        self.names = names
        self.last_batch = last_batch
        self._gpu = gpu
        self._stream: Any = None
        self._first: Buffer | None = None  # the first batch, for "wrap"
        self._types: dict[str, Any] = {}
        self._digest = ""
        self._count: int | None = None
        self._begun = False

    @property
    def listed(self) -> Sequence[Any] | None:
        """The batches as they were given, where that is a list."""
        return self._batches if isinstance(self._batches, Sequence) else None

    def length(self) -> int | None:
        """The number of batches in a pass; None where it is not known yet."""
        return self._hint() if self._count is None else self._count

    def describe_list(self) -> dict[str, Any]:
        """A digest of all batches of a list; nothing where they are no list."""
        if self.listed is None:
            return {}
        digest = hashlib.sha256()
        for number, batch in enumerate(self.listed):
            for name, array in sorted(self._arrays(number, batch).items()):
                add_array(digest, name, to_host(array))
        return {"batches": len(self.listed), "last_batch": self.last_batch, "samples": digest.hexdigest()}

    def describe_first(self) -> dict[str, Any]:
        """A digest of the first batch, and the number of batches where it was known before."""
        known = {"last_batch": self.last_batch, "first_batch": self._digest}
        hint = self._hint()
        return known if hint is None else {"batches": hint, **known}

    def make_buffers(self, count: int) -> list[Buffer]:
        """Buffers to fill."""
        return [self._make_buffer() for _ in range(count)]

    def release(self) -> None:
        """Release what is kept of the first batch."""
        self._first = None

    def begin(self) -> Fill[Buffer]:
        """Begin a pass: returns what fills the buffers, for a `Prefetcher`.

        Raises:
            FastcalError: The batches could be gone through only once, and were.
        """
        if self._begun and isinstance(self._batches, Iterator):
            raise FastcalError(
                f"a {type(self._batches).__name__} can be gone through only once; give a list, or the function that "
                "makes it"
            )
        self._begun = True
        if self._gpu is not None:
            import cupy

            cupy.cuda.Device(self._gpu).synchronize()  # arrays that are there already are complete
        batches = self._complete_batches()

        def fill(index: int, buffer: Buffer, ended: Callable[[], bool]) -> bool:
            with buffer.filling():  # on a GPU, the caller's code too finds it current
                batch = next(batches, None)
                for name, parts in (batch or {}).items():
                    _put(buffer, name, parts)
            return batch is not None

        return fill

    def _hint(self) -> int | None:
        """What the batches themselves say of their number."""
        length = operator.length_hint(self._batches, -1)
        return None if length < 0 or self.last_batch == "drop" else length

    def _make_buffer(self) -> Buffer:
        if self._gpu is None:
            return Buffer({}, {})
        import cupy

        device = cupy.cuda.Device(self._gpu)
        with device:
            self._stream = self._stream or cupy.cuda.Stream(non_blocking=True)
        return DeviceBuffer({}, {}, device, self._stream)

    def _complete_batches(self) -> Iterator[dict[str, list[Any]]]:
        """The batches of a pass: by input name, arrays that make one if put one after another."""
        source = self._make_source() if _is_function(self._batches) else self._batches
        count = 0
        incomplete: tuple[int, int] | None = None  # a batch of fewer samples, which must be the last
        for number, batch in enumerate(source):
            arrays = self._arrays(number, batch)
            samples = _samples(number, arrays)
            if number == 0:
                self._see_first(arrays, samples)
            self._check_types(number, arrays)
            parts = {name: [array] for name, array in arrays.items()}
            if self.last_batch != "keep" and samples != self.batch_size:
                if incomplete is not None or samples > self.batch_size:
                    raise self._uneven(*(incomplete or (number, samples)))
                incomplete = number, samples
                if self.last_batch == "drop":
                    _log.info("the last %d samples make no batch of %d and are dropped", samples, self.batch_size)
                    continue
                parts = self._wrap(number, samples, arrays)
            elif incomplete is not None:
                raise self._uneven(*incomplete)
            count += 1
            yield parts
        if not count:
            raise FastcalError("there are no batches; give at least one")
        self._count = count

    def _make_source(self) -> Any:
        source = self._batches()
        if not is_source(source):
            raise FastcalError(
                f"the function that makes batches returned a {type(source).__name__}; let it return a list, a loader "
                "or a DALI pipeline"
            )
        return _iterable(source)

    def _uneven(self, number: int, samples: int) -> FastcalError:
        return FastcalError(
            f"batch {number} has {samples} samples, batch 0 has {self.batch_size}; only the last may have fewer"
        )

    def _see_first(self, arrays: Mapping[str, Any], samples: int) -> None:
        if self.last_batch == "wrap":
            self._first = self._first or self._make_buffer()
            with self._first.filling():
                for name, array in arrays.items():
                    _put(self._first, name, [array])
        if self.batch_size:  # seen in an earlier pass
            return
        digest = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            add_array(digest, name, to_host(array))
        self._digest = digest.hexdigest()
        self._types = {name: kept_type(array.dtype) for name, array in arrays.items()}
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        self.batch_size = samples

    def _check_types(self, number: int, arrays: Mapping[str, Any]) -> None:
        if arrays.keys() != self._types.keys():
            raise FastcalError(f"batch {number} has the inputs {sorted(arrays)}, batch 0 has {sorted(self._types)}")
        for name, array in arrays.items():
            if kept_type(array.dtype) != self._types[name]:
                raise FastcalError(
                    f"batch {number} has {name!r} of {array.dtype}, batch 0 of {self._types[name]}; all need one type"
                )

    def _wrap(self, number: int, samples: int, arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
        """An incomplete batch, and the first samples that it lacks."""
        assert self._first is not None
        missing = self.batch_size - samples
        _log.info("the last batch has %d samples of %d: it is completed with the first", samples, self.batch_size)
        parts = {}
        for name, array in arrays.items():
            first = self._first.arrays[name]
            if first.shape[1:] != array.shape[1:]:
                raise FastcalError(
                    f"batch {number} has {name!r} of shape {array.shape}, which samples of batch 0, of shape "
                    f"{first.shape}, cannot complete; drop or keep the last batch"
                )
            parts[name] = [array, first[:missing]] if array.shape else [array]
        return parts

    def _arrays(self, number: int, batch: Any) -> dict[str, Any]:
        """A batch's arrays, NumPy's or CuPy's, by input name."""
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
                raise FastcalError(
                    f"batch {number} has {has or 'no arrays'}, and none for input {name!r}; name the arrays after the "
                    "inputs, or say which is which with ArrayFeed(batches, names)"
                ) from error
            arrays[name] = self._array(f"batch {number}, input {name!r}", values)
        return arrays

    def _array(self, place: str, values: Any) -> Any:
        try:
            array = as_cupy(values) if is_on_gpu(values) else _as_numpy(values)
        except FastcalError:
            raise
        except Exception as error:  # of NumPy's or CuPy's, or of the array's own library
            reason = str(error).strip().partition("\n")[0]
            raise FastcalError(f"{place} is no array that can be read: {reason}") from error
        if not isinstance(array, np.ndarray) and self._gpu not in (None, array.device.id):
            raise FastcalError(
                f"{place} lies on GPU {array.device.id}, the feed's buffers on GPU {self._gpu}; use "
                f"ArrayFeed(batches, device='cuda:{array.device.id}')"
            )
        if array.dtype.kind not in "biuf":
            raise FastcalError(f"{place} holds {array.dtype}, {type(values).__name__}; arrays of numbers are needed")
        return array


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


def _iterable(batches: Any) -> Any:
    if _is_pipeline(batches):
        from fastcal.feed.epochs import Epochs

        return Epochs(batches)
    return batches


def _is_function(batches: Any) -> bool:
    """Whether it is to be called for batches, rather than iterated over."""
    return callable(batches) and not hasattr(type(batches), "__iter__")


def _is_pipeline(batches: Any) -> bool:
    """Whether it is a pipeline of DALI's; DALI need not be installed to tell."""
    dali = sys.modules.get("nvidia.dali")
    return dali is not None and isinstance(batches, dali.Pipeline)


def _samples(number: int, arrays: Mapping[str, Any]) -> int:
    sizes = {array.shape[0] for array in arrays.values() if array.shape}
    if len(sizes) != 1:
        raise FastcalError(
            f"the arrays of batch {number} have first dimensions {sorted(sizes)}; one size is needed, the number of "
            "samples: repeat what is the same for all, or derive a class from fastcal.Feed, which may give any arrays"
        )
    (samples,) = sizes
    if not samples:
        raise FastcalError(f"batch {number} has no samples; leave it out")
    return int(samples)


def _as_numpy(values: Any) -> Any:
    only_dlpack = hasattr(values, "__dlpack__") and not hasattr(values, "__array__")
    return np.from_dlpack(values) if only_dlpack else np.asarray(values)
