"""`compare`: the accuracy that INT8 keeps with each algorithm's scales and with those of caches."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.calibration import calibrate
from fastcal.errors import DataError, FastcalError, ModelError
from fastcal.feed.arrays import as_feed
from fastcal.feed.feed import Feed
from fastcal.model import FLOATS, Model
from fastcal.observe.backends import timed
from fastcal.progress import Progress
from fastcal.qdq import check_quantizable, load_for, quantize
from fastcal.report.decisions import FLOAT
from fastcal.report.measurement import Measurement
from fastcal.report.quality import Comparison
from fastcal.report.verdict import doubt, verdict
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The algorithms that are compared; "entropy" picks the scales of "entropy2".
COMPARED = ("entropy2", "minmax", "percentile")

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
    with as_feed(feed, network.input_names, "cpu") as batches:
        fresh = calibrate(
            network, batches, backend="onnxruntime", threads=threads, progress=counting,
            tensorrt_version=DEFAULT_TENSORRT_VERSION,
        )  # fmt: skip
        observed = fresh.observed
        assert observed is not None  # calibrate has just observed the network
        picked = {name: replace(fresh, scales=algorithm.scales(observed)) for name, algorithm in algorithms.items()}
        measurement = _measure(network, picked | given, batches, threads, comparing)
    qualities, float_top1 = measurement.qualities(), measurement.decisions.top1(FLOAT)
    doubts = {label: doubt(network.input_names, cache, fresh.record, observed) for label, cache in given.items()}
    return Comparison(measurement.images, qualities, float_top1, verdict(qualities, COMPARED, doubts, float_top1))


def _measure(
    network: Model,
    caches: Mapping[str, CalibrationCache],
    feed: Feed,
    threads: int | None,
    progress: Callable[[Progress], None],
) -> Measurement:
    """Run the batches through the network in float, and in INT8 with the scales of each cache."""
    variants = {label: quantize(network, cache) for label, cache in caches.items()}
    scales = {label: cache.scales for label, cache in caches.items()}
    with timed(feed, progress) as batches, Measurement(network, scales, variants, feed, threads) as measurement:
        for batch in batches:
            measurement.add(batch)
    if not measurement.images:
        raise DataError(_GONE)
    return measurement


def _check_outputs(network: Model) -> None:
    """Raise ModelError if the network has no float output, or only outputs that do not depend on its inputs."""
    outputs = {value.name for value in network.proto.graph.output if value.type.tensor_type.elem_type in FLOATS}
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
