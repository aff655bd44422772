"""The slots of a feed's ring: arrays that are filled and read by turns."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

#: The shape and type of an array.
Shape = tuple[tuple[int, ...], Any]


class Buffer:
    """Arrays in host memory, filled and read by threads that take turns.

    Args:
        shapes: Shapes and types of the arrays to allocate, by input name.
        constants: Further arrays by input name, which stay as they are.

    Attributes:
        arrays: All arrays by input name.
    """

    def __init__(self, shapes: Mapping[str, Shape], constants: Mapping[str, Any]) -> None:
        self.arrays = {name: self._allocate(*shape) for name, shape in shapes.items()} | dict(constants)

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def put(self, name: str, place: slice, values: Any) -> None:
        """Copy a NumPy array into a part of one of the arrays."""
        self.arrays[name][place] = values

    @contextmanager
    def filling(self) -> Iterator[None]:
        """For the thread that fills, while it does."""
        yield

    def wait(self) -> None:
        """For the consumer, before it reads."""

    def give_back(self) -> None:
        """For the consumer, when it has read, or has enqueued its reading on CuPy's current stream."""


class DeviceBuffer(Buffer):
    """CuPy arrays on a GPU, filled on a stream of the feed's own.

    An event says when the arrays are filled, another when the consumer's stream is through with them: the host waits
    for the first before it hands the arrays out, so they can be read on any stream; the feed's stream waits for the
    second before it fills them again.

    Args:
        shapes: Shapes and types of the arrays to allocate, by input name.
        constants: Further CuPy arrays by input name, which stay as they are.
        device: The GPU, a `cupy.cuda.Device`.
        stream: The non-blocking stream that fills.
    """

    def __init__(self, shapes: Mapping[str, Shape], constants: Mapping[str, Any], device: Any, stream: Any) -> None:
        import cupy

        self._cupy = cupy
        self._device = device
        self._stream = stream
        with device:
            self._filled = cupy.cuda.Event(disable_timing=True)
            self._read = cupy.cuda.Event(disable_timing=True)
            super().__init__(shapes, constants)

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._cupy.empty(shape, dtype)

    def put(self, name: str, place: slice, values: Any) -> None:
        """Copy a NumPy array into a part of one of the arrays, on the stream that fills."""
        self.arrays[name][place].set(values, stream=self._stream)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """For the thread that fills: the device is current, and the stream waits for the last reader."""
        with self._device:
            self._stream.wait_event(self._read)
            yield
            self._filled.record(self._stream)

    def wait(self) -> None:
        """For the consumer: the host waits until the arrays are filled."""
        self._filled.synchronize()

    def give_back(self) -> None:
        """For the consumer, when it has read, or has enqueued its reading on CuPy's current stream."""
        with self._device:
            self._read.record(self._cupy.cuda.get_current_stream())
