"""The slots of a feed's ring: arrays that are filled and read by turns."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastcal.device import to_host
from fastcal.errors import FastcalError
from fastcal.feed.prefetch import Prefetcher

#: The shape and type of an array.
Shape = tuple[tuple[int, ...], Any]


class Buffer:
    """Arrays in host memory, filled and read by threads that take turns.

    Args:
        shapes: Shapes and types of the arrays to allocate now, by input name; `reserve` allocates others.
        constants: Further arrays by input name, which stay as they are.

    Attributes:
        arrays: All arrays by input name.
    """

    def __init__(self, shapes: Mapping[str, Shape], constants: Mapping[str, Any]) -> None:
        self.arrays = {name: self._make(*shape) for name, shape in shapes.items()} | dict(constants)

    def _make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            return self._allocate(shape, dtype)
        except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
            size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
            raise FastcalError(
                f"there is no memory for batches of shape {shape}, {size:.1f} GiB each; make them smaller"
            ) from error

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def reserve(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Have an array of that shape and type for an input; for the thread that fills, as is `put`."""
        array = self.arrays.get(name)
        if array is None or (array.shape, array.dtype) != (shape, dtype):
            self.arrays[name] = self._make(shape, dtype)

    def put(self, name: str, place: Any, values: Any) -> None:
        """Copy an array of NumPy's or CuPy's, which is filled, into a part of one of the arrays.

        It may be written to again when this returns.

        Args:
            name: The input.
            place: The part: a slice of the first dimension, or ... for all.
            values: What to copy there.
        """
        np.copyto(self.arrays[name][place], to_host(values))

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
        shapes: Shapes and types of the arrays to allocate now, by input name.
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
        self._staging: dict[str, Any] = {}

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with self._stream:  # memory that this stream alone has used, or nobody: others may still be using theirs
            return self._cupy.empty(shape, dtype)

    def put(self, name: str, place: Any, values: Any) -> None:
        """Copy an array into a part of one of the arrays, on the feed's stream; from the host through pinned memory."""
        target = self.arrays[name][place]
        with self._stream:
            if isinstance(values, self._cupy.ndarray):
                target[...] = values
                self._stream.synchronize()  # its owner may write to it now, or free it
            else:
                pinned = self._pinned(name)[place]
                np.copyto(pinned, values)
                target.set(pinned, stream=self._stream)

    def _pinned(self, name: str) -> Any:
        """Pinned memory in the form of one of the arrays, kept for the next batch."""
        from cupyx import empty_pinned

        self._filled.synchronize()  # the last batch has left it
        array, pinned = self.arrays[name], self._staging.get(name)
        if pinned is None or (pinned.shape, pinned.dtype) != (array.shape, array.dtype):
            pinned = self._staging[name] = empty_pinned(array.shape, array.dtype)
        return pinned

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


class Batches(Iterator[Mapping[str, Any]]):
    """The batches of a pass, a buffer's arrays by input name, each valid until the next is asked for."""

    def __init__(self, prefetcher: Prefetcher[Buffer]) -> None:
        self._prefetcher = prefetcher
        self._held: Buffer | None = None
        self._is_peeked = False

    def __next__(self) -> Mapping[str, Any]:
        """Wait for the next batch; raises what `Prefetcher.__next__` does."""
        if self._is_peeked and self._held is not None:
            self._is_peeked = False
            return self._held.arrays
        held, self._held = self._held, None
        if held is not None:
            held.give_back()
        self._held = next(self._prefetcher)
        try:
            self._held.wait()
        except BaseException:
            self.close()
            raise
        return self._held.arrays

    def peek(self) -> None:
        """Wait for the next batch, which is then the next to be handed out."""
        next(self)
        self._is_peeked = True

    def close(self) -> None:
        """End the pass."""
        self._prefetcher.close()
