"""The buffers of a feed's ring: arrays that are filled and read in turn."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastcal.device import to_host
from fastcal.errors import FastcalError, counted
from fastcal.feed.prefetch import Prefetcher
from fastcal.memory import check_room

#: The shape and type of an array.
Shape = tuple[tuple[int, ...], Any]


class Buffer:
    """Arrays in host memory, by input name. One thread fills them, another reads them, in turn."""

    stream: Any = None  # on a GPU, the one that fills
    samples: int | None = None  # filled; None: as many as the arrays have

    def __init__(self, shapes: Mapping[str, Shape], constants: Mapping[str, Any], repeated: Collection[str]) -> None:
        self._per_sample = {*shapes, *repeated}
        self.arrays = {name: self._make(*shape) for name, shape in shapes.items()} | dict(constants)

    def batch(self) -> dict[str, Any]:
        """Return the arrays by input name, those that have an element for each sample as far as they are filled."""
        return {
            name: array[: self.samples] if self.samples and name in self._per_sample else array
            for name, array in self.arrays.items()
        }

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
        """Allocate an array for an input, unless it has one of that shape and type; called by the thread that fills."""
        array = self.arrays.get(name)
        if array is None or (array.shape, array.dtype) != (shape, dtype):
            self.arrays[name] = self._make(shape, dtype)

    def put(self, name: str, place: Any, values: Any) -> None:
        """Copy complete values into a part of an array; they may be written to again when this method returns."""
        np.copyto(self.arrays[name][place], to_host(values))

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Surround the filling, in the thread that fills."""
        yield

    def wait(self) -> None:
        """Wait until the arrays are filled; called by the consumer before it reads."""

    def give_back(self) -> None:
        """Allow the next filling; called by the consumer when it has read, or has enqueued this on CuPy's stream."""


class DeviceBuffer(Buffer):
    """CuPy arrays on a GPU, filled on the feed's own stream.

    One event records that the arrays are filled, another that the consumer's stream has read them. The host waits for
    the first before it hands the arrays out, so that they can be read on any stream; the feed's stream waits for the
    second before it fills the arrays again.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        constants: Mapping[str, Any],
        repeated: Collection[str],
        device: Any,
        stream: Any,
    ) -> None:
        import cupy

        self._cupy = cupy
        self._device = device
        self.stream = stream
        with device:
            self._filled = cupy.cuda.Event(disable_timing=True)
            self._read = cupy.cuda.Event(disable_timing=True)
            super().__init__(shapes, constants, repeated)
        self._staging: dict[str, Any] = {}

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with self.stream:  # gets memory that no other stream has used, and so none still uses
            return self._cupy.empty(shape, dtype)

    def put(self, name: str, place: Any, values: Any) -> None:
        """Copy values into a part of an array, on the feed's stream; from the host through pinned memory."""
        target = self.arrays[name][place]
        with self.stream:
            if isinstance(values, self._cupy.ndarray):
                target[...] = values
                self.stream.synchronize()  # the owner of the values may write to them now, or free them
            else:
                pinned = self._pinned(name)[place]
                np.copyto(pinned, values)
                target.set(pinned, stream=self.stream)

    def _pinned(self, name: str) -> Any:
        """Return pinned memory in the form of one of the arrays, kept for the next batch."""
        from cupyx import empty_pinned

        self._filled.synchronize()  # the last batch has been copied from it
        array, pinned = self.arrays[name], self._staging.get(name)
        if pinned is None or (pinned.shape, pinned.dtype) != (array.shape, array.dtype):
            pinned = self._staging[name] = empty_pinned(array.shape, array.dtype)
        return pinned

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Surround the filling: the device is current, and the stream waits for the last reader."""
        with self._device:
            self.stream.wait_event(self._read)
            yield
            self._filled.record(self.stream)

    def wait(self) -> None:
        """Make the host wait until the arrays are filled."""
        self._filled.synchronize()

    def give_back(self) -> None:
        """Record the consumer's reads, for the next filling to wait for."""
        with self._device:
            self._read.record(self._cupy.cuda.get_current_stream())


class Allocator:
    """Allocates the buffers of a feed; on a GPU they share one stream."""

    def __init__(self, gpu: int | None) -> None:
        self._gpu = gpu
        self._stream: Any = None

    def allocate(
        self,
        count: int,
        shapes: Mapping[str, Shape] | None = None,
        constants: Mapping[str, Any] | None = None,
        repeated: Collection[str] = (),
    ) -> list[Buffer]:
        """Return buffers with arrays of these shapes and with NumPy arrays that never change, by input name.

        The constants that are `repeated` have an element for each sample of a batch.
        """
        shapes, constants = shapes or {}, constants or {}
        if self._gpu is None:
            size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
            samples = max((shape[0] for shape, _ in shapes.values()), default=0)
            remedy = "use a smaller batch size, or make the images smaller"
            check_room(count * size, f"{counted(count, 'batch')} of {counted(samples, 'sample')}", remedy)
            return [Buffer(shapes, constants, repeated) for _ in range(count)]
        import cupy

        device = cupy.cuda.Device(self._gpu)
        with device:
            self._stream = self._stream or cupy.cuda.Stream(non_blocking=True)
            constants = {name: cupy.asarray(values) for name, values in constants.items()}
            cupy.cuda.get_current_stream().synchronize()
        return [DeviceBuffer(shapes, constants, repeated, device, self._stream) for _ in range(count)]

    def synchronize(self) -> None:
        """Wait until the GPU has done all its work."""
        if self._gpu is not None:
            import cupy

            cupy.cuda.Device(self._gpu).synchronize()


class Batches(Iterator[Mapping[str, Any]]):
    """The batches of a pass: arrays by input name, each batch valid until the next is asked for."""

    def __init__(self, prefetcher: Prefetcher[Buffer]) -> None:
        self._prefetcher = prefetcher
        self.close = prefetcher.close
        self._held: Buffer | None = None
        self._is_peeked = False

    def __next__(self) -> Mapping[str, Any]:
        """Wait for the next batch; raise as `Prefetcher.__next__` does."""
        if self._is_peeked and self._held is not None:
            self._is_peeked = False
            return self._held.batch()
        held, self._held = self._held, None
        if held is not None:
            held.give_back()
        self._held = next(self._prefetcher)
        try:
            self._held.wait()
        except BaseException:
            self.close()
            raise
        return self._held.batch()

    def peek(self) -> None:
        """Wait for the next batch, without handing it out yet."""
        next(self)
        self._is_peeked = True
