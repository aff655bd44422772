"""What observes a network: the engine that runs it, and a feed's batches going through."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from fastcal.errors import FastcalError, missing
from fastcal.feed.device import resolve
from fastcal.feed.feed import Batch, Feed, length
from fastcal.model import Model
from fastcal.observe import ENGINES
from fastcal.observe.histogram import Histogram
from fastcal.progress import Progress


class Observer(Protocol):
    """Runs a network over batches and keeps the histograms of its tensors."""

    @property
    def sources(self) -> Mapping[str, str]:
        """Tensors that take another's scale: name to the other's name."""

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew, with ranges by tensor name: those that batches before have set."""

    def observe(self, batch: Mapping[str, Any], *, anonymous: bool = False) -> None:
        """Run one batch and count its tensors."""

    def histograms(self) -> Mapping[str, Histogram]:
        """The histograms since the beginning, by tensor name."""


class Seen(NamedTuple):
    """What was seen of a network: the engine that ran it, and histograms and sources as observers have them."""

    engine: str
    histograms: Mapping[str, Histogram]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Engine:
    """What runs a network, and how; the attributes are described in `fastcal.calibrate`."""

    name: str
    tf32: bool = False
    optimization_level: int | None = None
    tactic_sources: int | Iterable[str] | None = None
    threads: int | None = None

    def observer(self, network: Model | Any, gpu: int | None) -> AbstractContextManager[Observer]:
        """The observer of a network whose batches lie on `gpu`, None for host memory.

        Raises:
            FastcalError: The engine is not there, or does not take the network.
        """
        return self._on_tensorrt(network, gpu) if self.name == "tensorrt" else self._on_onnxruntime(network)

    @contextmanager
    def _on_onnxruntime(self, model: Model | Any) -> Iterator[Observer]:
        if not isinstance(model, Model):
            raise FastcalError(f"engine onnxruntime runs ONNX files, not a {type(model).__name__}; use engine tensorrt")
        try:
            from fastcal.observe import count  # noqa: F401 - compiled or loaded now, not with the first batch
            from fastcal.observe.with_onnxruntime import OnnxRuntimeObserver
        except ModuleNotFoundError as error:
            raise missing("engine onnxruntime", error) from error
        with OnnxRuntimeObserver(model, self.threads) as observer:
            yield observer

    @contextmanager
    def _on_tensorrt(self, network: Model | Any, gpu: int | None) -> Iterator[Observer]:
        try:
            gpu = resolve("cuda") if gpu is None else gpu
        except FastcalError as error:
            raise FastcalError(f"engine tensorrt: {error}; engine onnxruntime works here") from error
        import cupy

        from fastcal.observe.with_tensorrt import TensorRTObserver

        level, tactic_sources = self.optimization_level or 0, self.tactic_sources
        with (
            cupy.cuda.Device(gpu),
            TensorRTObserver(
                network, tf32=self.tf32, optimization_level=level, tactic_sources=tactic_sources
            ) as observer,
        ):
            yield observer


def check_engine(engine: str) -> None:
    """Raise FastcalError if there is no engine of that name."""
    if engine not in ENGINES:
        raise FastcalError(f"there is no engine {engine!r}; choose one of {', '.join(ENGINES)}")


def choose_engine(engine: str, is_file: bool) -> str:
    """The engine to use here; "auto" takes what is there."""
    if engine != "auto":
        return engine
    there = find_spec("tensorrt") is not None and resolve("auto") is not None
    return "tensorrt" if there or not is_file else "onnxruntime"


@contextmanager
def timed(
    feed: Feed, progress: Callable[[Progress], None], enough: Callable[[int], bool] | None = None
) -> Iterator[Iterator[Batch]]:
    """A pass of a feed, which begins now, so that the first batch is prepared meanwhile, and ends with the context.

    Args:
        feed: The feed.
        progress: Called after each batch has been used.
        enough: Called then with the number of images so far; whether to stop.
    """
    batches = iter(feed)
    try:
        yield _timed(feed, batches, progress, enough)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _timed(
    feed: Feed,
    batches: Iterator[Batch],
    progress: Callable[[Progress], None],
    enough: Callable[[int], bool] | None,
) -> Iterator[Batch]:
    state = Progress(total=length(feed))
    start = time.perf_counter()
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
        state.images += feed.samples_of(batch)
        state.seconds = time.perf_counter() - start
        progress(state)
        if enough is not None and enough(state.images):
            return
