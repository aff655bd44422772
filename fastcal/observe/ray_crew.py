"""The driver's side of Ray workers: it gives them shares of the batches and puts their counts together."""

import logging
import math
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fastcal.errors import FastcalError, UnavailableError
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.backends import LocalBackend
from fastcal.observe.histogram import Histogram
from fastcal.observe.ray_worker import Counted, Worker
from fastcal.progress import Progress

#: The most batches that a worker is given at once: enough to outweigh a feed's start and the result's transfer, and
#: little enough to be done again.
_MOST = 64

#: How often Ray restarts a worker that died, and repeats the share at hand.
_RESTARTS = 2

#: Seconds to wait for the first worker before the log says so.
_PATIENCE_SECONDS = 10.0

#: Ray's exceptions for a result that is lost though the work itself is sound.
_LOST = (RayActorError, ObjectLostError, NodeDiedError, OutOfMemoryError)

#: The numbers of the batches that every worker begins with: their ranges, and whether all workers count the same.
FIRST = range(1)

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class Job:
    """The work of a crew.

    Attributes:
        model: The network.
        feed: The batches.
        backend: What runs the network.
        workers: The number of workers.
        threads: The number of CPUs of each worker.
        on_gpus: Whether each worker has a GPU.
    """

    model: Model
    feed: Feed
    backend: LocalBackend
    workers: int
    threads: int
    on_gpus: bool

    def part(self, batches: range) -> Feed:
        """Return a feed of some of the batches for a worker."""
        gpu = 0 if self.on_gpus else None  # Ray shows a worker its own GPU alone
        return self.feed.part(batches, gpu=gpu, threads=self.threads)


class Tally:
    """The counts of all shares, put together in the batches' order.

    Attributes:
        total: The histograms so far, by tensor name.
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.
        state: The progress so far.
    """

    def __init__(self, total: int) -> None:
        self.total: dict[str, Histogram] = {}
        self.shared_scales: Mapping[str, str] = {}
        self.state = Progress(total=total)
        self._waiting: dict[int, Counted | FastcalError] = {}  # by first batch, until those before are present
        self._first: Mapping[str, float] | None = None  # the first batch's maxima, by tensor name
        self._started = 0.0

    def keep(self, batches: range, counted: Counted | FastcalError) -> None:
        """Keep the result of a share; an error is raised when the share is added up.

        Every worker counts the first batch; the others' results are compared with the one that came first.
        """
        if batches != FIRST or isinstance(counted, FastcalError):
            self._waiting[batches.start] = counted
            return
        maxima = {name: histogram.amax for name, histogram in counted.histograms.items()}
        if self._first is None:
            self._first, self.shared_scales = maxima, counted.shared_scales
            self._started = time.perf_counter() - counted.progress.seconds
            self._waiting[FIRST.start] = counted
        elif maxima != self._first:
            _log.warning(
                "workers find other values in the same batch: their machines or libraries differ, and the scales may "
                "differ in the last digits from those of one process"
            )

    def add_up(self, workers: int, report: Callable[[Progress], None]) -> range | None:
        """Put the counts together that come next in the batches' order.

        Returns:
            Batches to count again, since a tensor's range was not known to the worker that counted them; None if there
            are none.

        Raises:
            FastcalError: The error of the share that comes next.
        """
        while (counted := self._waiting.pop(self.state.batches, None)) is not None:
            if isinstance(counted, FastcalError):
                raise counted.with_traceback(None)
            start, done = self.state.batches, counted.progress
            for name in counted.histograms:
                self.total.setdefault(name, Histogram())
            if not all(self.total[name].can_append(histogram) for name, histogram in counted.histograms.items()):
                return range(start, start + done.batches)
            for name, histogram in counted.histograms.items():
                self.total[name].append(histogram)
            self.state.batches += done.batches
            self.state.images += done.images
            self.state.waited += done.waited / workers
            self.state.seconds = time.perf_counter() - self._started
            report(self.state)
        return None


class Crew:
    """Gives shares of the batches to workers until all are counted.

    Args:
        job: The work.
        report: Called when a share has been added up.
    """

    def __init__(self, job: Job, report: Callable[[Progress], None]) -> None:
        self._job = job
        self._report = report
        self._tally = Tally(len(job.feed))
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, range]] = {}  # the worker and its batches, by the reference to the result
        self._again: list[range] = []
        self._next = FIRST.stop
        self._notes: set[tuple[str, int, str]] = set()

    def observe(self) -> Tally:
        """Count all batches.

        Raises:
            UnavailableError: Workers die again and again.
            FastcalError: The error of a worker, of the first batch in order that goes wrong.
        """
        for _ in range(self._job.workers):
            self._give(self._start_worker(), FIRST, {})
        self._wait_for_first()
        while self._tally.state.batches < len(self._job.feed):
            (reference,), _ = ray.wait(list(self._running))
            actor, batches = self._running.pop(reference)
            self._idle.append(actor)
            self._tally.keep(batches, self._result(reference, batches))
            again = self._tally.add_up(self._job.workers, self._report)
            if again is not None:
                self._again.append(again)
            self._give_out()
        return self._tally

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def _start_worker(self) -> Any:
        options: dict[str, Any] = {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        options |= {"num_cpus": self._job.threads, "num_gpus": int(self._job.on_gpus)}
        # Spread, so that nodes share the reading too.
        worker = ray.remote(Worker).options(scheduling_strategy="SPREAD", **options)
        model = self._job.model
        self._actors.append(worker.remote(os.getcwd(), str(model.path), model.digest, self._job.backend))
        return self._actors[-1]

    def _wait_for_first(self) -> None:
        ready, _ = ray.wait(list(self._running), timeout=_PATIENCE_SECONDS)
        if not ready:
            _log.info("waiting for Ray to start a worker with %s CPUs", self._job.threads)

    def _result(self, reference: Any, batches: range) -> Counted | FastcalError:
        """Return a worker's result of these batches, or its error."""
        try:
            counted: Counted = ray.get(reference)
        except _LOST as error:
            raise UnavailableError(
                f"{_RESTARTS + 1} workers died over batches {batches.start} to {batches.stop - 1}: {last_line(error)}; "
                "Ray's logs tell more"
            ) from error
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
        if not self._tally.state.batches:
            return
        starts = {name: histogram.range for name, histogram in self._tally.total.items()}
        self._again.sort(key=lambda batches: -batches.start)
        while self._idle and (self._again or self._next < len(self._job.feed)):
            self._give(self._idle.pop(), self._again.pop() if self._again else self._next_share(), starts)

    def _give(self, actor: Any, batches: range, starts: Mapping[str, float]) -> None:
        self._running[actor.count.remote(self._job.part(batches), starts)] = actor, batches

    def _next_share(self) -> range:
        """Return the next batches that nobody has counted; few at the end, so that all workers end about together."""
        left = len(self._job.feed) - self._next
        size = max(1, min(_MOST, math.ceil(left / (2 * self._job.workers))))
        self._next += size
        return range(self._next - size, self._next)


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray's; some have a page of text."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[-1], 200)
