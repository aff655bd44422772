"""TensorRT and TensorRT for RTX, whose Python modules have the same interface: their builder, parser and messages."""

import importlib
import logging
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from fastcal.errors import TENSORRT, FastcalError, ModelError, UnavailableError, quoted
from fastcal.files import MOST_IN_A_FILE
from fastcal.model import Model

#: The Python modules of the builders by name, and the commands that install them.
_MODULES = {
    "tensorrt": (
        "tensorrt",
        f"pip install tensorrt, or {TENSORRT} for calibrators; without it, fastcal calibrate writes a cache",
    ),
    "rtx": ("tensorrt_rtx", "pip install tensorrt-rtx-cu13"),
}

#: The names of the builders.
BUILDERS = tuple(_MODULES)

#: Words of warnings that tell a user nothing: about what TensorRT for RTX always does with pairs of 16 bits, and about
#: a second logger, since TensorRT keeps to the first that it is given.
_EXPECTED = ("scales to fp32", "The logger passed into")

#: TensorRT's messages go to a logger of their own, so that an application can show or hide them.
_log = logging.getLogger("fastcal.tensorrt")


def load_library(builder: str) -> Any:
    """Return the Python module of a builder.

    Raises:
        FastcalError: There is no such builder.
        UnavailableError: The module cannot be imported.
    """
    if builder not in _MODULES:
        raise FastcalError(f"there is no builder {builder!r}; choose {' or '.join(BUILDERS)}")
    module, command = _MODULES[builder]
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UnavailableError(
            f"builder {builder} needs the module {module}, which cannot be imported ({error}): {command}",
            "TensorRT",
        ) from error


def is_strongly_typed(library: Any) -> bool:
    """Return True if every network runs in the types that its model names, as from TensorRT 11 on."""
    return not hasattr(library.BuilderFlag, "INT8")


def is_rtx(library: Any) -> bool:
    """Return True for TensorRT for RTX."""
    return hasattr(library, "ComputeCapability")


def tactic_bits(library: Any, sources: int | Iterable[str] | None) -> int | None:
    """Return the bits of tactic sources, which are given as bits or by their names in `TacticSource`."""
    if sources is None or isinstance(sources, int):
        return sources
    if isinstance(sources, str):
        raise FastcalError(f"tactic_sources is {sources!r}; give a list of names")
    known = library.TacticSource.__members__
    bits = 0
    for name in sources:
        if name not in known:
            version = library.__version__
            raise FastcalError(f"there is no tactic source {name!r}; TensorRT {version} has {', '.join(known)}")
        bits |= 1 << int(known[name])
    return bits


class Messages:
    """Passes messages on to `logging`, and keeps errors and warnings for fastcal's own errors; for an `ILogger`.

    Attributes:
        errors: The errors so far.
        warnings: The warnings so far.
        layers: The layers of the last engine, if the builder tells them.
    """

    #: TensorRT's Python module.
    library: Any

    def __init__(self) -> None:
        self.library.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""

    def clear(self) -> None:
        """Forget what was said so far."""
        self.errors.clear()
        self.warnings.clear()
        self.layers = ""

    def log(self, severity: Any, message: str) -> None:
        """Take a message; TensorRT calls this method."""
        kinds = self.library.ILogger
        if severity == kinds.VERBOSE and message.startswith("Layers:"):
            self.layers = message
        levels = {kinds.VERBOSE: 5, kinds.INFO: logging.DEBUG, kinds.WARNING: logging.WARNING}
        if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
            self.errors.append(message)
        elif severity == kinds.WARNING and any(words in message for words in _EXPECTED):
            severity = kinds.INFO
        elif severity == kinds.WARNING:
            self.warnings.append(message)
        _log.log(levels.get(severity, logging.ERROR), "TensorRT: %s", message)

    def reasons(self) -> str:
        """Return TensorRT's last two errors in one line; if there are none, its last warning."""
        said = self.errors[-2:] or self.warnings[-1:]  # TensorRT 8.6 reports a missing driver as a warning
        return " ".join("; ".join(said).split()) or "no reason given"


@cache
def logger_of(library: Any) -> Any:
    """Return the one logger of `Messages` for a library: TensorRT keeps to the first that it is given."""
    return type("Logger", (Messages, library.ILogger), {"library": library})()


def start(library: Any, logger: Messages) -> Any:
    """Return a library's `Builder`."""
    try:
        return library.Builder(logger)
    except TypeError as error:  # raised by the bindings if TensorRT returns no builder
        raise UnavailableError(
            f"TensorRT cannot start here ({logger.reasons()}): it needs an NVIDIA GPU and a driver that fits; fastcal "
            "calibrate needs neither"
        ) from error


def parse_with(library: Any, builder: Any, logger: Messages, model: Model, proto: onnx.ModelProto | None = None) -> Any:
    """Return the `INetworkDefinition` of a model, or of `proto`, which was made from the model's file."""
    if proto is None and model.is_variant:
        proto = model.proto
    flag = getattr(library.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # None: there is no other kind
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = library.OnnxParser(network, logger)
    if not (parser.parse_from_file(str(model.path)) if proto is None else _parse_proto(parser, model, proto)):
        nodes = onnx.load(model.path, load_external_data=False).graph.node if proto is None else proto.graph.node
        errors = [_describe(parser.get_error(index), nodes) for index in range(parser.num_errors)]
        raise ModelError(f"TensorRT cannot parse {model.label}: {'; '.join(errors)}".replace("\n", " "))
    return network


def _parse_proto(parser: Any, model: Model, proto: onnx.ModelProto) -> bool:
    """Parse a model from memory, or from a temporary file if it is too large."""
    if model.external.size(proto.graph) <= MOST_IN_A_FILE:
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        model.external.load(whole.graph)
        return bool(parser.parse(whole.SerializeToString()))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        moved = onnx.ModelProto()
        moved.CopyFrom(proto)
        with Path(folder, "data").open("wb") as file:
            model.external.move(moved.graph, "data", file)
        Path(folder, "model.onnx").write_bytes(moved.SerializeToString())
        return bool(parser.parse_from_file(str(Path(folder, "model.onnx"))))


def _describe(error: Any, nodes: Any) -> str:
    """Return the text of a parser error, with the node that the error is about."""
    if not 0 <= error.node() < len(nodes):
        return str(error.desc())
    node = nodes[error.node()]
    return f"{node.op_type} node of {quoted(node.output)}: {error.desc()}"
