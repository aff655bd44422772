"""Thresholds: the formulas that pick a tensor's scale from its histogram, for many tensors at once.

Those of TensorRT's algorithms were measured on TensorRT 8.6.0: known inputs in, scales out of the caches that TensorRT
wrote. They reproduce those scales to the last bit.
"""

from functools import cache
from typing import Any

import numpy as np

from fastcal.observe.histogram import BINS

#: INT8's largest value: a scale is amax, or the threshold, over this.
INT8_MAX = np.float32(127)

#: The fewest bins that the entropy algorithms keep below the threshold, and the number of levels they compare with.
LEVELS = 128

#: The power of the error that "mse" adds up. Networks keep more with it than with squared errors: see
#: `benchmarks/README.md`.
EXPONENT = 2.4

_LARGEST = np.finfo(np.float32).max

# Divergences closer than this are equal: prefix sums leave rounding noise of about 1e-13, and a rule decides among
# equal candidates, not the noise.
_TIE = 1e-10


def percentile_scales(counts: Any, widths: Any, quantile: float) -> Any:
    """Return the scales of TensorRT's Legacy calibration with regression cutoff 1; arrays as for `entropy_scales`.

    The threshold is the upper end of the first bin at which the cumulative count, bin 0 included, exceeds
    quantile * total (or is the total, for a quantile of 1).
    """
    cumulative = np.cumsum(counts, axis=1)
    total = cumulative[:, -1:]
    bins = 1 + np.argmax((cumulative > quantile * total) | (cumulative == total), axis=1)
    return _scales(bins, widths)


def entropy_scales(counts: Any, widths: Any) -> Any:
    """Return scales whose INT8 histogram diverges least from the float one: TensorRT's Entropy and Entropy2.

    A candidate i, from 128 to 2048, is the number of bins below the threshold. The smallest divergence wins; among
    equal divergences, the largest candidate. scale = float32(float32(i + 0.5) * width) / 127. `counts` is int64 of
    shape (tensors, 2048); the bins' `widths` and the result are float32 of shape (tensors,).
    """
    divergence = divergences(counts)
    equal = divergence <= divergence.min(axis=1, keepdims=True) + _TIE
    best = BINS - np.argmax(equal[:, ::-1], axis=1)
    return _scales(best + 0.5, widths)


def error_scales(counts: Any, widths: Any, exponent: float = EXPONENT) -> Any:
    """Return the scales with the least expected error |x - rounded x|^exponent; arrays as for `entropy_scales`.

    A threshold is the upper end of one of the 2048 bins, and the values of a bin are spread evenly over the bin. Among
    equal errors, the smallest threshold wins.
    """
    best = np.argmin(counts.astype(np.float64) @ _expected_errors(exponent), axis=1)
    return _scales(best + 1.0, widths)


@cache
def _expected_errors(exponent: float) -> Any:
    """Return the expected errors of values in each bin, with each threshold: float64 of shape (bins, thresholds).

    The unit is the width of a bin. With step s = threshold / 127, the error of x up to the threshold is its distance to
    the next multiple of s; beyond the threshold, the distance to the threshold. The integral of |error|^p from 0 to x
    has a closed form: s^(p+1) (n / 2^p + sign(r) |r|^(p+1)) / (p+1), with n = round(x / s) and r = x / s - n.
    """
    edges, thresholds = np.arange(BINS + 1.0)[:, None], np.arange(1.0, BINS + 1)
    steps, more = thresholds / float(INT8_MAX), exponent + 1
    inside = np.minimum(edges, thresholds) / steps
    nearest = np.rint(inside)
    rest = inside - nearest
    integral = steps**more * (nearest / 2**exponent + np.sign(rest) * np.abs(rest) ** more)
    beyond = np.maximum(edges - thresholds, 0).astype(np.int64)
    integral += (np.arange(BINS + 1.0) ** more)[beyond]
    return np.diff(integral, axis=0) / more


def _scales(bins: Any, widths: Any) -> Any:
    """Return the scales of thresholds given as numbers of bins, none beyond what float32 holds."""
    with np.errstate(over="ignore"):
        return np.minimum(bins.astype(np.float32) * widths, _LARGEST) / INT8_MAX


def divergences(counts: Any) -> Any:
    """Return the Kullback-Leibler divergence KL(P || Q) of every candidate: float64, shape (tensors, 1921).

    The divergence is infinite if fewer than two bins of P are non-empty, or if bin i-1 is empty in Q but not in P. For
    a candidate i, with bin 1's count in place of bin 0's:

    - P is bins 0 to i-1, with all counts beyond added to bin i-1, over its sum.
    - Q cuts bins 0 to i-1, without the added counts, into 128 groups with edges ceil(j * i / 128), and gives each
      non-empty bin the mean of its group's non-empty bins; over its sum.

    Within a group log Q is one constant. So the group's part of the divergence needs only the group's sum and its
    number of non-empty bins, which are differences of prefix sums: no loop over bins. The candidates share groups: of
    245,888 groups 18,748 differ, and only those are computed.
    """
    counts = counts.astype(np.float64)
    counts[:, 0] = counts[:, 1]
    candidates, begins, ends, groups = _candidates()

    sums = _prefix_sums(counts)
    nonempty = _prefix_sums((counts > 0).astype(np.float64))
    terms = _x_log_x(counts)
    total, inside, last = sums[:, -1:], sums[:, candidates], counts[:, candidates - 1]
    beyond = total - inside

    group_sums = sums[:, ends] - sums[:, begins]
    group_bins = nonempty[:, ends] - nonempty[:, begins]
    log_q = np.log(np.where(group_sums > 0, group_sums, 1.0) / np.maximum(group_bins, 1.0))

    p_log_p = _prefix_sums(terms)[:, candidates] - terms[:, candidates - 1] + _x_log_x(last + beyond)
    p_log_q = (group_sums * log_q).take(groups, axis=1).sum(axis=2) + beyond * log_q[:, groups[:, -1]]
    some, all_of_it = np.maximum(inside, 1.0), np.maximum(total, 1.0)
    divergence = (p_log_p - p_log_q) / all_of_it - np.log(all_of_it) + np.log(some)
    impossible = (nonempty[:, candidates] < 2) | ((last == 0) & (beyond > 0))
    return np.where(impossible, np.inf, divergence)


@cache
def _candidates() -> tuple[Any, Any, Any, Any]:
    """Return the candidates, the ends of all groups that differ, and which groups each candidate has.

    Int arrays of shape (1921,), twice (groups,), and (1921, 128). A group is a range of bins.
    """
    candidates = np.arange(LEVELS, BINS + 1)
    edges = -(-np.arange(LEVELS + 1) * candidates[:, None] // LEVELS)
    found, groups = np.unique(edges[:, :-1] * (BINS + 1) + edges[:, 1:], return_inverse=True)
    return candidates, *np.divmod(found, BINS + 1), groups.reshape(-1, LEVELS)


def _prefix_sums(values: Any) -> Any:
    """Return the sums of the first 0, 1, ... values along the last axis, one more than there are values."""
    return np.concatenate([np.zeros_like(values[:, :1]), np.cumsum(values, axis=1)], axis=1)


def _x_log_x(values: Any) -> Any:
    return values * np.log(np.where(values > 0, values, 1.0))
