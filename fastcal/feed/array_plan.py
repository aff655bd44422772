"""The plan of a feed of batches that the caller has or makes."""

import hashlib
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastcal.batch import UNNAMED
from fastcal.device import add_array, as_array, as_cupy, is_on_gpu, to_host
from fastcal.errors import DataError, FastcalError, quoted
from fastcal.feed.plan import Plan

#: The fates of a last batch of fewer samples.
LAST_BATCHES = ("wrap", "drop", "keep")


@dataclass(frozen=True, eq=False)
class ArrayPlan(Plan):
    """Batches that the caller has or makes; `fastcal.ArrayFeed` describes their forms."""

    batches: Any
    names: Sequence[str] | Mapping[Any, str] | None
    last_batch: str
    gpu: int | None
    depth: int
    samples: int | None = None
    is_first_extra: bool = False  # the first batch only completes the last one, and is not handed out itself
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
        try:
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
