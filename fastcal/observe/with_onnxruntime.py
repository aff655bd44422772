"""A network observed on the CPU: ONNX Runtime runs it with every activation visible, and all cores count."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from fastcal.batch import match_batch
from fastcal.device import to_host
from fastcal.errors import ModelError, first_few
from fastcal.memory import SHARE, free_memory, groups
from fastcal.model import Model
from fastcal.observe.histogram import Histogram, Histograms
from fastcal.observe.operators import cut_unknown

#: The characters of ONNX Runtime's messages that are shown of the beginning and of the end: the cause comes last.
_ENDS = 250

#: The remedy for a message of ONNX Runtime with these words; the first that fits.
_REMEDIES = {
    "Failed to allocate memory": "use a smaller batch size",
    "bad_alloc": "use a smaller batch size",
    "Got invalid dimensions": "give arrays of the expected sizes",
    "is under development": "update ONNX Runtime, or export the network with an older opset",
    "Unsupported model IR version": "update ONNX Runtime, or export the network with an older onnx",
    "NOT_IMPLEMENTED": "update ONNX Runtime, or export the network in float32",
    "No Op registered": "update ONNX Runtime, or export the network with ONNX's own operators",
    "not a registered function": "use backend tensorrt if TensorRT knows it, or export the network without it",
    "Failed to serialize": "its weights take over 2 GB in one file: store them as external data",
    "INVALID_GRAPH": "export it again",
    "not acyclic": "export it again",
}

_log = logging.getLogger("fastcal")

#: ONNX Runtime's names of the types of tensors that are counted, with NumPy's names.
FLOAT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class OnnxRuntimeObserver(AbstractContextManager["OnnxRuntimeObserver"]):
    """Runs batches through a model on the CPU: an `Observer`, and a context manager; `memory` as in `PartedRunner`."""

    def __init__(self, model: Model, threads: int | None = None, memory: int | None = None) -> None:
        self._model = model
        self.shared_scales = model.shared_scales
        self._runner = PartedRunner(model, threads, memory)
        warn_of_unknown(self._runner.unknown, self._runner.gone)
        self._histograms = Histograms(threads)

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew with these ranges."""
        self._histograms.clear()
        self._histograms.update({name: Histogram(start) for name, start in starts.items()})

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Run one batch and count its activations."""
        arrays = match_batch(self._model.inputs, self._model.label, batch)
        for values in self._runner.run(arrays):
            self._histograms.update_all(values)
            del values  # before the next ones are computed

    def histograms(self) -> Mapping[str, Histogram]:
        """Return the histograms by tensor name."""
        return self._histograms

    def __exit__(self, *error: object) -> None:
        with self._runner, self._histograms:
            pass


class PartedRunner(AbstractContextManager["PartedRunner"]):
    """Runs batches through a model, several times if its activations do not fit the memory together.

    They may take `memory` bytes: by default 70 % of what is free when the first batch comes, or all of it for a single
    activation that takes that much. `tensors` are the names of the float inputs and activations, in the graph's order;
    `outputs`, `unknown` and `gone` are as in `OnnxRuntimeRunner`.
    """

    def __init__(self, model: Model, threads: int | None = None, memory: int | None = None) -> None:
        self._model = model
        self._threads = threads
        self._memory = memory
        self._free: int | None = None
        self._runners = [OnnxRuntimeRunner(model, threads)]
        self._activations = self._runners[0].activations
        self.outputs, self.unknown, self.gone = (getattr(self._runners[0], n) for n in ("outputs", "unknown", "gone"))
        self.tensors = [*self._runners[0].inputs, *self._activations]
        self._shapes: Mapping[str, tuple[int, ...]] = {}  # of the inputs that the runners are for

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Yield the values of some of `tensors`, each tensor once. Drop them before asking for the next ones."""
        shapes = {name: tuple(array.shape) for name, array in batch.items()}
        if shapes != self._shapes:
            self._fit(shapes)
            self._shapes = shapes
        first, *others = self._runners
        yield first.run(batch)
        for runner in others:
            yield {name: values for name, values in runner.run(batch).items() if name not in runner.inputs}

    def _fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make as many runners as the activations of inputs of these shapes need to fit the memory."""
        if self._free is None:
            free = free_memory()  # before batches take some of it
            self._free = sys.maxsize if free is None else free
        known = self._model.sizes(shapes)
        sizes = {name: known.get(name, 0) for name in self._activations}
        allowed = max(int(SHARE * self._free), min(self._free, max(sizes.values(), default=0)))
        shown = groups(sizes, self._memory or allowed, "the memory")
        if shown != [list(runner.activations) for runner in self._runners]:
            self.__exit__()
            self._runners = [OnnxRuntimeRunner(self._model, self._threads, activations=group) for group in shown]

    def __exit__(self, *error: object) -> None:
        for runner in self._runners:
            runner.__exit__()


class OnnxRuntimeRunner(AbstractContextManager["OnnxRuntimeRunner"]):
    """Runs batches through a model without graph optimization, so that no activation is fused away.

    Shows these `activations`, by default all; or the outputs of a `variant` of the model, with Q/DQ pairs for instance.
    Operators that are `unknown` to ONNX Runtime are cut off, so the tensors with the names `gone` are not computed;
    `outputs` are the names of the outputs that are left, or of the tensors at the cut if none are.
    """

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        *,
        variant: onnx.ModelProto | None = None,
        activations: Sequence[str] | None = None,
    ) -> None:
        self._model = model
        proto, self.unknown, self.gone = cut_unknown(model.proto if variant is None else variant)
        self.outputs = [value.name for value in proto.graph.output]
        shown = None
        if variant is None:
            shown = [name for name in activations or model.activations if name not in self.gone]
        options = onnxruntime.SessionOptions()
        # An arena would keep memory from the other runners: as much as large weights take.
        options.enable_cpu_mem_arena = activations is None and not model.external.files
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        data = proto.SerializeToString() if shown is None else with_outputs(proto, shown)
        self._session = start_session(model, data, options)
        self.inputs = [value.name for value in self._session.get_inputs() if value.type in FLOAT_TYPES]
        self.activations = list(float_outputs(self._session, shown))
        # A thread of its own runs the session, so that the calling thread stays open to Ctrl-C.
        self._thread = ThreadPoolExecutor(1, "fastcal-runner")

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch; return the float inputs and activations by name."""
        arrays = {value.name: np.asarray(to_host(batch[value.name]), value.dtype) for value in self._model.inputs}
        if not self.activations:
            return {name: arrays[name] for name in self.inputs}
        options = run_options()
        future = self._thread.submit(self._session.run, self.activations, arrays, options)
        try:
            values = future.result()
        except Exception as error:
            raise cannot_run(self._model, error) from error
        except BaseException:  # Ctrl-C: stop at the next layer
            options.terminate = True
            wait([future])
            raise
        return {name: arrays[name] for name in self.inputs} | dict(zip(self.activations, values, strict=True))

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def warn_of_unknown(operators: Sequence[str], gone: Sequence[str]) -> None:
    """Name the operators that ONNX Runtime does not know, if there are any, and the tensors that are gone with them."""
    if operators:
        _log.warning(
            "ONNX Runtime does not know %s: there are no scales for what depends on it (%s); backend tensorrt runs "
            "TensorRT's plugins",
            ", ".join(operators), first_few(gone),
        )  # fmt: skip


def with_outputs(proto: onnx.ModelProto, names: Iterable[str], copies: Mapping[str, str] | None = None) -> bytes:
    """Return a serialized model that has these tensors among its outputs; ONNX Runtime infers their types.

    `copies` are outputs in place of some of the tensors, each a copy of the tensor: by the tensor's name.
    """
    more = onnx.ModelProto()  # protobuf merges what is concatenated
    for name, copy in (copies or {}).items():
        more.graph.node.add(op_type="Identity", input=[name], output=[copy])
    there = {value.name for value in proto.graph.output}
    shown = [(copies or {}).get(name, name) for name in names]
    outputs = [name for name in shown if name not in there]
    more.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return bytes(proto.SerializeToString() + more.SerializeToString())


def start_session(model: Model, data: bytes, options: Any, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """Return an `onnxruntime.InferenceSession` of a serialized variant of a model, without graph optimization."""
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.external.root))
    try:
        return onnxruntime.InferenceSession(data, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"ONNX Runtime cannot load {model.path}: {_reason(error)}") from error


def float_outputs(session: Any, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return NumPy's type of each float output of a session, of these `names` in their order, or of all."""
    types = {value.name: FLOAT_TYPES[value.type] for value in session.get_outputs() if value.type in FLOAT_TYPES}
    return types if names is None else {name: types[name] for name in names if name in types}


def run_options() -> Any:
    """Return `onnxruntime.RunOptions` with which errors come as exceptions alone."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


def cannot_run(model: Model, error: Exception) -> ModelError:
    """Return the error to raise if ONNX Runtime raises `error` while it runs a model."""
    return ModelError(f"ONNX Runtime cannot run {model.path}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return the message of an exception of ONNX Runtime in one line, with the remedy if it is known."""
    text = " ".join(str(error).split())
    if len(text) > 2 * _ENDS:
        text = f"{text[:_ENDS]} ... {text[-_ENDS:]}"
    remedy = next((remedy for said, remedy in _REMEDIES.items() if said in str(error)), None)
    return f"{text.rstrip('.')}; {remedy}" if remedy else text
