"""The choice of scales and of the layers that stay in float, by what INT8 costs at the outputs."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.noise import decibels
from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.feed.sampled import Sampled
from fastcal.model import Model
from fastcal.observe.histogram import Observations
from fastcal.qdq_graph import modern
from fastcal.tuning.layers import Layer
from fastcal.tuning.meter import NoiseMeter, meter_for
from fastcal.tuning.unfinished import Unfinished

#: The algorithms whose scales are tried.
CANDIDATES = ("entropy2", "minmax", "percentile", "mse")

#: The samples that algorithms are compared on, at most; and how much more noise than the least one may have to stay in
#: the comparison, times the number of samples: 1 + 5 / 8 times the least after 8 samples.
_COMPARED, _BEHIND = 16, 5.0

#: The share of the noise up to which the layers of a group are not told apart; and the layers of a group that is not
#: halved further, but whose layers run alone.
_LITTLE, _APART = 0.015, 4

#: The share of a group's noise below which the noise of one half is measured, not taken as the rest.
_TRUSTED = 0.2

#: The share of the noise from which on a layer is worth its time in float.
_WORTH = 0.01

_log = logging.getLogger("fastcal")

#: The noise that is small enough: 30 dB for an output of one part.
ENOUGH = 1e-3


def candidates(observed: Observations, *, exact: bool = False, known: str = "") -> dict[str, dict[str, float]]:
    """Return the scales of each algorithm that is tried, by its name, but for one that is known."""
    return {name: Algorithm.of(name, exact=exact).scales(observed) for name in CANDIDATES if name != known}


def pick_best(
    model: Model, sampled: Sampled, observed: Observations, *, exact: bool = False, threads: int | None = None
) -> tuple[str, dict[str, float]]:
    """Return the algorithm whose scales cost a network's outputs least, all layers in INT8, and these scales.

    `sampled` is the feed that was observed.
    """
    scales = candidates(observed, exact=exact)
    with meter_for(modern(model), sampled, scales["minmax"], threads=threads) as meter:
        return best(meter, scales)


def kept(model: Model, sampled: Sampled, cache: CalibrationCache, threads: int | None = None) -> dict[str, float]:
    """Return what the outputs keep with a cache's scales, and with others if the cache has its histograms.

    Every layer is in INT8. `sampled` is the feed that was observed, without samples that are held out.

    Returns:
        The signal-to-quantization-noise ratio of the worst part of the outputs in dB, by the name of the algorithm.

    Raises:
        ModelError: No layer can be in INT8.
    """
    scales = {cache.algorithm.name: cache.scales}
    if cache.observed is not None:
        others = candidates(cache.observed, exact=not cache.algorithm.keeps_ranges, known=cache.algorithm.name)
        scales = others | scales
    with meter_for(modern(model), sampled, cache.scales, threads=threads) as meter:
        return {name: meter.errors(meter.choice(True), each).sqnr for name, each in scales.items()}


def best(meter: NoiseMeter, scales: Mapping[str, Mapping[str, float]]) -> tuple[str, dict[str, float]]:
    """Return the name of the scales that cost least with all layers in INT8, and these scales; say so in the log.

    The more samples have been run, the less noise scales may have above the least to be run on more.
    """
    runs = {name: meter.growing(meter.choice(True), each) for name, each in scales.items()}
    noises: dict[str, float] = {}
    close, samples = list(scales), 0
    while len(close) > 1 and samples < min(_COMPARED, meter.samples):
        for name in close:
            samples, noises[name] = next(runs[name])
        most = (1 + _BEHIND / samples) * min(noises[name] for name in close)
        close = [name for name in close if noises[name] <= most]
    name = min(close, key=lambda name: noises[name])
    others = ", ".join(f"{each} {decibels(noise):.1f}" for each, noise in noises.items() if each != name)
    _log.info("scales by %s keep most: %.1f dB (%s)", name, decibels(noises[name]), others)
    return name, dict(scales[name])


def rank(
    meter: NoiseMeter, scales: Mapping[str, float], unfinished: Unfinished, progress: Callable[[int, int], None]
) -> list[float]:
    """Return the noise of each layer if it alone is in INT8, over the first batch; go on with an unfinished ranking."""
    for index in range(len(unfinished.noises), len(meter.layers)):
        unfinished.add(_noise_of(meter, scales, [index]))
        progress(index + 1, len(meter.layers))
    return unfinished.noises


def rank_groups(meter: NoiseMeter, scales: Mapping[str, float], progress: Callable[[int, int], None]) -> list[float]:
    """Return about what `rank` returns, in less time: the layers of a group that costs little share its noise.

    Groups are consecutive layers; those that cost more are halved until they are small, and then each layer runs alone.
    The noises of layers about add up, so the first half has what the second leaves of the group's noise. A small rest
    may be wrong, so it is measured.
    """
    count = len(meter.layers)
    size = max(1, round(math.sqrt(count)))
    groups = [range(start, min(start + size, count)) for start in range(0, count, size)]
    together = []
    for group in groups:
        together.append(_noise_of(meter, scales, group))
        progress(len(together), count)
    least = _LITTLE * sum(together)
    left = list(zip(reversed(groups), reversed(together), strict=True))
    noises: list[float] = []
    while left:
        group, noise = left.pop()
        if noise <= least:
            noises += [noise / len(group)] * len(group)
        elif len(group) <= _APART:
            noises += [_noise_of(meter, scales, [index]) for index in group]
        else:
            first, second = group[: len(group) // 2], group[len(group) // 2 :]
            cost = _noise_of(meter, scales, second)  # the half that takes less time: a run begins at its first layer
            rest = noise - cost
            if rest < _TRUSTED * noise:
                rest = _noise_of(meter, scales, first)
            left += [(second, cost), (first, rest)]
        progress(max(len(groups), len(noises)), count)
    return noises


def _noise_of(meter: NoiseMeter, scales: Mapping[str, float], layers: Sequence[int]) -> float:
    """Return the noise over the first batch with these layers in INT8."""
    is_int8 = meter.choice(False)
    is_int8[list(layers)] = True
    return meter.noise(is_int8, scales)


def in_order(layers: Sequence[Layer], noises: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the layers that cost something, the worst first: by their noise, and by noise per multiply-add."""
    noisy = [index for index, noise in enumerate(noises) if noise > 0]
    by_noise = sorted(noisy, key=lambda index: -noises[index])
    by_cost = sorted(noisy, key=lambda index: -noises[index] / max(layers[index].multiply_adds, 1))
    return by_noise, by_cost


def within(layers: Sequence[Layer], order: Sequence[int], noises: Sequence[float], share: float) -> list[int]:
    """Return the first layers of an order that have together at most this share of the multiply-adds.

    Layers with little noise are left out, and so are those that take more than what is left of the share.
    """
    left = share * sum(layer.multiply_adds for layer in layers)
    least = _WORTH * sum(noises)
    taken = []
    for index in order:
        if noises[index] >= least and layers[index].multiply_adds <= left:
            left -= layers[index].multiply_adds
            taken.append(index)
    return taken


def expected_noises(noises: Sequence[float], order: Sequence[int], noise: float) -> npt.NDArray[np.float64]:
    """Return the noise to expect with ever more layers of an order in float: none, the first, the first two ...

    The noises of layers about add up. `noise` was measured with all layers of the order in float.
    """
    rest = sum(noises) - sum(noises[index] for index in order)
    left = rest + np.append(np.cumsum([noises[index] for index in reversed(order)])[::-1], 0.0)
    return left * (noise / rest) if rest > 0 else left


def fewest(lengths: Sequence[int], suffices: Callable[[int], bool], guess: int = 0) -> int:
    """Return the first of ascending lengths that suffices, if those after it suffice too; the last if none does.

    The length at index `guess` is tried, then ever further ones, then those between.
    """
    low, high, index, step = 0, len(lengths) - 1, min(guess, len(lengths) - 2), 1
    while low < high:
        if suffices(lengths[index]):
            high, following = index, index - step
        else:
            low, following = index + 1, index + step
        index, step = following if low <= following < high else (low + high) // 2, 2 * step
    return lengths[low]
