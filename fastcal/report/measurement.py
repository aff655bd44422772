"""`Measurement`: a network in float and in INT8 on the same batches, and the noise that INT8 adds."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fastcal.batch import format_shape, match_batch
from fastcal.errors import ModelError
from fastcal.feed.feed import Feed
from fastcal.model import Model
from fastcal.observe.count import rounded
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.report.decisions import FLOAT, Decisions
from fastcal.report.quality import Quality, TensorQuality


class Measurement:
    """Runs batches through a network in float and in INT8, and adds up the differences; a context manager.

    Args:
        network: The network in float.
        scales: Several sets of scales, by label.
        variants: The network in INT8 with each of them.
        feed: The feed that the batches come from.
        threads: The number of threads; None for one per core that this process may use.

    Attributes:
        images: The number of samples so far, without those that only complete the last batch.
        decisions: The classes that the networks gave to these samples.
    """

    def __init__(
        self,
        network: Model,
        scales: Mapping[str, Mapping[str, float]],
        variants: Mapping[str, onnx.ModelProto],
        feed: Feed,
        threads: int | None,
    ) -> None:
        self.images = 0
        self.decisions = Decisions(feed.sample_names)
        self._network, self._scales, self._feed = network, scales, feed
        with ExitStack() as stack:
            self._float = stack.enter_context(PartedRunner(network, threads))
            self._int8 = {
                label: stack.enter_context(OnnxRuntimeRunner(network, threads, variant=variant))
                for label, variant in variants.items()
            }
            workers = threads or len(os.sched_getaffinity(0))
            self._pool = stack.enter_context(ThreadPoolExecutor(workers, "fastcal-rounding"))
            self._stack = stack.pop_all()
        self._tensors = {name: _Sums(len(scales)) for name in self._float.tensors}
        outputs = [value.name for value in network.proto.graph.output if value.name in self._tensors]
        self._outputs = {name: _Sums(len(scales)) for name in outputs}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Run one batch.

        Raises:
            DataError: The batch does not fit the network.
            ModelError: The size of an output depends on the values, or ONNX Runtime fails.
        """
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
            for label, outputs in ((FLOAT, exact), *int8.items()):
                if outputs[name].shape[:1] == (samples,):
                    self.decisions.add(label, outputs[name][:new])

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

    def qualities(self) -> dict[str, Quality]:
        """Return the quality of the network with each set of scales, by label."""
        return {label: self._quality(index, label) for index, label in enumerate(self._scales)}

    def _quality(self, index: int, label: str) -> Quality:
        tensors = {}
        for name, sums in self._tensors.items():
            scale = self._scales[label].get(name)
            if scale is not None:
                sqnr = sums.sqnr(index) if scale > 0 and sums.signal > 0 else None
                tensors[name] = TensorQuality(scale, sqnr, sums.clipped[index] / max(sums.elements, 1))
        outputs = {name: sums.sqnr(index) for name, sums in self._outputs.items()}
        return Quality(outputs, tensors, self.decisions.agreement(label), self.decisions.top1(label))

    def __enter__(self) -> "Measurement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


class _Sums:
    """Sums over a tensor's values, and over the noise of several ways to round them.

    Args:
        ways: The number of ways.

    Attributes:
        elements: The number of finite values.
        signal: The sum of their squares.
        noise: The sum of the squares of the noise, for each way.
        clipped: The number of values that were clipped, for each way.
    """

    def __init__(self, ways: int) -> None:
        self.elements = 0
        self.signal = 0.0
        self.noise = [0.0] * ways
        self.clipped = [0] * ways

    def add(self, values: npt.NDArray[Any], noises: Sequence[npt.NDArray[Any]]) -> None:
        """Add values of any shape, and the noise of each way to round them, of the same shape."""
        self.elements += values.size
        self.signal += _power(values)
        for way, noise in enumerate(noises):
            self.noise[way] += _power(noise)

    def add_rounded(self, values: npt.NDArray[Any], scales: Sequence[float]) -> None:
        """Add values of any shape, rounded with the scale of each way; a scale of 0 does not round."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        self.add(flat, [])
        for way, scale in enumerate(scales):
            if scale > 0:
                noise, clipped = rounded(flat, np.float32(scale))
                self.noise[way] += noise
                self.clipped[way] += clipped

    def sqnr(self, way: int) -> float:
        """Return the signal-to-quantization-noise ratio of one way to round, in dB."""
        if self.noise[way] == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise[way]) if self.signal else -math.inf


def _power(values: npt.NDArray[Any]) -> float:
    flat = np.asarray(values, np.float64).reshape(-1)
    flat = flat[np.isfinite(flat)]
    return float(np.einsum("i,i->", flat, flat))
