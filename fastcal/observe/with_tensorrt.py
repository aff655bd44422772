"""A network observed on a GPU: TensorRT runs it in FP32 with every tensor an output, and the GPU counts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from fastcal.batch import format_shape, known_sizes
from fastcal.definition import Definition, Network
from fastcal.errors import ModelError
from fastcal.memory import groups
from fastcal.model import Model
from fastcal.network import (
    Logger,
    computed_tensors,
    constant_values,
    input_tensors,
    is_float,
    layers,
    parse,
    pooled_tensors,
    start_builder,
    tactic_bits,
    trt,
)
from fastcal.observe.device_observer import DeviceObserver, Runner, aligned, as_float32, free_on_device, place, taken


class TensorRTObserver(DeviceObserver):
    """Runs batches through a network on CuPy's current GPU: an `Observer`, with the settings of `fastcal.calibrate`.

    Tensors have their names of TensorRT's own caches. An engine is built for the first batch, and again for batches of
    other shapes. All observed tensors of a batch may take `memory` bytes, by default 70 % of what is free on the GPU;
    if they take more, the network runs several times over each batch. A `Definition` stays as it is.
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
        self.shared_scales = pooled_tensors(definition)
        constants = {name: cupy.asarray(values) for name, values in constant_values(definition).items()}
        observed = [*filter(is_float, input_tensors(definition)), *self._builder.computed]
        super().__init__(
            Definition(definition).inputs, network.label, [*(value.name for value in observed), *constants]
        )
        self._histograms.update_all(constants)  # `begin` leaves them out
        cupy.cuda.get_current_stream().synchronize()

    def _make_runners(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Runner]:
        return list(self._builder.build(shapes))


class _EngineBuilder:
    """Builds engines that show the float tensors which the layers of `network`, an `INetworkDefinition`, compute."""

    def __init__(
        self, network: Network, tf32: bool, optimization_level: int, memory: int | None, tactic_sources: int | None
    ) -> None:
        self._logger = Logger()
        self._builder = start_builder(self._logger)
        self._label = network.label
        self.network = parse(self._builder, network, self._logger) if isinstance(network, Model) else network.raw
        self.computed = computed_tensors(self.network)
        self._memory = memory
        config = self._config = self._builder.create_builder_config()
        config.builder_optimization_level = optimization_level
        if not tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if tactic_sources is not None:
            config.set_tactic_sources(tactic_sources)

    def build(self, shapes: Mapping[str, tuple[int, ...]]) -> "Iterator[_Engine]":
        """Yield one engine per group of tensors that fit the memory together, for inputs of these shapes."""
        with _fixed(self.network, shapes), _unconstrained(self.network):
            tensors = {value.name: value for value in self.computed}
            sizes = {name: _bytes(value) for name, value in tensors.items()}
            for group in groups(sizes, self._memory or free_on_device(), "the GPU's memory"):
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
                self.bytes += aligned(math.prod(shape) * dtype.itemsize)
        self._names = [name for name in names if name in self._places]
        self._shown: dict[str, Any] = {}

    def write_to(self, block: Any) -> None:
        """Put the arrays into a block of the GPU's memory."""
        for name, (shape, dtype, offset) in self._places.items():
            self._shown[name] = place(shape, dtype, block, offset)
            self._context.set_tensor_address(name, self._shown[name].data.ptr)

    def run(self, arrays: Mapping[str, Any], stream: Any) -> dict[str, Any]:
        """Enqueue one batch; return its tensors in float32, filled in the stream's order."""
        for name in self._inputs:
            self._context.set_tensor_address(name, arrays[name].data.ptr)
        if not self._context.execute_async_v3(stream.ptr):
            raise ModelError(f"TensorRT cannot run the network: {self._logger.reasons()}")
        return {name: as_float32(self._shown[name]) for name in self._names}


def _bytes(value: Any) -> int:
    shape = tuple(value.shape)
    if min(shape, default=0) < 0:
        raise ModelError(
            f"the shape of tensor {value.name!r} is {format_shape(known_sizes(shape))} even "
            "for inputs of fixed shapes: it depends on the data; use backend='onnxruntime'"
        )
    return taken(math.prod(shape), np.dtype(trt.nptype(value.dtype)))


@contextmanager
def _fixed(network: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    inputs = input_tensors(network)
    before = [tuple(value.shape) for value in inputs]
    try:
        for value in inputs:
            value.shape = shapes[value.name]
        yield
    finally:
        for value, shape in zip(inputs, before, strict=True):
            value.shape = shape


@contextmanager
def _unconstrained(network: Any) -> Iterator[None]:
    """Take the layers' own precisions away: a builder in FP32 refuses a network that asks for INT8 or FP16."""
    asking = [layer for layer in layers(network) if layer.precision_is_set]
    precisions = [layer.precision for layer in asking]
    types = [
        (layer, index, layer.get_output_type(index))
        for layer in asking
        for index in range(layer.num_outputs)
        if layer.output_type_is_set(index)
    ]
    for layer in asking:
        layer.reset_precision()
    for layer, index, _ in types:
        layer.reset_output_type(index)
    try:
        yield
    finally:
        for layer, precision in zip(asking, precisions, strict=True):
            layer.precision = precision
        for layer, index, dtype in types:
            layer.set_output_type(index, dtype)


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
