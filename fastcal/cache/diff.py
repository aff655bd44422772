"""`diff_caches`: the tensors whose scales differ between two calibration caches."""

import math
from dataclasses import dataclass

from fastcal.cache.cache import CalibrationCache
from fastcal.errors import FastcalError


@dataclass(frozen=True)
class CacheDiff:
    """The differences between two caches; empty, and so false, if there are none.

    Attributes:
        moved: Tensors whose scale differs, the largest difference first: name to the scale before and after.
        removed: Tensors that only the cache before has, in its order.
        added: Tensors that only the cache after has, in its order.
        compared: The number of tensors that both caches have.
    """

    moved: dict[str, tuple[float, float]]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    compared: int

    def __bool__(self) -> bool:
        return bool(self.moved or self.removed or self.added)


def diff_caches(before: CalibrationCache, after: CalibrationCache, *, tolerance: float = 0.0) -> CacheDiff:
    """Return the tensors whose scales differ from `before` to `after`. Headers and records are not compared.

    `tolerance` is the percentage of the smaller scale by which a scale may differ.

    Raises:
        FastcalError: The tolerance is negative or no number.
    """
    if not tolerance >= 0:
        raise FastcalError(f"tolerance {tolerance:g} is not a percentage from 0 on, 1 for instance")
    both = [name for name in before.scales if name in after.scales]
    pairs = {name: (before.scales[name], after.scales[name]) for name in both}
    moves = {name: _move(*pair) for name, pair in pairs.items()}
    moved = sorted((name for name in both if moves[name] > tolerance), key=lambda name: -moves[name])
    return CacheDiff(
        moved={name: pairs[name] for name in moved},
        removed=tuple(name for name in before.scales if name not in after.scales),
        added=tuple(name for name in after.scales if name not in before.scales),
        compared=len(both),
    )


def _move(before: float, after: float) -> float:
    """Return the difference of two scales in percent of the smaller one; infinity if one is 0 or not a number."""
    if before == after or (math.isnan(before) and math.isnan(after)):
        return 0.0
    if not (before > 0 and after > 0):
        return math.inf
    return 100 * (max(before, after) / min(before, after) - 1)
