"""`Tuning`: the scales of a network, the layers that stay in float, corrected biases, and what was measured."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastcal.cache.cache import CalibrationCache
from fastcal.errors import CacheError, counted, decibels_text
from fastcal.files import write_atomically

#: What is kept if users hardly see a difference.
_GOOD = 0.99


@dataclass(frozen=True)
class RankedLayer:
    """The cost of INT8 in one layer alone.

    Attributes:
        name: The layer's name.
        output: The name of the layer's output.
        noise: The relative squared error at the network's outputs, the sum over their parts.
        multiply_adds: The multiply-adds for a sample.
    """

    name: str
    output: str
    noise: float
    multiply_adds: float


@dataclass(frozen=True)
class TuningPoint:
    """A measurement of the network with some layers in float.

    Attributes:
        in_float: The number of layers that stay in float.
        int8_share: The share of the multiply-adds that is in INT8, of those layers that can be.
        sqnr: The signal-to-quantization-noise ratio of the worst part of the outputs, in dB.
        metric: The agreement with float in what users see; None if nothing was seen.
    """

    in_float: int
    int8_share: float
    sqnr: float
    metric: float | None = None


@dataclass(frozen=True)
class Tuning:
    """A tuned network: all that `quantize` and `build_engine` need, and what was measured on the way.

    Attributes:
        cache: The scales, with the record of what they were made from.
        in_float: The outputs of the layers that stay in float; None for a cache, which leaves that open.
        bias: What to add to the biases of layers, a value for each output channel, by the layer's output.
        ranking: The layers, in the graph's order, with what each costs.
        curve: The choices that were measured, the fewest layers in float first.
        result: The choice that was made, with its corrected biases; None if nothing was measured.
        metric: The name of the metric; None if there is none.
        samples: The number of samples that were measured.
        target: The metric that was asked for; None if none was.
        are_held_out: Whether the calibration did not see these samples.
    """

    cache: CalibrationCache
    in_float: Sequence[str] | None = None
    bias: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ranking: Sequence[RankedLayer] = ()
    curve: Sequence[TuningPoint] = ()
    result: TuningPoint | None = None
    metric: str | None = None
    samples: int = 0
    target: float | None = None
    are_held_out: bool = True

    @property
    def text(self) -> str:
        """The result as text; an empty text if nothing was measured."""
        if self.result is None:
            return ""
        seen = "" if self.result.metric is None else f", {self.metric} {self.result.metric:.4g}"
        held_out = "held-out " if self.are_held_out else ""
        where = f"{counted(self.samples, f'{held_out}sample')}{'' if held_out else ', which the calibration saw too'}"
        return f"{decibels_text(self.result.sqnr)} at the outputs{seen}, on {where}"

    @property
    def is_reached(self) -> bool:
        """True if the target is reached, or none was asked for."""
        return self.target is None or (self.result is not None and self.kept >= self.target)

    @property
    def is_good(self) -> bool:
        """True if users will hardly see a difference: the metric is 0.99 or more, or the outputs keep 20 dB."""
        return self.kept >= _GOOD

    @property
    def kept(self) -> float:
        """The metric of the result; 1 minus the relative squared error of the worst part if there is none."""
        assert self.result is not None
        noise = 10 ** (-self.result.sqnr / 10)
        return max(0.0, 1 - noise) if self.result.metric is None else self.result.metric

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tuning to a JSON file, which is a calibration cache in JSON with one entry more.

        Args:
            path: The file.

        Raises:
            FastcalError: The file cannot be written.
        """
        write_atomically(path, self.to_json())

    def to_json(self) -> bytes:
        """Return the content of the file that `save` writes."""
        content = json.loads(self.cache.to_json())
        content["tuning"] = {name: value for name, value in asdict(self).items() if name != "cache"}
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tuning":
        """Read a file that `save` has written, or a calibration cache in any form.

        Args:
            path: The file.

        Raises:
            CacheError: The file cannot be read, or is damaged.
        """
        cache = CalibrationCache.load(path)
        try:
            content = json.loads(Path(path).read_bytes())["tuning"]
        except (OSError, ValueError, TypeError, KeyError):  # a cache
            return cls(cache)
        try:
            points = [TuningPoint(**point) for point in content.pop("curve")]
            ranking = [RankedLayer(**layer) for layer in content.pop("ranking")]
            result = content.pop("result")
            result = None if result is None else TuningPoint(**result)
            tuning = cls(cache, ranking=ranking, curve=points, result=result, **content)
            tuning._check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CacheError(f"{path} is a damaged tuning: {error}; tune again") from error
        return tuning

    @classmethod
    def of(cls, tuning: "Tuning | CalibrationCache | str | os.PathLike[str]") -> "Tuning":
        """Return `tuning` itself, a cache as a tuning, or one of these from a file."""
        if isinstance(tuning, CalibrationCache):
            return cls(tuning)
        return tuning if isinstance(tuning, Tuning) else cls.load(tuning)

    def _check(self) -> None:
        """Raise ValueError if the layers' names or the corrections are none."""
        names = [*(self.in_float or ()), *self.bias]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a layer's name is no text")
        for name, values in self.bias.items():
            if not all(isinstance(value, int | float) and abs(value) < float("inf") for value in values):
                raise ValueError(f"the correction of {name} is not finite")
