"""A network observed by Ray actors that share its batches: the driver's side."""

import contextlib
import logging
import math
import os
import socket
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fastcal.definition import Network
from fastcal.errors import DataError, FastcalError, ModelError, UnavailableError, check_range
from fastcal.feed.feed import Feed, length
from fastcal.model import Model
from fastcal.observe.backends import (
    Backend,
    Enough,
    LocalBackend,
    OnnxRuntimeBackend,
    Report,
    choose_backend,
    has_cuda_provider,
    unknown_to_onnxruntime,
)
from fastcal.observe.histogram import Histogram, Observations
from fastcal.observe.ray_worker import Counted, Worker
from fastcal.progress import Progress

#: The fewest batches of a share, to outweigh a feed's start and a result's transfer: 0.03 to 0.14 s on an H200, where a
#: batch of ResNet-50's takes 0.035 s.
_FEWEST = 4

#: The most batches of a share, or the seconds that they take if these allow more: another worker counts them again if
#: one dies.
_MOST, _MOST_SECONDS = 64, 10.0

#: The part of the batches that are left to give to workers at once: the rest makes up for their unequal speeds.
_AT_ONCE = 0.75

#: The number of workers that may die over the same batches.
_ATTEMPTS = 3

#: Seconds to wait for a cluster that may not exist, and for the first worker before the log says so.
_PATIENCE_SECONDS = 10.0

#: Ray's exceptions for a result that is lost though the work itself is sound.
_LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)

#: The numbers of the batches that every worker begins with: their ranges, and whether all workers count the same.
_FIRST = range(1)

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class RayBackend(Backend):
    """Ray actors that share a feed's batches and use one of `backends`, the one `asked` for by name, or "auto".

    The first batch sets the ranges of the tensors, and every worker observes it when it starts. A worker is then given
    one share after another: successive batches, and the ranges that are known. It counts from these ranges on, and
    `Histogram.append` puts its counts together with those of the shares before. If a tensor's range was not known to
    the worker (the tensor was 0 in all batches so far) and an earlier share has set the range meanwhile, the share is
    counted again. A share counts as a whole or not at all, so another worker repeats the share of one that died.
    """

    workers: int
    address: str | None
    asked: str
    backends: Mapping[str, LocalBackend]
    threads: int | None = None
    name = "ray"

    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe a network: see `Backend.observe`. Raises the error of the first batch in order that goes wrong."""
        check_range("workers", self.workers, 1)
        if not isinstance(network, Model):
            raise ModelError("workers run ONNX files, not an INetworkDefinition; leave workers out")
        feed.part(_FIRST, gpu=None, threads=1)  # raises before Ray is started if the feed cannot be divided
        if length(feed) is None:
            raise DataError("workers must know how many batches there are, and the feed does not; leave workers out")
        with _connected(self.address, self.workers):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = sum(int(node.get("GPU", 0)) for node in nodes)
            name, has_provider = _survey(self.asked, bool(unknown_to_onnxruntime(network)), gpus)
            backend = self.backends[name]
            on_gpus = gpus > 0 and (name == "tensorrt" or has_provider or feed.gpu is not None)
            threads = self.threads or cpus_each(nodes, self.workers, on_gpus)
            if isinstance(backend, OnnxRuntimeBackend):
                backend = replace(backend, threads=threads, tf32=backend.tf32 and on_gpus and has_provider)
            found = _Crew(_Job(network, feed, backend, self.workers, threads, on_gpus), progress).observe()
        return Observations(
            network.label, backend.name, backend.precision, found.histograms, found.shared_scales, found.timeline,
            network.least_thresholds,
        )  # fmt: skip


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    """Connect this process to Ray, unless it is connected already, for the time of the context."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    resources: dict[str, Any] = {}
    if address == "local":  # there may be more workers than cores
        resources = {"num_cpus": max(workers, len(os.sched_getaffinity(0))), "include_dashboard": False}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray waits for ever for a cluster that does not exist
            socket.create_connection((host.removeprefix("ray://"), int(port)), _PATIENCE_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **resources)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UnavailableError(
            f"cannot connect to Ray at {address}: {_last_line(error)}; `ray start --head` starts a cluster, and "
            "without an address Ray is started here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _survey(asked: str, needs_tensorrt: bool, gpus: int) -> tuple[str, bool]:
    """Return the name of the backend that all workers use, and whether a node with a GPU has the CUDA provider."""
    if gpus > 0:
        found: tuple[str, bool] = ray.get(ray.remote(num_gpus=1)(_found_here).remote(asked, needs_tensorrt))
        return found
    if asked == "tensorrt":
        raise UnavailableError("backend tensorrt needs GPUs, and the Ray cluster has none; use backend onnxruntime")
    return "onnxruntime", False


def _found_here(asked: str, needs_tensorrt: bool) -> tuple[str, bool]:
    return choose_backend(asked, needs_tensorrt), has_cuda_provider()


def cpus_each(nodes: Sequence[Mapping[str, float]], workers: int, on_gpus: bool) -> int:
    """Return the most CPUs that each worker can have if all workers are to have room; 1 if there is no such number."""
    most = [int(node.get("GPU", 0)) if on_gpus else workers for node in nodes]
    cores = [int(node.get("CPU", 0)) for node in nodes]

    def room(cpus: int) -> int:
        return sum(min(has // cpus, limit) for has, limit in zip(cores, most, strict=True))

    return next((cpus for cpus in range(max(cores), 1, -1) if room(cpus) >= workers), 1)


@dataclass(frozen=True)
class _Job:
    """The work of a crew: batches through a model, by workers with this number of CPUs each, and a GPU if `on_gpus`."""

    model: Model
    feed: Feed
    backend: LocalBackend
    workers: int
    threads: int
    on_gpus: bool


class _Tally:
    """The counts of all shares, put together in the batches' order."""

    def __init__(self, total: int) -> None:
        self.histograms: dict[str, Histogram] = {}
        self.shared_scales: Mapping[str, str] = {}
        self.state = Progress(total=total)
        self.timeline: list[Progress] = []
        self._waiting: dict[int, Counted | FastcalError] = {}  # by first batch, until those before are present
        self._first: Mapping[str, float] | None = None  # the first batch's maxima, by tensor name
        self._started = 0.0

    def keep(self, batches: range, counted: Counted | FastcalError) -> None:
        """Keep the result of a share. Every worker counts the first batch; the result that comes first is used."""
        if batches != _FIRST or isinstance(counted, FastcalError):
            self._waiting[batches.start] = counted
            return
        maxima = {name: histogram.amax for name, histogram in counted.histograms.items()}
        if self._first is None:
            self._first, self.shared_scales = maxima, counted.shared_scales
            self._started = time.perf_counter() - counted.progress.seconds
            self._waiting[_FIRST.start] = counted
        elif maxima != self._first:
            _log.warning(
                "workers find other values in the same batch: their machines or libraries differ, and the scales may "
                "differ in the last digits from those of one process"
            )

    def add_up(self, workers: int, report: Report) -> range | None:
        """Put the counts together that come next in the batches' order, or raise the error that comes next.

        Return batches to count again, if a tensor's range was not known to the worker that counted them.
        """
        while (counted := self._waiting.pop(self.state.batches, None)) is not None:
            if isinstance(counted, FastcalError):
                raise counted.with_traceback(None)
            start, done = self.state.batches, counted.progress
            pairs = [(self.histograms.setdefault(name, Histogram()), part) for name, part in counted.histograms.items()]
            if not all(histogram.can_append(part) for histogram, part in pairs):
                return range(start, start + done.batches)
            for histogram, part in pairs:
                histogram.append(part)
            self.state.batches += done.batches
            self.state.images += done.images
            self.state.waited += done.waited / workers
            self.state.seconds = time.perf_counter() - self._started
            self.timeline.append(replace(self.state))
            report(self.state)
        return None


class _Crew:
    """Gives shares of the batches to workers until all are counted."""

    def __init__(self, job: _Job, report: Report) -> None:
        self._job = job
        self._report = report
        self._tally = _Tally(len(job.feed))
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, range]] = {}  # the worker and its batches, by the reference to the result
        self._again: list[range] = []
        self._next = _FIRST.stop
        self._deaths: Counter[int] = Counter()  # by the first of the batches
        self._notes: set[tuple[str, int, str]] = set()

    def observe(self) -> _Tally:
        """Count all batches with new workers, and end those."""
        try:
            for _ in range(self._job.workers):
                self._start_worker()
            ready, _ = ray.wait(list(self._running), timeout=_PATIENCE_SECONDS)
            if not ready:
                _log.info("waiting for Ray to start a worker with %s CPUs", self._job.threads)
            while self._tally.state.batches < len(self._job.feed):
                (reference,), _ = ray.wait(list(self._running))
                actor, batches = self._running.pop(reference)
                try:
                    self._tally.keep(batches, self._result(reference))
                    self._idle.append(actor)
                except _LOST as error:
                    self._replace(actor, batches, error)
                again = self._tally.add_up(self._job.workers, self._report)
                if again is not None:
                    self._again.append(again)
                self._give_out()
        finally:
            for actor in self._actors:
                ray.kill(actor)
        return self._tally

    def _start_worker(self) -> None:
        job = self._job
        worker = ray.remote(Worker).options(
            num_cpus=job.threads, num_gpus=int(job.on_gpus),
            scheduling_strategy="SPREAD",  # so that nodes share the reading too
        )  # fmt: skip
        self._actors.append(worker.remote(os.getcwd(), str(job.model.path), job.model.digest, job.backend))
        self._give(self._actors[-1], _FIRST, {})

    def _replace(self, actor: Any, batches: range, error: Exception) -> None:
        """Have another worker count the batches of a worker that died."""
        ray.kill(actor)
        self._actors.remove(actor)
        self._deaths[batches.start] += 1
        named = f"batches {batches.start} to {batches.stop - 1}"
        if self._deaths[batches.start] == _ATTEMPTS:
            text = f"{_ATTEMPTS} workers died over {named}: {_last_line(error)}; Ray's logs tell more"
            raise UnavailableError(text) from error
        _log.warning("a worker died over %s, which are counted again: %s", named, _last_line(error))
        if batches != _FIRST:  # every worker begins with these
            self._again.append(batches)
        self._start_worker()

    def _result(self, reference: Any) -> Counted | FastcalError:
        try:
            counted: Counted = ray.get(reference)
        except RayTaskError as error:
            if not isinstance(error.cause, FastcalError):
                raise
            return error.cause
        for note in counted.notes:
            if note not in self._notes:  # several workers say the same
                self._notes.add(note)
                name, level, text = note
                logging.getLogger(name).log(level, "%s", text)
        return counted

    def _give_out(self) -> None:
        """Give the idle workers shares, once the first batch has set the ranges."""
        starts = {name: histogram.range for name, histogram in self._tally.histograms.items()}
        self._again.sort(key=lambda batches: -batches.start)
        while self._tally.state.batches and self._idle and (self._again or self._next < len(self._job.feed)):
            self._give(self._idle.pop(), self._again.pop() if self._again else self._next_share(), starts)

    def _give(self, actor: Any, batches: range, starts: Mapping[str, float]) -> None:
        gpu = 0 if self._job.on_gpus else None  # Ray shows a worker its own GPU alone
        part = self._job.feed.part(batches, gpu=gpu, threads=self._job.threads)
        self._running[actor.count.remote(part, starts)] = actor, batches

    def _next_share(self) -> range:
        """Return the next batches; few at the end, so that all workers end about together."""
        left, workers, state = len(self._job.feed) - self._next, self._job.workers, self._tally.state
        most = max(_MOST, int(_MOST_SECONDS * state.batches / (state.seconds * workers)))
        size = min(left, max(_FEWEST, min(most, math.ceil(_AT_ONCE * left / workers))))
        self._next += size
        return range(self._next - size, self._next)


def _last_line(error: Exception) -> str:
    """Return the last line of an error of Ray's; some have a page of text."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[-1], 200)
