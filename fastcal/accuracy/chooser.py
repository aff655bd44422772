"""`chooser`: the metric that a user asks for, or the one that suits a network."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastcal.accuracy.base import Metric
from fastcal.accuracy.metrics import check_metric, metric_for
from fastcal.accuracy.outputs import Shapes
from fastcal.accuracy.own import OwnMetric, load_metric
from fastcal.errors import FastcalError
from fastcal.model import Model


def chooser(
    network: Model, metric: str | Callable[..., Any] | None, threshold: float | None
) -> Callable[[Shapes], Metric | None]:
    """Return a function that returns the metric for outputs of given shapes.

    `metric` and `threshold` are as `fastcal.compare` takes them.

    Raises:
        FastcalError: There is no such metric, it cannot be loaded, or the threshold does not suit it.
    """
    if metric is None or (isinstance(metric, str) and ":" not in metric):
        check_metric(metric, threshold)
        return partial(metric_for, network, name=metric, threshold=threshold)
    own = load_metric(metric) if isinstance(metric, str) else OwnMetric(metric)
    if threshold is not None:
        raise FastcalError(f"metric {own.name} takes no threshold; leave the threshold out")
    return lambda shapes: own
