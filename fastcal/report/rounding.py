"""`Rounding`: the noise that INT8 adds to one tensor if it alone is rounded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.noise import decibels
from fastcal.observe.count import rounded
from fastcal.report.quality import TensorQuality


class Rounding:
    """Sums over a tensor's finite values: their squares, and the squares of the noise of several scales.

    Values that float32 cannot hold count as infinite.
    """

    def __init__(self, ways: int) -> None:
        self._elements = 0
        self._signal = 0.0
        self._noise = [0.0] * ways
        self._clipped = [0] * ways

    def add(self, values: npt.NDArray[Any], scales: Sequence[float]) -> None:
        """Add values of any shape, rounded with each scale; a scale of 0 does not round."""
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self._elements += flat.size
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        exact = flat.astype(np.float64)
        self._signal += float(np.einsum("i,i->", exact, exact))
        for way, scale in enumerate(scales):
            if scale > 0:
                noise, clipped = rounded(flat, np.float32(scale))
                self._noise[way] += noise
                self._clipped[way] += clipped

    def quality(self, way: int, scale: float) -> TensorQuality:
        """Return the quality of the tensor rounded with one of the scales."""
        sqnr = decibels(self._noise[way] / self._signal) if 0 < scale < math.inf and self._signal > 0 else None
        return TensorQuality(scale, sqnr, self._clipped[way] / max(self._elements, 1))
