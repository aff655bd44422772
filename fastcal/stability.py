"""`StabilityCheck`: the end of a calibration whose scales no longer move."""

import logging
import math
from collections.abc import Mapping

from fastcal.algorithm import Algorithm
from fastcal.observe.backends import Observer

_log = logging.getLogger("fastcal")


class StabilityCheck:
    """Checks the scales on the way, at ever larger intervals, and tells when they no longer move."""

    #: The number of checks in a row without movement.
    _in_a_row = 3

    def __init__(self, algorithm: Algorithm, percent: float) -> None:
        """Check the scales of an algorithm, which are still if none moves by more than this percentage."""
        self._algorithm, self._percent = algorithm, percent
        self._next = 0
        self._scales: Mapping[str, float] = {}
        self._still = 0

    def __call__(self, observer: Observer, images: int) -> bool:
        """Return True if the scales after `images` images, and at the checks before, no longer move."""
        if images < self._next:
            return False
        self._next = images + images // 10
        before, self._scales = self._scales, self._algorithm.pick_all(observer.histograms())
        moved = max((_percent_moved(before.get(name, 0.0), scale) for name, scale in self._scales.items()), default=0)
        self._still = self._still + 1 if moved <= self._percent else 0
        if self._still < self._in_a_row:
            return False
        _log.info(
            "stable after %d images: no scale moved by more than %g %% at the last %d checks",
            images, self._percent, self._in_a_row,
        )  # fmt: skip
        return True


def _percent_moved(before: float, now: float) -> float:
    if before == now:
        return 0.0
    return math.inf if before == 0 else 100 * abs(now / before - 1)
