"""The driver's side of Ray workers: it gives them shares of the batches and puts their counts together."""

import logging
import math
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

#: Seconds of work that a worker is given at once: enough to outweigh a feed's start and the result's transfer, and
#: little enough to be done again.
_SECONDS = 5.0

#: The largest growth from one share to the next: the first batches may take longer than later ones.
_GROWTH = 4

#: Shares per worker that may be under way, or wait for one before them; this bounds the driver's memory.
_SHARES = 4

#: The number of attempts at a share whose workers die.
_ATTEMPTS = 3

#: Seconds to wait for the first worker before the log says so.
_PATIENCE_SECONDS = 10.0

#: The exceptions of Ray for a result that is lost though the work itself is sound.
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


@dataclass(frozen=True)
class _Share:
    """Batches that a worker is to count.

    Attributes:
        batches: Their numbers.
        attempt: The attempt number.
    """

    batches: range
    attempt: int = 1


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

    @property
    def waiting(self) -> int:
        """The number of shares that wait for one before them."""
        return len(self._waiting)

    def keep(self, start: int, counted: Counted | FastcalError) -> None:
        """Keep the result of the share that begins with a batch; raised when it is added up if it is an error."""
        self._waiting[start] = counted

    def keep_first(self, counted: Counted) -> None:
        """Keep a worker's result of the first batch, or compare it with another worker's."""
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
        self._paces: dict[Any, Progress] = {}  # the last share of each worker
        self._running: dict[Any, tuple[Any, _Share]] = {}  # by the reference to the result
        self._again: list[_Share] = []
        self._next = FIRST.stop
        self._notes: set[tuple[str, int, str]] = set()

    def observe(self) -> Tally:
        """Count all batches.

        Raises:
            UnavailableError: Workers die again and again.
            FastcalError: The error of a worker, of the first batch in order that goes wrong.
        """
        for _ in range(self._job.workers):
            self._start_worker(_Share(FIRST))
        while self._tally.state.batches < len(self._job.feed):
            reference = self._wait()
            actor, share = self._running.pop(reference)
            try:
                self._take(actor, share, ray.get(reference))
            except _LOST as error:
                self._replace(actor, share, error)
            except RayTaskError as error:
                if not isinstance(error.cause, FastcalError):
                    raise
                if share.batches == FIRST:
                    raise error.cause.with_traceback(None) from None
                self._tally.keep(share.batches.start, error.cause)
                self._idle.append(actor)
            again = self._tally.add_up(self._job.workers, self._report)
            if again is not None:
                self._again.append(_Share(again))
            self._give_out()
        return self._tally

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def _start_worker(self, share: _Share) -> None:
        resources = {"num_cpus": self._job.threads} | ({"num_gpus": 1} if self._job.on_gpus else {})
        # Spread, so that nodes share the reading too.
        actor = ray.remote(Worker).options(scheduling_strategy="SPREAD", **resources).remote(os.getcwd())
        self._actors.append(actor)
        model = str(self._job.model.path), self._job.model.digest
        reference = actor.start.remote(*model, self._job.backend, self._job.part(share.batches))
        self._running[reference] = actor, share

    def _wait(self) -> Any:
        """Return the next reference whose result is present, or lost."""
        running = list(self._running)
        if not self._paces:
            ready, _ = ray.wait(running, timeout=_PATIENCE_SECONDS)
            if ready:
                return ready[0]
            _log.info("waiting for Ray to start a worker with %s CPUs", self._job.threads)
        return ray.wait(running)[0][0]

    def _take(self, actor: Any, share: _Share, counted: Counted) -> None:
        """Keep a worker's result."""
        self._idle.append(actor)
        self._paces[actor] = counted.progress
        for note in counted.notes:
            if note not in self._notes:  # several workers say the same
                self._notes.add(note)
                name, level, text = note
                logging.getLogger(name).log(level, "%s", text)
        if share.batches == FIRST:
            self._tally.keep_first(counted)
        else:
            self._tally.keep(share.batches.start, counted)

    def _replace(self, actor: Any, share: _Share, error: Exception) -> None:
        """Have a dead worker's batches counted by another worker."""
        ray.kill(actor)
        self._actors.remove(actor)
        self._paces.pop(actor, None)
        batches = f"batches {share.batches.start} to {share.batches.stop - 1}"
        if share.attempt == _ATTEMPTS:
            raise UnavailableError(
                f"{_ATTEMPTS} workers died over {batches}: {last_line(error)}; Ray's logs tell more"
            ) from error
        _log.warning("a worker died over %s, which are counted again: %s", batches, last_line(error))
        share = replace(share, attempt=share.attempt + 1)
        if share.batches == FIRST:
            self._start_worker(share)
        else:
            self._again.append(share)
            self._start_worker(_Share(FIRST))

    def _give_out(self) -> None:
        """Give the idle workers shares, once the first batch has set the ranges."""
        if not self._tally.state.batches:
            return
        starts = {name: histogram.range for name, histogram in self._tally.total.items()}
        self._again.sort(key=lambda share: -share.batches.start)
        while self._idle:
            if self._again:
                share = self._again.pop()
            elif self._next < len(self._job.feed) and self._under_way < _SHARES * self._job.workers:
                share = _Share(range(self._next, self._next + self._size(self._paces[self._idle[-1]])))
                self._next = share.batches.stop
            else:
                return
            actor = self._idle.pop()
            self._running[actor.count.remote(self._job.part(share.batches), starts)] = actor, share

    @property
    def _under_way(self) -> int:
        return len(self._running) + self._tally.waiting

    def _size(self, last: Progress) -> int:
        """Return the number of batches of the next share of a worker that did `last` before.

        The share takes the worker some seconds, but is no larger than lets all workers end at about the same time.
        """
        left = len(self._job.feed) - self._next
        pace = last.batches / max(last.seconds, 1e-9)
        even = math.ceil(left / (2 * self._job.workers - 1))
        return max(1, min(_GROWTH * last.batches, round(pace * _SECONDS), even))


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray's; some have a page of text."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[-1], 200)
