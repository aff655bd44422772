"""A network observed on a GPU: what the backends there share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import cupy
import numpy as np

from fastcal.batch import Input, check_values, match_batch
from fastcal.device import upload, wait_until_filled
from fastcal.memory import SHARE
from fastcal.observe.device_histograms import DeviceHistograms
from fastcal.observe.histogram import Histogram

#: Arrays in a block of memory begin at multiples of 256 bytes, as TensorRT and CUDA's own allocator want them.
_ALIGNMENT = 256


class Runner(Protocol):
    """Runs a network on a GPU and shows some of its tensors, in a block of memory of `bytes`."""

    bytes: int

    def write_to(self, block: Any) -> None:
        """Put the tensors into a block of the GPU's memory."""

    def run(self, arrays: Mapping[str, Any], stream: Any) -> Mapping[str, Any]:
        """Enqueue one batch; return its tensors in float32, filled in the stream's order."""


class DeviceObserver(ABC):
    """Runs batches through a network on CuPy's current GPU: an `Observer`.

    Within the context, CuPy's current stream is the one that reads the batches, so that a feed fills no buffer that is
    still in use.

    Args:
        inputs: The network's inputs.
        label: The network's name in messages.
        names: The names of the tensors to count, the float inputs among them.
        stream: The stream to work on; by default a new one.

    Attributes:
        shared_scales: See `Observer`.
    """

    shared_scales: Mapping[str, str]

    def __init__(self, inputs: Sequence[Input], label: str, names: Iterable[str], stream: Any = None) -> None:
        self._inputs, self._label = inputs, label
        self._runners: list[Runner] = []
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the inputs that the runners are for
        self._uploads: dict[str, Any] = {}
        self._stream = stream or cupy.cuda.Stream(non_blocking=True)
        self._ends = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._histograms = DeviceHistograms(list(names))

    @abstractmethod
    def _make_runners(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Runner]:
        """Return as many runners as the tensors need to fit the memory, for inputs of these shapes."""

    def _forget_runners(self) -> None:
        self._runners, self._shapes = [], None
        cupy.get_default_memory_pool().free_all_blocks()  # other libraries have memory of their own

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew with these ranges."""
        self._histograms.begin(starts)

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Run one batch of arrays on the GPU or in host memory and count its tensors; wait for the batch before."""
        batch = match_batch(self._inputs, self._label, batch)
        arrays = {value.name: self._on_device(value, batch[value.name]) for value in self._inputs}
        self._fit({name: tuple(array.shape) for name, array in arrays.items()})
        shown = {name: as_float32(array) for name, array in arrays.items() if array.dtype.kind == "f"}
        for runner in self._runners:
            self._histograms.update_all({**shown, **runner.run(arrays, self._stream)})
            shown = {}
        self._ends.reverse()
        self._ends[0].record(self._stream)
        self._ends[1].synchronize()
        if not all(isinstance(array, np.ndarray | cupy.ndarray) for array in batch.values()):
            self._stream.synchronize()  # another library may write to its arrays whatever CuPy's stream still reads

    def warm_up(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Run a batch of zeros of these shapes and count nothing, so that the first batch finds everything loaded."""
        with self._stream:
            self._fit(shapes)
            arrays = {value.name: cupy.zeros(shapes[value.name], value.dtype) for value in self._inputs}
            for runner in self._runners:
                runner.run(arrays, self._stream)
            self._stream.synchronize()

    def _fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make the runners for inputs of these shapes, unless they are there."""
        if shapes == self._shapes:
            return
        self._stream.synchronize()
        self._forget_runners()
        self._runners = self._make_runners(shapes)
        block = cupy.empty(max(runner.bytes for runner in self._runners), np.uint8)
        for runner in self._runners:  # they run one after another
            runner.write_to(block)
        self._shapes = dict(shapes)

    def histograms(self) -> dict[str, Histogram]:
        """Return the histograms by tensor name."""
        return self._histograms.fetch()

    def __enter__(self) -> "DeviceObserver":
        cupy.cuda.Device().synchronize()  # arrays that exist already are complete
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.synchronize()
        self._stream.__exit__(*error)
        self._forget_runners()

    def _on_device(self, value: Input, array: Any) -> Any:
        if hasattr(array, "__cuda_array_interface__"):
            if not isinstance(array, cupy.ndarray):  # CuPy's arrays are made on the current stream, or earlier
                wait_until_filled(array)
            given = cupy.asarray(array)
            check_values(given, value, self._label)
            return cupy.asarray(given, value.dtype, order="C")
        return upload(np.asarray(array, value.dtype), value.name, self._uploads)  # after the batch before was read


def as_float32(array: Any) -> Any:
    """Return a CuPy array as float32: itself, or a copy on the current stream."""
    return array.astype(np.float32, copy=False)


def aligned(size: int) -> int:
    """Return the bytes that an array of `size` bytes takes in a block."""
    return max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT


def place(shape: tuple[int, ...], dtype: Any, block: Any, offset: int) -> Any:
    """Return an array in a block of the GPU's memory."""
    return cupy.ndarray(shape, dtype, block.data + offset)


def taken(elements: int, dtype: np.dtype[Any]) -> int:
    """Return the bytes that a tensor takes, with the copy in float32 that is counted if it has another type."""
    copy = 0 if dtype == np.float32 else aligned(4 * elements)
    return aligned(elements * dtype.itemsize) + copy


def free_on_device() -> int:
    """Return the bytes of the current GPU that the tensors of a batch may take."""
    return int(SHARE * cupy.cuda.runtime.memGetInfo()[0])
