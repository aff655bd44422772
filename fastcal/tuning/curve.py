"""`Curve`: what a network keeps with ever more layers in float, and the choice among these."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx

from fastcal.accuracy.amplified import Amplified
from fastcal.accuracy.base import Metric
from fastcal.accuracy.own import OwnMetric
from fastcal.tuning.choice import ENOUGH, expected_noises, fewest, in_order, within
from fastcal.tuning.layers import Layer
from fastcal.tuning.meter import Errors, NoiseMeter
from fastcal.tuning.tuned import TuningPoint

#: The number of differing samples that a target must allow, with larger errors; and the largest factor of these.
_DIFFERING, _LARGEST = 1.5, 4.0

#: The noise to expect, as a share of `ENOUGH`, of a choice that is about sure to have at most `ENOUGH`.
_SURE = 0.6

#: The standard errors by which a metric must exceed a target: the first choice that reaches it may do so by chance.
_ERRORS = 1.5


class Curve:
    """Measures choices of layers, all samples each.

    A target must be reached with larger errors too, if it allows less than 1.5 of the samples to differ. A metric that
    has a standard error must be 1.5 of these above the target.

    Attributes:
        metric: The metric, without batches; None if there is none.
        points: The choices that were measured, the fewest layers in float first.
    """

    def __init__(
        self,
        meter: NoiseMeter,
        scales: Mapping[str, float],
        metric: Metric | None,
        target: float | None,
        *,
        has_more: bool = False,
    ) -> None:
        """Measure with a metric, if there is one, to reach a target, if there is one.

        `has_more` asks for further points, whose layers in float double from point to point.
        """
        self.metric = metric
        self._meter, self._scales, self._target, self._has_more = meter, scales, target, has_more
        self._points: dict[tuple[int, ...], TuningPoint] = {}
        self._noises: dict[TuningPoint, float] = {}
        self._estimates: dict[TuningPoint, float] = {}  # the least that a metric's samples let expect
        self._amplified: Amplified | None = None
        if target is not None and metric is not None and not isinstance(metric, OwnMetric):
            wanted = meter.samples * (1 - target)  # the samples that may differ
            self._amplified = Amplified(metric.fresh(), min(max(1.0, _DIFFERING / max(wanted, 1e-9)), _LARGEST))

    @property
    def points(self) -> list[TuningPoint]:
        """The choices that were measured, the fewest layers in float first."""
        return sorted(self._points.values(), key=lambda point: (point.in_float, point.sqnr))

    def choose(self, noises: Sequence[float], float_share: float) -> list[int]:
        """Return the layers to leave in float, given what each costs alone.

        Two orders of the layers are tried, by their noise and by their noise per multiply-add. With a target, more
        layers are added until it is reached.
        """
        layers = self._meter.layers
        orders = in_order(layers, noises)
        chosen = [within(layers, order, noises, float_share) for order in orders]
        noise = [self._noises[self.measure(few)] for few in chosen]
        order, few = min(zip(orders, chosen, strict=True), key=lambda pair: noise[chosen.index(pair[1])])
        if self._target is None:
            for length in (0, *(2**power for power in range(len(few).bit_length()))) if self._has_more else ():
                self.measure(few[:length])
        if min(noise) <= ENOUGH:
            few = self._enough(few, expected_noises(noises, few, min(noise)))
        if self._target is None:
            return few
        order = [*few, *(index for index in order if index not in few)]
        # A model without any layer in INT8 is none to quantize: the one that costs least stays.
        weighted = [index for index in order if layers[index].multiply_adds]
        order = [index for index in order if index not in weighted[-1:] or len(weighted) < len(_weighted(layers))]
        # From the fewest on: metrics of few samples go up and down, and an early number may reach the target.
        lengths = range(min(len(few), len(order)), len(order) + 1)
        return order[: fewest(lengths, lambda length: self._reaches(self.measure(order[:length])))]

    def _enough(self, few: Sequence[int], expected: npt.NDArray[np.float64]) -> list[int]:
        """Return so many of the first of these layers that INT8 is good enough, given the noises to expect."""
        guess = int(np.argmax(expected <= max(_SURE * ENOUGH, expected[-1])))
        least = 0 if self._has_more else guess  # to save time, the expected number is taken if it suffices
        lengths = range(least, len(few) + 1)
        count = fewest(lengths, lambda length: self._noises[self.measure(few[:length])] <= ENOUGH, guess - least)
        return list(few[:count])

    def measure(self, in_float: Sequence[int]) -> TuningPoint:
        """Return what the network keeps with these layers in float."""
        key = tuple(sorted(in_float))
        if key not in self._points:
            metrics = self._metrics()
            is_int8 = self._meter.choice(True)
            is_int8[list(key)] = False
            errors = self._meter.errors(is_int8, self._scales, metrics=metrics)
            self._points[key] = self._point(key, errors, metrics)
        return self._points[key]

    def measure_model(self, proto: onnx.ModelProto, in_float: Sequence[int]) -> TuningPoint:
        """Return what a model with pairs keeps, in which these layers are in float."""
        metrics = self._metrics()
        return self._point(in_float, self._meter.errors_of(proto, metrics), metrics)

    def _metrics(self) -> list[Metric]:
        """Return the metric without batches, and the same for larger errors."""
        return [metric.fresh() for metric in (self.metric, self._amplified) if metric is not None]

    def keeps_more(self, one: TuningPoint, other: TuningPoint) -> bool:
        """Return True if one choice has less noise than the other, and reaches the target unless neither does."""
        if self._target is not None and self._reaches(one) != self._reaches(other):
            return self._reaches(one)
        return self._noises[one] < self._noises[other]

    def _reaches(self, point: TuningPoint) -> bool:
        """Return True if a choice reaches the target, as far as the samples can tell."""
        assert self._target is not None
        least = 1 - min(self._noises[point], 1) if point.metric is None else self._estimates[point]
        return least >= self._target

    def _point(self, in_float: Sequence[int], errors: Errors, metrics: Sequence[Metric]) -> TuningPoint:
        layers = self._meter.layers
        whole = sum(layer.multiply_adds for layer in layers)
        left = whole - sum(layers[index].multiply_adds for index in in_float)
        values = [metric.value for metric in metrics]
        point = TuningPoint(len(in_float), left / whole if whole else 1.0, errors.sqnr, values[0] if values else None)
        self._noises[point] = errors.noise
        if point.metric is not None:
            least = point.metric - _ERRORS * metrics[0].standard_error
            self._estimates[point] = min(least, *(value for value in values if value is not None))
        return point


def _weighted(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.multiply_adds]
