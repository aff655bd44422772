"""`Measurement`: a network in float and in INT8 on the same batches, and the differences that users see."""

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy.typing as npt
import onnx

from fastcal.accuracy.base import Metric, Outputs
from fastcal.accuracy.labels import TopOne
from fastcal.accuracy.metrics import metric_for
from fastcal.accuracy.noise import without_padding
from fastcal.accuracy.outputs import Part, Shapes, parts_of
from fastcal.accuracy.own import OwnMetric
from fastcal.batch import format_shape, match_batch
from fastcal.errors import ModelError, first_few, quoted
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.report.quality import Quality
from fastcal.report.rounding import Rounding
from fastcal.report.seen import Seen

_log = logging.getLogger("fastcal")


class Int8(NamedTuple):
    """A network in INT8.

    Attributes:
        model: The float model, or a Q/DQ model of its own.
        variant: The float model with pairs, or the Q/DQ model's content.
        scales: The scales of the tensors by name; empty for a Q/DQ model.
    """

    model: Model
    variant: onnx.ModelProto
    scales: Mapping[str, float]


class _Way(NamedTuple):
    """A network in INT8 that runs."""

    runner: OnnxRuntimeRunner
    model: Model
    scales: Mapping[str, float]


class Measurement(AbstractContextManager["Measurement"]):
    """Runs batches through a network in float and in INT8 in several ways, and adds up the differences.

    Attributes:
        images: The number of samples so far, without those that only complete the last batch.
    """

    def __init__(
        self,
        network: Model,
        ways: Mapping[str, Int8],
        feed: Feed,
        choose: Callable[[Shapes], Metric | None],
        threads: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.images = 0
        self._network, self._feed, self._choose = network, feed, choose
        with ExitStack() as stack:
            self._float = stack.enter_context(PartedRunner(network, threads, memory))
            runners = [
                stack.enter_context(OnnxRuntimeRunner(way.model, threads, variant=way.variant)) for way in ways.values()
            ]
            self._ways = {
                label: _Way(runner, way.model, way.scales)
                for runner, (label, way) in zip(runners, ways.items(), strict=True)
            }
            workers = threads or len(os.sched_getaffinity(0))
            self._pool = stack.enter_context(ThreadPoolExecutor(workers, "fastcal-rounding"))
            self._stack = stack.pop_all()
        self._tensors = {name: Rounding(len(ways)) for name in self._float.tensors}
        self._outputs = [name for name in self._float.outputs if name in self._tensors]
        self._seen: dict[str, Seen] = {}

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Run one batch."""
        arrays = match_batch(self._network.inputs, self._network.label, batch)
        size = self._feed.samples_of(batch)
        known = self._feed.samples
        new = size if known is None else min(size, known - self.images)
        exact = self._run_float(arrays)
        if not self._seen:
            self._look({name: tuple(array.shape) for name, array in {**arrays, **exact}.items()}, exact, size)
        self.images += new
        real = without_padding(exact, size, new)
        for label, (runner, model, _) in self._ways.items():
            outputs = runner.run(arrays if model is self._network else match_batch(model.inputs, model.label, arrays))
            for name in self._outputs:
                self._check_shapes(model, name, exact[name], outputs[name])
            self._seen[label].add(real, without_padding(outputs, size, new), new)

    def _look(self, shapes: Shapes, exact: Outputs, size: int) -> None:
        """Prepare for outputs of these shapes, of `size` samples."""
        parts = [part for part in parts_of(self._network, shapes) if part.output in self._outputs]
        known = {part.output for part in parts}
        parts += [Part(name, name) for name in self._outputs if name not in known]  # where the graph is cut
        has_samples = all(exact[name].shape[:1] == (size,) for name in self._outputs)
        chosen = self._choose(shapes)
        picked = metric_for(self._network, shapes) if has_samples else None
        for label in self._ways:
            metric = chosen.fresh() if chosen and (has_samples or isinstance(chosen, OwnMetric)) else None
            both = (metric, picked and picked.fresh())
            classes = next((each for each in both if isinstance(each, TopOne) and not each.tokens), None)
            self._seen[label] = Seen(self._outputs, parts, shapes, metric, classes)

    def _run_float(self, arrays: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Run the float network, round each of its tensors with each set of scales, and return the float outputs."""
        exact: dict[str, npt.NDArray[Any]] = {}
        for tensors in self._float.run(arrays):
            rounding = [
                self._pool.submit(
                    self._tensors[name].add, values, [way.scales.get(name, 0.0) for way in self._ways.values()]
                )
                for name, values in tensors.items()
            ]
            exact |= {name: values for name, values in tensors.items() if name in self._outputs}
            for done in rounding:
                done.result()
            del tensors, rounding  # frees the memory before the next tensors are computed
        return exact

    def _warn_of_nonfinite(self) -> None:
        """Warn of outputs with NaN and infinite values in float; raise ModelError if no output has others."""
        noise = self._first.noise
        bad = {name: noise.left_out[name] for name in self._outputs if noise.left_out[name]}
        if bad:
            counts = [f"{name} ({count} of {noise.elements[name]} values)" for name, count in bad.items()]
            _log.warning("NaN and infinite values of FP32's outputs are not compared: %s", first_few(counts))
        if noise.errors.keys().isdisjoint(self._outputs):
            raise ModelError(
                f"{self._network.label} gives nothing but NaN or infinite values in FP32 (output {quoted(bad)}), so "
                "INT8 cannot be compared; check the images and the network in float"
            )

    def _check_shapes(self, model: Model, name: str, exact: npt.NDArray[Any], int8: npt.NDArray[Any]) -> None:
        if exact.shape == int8.shape:
            return
        shapes = format_shape(exact.shape), format_shape(int8.shape)
        if model is not self._network:
            raise ModelError(
                f"output {name!r} is {shapes[0]} in {self._network.label} and {shapes[1]} in {model.label}; compare a "
                "Q/DQ model of the same network"
            )
        raise ModelError(
            f"output {name!r} of {model.label} is {shapes[0]} in float and {shapes[1]} in INT8: its size depends on "
            "the values, so the two cannot be compared; compare a model that ends before it"
        )

    def results(self) -> tuple[dict[str, Quality], float | None]:
        """Return the quality in each way, and the share that float classifies right (None: not known).

        Raises:
            ModelError: The float network's outputs have no finite value.
        """
        self._warn_of_nonfinite()
        paths = self._feed.sample_names or []
        qualities = {}
        for index, (label, way) in enumerate(self._ways.items()):
            tensors = {
                name: rounding.quality(index, way.scales[name])
                for name, rounding in self._tensors.items()
                if name in way.scales
            }
            qualities[label] = self._seen[label].quality(tensors, paths)
        return qualities, self._first.float_top1(paths)

    @property
    def metric(self) -> str | None:
        """The name of the metric to show; None if there is none."""
        return self._first.metric.name if self._first.metric else None

    @property
    def _first(self) -> Seen:
        """The differences in the first way; the exact values are the same in all."""
        return next(iter(self._seen.values()))
