"""A network observed on the CPU: ONNX Runtime runs it with every activation visible, and all cores count."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from fastcal.batch import match_batch
from fastcal.device import to_host
from fastcal.errors import ModelError
from fastcal.memory import SHARE, free_memory, groups
from fastcal.model import Model
from fastcal.observe.histogram import Histogram, Histograms

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
    "INVALID_GRAPH": "export it again",
    "not acyclic": "export it again",
}

_FLOAT = ("tensor(float)", "tensor(float16)", "tensor(double)")


class OnnxRuntimeObserver:
    """Runs batches through a model on the CPU and keeps the histograms of its activations; a context manager.

    Args:
        model: The model.
        threads: The number of threads that run the network and count; by default one per core of this process.
        memory: As for `PartedRunner`.

    Attributes:
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.

    Raises:
        ModelError: ONNX Runtime does not take the model.
    """

    def __init__(self, model: Model, threads: int | None = None, memory: int | None = None) -> None:
        self._model = model
        self.shared_scales = model.shared_scales
        self._runner = PartedRunner(model, threads, memory)
        self._histograms = Histograms(threads)

    def begin(self, starts: Mapping[str, float]) -> None:
        """Begin anew with ranges by tensor name: those that earlier batches have set."""
        self._histograms.clear()
        self._histograms.update({name: Histogram(start) for name, start in starts.items()})

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Run one batch and count its activations.

        Args:
            batch: Arrays by input name.

        Raises:
            DataError: The batch does not fit the model.
            FastcalError: The batch does not fit the memory.
            ModelError: ONNX Runtime fails on the batch.
        """
        arrays = match_batch(self._model.inputs, self._model.label, batch)
        for values in self._runner.run(arrays):
            self._histograms.update_all(values)
            del values  # before the next ones are computed

    def histograms(self) -> Mapping[str, Histogram]:
        """Return the histograms since the beginning, by tensor name."""
        return self._histograms

    def __enter__(self) -> "OnnxRuntimeObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._runner, self._histograms:
            pass


class PartedRunner:
    """Runs batches through a model and shows all activations, as many at a time as fit the memory.

    If they do not fit the memory together, the network runs several times over each batch. A context manager.

    Args:
        model: The model.
        threads: As for `OnnxRuntimeRunner`.
        memory: The bytes that the activations of a batch may take; by default 70 % of what is free when the first batch
            comes, or all of it for a single activation that takes that much.

    Attributes:
        tensors: Names of the float inputs and activations, in the graph's order.

    Raises:
        ModelError: ONNX Runtime does not take the model.
    """

    def __init__(self, model: Model, threads: int | None = None, memory: int | None = None) -> None:
        self._model = model
        self._threads = threads
        self._memory = memory
        self._free: int | None = None
        self._runners = [OnnxRuntimeRunner(model, threads)]
        self._activations = self._runners[0].activations
        self.tensors = [*self._runners[0].inputs, *self._activations]
        self._shapes: Mapping[str, tuple[int, ...]] = {}  # of the inputs that the runners are for

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Run one batch.

        Args:
            batch: Arrays by input name.

        Yields:
            The values of some of `tensors`, by name, each tensor once. Drop them before asking for the next ones.

        Raises:
            FastcalError: The batch does not fit the memory.
            ModelError: ONNX Runtime fails on the batch.
        """
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
        if self._free is None and self._memory is None:
            self._free = free_memory()  # before batches take some of it
        known = self._model.sizes(shapes)
        sizes = {name: known.get(name, 0) for name in self._activations}
        if self._memory is not None:
            memory = self._memory
        elif self._free is not None:
            memory = max(int(SHARE * self._free), min(self._free, max(sizes.values(), default=0)))
        else:
            return
        shown = groups(sizes, memory, "the memory")
        if shown != [list(runner.activations) for runner in self._runners]:
            self._close()
            self._runners = [OnnxRuntimeRunner(self._model, self._threads, activations=group) for group in shown]

    def _close(self) -> None:
        for runner in self._runners:
            runner.close()

    def __enter__(self) -> "PartedRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()


class OnnxRuntimeRunner:
    """Runs batches through a model as it stands: no graph optimization, so no activation is fused away.

    A context manager that ends its thread.

    Args:
        model: The model; external data is read from its folder.
        threads: The number of threads that run one batch; by default one per core that this process may use.
        variant: A model to run in place of the model, for instance the one with Q/DQ pairs; only its outputs are
            returned.
        activations: The activations to show; by default all.

    Attributes:
        inputs: Names of the float inputs.
        activations: Names of the float activations (or outputs) that are shown, in the graph's order.

    Raises:
        ModelError: ONNX Runtime does not take the model.
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
        proto = _with_outputs(model, activations) if variant is None else variant
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = activations is None  # an arena would keep memory from the other runners
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 4  # errors come as exceptions
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.path.parent.resolve())
        )
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ModelError(f"ONNX Runtime cannot load {model.path}: {_reason(error)}") from error
        self.inputs = [value.name for value in self._session.get_inputs() if value.type in _FLOAT]
        self.activations = [value.name for value in self._session.get_outputs() if value.type in _FLOAT]
        # A thread of its own runs the session, so that the calling thread stays open to Ctrl-C.
        self._thread = ThreadPoolExecutor(1, "fastcal-runner")

    def run(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one batch.

        Args:
            batch: Arrays by input name; an array of another type than its input is converted.

        Returns:
            The values of `inputs` and `activations` by name.

        Raises:
            ModelError: ONNX Runtime fails on the batch.
        """
        arrays = {value.name: np.asarray(to_host(batch[value.name]), value.dtype) for value in self._model.inputs}
        if not self.activations:
            return {name: arrays[name] for name in self.inputs}
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        future = self._thread.submit(self._session.run, self.activations, arrays, options)
        try:
            values = future.result()
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run {self._model.path}: {_reason(error)}") from error
        except BaseException:  # Ctrl-C: stop at the next layer
            options.terminate = True
            wait([future])
            raise
        return {name: arrays[name] for name in self.inputs} | dict(zip(self.activations, values, strict=True))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def __enter__(self) -> "OnnxRuntimeRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _with_outputs(model: Model, activations: Sequence[str] | None) -> onnx.ModelProto:
    """Return the model with activations, by default all, as its outputs; ONNX Runtime infers their types."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in activations or model.activations)
    return proto


def _reason(error: Exception) -> str:
    """Return the message of an exception of ONNX Runtime in one line, with the remedy if it is known."""
    text = " ".join(str(error).split())
    if len(text) > 2 * _ENDS:
        text = f"{text[:_ENDS]} ... {text[-_ENDS:]}"
    remedy = next((remedy for said, remedy in _REMEDIES.items() if said in str(error)), None)
    return f"{text.rstrip('.')}; {remedy}" if remedy else text
