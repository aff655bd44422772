"""`speeds`: the latency of an INT8 engine beside those of the same network in FP16 and FP32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcal.engine.contents import set_best_shapes
from fastcal.engine.explicit import build_typed
from fastcal.engine.settings import BuildSettings
from fastcal.errors import ModelError, UnavailableError
from fastcal.feed.feed import Feed
from fastcal.half import FP16
from fastcal.library import is_strongly_typed, logger_of
from fastcal.model import Model
from fastcal.qdq_graph import modern
from fastcal.typed import narrow

#: The runs before the first that is timed, and those that are.
_WARMING, _TIMED = 20, 100


@dataclass(frozen=True)
class Speed:
    """The speed of an engine: the median `latency` of a batch in seconds, and the samples in a batch."""

    latency: float
    batch: int

    @property
    def throughput(self) -> float:
        """Samples a second, one batch after another."""
        return self.batch / self.latency


def speeds(
    library: Any,
    model: Model,
    engine: bytes,
    feed: Feed | None,
    settings: BuildSettings,
    largest: Mapping[str, float],
) -> dict[str, Speed]:
    """Return the speeds of an INT8 engine, and of the network built alike in FP16 and in FP32.

    Args:
        library: The Python module of the builder.
        model: The ONNX file.
        engine: The INT8 engine.
        feed: The batches that it was built with; None for none.
        settings: The settings that it was built with.
        largest: The largest |x| of tensors, for a typed model in FP16, as `narrow` takes them.

    Raises:
        UnavailableError: The engine does not run here.
        ModelError: An output has a shape that depends on the values, or a float engine cannot be built.
    """
    typed = narrow(modern(model, FP16), FP16, largest) if is_strongly_typed(library) else None
    found = {"INT8": time_engine(library, engine)}
    for kind, proto, flags in (("FP16", typed, ["FP16"]), ("FP32", None, [])):
        found[kind] = time_engine(library, build_typed(library, model, proto, feed, settings, flags=flags))
    return found


def time_engine(library: Any, engine: bytes) -> Speed:
    """Return the speed of a serialized engine for the batch that it is tuned for; errors as `speeds`."""
    import cupy

    loaded = library.Runtime(logger_of(library)).deserialize_cuda_engine(engine)
    if loaded is None:
        raise UnavailableError(f"the engine does not run on this GPU: {logger_of(library).reasons()}")
    context, stream = loaded.create_execution_context(), cupy.cuda.Stream(non_blocking=True)
    buffers, batch = _buffers(library, loaded, context)
    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(_WARMING + _TIMED)]
    cupy.cuda.Device().synchronize()
    for begin, end in events:
        begin.record(stream)
        context.execute_async_v3(stream.ptr)
        end.record(stream)
    stream.synchronize()
    del buffers  # TensorRT had their addresses until now
    return Speed(_median([cupy.cuda.get_elapsed_time(*pair) / 1e3 for pair in events[_WARMING:]]), batch)


def _buffers(library: Any, engine: Any, context: Any) -> tuple[list[Any], int]:
    """Bind buffers to an engine's inputs and outputs; return them, and the size of the batch."""
    import cupy

    inputs, buffers = set_best_shapes(library, engine, context), []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        shape, dtype = tuple(context.get_tensor_shape(name)), np.dtype(library.nptype(engine.get_tensor_dtype(name)))
        if -1 in shape:
            raise ModelError(f"output {name!r} has a shape that depends on the values: the engine cannot be timed")
        buffers.append(cupy.zeros(shape, dtype))
        context.set_tensor_address(name, buffers[-1].data.ptr)
    shape = tuple(context.get_tensor_shape(inputs[0]))
    return buffers, shape[0] if shape else 1


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values)))
