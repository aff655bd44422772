"""`compare`: the accuracy that INT8 keeps with each algorithm's scales and with those of caches."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm, fault_of_scale
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.calibration import calibrate
from fastcal.errors import DataError, FastcalError, ModelError
from fastcal.feed.arrays import as_feed
from fastcal.model import FLOATS, Model
from fastcal.observe.backends import timed
from fastcal.observe.histogram import Observations
from fastcal.observe.operators import cut_unknown
from fastcal.progress import Progress
from fastcal.qdq import check_quantizable, load_for
from fastcal.report.measurement import Measurement
from fastcal.report.quality import Comparison, Quality
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The algorithms that are compared; "entropy" picks the scales of "entropy2".
COMPARED = ("entropy2", "minmax", "percentile")

#: Outputs whose SQNR differs by less than this, in dB, count as equally good.
_ALIKE = 1.0

#: If an input's scale is this many times too wide or too narrow, other preprocessing is the likely cause.
_OTHER_INPUT = 1.5

#: If the float network gets a smaller share of the images right, the preprocessing is in doubt.
_TOO_FEW_RIGHT = 0.5

#: The error text if the second pass has no batches.
_GONE = "the batches are gone after one pass, and compare needs two; pass list(...) of them"


def compare(
    model: str | os.PathLike[str] | Model,
    feed: Any,
    *,
    caches: Mapping[str, CalibrationCache | str | os.PathLike[str]] | None = None,
    quantile: float = DEFAULT_QUANTILE,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure the accuracy that a network keeps in INT8 with the scales of each algorithm and of caches.

    The algorithms are "entropy2", "minmax" and "percentile". The first pass over the batches takes the histograms that
    the algorithms pick scales from, the second one compares. The INT8 outputs are those of the model that `quantize`
    makes; ONNX Runtime simulates its INT8 rounding, of weights too, in float32. An engine rounds only where TensorRT
    runs layers in INT8, so the numbers rank scales and do not predict an engine's accuracy.

    A network is a classifier if it has one output and the shape of that is (N, classes), perhaps with further
    dimensions of 1. If a classifier's images lie in a folder per class, and there are as many folders as classes, the
    folders in alphabetical order are the classes, as in torchvision's ImageFolder.

    Args:
        model: The ONNX file.
        feed: The batches, as `fastcal.calibrate` takes them. They must be there for a second pass.
        caches: Further calibration caches, or their files, by the name to show for them.
        quantile: For "percentile", the share of values that is not clipped.
        threads: The number of threads; by default one per core that this process may use.
        progress: Called after every batch of either pass.

    Returns:
        The comparison; its `verdict` names the scales that keep most, caches that do not fit the images, and doubts
        about the preprocessing.

    Raises:
        ModelError: The model cannot be quantized or run.
        CacheError: A cache cannot be read, or belongs to another model.
        DataError: The batches do not fit the model or are gone after one pass.
        FastcalError: A setting is out of range.
        Exception: As the feed.
    """
    algorithms = {name: Algorithm.of(name, quantile) for name in COMPARED}
    network = Model.of(model)
    check_quantizable(network)
    _check_outputs(network)
    if isinstance(feed, Iterator):
        raise DataError(_GONE)
    if named := set(COMPARED) & set(caches or ()):
        raise FastcalError(f"a cache is named {min(named)!r} as an algorithm is; name it otherwise")
    given = {label: load_for(network, cache) for label, cache in (caches or {}).items()}
    counting, comparing = _in_two_passes(progress)
    with as_feed(feed, network, "cpu") as batches:
        fresh = calibrate(
            network, batches, backend="onnxruntime", threads=threads, progress=counting,
            tensorrt_version=DEFAULT_TENSORRT_VERSION,
        )  # fmt: skip
        observed = fresh.observed
        assert observed is not None  # calibrate has just observed the network
        picked = {name: replace(fresh, scales=algorithm.scales(observed)) for name, algorithm in algorithms.items()}
        with timed(batches, comparing) as second, Measurement(network, picked | given, batches, threads) as measurement:
            for batch in second:
                measurement.add(batch)
        if not measurement.images:
            raise DataError(_GONE)
        qualities, float_top1 = measurement.results()
    doubts = {label: _doubt(network.input_names, cache, fresh.record, observed) for label, cache in given.items()}
    return Comparison(measurement.images, qualities, float_top1, _verdict(qualities, doubts, float_top1))


def _check_outputs(network: Model) -> None:
    """Raise ModelError if the network has no float output, or only outputs that do not depend on its inputs."""
    proto, _, _ = cut_unknown(network.proto)
    outputs = {value.name for value in proto.graph.output if network.types.get(value.name) in FLOATS}
    if not outputs:
        raise ModelError(f"{network.path} has no float output to compare; export it without its last layer, an ArgMax")
    if outputs.isdisjoint([*network.input_names, *network.activations]):
        raise ModelError(f"{network.path} computes no float output: there is nothing to compare")


def _in_two_passes(
    progress: Callable[[Progress], None] | None,
) -> tuple[Callable[[Progress], None], Callable[[Progress], None]]:
    """Return functions that report a first and a second pass to `progress` as one pass of twice the length."""
    tell = progress or (lambda state: None)
    last = Progress()

    def first(state: Progress) -> None:
        nonlocal last
        last = replace(state, total=state.total and 2 * state.total)
        tell(replace(last))

    def second(state: Progress) -> None:
        sums = {name: value + getattr(last, name) for name, value in vars(state).items() if name != "total"}
        tell(Progress(total=last.total, **sums))

    return first, second


def _doubt(inputs: Sequence[str], cache: CalibrationCache, record: Record | None, observed: Observations) -> str:
    """Return the reason to believe that a cache was made with other preprocessing; "" if there is none.

    `record` and `observed` are those of a calibration with the present batches.
    """
    theirs, ours = (made.entries.get("preprocess") if made else None for made in (cache.record, record))
    if theirs and ours and theirs != ours:
        return f"its record has other preprocessing: {theirs}"
    needed = cache.algorithm.scales(observed)
    for name in inputs:
        if needed.get(name) and name in cache.scales:
            if fault := fault_of_scale(cache.scales[name]):
                return f"its scale of input {name!r} is {fault}"
            factor = cache.scales[name] / needed[name]
            if not 1 / _OTHER_INPUT < factor < _OTHER_INPUT:
                return f"its scale of input {name!r} is {factor:.3g} times what these images need"
    return ""


def _verdict(qualities: Mapping[str, Quality], doubts: Mapping[str, str], float_top1: float | None) -> str:
    """Return the conclusion from the qualities in one line, the most serious problem first; `doubts` by cache."""
    parts = []
    if float_top1 is not None and float_top1 < _TOO_FEW_RIGHT:
        parts.append(
            f"FP32 gives {float_top1:.1%} of the images their folder's class: is this the preprocessing that the "
            "network was trained with?"
        )
    first = max(COMPARED, key=lambda name: qualities[name].sqnr)
    most = qualities[first].sqnr
    is_exact = most == math.inf
    for label, reason in sorted(doubts.items(), key=lambda item: not item[1]):
        kept = qualities[label].sqnr
        if kept == -math.inf:
            text = f"{label} keeps nothing of the output"
        elif _alike(kept, most):
            text = f"{label} keeps as much as {first}"
        elif is_exact:
            text = f"{label} keeps {kept:.1f} dB where {first} keeps the exact output"
        else:
            text = f"{label} loses {most - kept:.1f} dB against {first}"
        parts.append(text + (f", and {reason}" if reason else ""))
    if most == -math.inf:
        reason = "in INT8 the output is NaN or infinite, or 0 is all that it is in FP32"
        return "; ".join([*parts, f"no scales keep anything: {reason}"])
    agreement = qualities[first].agreement
    classes = "" if agreement is None else f" and FP32's class for {agreement:.1%} of the images"
    others = [name for name in COMPARED if name != first and _alike(qualities[name].sqnr, most)]
    near = f", {' and '.join(others)} {'too' if is_exact else f'within {_ALIKE:g} dB of it'}" if others else ""
    kept_most = "the exact output" if is_exact else f"{most:.1f} dB at the output"
    return "; ".join([*parts, f"{first} keeps most: {kept_most}{classes}{near}"])


def _alike(sqnr: float, most: float) -> bool:
    """Return whether an SQNR is as good as the highest; both are infinite if both outputs are exact."""
    return sqnr == most or most - sqnr < _ALIKE
