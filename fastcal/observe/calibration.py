"""`calibrate`: batches through the network, histograms of what is seen there, scales, cache."""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from contextlib import closing
from typing import Any

from fastcal.cache import DEFAULT_TENSORRT_VERSION, CalibrationCache, check_tensorrt_version, installed_tensorrt_version
from fastcal.errors import FastcalError
from fastcal.model import Model
from fastcal.observe.histogram import Histogram, Histograms
from fastcal.observe.runner import OnnxRuntimeRunner
from fastcal.observe.scales import check_algorithm, pick_scales
from fastcal.progress import Progress
from fastcal.record import Record

#: The cutoff at which TensorRT's Legacy calibration is a plain percentile.
_NO_REGRESSION = 1.0

_log = logging.getLogger("fastcal")


def calibrate(
    model: str | os.PathLike[str] | Model,
    feed: Iterable[Mapping[str, Any]],
    *,
    algorithm: str = "entropy2",
    quantile: float = 0.9999,
    tensorrt_version: str | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CalibrationCache:
    """Pick the INT8 scales of a network's tensors, those that TensorRT's own calibration would pick.

    Runs the ONNX model with ONNX Runtime on the CPU, in float32, with every activation visible; one batch is in memory
    at a time. The scales equal TensorRT's to the last bit where the activations do. Tensors that TensorRT's parser adds
    under names of its own (constants, the parts of a Gemm) are not in the cache.

    Args:
        model: The ONNX file.
        feed: Batches: dicts of arrays by input name, e.g. an `ImageFeed`. The first dimension counts samples.
        algorithm: "entropy2" (TensorRT's recommendation for convolutional networks), "entropy", "minmax" or
            "percentile".
        quantile: For "percentile", the share of values that is not clipped.
        tensorrt_version: The TensorRT that will read the cache, e.g. "10.3.0". By default the one installed here, else
            10.16.1.
        threads: How many threads run the network and count; by default one per core that this process may use.
        progress: Called after every batch.

    Returns:
        The cache; `cache.save(path)` writes it.

    Raises:
        FastcalError: The model cannot be loaded or run, or the batches do not fit it; or what the feed raises.
    """
    check_algorithm(algorithm, quantile)
    version = _tensorrt_version(tensorrt_version)
    model = Model.of(model)
    settings = {"quantile": quantile, "regression_cutoff": _NO_REGRESSION} if algorithm == "percentile" else {}
    record = Record.of(feed, model, algorithm=algorithm, **settings)
    with (
        OnnxRuntimeRunner(model, threads) as runner,
        Histograms(threads) as histograms,
        closing(_timed(feed, progress)) as batches,
    ):
        for batch in batches:
            arrays = model.match(batch, anonymous=getattr(feed, "anonymous", False))
            histograms.update_all(runner.run(arrays))
    if not histograms:
        raise FastcalError("the feed gave no batches; a calibration needs at least one")
    _warn_of_nonfinite(histograms)
    scales = pick_scales(histograms, algorithm, quantile)
    scales |= {name: scales[source] for name, source in model.sources.items() if name in scales and source in scales}
    if algorithm == "percentile":
        return CalibrationCache(scales, algorithm, None, quantile=quantile, cutoff=_NO_REGRESSION, record=record)
    return CalibrationCache(scales, algorithm, version, record=record)


def _tensorrt_version(asked: str | None) -> str:
    if asked is not None:
        return check_tensorrt_version(asked)
    installed = installed_tensorrt_version()
    if installed is not None:
        return check_tensorrt_version(installed)
    _log.info("TensorRT is not installed here: the cache is written for TensorRT %s", DEFAULT_TENSORRT_VERSION)
    return DEFAULT_TENSORRT_VERSION


def _timed(
    feed: Iterable[Mapping[str, Any]], progress: Callable[[Progress], None] | None
) -> Generator[Mapping[str, Any], None, None]:
    """The feed's batches, and a report after each has been used; ends the feed's pass when closed."""
    state = Progress(total=len(feed) if isinstance(feed, Sized) else None)
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
            state.images += max((array.shape[0] for array in batch.values() if array.shape), default=0)
            state.seconds = time.perf_counter() - start
            if progress is not None:
                progress(state)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _warn_of_nonfinite(histograms: Mapping[str, Histogram]) -> None:
    bad = {name: histogram for name, histogram in histograms.items() if histogram.nan or histogram.inf}
    if bad:
        shown = [f"{name} ({histogram.nan} NaN, {histogram.inf} Inf)" for name, histogram in list(bad.items())[:5]]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        _log.warning("left NaN and Inf out of the histograms of %s%s", ", ".join(shown), more)
