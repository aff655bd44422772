"""Checks of a batch against the inputs of a network: names, shapes, types and values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcal.device import type_of
from fastcal.errors import DataError, quoted

#: The dimensions of an input; None stands for a dynamic one.
Shape = tuple[int | None, ...]


class _Unnamed(str):
    """The type of `UNNAMED`, by which it differs from the name of an input that is also called "input"."""

    __slots__ = ()


#: The key of an array without a name: such an array goes to the only input of a network.
UNNAMED = _Unnamed("input")


@dataclass(frozen=True)
class Input:
    """One input of a network.

    Attributes:
        name: Its name.
        shape: Its dimensions; None stands for a dynamic one.
        dtype: Its element type.
        batch: The name of its first dimension, if that is dynamic and has one.
    """

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    batch: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} {format_shape(self.shape)}"


def format_shape(shape: Shape) -> str:
    """Return a shape as messages show it, e.g. (?, 3, 224, 224); a question mark stands for a dynamic dimension."""
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def known_sizes(shape: Iterable[int]) -> Shape:
    """Return a shape with None in place of sizes below 1, which stand for a dynamic dimension."""
    return tuple(size if size > 0 else None for size in shape)


def shape_fits(wanted: Shape, shape: tuple[int, ...]) -> bool:
    """Return True if an array of `shape` fits an input of shape `wanted`; None in `wanted` accepts any size."""
    return len(shape) == len(wanted) and all(want in (None, have) for want, have in zip(wanted, shape, strict=True))


def counting(inputs: Sequence[Input]) -> frozenset[str]:
    """Return the names of the inputs whose first dimensions count samples, and must be alike.

    They are the first input of a dynamic first dimension and those whose first dimension has the same name, if there
    are any; else the first input alone, since a fixed shape says itself what fits.
    """
    counted = [value for value in inputs if value.shape[:1] == (None,)] or inputs[:1]
    return frozenset(value.name for value in counted if value.batch == counted[0].batch)


def is_repeated(value: Input, constants: Mapping[str, Any]) -> bool:
    """Return whether an input is among the constants, and has the values of one sample, to be repeated for all."""
    return value.name in constants and value.shape[:1] == (None,) and constants[value.name].shape[:1] == (1,)


def match_batch(inputs: Sequence[Input], label: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's arrays by the names of a network's inputs, after checking names, shapes, types and values."""
    check_arrays(label, batch)
    arrays = match_names([value.name for value in inputs], label, batch)
    for value in inputs:
        _check_shape(value, label, tuple(arrays[value.name].shape))
        dtype = type_of(arrays[value.name])
        if not np.can_cast(dtype, value.dtype, "same_kind"):  # otherwise a float would be truncated to an integer
            raise DataError(
                f"{label} takes input {value.name!r} as {value.dtype}, the batches are {dtype}; convert them"
            )
        if not hasattr(arrays[value.name], "__cuda_array_interface__"):
            check_values(arrays[value.name], value, label)
    return arrays


def check_arrays(label: str, batch: Mapping[str, Any]) -> None:
    """Raise DataError if a batch holds anything but arrays: an integer, for instance, may be a device address."""
    for name, array in batch.items():
        if not hasattr(array, "shape") or isinstance(array, np.integer):
            raise DataError(f"{label} takes arrays, and input {name!r} of a batch is {array!r:.80}; give an array")


def match_names(names: Sequence[str], label: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's arrays by a network's input names, in that order, after checking the names."""
    if len(names) == len(batch) == 1 and isinstance(next(iter(batch)), _Unnamed):
        return {names[0]: next(iter(batch.values()))}
    if set(names) != set(batch):
        remedy = "name the batches' arrays after the inputs"
        if set(batch) < set(names):
            remedy = f"give {quoted(name for name in names if name not in batch)} too"
        raise DataError(
            f"{label} takes the inputs {quoted(names)}, the batches have {quoted(batch) or 'none'}; {remedy}"
        )
    return {name: batch[name] for name in names}


def check_values(array: Any, value: Input, label: str) -> None:
    """Raise DataError if a NumPy or CuPy array has values that the type of the input `value` cannot hold."""
    array = array if hasattr(array, "__cuda_array_interface__") else np.asarray(array)
    if np.can_cast(array.dtype, value.dtype, "safe"):
        return
    with np.errstate(over="ignore"):
        held = array.astype(value.dtype)
    beyond = held != array if value.dtype.kind in "iu" else np.isinf(held) & np.isfinite(array)
    if beyond.any():
        raise DataError(
            f"{label} takes input {value.name!r} as {value.dtype}, which cannot hold {array[beyond][0]}; give "
            "values that fit"
        )


def _check_shape(value: Input, label: str, shape: tuple[int, ...]) -> None:
    if shape_fits(value.shape, shape):
        return
    if len(value.shape) != len(shape):
        remedy = f"give arrays of {len(value.shape)} dimensions"
    elif shape_fits(value.shape[1:], shape[1:]):
        remedy = f"use batch size {value.shape[0]}"
    else:
        remedy = "choose the preprocessing (size, layout, channels) that the network was trained with"
    raise DataError(f"{label} takes input {value}, the batches are {format_shape(shape)}; {remedy}")
