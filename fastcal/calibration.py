"""`calibrate`: batches through a network, histograms of its tensors, scales, a cache."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm, fault_of_scale
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.histograms import reuse_histograms, save_histograms
from fastcal.cache.record import Record, check_cache_writable, read_record, why_no_record
from fastcal.definition import Definition, Network, as_network
from fastcal.dla import check_target, for_dla
from fastcal.errors import MOST_THREADS, DataError, FastcalError, ModelError, check_range, first_few, missing
from fastcal.feed.arrays import as_feed
from fastcal.feed.feed import Feed
from fastcal.feed.sampled import HELD_OUT, Sampled
from fastcal.files import check_writable
from fastcal.model import FLOATS, Model
from fastcal.observe.backends import (
    Backend,
    LocalBackend,
    OnnxRuntimeBackend,
    TensorRTBackend,
    choose_backend,
    unknown_to_onnxruntime,
)
from fastcal.observe.histogram import Histogram, Observations
from fastcal.progress import Progress
from fastcal.stability import StabilityCheck
from fastcal.versions import cache_version

_log = logging.getLogger("fastcal")


def calibrate(
    model: Any,
    feed: Any,
    *,
    algorithm: str | Algorithm = "entropy2",
    quantile: float = DEFAULT_QUANTILE,
    exact: bool = False,
    backend: str = "auto",
    tf32: bool = False,
    optimization_level: int | None = None,
    tactic_sources: int | Iterable[str] | None = None,
    tensorrt_version: str | None = None,
    threads: int | None = None,
    memory: int | None = None,
    until_stable: float | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    histograms: str | os.PathLike[str] | None = None,
    target: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CalibrationCache:
    """Pick the INT8 scales of a network's tensors; with `exact`, those that TensorRT's own calibration would pick.

    The network runs in float32 with every tensor visible, with ONNX Runtime on a GPU or the CPU, or with TensorRT. One
    batch is in memory at a time. If a batch's tensors do not fit the memory together, the network runs in segments one
    after another on the CPU, and several times over the batch on a GPU. With `exact`, the scales equal TensorRT's to
    the last bit if the tensors' values do. With TensorRT the cache holds every tensor that TensorRT asks for; with ONNX
    Runtime it lacks those that TensorRT's parser adds under names of its own (constants, the parts of a Gemm), which
    `build_engine` and the calibrators add.

    Args:
        model: The ONNX file; for TensorRT also a `tensorrt.INetworkDefinition`.
        feed: The batches: a `Feed`, for instance an `ImageFeed`; or anything that `ArrayFeed` takes, named after the
            network's inputs, in batches of any size.
        algorithm: "entropy2" (which TensorRT recommends for convolutional networks), "entropy", "minmax", "percentile",
            "mse" (least error), "best" (those of these scales that cost the outputs least on samples that are held
            out, a quarter and at most 32), or an `Algorithm`.
        quantile: For "percentile", the share of values that is not clipped.
        exact: Whether to clip the network's outputs and the tensors with a known range as TensorRT does, too. By
            default their scales cover the largest |x|, or 1 behind a Sigmoid or Tanh, and the log names the tensors for
            which that makes a difference. An `Algorithm` says so itself.
        backend: What runs the network: "onnxruntime" (on a GPU if one, CuPy and onnxruntime-gpu are present),
            "tensorrt", or "auto": ONNX Runtime; but TensorRT if a GPU and TensorRT before 11 are present and ONNX
            Runtime cannot run the network, or has no CUDA provider.
        tf32: On a GPU: allow factors to be rounded to TF32, which is faster. An amax then differs by about 1e-3.
        optimization_level: For TensorRT: 0 (the engine is built fastest) to 5 (the engine runs fastest). By default 0,
            or 1 for feeds of 100,000 samples or more. From 1 on TensorRT picks kernels by timing them, for each worker
            anew, so the workers' activations may differ in the last bits.
        tactic_sources: For TensorRT: names of `tensorrt.TacticSource`, or their bits; by default TensorRT's own.
        tensorrt_version: The TensorRT that will read the cache, e.g. "10.3.0". By default the installed one, else
            10.16.1.
        threads: On the CPU: the number of threads that run the network and count; by default one per core that this
            process may use. Workers share the CPUs of their machines.
        memory: On the CPU: the bytes that the tensors of a segment of the network may take together; by default 2 GiB,
            or 70 % of what is free if that is less. The values are the same. A node whose outputs take more than that
            is a segment of its own.
        until_stable: Stop when no scale has moved by more than this percentage at three checks in a row; each check
            comes after a tenth more images than the one before. By default all batches are used.
        workers: The number of Ray actors that share the batches (`pip install ray`), with a GPU each if
            the cluster has GPUs; by default this process does everything. The cache is the same, to the last bit if
            the workers' machines compute the same activations. The feed must be divisible, an `ImageFeed` for
            instance, and every worker must find the model and the images at their paths.
        ray_address: The Ray cluster to connect to: "auto" for one that runs on this machine, or "host:port"; by default
            the environment variable RAY_ADDRESS, else Ray is started on this machine for the time of the calibration.
            Ignored if the program is connected to Ray already.
        cache: A file to keep the cache in. If it is up to date (made from the same model, samples and settings, by the
            record beside it), it is returned and the network does not run; else it is replaced when the new one is
            complete, and the log names the difference.
        histograms: An .npz file to keep the histograms in, for other algorithms. If they are up to date, scales are
            picked from them and the network does not run; else they are replaced when the new ones are complete.
        target: None for a GPU, or "dla": the scales are equal where NVIDIA's DLA needs equal ones, see `for_dla`. Only
            for an ONNX file.
        progress: Called after every batch; with workers after every few seconds' work of a worker.

    Returns:
        The cache; `cache.save(path)` writes it. `cache.observed` has the histograms that the scales were picked from,
        or is None if the cache was reused.

    Raises:
        ModelError: The model cannot be loaded or run.
        DataError: The batches do not fit the model.
        UnavailableError: The backend needs a package or a GPU that is missing.
        FastcalError: A setting is out of range.
        Exception: As the feed.
    """
    picked = Algorithm.of(algorithm, quantile, exact=exact)
    check_target(target, picked)
    check_range("threads", threads, 1, MOST_THREADS)
    check_range("memory", memory, 1)
    if until_stable is not None and not until_stable > 0:
        raise FastcalError(f"until_stable is {until_stable}; it is a percentage above 0, 1 for instance")
    if until_stable is not None and workers is not None:
        raise FastcalError("until_stable looks at the batches one after another; leave it or workers out")
    if ray_address is not None and workers is None:
        raise FastcalError(f"ray_address is {ray_address}, and without workers there is nothing to do there; set both")
    version = cache_version(tensorrt_version)
    network = as_network(model)
    local: Mapping[str, LocalBackend] = {
        "onnxruntime": OnnxRuntimeBackend(threads, tf32, memory),
        "tensorrt": TensorRTBackend(tf32, optimization_level, tactic_sources),
    }
    runner: Backend = local[_choose_backend(backend, network)]
    if workers is not None:
        try:
            from fastcal.observe.with_ray import RayBackend
        except (Exception, SystemExit) as error:
            raise missing("a calibration with workers", error) from error
        runner = RayBackend(workers, ray_address, backend, local, threads)
    if picked.is_measured and (workers is not None or not isinstance(network, Model)):
        raise FastcalError("algorithm best runs an ONNX file in INT8 in this process; choose another, or tune the file")
    with as_feed(feed, network, runner.device) as batches:
        calibration = Calibration(
            batches, picked, network, runner, version, until_stable, histograms=histograms, target=target
        )
        return calibration.run(progress) if cache is None else calibration.keep(cache, progress)


@dataclass(frozen=True)
class Calibration:
    """A calibration: what it is made from, what it will write, and its run.

    Attributes:
        feed: The batches.
        algorithm: The algorithm that picks the scales.
        network: The network; None if only TensorRT knows it.
        backend: What runs the network.
        tensorrt_version: The version in the cache's header.
        until_stable: The percentage of `fastcal.calibrate`; None uses all batches.
        pick: A function that returns the name of the best algorithm and its scales, in place of algorithm "best".
        histograms: The file that keeps the histograms; None keeps none.
        target: None for a GPU, or "dla".
    """

    feed: Feed
    algorithm: Algorithm
    network: Network | None
    backend: Backend
    tensorrt_version: str
    until_stable: float | None = None
    pick: Callable[[Observations], tuple[str, dict[str, float]]] | None = None
    histograms: str | os.PathLike[str] | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self._file is None:
            raise FastcalError("a cache for the DLA needs the ONNX file; name it as the model")
        if self.algorithm.is_measured and not isinstance(self.feed, Sampled):
            assert self.network is not None
            object.__setattr__(self, "feed", Sampled(self.feed, self.network.inputs, HELD_OUT))

    @property
    def header(self) -> str:
        """The first line of the cache."""
        return self.algorithm.header(self.tensorrt_version)

    @cached_property
    def record(self) -> Record:
        """The record of the cache, known before the calibration runs."""
        digest = None if self.network is None else self.network.digest
        settings = {**self.algorithm.settings, "until_stable": self.until_stable, "precision": self.backend.precision}
        return Record.of(self.feed.describe(), digest, **settings, target=self.target)

    @property
    def _file(self) -> Model | None:
        """The network's ONNX file; None if it is not known."""
        return self.network.file if isinstance(self.network, Definition) else self.network

    def reuse(self, path: str | os.PathLike[str]) -> tuple[bytes | None, str]:
        """Return the contents of the cache at `path` and "" if it is up to date, else None and the reason."""
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None, "there is none yet"
        except OSError as error:
            return None, f"it cannot be read ({error.strerror})"
        try:
            found = CalibrationCache.from_bytes(data, str(path))
        except FastcalError as error:
            return None, str(error)
        if found.header != self.header:
            return None, f"its header is {found.header}, not {self.header}"
        if not found.scales:
            return None, "it holds no scales"
        broken = [f"{name} is {fault}" for name, fault in found.faults.items() if found.scales[name] != 0]
        if broken:
            return None, f"the scale of {first_few(broken)}"
        earlier = read_record(path, data)
        if earlier is None:
            return None, f"nothing tells what it was made from: {why_no_record(path)}"
        differences = self.record.differences(earlier)
        if self.until_stable is None and "until_stable" in earlier.entries:
            differences.append(f"until_stable ({earlier.entries['until_stable']} then: perhaps not all batches)")
        if self.target is None and "target" in earlier.entries:
            differences.append(f"target ({earlier.entries['target']} then)")
        return (None, "it was made from other " + ", ".join(differences)) if differences else (data, "")

    def keep(
        self, path: str | os.PathLike[str], progress: Callable[[Progress], None] | None = None
    ) -> CalibrationCache:
        """Return the cache at `path` if it is up to date; else run, and write the cache there. Errors: as `run`."""
        data, reason = self.reuse(path)
        if data is not None:
            _log.info("%s is reused: it was made from the same model, samples and settings", path)
            return CalibrationCache.load(path)
        _log.info("calibrating: %s is not reused, %s", path, reason)
        check_cache_writable(path, self.network.activations if isinstance(self.network, Model) else ())
        cache = self.run(progress)
        cache.save(path)
        return cache

    def cache(self, scales: dict[str, float], skipped: Sequence[str]) -> CalibrationCache:
        """Return a cache of `scales` with the calibration's header, and its record without the samples `skipped`."""
        version = self.tensorrt_version if self.algorithm.has_version else None
        return CalibrationCache(scales, self.algorithm, version, self.record.skipping(skipped))

    def run(self, progress: Callable[[Progress], None] | None = None) -> CalibrationCache:
        """Run the network over the batches, and pick its tensors' scales. `progress` and errors: as `calibrate`."""
        network = self.network
        assert network is not None
        if network.has_pairs:
            _log.warning(
                "%s has QuantizeLinear or DequantizeLinear already, and TensorRT takes the scales of those, not a "
                "cache's; calibrate the float model it was made from",
                network.label,
            )
        _ = self.record  # describes the batches as they are before the run
        observed = self._observe(progress) if self.histograms is None else self._kept(self.histograms, progress)
        _warn_of_inputs(network, observed.histograms)
        _warn_of_nonfinite(observed.histograms)
        picked, scales = self._scales(observed)
        cache = self.cache(scales, observed.skipped)
        _tell_of_ranges(picked.kept_ranges(observed))
        _warn_of_extremes(cache.scales, observed.histograms)
        if isinstance(network, Model):
            _warn_of_missing(network, cache.scales)
        assert cache.record is not None
        # Workers decide on the backend, and so on the precision, when they run.
        entries = {**cache.record.entries, "precision": observed.precision}
        record = Record(entries | ({"picked": picked.name} if self.algorithm.is_measured else {}))
        cache = replace(cache, record=record, observed=observed)
        if self.target is None:
            return cache
        assert self._file is not None
        return for_dla(self._file, cache)

    def _observe(self, progress: Callable[[Progress], None] | None) -> Observations:
        """Run the network over the batches."""
        assert self.network is not None
        enough = None if self.until_stable is None else StabilityCheck(self._stable_by, self.until_stable)
        observed = self.backend.observe(self.network, self.feed, progress or (lambda state: None), enough)
        if not observed.progress:
            raise DataError("the feed gave no batches; a calibration needs at least one")
        if not observed.histograms:
            raise ModelError(
                f"{self.network.label} has no float tensor: there is nothing to calibrate; export the network in float"
            )
        return replace(observed, skipped=tuple(self.feed.skipped))

    def _kept(self, path: str | os.PathLike[str], progress: Callable[[Progress], None] | None) -> Observations:
        """Return the histograms in a file if they are up to date; else run the network, and keep its histograms."""
        assert self.network is not None
        algorithm = {}
        if self.until_stable is not None:  # its scales have decided on the end
            algorithm = replace(self._stable_by, keeps_ranges=None).settings
        others = dict(self.record.entries)
        for name in (*self.algorithm.settings, "target"):
            others.pop(name, None)
        record = Record({**others, "backend": self.backend.name, **algorithm})
        observed, reason = reuse_histograms(path, record)
        if observed is None:
            _log.info("the network runs: the histograms in %s are not reused, %s", path, reason)
            check_writable(path, 1)
            observed = self._observe(progress)
            save_histograms(path, observed, record)
            return observed
        _log.info("the histograms in %s are reused: they were made from the same model, samples and settings", path)
        if isinstance(self.feed, Sampled):
            for _ in self.feed:  # the samples that algorithms are compared on
                pass
        return replace(observed, network=self.network.label)

    @property
    def _stable_by(self) -> Algorithm:
        """The algorithm whose scales tell when a calibration is stable."""
        return Algorithm() if self.algorithm.is_measured else self.algorithm

    def _scales(self, observed: Observations) -> tuple[Algorithm, dict[str, float]]:
        """Return the scales, and the algorithm that they are of."""
        if not self.algorithm.is_measured:
            return self.algorithm, self.algorithm.scales(observed)
        exact = not self.algorithm.keeps_ranges
        if self.pick is not None:
            name, scales = self.pick(observed)
        else:
            assert isinstance(self.network, Model)
            assert isinstance(self.feed, Sampled)
            from fastcal.tuning.choice import pick_best

            name, scales = pick_best(self.network, self.feed, observed, exact=exact)
        return Algorithm.of(name, exact=exact), scales


def _choose_backend(asked: str, network: Network) -> str:
    if isinstance(network, Definition):
        return choose_backend("tensorrt" if asked == "auto" else asked, True)
    foreign = unknown_to_onnxruntime(network)
    chosen = choose_backend(asked, bool(foreign))
    if asked == "auto" and chosen == "tensorrt":
        reason = f"cannot run {', '.join(foreign)}" if foreign else "has no CUDA provider here"
        _log.info("TensorRT runs the network: ONNX Runtime %s", reason)
    return chosen


def _tell_of_ranges(kept: Mapping[str, tuple[float, float]]) -> None:
    """Name the tensors that are not clipped though the algorithm alone would clip them."""
    if kept:
        texts = [f"{name} ({127 * before:.3g} to {127 * after:.3g})" for name, (before, after) in kept.items()]
        _log.info(
            "not clipped, as outputs or by their known range: %s; with exact (--exact) they are, as TensorRT does it",
            first_few(texts),
        )


def _warn_of_inputs(network: Network, histograms: Mapping[str, Histogram]) -> None:
    """Warn of inputs whose values are all 0, or all NaN or infinite."""
    empty = {name: histograms[name] for name in network.input_names if name in histograms and not histograms[name].amax}
    for name, found in empty.items():
        _log.warning(
            "the batches hold nothing but %s for input %r of %s, so its scale is 0: check what reads and prepares them",
            "0" if found.counts.any() else "NaN or infinite values", name, network.label,
        )  # fmt: skip


def _warn_of_extremes(scales: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
    extreme = [name for name, scale in scales.items() if scale > 1 and fault_of_scale(scale)]
    if extreme:
        _log.warning(
            "INT8 keeps nothing but the extreme values of %s: if these are a mask, clamp it in the network, to -10000 "
            "for instance",
            first_few([f"{name} ({histograms[name].amax:.3g})" for name in extreme]),
        )  # fmt: skip


def _warn_of_missing(network: Model, scales: Mapping[str, float]) -> None:
    within = [name for name in network.within if network.types.get(name) in FLOATS and name not in scales]
    if within:
        _log.warning(
            "no scale for %s: they lie in an If, a Loop or a Scan, whose layers stay in float",
            first_few(within),
        )


def _warn_of_nonfinite(histograms: Mapping[str, Histogram]) -> None:
    bad = [f"{name} ({found.nan} NaN, {found.inf} Inf)" for name, found in histograms.items() if found.nan or found.inf]
    if bad:
        _log.warning("left NaN and Inf out of the histograms of %s", first_few(bad))
