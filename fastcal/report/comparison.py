"""`compare`: how much of a network's numbers INT8 keeps, by each algorithm's scales and by those of caches."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fastcal.algorithm import DEFAULT_QUANTILE, Algorithm
from fastcal.batch import format_shape, match_batch
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.calibration import calibrate
from fastcal.errors import FastcalError
from fastcal.feed.arrays import as_feed
from fastcal.feed.feed import Feed
from fastcal.model import FLOATS, Model
from fastcal.observe.backends import timed
from fastcal.observe.observations import Observations
from fastcal.observe.rounding import rounded
from fastcal.observe.with_onnxruntime import OnnxRuntimeRunner, PartedRunner
from fastcal.progress import Progress
from fastcal.qdq import check_quantizable, load_for, quantize
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The algorithms that are compared; "entropy" picks the scales of "entropy2".
COMPARED = ("entropy2", "minmax", "percentile")

#: Outputs whose SQNR differs by less than this, in dB, are called alike.
_ALIKE = 1.0

#: An input's scale that is so many times too wide or too narrow speaks of other preprocessing.
_OTHER_INPUT = 1.5

#: What is wrong with batches that are there only once.
_GONE = "the batches are gone after one pass, and compare needs two; pass list(...) of them"

#: When the float network classifies a smaller share of the images right, the preprocessing is doubted.
_TOO_FEW_RIGHT = 0.5


@dataclass(frozen=True)
class TensorQuality:
    """What one tensor keeps when it alone is rounded to INT8.

    Attributes:
        scale: Its scale.
        sqnr: Signal-to-quantization-noise ratio in dB: 10 log10(sum of x^2 / sum of (x - rounded x)^2). Infinite where
            rounding changes nothing; None for a tensor of scale 0, which stays in float, or that is always 0.
        clipped: The share of its values beyond 127 scales.
    """

    scale: float
    sqnr: float | None
    clipped: float


@dataclass(frozen=True)
class Quality:
    """What a network keeps in INT8 with one set of scales.

    Attributes:
        outputs: The SQNR of each float output, in dB, with the rounding of all INT8 layers.
        tensors: What each tensor keeps, in the scales' order.
        agreement: For a classifier, the share of images to which it gives the class that it gives in float.
        top1: For a classifier, the share of images to which it gives their folder's class, where that is known.
    """

    outputs: Mapping[str, float]
    tensors: Mapping[str, TensorQuality]
    agreement: float | None = None
    top1: float | None = None

    @property
    def sqnr(self) -> float:
        """The lowest SQNR of an output, in dB."""
        return min(self.outputs.values())

    @property
    def worst(self) -> list[str]:
        """The names of the tensors that are rounded, from the lowest SQNR on."""
        sqnr = {name: tensor.sqnr for name, tensor in self.tensors.items() if tensor.sqnr is not None}
        return sorted(sqnr, key=sqnr.__getitem__)

    @property
    def median_sqnr(self) -> float | None:
        """The median SQNR of the tensors that are rounded, in dB; None where none is."""
        rounded = [tensor.sqnr for tensor in self.tensors.values() if tensor.sqnr is not None]
        return median(rounded) if rounded else None


@dataclass(frozen=True)
class Comparison:
    """What a network keeps in INT8, with each of several sets of scales.

    Attributes:
        images: How many samples were compared.
        qualities: What it keeps, by algorithm or by the cache's name.
        float_top1: The share of images to which the float network gives their folder's class, where that is known.
        verdict: What follows from it, in one line.
    """

    images: int
    qualities: Mapping[str, Quality]
    float_top1: float | None
    verdict: str

    @property
    def best(self) -> str:
        """The set of scales with the highest SQNR at the output; the first of equals."""
        return _best(self.qualities)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it; there an infinite SQNR is null, too."""
        return {
            "images": self.images,
            "float_top1": self.float_top1,
            "best": self.best,
            "verdict": self.verdict,
            "qualities": {
                label: {
                    "sqnr": _finite(quality.sqnr),
                    "outputs": {name: _finite(sqnr) for name, sqnr in quality.outputs.items()},
                    "agreement": quality.agreement,
                    "top1": quality.top1,
                    "tensors": {
                        name: vars(tensor) | {"sqnr": _finite(tensor.sqnr)} for name, tensor in quality.tensors.items()
                    },
                }
                for label, quality in self.qualities.items()
            },
        }


def compare(
    model: str | os.PathLike[str] | Model,
    feed: Any,
    *,
    caches: Mapping[str, CalibrationCache | str | os.PathLike[str]] | None = None,
    quantile: float = DEFAULT_QUANTILE,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure what a network keeps in INT8 with the scales of "entropy2", "minmax" and "percentile", and of caches.

    Goes over the batches twice: for the histograms that each algorithm picks its scales from, and to compare. The
    outputs are those of the model that `quantize` makes, whose INT8 rounding, of weights too, ONNX Runtime simulates in
    float32. An engine rounds where TensorRT runs layers in INT8, so the numbers rank scales rather than foretell an
    engine's.

    A network whose one output has the shape (N, classes), or that with dimensions of 1 behind, is taken for a
    classifier. If its images lie in a folder per class, and there are as many folders as classes, then the folders in
    alphabetical order are the classes, as torchvision's ImageFolder numbers them.

    Args:
        model: The ONNX file.
        feed: The batches, as `fastcal.calibrate` takes them, that are there for a second pass.
        caches: Calibration caches, or their files, to compare too, by the name to show for them.
        quantile: For "percentile", the share of values that is not clipped.
        threads: How many threads to use; by default one per core that this process may use.
        progress: Called after every batch of either pass.

    Returns:
        The comparison; its `verdict` says which scales keep most, whether the caches fit the images, and whether the
        network knows the images at all.

    Raises:
        FastcalError: The model cannot be quantized or run, a cache is another model's, or the batches do not fit the
            model or are gone after one pass; or what the feed raises.
    """
    algorithms = {name: Algorithm.of(name, quantile) for name in COMPARED}
    network = Model.of(model)
    check_quantizable(network)
    _check_outputs(network)
    if isinstance(feed, Iterator):
        raise FastcalError(_GONE)
    if named := set(COMPARED) & set(caches or ()):
        raise FastcalError(f"a cache is named {min(named)!r} as an algorithm is; name it otherwise")
    given = {label: load_for(network, cache) for label, cache in (caches or {}).items()}
    counting, comparing = _in_two_passes(progress)
    with as_feed(feed, network.input_names, "cpu") as batches:
        fresh = calibrate(
            network, batches, backend="onnxruntime", threads=threads, progress=counting,
            tensorrt_version=DEFAULT_TENSORRT_VERSION,
        )  # fmt: skip
        observed = fresh.observed
        assert observed is not None  # calibrate has just seen it
        picked = {name: replace(fresh, scales=picks.scales(observed)) for name, picks in algorithms.items()}
        compared = picked | given
        variants = {label: quantize(network, cache) for label, cache in compared.items()}
        scales = {label: cache.scales for label, cache in compared.items()}
        with (
            timed(batches, comparing) as seen,
            _Measurement(network, scales, variants, batches, threads) as measurement,
        ):
            for batch in seen:
                measurement.add(batch)
    if not measurement.images:
        raise FastcalError(_GONE)
    qualities, float_top1 = measurement.qualities(), measurement.float_top1()
    doubts = {label: _doubt(network, cache, fresh.record, observed) for label, cache in given.items()}
    verdict = "; ".join(_findings(qualities, doubts, float_top1))
    return Comparison(measurement.images, qualities, float_top1, verdict)


class _Measurement:
    """Runs batches through a network in float and in INT8, and adds up how they differ; a context manager.

    Args:
        network: The network in float.
        scales: Several sets of scales, by label.
        variants: The network in INT8 with each.
        feed: Where the batches come from.
        threads: How many threads to use.

    Attributes:
        images: How many samples there were, those that only complete the last batch left out.
    """

    def __init__(
        self,
        network: Model,
        scales: Mapping[str, Mapping[str, float]],
        variants: Mapping[str, onnx.ModelProto],
        feed: Feed,
        threads: int | None,
    ) -> None:
        self._network, self._scales = network, scales
        self._samples_of = feed.samples_of
        self._paths = feed.sample_names or []
        self._samples = feed.samples
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
        self._decisions: dict[str | None, list[npt.NDArray[np.intp]]] = {}
        self._classes = 0
        self.images = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Run one batch.

        Raises:
            FastcalError: The batch does not fit the network, or ONNX Runtime fails on it.
        """
        arrays = match_batch(self._network.inputs, str(self._network.path), batch)
        exact: dict[str, npt.NDArray[Any]] = {}
        for values in self._float.run(arrays):
            rounding = [
                self._pool.submit(
                    self._tensors[name].add_rounded, each, [scales.get(name, 0.0) for scales in self._scales.values()]
                )
                for name, each in values.items()
            ]
            exact |= {name: each for name, each in values.items() if name in self._outputs}
            for done in rounding:
                done.result()
            del values, rounding  # before the next ones are there
        int8 = {label: runner.run(arrays) for label, runner in self._int8.items()}
        for name, sums in self._outputs.items():
            for others in int8.values():
                if others[name].shape != exact[name].shape:
                    raise FastcalError(
                        f"output {name!r} of {self._network.path} is {format_shape(exact[name].shape)} in float and "
                        f"{format_shape(others[name].shape)} in INT8: its size depends on the values, so the two "
                        "cannot be compared; compare a model that ends before it"
                    )
            sums.add(exact[name], [exact[name] - others[name] for others in int8.values()])
        samples = self._samples_of(batch)
        new = samples if self._samples is None else min(samples, self._samples - self.images)
        self.images += new
        if len(self._outputs) == 1:
            (name,) = self._outputs
            for label, outputs in ((None, exact), *int8.items()):
                if outputs[name].shape[:1] == (samples,):
                    self._decide(label, outputs[name][:new])

    def _decide(self, label: str | None, output: npt.NDArray[Any]) -> None:
        """Keep the class of each sample, if the output is a classifier's: of shape (N, classes, 1, ...)."""
        if output.ndim >= 2 and output.shape[1] > 1 and math.prod(output.shape[2:]) == 1:
            self._classes = output.shape[1]
            decisions = output.reshape(-1, self._classes).argmax(axis=1)
            self._decisions.setdefault(label, []).append(decisions)

    def qualities(self) -> dict[str, Quality]:
        """What the network keeps with each set of scales."""
        return {label: self._quality(index, label) for index, label in enumerate(self._scales)}

    def _quality(self, index: int, label: str) -> Quality:
        tensors = {}
        for name, sums in self._tensors.items():
            scale = self._scales[label].get(name)
            if scale is not None:
                sqnr = sums.sqnr(index) if scale > 0 and sums.signal > 0 else None
                tensors[name] = TensorQuality(scale, sqnr, sums.clipped[index] / max(sums.elements, 1))
        outputs = {name: sums.sqnr(index) for name, sums in self._outputs.items()}
        return Quality(outputs, tensors, self._share(label, self._decided(None)), self._share(label, self._labels()))

    def float_top1(self) -> float | None:
        """The share of images to which the float network gives their folder's class, where that is known."""
        return self._share(None, self._labels())

    def _decided(self, label: str | None) -> npt.NDArray[np.intp] | None:
        return np.concatenate(self._decisions[label]) if self._decisions else None

    def _share(self, label: str | None, right: npt.NDArray[np.intp] | None) -> float | None:
        decided = self._decided(label)
        return None if decided is None or right is None else float(np.mean(decided == right))

    def _labels(self) -> npt.NDArray[np.intp] | None:
        """The classes of the images by their folders; None where there is not one folder for each class."""
        if not self._paths or not self._classes:
            return None
        folders = [Path(os.path.abspath(path)).parent for path in self._paths[: self.images]]
        root = folders[0].parent
        if len(set(folders)) == 1 or {folder.parent for folder in folders} != {root} or not root.is_dir():
            return None
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if len(names) != self._classes or not {folder.name for folder in folders} <= {*names}:
            return None
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[folder.name] for folder in folders])

    def __enter__(self) -> "_Measurement":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Sums:
    """Sums over a tensor's values, and over the noise that each of several ways to round adds to them.

    Attributes:
        elements: How many finite values there were.
        signal: The sum of their squares.
        noise: The sum of the noise's squares, for each way.
        clipped: How many values were clipped, for each way.
    """

    def __init__(self, ways: int) -> None:
        self.elements = 0
        self.signal = 0.0
        self.noise = [0.0] * ways
        self.clipped = [0] * ways

    def add(self, values: npt.NDArray[Any], noises: Sequence[npt.NDArray[Any]]) -> None:
        """Add values of any shape and what each way to round took from them."""
        self.elements += values.size
        self.signal += _power(values)
        for way, noise in enumerate(noises):
            self.noise[way] += _power(noise)

    def add_rounded(self, values: npt.NDArray[Any], scales: Sequence[float]) -> None:
        """Add values of any shape, rounded with each of the scales; 0 does not round."""
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
        """The signal-to-quantization-noise ratio of one way to round, in dB."""
        if self.noise[way] == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise[way]) if self.signal else -math.inf


def _power(values: npt.NDArray[Any]) -> float:
    flat = np.asarray(values, np.float64).reshape(-1)
    flat = flat[np.isfinite(flat)]
    return float(np.einsum("i,i->", flat, flat))


def _check_outputs(network: Model) -> None:
    outputs = {value.name for value in network.proto.graph.output if value.type.tensor_type.elem_type in FLOATS}
    if not outputs:
        raise FastcalError(
            f"{network.path} has no float output to compare; export it without its last layer, an ArgMax"
        )
    if outputs.isdisjoint([*(value.name for value in network.inputs), *network.activations]):
        raise FastcalError(f"{network.path} computes no float output: there is nothing to compare")


def _in_two_passes(
    progress: Callable[[Progress], None] | None,
) -> tuple[Callable[[Progress], None], Callable[[Progress], None]]:
    """Functions that tell `progress` of a first and of a second pass as if they were one of twice the length."""
    last = Progress()

    def first(state: Progress) -> None:
        nonlocal last
        last = replace(state, total=state.total and 2 * state.total)
        if progress is not None:
            progress(replace(last))

    def second(state: Progress) -> None:
        if progress is not None:
            progress(
                Progress(
                    last.batches + state.batches,
                    last.images + state.images,
                    last.total,
                    last.seconds + state.seconds,
                    last.waited + state.waited,
                )
            )

    return first, second


def _best(qualities: Mapping[str, Quality]) -> str:
    return max(qualities, key=lambda label: qualities[label].sqnr)


def _doubt(network: Model, cache: CalibrationCache, record: Record | None, observed: Observations) -> str:
    """What speaks for a cache having been made with other preprocessing than was seen now; empty where nothing does."""
    theirs, ours = (made.entries.get("preprocess") if made else None for made in (cache.record, record))
    if theirs and ours and theirs != ours:
        return f"its record has other preprocessing: {theirs}"
    needed = cache.algorithm.scales(observed)
    for value in network.inputs:
        if needed.get(value.name) and value.name in cache.scales:
            factor = cache.scales[value.name] / needed[value.name]
            if not 1 / _OTHER_INPUT < factor < _OTHER_INPUT:
                return f"its scale of input {value.name!r} is {factor:.3g} times what these images need"
    return ""


def _findings(qualities: Mapping[str, Quality], doubts: Mapping[str, str], float_top1: float | None) -> Iterator[str]:
    """What is to be said of a comparison, what is wrong first; `doubts` are those about each cache."""
    if float_top1 is not None and float_top1 < _TOO_FEW_RIGHT:
        yield (
            f"FP32 gives {float_top1:.1%} of the images their folder's class: is this the preprocessing that the "
            "network was trained with?"
        )
    best = _best({name: qualities[name] for name in COMPARED})
    most = qualities[best].sqnr
    is_exact = most == math.inf
    for label, doubt in sorted(doubts.items(), key=lambda item: not item[1]):
        kept = qualities[label].sqnr
        if _alike(kept, most):
            text = f"{label} keeps as much as {best}"
        elif is_exact:
            text = f"{label} keeps {kept:.1f} dB where {best} keeps the exact output"
        else:
            text = f"{label} loses {most - kept:.1f} dB against {best}"
        yield text + (f", and {doubt}" if doubt else "")
    agreement = qualities[best].agreement
    classes = "" if agreement is None else f" and FP32's class for {agreement:.1%} of the images"
    others = [name for name in COMPARED if name != best and _alike(qualities[name].sqnr, most)]
    near = f", {' and '.join(others)} {'too' if is_exact else f'within {_ALIKE:g} dB of it'}" if others else ""
    yield f"{best} keeps most: {'the exact output' if is_exact else f'{most:.1f} dB at the output'}{classes}{near}"


def _alike(sqnr: float, most: float) -> bool:
    """Whether an SQNR is as good as called the highest; those of exact outputs are infinite and have no difference."""
    return sqnr == most or most - sqnr < _ALIKE


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
