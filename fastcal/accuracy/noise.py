"""The noise that INT8 adds to a network's outputs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Outputs
from fastcal.accuracy.outputs import Part


class Noise:
    """The squared error of outputs against the exact ones, part by part, added up over batches.

    Non-finite exact values are left out. Values that float32 cannot hold count as infinite.

    Attributes:
        parts: The parts.
        elements: The number of exact values, by the part's label.
        left_out: The number of those that are NaN or infinite.
        signal: The sum of the squares of the others.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.elements = {part.label: 0 for part in parts}
        self.left_out = {part.label: 0 for part in parts}
        self.signal = {part.label: 0.0 for part in parts}
        self._noise = {part.label: 0.0 for part in parts}

    def add(self, exact: Outputs, other: Outputs) -> None:
        """Add a batch: the exact outputs, and the outputs to judge, of the same shapes."""
        for part in self.parts:
            values, others = (np.asarray(each[part.output][part.index]).reshape(-1) for each in (exact, other))
            finite = np.abs(values) <= np.finfo(np.float32).max
            if not finite.all():
                values, others = values[finite], others[finite]
            noise = _power(np.subtract(values, others, dtype=np.float64))
            self.elements[part.label] += finite.size
            self.left_out[part.label] += finite.size - values.size
            self.signal[part.label] += _power(values)
            self._noise[part.label] += math.inf if math.isnan(noise) else noise

    @property
    def errors(self) -> dict[str, float]:
        """The relative squared error, sum of (exact - other)^2 / sum of exact^2, by the part's label.

        Parts without a finite exact value are left out. Infinite if a part should be 0 everywhere and is not.
        """
        known = (part.label for part in self.parts if not 0 < self.elements[part.label] == self.left_out[part.label])
        return {label: _ratio(self._noise[label], self.signal[label]) for label in known}

    @property
    def error(self) -> float:
        """The largest relative squared error of a part; 0 if there are none."""
        return max(self.errors.values(), default=0.0)

    @property
    def sqnr(self) -> float:
        """The signal-to-quantization-noise ratio of the worst part, in dB."""
        return decibels(self.error)


def decibels(error: float) -> float:
    """Return the signal-to-quantization-noise ratio, in dB, for a relative squared error."""
    if error == 0:
        return math.inf
    return -10 * math.log10(error) if error < math.inf else -math.inf


def without_padding(outputs: Outputs, batch: int, samples: int) -> Outputs:
    """Return the outputs of the first `samples` of a batch's samples; outputs of another first size stay whole."""
    return {name: array[:samples] if array.shape[:1] == (batch,) else array for name, array in outputs.items()}


def _power(values: npt.NDArray[Any]) -> float:
    return float(np.einsum("i,i->", values, values, dtype=np.float64))


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return float(noise / signal) if signal else math.inf
