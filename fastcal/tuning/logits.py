"""`Logits`: the logits behind the probabilities that a network puts out."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Outputs
from fastcal.accuracy.outputs import Ends, Shapes
from fastcal.model import Model

#: The least probability that counts.
_LEAST = 1e-12


class Logits:
    """Replaces probabilities by the logits but for a constant: their logarithms, less the mean over the classes.

    A Softmax hides noise: if a network is sure of a class, logits may change much and the probabilities do not. The
    network is less sure of other images.
    """

    def __init__(self, model: Model, shapes: Shapes) -> None:
        ends = Ends(model, shapes)
        axes = {name: ends.softmax_axis(name) for name in ends.outputs}
        self._axes = {name: axis for name, axis in axes.items() if axis is not None}

    def __bool__(self) -> bool:
        """True if a Softmax computes an output."""
        return bool(self._axes)

    def of(self, outputs: Outputs) -> Outputs:
        """Return the outputs with logits in place of probabilities."""
        return {
            name: _logits(array, self._axes[name]) if name in self._axes else array for name, array in outputs.items()
        }


def _logits(probabilities: npt.NDArray[Any], axis: int) -> npt.NDArray[np.float32]:
    logits: npt.NDArray[np.float32] = np.maximum(probabilities, _LEAST, dtype=np.float32)
    np.log(logits, out=logits)
    logits -= logits.mean(axis, keepdims=True)
    return logits
