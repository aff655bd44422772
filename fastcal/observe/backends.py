"""Backends: what runs a network over a feed's batches and shows its tensors."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fastcal.definition import Network
from fastcal.device import resolve
from fastcal.errors import FastcalError, ModelError, UnavailableError, missing
from fastcal.feed.feed import Batch, Feed, length
from fastcal.feed.plan import default_batch_size
from fastcal.model import Model
from fastcal.observe.histogram import Histogram, Observations
from fastcal.progress import Progress
from fastcal.versions import has_calibrators, is_installed

#: The backends that `fastcal.calibrate` takes. "auto" is ONNX Runtime, unless a GPU and TensorRT before 11 are present
#: and ONNX Runtime cannot run the network, or has no CUDA provider.
BACKENDS = ("auto", "tensorrt", "onnxruntime")

_log = logging.getLogger("fastcal")

#: From this number of samples on, an engine of optimization level 1 is worth the time it takes to build: 3 s more for
#: ResNet-50 on an H200, which then runs at 3,620 images/s instead of 3,200.
_MANY = 100_000


class Observer(Protocol):
    """Runs a network over batches and keeps the histograms of its tensors."""

    @property
    def shared_scales(self) -> Mapping[str, str]:
        """Tensors that take the scale of another one: name to the other tensor's name."""

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew with ranges by tensor name: those that earlier batches have set."""

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Run one batch and count its tensors."""

    def histograms(self) -> Mapping[str, Histogram]:
        """Return the histograms since the beginning, by tensor name."""


#: Called with the progress after each batch.
Report = Callable[[Progress], None]

#: Called with the histograms' observer and the number of images so far; returns whether that is enough.
Enough = Callable[[Observer, int], bool]


class Backend(ABC):
    """Runs a network in this `precision`; a feed made for it has its buffers on this `device`."""

    name: str
    precision: str = "FP32"
    device: str = "cpu"

    @abstractmethod
    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe a network over the batches of a feed, calling `progress` after each, until `enough` returns True."""


class LocalBackend(Backend):
    """A backend in this process."""

    @abstractmethod
    def observer(self, network: Network, gpu: int | None) -> AbstractContextManager[Observer]:
        """Return the observer of a network whose batches lie on this GPU; None: in host memory."""

    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe a network: see `Backend.observe`."""
        timeline: list[Progress] = []

        def keep(state: Progress) -> None:
            timeline.append(replace(state))
            progress(state)

        def stop(images: int) -> bool:
            return enough is not None and enough(observer, images)

        # The feed starts while the backend does: each takes seconds on a GPU.
        with timed(feed, keep, stop) as batches, self.observer(network, feed.gpu) as observer:
            for batch in batches:
                observer.observe(batch)
            histograms = dict(observer.histograms())
        return Observations(
            network.label, self.name, self.precision, histograms, observer.shared_scales, timeline,
            network.least_thresholds,
        )  # fmt: skip


@dataclass(frozen=True)
class OnnxRuntimeBackend(LocalBackend):
    """ONNX Runtime: on the GPU that the batches lie on, or on the CPU.

    On the CPU, one thread per core that this process may use runs and counts by default; the tensors of a segment of
    the network may take `memory` bytes, by default 2 GiB. If `is_optimized`, ONNX Runtime optimizes the graph:
    the values differ in the last bits.
    """

    threads: int | None = None
    tf32: bool = False
    memory: int | None = None
    is_optimized: bool = False
    name = "onnxruntime"
    device = "auto"

    @property
    def precision(self) -> str:  # type: ignore[override]
        """The name of the precision."""
        return "TF32" if self.tf32 else "FP32"

    def observer(self, network: Network, gpu: int | None) -> AbstractContextManager[Observer]:
        """Return the observer of a `Model`."""
        if not isinstance(network, Model):
            raise ModelError("backend onnxruntime runs ONNX files, not an INetworkDefinition; use backend tensorrt")
        on_gpu = self._gpu(gpu)
        try:
            if on_gpu is None:
                from fastcal.observe import count  # noqa: F401 - compiled or loaded now, not with the first batch
                from fastcal.observe.with_onnxruntime import OnnxRuntimeObserver
            else:
                from fastcal.observe import with_cuda  # noqa: F401
        except (Exception, SystemExit) as error:
            raise missing("backend onnxruntime", error) from error
        if on_gpu is None:
            return OnnxRuntimeObserver(network, self.threads, self.memory, is_optimized=self.is_optimized)
        return self._on_gpu(network, on_gpu)

    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe a network: see `Backend.observe`. The CPU runs it in FP32."""
        if self.tf32 and self._gpu(feed.gpu) is None:
            return replace(self, tf32=False).observe(network, feed, progress, enough)
        return super().observe(network, feed, progress, enough)

    def _gpu(self, gpu: int | None) -> int | None:
        """Return the GPU to run on, where the batches lie if they lie on one; None for the CPU."""
        if has_cuda_provider():
            return resolve("auto") if gpu is None else gpu
        if gpu is not None:
            _log.warning("ONNX Runtime has no CUDA provider here, so the CPU runs the network: run fastcal doctor")
        return None

    @contextmanager
    def _on_gpu(self, model: Model, gpu: int) -> Iterator[Observer]:
        import cupy

        from fastcal.observe.early import take
        from fastcal.observe.with_cuda import CudaObserver

        with cupy.cuda.Device(gpu), take(model, gpu, self.tf32) or CudaObserver(model, tf32=self.tf32) as observer:
            yield observer


@dataclass(frozen=True)
class TensorRTBackend(LocalBackend):
    """TensorRT on a GPU, with the settings of `fastcal.calibrate`."""

    tf32: bool = False
    optimization_level: int | None = None
    tactic_sources: int | Iterable[str] | None = None
    name = "tensorrt"
    device = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.tactic_sources, Iterable) and not isinstance(self.tactic_sources, str):
            object.__setattr__(self, "tactic_sources", tuple(self.tactic_sources))  # each observer reads them anew

    @property
    def precision(self) -> str:  # type: ignore[override]
        """The name of the precision."""
        return "TF32" if self.tf32 else "FP32"

    @contextmanager
    def observer(self, network: Network, gpu: int | None) -> Iterator[Observer]:
        """Return the observer of a `Model` or a `Definition`."""
        try:
            gpu = resolve("cuda") if gpu is None else gpu
        except UnavailableError as error:
            text = f"backend tensorrt: {error}; backend onnxruntime works here"
            raise UnavailableError(text, error.package) from error
        import cupy

        from fastcal.observe.with_tensorrt import TensorRTObserver

        with cupy.cuda.Device(gpu), TensorRTObserver(network, **asdict(self)) as observer:
            yield observer

    def observe(self, network: Network, feed: Feed, progress: Report, enough: Enough | None = None) -> Observations:
        """Observe a network with an engine that suits the number of samples."""
        if self.optimization_level is not None:
            return super().observe(network, feed, progress, enough)
        level = int((length(feed) or 0) * feed.batch_size >= _MANY)
        return replace(self, optimization_level=level).observe(network, feed, progress, enough)


def start_early(network: Model, backend: str, *, tf32: bool, batch_size: int | None) -> None:
    """Begin to start the backend in a thread, if it is ONNX Runtime on a GPU, while the caller makes the feed.

    `backend` is a name, as `fastcal.calibrate` takes it, which takes over what has been started.
    """
    if choose_backend(backend, bool(unknown_to_onnxruntime(network))) != "onnxruntime" or not has_cuda_provider():
        return
    gpu = resolve("auto")
    if gpu is not None:
        from fastcal.observe.early import start

        start(network, gpu, tf32, batch_size or default_batch_size(gpu))


def has_cuda_provider() -> bool:
    """Return whether the installed ONNX Runtime has the CUDA provider, which only onnxruntime-gpu has."""
    try:
        import onnxruntime
    except (Exception, SystemExit):  # whatever is wrong is reported where a network is to run
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def unknown_to_onnxruntime(model: Model) -> list[str]:
    """Return the types of the operators that the installed ONNX Runtime does not know, TensorRT's plugins for instance.

    The list is empty if there is no ONNX Runtime.
    """
    if not is_installed("onnxruntime"):
        return []
    from fastcal.observe.operators import unknown_operators

    return unknown_operators(model.proto.graph)


def choose_backend(name: str, needs_tensorrt: bool) -> str:
    """Return the name of the backend to use on this machine for a network that perhaps only TensorRT can run."""
    if name not in BACKENDS:
        raise FastcalError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name != "auto":
        return name
    if not needs_tensorrt and has_cuda_provider():
        return "onnxruntime"
    is_usable = is_installed("tensorrt") and has_calibrators() and resolve("auto") is not None
    return "tensorrt" if is_usable else "onnxruntime"


@contextmanager
def timed(feed: Feed, progress: Report, enough: Callable[[int], bool] | None = None) -> Iterator[Iterator[Batch]]:
    """Begin a pass of a feed, so that its first batch is prepared meanwhile, and end it with the context.

    `enough` is called after `progress` with the number of images so far; the pass ends when it returns True.
    """
    batches = iter(feed)

    def used() -> Iterator[Batch]:
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
                state.total = length(feed)  # less if samples were skipped
            state.images += feed.samples_of(batch)
            state.seconds = time.perf_counter() - start
            progress(state)
            if enough is not None and enough(state.images):
                return

    try:
        yield used()
    finally:
        if hasattr(batches, "close"):
            batches.close()
