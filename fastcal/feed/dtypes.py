"""The types in which batches have arrays."""

from typing import Any

import numpy as np


def kept_type(dtype: Any) -> np.dtype[Any]:
    """Return the type of `dtype`'s arrays in a batch: float32 for float64, else `dtype` in native byte order."""
    kept: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    return np.dtype(np.float32) if kept == np.float64 else kept


def as_array(values: Any) -> Any:
    """Return values as a NumPy array of the type in which a batch has them."""
    array = np.asarray(values)
    return array.astype(kept_type(array.dtype), copy=False)
