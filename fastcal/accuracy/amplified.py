"""`Amplified`: a metric that sees larger errors, so that few samples tell more."""

from dataclasses import dataclass, replace

from fastcal.accuracy.base import Metric, Outputs


@dataclass
class Amplified(Metric):
    """A metric of outputs whose errors are `factor` times as large.

    A sample has another class as soon as an error exceeds the lead of the first class. Leads are spread evenly close to
    0, so errors of twice the size cost about twice as many samples their class, if they are few. 44 samples tell apart
    agreements of 100 % and 97.7 %; with errors of 4 times the size, these stand for 100 % and 99.4 %.
    """

    metric: Metric
    factor: float

    @property
    def name(self) -> str:
        """The name of the metric."""
        return self.metric.name

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        larger = {name: exact[name] + self.factor * (other[name] - exact[name]) for name in exact}
        self.metric.add(exact, larger, samples)

    @property
    def value(self) -> float | None:
        """The agreement that the metric's stands for, with errors of their own size."""
        found = self.metric.value
        return None if found is None else 1 - (1 - found) / self.factor

    def fresh(self) -> "Amplified":
        """Return a metric of the same settings, without batches."""
        return replace(self, metric=self.metric.fresh())
