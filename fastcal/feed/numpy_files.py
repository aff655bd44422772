"""`NumpyFeed`: the tensors in `.npy` and `.npz` files as batches."""

import hashlib
import math
import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from fastcal.batch import Input, check_values, format_shape, shape_fits
from fastcal.device import resolve
from fastcal.errors import DataError, quoted
from fastcal.feed.array_plan import LAST_BATCHES, ArrayPasses, ArrayPlan
from fastcal.feed.chunks import count_batches, log_last_batch
from fastcal.feed.dataset import FOR_ARRAYS, Data, add_files, list_files, shuffled
from fastcal.feed.plan import BATCH_SIZE, PlannedFeed, check_settings
from fastcal.memory import check_room
from fastcal.model import Model


class NumpyFeed(PlannedFeed):
    """Batches of tensors of any rank from NumPy's files, read ahead of the consumer.

    A `.npy` file has one input's array, a `.npz` file the arrays of all inputs by name. The first dimension of an array
    counts samples; but if the model's input has one dimension more than the array, the array is one sample. So a file
    may hold one sample, a batch, or all samples: new batches are made of the samples in their order.

    The files are read with NumPy, which reads several thousand samples of the size of an image a second.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file), a pattern ("batches/*.npy", sorted by path; "batches/{0..9}.npy"), a file, or a sequence of paths;
            for several inputs in `.npy` files a dict of these by input name, where samples of one number belong
            together.
        model: An ONNX file. The arrays are checked against its inputs and converted to their types. Further arrays in a
            `.npz` file (labels, for instance) are left out.
        batch_size: The number of samples in a batch; by default the model's if that is fixed, else 32.
        input_name: The input that `.npy` files are for; by default the model's, else whatever single input a network
            has.
        shuffle: Whether to shuffle the samples, before `limit`.
        seed: Decides the shuffled order.
        limit: The number of samples to use at most.
        last_batch: As in `ArrayFeed`.
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
        last_batch: str = "wrap",
        device: str = "auto",
        depth: int = 2,
    ) -> None:
        check_settings(last_batch, LAST_BATCHES, batch_size=batch_size, limit=limit, depth=depth)
        if model is not None:
            model = Model.of(model)
            batch_size = model.batch_size if batch_size is None else batch_size
        columns = _columns(data, model, input_name)
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise DataError(f"the inputs have different numbers of samples, {each}; every sample needs all inputs")
        (total,) = set(counts.values())
        numbers = (shuffled(total, seed) if shuffle else np.arange(total))[:limit]
        batch_size = batch_size or BATCH_SIZE
        largest = batch_size if last_batch == "wrap" else min(batch_size, len(numbers))
        held = 1 + min(depth, count_batches(len(numbers), batch_size, True))  # one is put together for the buffers
        size = held * largest * sum(column.sample_size for column in columns.values())
        check_room(size, f"{held} batches of {largest} samples", "use a smaller batch size")
        log_last_batch(len(numbers), batch_size, last_batch, "samples")
        whole = numbers
        if last_batch != "keep":
            whole = np.resize(numbers, batch_size * count_batches(len(numbers), batch_size, last_batch == "wrap"))
        batches = _FileBatches(columns, whole, batch_size)
        super().__init__(
            _NumpyPlan(batches, None, "keep", resolve(device), depth, len(numbers), seed=seed if shuffle else None),
            ArrayPasses,
        )

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self._plan.samples or 0


@dataclass(frozen=True, eq=False)
class _NumpyPlan(ArrayPlan):
    """Batches from files."""

    seed: int | None = None  # None: not shuffled

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

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.numbers), self.batch_size):
            numbers = self.numbers[first : first + self.batch_size]
            arrays = {name: np.stack([column[number] for number in numbers]) for name, column in self.columns.items()}
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
        self.sample_size = math.prod(shape if self._single else shape[1:]) * kept.itemsize
        for path, (other, other_dtype) in zip(self.paths, arrays, strict=True):
            same = other == shape if self._single else len(other) == len(shape) and other[1:] == shape[1:]
            if not same or other_dtype != dtype:
                raise DataError(
                    f"{path} is {other_dtype} {format_shape(other)}, {self.paths[0]} {dtype} {format_shape(shape)}; "
                    "samples must have one shape and type"
                )
        self._ends = list(accumulate(1 if self._single else shape[0] for shape, _ in arrays))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": (-1, None)}  # a mapped array would be pickled with its values

    def __getitem__(self, number: int) -> Any:
        index = bisect_right(self._ends, number)
        if self._open[0] != index:
            self._open = index, _load(*self._files[index], mapped=not self._single)
        array = self._open[1]
        if not self._single:
            array = array[number - (self._ends[index - 1] if index else 0)]
        if self._value is None:
            return array
        check_values(array, self._value, self._label)
        return np.asarray(array, self._value.dtype)


def _columns(data: Data | Mapping[str, Data], model: Model | None, input_name: str | None) -> dict[str | None, _Column]:
    """Return the samples by input name; None stands for whatever single input a network has."""
    values = {} if model is None else {value.name: value for value in model.inputs}
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


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
        raise DataError(f"cannot read {path}: {reason}; replace or remove it") from error


def _keys(path: str) -> list[str | None]:
    """Return the names of the arrays in a `.npz` file; None for the array in a `.npy` file."""
    if not path.lower().endswith(".npz"):
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
