"""`compare`: the accuracy that INT8 keeps with each algorithm's scales, with those of caches, and in Q/DQ models."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastcal.accuracy.chooser import chooser
from fastcal.accuracy.labels import TopOne
from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm, fault_of_scale
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.calibration import calibrate
from fastcal.errors import DataError, FastcalError, ModelError, listed, quoted
from fastcal.feed.arrays import as_feed
from fastcal.model import FLOATS, Model
from fastcal.observe.backends import timed
from fastcal.observe.histogram import Observations
from fastcal.observe.operators import cut_unknown
from fastcal.progress import Progress
from fastcal.qdq import add_pairs, check_quantizable, load_for
from fastcal.qdq_implicit import ImplicitPlacement
from fastcal.qdq_placement import Placement
from fastcal.report.measurement import Int8, Measurement
from fastcal.report.quality import Comparison, Quality
from fastcal.tuning.tuned import Tuning
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The algorithms that are compared; "entropy" picks the scales of "entropy2".
COMPARED = ("entropy2", "minmax", "percentile", "mse")

#: The places where the simulation rounds, by name.
_ROUNDING: Mapping[str, type[Placement]] = {"explicit": Placement, "implicit": ImplicitPlacement}

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
    caches: Mapping[str, CalibrationCache | Tuning | str | os.PathLike[str]] | None = None,
    quantized: Mapping[str, Model | str | os.PathLike[str]] | None = None,
    metric: str | Callable[..., Any] | None = None,
    threshold: float | None = None,
    rounding: str = "explicit",
    quantile: float = DEFAULT_QUANTILE,
    exact: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    histograms: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure the accuracy that a network keeps in INT8: with each algorithm, with caches, and as Q/DQ models.

    The algorithms are "entropy2", "minmax", "percentile" and "mse". The first pass over the batches takes the
    histograms that the algorithms pick scales from, the second one compares. ONNX Runtime simulates the INT8 rounding,
    of weights too, in float32. An engine rounds only where TensorRT runs layers in INT8, so the numbers rank scales and
    do not predict an engine's accuracy.

    The scales with the highest signal-to-quantization-noise ratio (SQNR) keep most. An output that holds values of
    different kinds, such as a detector's boxes and scores, is compared part by part, and the worst part counts: boxes
    of 0 to 640 hide scores of 0 to 1.

    The metric is what the network's users see, as an agreement with FP32 from 0 to 1. By default it is picked from the
    outputs:

    - "boxes": the F1 score of a detector's boxes, after a threshold and suppression;
    - "masks": the intersection over union of a segmentation's masks;
    - "sequences": the share of equal texts of a text recognition (the best path without repeats and blanks);
    - "cosine": the mean cosine of embeddings, which end in a normalization;
    - "top-1": the share of images that get the same class.

    A network is a classifier if it has one output and the shape of that is (N, classes), perhaps with further
    dimensions of 1. If a classifier's images lie in a folder per class, and there are as many folders as classes, the
    folders in alphabetical order are the classes, as in torchvision's ImageFolder.

    Args:
        model: The ONNX file.
        feed: The batches, as `fastcal.calibrate` takes them. They must be there for a second pass.
        caches: Further calibration caches or tunings, or their files, by the name to show for them.
        quantized: Q/DQ models of any tool, or their files, by the name to show for them. Their inputs and outputs must
            have the names of the model's.
        metric: The metric by name, or a function of your own, or "file.py:function" or "module:function". A function
            takes the FP32 outputs of a batch and the INT8 ones, dicts of arrays by output whose first axis is the
            batch, and returns a number; the mean over the samples is shown. A metric that is no mean is a class: its
            objects have `add`, which takes the same, and `value()`. No batch is kept, unless such an object keeps it.
        threshold: The least score of a box (0.25 by default) or of a mask's pixel (0.5 by default).
        rounding: "explicit": at the pairs of the model that `quantize` makes, as TensorRT 11 rounds. "implicit":
            wherever TensorRT 8 to 10 may round with a cache: each activation that one kernel passes to another.
        quantile: For "percentile", the share of values that is not clipped.
        exact: Whether the algorithms clip outputs and tensors with a known range, as `fastcal.calibrate` takes it.
        threads: The number of threads; by default one per core that this process may use.
        memory: The bytes that the tensors of a segment of the float network may take, as `fastcal.calibrate` takes it.
        histograms: A file to keep the histograms in, as `fastcal.calibrate` takes it: it spares the first pass.
        progress: Called after every batch of either pass.

    Returns:
        The comparison; its `verdict` names the scales that keep most, caches that do not fit the images, and doubts
        about the preprocessing.

    Raises:
        ModelError: The model cannot be quantized or run, or a Q/DQ model has other inputs or outputs.
        CacheError: A cache cannot be read, or belongs to another model.
        DataError: The batches do not fit the model or are gone after one pass.
        FastcalError: A setting is out of range, or a metric cannot be loaded, or fails.
        Exception: As the feed.
    """
    algorithms = {name: Algorithm.of(name, quantile, exact=exact) for name in COMPARED}
    network = Model.of(model)
    check_quantizable(network)
    _check_outputs(network)
    choose = chooser(network, metric, threshold)
    if rounding not in _ROUNDING:
        raise FastcalError(f"rounding is {rounding!r}; it must be {' or '.join(_ROUNDING)}")
    if isinstance(feed, Iterator):
        raise DataError(_GONE)
    _check_names(caches or {}, quantized or {})
    given = {label: load_for(network, cache) for label, cache in (caches or {}).items()}
    others = {label: _load_quantized(network, other) for label, other in (quantized or {}).items()}
    counting, comparing = _in_two_passes(progress)
    with as_feed(feed, network, "cpu") as batches:
        fresh = calibrate(
            network, batches, algorithm="minmax", backend="onnxruntime", threads=threads, memory=memory,
            tensorrt_version=DEFAULT_TENSORRT_VERSION, histograms=histograms, progress=counting,
        )  # fmt: skip
        observed = fresh.observed
        assert observed is not None  # calibrate has just observed the network
        picked = {name: replace(fresh, scales=algorithm.scales(observed)) for name, algorithm in algorithms.items()}
        tunings = {label: Tuning(cache) for label, cache in picked.items()} | given
        ways = _simulated(network, tunings, _ROUNDING[rounding]) | others
        measurement = Measurement(network, ways, batches, choose, threads, memory)
        del ways  # the models, which the sessions hold
        with timed(batches, comparing) as second, measurement:
            for batch in second:
                measurement.add(batch)
        if not measurement.images:
            raise DataError(_GONE)
        qualities, float_top1 = measurement.results()
    doubts = {
        label: _doubt(network.input_names, tuning.cache, fresh.record, observed) for label, tuning in given.items()
    }
    doubts |= dict.fromkeys(others, "")
    verdict = _verdict(qualities, doubts, float_top1, measurement.metric)
    return Comparison(measurement.images, qualities, float_top1, verdict, measurement.metric)


def _check_outputs(network: Model) -> None:
    """Raise ModelError if the network has no float output, or only outputs that do not depend on its inputs."""
    proto, _, _ = cut_unknown(network.proto)
    outputs = {value.name for value in proto.graph.output if network.types.get(value.name) in FLOATS}
    if not outputs:
        raise ModelError(f"{network.path} has no float output to compare; export it without its last layer, an ArgMax")
    if outputs.isdisjoint([*network.input_names, *network.activations]):
        raise ModelError(f"{network.path} computes no float output: there is nothing to compare")


def _check_names(caches: Mapping[str, Any], quantized: Mapping[str, Any]) -> None:
    for kind, labels in (("cache", caches), ("Q/DQ model", quantized)):
        if named := set(COMPARED) & set(labels):
            raise FastcalError(f"a {kind} is named {min(named)!r} as an algorithm is; name it otherwise")
    if named := caches.keys() & quantized.keys():
        raise FastcalError(f"a cache and a Q/DQ model are named {min(named)!r}; name one otherwise")


def _simulated(network: Model, tunings: Mapping[str, Tuning], placing: type[Placement]) -> dict[str, Int8]:
    """Return the network in INT8 as each cache or tuning has it."""
    return {
        label: Int8(network, add_pairs(network, tuning, placing=placing), tuning.cache.scales)
        for label, tuning in tunings.items()
    }


def _load_quantized(network: Model, quantized: Model | str | os.PathLike[str]) -> Int8:
    """Return a Q/DQ model of any tool after checking that it has the inputs and outputs of the float network."""
    model = Model.of(quantized)
    ends = ((one.input_names, [value.name for value in one.proto.graph.output]) for one in (network, model))
    for kind, ours, theirs in zip(("inputs", "outputs"), *ends, strict=True):
        if set(ours) != set(theirs):
            raise ModelError(
                f"{model.label} has the {kind} {quoted(theirs)}, and {network.label} has {quoted(ours)}; compare a "
                "model of the same inputs and outputs"
            )
    for name in (value.name for value in network.proto.graph.output):
        if network.types.get(name) in FLOATS and model.types.get(name) not in FLOATS:
            raise ModelError(f"output {name!r} of {model.label} is not float; add a DequantizeLinear at its end")
    if unknown := cut_unknown(model.proto)[1]:
        raise ModelError(f"ONNX Runtime cannot run {model.label}: it does not know {', '.join(unknown)}")
    return Int8(model, model.proto, {})


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
        tell(Progress(total=last.total if last.batches else state.total, **sums))

    return first, second


def _doubt(inputs: Sequence[str], cache: CalibrationCache, record: Record | None, observed: Observations) -> str:
    """Return the reason to believe that a cache was made with other preprocessing; "" if there is none.

    `record` and `observed` are those of a calibration with the present batches.
    """
    theirs, ours = (made.entries.get("preprocess") if made else None for made in (cache.record, record))
    if theirs and ours and theirs != ours:
        return f"its record has other preprocessing: {theirs}"
    needed = (Algorithm("mse") if cache.algorithm.is_measured else cache.algorithm).scales(observed)
    for name in inputs:
        if needed.get(name) and name in cache.scales:
            if fault := fault_of_scale(cache.scales[name]):
                return f"its scale of input {name!r} is {fault}"
            factor = cache.scales[name] / needed[name]
            if not 1 / _OTHER_INPUT < factor < _OTHER_INPUT:
                return f"its scale of input {name!r} is {factor:.3g} times what these images need"
    return ""


def _verdict(
    qualities: Mapping[str, Quality], doubts: Mapping[str, str], float_top1: float | None, metric: str | None
) -> str:
    """Return the conclusion from the qualities in one line, the most serious problem first.

    `doubts` has the doubt about each cache and Q/DQ model, "" for none.
    """
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
        parts.append(_against(label, qualities[label].sqnr, first, most) + (f", and {reason}" if reason else ""))
    if most == -math.inf:
        reason = "in INT8 the output is NaN or infinite, or 0 is all that it is in FP32"
        return "; ".join([*parts, f"no scales keep anything: {reason}"])
    others = [name for name in COMPARED if name != first and _alike(qualities[name].sqnr, most)]
    near = f", {listed(others)} {'too' if is_exact else f'within {_ALIKE:g} dB of it'}" if others else ""
    where = qualities[first].worst_part if len(qualities[first].parts) > 1 else "the output"
    kept_most = "the exact output" if is_exact else f"{most:.1f} dB at {where}"
    return "; ".join([*parts, f"{first} keeps most: {kept_most}{_users_see(qualities[first], metric)}{near}"])


def _against(label: str, kept: float, first: str, most: float) -> str:
    """Return what a cache or a Q/DQ model keeps against the best algorithm."""
    if kept == -math.inf:
        return f"{label} keeps nothing of the output"
    if _alike(kept, most):
        return f"{label} keeps as much as {first}"
    if kept > most:
        return f"{label} keeps {'the exact output' if kept == math.inf else f'{kept - most:.1f} dB more than {first}'}"
    if most == math.inf:
        return f"{label} keeps {kept:.1f} dB where {first} keeps the exact output"
    return f"{label} loses {most - kept:.1f} dB against {first}"


def _users_see(quality: Quality, metric: str | None) -> str:
    """Return the metric for the end of a sentence."""
    if metric == TopOne.name and quality.agreement is not None:
        return f" and FP32's class for {quality.agreement:.1%} of the images"
    return "" if metric is None or quality.metric is None else f" and {metric} {quality.metric:.4g}"


def _alike(sqnr: float, most: float) -> bool:
    """Return whether an SQNR is as good as the highest; both are infinite if both outputs are exact."""
    return sqnr == most or abs(most - sqnr) < _ALIKE
