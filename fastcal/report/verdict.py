"""The verdict of a comparison: which scales keep most, and what speaks against a cache or the preprocessing."""

import math
from collections.abc import Mapping, Sequence

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.observe.observations import Observations
from fastcal.report.quality import Quality, best

#: Outputs whose SQNR differs by less than this, in dB, count as equally good.
_ALIKE = 1.0

#: If an input's scale is this many times too wide or too narrow, other preprocessing is the likely cause.
_OTHER_INPUT = 1.5

#: If the float network gets a smaller share of the images right, the preprocessing is in doubt.
_TOO_FEW_RIGHT = 0.5


def doubt(inputs: Sequence[str], cache: CalibrationCache, record: Record | None, observed: Observations) -> str:
    """Return the reason to believe that a cache was made with other preprocessing; "" if there is none.

    Args:
        inputs: The names of the network's inputs.
        cache: The cache.
        record: The record of a calibration with the present batches.
        observed: The histograms of that calibration.
    """
    theirs, ours = (made.entries.get("preprocess") if made else None for made in (cache.record, record))
    if theirs and ours and theirs != ours:
        return f"its record has other preprocessing: {theirs}"
    needed = cache.algorithm.scales(observed)
    for name in inputs:
        if needed.get(name) and name in cache.scales:
            factor = cache.scales[name] / needed[name]
            if not 1 / _OTHER_INPUT < factor < _OTHER_INPUT:
                return f"its scale of input {name!r} is {factor:.3g} times what these images need"
    return ""


def verdict(
    qualities: Mapping[str, Quality], algorithms: Sequence[str], doubts: Mapping[str, str], float_top1: float | None
) -> str:
    """Return the conclusion from the qualities in one line, the most serious problem first.

    Args:
        qualities: The quality by algorithm or by the cache's name.
        algorithms: The algorithms.
        doubts: What `doubt` returned, by the cache's name.
        float_top1: The share of images that the float network classifies as their folders do; None if not known.
    """
    parts = []
    if float_top1 is not None and float_top1 < _TOO_FEW_RIGHT:
        parts.append(
            f"FP32 gives {float_top1:.1%} of the images their folder's class: is this the preprocessing that the "
            "network was trained with?"
        )
    first = best({name: qualities[name] for name in algorithms})
    most = qualities[first].sqnr
    is_exact = most == math.inf
    for label, reason in sorted(doubts.items(), key=lambda item: not item[1]):
        kept = qualities[label].sqnr
        if _alike(kept, most):
            text = f"{label} keeps as much as {first}"
        elif is_exact:
            text = f"{label} keeps {kept:.1f} dB where {first} keeps the exact output"
        else:
            text = f"{label} loses {most - kept:.1f} dB against {first}"
        parts.append(text + (f", and {reason}" if reason else ""))
    agreement = qualities[first].agreement
    classes = "" if agreement is None else f" and FP32's class for {agreement:.1%} of the images"
    others = [name for name in algorithms if name != first and _alike(qualities[name].sqnr, most)]
    near = f", {' and '.join(others)} {'too' if is_exact else f'within {_ALIKE:g} dB of it'}" if others else ""
    kept_most = "the exact output" if is_exact else f"{most:.1f} dB at the output"
    return "; ".join([*parts, f"{first} keeps most: {kept_most}{classes}{near}"])


def _alike(sqnr: float, most: float) -> bool:
    """Return whether an SQNR is as good as the highest; both are infinite if both outputs are exact."""
    return sqnr == most or most - sqnr < _ALIKE
