"""`NoiseMeter`: what INT8 costs at a network's outputs, for any choice of layers and scales."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fastcal.accuracy.base import Metric, Outputs
from fastcal.accuracy.noise import Noise, decibels
from fastcal.accuracy.outputs import parts_of
from fastcal.batch import match_batch
from fastcal.errors import ModelError
from fastcal.feed.sampled import Sampled
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.qdq_graph import Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.layers import Layer, layers_of
from fastcal.tuning.logits import Logits
from fastcal.tuning.rounded import Rounded
from fastcal.tuning.simulation import Choice, Simulation

#: Noise as large as the signal keeps nothing: more is not worse.
_MOST = 4.0


#: The samples that layers are ranked on, and the share of a pass that a layer's run takes: it begins at the layer.
_LEAST_RANKED, _RANKED, _PASSES = 2, 8, 0.55


@dataclass(frozen=True)
class Errors:
    """The cost of a choice of layers and scales.

    Attributes:
        parts: The relative squared error of each part of the outputs, by its label.
        noise: The sum of these, with the logits in place of probabilities.
    """

    parts: Mapping[str, float]
    noise: float

    @property
    def sqnr(self) -> float:
        """The signal-to-quantization-noise ratio of the worst part, in dB."""
        return decibels(max(self.parts.values(), default=0.0))


class NoiseMeter(AbstractContextManager["NoiseMeter"]):
    """Runs samples with some layers in INT8 and compares the outputs with those in float.

    The noise is the sum, over the parts of the outputs, of the relative squared error; of the logits if an output is a
    Softmax's.

    Attributes:
        placement: The places of the pairs.
        layers: The layers that can be in INT8.
        shapes: The shapes of the tensors for the first sample, or the first batch if that cannot be divided.
        samples: The number of samples.
    """

    def __init__(
        self,
        model: Model,
        placement: Placement,
        batches: Sequence[Mapping[str, npt.NDArray[Any]]],
        threads: int | None = None,
    ) -> None:
        """Prepare a model for these pairs, and run the batches in float.

        Runs over the first batch alone begin at the first layer in INT8.
        """
        matched = [match_batch(model.inputs, model.label, batch) for batch in batches]
        self._model, self._threads = model, threads
        one = matched[0]
        if _is_divisible(model):
            one = {name: array[:1] for name, array in one.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with PartedRunner(model, threads) as whole:
            for values in whole.run(one):
                self.shapes |= {name: tuple(array.shape) for name, array in values.items()}
                del values  # before the next ones are computed
            types = whole.types
        self.placement = placement
        self.rounded = Rounded(Graph(model), placement.axes)
        self._simulation = Simulation(model, self.rounded, types, threads)
        self._exact = [self._simulation.exact(batch, keep=number == 0) for number, batch in enumerate(matched)]
        self.samples = sum(map(_samples, matched))
        graph = Graph(model)
        self.layers: list[Layer] = layers_of(graph, self.rounded.numbers, self.shapes, _samples(one))
        self._parts = [part for part in parts_of(model, self.shapes) if part.output in self._simulation.outputs]
        self._logits = Logits(model, self.shapes)
        self._exact_logits = [self._logits.of(exact.outputs) for exact in self._exact]

    def choice(self, is_int8: bool) -> Choice:
        """Return all layers in INT8, or in float."""
        return np.full(len(self.layers), is_int8)

    def errors(self, is_int8: Choice, scales: Mapping[str, float], *, metrics: Iterable[Metric] = ()) -> Errors:
        """Return the errors over all batches; the `metrics` count what they see."""
        return self._errors(self._runs(is_int8, scales), metrics)

    def noise(self, is_int8: Choice, scales: Mapping[str, float]) -> float:
        """Return the noise over the first batch."""
        return next(self.growing(is_int8, scales))[1]

    def growing(self, is_int8: Choice, scales: Mapping[str, float]) -> Iterator[tuple[int, float]]:
        """Yield the number of samples and their noise after each batch."""
        logits, samples = Noise(self._parts), 0
        runs = self._runs(is_int8, scales)
        for exact, exact_logits, outputs in zip(self._exact, self._exact_logits, runs, strict=True):
            logits.add(exact_logits, self._logits.of(outputs))
            samples += _samples(exact.alive[0])
            yield samples, _sum(logits)

    def errors_of(self, proto: onnx.ModelProto, metrics: Iterable[Metric] = ()) -> Errors:
        """Return the errors, as `errors`, of a variant of the model that has pairs of its own."""
        with OnnxRuntimeRunner(self._model, self._threads, variant=proto, is_optimized=True) as runner:
            return self._errors((runner.run(exact.alive[0]) for exact in self._exact), metrics)

    def _runs(self, is_int8: Choice, scales: Mapping[str, float]) -> Iterator[Outputs]:
        """Yield the outputs of the batches."""
        vector = self.rounded.vector(self.placement.resolved(scales))
        return (self._simulation.run(exact, is_int8, vector) for exact in self._exact)

    def _errors(self, runs: Iterable[Outputs], metrics: Iterable[Metric]) -> Errors:
        """Return the errors of the outputs of all batches."""
        noise = Noise(self._parts)
        logits = Noise(self._parts) if self._logits else noise
        for exact, exact_logits, outputs in zip(self._exact, self._exact_logits, runs, strict=True):
            noise.add(exact.outputs, outputs)
            if self._logits:
                logits.add(exact_logits, self._logits.of(outputs))
            for metric in metrics:
                metric.add(exact.outputs, outputs, len(next(iter(exact.outputs.values()))))
        return Errors(noise.errors, _sum(logits))

    def __exit__(self, *error: object) -> None:
        self._simulation.__exit__(*error)


def meter_for(
    model: Model,
    sampled: Sampled,
    scales: Mapping[str, float],
    excluded: Collection[int] = (),
    threads: int | None = None,
    *,
    thorough: bool = False,
) -> NoiseMeter:
    """Return the meter of a model for the samples that are held out, or for others if none are.

    The first batch, which layers are ranked on, has 2 to 8 samples: so many that the ranking takes about as long as the
    calibration.

    Args:
        model: The model, of an opset that has a scale per channel.
        sampled: The feed, after a pass.
        scales: The scales of the tensors; those of 0 round nothing.
        excluded: The numbers of the nodes that stay in float.
        threads: As `fastcal.calibrate`.
        thorough: Whether to rank on 8 samples, however long that takes.

    Raises:
        ModelError: No layer can be in INT8.
    """
    placement = Placement(Graph(model), scales, set(excluded))
    if not placement.axes:
        raise ModelError(f"{model.label} has no layer that can be in INT8; choose another algorithm than best")
    layers = len({number for number, _ in placement.axes})
    most = _RANKED if thorough else round(sampled.passed / (_PASSES * layers))
    batches = _split(sampled.held_out or sampled.shown, model, min(max(most, _LEAST_RANKED), _RANKED))
    return NoiseMeter(model, placement, batches, threads)


def _sum(noise: Noise) -> float:
    return sum(min(error, _MOST) for error in noise.errors.values())


def _split(
    batches: Sequence[Mapping[str, npt.NDArray[Any]]], model: Model, first: int
) -> list[Mapping[str, npt.NDArray[Any]]]:
    """Return the batches, the first one divided so that it has only so many samples, if the model allows that."""
    begin = batches[0]
    if not _is_divisible(model) or _samples(begin) <= first:
        return list(batches)
    parts = (slice(first), slice(first, None))
    return [*({name: array[part] for name, array in begin.items()} for part in parts), *batches[1:]]


def _is_divisible(model: Model) -> bool:
    return all(value.shape[:1] == (None,) for value in model.inputs)


def _samples(batch: Mapping[str, npt.NDArray[Any]]) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)
