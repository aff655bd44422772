"""`calibrate`: batches through the network, histograms of what is seen there, scales, cache."""

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Protocol

from fastcal.cache import (
    DEFAULT_TENSORRT_VERSION,
    ENGINES,
    CalibrationCache,
    check_algorithm,
    check_tensorrt_version,
    installed_tensorrt_version,
)
from fastcal.errors import FastcalError, missing
from fastcal.feed.arrays import as_feed
from fastcal.feed.device import resolve
from fastcal.feed.feed import Feed, length
from fastcal.model import Model
from fastcal.observe.histogram import Histogram
from fastcal.observe.observations import Observations
from fastcal.observe.scales import pick_scales
from fastcal.progress import Progress
from fastcal.record import Record, precision

#: The cutoff at which TensorRT's Legacy calibration is a plain percentile.
_NO_REGRESSION = 1.0

#: From so many samples on, an engine of optimization level 1 makes up for the seconds that it takes longer to build: 3
#: for ResNet-50 on an H200, and then 3,620 instead of 3,200 images/s.
_MANY = 100_000

_log = logging.getLogger("fastcal")


class _Observer(Protocol):
    """Runs a network over batches and keeps the histograms of its tensors."""

    @property
    def sources(self) -> Mapping[str, str]:
        """Tensors that take another's scale: name to the other's name."""

    def observe(self, batch: Mapping[str, Any], *, anonymous: bool = False) -> None:
        """Run one batch and count its tensors."""

    def histograms(self) -> Mapping[str, Histogram]:
        """The histograms so far, by tensor name; none before the first batch."""


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
    progress: Callable[[Progress], None] | None = None,
) -> CalibrationCache:
    """Pick the INT8 scales of a network's tensors, those that TensorRT's own calibration would pick.

    Runs the network in float32 with every tensor visible, with TensorRT on a GPU or with ONNX Runtime on the CPU; one
    batch is in memory at a time. The scales equal TensorRT's to the last bit where the tensors' values do. With
    TensorRT the cache holds every tensor that TensorRT asks for; with ONNX Runtime not those that TensorRT's parser
    adds under names of its own (constants, the parts of a Gemm).

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
            where the feed has 100,000 samples or more.
        tactic_sources: For TensorRT: names of `tensorrt.TacticSource`, or their bits; by default its own.
        tensorrt_version: The TensorRT that will read the cache, e.g. "10.3.0". By default the one installed here, else
            10.16.1.
        threads: For ONNX Runtime: how many threads run the network and count; by default one per core that this
            process may use.
        until_stable: Stop when no scale has moved by more than so many percent in the last three looks at them; each
            look comes after a tenth more images than the one before. By default all batches are used.
        progress: Called after every batch.

    Returns:
        The cache; `cache.save(path)` writes it. `cache.observed` has the histograms that the scales were picked from.

    Raises:
        FastcalError: The model cannot be loaded or run, or the batches do not fit it; or what the feed raises.
    """
    check_algorithm(algorithm, quantile)
    if until_stable is not None and not until_stable > 0:
        raise FastcalError(f"until_stable is {until_stable}; it is a percentage above 0, 1 for instance")
    is_file = isinstance(model, str | os.PathLike | Model)
    engine = _choose(engine, is_file)
    version = _tensorrt_version(tensorrt_version)
    network = Model.of(model) if is_file else model
    settings: dict[str, Any] = {"algorithm": algorithm, "precision": precision(tf32 and engine == "tensorrt")}
    if algorithm == "percentile":
        settings |= {"quantile": quantile, "regression_cutoff": _NO_REGRESSION}
    if until_stable is not None:
        settings["until_stable"] = until_stable
    device = "auto" if engine == "tensorrt" else "cpu"
    with as_feed(feed, _input_names(network), device) as batches:
        record = Record.of(batches, network if is_file else None, **settings)
        if engine == "tensorrt":
            observing = _on_tensorrt(network, batches, tf32, optimization_level, tactic_sources)
        else:
            observing = _on_onnxruntime(network, threads)
        timeline: list[Progress] = []
        with observing as observer:
            looks = _Looks(observer, algorithm, quantile, until_stable)
            with closing(timed(batches, _kept(timeline, progress), looks.are_stable)) as seen:
                for batch in seen:
                    observer.observe(batch, anonymous=batches.anonymous)
            histograms = observer.histograms()
        record = record.after(batches)
    if not histograms:
        raise FastcalError("the feed gave no batches; a calibration needs at least one")
    _warn_of_nonfinite(histograms)
    label = str(network.path) if isinstance(network, Model) else f"network {network.name!r}"
    observed = Observations(label, engine, dict(histograms), dict(observer.sources), timeline)
    cache = CalibrationCache(observed.scales(algorithm, quantile), algorithm, version, record=record, observed=observed)
    if algorithm == "percentile":
        cache.tensorrt_version, cache.quantile, cache.cutoff = None, quantile, _NO_REGRESSION
    return cache


class _Looks:
    """Looks at the scales on the way, ever more images apart, and tells when they move no more.

    Args:
        observer: What has the histograms.
        algorithm: How scales are picked.
        quantile: For "percentile".
        percent: By how much a scale may move from look to look; None never looks.
    """

    #: So many looks in a row without movement.
    _in_a_row = 3

    def __init__(self, observer: _Observer, algorithm: str, quantile: float, percent: float | None) -> None:
        self._observer = observer
        self._pick = algorithm, quantile
        self._percent = percent
        self._next = 0
        self._scales: Mapping[str, float] = {}
        self._still = 0

    def are_stable(self, images: int) -> bool:
        """Whether to stop after so many images."""
        if self._percent is None or images < self._next:
            return False
        self._next = images + images // 10
        before, self._scales = self._scales, pick_scales(self._observer.histograms(), *self._pick)
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


def _choose(engine: str, is_file: bool) -> str:
    """The engine to use; "auto" takes what is there."""
    if engine not in ENGINES:
        raise FastcalError(f"there is no engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine != "auto":
        return engine
    there = find_spec("tensorrt") is not None and resolve("auto") is not None
    return "tensorrt" if there or not is_file else "onnxruntime"


def _input_names(network: Any) -> list[str] | None:
    """The names of a network's inputs."""
    if isinstance(network, Model):
        return [value.name for value in network.inputs]
    return [network.get_input(index).name for index in range(getattr(network, "num_inputs", 0))] or None


@contextmanager
def _on_onnxruntime(model: Model | Any, threads: int | None) -> Iterator[_Observer]:
    if not isinstance(model, Model):
        raise FastcalError(f"engine onnxruntime runs ONNX files, not a {type(model).__name__}; use engine tensorrt")
    try:
        from fastcal.observe import count  # noqa: F401 - compiled or loaded now, not with the first batch
        from fastcal.observe.with_onnxruntime import OnnxRuntimeObserver
    except ModuleNotFoundError as error:
        raise missing("engine onnxruntime", error) from error
    with OnnxRuntimeObserver(model, threads) as observer:
        yield observer


@contextmanager
def _on_tensorrt(network: Any, feed: Feed, tf32: bool, level: int | None, tactic_sources: Any) -> Iterator[_Observer]:
    if level is None:
        level = int((length(feed) or 0) * feed.batch_size >= _MANY)
    try:
        gpu = resolve("cuda") if feed.gpu is None else feed.gpu
    except FastcalError as error:
        raise FastcalError(f"engine tensorrt: {error}; engine onnxruntime works here") from error
    import cupy

    from fastcal.observe.with_tensorrt import TensorRTObserver

    with (
        cupy.cuda.Device(gpu),
        TensorRTObserver(network, tf32=tf32, optimization_level=level, tactic_sources=tactic_sources) as observer,
    ):
        yield observer


def _tensorrt_version(asked: str | None) -> str:
    if asked is not None:
        return check_tensorrt_version(asked)
    installed = installed_tensorrt_version()
    if installed is not None:
        return check_tensorrt_version(installed)
    _log.info("TensorRT is not installed here: the cache is written for TensorRT %s", DEFAULT_TENSORRT_VERSION)
    return DEFAULT_TENSORRT_VERSION


def _kept(timeline: list[Progress], progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """A function that keeps what it is told, and tells `progress`."""

    def keep(state: Progress) -> None:
        timeline.append(replace(state))
        if progress is not None:
            progress(state)

    return keep


def timed(
    feed: Feed, progress: Callable[[Progress], None], enough: Callable[[int], bool]
) -> Generator[Mapping[str, Any], None, None]:
    """The feed's batches until there were enough images, and a report after each has been used.

    Ends the feed's pass when closed.
    """
    state = Progress(total=length(feed))
    start = time.perf_counter()
    batches = iter(feed)
    try:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            state.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch
            state.batches += 1
            if state.total is not None:
                state.total = length(feed)  # less where samples were skipped
            state.images += max((array.shape[0] for array in batch.values() if array.shape), default=0)
            state.seconds = time.perf_counter() - start
            progress(state)
            if enough(state.images):
                return
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _warn_of_nonfinite(histograms: Mapping[str, Histogram]) -> None:
    bad = {name: histogram for name, histogram in histograms.items() if histogram.nan or histogram.inf}
    if bad:
        shown = [f"{name} ({histogram.nan} NaN, {histogram.inf} Inf)" for name, histogram in list(bad.items())[:5]]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        _log.warning("left NaN and Inf out of the histograms of %s%s", ", ".join(shown), more)
