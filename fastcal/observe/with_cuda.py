"""A network observed on a GPU: ONNX Runtime's CUDA provider shows every activation, and the GPU counts."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cupy
import numpy as np
import onnx
import onnxruntime

from fastcal.errors import UnavailableError
from fastcal.memory import groups
from fastcal.model import Model
from fastcal.observe.device_observer import DeviceObserver, Runner, aligned, as_float32, free_on_device, place, taken
from fastcal.observe.operators import cut_unknown
from fastcal.observe.with_onnxruntime import (
    cannot_run,
    float_outputs,
    run_options,
    start_session,
    warn_of_unknown,
    with_outputs,
)

_PROVIDER = "CUDAExecutionProvider"

#: ONNX Runtime's levels of messages.
_WARNINGS, _NOTHING_BUT_FATAL = 2, 4

#: The shape of an array.
Shape = tuple[int, ...]

_log = logging.getLogger("fastcal")


class CudaObserver(DeviceObserver):
    """Runs batches through a model on CuPy's current GPU: an `Observer`.

    ONNX Runtime reads the batches where they are, and writes the tensors to memory that is allocated once. All observed
    tensors of a batch may take `memory` bytes, by default 70 % of what is free on the GPU; if they take more, the
    network runs several times over each batch. Operators without a CUDA kernel run on the CPU, and their tensors are
    copied.
    """

    def __init__(self, model: Model, *, tf32: bool = False, memory: int | None = None) -> None:
        self._model, self._memory = model, memory
        _preload_libraries()
        stream = cupy.cuda.Stream(non_blocking=True)
        options = {
            "device_id": cupy.cuda.Device().id,
            "user_compute_stream": stream.ptr,
            "use_tf32": int(tf32),
            "cudnn_conv_algo_search": "HEURISTIC",  # picks the same kernels every time, unlike timing
            "arena_extend_strategy": "kSameAsRequested",
        }
        self._options = {name: str(value) for name, value in options.items()}
        self._proto, unknown, gone = cut_unknown(model.proto)
        warn_of_unknown(unknown, gone)
        self._all = self._runner([name for name in model.activations if name not in gone])
        self.shared_scales = model.shared_scales
        floats = [value.name for value in model.inputs if value.dtype.kind == "f"]
        super().__init__(model.inputs, model.label, [*floats, *self._all.dtypes], stream)

    def _runner(self, names: Sequence[str]) -> "_Runner":
        return _Runner(self._model, self._proto, names, self._options)

    def _make_runners(self, shapes: Mapping[str, Shape]) -> list[Runner]:
        known = self._model.shapes(shapes)
        sizes = {name: taken(math.prod(known.get(name, (0,))), dtype) for name, dtype in self._all.dtypes.items()}
        shown = groups(sizes, self._memory or free_on_device(), "the GPU's memory")
        runners = [self._all]
        if len(shown) > 1:
            runners = [self._runner(group) for group in shown]
        for runner in runners:
            runner.expect(known)
        return list(runners)


class _Runner:
    """A session that shows some tensors; `dtypes` are their types.

    Those of known shapes take `bytes` of a block. ONNX Runtime allocates the others anew for every batch.
    """

    def __init__(
        self, model: Model, proto: onnx.ModelProto, names: Sequence[str], provider_options: Mapping[str, str]
    ) -> None:
        self._model = model
        self._gpu = int(provider_options["device_id"])
        self._session, self._outputs = _start(model, proto, names, provider_options)
        shown = float_outputs(self._session, self._outputs.values())
        self.dtypes = {name: np.dtype(shown[output]) for name, output in self._outputs.items() if output in shown}
        self._binding = self._session.io_binding()
        self._run_options = run_options()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream is ours
        self._known: dict[str, Shape] = {}
        self._shown: dict[str, Any] = {}
        self._has_run = False
        self.bytes = 0

    def expect(self, shapes: Mapping[str, Shape]) -> None:
        """Take the shapes of the tensors, as far as they are known."""
        self._known = {name: shapes[name] for name in self.dtypes if math.prod(shapes.get(name, (0,)))}
        self.bytes = sum(map(self._size, self._known))

    def _size(self, name: str) -> int:
        return aligned(math.prod(self._known[name]) * self.dtypes[name].itemsize)

    def write_to(self, block: Any) -> None:
        """Put the tensors of known shapes into a block of the GPU's memory."""
        self._binding.clear_binding_outputs()
        self._shown, offset, self._has_run = {}, 0, False
        for name, shape in self._known.items():
            array = self._shown[name] = place(shape, self.dtypes[name], block, offset)
            output, dtype = self._outputs[name], array.dtype.type
            self._binding.bind_output(output, "cuda", self._gpu, dtype, shape, array.data.ptr)
            offset += self._size(name)

    def run(self, arrays: Mapping[str, Any], stream: Any) -> dict[str, Any]:
        """Enqueue one batch; return its tensors in float32, filled in the stream's order."""
        if not self.dtypes:
            return {}
        for name, array in arrays.items():
            self._binding.bind_input(name, "cuda", self._gpu, array.dtype.type, array.shape, array.data.ptr)
        try:
            unknown = self._run()
        except Exception as error:
            if not self._known:
                raise cannot_run(self._model, error) from error
            # ONNX infers another shape for a tensor than ONNX Runtime computes; or the error comes again.
            _log.debug("ONNX Runtime allocates the tensors of %s itself: %s", self._model.label, error)
            self.expect({})
            self.write_to(None)
            return self.run(arrays, stream)
        return {name: as_float32(array) for name, array in (self._shown | unknown).items()}

    def _run(self) -> dict[str, Any]:
        """Run the session; return the tensors of unknown shapes."""
        unknown = [name for name in self.dtypes if name not in self._known]
        for name in unknown:
            self._binding.bind_output(self._outputs[name], "cuda", self._gpu)  # anew, since the shape may change
        with contextlib.nullcontext() if self._has_run else _quiet():  # cuDNN picks its kernels in the first run
            self._session.run_with_iobinding(self._binding, self._run_options)
        self._has_run = True
        if not unknown:
            return {}
        values = self._binding.get_outputs()[len(self._known) :]  # in the order in which they were bound
        return {name: self._array(name, value) for name, value in zip(unknown, values, strict=True)}

    def _array(self, name: str, value: Any) -> Any:
        """Return an array over the memory of an `OrtValue`."""
        shape, dtype = tuple(value.shape()), self.dtypes[name]
        size = math.prod(shape) * dtype.itemsize
        memory = cupy.cuda.UnownedMemory(value.data_ptr(), size, value, self._gpu)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def _start(
    model: Model, proto: onnx.ModelProto, names: Sequence[str], provider_options: Mapping[str, str]
) -> tuple[Any, dict[str, str]]:
    """Return a session of `proto`, a variant of a model, and the name of the output that shows each tensor.

    If an operator without a CUDA kernel computes or reads a tensor, its output lies in host memory. ONNX Runtime
    copies it to the GPU before it is complete (seen with 1.31), so a copy of it that is computed on the GPU is shown.
    """

    def start(copies: Mapping[str, str]) -> Any:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [(_PROVIDER, dict(provider_options)), "CPUExecutionProvider"]
        with _quiet():
            return start_session(model, with_outputs(proto, names, copies), options, providers)

    session = start({})
    if _PROVIDER not in session.get_providers():
        raise UnavailableError(
            "ONNX Runtime's CUDA provider does not start here: run fastcal doctor, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES= to calibrate on the CPU", "onnxruntime-gpu"
        )  # fmt: skip
    _log_operators_on_cpu(session)
    floats = float_outputs(session, names)
    places = dict(zip([value.name for value in session.get_outputs()], session.get_output_memory_infos(), strict=True))
    copies = {name: f"{name} on the GPU" for name in floats if places[name].name != "Cuda"}
    if copies:
        session = start(copies)
    return session, {name: copies.get(name, name) for name in floats}


def _log_operators_on_cpu(session: Any) -> None:
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before ONNX Runtime 1.24
        return
    parts = session.get_provider_graph_assignment_info()
    operators = {node.op_type for part in parts if part.ep_name != _PROVIDER for node in part.get_nodes()}
    if operators:
        _log.debug("ONNX Runtime has no CUDA kernel for %s, or prefers the CPU there", ", ".join(sorted(operators)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ONNX Runtime and cuDNN say of kernels that they do not use from the standard error."""
    onnxruntime.set_default_logger_severity(_NOTHING_BUT_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)  # the default; what it was cannot be asked


def _preload_libraries() -> None:
    """Load the CUDA and cuDNN libraries of NVIDIA's wheels, which the CUDA provider would not find by itself."""
    with contextlib.redirect_stdout(io.StringIO()):  # which libraries are missing, the provider says too
        onnxruntime.preload_dlls()
