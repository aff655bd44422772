"""A network observed on the CPU: ONNX Runtime runs it with every activation visible, and all cores count."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from fastcal.batch import match_batch
from fastcal.device import to_host
from fastcal.errors import ModelError, first_few
from fastcal.memory import SHARE, check_sizes, free_memory, return_freed
from fastcal.model import Model
from fastcal.observe.histogram import Histogram, Histograms
from fastcal.observe.operators import cut_unknown
from fastcal.observe.segments import Segment, cut, node_size

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

#: The bytes that the activations of a segment take, if no other number is asked for.
_MOST = 2 << 30

_log = logging.getLogger("fastcal")

#: ONNX Runtime's names of the types of tensors that are counted, with NumPy's names.
FLOAT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class OnnxRuntimeObserver(AbstractContextManager["OnnxRuntimeObserver"]):
    """Runs batches through a model on the CPU: an `Observer`, and a context manager; settings as of `PartedRunner`."""

    def __init__(
        self, model: Model, threads: int | None = None, memory: int | None = None, *, is_optimized: bool = False
    ) -> None:
        self._model = model
        self.shared_scales = model.shared_scales
        self._runner = PartedRunner(model, threads, memory, is_optimized=is_optimized)
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
    """Runs batches through a model, in segments one after another if its activations take more than `memory` bytes.

    By default that is 2 GiB, or 70 % of what is free when the first batch comes if that is less. A single node's
    activations may take more, each at most what is free. The tensors that later segments read are kept beside the
    activations of a segment. `tensors` are the names of the float inputs and activations, in the graph's order;
    `types`, `outputs`, `unknown`, `gone` and `is_optimized` are as in `OnnxRuntimeRunner`.
    """

    def __init__(
        self, model: Model, threads: int | None = None, memory: int | None = None, *, is_optimized: bool = False
    ) -> None:
        self._model = model
        self._memory = memory
        self._free: int | None = None
        self._thread = _new_thread()
        self._settings = threads, self._thread, is_optimized
        whole = OnnxRuntimeRunner(model, threads, thread=self._thread, is_optimized=is_optimized)
        self.types = whole.types
        self.outputs: list[str] = whole.outputs
        self.unknown: list[str] = whole.unknown
        self.gone: list[str] = whole.gone
        self.tensors = [*whole.inputs, *whole.activations]
        self._runners: list[OnnxRuntimeRunner | _SegmentRunner] = [whole]
        self._shapes: Mapping[str, tuple[int, ...]] = {}  # of the inputs that the runners are for

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Yield the values of some of `tensors`, each tensor once. Drop them before asking for the next ones."""
        shapes = {name: tuple(array.shape) for name, array in batch.items()}
        if not _are_within(shapes, self._shapes):
            self._fit(batch)
            self._shapes = shapes
        alive = as_arrays(self._model, batch)
        yield {name: array for name, array in alive.items() if name in self.tensors}
        for index, runner in enumerate(self._runners):
            if index:
                return_freed()
            yield runner.compute(alive)

    def _fit(self, batch: Mapping[str, npt.NDArray[Any]]) -> None:
        """Make as many runners as the activations of a batch of this form need to fit the memory."""
        if self._free is None:
            free = free_memory()  # before batches take some of it
            self._free = sys.maxsize if free is None else free
        sizes = self._sizes(batch)
        check_sizes(sizes, self._free, "the memory")
        largest = max((node_size(node, sizes) for node in self._model.proto.graph.node), default=0)
        memory = self._memory or min(_MOST, int(SHARE * self._free))
        allowed = max(largest, memory)
        if all(sum(sizes[name] for name in runner.activations) <= allowed for runner in self._runners):
            return
        proto, _, _ = cut_unknown(self._model.proto)
        segments = cut(proto.graph, sizes, self.types, memory)
        if len(segments) == 1:  # there is no place to cut
            return
        self._runners = []  # frees the weights before they are loaded again
        for segment in segments:
            self._runners.append(_SegmentRunner(self._model, proto, segment, self.types, *self._settings))

    def _sizes(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
        """Return the bytes of each of `tensors`; 0 if they are not known.

        If ONNX cannot infer all shapes, a single sample runs to find them out.
        """
        known = self._model.sizes({name: tuple(array.shape) for name, array in batch.items()})
        whole = self._runners[0]
        counts = {len(batch[value.name]) if value.shape[:1] == (None,) else 0 for value in self._model.inputs}
        is_whole = isinstance(whole, OnnxRuntimeRunner)  # no smaller batch came before
        if is_whole and len(counts) == 1 and 0 not in counts and not known.keys() >= {*whole.activations}:
            one = as_arrays(self._model, {name: array[:1] for name, array in batch.items()})
            (count,) = counts
            known |= {name: count * array.nbytes for name, array in whole.compute(one).items()}
        return {name: known.get(name, 0) for name in self.tensors}

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


class OnnxRuntimeRunner(AbstractContextManager["OnnxRuntimeRunner"]):
    """Runs batches through a model and shows its activations.

    By default the graph is not optimized, so that each value is computed as the model says. If `is_optimized`, the
    values differ in the last bits. Shows all activations, or the outputs of a `variant` of the model, with Q/DQ pairs
    for instance. Operators that are `unknown` to ONNX Runtime are cut off, so the tensors with the names `gone` are not
    computed; `outputs` are the names of the outputs that are left, or of the tensors at the cut if none are. `types`
    are ONNX Runtime's types of the tensors that are shown, of any type. The session runs in `thread`, by default one of
    its own.
    """

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        *,
        variant: onnx.ModelProto | None = None,
        thread: ThreadPoolExecutor | None = None,
        is_optimized: bool = False,
    ) -> None:
        self._model = model
        proto, self.unknown, self.gone = cut_unknown(model.proto if variant is None else variant)
        self.outputs = [value.name for value in proto.graph.output]
        shown = None
        if variant is None:
            shown = [name for name in model.activations if name not in self.gone]
        data = proto.SerializeToString() if shown is None else with_outputs(proto, shown)
        self._thread = thread or _new_thread()
        # An arena would keep as much memory from the other runners as large weights take.
        has_arena = not model.external.files
        self._session = Session(model, data, threads, self._thread, has_arena=has_arena, is_optimized=is_optimized)
        self.types = self._session.outputs
        self.inputs = [name for name, type_ in self._session.inputs.items() if type_ in FLOAT_TYPES]
        self.activations = [name for name in shown or self.types if self.types.get(name) in FLOAT_TYPES]

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch; return the float inputs and activations by name."""
        arrays = as_arrays(self._model, batch)
        return {name: arrays[name] for name in self.inputs} | self.compute(arrays)

    def compute(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch, given as host arrays; return the float activations by name."""
        return self._session.run(self.activations, arrays)

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


class _SegmentRunner:
    """Runs a segment of a model, `proto`; `types` are ONNX Runtime's types of its tensors."""

    def __init__(
        self,
        model: Model,
        proto: onnx.ModelProto,
        segment: Segment,
        types: Mapping[str, str],
        threads: int | None,
        thread: ThreadPoolExecutor,
        is_optimized: bool,
    ) -> None:
        self.activations = [name for name in segment.computed if types.get(name) in FLOAT_TYPES]
        self._later = segment.later
        passed_on = (name for name in segment.computed if name in segment.later)
        self._shown = list(dict.fromkeys([*self.activations, *passed_on]))
        data = with_outputs(segment.model(proto, types), self._shown)
        # An arena would keep memory from the other segments.
        self._session = Session(model, data, threads, thread, has_arena=False, is_optimized=is_optimized)

    def compute(self, alive: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch; return the float activations by name.

        `alive` are the tensors that this segment or a later one reads; afterwards, those that a later one reads.
        """
        values = self._session.run(self._shown, alive)
        kept = {name: array for name, array in (alive | values).items() if name in self._later}
        alive.clear()
        alive.update(kept)
        return {name: values[name] for name in self.activations}


class Session:
    """A session of a serialized variant of a model; `inputs` and `outputs` are ONNX Runtime's types of these.

    It runs in `thread` with `threads` more, so that the calling thread stays open to Ctrl-C. If `is_optimized`, the
    graph is optimized, unless its weights are external data. Pairs still round: no layer computes with integers.
    """

    def __init__(
        self,
        model: Model,
        data: bytes,
        threads: int | None,
        thread: ThreadPoolExecutor,
        *,
        has_arena: bool,
        is_optimized: bool = False,
    ) -> None:
        self._model, self._thread = model, thread
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = has_arena
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning took a quarter of the time
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        is_optimized &= not model.external.files  # that would take copies of large weights
        self._session = start_session(model, data, options, is_optimized=is_optimized)
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}
        self.outputs = {value.name: value.type for value in self._session.get_outputs()}

    def run(self, names: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs with these names, by name."""
        if not names:
            return {}
        options = run_options()
        given = {name: arrays[name] for name in self.inputs}
        future = self._thread.submit(self._session.run, names, given, options)
        try:
            values = future.result()
        except Exception as error:
            raise cannot_run(self._model, error) from error
        except BaseException:  # Ctrl-C: stop at the next layer
            options.terminate = True
            wait([future])
            raise
        return dict(zip(names, values, strict=True))


def _are_within(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether no dimension of any shape is larger than in the others."""
    return shapes.keys() == others.keys() and all(
        len(shape) == len(others[name]) and all(map(int.__le__, shape, others[name])) for name, shape in shapes.items()
    )


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fastcal-runner")


def as_arrays(model: Model, batch: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Return a batch as arrays in host memory, of the types that the model's inputs have."""
    return {value.name: np.asarray(to_host(batch[value.name]), value.dtype) for value in model.inputs}


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


def start_session(
    model: Model,
    data: bytes,
    options: Any,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    *,
    is_optimized: bool = False,
) -> Any:
    """Return an `onnxruntime.InferenceSession` of a serialized variant of a model.

    If `is_optimized`, the graph is optimized, unless ONNX Runtime fails to.
    """
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.external.root))
    if is_optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        with suppress(Exception):  # ONNX Runtime's exceptions have no common base
            return onnxruntime.InferenceSession(data, options, providers=list(providers))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(data, options, providers=list(providers))
    except Exception as error:
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
