"""`Measurement`: a network in float and in INT8 on the same batches, and the noise that INT8 adds."""

import logging
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
from fastcal.errors import ModelError, first_few, quoted
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.count import rounded
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.qdq import add_pairs
from fastcal.report.quality import Quality, TensorQuality

_log = logging.getLogger("fastcal")

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
        variants = {label: add_pairs(network, cache) for label, cache in caches.items()}
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
        outputs = [name for name in self._float.outputs if name in self._tensors]
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
            sums.add(exact[name], [outputs[name] for outputs in int8.values()])
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
        """Keep the class of each sample if the output is a classifier's: of shape (N, classes, 1, ...).

        The class of a sample is -1 if its output is not a number.
        """
        if output.ndim >= 2 and output.shape[1] > 1 and math.prod(output.shape[2:]) == 1:
            self._classes = output.shape[1]
            rows = output.reshape(-1, self._classes)
            classes = np.where(np.isnan(rows).any(axis=1), -1, rows.argmax(axis=1))
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

    def _measured_outputs(self) -> dict[str, "_Sums"]:
        """Return the outputs that have finite values in float; warn of NaN and infinite ones."""
        bad = {name: sums for name, sums in self._outputs.items() if sums.left_out}
        if bad:
            counts = [f"{name} ({sums.left_out} of {sums.elements} values)" for name, sums in bad.items()]
            _log.warning("NaN and infinite values of FP32's outputs are not compared: %s", first_few(counts))
        measured = {name: sums for name, sums in self._outputs.items() if not 0 < sums.elements == sums.left_out}
        if not measured:
            raise ModelError(
                f"{self._network.label} gives nothing but NaN or infinite values in FP32 (output {quoted(bad)}), so "
                "INT8 cannot be compared; check the images and the network in float"
            )
        return measured

    def _check_shapes(self, name: str, exact: npt.NDArray[Any], int8: npt.NDArray[Any]) -> None:
        if exact.shape != int8.shape:
            raise ModelError(
                f"output {name!r} of {self._network.path} is {format_shape(exact.shape)} in float and "
                f"{format_shape(int8.shape)} in INT8: its size depends on the values, so the two cannot be compared; "
                "compare a model that ends before it"
            )

    def results(self) -> tuple[dict[str, Quality], float | None]:
        """Return the quality with each set of scales, and the share that float classifies right (None: not known).

        Raises:
            ModelError: The float network's outputs have no finite value.
        """
        measured = self._measured_outputs()
        decided = {label: np.concatenate(classes) for label, classes in self._decided.items()}
        exact = decided.get(_FLOAT)
        folders = None if exact is None else _folders((self._feed.sample_names or [])[: exact.size], self._classes)
        qualities = {}
        for index, (label, scales) in enumerate(self._scales.items()):
            tensors = {
                name: sums.quality(index, scales[name]) for name, sums in self._tensors.items() if name in scales
            }
            outputs = {name: sums.sqnr(index) for name, sums in measured.items()}
            classes = decided.get(label)
            qualities[label] = Quality(outputs, tensors, _share(classes, exact), _share(classes, folders))
        return qualities, _share(exact, folders)


def _share(decided: npt.NDArray[np.intp] | None, right: npt.NDArray[np.intp] | None) -> float | None:
    if decided is None or right is None or not (right >= 0).any():
        return None
    return float(np.mean((decided == right)[right >= 0]))


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
    """Sums over a tensor's finite values: their squares, and the squares of the noise of several ways to round them.

    Values that float32 cannot hold count as infinite.

    Attributes:
        elements: The number of values.
        left_out: The number of those that are NaN or infinite.
    """

    def __init__(self, ways: int) -> None:
        self.elements = 0
        self.left_out = 0
        self._signal = 0.0
        self._noise = [0.0] * ways
        self._clipped = [0] * ways

    def add(self, values: npt.NDArray[Any], rounded: Sequence[npt.NDArray[Any]]) -> None:
        """Add values of any shape, and the values that each way to round makes of them, of the same shape."""
        exact = np.asarray(values, np.float64).reshape(-1)
        finite = np.abs(exact) <= np.finfo(np.float32).max
        exact = exact[finite]
        self.elements += finite.size
        self.left_out += finite.size - exact.size
        self._signal += _power(exact)
        for way, others in enumerate(rounded):
            noise = _power(exact - np.asarray(others, np.float64).reshape(-1)[finite])
            self._noise[way] += math.inf if math.isnan(noise) else noise

    def add_rounded(self, values: npt.NDArray[Any], scales: Sequence[float]) -> None:
        """Add values of any shape, rounded with the scale of each way; a scale of 0 does not round."""
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self.add(flat, [])
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        for way, scale in enumerate(scales):
            if scale > 0:
                noise, clipped = rounded(flat, np.float32(scale))
                self._noise[way] += noise
                self._clipped[way] += clipped

    def sqnr(self, way: int) -> float:
        """Return the signal-to-quantization-noise ratio of one way to round, in dB."""
        if self._noise[way] == 0:
            return math.inf
        ratio = self._signal / self._noise[way]
        return 10 * math.log10(ratio) if ratio else -math.inf

    def quality(self, way: int, scale: float) -> TensorQuality:
        """Return the quality of the tensor rounded one way, with this scale."""
        sqnr = self.sqnr(way) if 0 < scale < math.inf and self._signal > 0 else None
        return TensorQuality(scale, sqnr, self._clipped[way] / max(self.elements, 1))


def _power(values: npt.NDArray[np.float64]) -> float:
    return float(np.einsum("i,i->", values, values))
