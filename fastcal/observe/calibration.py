"""`calibrate`: batches through the network, histograms of what is seen there, scales, cache."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastcal.cache import (
    DEFAULT_TENSORRT_VERSION,
    CalibrationCache,
    check_algorithm,
    check_tensorrt_version,
    installed_tensorrt_version,
)
from fastcal.errors import MOST_THREADS, FastcalError, check_range, missing
from fastcal.feed.arrays import as_feed
from fastcal.feed.feed import Feed, length
from fastcal.model import Model
from fastcal.observe.histogram import Histogram
from fastcal.observe.observations import Observations
from fastcal.observe.observer import Engine, Observer, Seen, check_engine, choose_engine, timed
from fastcal.observe.scales import pick_scales
from fastcal.progress import Progress
from fastcal.record import Record, precision

#: The cutoff at which TensorRT's Legacy calibration is a plain percentile.
_NO_REGRESSION = 1.0

#: From so many samples on, an engine of optimization level 1 makes up for the seconds that it takes longer to build: 3
#: for ResNet-50 on an H200, and then 3,620 instead of 3,200 images/s.
_MANY = 100_000

_log = logging.getLogger("fastcal")


def calibrate(
    model: Any,
    feed: Any,
    *,
    algorithm: str = "entropy2",
    quantile: float = 0.9999,
    engine: str = "auto",
    tf32: bool = False,
    optimization_level: int | None = None,
    tactic_sources: int | Iterable[str] | None = None,
    tensorrt_version: str | None = None,
    threads: int | None = None,
    until_stable: float | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CalibrationCache:
    """Pick the INT8 scales of a network's tensors, those that TensorRT's own calibration would pick.

    Runs the network in float32 with every tensor visible, with TensorRT on a GPU or with ONNX Runtime on the CPU; one
    batch is in memory at a time, and where its tensors do not fit the memory together, the network runs several times
    over it. The scales equal TensorRT's to the last bit where the tensors' values do. With TensorRT the cache holds
    every tensor that TensorRT asks for; with ONNX Runtime not those that TensorRT's parser adds under names of its own
    (constants, the parts of a Gemm).

    Args:
        model: The ONNX file; for TensorRT, a `tensorrt.INetworkDefinition` will do too.
        feed: The batches: a `Feed`, an `ImageFeed` for instance; or what `ArrayFeed` takes, with the network's inputs
            for its names, in batches of any size.
        algorithm: "entropy2" (TensorRT's recommendation for convolutional networks), "entropy", "minmax" or
            "percentile".
        quantile: For "percentile", the share of values that is not clipped.
        engine: What runs the network: "tensorrt", "onnxruntime", or "auto": TensorRT where it, CuPy and a GPU are.
        tf32: For TensorRT: allow it to round factors to TF32, which is faster. An amax then differs by about 1e-3.
        optimization_level: For TensorRT: 0 (the engine is built fastest) to 5 (it runs fastest). By default 0, and 1
            where the feed has 100,000 samples or more. With workers 0: from 1 on TensorRT picks kernels by timing them,
            for each worker anew, and their activations may differ in the last bits.
        tactic_sources: For TensorRT: names of `tensorrt.TacticSource`, or their bits; by default its own.
        tensorrt_version: The TensorRT that will read the cache, e.g. "10.3.0". By default the one installed here, else
            10.16.1.
        threads: For ONNX Runtime: how many threads run the network and count; by default one per core that this
            process may use. Workers share the CPUs of their machines.
        until_stable: Stop when no scale has moved by more than so many percent in the last three looks at them; each
            look comes after a tenth more images than the one before. By default all batches are used.
        workers: How many Ray actors share the batches (`pip install 'fastcal[ray]'`), with a GPU each for TensorRT; by
            default this process does it all. The cache is the same, to the last bit where the workers' machines
            compute the same activations. The feed must be one that can be divided, an `ImageFeed` for instance, and
            the model and the images must be there for every worker at their paths.
        ray_address: The Ray cluster to connect to: "auto" for one that runs on this machine, or "host:port"; by default
            what the environment variable RAY_ADDRESS says, else Ray is started on this machine for as long as it
            takes. Not looked at where the program is connected to Ray already.
        progress: Called after every batch, with workers after every few seconds' work of one of them.

    Returns:
        The cache; `cache.save(path)` writes it. `cache.observed` has the histograms that the scales were picked from.

    Raises:
        FastcalError: The model cannot be loaded or run, or the batches do not fit it; or what the feed raises.
    """
    check_algorithm(algorithm, quantile)
    check_engine(engine)
    check_range("threads", threads, 1, MOST_THREADS)
    if until_stable is not None and not until_stable > 0:
        raise FastcalError(f"until_stable is {until_stable}; it is a percentage above 0, 1 for instance")
    if until_stable is not None and workers is not None:
        raise FastcalError("until_stable looks at the batches one after another; leave it or workers out")
    if ray_address is not None and workers is None:
        raise FastcalError(f"ray_address is {ray_address}, and without workers there is nothing to do there; set both")
    version = _tensorrt_version(tensorrt_version)
    network = _network(model)
    is_file = isinstance(network, Model)
    settings: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == "percentile":
        settings |= {"quantile": quantile, "regression_cutoff": _NO_REGRESSION}
    if until_stable is not None:
        settings["until_stable"] = until_stable
    sources = tuple(tactic_sources) if isinstance(tactic_sources, Iterable) else tactic_sources
    how = Engine(engine, tf32, optimization_level, sources, threads)
    if workers is None:
        how = replace(how, name=choose_engine(engine, is_file))
    else:
        _import_with_ray()  # fails now where Ray is not installed
    device = "auto" if how.name == "tensorrt" and workers is None else "cpu"
    with as_feed(feed, _input_names(network), device) as batches:
        record = Record.of(batches, network if is_file else None, **settings)
        looks = None if until_stable is None else _Looks(algorithm, quantile, until_stable)
        observed = observe(network, batches, how, progress, looks=looks, workers=workers, ray_address=ray_address)
        record = record.after(batches)
    record = replace(record, entries={**record.entries, "precision": precision(tf32 and observed.engine == "tensorrt")})
    cache = CalibrationCache(observed.scales(algorithm, quantile), algorithm, version, record=record, observed=observed)
    if algorithm == "percentile":
        cache.tensorrt_version, cache.quantile, cache.cutoff = None, quantile, _NO_REGRESSION
    return cache


def observe(
    model: Any,
    feed: Feed,
    engine: Engine,
    progress: Callable[[Progress], None] | None = None,
    *,
    looks: "_Looks | None" = None,
    workers: int | None = None,
    ray_address: str | None = None,
) -> Observations:
    """Run a network over the batches of a feed, and keep what there is to pick scales from.

    The arguments are those of `calibrate`, but for `engine`, which says how to run the network, and `looks`, which tell
    when there were enough batches; by default all are used.

    Raises:
        FastcalError: As `calibrate`.
    """
    network = _network(model)
    if isinstance(network, Model) and network.has_pairs:
        _log.warning(
            "%s has QuantizeLinear or DequantizeLinear already, and TensorRT takes the scales of those, not a cache's; "
            "calibrate the float model it was made from",
            network.path,
        )
    timeline: list[Progress] = []

    def keep(state: Progress) -> None:
        timeline.append(replace(state))
        if progress is not None:
            progress(state)

    if workers is None:
        seen = _observe_here(network, feed, engine, looks, keep)
    else:
        seen = _import_with_ray().observe(network, feed, engine, workers, ray_address, keep)
    if not timeline:
        raise FastcalError("the feed gave no batches; a calibration needs at least one")
    label = str(network.path) if isinstance(network, Model) else f"network {network.name!r}"
    if not seen.histograms:
        raise FastcalError(f"{label} has no float tensor: there is nothing to calibrate; export the network in float")
    _warn_of_nonfinite(seen.histograms)
    return Observations(label, seen.engine, dict(seen.histograms), dict(seen.sources), timeline)


def _network(model: Any) -> Model | Any:
    """The ONNX model, where `model` is one or a file of one; else the `INetworkDefinition` that it is.

    Raises:
        FastcalError: It is nothing of these, or the file cannot be read.
    """
    if isinstance(model, str | os.PathLike | Model):
        return Model.of(model)
    if not hasattr(model, "num_inputs"):
        raise FastcalError(
            f"the model is a {type(model).__name__}; name an ONNX file (onnx.save writes one), or give an "
            "INetworkDefinition of TensorRT's"
        )
    return model


def _import_with_ray() -> Any:
    try:
        from fastcal.observe import with_ray
    except ModuleNotFoundError as error:
        raise missing("a calibration with workers", error) from error
    return with_ray


def _observe_here(
    network: Model | Any, feed: Feed, engine: Engine, looks: "_Looks | None", progress: Callable[[Progress], None]
) -> Seen:
    """Observe all batches in this process, or as many as it takes for stable scales."""
    if engine.name == "tensorrt" and engine.optimization_level is None:
        engine = replace(engine, optimization_level=int((length(feed) or 0) * feed.batch_size >= _MANY))

    def enough(images: int) -> bool:
        return looks is not None and looks.are_stable(observer, images)

    # The feed starts while the engine does: each takes seconds on a GPU.
    with timed(feed, progress, enough) as batches, engine.observer(network, feed.gpu) as observer:
        for batch in batches:
            observer.observe(batch, anonymous=feed.anonymous)
        return Seen(engine.name, observer.histograms(), observer.sources)


class _Looks:
    """Looks at the scales on the way, ever more images apart, and tells when they move no more.

    Args:
        algorithm: How scales are picked.
        quantile: For "percentile".
        percent: By how much a scale may move from look to look.
    """

    #: So many looks in a row without movement.
    _in_a_row = 3

    def __init__(self, algorithm: str, quantile: float, percent: float) -> None:
        self._pick = algorithm, quantile
        self._percent = percent
        self._next = 0
        self._scales: Mapping[str, float] = {}
        self._still = 0

    def are_stable(self, observer: Observer, images: int) -> bool:
        """Whether to stop after so many images, which `observer` has counted."""
        if images < self._next:
            return False
        self._next = images + images // 10
        before, self._scales = self._scales, pick_scales(observer.histograms(), *self._pick)
        moved = max((_percent_moved(before.get(name, 0.0), scale) for name, scale in self._scales.items()), default=0)
        self._still = self._still + 1 if moved <= self._percent else 0
        if self._still < self._in_a_row:
            return False
        _log.info(
            "stable after %d images: no scale moved by more than %g %% in the last %d looks",
            images, self._percent, self._in_a_row,
        )  # fmt: skip
        return True


def _percent_moved(before: float, now: float) -> float:
    if before == now:
        return 0.0
    return math.inf if before == 0 else 100 * abs(now / before - 1)


def _input_names(network: Any) -> list[str] | None:
    """The names of a network's inputs."""
    if isinstance(network, Model):
        return [value.name for value in network.inputs]
    return [network.get_input(index).name for index in range(network.num_inputs)] or None


def _tensorrt_version(asked: str | None) -> str:
    if asked is not None:
        return check_tensorrt_version(asked)
    installed = installed_tensorrt_version()
    if installed is not None:
        return check_tensorrt_version(installed)
    _log.info("TensorRT is not installed here: the cache is written for TensorRT %s", DEFAULT_TENSORRT_VERSION)
    return DEFAULT_TENSORRT_VERSION


def _warn_of_nonfinite(histograms: Mapping[str, Histogram]) -> None:
    bad = {name: histogram for name, histogram in histograms.items() if histogram.nan or histogram.inf}
    if bad:
        shown = [f"{name} ({histogram.nan} NaN, {histogram.inf} Inf)" for name, histogram in list(bad.items())[:5]]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        _log.warning("left NaN and Inf out of the histograms of %s%s", ", ".join(shown), more)
