"""TensorRT's builder, its parser, its messages, and the tensors of its networks."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx

from fastcal import library
from fastcal.errors import TENSORRT, UnavailableError
from fastcal.library import Messages
from fastcal.model import Model

try:
    import tensorrt as trt  # other modules use `from fastcal.network import trt`, so that one place reports a failure
except Exception as error:
    raise UnavailableError(
        f"engines and calibrators need TensorRT 8.6 to 10.16, which cannot be imported ({error}): {TENSORRT}; "
        "without it, fastcal calibrate writes a cache",
        "TensorRT",
    ) from error

__all__ = [
    "Logger",
    "computed_tensors",
    "constant_values",
    "float_names",
    "input_tensors",
    "is_float",
    "layers",
    "parse",
    "pooled_tensors",
    "start_builder",
    "tactic_bits",
    "trt",
]


class Logger(Messages, trt.ILogger):  # type: ignore[misc]
    """Passes TensorRT's messages on to `logging`, and keeps its errors and warnings for fastcal's own errors."""

    library = trt


def start_builder(logger: Logger) -> Any:
    """Return a `tensorrt.Builder`."""
    return library.start(trt, logger)


def parse(builder: Any, model: Model, logger: Logger, proto: onnx.ModelProto | None = None) -> Any:
    """Return the `tensorrt.INetworkDefinition` of an ONNX file, or of `proto`, which was made from the file."""
    return library.parse_with(trt, builder, logger, model, proto)


def tactic_bits(sources: int | Iterable[str] | None) -> int | None:
    """Return the bits of tactic sources, which are given as bits or by their names in `tensorrt.TacticSource`."""
    return library.tactic_bits(trt, sources)


def input_tensors(network: Any) -> list[Any]:
    """Return the inputs of an `INetworkDefinition`."""
    return [network.get_input(index) for index in range(network.num_inputs)]


def layers(network: Any) -> Iterator[Any]:
    """Return the layers of an `INetworkDefinition`, in order."""
    return (network.get_layer(index) for index in range(network.num_layers))


def is_float(value: Any) -> bool:
    """Return whether a tensor of an `INetworkDefinition` is calibrated: whether it is of a float type."""
    return value.dtype in (trt.float32, trt.float16)


def computed_tensors(network: Any) -> list[Any]:
    """Return the float tensors that the layers of an `INetworkDefinition` compute, without constants."""
    values = (
        layer.get_output(index)
        for layer in layers(network)
        if layer.type != trt.LayerType.CONSTANT
        for index in range(layer.num_outputs)
    )
    return [value for value in values if value is not None and is_float(value)]


def constant_values(network: Any) -> dict[str, Any]:
    """Return the values of the float constants by tensor name: TensorRT gives them scales too."""
    constants = {}
    for layer in layers(network):
        if layer.type == trt.LayerType.CONSTANT and is_float(layer.get_output(0)):
            layer.__class__ = trt.IConstantLayer
            weights = layer.weights
            # NumPy 2 finds a stride of 0 in the weights of TensorRT 8.6, built for NumPy 1.
            values = np.lib.stride_tricks.as_strided(weights, strides=(weights.itemsize,))
            constants[layer.get_output(0).name] = values.astype(np.float32)
    return constants


def float_names(network: Any) -> list[str]:
    """Return the names of the tensors of an `INetworkDefinition` that TensorRT asks a cache for."""
    values = [*filter(is_float, input_tensors(network)), *computed_tensors(network)]
    constants = (layer.get_output(0) for layer in layers(network) if layer.type == trt.LayerType.CONSTANT)
    return [value.name for value in (*values, *filter(is_float, constants))]


def pooled_tensors(network: Any) -> dict[str, str]:
    """Return the outputs of pooling layers, which take their inputs' scales: see `Model.shared_scales`."""
    sources: dict[str, str] = {}
    for layer in layers(network):
        if layer.type == trt.LayerType.POOLING:
            source = layer.get_input(0).name
            sources[layer.get_output(0).name] = sources.get(source, source)
    return sources
