"""Numbers as TensorRT's caches write them: the hexadecimal digits of a big-endian float."""

import struct
from typing import Any

from fastcal.errors import CacheError


def packed(value: Any, form: str, label: str) -> bytes:
    """Return a number of any library in one of `struct`'s forms, ">f" or ">d".

    Raises:
        CacheError: It is not a number, or it is too large for the form; `label` names it.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise CacheError(f"{label} is {value!r}; it must be a number")
    try:
        return struct.pack(form, float(value))
    except OverflowError as error:
        raise CacheError(f"{label} is too large for a float{8 * struct.calcsize(form)}") from error
    except (TypeError, ValueError) as error:  # an array of several numbers, for instance
        raise CacheError(f"{label} is {value!r}; it must be a number") from error


def to_hex(value: Any, form: str, label: str) -> str:
    """Return the digits of a number without leading zeros.

    Raises:
        CacheError: As `packed`.
    """
    return packed(value, form, label).hex().lstrip("0") or "0"


def from_hex(digits: str, form: str) -> float:
    """Return the number that `to_hex` wrote."""
    value: float = struct.unpack(form, bytes.fromhex(digits.strip().zfill(2 * struct.calcsize(form))))[0]
    return value
