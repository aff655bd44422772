"""The samples of one input: image files and arrays; for shards of many samples see `fastcal.feed.shards`."""

import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from nvidia.dali import fn

from fastcal.device import as_array
from fastcal.errors import DataError
from fastcal.feed.dataset import add_files
from fastcal.feed.decode import has_16_bits, is_hazardous, make_safe


class UnreadableError(DataError):
    """A sample cannot be read or decoded."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return UnreadableError, (self.number, str(self))


class Source(ABC):
    """The samples of one input, by number; `names` are paths, or places in a shard."""

    #: The lists that have an element for each sample.
    per_sample: ClassVar[tuple[str, ...]] = ("names",)

    names: list[str]

    def take(self, numbers: Sequence[int]) -> "Source":
        """Return a source of these samples, in this order and numbered anew."""
        taken = copy(self)
        for name in self.per_sample:
            vars(taken)[name] = [getattr(self, name)[number] for number in numbers]  # sources are frozen
        return taken

    @abstractmethod
    def fetch(self, numbers: Sequence[int]) -> Any:
        """Return the data that these samples are prepared from; raise UnreadableError if one cannot be read."""

    def add_to_digest(self, digest: Any, *, lenient: bool) -> str:
        """Add the identity of the samples to a hash; return what counts: see `fastcal.feed.dataset.add_files`."""
        return add_files(digest, self.names, lenient=lenient)


class ImageSource(Source):
    """Encoded images; if `has_alpha`, `fetch` decodes them to RGBA."""

    has_alpha: bool

    @property
    def is_read_by_dali(self) -> bool:
        """True if `fetch` gives paths, and DALI reads the files."""
        return False

    def read_with_dali(self, fetched: Any) -> Any:
        """Return DALI's node of encoded images, given the node of an external source that is fed by `fetch`."""
        return fetched

    def read_here(self) -> "ImageSource":
        """Return a source of the same images that `fetch` reads, and makes safe if their content is hazardous."""
        return self

    def with_alpha(self) -> "ImageSource":
        """Return a source of the same images whose `fetch` decodes them to RGBA."""
        return replace(self, has_alpha=True)  # type: ignore[type-var]  # all kinds are dataclasses

    def fetch(self, numbers: Sequence[int]) -> Any:
        """Return the encoded images."""
        return [self._safe(number) for number in numbers]

    @abstractmethod
    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes; raise UnreadableError if it cannot be read."""

    @abstractmethod
    def size(self, number: int) -> int:
        """Return the size of an encoded image in bytes, roughly; 0 if it is not known."""

    def first_of_each_kind(self, most: int) -> dict[str, list[int]]:
        """Return the first images, at most `most`, by extension."""
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(self.names):
            numbers = kinds[os.path.splitext(re.sub(r":\d+$", "", name))[1].lower()]  # a TFRecord file's record
            if len(numbers) < most:
                numbers.append(number)
        return kinds

    def first_of_16_bits(self) -> str:
        """Return the name of an image of 16 bits a channel, if one is the first of its kind; else an empty text."""
        for (number,) in self.first_of_each_kind(1).values():
            with suppress(DataError):
                if self.size(number) and has_16_bits(self.content(number)):  # a pipe, of size 0, would never end
                    return self.names[number]
        return ""

    def _safe(self, number: int) -> Any:
        try:
            return np.frombuffer(make_safe(self.content(number), has_alpha=self.has_alpha), np.uint8)
        except ValueError as error:
            raise UnreadableError(
                number, f"{self.names[number]} cannot be decoded: {error}; replace or remove it"
            ) from error


@dataclass(frozen=True)
class ImageFiles(ImageSource):
    """Image files. DALI reads them, unless some are named as formats that `fastcal.feed.decode` is for.

    With `is_read_here` their names do not count, and DALI reads none of them.
    """

    names: list[str]
    is_read_here: bool = False
    has_alpha: bool = False

    @cached_property
    def is_read_by_dali(self) -> bool:
        """True if DALI may read and decode all files."""
        return not (self.is_read_here or self.has_alpha) and not any(map(is_hazardous, self.names))

    def read_here(self) -> "ImageFiles":
        """Return a source of the same files that DALI does not read."""
        return replace(self, is_read_here=True)

    def read_with_dali(self, fetched: Any) -> Any:
        """Return DALI's node of encoded images."""
        # Reading is twice as fast as mapping files of this size into memory.
        return fn.io.file.read(fetched, dont_use_mmap=True) if self.is_read_by_dali else fetched

    def fetch(self, numbers: Sequence[int]) -> Any:
        """Return the paths as bytes for DALI, or the encoded images."""
        if not self.is_read_by_dali:
            return super().fetch(numbers)
        # Paths as DALI reads them: a row of bytes each, zeros at the end, which no path holds and the system ignores.
        paths = [os.fsencode(self.names[number]) for number in numbers]
        return np.array(paths).view(np.uint8).reshape(len(numbers), -1)

    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes."""
        path = self.names[number]
        try:
            with open(path, "rb") as file:
                return file.read(most)
        except OSError as error:
            raise UnreadableError(
                number, f"cannot read {path}: {error.strerror}; it was there when the images were listed"
            ) from error

    def size(self, number: int) -> int:
        """Return the size of an encoded image in bytes."""
        try:
            return os.path.getsize(self.names[number])
        except OSError:  # the decoder reports missing files
            return 0


@dataclass(frozen=True)
class Arrays(Source):
    """Arrays of one shape in `.npy` files, one sample each; `dtype` is the type in batches: float32 for float64."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, paths: list[str]) -> "Arrays":
        """Return the source of these files, with the first one's shape and type."""
        first = _load(0, paths[0])
        return cls(paths, first.shape, first.dtype)

    def fetch(self, numbers: Sequence[int]) -> Any:
        """Return the samples as one array; raise DataError if one has another shape or type than the first."""
        arrays = [_load(number, self.names[number]) for number in numbers]
        for number, array in zip(numbers, arrays, strict=True):
            if array.shape != self.shape or array.dtype != self.dtype:
                raise DataError(
                    f"{self.names[number]} is {array.dtype} {array.shape}, the first array {self.dtype} {self.shape}; "
                    "all must be alike"
                )
        return np.stack(arrays)


def _load(number: int, path: str) -> Any:
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)  # nothing else, as `numpy.load` would
    except Exception as error:  # NumPy calls parsers that have errors of their own
        reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
        raise UnreadableError(number, f"cannot read {path}: {reason}; replace or remove it") from error
    return as_array(array)
