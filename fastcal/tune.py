"""`tune`: the scales, the few layers in float and the biases with which a network keeps its accuracy in INT8."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastcal.accuracy.base import Metric
from fastcal.accuracy.chooser import chooser
from fastcal.accuracy.outputs import Shapes
from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.calibration import Calibration
from fastcal.errors import MOST_THREADS, FastcalError, ModelError, check_range
from fastcal.feed.arrays import as_feed
from fastcal.feed.sampled import HELD_OUT, Sampled
from fastcal.model import Model
from fastcal.observe.backends import OnnxRuntimeBackend
from fastcal.observe.histogram import Observations
from fastcal.progress import Progress
from fastcal.qdq import add_pairs, check_quantizable
from fastcal.qdq_graph import Graph, modern
from fastcal.qdq_placement import WEIGHTED, Placement
from fastcal.tuning.bias import corrections
from fastcal.tuning.choice import best, candidates, rank, rank_groups
from fastcal.tuning.curve import Curve
from fastcal.tuning.layers import depthwise_in
from fastcal.tuning.meter import NoiseMeter, meter_for
from fastcal.tuning.tuned import RankedLayer, Tuning
from fastcal.tuning.unfinished import Unfinished
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The share of the multiply-adds that may stay in float, if no target asks for more.
FLOAT_SHARE = 0.15

#: The samples that are held out if a target is to be reached: a metric counts samples.
_FOR_TARGET = 96

_log = logging.getLogger("fastcal")


def tune(
    model: str | os.PathLike[str] | Model,
    feed: Any,
    *,
    target: float | None = None,
    metric: str | Callable[..., Any] | None = None,
    threshold: float | None = None,
    float_share: float = FLOAT_SHARE,
    bias_correction: bool = True,
    depthwise: bool = True,
    exclude: Iterable[str] = (),
    algorithm: str = "best",
    quantile: float = DEFAULT_QUANTILE,
    exact: bool = False,
    tf32: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    until_stable: float | None = None,
    curve: bool = False,
    all_tensors: bool = False,
    cache: str | os.PathLike[str] | None = None,
    histograms: str | os.PathLike[str] | None = None,
    unfinished: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    status: Callable[[str], None] | None = None,
) -> Tuning:
    """Find the scales and the few layers in float with which INT8 keeps a network's outputs.

    One pass over the batches takes the histograms that scales are picked from, and holds some samples out: a quarter,
    at most 32, or 96 with a target. On these, ONNX Runtime runs the network with layers in INT8:

    1. The scales of "entropy2", "minmax", "percentile" and "mse" are compared on up to 16 samples, all layers in INT8.
    2. Each layer runs in INT8 alone, or the layers of a group that costs little together. This ranks the layers by what
       they cost at the outputs.
    3. The layers that cost most stay in float, as long as they take at most `float_share` of the multiply-adds. With a
       target, more layers stay in float until it is reached, whatever they take.
    4. The mean shift that rounding adds to each output channel is taken out of the biases, if that keeps more.

    The same batches and settings give the same result.

    Args:
        model: The ONNX file.
        feed: The batches, as `fastcal.calibrate` takes them.
        target: The agreement with float to reach on the samples that are held out, in (0, 1]. If they are too few to
            tell, it must be reached with larger errors too, up to 4 times. The IoU of masks must be 1.5 standard errors
            above the target.
        metric: What `target` is measured in, as `fastcal.compare` takes it: by default what the network's users see; if
            that is not known, 1 minus the noise of the worst part of the outputs.
        threshold: As `fastcal.compare`.
        float_share: The share of the multiply-adds, depthwise convolutions apart, that may stay in float, from 0 to 1.
        bias_correction: Whether to correct biases if that keeps more.
        depthwise: Whether depthwise convolutions may be in INT8.
        exclude: As `fastcal.quantize`.
        algorithm: An algorithm's name; "best" compares four.
        quantile: As `fastcal.calibrate`.
        exact: As `fastcal.calibrate`.
        tf32: As `fastcal.calibrate`.
        threads: As `fastcal.calibrate`.
        memory: As `fastcal.calibrate`.
        until_stable: As `fastcal.calibrate`.
        curve: Whether to take more time for more detail: further choices for the tuning's `curve`, each layer alone on
            8 samples for the ranking, and the fewest layers in float. A target asks for the last two too.
        all_tensors: Whether to observe all tensors, for a report or for what FP16 does not hold; by default only those
            that layers in INT8 read.
        cache: A file to keep the scales of all tensors in, as `fastcal.calibrate`.
        histograms: A file to keep the histograms of all tensors in, as `fastcal.calibrate`.
        unfinished: A file to keep the ranking in while it is being made: if the tuning is stopped, the next one of the
            same goes on there. It is removed at the end. `histograms` saves the calibration in the same way.
        progress: Called after every batch of the calibration.
        status: Called with a text for each step after that, "ranking layers, 3 of 64" for instance.

    Returns:
        The tuning, for `quantize`.

    Raises:
        ModelError: The model cannot be quantized or run.
        DataError: The batches do not fit the model.
        FastcalError: A setting is out of range, or a metric cannot be loaded, or fails.
        Exception: As the feed.
    """
    check_range("threads", threads, 1, MOST_THREADS)
    if not 0 <= float_share <= 1:
        raise FastcalError(f"float_share is {float_share}; it must be from 0 to 1")
    if target is not None and not 0 < target <= 1:
        raise FastcalError(f"target is {target}; it must be above 0 and at most 1, 0.99 for instance")
    network = Model.of(model)
    excluded = check_quantizable(network, exclude)
    if not depthwise:
        excluded |= depthwise_in(Graph(modern(network)))
    choose = chooser(network, metric, threshold)
    wanted = Algorithm.of(algorithm, quantile, exact=exact)
    with as_feed(feed, network, "auto") as batches:
        sampled = Sampled(batches, network.inputs, HELD_OUT if target is None else _FOR_TARGET)
        tuner = _Tuner(network, sampled, excluded, threads, status or (lambda text: None), curve or target is not None)
        shows_all = all_tensors or cache is not None or histograms is not None
        shown = network if shows_all else network.showing(tuner.tensors)
        backend = OnnxRuntimeBackend(threads, tf32, memory, is_optimized=not shows_all)
        calibration = Calibration(
            sampled, wanted, shown, backend, DEFAULT_TENSORRT_VERSION, until_stable,
            partial(tuner.pick_best, exact=exact), histograms,
        )  # fmt: skip
        scales = calibration.run(progress) if cache is None else calibration.keep(cache, progress)
        if not sampled.shown:  # the cache was reused
            for _ in sampled:
                pass
        return tuner.tune(scales, choose, target, float_share, bias_correction, unfinished)


class _Tuner:
    """A network that is tuned on samples.

    Attributes:
        tensors: The activations that pairs round, if no layer stays in float.
    """

    def __init__(
        self,
        network: Model,
        sampled: Sampled,
        excluded: set[int],
        threads: int | None,
        status: Callable[[str], None],
        is_thorough: bool,
    ) -> None:
        """Prepare to tune on the samples of a feed that is still to be gone through; `excluded` stay in float."""
        self._model, self._sampled, self._excluded = modern(network), sampled, excluded
        self._threads, self._status, self._is_thorough = threads, status, is_thorough
        self._meter: NoiseMeter | None = None
        graph = Graph(self._model)
        ones = dict.fromkeys(self._model.varying, 1.0)
        if not any(graph.nodes[number].op_type in WEIGHTED for number, _ in Placement(graph, ones, excluded).axes):
            raise ModelError(
                f"{network.label} has no layer left to run in INT8; exclude fewer, or allow depthwise ones"
            )
        axes = Placement(graph, ones, set()).axes
        read = (graph.nodes[number].input[index] for number, index in axes)
        self.tensors = frozenset(name for name in read if name in self._model.varying)

    def pick_best(self, observed: Observations, *, exact: bool) -> tuple[str, dict[str, float]]:
        """Return the algorithm whose scales cost the outputs least, and these scales."""
        scales = candidates(observed, exact=exact)
        meter = self._start(scales["minmax"])
        self._status("comparing algorithms")
        return best(meter, scales)

    def tune(
        self,
        cache: CalibrationCache,
        choose: Callable[[Shapes], Metric | None],
        target: float | None,
        float_share: float,
        bias_correction: bool,
        unfinished: str | os.PathLike[str] | None,
    ) -> Tuning:
        """Return the tuning for the scales of a cache; `choose` returns the metric for the outputs' shapes."""
        with self._start(cache.scales) as meter:
            made_from = {**(cache.record.entries if cache.record else {}), "scales": cache.scales}
            kept = Unfinished(unfinished, made_from, [layer.output for layer in meter.layers])
            noises = self._rank(meter, cache.scales, kept)
            curve = Curve(meter, cache.scales, choose(meter.shapes), target, has_more=self._is_thorough)
            self._status("choosing the layers that stay in float")
            in_float = curve.choose(noises, float_share)
            simulated = curve.measure(in_float)
        numbers = self._excluded | {meter.layers[index].number for index in in_float}
        tuning = Tuning(
            cache,
            [self._model.proto.graph.node[number].output[0] for number in sorted(numbers)],
            ranking=[
                RankedLayer(layer.label, layer.output, noise, layer.multiply_adds)
                for layer, noise in zip(meter.layers, noises, strict=True)
            ],
            metric=curve.metric.name if curve.metric else None,
            samples=meter.samples, target=target, are_held_out=bool(self._sampled.held_out),
        )  # fmt: skip
        self._status("correcting biases" if bias_correction else "measuring the model")
        placement = Placement(Graph(self._model), cache.scales, numbers)
        is_same = placement.axes.keys() == {edge for edge in meter.placement.axes if edge[0] not in numbers}
        plain = simulated if is_same else curve.measure_model(add_pairs(self._model, tuning), in_float)
        result, bias = plain, {}
        if bias_correction:
            bias = self._corrections(cache.scales, placement)
            corrected = curve.measure_model(add_pairs(self._model, replace(tuning, bias=bias)), in_float)
            result, bias = (corrected, bias) if curve.keeps_more(corrected, plain) else (plain, {})
        kept.finish()
        return replace(tuning, bias=bias, curve=curve.points, result=result)

    def _rank(self, meter: NoiseMeter, scales: Mapping[str, float], kept: Unfinished) -> list[float]:
        """Return the noise of each layer."""

        def tell(done: int, of: int) -> None:
            self._status(f"ranking layers, {done} of {of}")

        return rank(meter, scales, kept, tell) if self._is_thorough else rank_groups(meter, scales, tell)

    def _start(self, scales: Mapping[str, float]) -> NoiseMeter:
        """Return the meter, which is made when the first scales are known."""
        if self._meter is None:
            self._status("running samples in float")
            self._meter = meter_for(
                self._model, self._sampled, scales, self._excluded, self._threads, thorough=self._is_thorough
            )
        return self._meter

    def _corrections(self, scales: Mapping[str, float], placement: Placement) -> dict[str, list[float]]:
        resolved = placement.resolved(scales)
        found = corrections(self._model, placement.axes, resolved, self._sampled.shown, self._threads)
        return {name: [float(value) for value in values] for name, values in found.items()}
