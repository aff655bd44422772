"""TensorRT's builder, its parser, its messages, and the tensors of its networks."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx

from fastcal.errors import TENSORRT, FastcalError, ModelError, UnavailableError, quoted
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

#: TensorRT's messages go to a logger of their own, so that an application can show or hide them.
_log = logging.getLogger("fastcal.tensorrt")


class Logger(trt.ILogger):  # type: ignore[misc]
    """Passes TensorRT's messages on to `logging`, and keeps its errors and warnings for fastcal's own errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Take a message; TensorRT calls this method."""
        levels = {trt.ILogger.VERBOSE: 5, trt.ILogger.INFO: logging.DEBUG, trt.ILogger.WARNING: logging.WARNING}
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)
        _log.log(levels.get(severity, logging.ERROR), "TensorRT: %s", message)

    def reasons(self) -> str:
        """Return TensorRT's last two errors in one line; if there are none, its last warning."""
        said = self.errors[-2:] or self.warnings[-1:]  # TensorRT 8.6 reports a missing driver as a warning
        return " ".join("; ".join(said).split()) or "no reason given"


def start_builder(logger: Logger) -> Any:
    """Return a `tensorrt.Builder`."""
    try:
        return trt.Builder(logger)
    except TypeError as error:  # raised by the bindings if TensorRT returns no builder
        raise UnavailableError(
            f"TensorRT cannot start here ({logger.reasons()}): it needs an NVIDIA GPU and a driver that fits; fastcal "
            "calibrate needs neither"
        ) from error


def parse(builder: Any, model: Model, logger: Logger) -> Any:
    """Return the `tensorrt.INetworkDefinition` of an ONNX file."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # None: there is no other kind
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model.path)):
        errors = [_describe(parser.get_error(index), model) for index in range(parser.num_errors)]
        raise ModelError(f"TensorRT cannot parse {model.label}: {'; '.join(errors)}".replace("\n", " "))
    return network


def tactic_bits(sources: int | Iterable[str] | None) -> int | None:
    """Return the bits of tactic sources, which are given as bits or by their names in `tensorrt.TacticSource`."""
    if sources is None or isinstance(sources, int):
        return sources
    if isinstance(sources, str):
        raise FastcalError(f"tactic_sources is {sources!r}; give a list of names")
    known = trt.TacticSource.__members__
    bits = 0
    for name in sources:
        if name not in known:
            raise FastcalError(f"there is no tactic source {name!r}; TensorRT {trt.__version__} has {', '.join(known)}")
        bits |= 1 << int(known[name])
    return bits


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


def _describe(error: Any, model: Model) -> str:
    """Return the text of a parser error, with the node that the error is about."""
    nodes = onnx.load(model.path, load_external_data=False).graph.node  # without functions inlined
    if not 0 <= error.node() < len(nodes):
        return str(error.desc())
    node = nodes[error.node()]
    return f"{node.op_type} node of {quoted(node.output)}: {error.desc()}"
