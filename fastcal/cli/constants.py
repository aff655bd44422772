"""Inputs that are the same for every sample, as the command line gives them: NAME=NUMBERS or NAME=FILE.npy."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastcal.errors import DataError, quoted

if TYPE_CHECKING:
    from fastcal.batch import Input
    from fastcal.model import Model


def read_constants(given: Sequence[str], network: "Model | None") -> dict[str, Any]:
    """Return the arrays of --constant by input name, in the types and shapes of the network's inputs.

    Raises:
        DataError: There is no such input, it is given twice, or the numbers do not fit it.
    """
    if network is None:
        raise DataError("--constant is for a network's input; name the model")
    inputs = {value.name: value for value in network.inputs}
    constants: dict[str, Any] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals or not values or name not in inputs:
            raise DataError(
                f"--constant {text}: write NAME=NUMBER,NUMBER or NAME=FILE.npy, with one of the inputs {quoted(inputs)}"
            )
        if name in constants:
            raise DataError(f"--constant gives input {name!r} twice; give it once")
        constants[name] = _file(values, inputs[name]) if values.endswith(".npy") else _numbers(values, inputs[name])
    return constants


def _file(path: str, value: "Input") -> Any:
    import numpy as np

    from fastcal.batch import check_values

    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # NumPy calls parsers that have errors of their own
        reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
        raise DataError(f"--constant {value.name}: cannot read {path}: {reason}; name another file") from error
    if not np.can_cast(array.dtype, value.dtype, "same_kind"):
        raise DataError(f"--constant {value.name}: {path} is {array.dtype}, the input {value.dtype}; convert it")
    check_values(array, value, path)
    return array.astype(value.dtype)


def _numbers(text: str, value: "Input") -> Any:
    import numpy as np

    parse = float if value.dtype.kind == "f" else int
    try:
        array = np.array([parse(part) for part in text.split(",")], value.dtype)
    except (ValueError, OverflowError) as error:
        raise DataError(f"--constant {value.name}={text}: {error}; the input takes {value.dtype}") from error
    if value.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"--constant {value.name}={text}: give numbers that {value.dtype} can hold")
    known = math.prod(size for size in value.shape if size is not None)
    if array.size == 1 or array.size == known:
        shape = [1 if size is None else size for size in value.shape]
        return np.full(shape, array[0]) if array.size == 1 else array.reshape(shape)
    if value.shape.count(None) == 1 and array.size % known == 0:
        return array.reshape([-1 if size is None else size for size in value.shape])
    raise DataError(
        f"--constant {value.name}={text} has {array.size} numbers, and the input is {value}; give that many, or one "
        "for all"
    )
