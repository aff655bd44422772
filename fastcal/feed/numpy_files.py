"""`NumpyFeed`: tensors in `.npy` and `.npz` files as batches, as they are."""

import glob
import hashlib
import math
import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fastcal.batch import Input, check_values, format_shape, shape_fits
from fastcal.errors import FastcalError, quoted
from fastcal.feed.arrays import LAST_BATCHES, ArrayFeed
from fastcal.feed.dataset import EXTENSIONS, Data, shuffled
from fastcal.feed.digest import add_files
from fastcal.feed.feed import BATCH_SIZE, check_settings
from fastcal.feed.runs import count_batches, say_how_it_ends
from fastcal.memory import check_room
from fastcal.model import Model

#: How `numpy.savez` names an array that was given no name.
_UNNAMED = "arr_0"


class NumpyFeed(ArrayFeed):
    """Batches of tensors from NumPy's files, as they are and of any rank, read ahead of the consumer.

    A `.npy` file has one input's array, a `.npz` file the arrays of all inputs by name. The first dimension of an array
    counts samples; but where the model's input has one dimension more than the array, the array is one sample. So a
    file may hold one sample, a batch, or all there are: batches are made anew of the samples in their order.

    The files are read with NumPy, which takes several thousand samples of the size of an image a second.

    Args:
        data: A folder (searched with its folders, sorted by path), a pattern ("batches/*.npy", sorted by path), a file,
            or a sequence of paths; for several inputs in `.npy` files a dict of these by input name, where samples of
            one number belong together.
        model: An ONNX file whose inputs the arrays are held against and converted to. What a `.npz` file has besides
            (labels, say) is left out.
        batch_size: Samples in a batch; by default the model's where it is fixed, else 32.
        input_name: The input that `.npy` files are for; by default the model's, else whatever single input a network
            has.
        shuffle: Whether to shuffle the samples, before `limit`.
        seed: Decides the shuffled order.
        limit: Use this many samples at most.
        last_batch: As in `ArrayFeed`.
        device: As in `ArrayFeed`.
        depth: As in `ArrayFeed`.

    Attributes:
        batch_size: Samples in a batch.

    Raises:
        FastcalError: There are no such files, one cannot be read, or they fit neither each other nor the model.
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
            raise FastcalError(f"the inputs have different numbers of samples, {each}; every sample needs all inputs")
        (total,) = set(counts.values())
        numbers = shuffled(total, seed) if shuffle else np.arange(total)
        self._count = len(numbers[:limit])
        batch_size = batch_size or BATCH_SIZE
        largest = batch_size if last_batch == "wrap" else min(batch_size, self._count)
        held = 1 + min(depth, count_batches(self._count, batch_size, True))  # one is put together for the buffers
        size = held * largest * sum(column.sample_size for column in columns.values())
        check_room(size, f"{held} batches of {largest} samples", "use a smaller batch size")
        self._files = _Batches(columns, numbers[:limit], batch_size, last_batch)
        self._seed = seed if shuffle else None
        super().__init__(self._files, last_batch="keep", device=device, depth=depth)

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return self._count

    def part(self, batches: range, *, gpu: int | None, threads: int) -> ArrayFeed:
        """See `Feed.part`: `batches` from the files, in host memory; `gpu` and `threads` are nothing to it."""
        return ArrayFeed(self._files.part(batches), last_batch="keep", device="cpu")

    def describe(self) -> dict[str, Any]:
        """The files in order, by path below their common folder, size and time; and what is taken from them."""
        return {
            "arrays": self._count,
            "batches": len(self),
            "batch_size": self._files.batch_size,
            "seed": self._seed,
            "samples": self._files.digest(),
        }


def are_arrays(data: str) -> bool:
    """Whether `data` names `.npy` or `.npz` files, or a folder that has some and neither images nor shards."""
    if not os.path.isdir(data):
        return _extension(data) in (".npy", ".npz")
    others = {extension for kind, known in EXTENSIONS.items() if kind != "array" for extension in known}
    found = False
    for _, _, files in os.walk(data):
        extensions = set(map(_extension, files))
        if not extensions.isdisjoint(others):
            return False
        found = found or not extensions.isdisjoint({".npy", ".npz"})
    return found


class _Batches:
    """Batches of samples by their numbers; all are of one size, unless the last is to be kept as it is."""

    def __init__(self, columns: Mapping[str | None, "_Column"], numbers: Any, batch_size: int, last_batch: str) -> None:
        self._columns = columns
        self.batch_size = batch_size
        say_how_it_ends(len(numbers), batch_size, last_batch, "samples")
        if last_batch != "keep":
            wanted = batch_size * count_batches(len(numbers), batch_size, last_batch == "wrap")
            numbers = np.resize(numbers, wanted)
        self._numbers = numbers

    def __len__(self) -> int:
        return -(-len(self._numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self._numbers), self.batch_size):
            numbers = self._numbers[first : first + self.batch_size]
            arrays = {name: np.stack([column[number] for number in numbers]) for name, column in self._columns.items()}
            yield arrays.get(None, arrays)  # an array that was given no name is a batch by itself

    def part(self, batches: range) -> "_Batches":
        """The batches of these numbers."""
        part = copy(self)
        part._numbers = self._numbers[batches.start * self.batch_size : batches.stop * self.batch_size]
        return part

    def digest(self) -> str:
        """A digest of the files and of the samples' numbers."""
        digest = hashlib.sha256(np.asarray(self._numbers, "<i8").tobytes())
        for name, column in sorted(self._columns.items(), key=lambda item: item[0] or ""):
            digest.update(f"{name}\0".encode())
            add_files(digest, column.paths)
        return digest.hexdigest()


class _Column:
    """The samples of one input, from one file after another.

    Args:
        files: Paths, each with the name of the array in a `.npz` file, or None.
        value: The input; None where it is not known.
        label: What errors call the model.

    Attributes:
        sample_size: The bytes of a sample.

    Raises:
        FastcalError: A file cannot be read, or is of another shape or type than the first or than the input.
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
            _check(self.paths[0], value, label, (1, *shape) if self._single else shape, dtype)
        if not shape and not self._single:
            raise FastcalError(f"{self.paths[0]} is one number; an array's first dimension is to count samples")
        kept = dtype if value is None else value.dtype
        self.sample_size = math.prod(shape if self._single else shape[1:]) * kept.itemsize
        for path, (other, other_dtype) in zip(self.paths, arrays, strict=True):
            same = other == shape if self._single else len(other) == len(shape) and other[1:] == shape[1:]
            if not same or other_dtype != dtype:
                raise FastcalError(
                    f"{path} is {other_dtype} {format_shape(other)}, {self.paths[0]} {dtype} {format_shape(shape)}; "
                    "samples must have one shape and type"
                )
        self._ends = list(accumulate(1 if self._single else shape[0] for shape, _ in arrays))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": (-1, None)}  # an array that is mapped would be pickled with its values

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
    """The samples by input name; None stands for whatever single input a network has."""
    values = {} if model is None else {value.name: value for value in model.inputs}
    label = "" if model is None else str(model.path)
    files: dict[str | None, list[tuple[str, str | None]]]
    if isinstance(data, Mapping):
        files = {name: [(path, None) for path in list_arrays(where, ".npy")] for name, where in data.items()}
    else:
        files = _by_input(list_arrays(data, ".npy", ".npz"), list(values), label, input_name)
    if values and files.keys() != values.keys():
        raise FastcalError(
            f"{label} takes the inputs {quoted(values)}, the files are for {quoted(files)}; name the inputs"
        )
    return {name: _Column(pairs, values.get(name or ""), label) for name, pairs in files.items()}


def _by_input(
    paths: Sequence[str], inputs: Sequence[str], label: str, input_name: str | None
) -> dict[str | None, list[tuple[str, str | None]]]:
    """Which arrays of which files are for which input."""
    keys = _keys(paths[0])
    if not keys:
        raise FastcalError(f"{paths[0]} has no arrays; save it with numpy.savez and the inputs' names")
    if keys in ([None], [_UNNAMED]):
        if input_name is None and len(inputs) > 1:
            raise FastcalError(
                f"{label} takes the inputs {quoted(inputs)}, {paths[0]} has one array without a name; name the files "
                "of each input, or save .npz files with the inputs' names"
            )
        return {input_name or next(iter(inputs), None): [(path, keys[0]) for path in paths]}
    if input_name is not None:
        raise FastcalError(
            f"{paths[0]} says itself which input its arrays are for; leave out input name {input_name!r}"
        )
    missing = set(inputs) - set(keys)
    if missing:
        raise FastcalError(
            f"{label} takes the inputs {quoted(inputs)}, {paths[0]} has the arrays {quoted(keys)}; save it with the "
            "inputs' names"
        )
    return {name: [(path, name) for path in paths] for name in inputs or keys}


def _check(path: str, value: Input, label: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Hold the first array, as a batch, against the model's input."""
    if len(shape) != len(value.shape) or not shape_fits(value.shape[1:], shape[1:]):  # a batch of any size
        raise FastcalError(
            f"{label} takes input {value}, {path} is {format_shape(shape)}; save one sample of that shape a file, or "
            "several along a first dimension"
        )
    if not np.can_cast(dtype, value.dtype, "same_kind"):
        raise FastcalError(f"{label} takes input {value.name!r} as {value.dtype}, {path} is {dtype}; convert it")


def list_arrays(data: Data, *extensions: str) -> list[str]:
    """The files that `data` names."""
    wanted = " or ".join(extensions)
    if not isinstance(data, str | os.PathLike):
        paths, origin = [os.fspath(path) for path in data], "the list of files"
    elif not os.fspath(data):
        raise FastcalError("the name of the data is empty; name a folder, a pattern or a file")
    elif os.path.isdir(data):  # which says no, where Path's own raise an error, of a name that is too long
        found = (path for path in Path(data).rglob("*") if not path.name.startswith("."))
        paths, origin = sorted(str(path) for path in found if _extension(path) in extensions), str(data)
    elif os.path.exists(data):
        paths, origin = [os.fspath(data)], str(data)
    else:
        matching = glob.iglob(str(data), recursive=True)
        paths, origin = sorted(path for path in matching if _extension(path) in extensions), str(data)
    if not paths:
        raise FastcalError(f"there are no {wanted} files at {origin}; name a folder, a pattern or a file")
    for path in paths:
        if _extension(path) not in extensions:
            raise FastcalError(f"{path} is no {wanted} file; save arrays with numpy.save")
    if len(set(map(_extension, paths))) > 1:
        raise FastcalError(f"{origin} has .npy and .npz files; say which with a pattern, like '{origin}/*.npz'")
    return paths


def _extension(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(path)[1].lower()


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
        raise FastcalError(f"cannot read {path}: {reason}; replace or remove it") from error


def _keys(path: str) -> list[str | None]:
    """The names of the arrays in a `.npz` file; one without a name in a `.npy` file."""
    if _extension(path) != ".npz":
        return [None]
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _shape_and_type(path: str, key: str | None) -> tuple[tuple[int, ...], Any]:
    """The shape and type of an array, from its header."""
    with _reading(path):
        if key is None:
            array = np.lib.format.open_memmap(path, mode="r")  # which sees whether the file is as long as it should be
            return array.shape, array.dtype
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                raise FastcalError(f"{path} has no array {key!r}, which other files have; save all with the same names")
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
