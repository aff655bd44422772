"""A network observed by Ray actors that share its batches: what each counts is put together in the batches' order."""

import contextlib
import logging
import math
import os
import socket
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fastcal.definition import Network
from fastcal.errors import DataError, FastcalError, ModelError, UnavailableError, check_range
from fastcal.feed.feed import Feed, length
from fastcal.model import Model
from fastcal.observe.backends import Backend, Enough, LocalBackend, OnnxRuntimeBackend, choose_backend, timed
from fastcal.observe.histogram import Histogram
from fastcal.observe.observations import Observations
from fastcal.progress import Progress

#: How many seconds' work a worker is given at once: enough to make light of what a new feed costs, and of the result's
#: way; and not so much that it hurts to do it again.
_SECONDS = 5.0

#: How much more than the last time a worker is given at most: the first batches may take longer than those to come.
_GROWTH = 4

#: How many shares per worker may be under way or wait for one before them; bounds the driver's memory.
_SHARES = 4

#: How often a share is tried when its workers die.
_TRIES = 3

#: How long to wait for the first worker before saying so.
_PATIENCE_SECONDS = 10.0

#: What Ray raises for a result that will not come, or no more, though nothing is wrong with the work itself.
_LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)

#: The numbers of the batches that every worker begins with: they tell it the ranges, and whether it counts as others.
_FIRST = range(1)

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class RayBackend(Backend):
    """Ray actors that share a feed's batches.

    Gives the histograms that one process gives, if the actors' machines compute the same activations. The first batch
    sets the ranges of the tensors, and is observed by every worker when it starts. A worker is then given a share
    after the other, each a run of successive batches, together with the ranges that are known; it counts from there,
    and `Histogram.append` puts its counts together with those of the shares before. A tensor whose range was not known
    to the worker (it was 0 in all batches so far), and was set meanwhile by a share before, makes its share be counted
    again. A share counts as a whole or not at all, so one whose worker died is given to another.

    Attributes:
        workers: The number of actors.
        address: The cluster; None for the one that RAY_ADDRESS names, else one that is started here for the time of the
            observation. Ignored if the process is connected to Ray already.
        asked: The name of the backend that the workers use; "auto" is decided on a node with a GPU if the cluster has
            one.
        backends: The local backends by name.
        threads: The number of CPUs of each worker; by default as many as leave room for all workers.
    """

    workers: int
    address: str | None
    asked: str
    backends: Mapping[str, LocalBackend]
    threads: int | None = None
    name = "ray"

    def observe(
        self, network: Network, feed: Feed, progress: Callable[[Progress], None], enough: Enough | None = None
    ) -> Observations:
        """Run a network over the batches of a feed: see `Backend.observe`.

        Raises:
            FastcalError: Feed or network cannot be divided; Ray cannot be reached; workers die again and again; or what
                a worker raises, of the first batch in order that goes wrong.
        """
        check_range("workers", self.workers, 1)
        if not isinstance(network, Model):
            raise ModelError(f"workers run ONNX files, not {network.label}; leave workers out")
        feed.part(_FIRST, gpu=None, threads=1)  # raises, before Ray is started, where it cannot be divided
        if length(feed) is None:
            raise DataError("workers must know how many batches there are, and the feed does not; leave workers out")
        timeline: list[Progress] = []

        def keep(state: Progress) -> None:
            timeline.append(replace(state))
            progress(state)

        with _connected(self.address, self.workers):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = sum(int(node.get("GPU", 0)) for node in nodes)
            backend = self.backends[_choose(self.asked, gpus)]
            on_gpus = gpus > 0 and (backend.name == "tensorrt" or feed.gpu is not None)  # images as the feed has them
            threads = self.threads or _cpus_each(nodes, self.workers, on_gpus)
            room = sum(_room(node, threads, on_gpus) for node in nodes)
            if room < self.workers:
                each = f"{threads} CPUs" + " and a GPU" * on_gpus
                _log.info("Ray has room for %d of the %d workers, with %s each", room, self.workers, each)
            if isinstance(backend, OnnxRuntimeBackend):
                backend = replace(backend, threads=threads)
            crew = _Crew(network, feed, backend, threads, self.workers, on_gpus, keep)
            try:
                histograms, shared_scales = crew.observe()
            finally:
                crew.dismiss()
        return Observations(network.label, backend.name, backend.precision, histograms, shared_scales, timeline)


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    """Within it, this process is connected to Ray."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    resources: dict[str, Any] = {}
    if address == "local":  # where workers may be more than cores
        resources = {"num_cpus": max(workers, len(os.sched_getaffinity(0))), "include_dashboard": False}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray waits for ever for what is not there
            socket.create_connection((host.removeprefix("ray://"), int(port)), _PATIENCE_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **resources)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise FastcalError(
            f"cannot connect to Ray at {address}: {_last_line(error)}; `ray start --head` starts a cluster, and "
            "without an address Ray is started here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _choose(asked: str, gpus: int) -> str:
    """Return the name of the backend that all workers use."""
    if gpus == 0:
        if asked == "tensorrt":
            raise UnavailableError("backend tensorrt needs GPUs, and the Ray cluster has none; use backend onnxruntime")
        return "onnxruntime"
    if asked != "auto":
        return asked
    chosen: str = ray.get(ray.remote(num_gpus=1)(choose_backend).remote("auto", True))
    return chosen


def _cpus_each(nodes: Sequence[Mapping[str, float]], workers: int, on_gpus: bool) -> int:
    """The most CPUs that each worker can have if all are to have room; 1 where there is no room for all."""
    most = max(int(node.get("CPU", 0)) for node in nodes)
    fitting = (cpus for cpus in range(most, 1, -1) if sum(_room(node, cpus, on_gpus) for node in nodes) >= workers)
    return next(fitting, 1)


def _room(node: Mapping[str, float], cpus: int, on_gpus: bool) -> int:
    """How many workers with so many CPUs each a node has room for."""
    room = int(node.get("CPU", 0)) // cpus
    return min(room, int(node.get("GPU", 0))) if on_gpus else room


@dataclass(frozen=True)
class _Counted:
    """What a worker counted.

    Attributes:
        histograms: By tensor name.
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.
        progress: How many batches it was, and how long it took.
        notes: What was logged meanwhile: logger, level and text.
    """

    histograms: Mapping[str, Histogram]
    shared_scales: Mapping[str, str]
    progress: Progress
    notes: Sequence[tuple[str, int, str]]


class _Worker:
    """What a Ray actor does: it observes the network over the batches it is given.

    Args:
        folder: The driver's working folder, which relative paths are relative to.
    """

    def __init__(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # without it only absolute paths are found, and the others are reported
            os.chdir(folder)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
        node = names[ray.get_runtime_context().get_node_id()]
        self._where = f"on node {node}: " if len(names) > 1 else ""
        self._notes = _Notes()
        logger = logging.getLogger("fastcal")
        logger.addHandler(self._notes)
        logger.setLevel(logging.INFO)

    def start(self, path: str, digest: str, backend: LocalBackend, first: Feed) -> _Counted:
        """Start the backend, and observe the first batches."""
        with self._named_errors():
            model = Model(path)
            if model.digest != digest:
                raise ModelError(f"{path} is another model than where the calibration was started; copy it anew")
            self._observing = backend.observer(model, first.gpu)
            self._observer = self._observing.__enter__()  # for good: the process ends with the worker
            return self._observe(first)

    def count(self, part: Feed, starts: Mapping[str, float]) -> _Counted:
        """Observe the batches of `part` from these ranges on."""
        with self._named_errors():
            self._observer.begin(starts)
            return self._observe(part)

    def _observe(self, part: Feed) -> _Counted:
        states = [Progress()]
        with part:
            with timed(part, states.append) as batches:
                for batch in batches:
                    self._observer.observe(batch)
            # Before the feed's buffers, which may be read still, are gone.
            histograms = dict(self._observer.histograms())
        state = states[-1]
        if state.batches != len(part):
            raise DataError(f"the feed gave {state.batches} of {len(part)} batches; leave workers out")
        return _Counted(histograms, self._observer.shared_scales, state, self._notes.take())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors say which node they come from, where there are several."""
        try:
            yield
        except FastcalError as error:
            error.args = (f"{self._where}{error}",)
            raise


class _Notes(logging.Handler):
    """Keeps what is logged until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        kept, self._kept = self._kept, []
        return kept


@dataclass(frozen=True)
class _Task:
    """Batches that a worker is to count, and the how manieth try it is."""

    batches: range
    attempt: int = 1


class _Crew:
    """The driver's side: gives shares of the batches to workers, and puts together what they count.

    Args:
        model: The network.
        feed: The batches.
        backend: What runs the network.
        threads: The number of CPUs of each worker.
        workers: How many workers there are to be.
        on_gpus: Whether each has a GPU.
        progress: Called when a share has been added.
    """

    def __init__(
        self,
        model: Model,
        feed: Feed,
        backend: LocalBackend,
        threads: int,
        workers: int,
        on_gpus: bool,
        progress: Callable[[Progress], None],
    ) -> None:
        self._model = model
        self._feed = feed
        self._backend = backend
        self._threads = threads
        self._workers = workers
        self._on_gpus = on_gpus
        self._report = progress
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._paces: dict[Any, Progress] = {}  # what each worker did last
        self._running: dict[Any, tuple[Any, _Task]] = {}  # by the reference to the result
        self._again: list[_Task] = []
        self._next = _FIRST.stop
        self._counted: dict[int, _Counted | FastcalError] = {}  # by first batch, until those before are there
        self._total: dict[str, Histogram] = {}
        self._first: Mapping[str, float] | None = None  # the first batch's maxima, by tensor name
        self._shared_scales: Mapping[str, str] = {}
        self._notes: set[tuple[str, int, str]] = set()
        self._state = Progress(total=len(feed))
        self._started = 0.0

    def observe(self) -> tuple[Mapping[str, Histogram], Mapping[str, str]]:
        """Count all batches; returns the histograms and the shared scales."""
        for _ in range(self._workers):
            self._start_worker(_Task(_FIRST))
        while self._state.batches < len(self._feed):
            reference = self._wait()
            actor, task = self._running.pop(reference)
            try:
                self._take(actor, task, ray.get(reference))
            except _LOST as error:
                self._replace(actor, task, error)
            except RayTaskError as error:
                if not isinstance(error.cause, FastcalError):
                    raise
                if task.batches == _FIRST:
                    raise error.cause.with_traceback(None) from None
                self._counted[task.batches.start] = error.cause
                self._idle.append(actor)
            self._add_up()
            self._give_out()
        return self._total, self._shared_scales

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def _start_worker(self, task: _Task) -> None:
        resources = {"num_cpus": self._threads} | ({"num_gpus": 1} if self._on_gpus else {})
        # Spread, so that nodes share the reading too.
        actor = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **resources).remote(os.getcwd())
        self._actors.append(actor)
        model = str(self._model.path), self._model.digest
        reference = actor.start.remote(*model, self._backend, self._part(task.batches))
        self._running[reference] = actor, task

    def _part(self, batches: range) -> Feed:
        gpu = 0 if self._on_gpus else None  # Ray shows a worker its own GPU alone
        return self._feed.part(batches, gpu=gpu, threads=self._threads)

    def _wait(self) -> Any:
        """The next reference whose result is there, or will never be."""
        running = list(self._running)
        if not self._paces:
            ready, _ = ray.wait(running, timeout=_PATIENCE_SECONDS)
            if ready:
                return ready[0]
            _log.info("waiting for Ray to start a worker with %s CPUs", self._threads)
        return ray.wait(running)[0][0]

    def _take(self, actor: Any, task: _Task, counted: _Counted) -> None:
        """Keep what a worker counted."""
        self._idle.append(actor)
        self._paces[actor] = counted.progress
        for note in counted.notes:
            if note not in self._notes:  # several workers say the same
                self._notes.add(note)
                name, level, text = note
                logging.getLogger(name).log(level, "%s", text)
        if task.batches != _FIRST:
            self._counted[task.batches.start] = counted
            return
        maxima = {name: histogram.amax for name, histogram in counted.histograms.items()}
        if self._first is None:
            self._first, self._shared_scales = maxima, counted.shared_scales
            self._started = time.perf_counter() - counted.progress.seconds
            self._counted[_FIRST.start] = counted
        elif maxima != self._first:
            _log.warning(
                "workers find other values in the same batch: their machines or libraries differ, and the scales may "
                "differ in the last digits from those of one process"
            )

    def _replace(self, actor: Any, task: _Task, error: Exception) -> None:
        """Have a dead worker's batches done by another."""
        ray.kill(actor)
        self._actors.remove(actor)
        self._paces.pop(actor, None)
        batches = f"batches {task.batches.start} to {task.batches.stop - 1}"
        if task.attempt == _TRIES:
            raise FastcalError(
                f"{_TRIES} workers died over {batches}: {_last_line(error)}; Ray's logs tell more"
            ) from error
        _log.warning("a worker died over %s, which are counted again: %s", batches, _last_line(error))
        task = replace(task, attempt=task.attempt + 1)
        if task.batches == _FIRST:
            self._start_worker(task)
        else:
            self._again.append(task)
            self._start_worker(_Task(_FIRST))

    def _add_up(self) -> None:
        """Put the counts together that come next in the batches' order."""
        while (counted := self._counted.pop(self._state.batches, None)) is not None:
            if isinstance(counted, FastcalError):
                raise counted.with_traceback(None)
            start, done = self._state.batches, counted.progress
            for name in counted.histograms:
                self._total.setdefault(name, Histogram())
            if not all(self._total[name].fits(histogram) for name, histogram in counted.histograms.items()):
                self._again.append(_Task(range(start, start + done.batches)))
                return
            for name, histogram in counted.histograms.items():
                self._total[name].append(histogram)
            self._state.batches += done.batches
            self._state.images += done.images
            self._state.waited += done.waited / self._workers
            self._state.seconds = time.perf_counter() - self._started
            self._report(self._state)

    def _give_out(self) -> None:
        """Give the idle workers what is to do, once the first batch has set the ranges."""
        if not self._state.batches:
            return
        starts = {name: histogram.range for name, histogram in self._total.items()}
        self._again.sort(key=lambda task: -task.batches.start)
        while self._idle:
            if self._again:
                task = self._again.pop()
            elif self._next < len(self._feed) and len(self._running) + len(self._counted) < _SHARES * self._workers:
                stop = self._next + self._size(self._paces[self._idle[-1]])
                task = _Task(range(self._next, stop))
                self._next = stop
            else:
                return
            actor = self._idle.pop()
            self._running[actor.count.remote(self._part(task.batches), starts)] = actor, task

    def _size(self, last: Progress) -> int:
        """How many batches a worker is given that did `last` before.

        So many as take it some seconds, but no more than let all workers end at about the same time.
        """
        left = len(self._feed) - self._next
        pace = last.batches / max(last.seconds, 1e-9)
        even = math.ceil(left / (2 * self._workers - 1))
        return max(1, min(_GROWTH * last.batches, round(pace * _SECONDS), even))


def _last_line(error: Exception) -> str:
    """What an error of Ray's comes down to; some have a page of text."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[-1], 200)
