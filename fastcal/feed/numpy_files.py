"""`NumpyFeed`: the tensors in `.npy` and `.npz` files as batches."""

import hashlib
import math
import os
import zipfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from fastcal.batch import Input, check_values, counting, format_shape, is_repeated, shape_fits
from fastcal.device import add_array, as_array, resolve
from fastcal.errors import DataError, FastcalError, counted, quoted
from fastcal.feed.array_plan import ArrayPasses, ArrayPlan
from fastcal.feed.chunks import LAST_BATCHES, count_batches, log_last_batch
from fastcal.feed.dataset import FOR_ARRAYS, Data, add_files, list_files, shuffled, spread_over
from fastcal.feed.plan import PlannedFeed, check_settings, default_batch_size
from fastcal.feed.signatures import identify
from fastcal.memory import check_room
from fastcal.model import Model


class NumpyFeed(PlannedFeed):
    """Batches of tensors of any rank from NumPy's files, read ahead of the consumer.

    A `.npy` file has one input's array, a `.npz` file the arrays of all inputs by name. The first dimension of an array
    counts samples; but if the model's input has one dimension more than the array, the array is one sample. So a file
    may hold one sample, a batch, or all samples: new batches are made of the samples in their order.

    If the inputs have different numbers of samples, but every array has exactly the shape of the model's input, the
    arrays of a file are one batch as they are.

    If samples have different shapes (texts or sounds of different lengths) and the model's dimensions that differ are
    dynamic, every batch is one sample.

    The files are read with NumPy, which reads several thousand samples of the size of an image a second.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file), a pattern ("batches/*.npy", sorted by path; "batches/{0..9}.npy"), a file, or a sequence of paths;
            for several inputs in `.npy` files a dict of these by input name, where samples of one number belong
            together.
        model: An ONNX file. The arrays are checked against its inputs and converted to their types. Further arrays in a
            `.npz` file (labels, for instance) are left out.
        batch_size: The number of samples in a batch; by default the model's if that is fixed, else 128 on a GPU and 32
            on the CPU.
        input_name: The input that `.npy` files are for; by default the model's, else whatever single input a network
            has.
        shuffle: Whether to shuffle the samples, before `limit`.
        seed: Decides the shuffled order.
        limit: The number of samples to use at most.
        spread: As in `ImageFeed`.
        constants: Further inputs that are the same in every batch: arrays by input name. If the model's first dimension
            is dynamic and the array's is 1, it is repeated for every sample.
        last_batch: As in `ImageFeed`.
        device: As in `ArrayFeed`.
        depth: As in `ArrayFeed`.

    Attributes:
        batch_size: The number of samples in a batch.

    Raises:
        DataError: There are no such files, one cannot be read, or they fit neither each other nor the model.
        FastcalError: A setting is out of its range, or the batches do not fit the memory.
        ModelError: The model is invalid.
        UnavailableError: There is no such device.
    """

    def __init__(
        self,
        data: Data | Mapping[str, Data],
        *,
        model: str | os.PathLike[str] | Model | None = None,
        batch_size: int | None = None,
        input_name: str | None = None,
        shuffle: bool = False,
        seed: int = 0,
        limit: int | None = None,
        spread: bool = False,
        last_batch: str | None = None,
        constants: Mapping[str, Any] | None = None,
        device: str = "auto",
        depth: int = 2,
    ) -> None:
        check_settings(last_batch, LAST_BATCHES, batch_size=batch_size, limit=limit, depth=depth)
        network = None if model is None else Model.of(model)
        fixed = {name: as_array(values) for name, values in (constants or {}).items()}
        columns = _columns(data, network, fixed, input_name)
        inputs = () if network is None else network.inputs
        if any(column.varies for column in columns.values()):
            if batch_size not in (None, 1):
                raise DataError(
                    f"the samples have different shapes, which make no batch of {batch_size}; leave out the batch "
                    "size, or pad the samples to one shape"
                )
            batch_size = 1
        if batch_size is None and _are_batches(columns, counting(inputs)):
            columns, batch_size = {name: column.by_file() for name, column in columns.items()}, 1
        if batch_size is None and network is not None:
            batch_size = network.batch_size
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise DataError(f"the inputs have different numbers of samples, {each}; every sample needs all inputs")
        (total,) = set(counts.values())
        numbers = shuffled(total, seed) if shuffle else np.arange(total)
        numbers = numbers[spread_over(total, limit)] if spread else numbers[:limit]
        gpu = resolve(device)
        batch_size = batch_size or default_batch_size(gpu)
        if last_batch is None:
            last_batch = "keep" if inputs and all(value.shape[:1] == (None,) for value in inputs) else "wrap"
        largest = batch_size if last_batch == "wrap" else min(batch_size, len(numbers))
        held = 1 + min(depth, count_batches(len(numbers), batch_size, "wrap"))  # one is put together for the buffers
        size = held * largest * sum(column.sample_size for column in columns.values())
        check_room(size, f"{counted(held, 'batch')} of {counted(largest, 'sample')}", "use a smaller batch size")
        log_last_batch(len(numbers), batch_size, last_batch, "sample")
        whole = numbers
        if last_batch != "keep":
            whole = np.resize(numbers, batch_size * count_batches(len(numbers), batch_size, last_batch))
        repeated = frozenset(value.name for value in inputs if is_repeated(value, fixed))
        batches = _FileBatches(columns, whole, batch_size, fixed, repeated)
        super().__init__(
            _NumpyPlan(
                batches, None, "keep", gpu, depth, len(numbers), seed=seed if shuffle else None,
                counting=counting(inputs) if inputs else None,
            ),
            ArrayPasses,
        )  # fmt: skip

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self._plan.samples or 0


@dataclass(frozen=True, eq=False)
class _NumpyPlan(ArrayPlan):
    """Batches from files."""

    seed: int | None = None  # None: not shuffled

    @property
    def may_end_smaller(self) -> bool:
        """True if the last batch is smaller than the others."""
        return len(self.batches.numbers) % self.batches.batch_size > 0 and len(self.batches) > 1

    def part(self, batches: range, *, gpu: int | None, threads: int) -> ArrayPlan:
        """Return the plan of some of the batches, in host memory."""
        size = self.batches.batch_size
        numbers = self.batches.numbers[batches.start * size : batches.stop * size]
        return replace(self, batches=replace(self.batches, numbers=numbers), gpu=None, samples=None)

    def describe(self) -> dict[str, Any]:
        """Return the files in order, by path below their common folder and contents or size, and the settings."""
        digest, counted = hashlib.sha256(np.asarray(self.batches.numbers, "<i8").tobytes()), set[str]()
        for name, column in sorted(self.batches.columns.items(), key=lambda item: item[0] or ""):
            digest.update(f"{name}\0".encode())
            counted.add(add_files(digest, column.paths))
        for name, values in sorted(self.batches.constants.items()):
            add_array(digest, name, values)
        return {
            "arrays": self.samples,
            "batches": len(self.batches),
            "batch_size": self.batches.batch_size,
            "seed": self.seed,
            "samples": digest.hexdigest(),
            "samples_by": " and ".join(sorted(counted)),
        }


@dataclass(frozen=True, eq=False)
class _FileBatches:
    """Batches of samples by their numbers; all are of one size, except perhaps the last."""

    columns: Mapping[str | None, "_Column"]  # None names an array without a name
    numbers: Any
    batch_size: int
    constants: Mapping[str, Any]
    repeated: frozenset[str]  # the constants that every sample has one of

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.numbers), self.batch_size):
            numbers = self.numbers[first : first + self.batch_size]
            arrays = {name: column.batch(numbers) for name, column in self.columns.items()}
            for name, values in self.constants.items():
                arrays[name] = values.repeat(len(numbers), 0) if name in self.repeated else values
            yield arrays.get(None, arrays)  # an array without a name is a batch by itself


class _Column:
    """The samples of one input, from one file after another; `sample_size` is in bytes.

    Each path comes with the name of the array in a `.npz` file, or None; `label` is the model's name in error texts.
    """

    def __init__(self, files: Sequence[tuple[str, str | None]], value: Input | None, label: str) -> None:
        self.paths = [path for path, _ in files]
        self._files = files
        self._value, self._label = value, label
        self._open: tuple[int, Any] = (-1, None)
        arrays = [_shape_and_type(path, key) for path, key in files]
        shape, dtype = arrays[0]
        self._single = value is not None and len(shape) + 1 == len(value.shape)
        if value is not None:
            batch = (1, *shape) if self._single else shape  # of any size
            if len(batch) != len(value.shape) or not shape_fits(value.shape[1:], batch[1:]):
                raise DataError(
                    f"{label} takes input {value}, {self.paths[0]} is {format_shape(batch)}; save one sample of that "
                    "shape a file, or several along a first dimension"
                )
            if not np.can_cast(dtype, value.dtype, "same_kind"):
                raise DataError(
                    f"{label} takes input {value.name!r} as {value.dtype}, {self.paths[0]} is {dtype}; convert it"
                )
        if not shape and not self._single:
            raise DataError(f"{self.paths[0]} is one number; an array's first dimension is to count samples")
        kept = dtype if value is None else value.dtype
        samples = [shape if self._single else shape[1:] for shape, _ in arrays]
        self.sample_size = max(map(math.prod, samples)) * kept.itemsize
        #: Whether samples have different shapes, and the model takes each of them by itself.
        self.varies = (
            len(set(samples)) > 1
            and value is not None
            and all(value.shape[:1] in ((None,), (1,)) and shape_fits(value.shape[1:], sample) for sample in samples)
        )
        for path, (other, other_dtype), sample in zip(self.paths, arrays, samples, strict=True):
            same = len(other) == len(shape) and (sample == samples[0] or self.varies)
            if not same or other_dtype != dtype:
                remedy = "" if value is None else f", unless a dynamic dimension of {value} lets them vary one by one"
                raise DataError(
                    f"{path} is {other_dtype} {format_shape(other)}, {self.paths[0]} {dtype} {format_shape(shape)}; "
                    f"samples must have one shape and type{remedy}"
                )
        self.ends = list(accumulate(1 if self._single else shape[0] for shape, _ in arrays))
        self._is_by_file = False
        #: Whether each array has exactly the shape of the model's input.
        self.fits = value is not None and all(
            shape_fits(value.shape, (1, *other) if self._single else other) for other, _ in arrays
        )

    def by_file(self) -> "_Column":
        """Return the column with the array of a file as one sample, and as a batch."""
        column = copy(self)
        column._single, column._is_by_file = True, not self._single
        column.sample_size = self.sample_size * -(-len(self) // len(self._files))
        column.ends = list(range(1, len(self._files) + 1))
        return column

    def batch(self, numbers: Sequence[int]) -> Any:
        """Return a batch of these samples."""
        samples = [self[number] for number in numbers]
        return samples[0] if self._is_by_file else np.stack(samples)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": (-1, None)}  # a mapped array would be pickled with its values

    def __getitem__(self, number: int) -> Any:
        index = bisect_right(self.ends, number)
        if self._open[0] != index:
            self._open = index, _load(*self._files[index], mapped=not self._single)
        array = self._open[1]
        if not self._single:
            array = array[number - (self.ends[index - 1] if index else 0)]
        if self._value is None:
            return array
        check_values(array, self._value, self._label)
        return np.asarray(array, self._value.dtype)


def _columns(
    data: Data | Mapping[str, Data], model: Model | None, constants: Collection[str], input_name: str | None
) -> dict[str | None, _Column]:
    """Return the samples by input name; None stands for whatever single input a network has."""
    values = {} if model is None else {value.name: value for value in model.inputs if value.name not in constants}
    label = "" if model is None else str(model.path)
    files: dict[str | None, list[tuple[str, str | None]]]
    if isinstance(data, Mapping):
        files = {name: [(path, None) for path in list_files(where, ["array"]).paths] for name, where in data.items()}
    else:
        files = _by_input(list_files(data, FOR_ARRAYS).paths, list(values), label, input_name)
    if values and files.keys() != values.keys():
        raise DataError(
            f"{label} takes the inputs {quoted(values)}, the files are for {quoted(files)}; name the inputs"
        )
    return {name: _Column(pairs, values.get(name or ""), label) for name, pairs in files.items()}


def _by_input(
    paths: Sequence[str], inputs: Sequence[str], label: str, input_name: str | None
) -> dict[str | None, list[tuple[str, str | None]]]:
    """Return the files of each input, each with the name of the array in a `.npz` file."""
    keys = _keys(paths[0])
    if not keys:
        raise DataError(f"{paths[0]} has no arrays; save it with numpy.savez and the inputs' names")
    if keys in ([None], ["arr_0"]):  # numpy.savez's name for an array without one
        if input_name is None and len(inputs) > 1:
            raise DataError(
                f"{label} takes the inputs {quoted(inputs)}, {paths[0]} has one array without a name; name the files "
                "of each input, or save .npz files with the inputs' names"
            )
        return {input_name or next(iter(inputs), None): [(path, keys[0]) for path in paths]}
    if input_name is not None:
        raise DataError(f"{paths[0]} says itself which input its arrays are for; leave out input name {input_name!r}")
    if not set(inputs) <= set(keys):
        raise DataError(
            f"{label} takes the inputs {quoted(inputs)}, {paths[0]} has the arrays {quoted(keys)}; save it with the "
            "inputs' names"
        )
    return {name: [(path, name) for path in paths] for name in inputs or keys}


def _are_batches(columns: Mapping[str | None, _Column], counting: Collection[str]) -> bool:
    """Return whether each file is a batch as it is: not all inputs count samples, and all arrays fit their inputs."""
    alike = {tuple(column.ends) for name, column in columns.items() if name in counting}
    are_unlike = len(set(map(len, columns.values()))) > 1
    return are_unlike and len(alike) == 1 and all(column.fits for column in columns.values())


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except FastcalError:
        raise
    except Exception as error:  # zipfile, zlib, and the parsers that NumPy calls have errors of their own
        reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
        raise DataError(f"cannot read {path}: {reason}; replace or remove it") from error


def _keys(path: str) -> list[str | None]:
    """Return the names of the arrays in a `.npz` file; None for the array in a `.npy` file. The content decides."""
    content = identify(path)
    if content == "array" or (content != "array archive" and not path.lower().endswith(".npz")):
        return [None]
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _shape_and_type(path: str, key: str | None) -> tuple[tuple[int, ...], Any]:
    """Return the shape and type of an array, from its header."""
    with _reading(path):
        if key is None:
            array = np.lib.format.open_memmap(path, mode="r")  # which also checks the length of the file
            return array.shape, array.dtype
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                raise DataError(f"{path} has no array {key!r}, which other files have; save all with the same names")
            file = archive.open(f"{key}.npy")
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[np.lib.format.read_magic(file)[0]](file)
            return shape, dtype


def _load(path: str, key: str | None, *, mapped: bool) -> Any:
    with _reading(path):
        if key is None:
            return np.load(path, mmap_mode="r" if mapped else None)
        with np.load(path) as arrays:
            return arrays[key]
