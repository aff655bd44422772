"""`NoiseMeter`: what INT8 costs at a network's outputs, for any choice of layers and scales."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fastcal.accuracy.base import Metric
from fastcal.accuracy.noise import Noise, decibels
from fastcal.accuracy.outputs import parts_of
from fastcal.batch import match_batch
from fastcal.errors import ModelError
from fastcal.feed.sampled import Sampled
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner
from fastcal.qdq_graph import Edge, Graph
from fastcal.qdq_placement import Placement
from fastcal.tuning.layers import Layer, layers_of
from fastcal.tuning.simulation import Choice, Simulation
from fastcal.tuning.switches import Switched

#: Noise as large as the signal keeps nothing: more is not worse.
_MOST = 4.0


class NoiseMeter(AbstractContextManager["NoiseMeter"]):
    """Runs samples with some layers in INT8 and compares the outputs with those in float.

    The noise is the sum, over the parts of the outputs, of the relative squared error.

    Attributes:
        layers: The layers that can be in INT8.
        shapes: The shapes of the tensors for the first sample, or the first batch if that cannot be divided.
        samples: The number of samples.
    """

    def __init__(
        self,
        model: Model,
        axes: Mapping[Edge, int | None],
        batches: Sequence[Mapping[str, npt.NDArray[Any]]],
        threads: int | None = None,
    ) -> None:
        """Prepare a model for pairs on these edges, and run the batches in float.

        Runs over the first batch alone begin at the first layer in INT8.
        """
        self._batches = [match_batch(model.inputs, model.label, batch) for batch in batches]
        self._model, self._threads = model, threads
        is_divisible = all(value.shape[:1] == (None,) for value in model.inputs)
        one = {name: array[:1] for name, array in self._batches[0].items()} if is_divisible else self._batches[0]
        with OnnxRuntimeRunner(model, threads) as whole:
            self.shapes = {name: tuple(array.shape) for name, array in whole.run(one).items()}
            types = whole.types
        self.switched = Switched(Graph(model), axes)
        self._simulation = Simulation(model, self.switched, types, threads)
        self._exact = [self._simulation.exact(batch, keep=number == 0) for number, batch in enumerate(self._batches)]
        self.samples = sum(map(_samples, self._batches))
        graph = Graph(model)
        self.layers: list[Layer] = layers_of(graph, self.switched.numbers, self.shapes, _samples(one))
        self._parts = [part for part in parts_of(model, self.shapes) if part.output in self._simulation.outputs]

    def choice(self, is_int8: bool) -> Choice:
        """Return all layers in INT8, or in float."""
        return np.full(len(self.layers), is_int8)

    def errors(
        self, is_int8: Choice, scales: Mapping[str, float], *, batches: int | None = None, metric: Metric | None = None
    ) -> dict[str, float]:
        """Return the relative squared error of each part of the outputs, by its label.

        `batches` is the number of batches to run; None for all. A `metric` counts what it sees.
        """
        noise = Noise(self._parts)
        vector = self.switched.vector(scales)
        for exact in self._exact[:batches]:
            outputs = self._simulation.run(exact, is_int8, vector)
            noise.add(exact.outputs, outputs)
            if metric is not None:
                metric.add(exact.outputs, outputs, len(next(iter(outputs.values()))))
        return noise.errors

    def noise(self, is_int8: Choice, scales: Mapping[str, float], *, batches: int | None = None) -> float:
        """Return the noise."""
        return total(self.errors(is_int8, scales, batches=batches))

    def errors_of(self, proto: onnx.ModelProto, metric: Metric | None = None) -> dict[str, float]:
        """Return the errors, as `errors`, of a variant of the model that has pairs of its own."""
        noise = Noise(self._parts)
        with OnnxRuntimeRunner(self._model, self._threads, variant=proto) as runner:
            for batch, exact in zip(self._batches, self._exact, strict=True):
                outputs = runner.run(batch)
                noise.add(exact.outputs, outputs)
                if metric is not None:
                    metric.add(exact.outputs, outputs, len(next(iter(exact.outputs.values()))))
        return noise.errors

    def __exit__(self, *error: object) -> None:
        self._simulation.__exit__(*error)


def meter_for(
    model: Model,
    sampled: Sampled,
    scales: Mapping[str, float],
    excluded: Collection[int] = (),
    threads: int | None = None,
) -> NoiseMeter:
    """Return the meter of a model for the samples that are held out, or for others if none are.

    Args:
        model: The model, of an opset that has a scale per channel.
        sampled: The feed, after a pass.
        scales: The scales of the tensors; those of 0 round nothing.
        excluded: The numbers of the nodes that stay in float.
        threads: As `fastcal.calibrate`.

    Raises:
        ModelError: No layer can be in INT8.
    """
    axes = Placement(Graph(model), scales, set(excluded)).axes
    if not axes:
        raise ModelError(f"{model.label} has no layer that can be in INT8; choose another algorithm than best")
    return NoiseMeter(model, axes, sampled.held_out or sampled.shown, threads)


def total(errors: Mapping[str, float]) -> float:
    """Return the noise: the sum of relative squared errors."""
    return sum(min(error, _MOST) for error in errors.values())


def sqnr(errors: Mapping[str, float]) -> float:
    """Return the signal-to-quantization-noise ratio of the worst part, in dB."""
    return decibels(max(errors.values(), default=0.0))


def _samples(batch: Mapping[str, npt.NDArray[Any]]) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)
