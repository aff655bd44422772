"""TensorRT's builder and parser: starting them, what they say, and an ONNX file as a network."""

import logging
from collections.abc import Iterable
from typing import Any

from fastcal.errors import GPU_EXTRAS, FastcalError, ModelError, UnavailableError, quoted
from fastcal.model import Model

try:
    import tensorrt as trt  # for those who need TensorRT: `from fastcal.network import trt`
except (ImportError, OSError) as error:
    raise UnavailableError(f"TensorRT cannot be imported ({error}): {GPU_EXTRAS}", "TensorRT") from error

__all__ = ["Logger", "parse", "start_builder", "tactic_bits", "trt"]

#: What TensorRT says goes to a logger of its own, so that an application can show or hide it.
_log = logging.getLogger("fastcal.tensorrt")


class Logger(trt.ILogger):  # type: ignore[misc]
    """Hands TensorRT's messages to `logging`, and keeps its errors for ours."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        levels = {trt.ILogger.VERBOSE: 5, trt.ILogger.INFO: logging.DEBUG, trt.ILogger.WARNING: logging.WARNING}
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)
        _log.log(levels.get(severity, logging.ERROR), "TensorRT: %s", message)

    def reasons(self) -> str:
        """TensorRT's last errors, or else its last warning, in one line."""
        said = self.errors[-2:] or self.warnings[-1:]  # that it finds no driver is a warning to 8.6
        return " ".join("; ".join(said).split()) or "no reason given"


def start_builder(logger: Logger) -> Any:
    """A TensorRT builder.

    Raises:
        FastcalError: TensorRT cannot start, for want of a GPU, say.
    """
    try:
        return trt.Builder(logger)
    except TypeError as error:  # how the bindings say that TensorRT made none
        raise UnavailableError(
            f"TensorRT cannot start here ({logger.reasons()}): it needs an NVIDIA GPU and a driver that fits; fastcal "
            "calibrate needs neither"
        ) from error


def parse(builder: Any, model: Model, logger: Logger) -> Any:
    """The network of an ONNX file.

    Raises:
        FastcalError: TensorRT's parser does not take the file.
    """
    explicit_batch = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # TensorRT 10 knows no other
    network = builder.create_network(0 if explicit_batch is None else 1 << int(explicit_batch))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model.path)):
        errors = [_describe(parser.get_error(index), model) for index in range(parser.num_errors)]
        raise ModelError(f"TensorRT cannot parse {model.path}: {'; '.join(errors)}".replace("\n", " "))
    return network


def tactic_bits(sources: int | Iterable[str] | None) -> int | None:
    """The bits of tactic sources given by name (`tensorrt.TacticSource`), or as bits.

    Raises:
        FastcalError: There is no source of that name.
    """
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


def _describe(error: Any, model: Model) -> str:
    """A parser's error, with the node it is about."""
    nodes = model.proto.graph.node
    if not 0 <= error.node() < len(nodes):
        return str(error.desc())
    node = nodes[error.node()]
    return f"{node.op_type} node of {quoted(node.output)}: {error.desc()}"
