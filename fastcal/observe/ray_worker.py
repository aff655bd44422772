"""A Ray actor's side: it observes a network over the batches that it is given."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging.handlers import QueueHandler
from queue import SimpleQueue

import ray

from fastcal.errors import DataError, FastcalError, ModelError
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.backends import LocalBackend, Observer, timed
from fastcal.observe.histogram import Histogram
from fastcal.progress import Progress


@dataclass(frozen=True)
class Counted:
    """The result of a worker's share of the batches, with the log records of that time: logger, level and text."""

    histograms: Mapping[str, Histogram]
    shared_scales: Mapping[str, str]
    progress: Progress
    notes: Sequence[tuple[str, int, str]]


class Worker:
    """A Ray actor that observes the model at `path`, which is relative to the driver's working folder."""

    def __init__(self, folder: str, path: str, digest: str, backend: LocalBackend) -> None:
        with contextlib.suppress(OSError):  # relative paths are then reported as missing
            os.chdir(folder)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
        node = names[ray.get_runtime_context().get_node_id()]
        self._where = f"on node {node}: " if len(names) > 1 else ""
        self._path, self._digest, self._backend = path, digest, backend
        self._observer: Observer | None = None
        self._part: Feed | None = None  # the last one
        self._records: SimpleQueue[logging.LogRecord] = SimpleQueue()
        logger = logging.getLogger("fastcal")
        logger.addHandler(QueueHandler(self._records))
        logger.setLevel(logging.INFO)

    def count(self, part: Feed, starts: Mapping[str, float]) -> Counted:
        """Observe the batches of `part` from these ranges on; the first call starts the backend."""
        try:
            return self._observe(part, starts)
        except FastcalError as error:
            error.args = (f"{self._where}{error}", *error.args[1:])
            raise

    def _start(self, gpu: int | None) -> Observer:
        model = Model(self._path)
        if model.digest != self._digest:
            raise ModelError(f"{self._path} is another model than where the calibration was started; copy it anew")
        self._observing = self._backend.observer(model, gpu)
        return self._observing.__enter__()  # never left: the process ends with the worker

    def _observe(self, part: Feed, starts: Mapping[str, float]) -> Counted:
        states = [Progress()]
        if self._part is not None:
            part.take_over(self._part)
        self._part = part  # never closed: the process ends with the worker
        with timed(part, states.append) as batches:  # the feed starts while the backend does
            observer = self._observer = self._observer or self._start(part.gpu)
            if starts:
                observer.begin(starts)
            for batch in batches:
                observer.observe(batch)
        histograms = dict(observer.histograms())
        state = states[-1]
        if state.batches != len(part):
            raise DataError(f"the feed gave {state.batches} of {len(part)} batches; leave workers out")
        records = [self._records.get() for _ in range(self._records.qsize())]
        notes = [(record.name, record.levelno, record.getMessage()) for record in records]
        return Counted(histograms, observer.shared_scales, state, notes)
