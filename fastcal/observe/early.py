"""A GPU's observer, started in a thread while the feed is being made: each takes seconds."""

import atexit
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from fastcal.errors import FastcalError
from fastcal.model import Model

_started: "WeakKeyDictionary[Model, tuple[tuple[int, bool], Future[Any]]]" = WeakKeyDictionary()
atexit.register(_started.clear)  # sessions that nobody has taken end before CUDA does


def start(model: Model, gpu: int, tf32: bool, batch_size: int) -> None:
    """Begin to make a `CudaObserver` and to warm it up with a batch of that size, if the other sizes are fixed."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(_make(model, gpu, tf32, batch_size))
        except BaseException as error:  # raised by `take`
            future.set_exception(error)

    _started[model] = (gpu, tf32), future
    threading.Thread(target=work, name="fastcal-start").start()
    threading.Thread(target=_read, args=[model], name="fastcal-digest").start()


def take(model: Model, gpu: int, tf32: bool) -> Any:
    """Return the observer that was begun for a model, once it is made; None if none was begun for these settings."""
    settings, future = _started.pop(model, (None, None))
    return future.result() if future is not None and settings == (gpu, tf32) else None


def _read(model: Model) -> None:
    """Read the model for its digest, which a record asks for later."""
    with suppress(FastcalError):  # raised there again
        _ = model.digest


def _make(model: Model, gpu: int, tf32: bool, batch_size: int) -> Any:
    import cupy

    from fastcal.observe.device_observer import free_on_device
    from fastcal.observe.with_cuda import CudaObserver

    with cupy.cuda.Device(gpu):
        observer = CudaObserver(model, tf32=tf32)
        shapes = _shapes(model, batch_size)
        if shapes is not None and sum(model.sizes(shapes).values()) < free_on_device():
            observer.warm_up(shapes)
    return observer


def _shapes(model: Model, batch_size: int) -> Mapping[str, tuple[int, ...]] | None:
    """Return the shapes of a batch; None if another size than the batch's is not fixed."""
    shapes = {value.name: (value.shape[0] or batch_size, *value.shape[1:]) for value in model.inputs if value.shape}
    is_known = len(shapes) == len(model.inputs) and all(None not in shape for shape in shapes.values())
    return shapes if is_known else None  # type: ignore[return-value]
