"""A network observed on a GPU: TensorRT runs it in FP32 with every tensor an output, and the GPU counts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from fastcal.batch import Input, check_values, format_shape, known_sizes, match_batch
from fastcal.device import upload, wait_until_filled
from fastcal.errors import ModelError
from fastcal.memory import SHARE, groups
from fastcal.model import Definition, Model, Network
from fastcal.network import Logger, parse, start_builder, tactic_bits, trt
from fastcal.observe.device_histograms import DeviceHistograms
from fastcal.observe.histogram import Histogram

#: TensorRT wants its tensors at multiples of 256 bytes.
_ALIGNMENT = 256


class TensorRTObserver:
    """Runs batches through a network on CuPy's current GPU: an `Observer`, with the settings of `fastcal.calibrate`.

    Within the context, CuPy's current stream is the one that reads the batches, so that a feed fills no buffer that is
    still in use. Tensors have their names of TensorRT's own caches. An engine is built for the first batch, and again
    for batches of other shapes. All observed tensors of a batch may take `memory` bytes, by default 70 % of what is
    free on the GPU; if they take more, the network runs several times over each batch. A `Definition` stays as it is.
    """

    def __init__(
        self,
        network: Network,
        *,
        tf32: bool = False,
        optimization_level: int | None = None,
        memory: int | None = None,
        tactic_sources: int | Iterable[str] | None = None,
    ) -> None:
        self._builder = _EngineBuilder(network, tf32, optimization_level or 0, memory, tactic_bits(tactic_sources))
        definition = self._builder.network
        self._inputs = Definition(definition).inputs
        self._label = network.label
        self.shared_scales = _pooled(definition)
        self._engines: list[_Engine] = []
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the inputs that the engines are built for
        self._uploads: dict[str, Any] = {}
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._ends = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        constants = {name: cupy.asarray(values) for name, values in _constants(definition).items()}
        observed = [*filter(_is_float, _inputs(definition)), *self._builder.computed]
        self._histograms = DeviceHistograms([*(value.name for value in observed), *constants])
        self._histograms.update_all(constants)
        cupy.cuda.get_current_stream().synchronize()

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew with these ranges, without the constants."""
        self._histograms.begin(starts)

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Run one batch of arrays on the GPU or in host memory and count its tensors; wait for the batch before."""
        batch = match_batch(self._inputs, self._label, batch)
        arrays = {value.name: self._on_device(value, batch[value.name]) for value in self._inputs}
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if shapes != self._shapes:
            self._stream.synchronize()
            self._forget_engines()
            self._engines = list(self._builder.build(shapes))
            block = cupy.empty(max(engine.bytes for engine in self._engines), np.uint8)
            for engine in self._engines:  # they run one after another
                engine.write_to(block)
            self._shapes = shapes
        shown = {
            name: array.astype(np.float32, copy=False) for name, array in arrays.items() if array.dtype.kind == "f"
        }
        for engine in self._engines:
            self._histograms.update_all(shown | engine.run(arrays, self._stream))
            shown = {}
        self._ends.reverse()
        self._ends[0].record(self._stream)
        self._ends[1].synchronize()
        if not all(isinstance(array, np.ndarray | cupy.ndarray) for array in batch.values()):
            self._stream.synchronize()  # another library may write to its arrays whatever CuPy's stream still reads

    def histograms(self) -> dict[str, Histogram]:
        """Return the histograms by tensor name, those of the constants too unless `begin` was called."""
        return self._histograms.fetch()

    def __enter__(self) -> "TensorRTObserver":
        cupy.cuda.Device().synchronize()  # arrays that exist already are complete
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.synchronize()
        self._stream.__exit__(*error)
        self._forget_engines()

    def _forget_engines(self) -> None:
        self._engines, self._shapes = [], None
        cupy.get_default_memory_pool().free_all_blocks()  # TensorRT, which may build next, has memory of its own

    def _on_device(self, value: Input, array: Any) -> Any:
        if hasattr(array, "__cuda_array_interface__"):
            if not isinstance(array, cupy.ndarray):  # CuPy's arrays are made on the current stream, or earlier
                wait_until_filled(array)
            given = cupy.asarray(array)
            check_values(given, value, self._label)
            return cupy.asarray(given, value.dtype, order="C")
        return upload(np.asarray(array, value.dtype), value.name, self._uploads)  # after the batch before was read


class _EngineBuilder:
    """Builds engines that show the float tensors which the layers of `network`, an `INetworkDefinition`, compute."""

    def __init__(
        self, network: Network, tf32: bool, optimization_level: int, memory: int | None, tactic_sources: int | None
    ) -> None:
        self._logger = Logger()
        self._builder = start_builder(self._logger)
        self._label = network.label
        self.network = parse(self._builder, network, self._logger) if isinstance(network, Model) else network.raw
        self.computed = _computed(self.network)
        self._memory = memory
        config = self._config = self._builder.create_builder_config()
        config.builder_optimization_level = optimization_level
        if not tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if tactic_sources is not None:
            config.set_tactic_sources(tactic_sources)

    def build(self, shapes: Mapping[str, tuple[int, ...]]) -> "Iterator[_Engine]":
        """Yield one engine per group of tensors that fit the memory together, for inputs of these shapes."""
        with _fixed(self.network, shapes):
            tensors = {value.name: value for value in self.computed}
            sizes = {name: _bytes(value) for name, value in tensors.items()}
            memory = self._memory or int(SHARE * cupy.cuda.runtime.memGetInfo()[0])
            for group in groups(sizes, memory, "the GPU's memory"):
                with _outputs(self.network, [tensors[name] for name in group]):
                    plan = self._builder.build_serialized_network(self.network, self._config)
                    if plan is None:
                        raise ModelError(
                            f"TensorRT cannot build {self._label} with every tensor visible: {self._logger.reasons()}; "
                            "use backend='onnxruntime'"
                        )
                    yield _Engine(plan, group, self._logger)


class _Engine:
    """An engine, and the arrays to which it writes some of the network's tensors; they take `bytes` of memory."""

    def __init__(self, plan: Any, names: Sequence[str], logger: Logger) -> None:
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        context = None if self._engine is None else self._engine.create_execution_context()
        if context is None:
            raise ModelError(f"TensorRT cannot run the network: {logger.reasons()}; use a smaller batch size")
        self._context: Any = context
        self._logger = logger
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in tensors if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._places: dict[str, tuple[tuple[int, ...], Any, int]] = {}
        self.bytes = 0
        for name in tensors:
            if name not in self._inputs:
                shape = tuple(self._engine.get_tensor_shape(name))
                dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
                self._places[name] = shape, dtype, self.bytes
                self.bytes += _aligned(math.prod(shape) * dtype.itemsize)
        self._names = [name for name in names if name in self._places]
        self._shown: dict[str, Any] = {}

    def write_to(self, block: Any) -> None:
        """Put the arrays into a block of the GPU's memory."""
        for name, (shape, dtype, offset) in self._places.items():
            self._shown[name] = cupy.ndarray(shape, dtype, block.data + offset)
            self._context.set_tensor_address(name, self._shown[name].data.ptr)

    def run(self, arrays: Mapping[str, Any], stream: Any) -> dict[str, Any]:
        """Enqueue one batch; return its tensors in float32, filled in the stream's order."""
        for name in self._inputs:
            self._context.set_tensor_address(name, arrays[name].data.ptr)
        if not self._context.execute_async_v3(stream.ptr):
            raise ModelError(f"TensorRT cannot run the network: {self._logger.reasons()}")
        return {name: self._shown[name].astype(np.float32, copy=False) for name in self._names}


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(index) for index in range(network.num_inputs)]


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _is_float(value: Any) -> bool:
    return value.dtype in (trt.float32, trt.float16)


def _computed(network: Any) -> list[Any]:
    values = (
        layer.get_output(index)
        for layer in _layers(network)
        if layer.type != trt.LayerType.CONSTANT
        for index in range(layer.num_outputs)
    )
    return [value for value in values if value is not None and _is_float(value)]


def _constants(network: Any) -> dict[str, Any]:
    """Return the values of the float constants by tensor name: TensorRT gives them scales too."""
    constants = {}
    for layer in _layers(network):
        if layer.type == trt.LayerType.CONSTANT and _is_float(layer.get_output(0)):
            layer.__class__ = trt.IConstantLayer
            weights = layer.weights
            # NumPy 2 finds a stride of 0 in the weights of TensorRT 8.6, built for NumPy 1.
            values = np.lib.stride_tricks.as_strided(weights, strides=(weights.itemsize,))
            constants[layer.get_output(0).name] = values.astype(np.float32)
    return constants


def _pooled(network: Any) -> dict[str, str]:
    """Return the outputs of pooling layers, which take their inputs' scales: see `Model.shared_scales`."""
    sources: dict[str, str] = {}
    for layer in _layers(network):
        if layer.type == trt.LayerType.POOLING:
            source = layer.get_input(0).name
            sources[layer.get_output(0).name] = sources.get(source, source)
    return sources


def _bytes(value: Any) -> int:
    shape = tuple(value.shape)
    if min(shape, default=0) < 0:
        raise ModelError(
            f"the shape of tensor {value.name!r} is {format_shape(known_sizes(shape))} even "
            "for inputs of fixed shapes: it depends on the data; use backend='onnxruntime'"
        )
    elements, dtype = math.prod(shape), np.dtype(trt.nptype(value.dtype))
    copy = 0 if dtype == np.float32 else _aligned(4 * elements)  # they are counted as float32
    return _aligned(elements * dtype.itemsize) + copy


def _aligned(size: int) -> int:
    return max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT


@contextmanager
def _fixed(network: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    inputs = _inputs(network)
    before = [tuple(value.shape) for value in inputs]
    try:
        for value in inputs:
            value.shape = shapes[value.name]
        yield
    finally:
        for value, shape in zip(inputs, before, strict=True):
            value.shape = shape


@contextmanager
def _outputs(network: Any, values: Sequence[Any]) -> Iterator[None]:
    before = [network.get_output(index) for index in range(network.num_outputs)]
    for value in before:
        network.unmark_output(value)
    for value in values:
        network.mark_output(value)
    try:
        yield
    finally:
        for value in values:
            network.unmark_output(value)
        for value in before:
            network.mark_output(value)
