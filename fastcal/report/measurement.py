"""`Measurement`: a network in float and in INT8 on the same batches, and the noise that INT8 adds."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.batch import format_shape, match_batch
from fastcal.cache.cache import CalibrationCache
from fastcal.errors import ModelError
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.count import rounded
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.qdq import quantize
from fastcal.report.quality import Quality, TensorQuality

#: The label of the float network among those of the caches.
_FLOAT = None


class Measurement(AbstractContextManager["Measurement"]):
    """Runs batches through a network in float and in INT8 with the scales of each cache, and adds up the differences.

    Attributes:
        images: The number of samples so far, without those that only complete the last batch.
    """

    def __init__(self, network: Model, caches: Mapping[str, CalibrationCache], feed: Feed, threads: int | None) -> None:
        self.images = 0
        self._network, self._feed = network, feed
        self._scales = {label: cache.scales for label, cache in caches.items()}
        variants = {label: quantize(network, cache) for label, cache in caches.items()}
        with ExitStack() as stack:
            self._float = stack.enter_context(PartedRunner(network, threads))
            self._int8 = {
                label: stack.enter_context(OnnxRuntimeRunner(network, threads, variant=variant))
                for label, variant in variants.items()
            }
            workers = threads or len(os.sched_getaffinity(0))
            self._pool = stack.enter_context(ThreadPoolExecutor(workers, "fastcal-rounding"))
            self._stack = stack.pop_all()
        self._tensors = {name: _Sums(len(caches)) for name in self._float.tensors}
        outputs = [value.name for value in network.proto.graph.output if value.name in self._tensors]
        self._outputs = {name: _Sums(len(caches)) for name in outputs}
        self._decided: dict[str | None, list[npt.NDArray[np.intp]]] = {}  # the classes of the samples, by label
        self._classes = 0

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Run one batch."""
        arrays = match_batch(self._network.inputs, str(self._network.path), batch)
        exact = self._run_float(arrays)
        int8 = {label: runner.run(arrays) for label, runner in self._int8.items()}
        for name, sums in self._outputs.items():
            for outputs in int8.values():
                self._check_shapes(name, exact[name], outputs[name])
            sums.add(exact[name], [exact[name] - outputs[name] for outputs in int8.values()])
        samples = self._feed.samples_of(batch)
        known = self._feed.samples
        new = samples if known is None else min(samples, known - self.images)
        self.images += new
        if len(self._outputs) == 1:
            (name,) = self._outputs
            for label, outputs in ((_FLOAT, exact), *int8.items()):
                if outputs[name].shape[:1] == (samples,):
                    self._decide(label, outputs[name][:new])

    def _decide(self, label: str | None, output: npt.NDArray[Any]) -> None:
        """Keep the class of each sample if the output is a classifier's: of shape (N, classes, 1, ...)."""
        if output.ndim >= 2 and output.shape[1] > 1 and math.prod(output.shape[2:]) == 1:
            self._classes = output.shape[1]
            classes = output.reshape(-1, self._classes).argmax(axis=1)
            self._decided.setdefault(label, []).append(classes)

    def _run_float(self, arrays: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Run the float network, round each of its tensors with each set of scales, and return the float outputs."""
        exact: dict[str, npt.NDArray[Any]] = {}
        for tensors in self._float.run(arrays):
            rounding = [
                self._pool.submit(
                    self._tensors[name].add_rounded, values, [scales.get(name, 0.0) for scales in self._scales.values()]
                )
                for name, values in tensors.items()
            ]
            exact |= {name: values for name, values in tensors.items() if name in self._outputs}
            for done in rounding:
                done.result()
            del tensors, rounding  # frees the memory before the next tensors are computed
        return exact

    def _check_shapes(self, name: str, exact: npt.NDArray[Any], int8: npt.NDArray[Any]) -> None:
        if exact.shape != int8.shape:
            raise ModelError(
                f"output {name!r} of {self._network.path} is {format_shape(exact.shape)} in float and "
                f"{format_shape(int8.shape)} in INT8: its size depends on the values, so the two cannot be compared; "
                "compare a model that ends before it"
            )

    def results(self) -> tuple[dict[str, Quality], float | None]:
        """Return the quality with each set of scales, and the share that float classifies right (None: not known)."""
        decided = {label: np.concatenate(classes) for label, classes in self._decided.items()}
        exact = decided.get(_FLOAT)
        folders = None if exact is None else _folders((self._feed.sample_names or [])[: exact.size], self._classes)
        qualities = {}
        for index, (label, scales) in enumerate(self._scales.items()):
            tensors = {
                name: sums.quality(index, scales[name]) for name, sums in self._tensors.items() if name in scales
            }
            outputs = {name: sums.sqnr(index) for name, sums in self._outputs.items()}
            classes = decided.get(label)
            qualities[label] = Quality(outputs, tensors, _share(classes, exact), _share(classes, folders))
        return qualities, _share(exact, folders)


def _share(decided: npt.NDArray[np.intp] | None, right: npt.NDArray[np.intp] | None) -> float | None:
    return None if decided is None or right is None else float(np.mean(decided == right))


def _folders(paths: Sequence[str], classes: int) -> npt.NDArray[np.intp] | None:
    """Return the classes of the samples by their folders; None if there is not one folder for each class."""
    folders = [Path(os.path.abspath(path)).parent for path in paths]
    if len(set(folders)) <= 1 or len({folder.parent for folder in folders}) > 1 or not folders[0].parent.is_dir():
        return None
    names = sorted(entry.name for entry in folders[0].parent.iterdir() if entry.is_dir())
    if len(names) != classes or not {folder.name for folder in folders} <= {*names}:
        return None
    return np.array([names.index(folder.name) for folder in folders])


class _Sums:
    """Sums over a tensor's finite values: their squares, and the squares of the noise of several ways to round them."""

    def __init__(self, ways: int) -> None:
        self._elements = 0
        self._signal = 0.0
        self._noise = [0.0] * ways
        self._clipped = [0] * ways

    def add(self, values: npt.NDArray[Any], noises: Sequence[npt.NDArray[Any]]) -> None:
        """Add values of any shape, and the noise of each way to round them, of the same shape."""
        self._elements += values.size
        self._signal += _power(values)
        for way, noise in enumerate(noises):
            self._noise[way] += _power(noise)

    def add_rounded(self, values: npt.NDArray[Any], scales: Sequence[float]) -> None:
        """Add values of any shape, rounded with the scale of each way; a scale of 0 does not round."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        self.add(flat, [])
        for way, scale in enumerate(scales):
            if scale > 0:
                noise, clipped = rounded(flat, np.float32(scale))
                self._noise[way] += noise
                self._clipped[way] += clipped

    def sqnr(self, way: int) -> float:
        """Return the signal-to-quantization-noise ratio of one way to round, in dB."""
        if self._noise[way] == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise[way]) if self._signal else -math.inf

    def quality(self, way: int, scale: float) -> TensorQuality:
        """Return the quality of the tensor rounded one way, with this scale."""
        sqnr = self.sqnr(way) if scale > 0 and self._signal > 0 else None
        return TensorQuality(scale, sqnr, self._clipped[way] / max(self._elements, 1))


def _power(values: npt.NDArray[Any]) -> float:
    flat = np.asarray(values, np.float64).reshape(-1)
    flat = flat[np.isfinite(flat)]
    return float(np.einsum("i,i->", flat, flat))
