"""`Comparison` and its parts: numbers that say how much of a network's accuracy INT8 keeps."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class TensorQuality:
    """The quality of one tensor if it alone is rounded to INT8.

    Attributes:
        scale: The tensor's scale.
        sqnr: Signal-to-quantization-noise ratio in dB: 10 log10(sum of x^2 / sum of (x - rounded x)^2). Infinite if
            rounding changes nothing; None for a tensor that is always 0, or that stays in float since its scale is 0,
            NaN, infinite or negative.
        clipped: The share of the tensor's values beyond 127 scales.
    """

    scale: float
    sqnr: float | None
    clipped: float


@dataclass(frozen=True)
class Quality:
    """The quality of a network in INT8 with one set of scales.

    Attributes:
        outputs: The SQNR of each float output, in dB, if all INT8 layers round; -infinity if that makes a finite
            output NaN or infinite. Outputs without finite values are left out.
        tensors: The quality of each tensor, in the order of the scales; empty for a Q/DQ model.
        agreement: For a classifier, the share of images to which the INT8 network gives the class that the float
            network gives; else None.
        top1: For a classifier, the share of images to which the INT8 network gives the class of their folder; None if
            the folders are not the classes.
        parts: The SQNR of each part of the outputs, in dB: values of different kinds that a Concat puts together, such
            as boxes and scores, are parts. An output of one kind of values is one part.
        channels: The SQNR of each channel of the outputs, in dB, without channels that are almost 0 in FP32: those with
            less than 1 % of the mean power of a channel of their part.
        metric: The value of the comparison's metric; None if there is no metric, or nothing to see.
    """

    outputs: Mapping[str, float]
    tensors: Mapping[str, TensorQuality]
    agreement: float | None = None
    top1: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    channels: Mapping[str, float] = field(default_factory=dict)
    metric: float | None = None

    @property
    def sqnr(self) -> float:
        """The lowest SQNR of a part of the outputs, in dB."""
        return min((self.parts or self.outputs).values())

    @property
    def worst_part(self) -> str:
        """The label of the part with the lowest SQNR."""
        parts = self.parts or self.outputs
        return min(parts, key=parts.__getitem__)

    @property
    def worst(self) -> list[str]:
        """The names of the tensors that are rounded, the lowest SQNR first."""
        sqnr = {name: tensor.sqnr for name, tensor in self.tensors.items() if tensor.sqnr is not None}
        return sorted(sqnr, key=sqnr.__getitem__)

    @property
    def median_sqnr(self) -> float | None:
        """The median SQNR of the tensors that are rounded, in dB; None if there are none."""
        rounded = [tensor.sqnr for tensor in self.tensors.values() if tensor.sqnr is not None]
        return median(rounded) if rounded else None


@dataclass(frozen=True)
class Comparison:
    """The qualities of a network in INT8 with several sets of scales.

    Attributes:
        images: The number of samples that were compared.
        qualities: The quality by algorithm or by the cache's name.
        float_top1: The share of images to which the float network gives the class of their folder; None if the folders
            are not the classes.
        verdict: The conclusion, in one line.
        metric: The name of the metric of what the network's users see; None if there is none.
    """

    images: int
    qualities: Mapping[str, Quality]
    float_top1: float | None
    verdict: str
    metric: str | None = None

    @property
    def best(self) -> str:
        """The name of the scales with the highest SQNR at their worst part; the first of several equal ones."""
        return max(self.qualities, key=lambda label: self.qualities[label].sqnr)

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as a JSON object; an infinite SQNR becomes null, too."""
        entries = {**asdict(self), "best": self.best}
        for label, quality in self.qualities.items():
            entries["qualities"][label]["sqnr"] = quality.sqnr
        json: dict[str, Any] = _finite(entries)
        return json


def _finite(value: Any) -> Any:
    """Return a JSON value with None in place of the numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
