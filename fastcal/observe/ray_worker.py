"""A Ray actor's side: it observes a network over the batches that it is given."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from fastcal.errors import DataError, FastcalError, ModelError
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.backends import LocalBackend, timed
from fastcal.observe.histogram import Histogram
from fastcal.progress import Progress


@dataclass(frozen=True)
class Counted:
    """The result of a worker's share of the batches.

    Attributes:
        histograms: By tensor name.
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.
        progress: The number of batches and samples, and the time that the share took.
        notes: The log records of that time: logger, level and text.
    """

    histograms: Mapping[str, Histogram]
    shared_scales: Mapping[str, str]
    progress: Progress
    notes: Sequence[tuple[str, int, str]]


class Worker:
    """A Ray actor that observes a network.

    Args:
        folder: The driver's working folder, which relative paths are relative to.
    """

    def __init__(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # relative paths are then reported as missing
            os.chdir(folder)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
        node = names[ray.get_runtime_context().get_node_id()]
        self._where = f"on node {node}: " if len(names) > 1 else ""
        self._notes = _Notes()
        logger = logging.getLogger("fastcal")
        logger.addHandler(self._notes)
        logger.setLevel(logging.INFO)

    def start(self, path: str, digest: str, backend: LocalBackend, first: Feed) -> Counted:
        """Start the backend, and observe the first batches."""
        with self._named_errors():
            model = Model(path)
            if model.digest != digest:
                raise ModelError(f"{path} is another model than where the calibration was started; copy it anew")
            self._observing = backend.observer(model, first.gpu)
            self._observer = self._observing.__enter__()  # never left: the process ends with the worker
            return self._observe(first)

    def count(self, part: Feed, starts: Mapping[str, float]) -> Counted:
        """Observe the batches of `part` from these ranges on."""
        with self._named_errors():
            self._observer.begin(starts)
            return self._observe(part)

    def _observe(self, part: Feed) -> Counted:
        states = [Progress()]
        with part:
            with timed(part, states.append) as batches:
                for batch in batches:
                    self._observer.observe(batch)
            histograms = dict(self._observer.histograms())  # before the feed's buffers, which may be in use, are gone
        state = states[-1]
        if state.batches != len(part):
            raise DataError(f"the feed gave {state.batches} of {len(part)} batches; leave workers out")
        return Counted(histograms, self._observer.shared_scales, state, self._notes.take())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Put the node's name before an error's text if there are several nodes."""
        try:
            yield
        except FastcalError as error:
            error.args = (f"{self._where}{error}", *error.args[1:])
            raise


class _Notes(logging.Handler):
    """Keeps log records until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        kept, self._kept = self._kept, []
        return kept
