"""Scales from histograms, picked as TensorRT picks them.

The rules were measured on TensorRT 8.6.0 by giving it known inputs and reading the scales it wrote; they reproduce
those to the last bit.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from fastcal.cache import check_algorithm
from fastcal.observe.histogram import BINS, Histogram

#: INT8's largest value: a scale is amax (or the threshold) over this.
INT8_MAX = np.float32(127)

#: The fewest bins the entropy algorithms keep below the threshold, and how many levels they are compared with.
LEVELS = 128

# Divergences closer than this are equal: prefix sums leave rounding noise of about 1e-13, and among equal candidates
# the choice is by rule, not by noise.
_TIE = 1e-10


def pick_scales(histograms: Mapping[str, Histogram], algorithm: str, quantile: float = 0.9999) -> dict[str, float]:
    """The scale of every tensor.

    Args:
        histograms: Histogram by tensor name.
        algorithm: "entropy2" or "entropy" (the two pick the same scales), "minmax" or "percentile".
        quantile: For "percentile", the share of values that is not clipped.

    Returns:
        Scale by tensor name, in the same order, each exactly a float32; 0.0 for a tensor that is always 0.

    Raises:
        FastcalError: The algorithm is unknown or the quantile not in (0, 1].
    """
    check_algorithm(algorithm, quantile)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "fastcal-scales") as pool:
        scales = pool.map(lambda histogram: _scale(histogram, algorithm, quantile), histograms.values())
        return dict(zip(histograms, scales, strict=True))


def _scale(histogram: Histogram, algorithm: str, quantile: float) -> float:
    if algorithm == "minmax":
        return float(np.float32(histogram.amax) / INT8_MAX)
    if histogram.range == 0.0:
        return 0.0
    counts, widths = histogram.counts[None], np.array([histogram.width], np.float32)
    if algorithm == "percentile":
        return float(percentile_scales(counts, widths, quantile)[0])
    return float(entropy_scales(counts, widths)[0])


def percentile_scales(counts: Any, widths: Any, quantile: float) -> Any:
    """Scales that clip the largest values: TensorRT's Legacy calibration with regression cutoff 1.

    The threshold is the upper end of the first bin at which the cumulative count, bin 0 included, exceeds
    quantile * total (or is the total, for a quantile of 1).

    Args:
        counts: int64 array of shape (tensors, 2048).
        widths: Bin widths, float32 array of shape (tensors,).
        quantile: The share of values below the threshold, in (0, 1].

    Returns:
        float32 array of shape (tensors,).
    """
    cumulative = np.cumsum(counts, axis=1)
    total = cumulative[:, -1:]
    bins = 1 + np.argmax((cumulative > quantile * total) | (cumulative == total), axis=1)
    return (bins.astype(np.float32) * widths) / INT8_MAX


def entropy_scales(counts: Any, widths: Any) -> Any:
    """Scales whose INT8 histogram diverges least from the float one: TensorRT's Entropy and Entropy2 calibration.

    Of the candidates i = 128 to 2048 (the number of bins below the threshold) the one with the smallest divergence
    wins, among equals the largest. scale = float32(float32(i + 0.5) * width) / 127.

    Args:
        counts: int64 array of shape (tensors, 2048).
        widths: Bin widths, float32 array of shape (tensors,).

    Returns:
        float32 array of shape (tensors,).
    """
    divergence = divergences(counts)
    equal = divergence <= divergence.min(axis=1, keepdims=True) + _TIE
    best = BINS - np.argmax(equal[:, ::-1], axis=1)
    return ((best + 0.5).astype(np.float32) * widths) / INT8_MAX


def divergences(counts: Any) -> Any:
    """The Kullback-Leibler divergence KL(P || Q) of every candidate threshold.

    For a candidate i, with bin 1's count also in bin 0, in place of its own:

    - P is bins 0 to i-1, with all counts beyond added to bin i-1, over its sum.
    - Q cuts bins 0 to i-1, without what was added, into 128 groups with edges ceil(j * i / 128), and gives each
      non-empty bin the mean of its group's non-empty bins; over its sum.

    Within a group log Q is one constant, so its part of the divergence needs the group's sum and its number of
    non-empty bins alone, both differences of prefix sums: no loop over bins.

    Args:
        counts: int64 array of shape (tensors, 2048).

    Returns:
        float64 array of shape (tensors, 1921), for i = 128 to 2048; infinite where fewer than two bins of P are
        non-empty, or where bin i-1 is empty in Q but not in P.
    """
    counts = counts.astype(np.float64)
    counts[:, 0] = counts[:, 1]
    candidates, edges = _candidates()

    sums = _prefix_sums(counts)
    nonempty = _prefix_sums((counts > 0).astype(np.float64))
    terms = _x_log_x(counts)
    total, inside, last = sums[:, -1:], sums[:, candidates], counts[:, candidates - 1]
    beyond = total - inside

    group_sums = np.diff(sums[:, edges], axis=2)
    group_bins = np.diff(nonempty[:, edges], axis=2)
    log_q = np.log(np.where(group_sums > 0, group_sums, 1.0) / np.maximum(group_bins, 1.0))

    p_log_p = _prefix_sums(terms)[:, candidates] - terms[:, candidates - 1] + _x_log_x(last + beyond)
    p_log_q = (group_sums * log_q).sum(axis=2) + beyond * log_q[:, :, -1]
    some, all_of_it = np.maximum(inside, 1.0), np.maximum(total, 1.0)
    divergence = (p_log_p - p_log_q) / all_of_it - np.log(all_of_it) + np.log(some)
    impossible = (nonempty[:, candidates] < 2) | ((last == 0) & (beyond > 0))
    return np.where(impossible, np.inf, divergence)


@cache
def _candidates() -> tuple[Any, Any]:
    """The candidates, and the edges of the groups of each: int arrays of shape (1921,) and (1921, 129)."""
    candidates = np.arange(LEVELS, BINS + 1)
    return candidates, -(-np.arange(LEVELS + 1) * candidates[:, None] // LEVELS)


def _prefix_sums(values: Any) -> Any:
    """Sums of the first 0, 1, ... values along the last axis: one more than there are values."""
    return np.concatenate([np.zeros_like(values[:, :1]), np.cumsum(values, axis=1)], axis=1)


def _x_log_x(values: Any) -> Any:
    return values * np.log(np.where(values > 0, values, 1.0))
