"""Where samples come from: files, shards of many samples, arrays."""

import os
import struct
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali import tfrecord as dali_tfrecord

from fastcal.errors import FastcalError
from fastcal.feed.contained import ContainedDecoder, is_hazardous
from fastcal.feed.dataset import Listing, kind_of
from fastcal.feed.digest import add_files
from fastcal.feed.feed import as_array

#: The feature that holds the encoded image in TensorFlow's own data sets.
TFRECORD_KEY = "image/encoded"

# How many samples DALI reads ahead from shards.
_READ_AHEAD = 4


AnySource = TypeVar("AnySource", bound="Source")


class UnreadableError(FastcalError):
    """A sample that cannot be read or decoded.

    Args:
        number: Which one.
        text: What is wrong with it and what to do.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return UnreadableError, (self.number, str(self))


class Source(ABC):
    """The samples of one input, by number from 0 on.

    Attributes:
        names: What the samples are called: paths, or places in a shard.
    """

    names: list[str]

    def select(self, numbers: Sequence[int]) -> None:
        """Keep only these samples, in this order, and number them anew."""
        self.names = [self.names[number] for number in numbers]

    def part(self: AnySource, numbers: Sequence[int]) -> AnySource:
        """A source of these samples, in this order, that can be pickled and used on another machine.

        Raises:
            FastcalError: The source cannot be divided.
        """
        part = copy(self)
        part.select(numbers)
        return part

    @abstractmethod
    def fetch(self, numbers: Sequence[int]) -> Any:
        """What these samples are prepared from.

        Raises:
            UnreadableError: One of them cannot be read.
        """

    def add_to_digest(self, digest: Any, *, lenient: bool) -> None:
        """Add what tells the samples from others to a hash: see `fastcal.feed.digest.add_files`."""
        add_files(digest, self.names, lenient=lenient)

    def close(self) -> None:  # noqa: B027 - a source may hold nothing
        """Release what the source holds until it is fetched from again."""


class ImageSource(Source):
    """Encoded images."""

    @abstractmethod
    def read_with_dali(self, fetched: Any) -> Any:
        """The DALI operators that make encoded images of an external source that is given what `fetch` returns."""

    @abstractmethod
    def content(self, number: int, most: int = -1) -> bytes:
        """The encoded image, or so many bytes of it at most.

        Raises:
            UnreadableError: It cannot be read.
        """

    @abstractmethod
    def size(self, number: int) -> int:
        """How many bytes the encoded image has, as far as that is known."""

    def first_of_each_kind(self, most: int) -> dict[str, list[int]]:
        """The first images of each kind, by what their names end in: so many at most, and only where reading is cheap.

        Args:
            most: How many images of a kind to name.
        """
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(self._within_reach()):
            numbers = kinds[os.path.splitext(name)[1].lower()]
            if len(numbers) < most:
                numbers.append(number)
        return kinds

    def _within_reach(self) -> Sequence[str]:
        """The names of the samples that can be read at no more cost than the first."""
        return self.names


class ImageFiles(ImageSource):
    """Image files, which DALI reads.

    Where formats are among them whose decoders damaged files crash, the files are read here, and these decoded in a
    process of their own.

    Args:
        paths: The files.
    """

    def __init__(self, paths: list[str]) -> None:
        self.names = paths
        self._contained = ContainedDecoder() if any(map(is_hazardous, paths)) else None

    def read_with_dali(self, fetched: Any) -> Any:
        """The operators that make encoded images of what is fetched."""
        # Reading is twice as fast as mapping files of this size into memory.
        return fetched if self._contained else fn.io.file.read(fetched, dont_use_mmap=True)

    def fetch(self, numbers: Sequence[int]) -> Any:
        """What these samples are prepared from."""
        if self._contained is not None:
            return [_contain(self._contained, self, number) for number in numbers]
        # Paths as DALI reads them: a row of bytes each, zeros at the end, which no path holds and the system ignores.
        paths = [os.fsencode(self.names[number]) for number in numbers]
        return np.array(paths).view(np.uint8).reshape(len(numbers), -1)

    def content(self, number: int, most: int = -1) -> bytes:
        """The encoded image, or so many bytes of it at most."""
        name = self.names[number]
        try:
            with open(name, "rb") as file:
                return file.read(most)
        except OSError as error:
            raise UnreadableError(
                number, f"cannot read {name}: {error.strerror}; it was there when the images were listed"
            ) from error

    def size(self, number: int) -> int:
        """How many bytes the encoded image has, as far as that is known."""
        try:
            return os.path.getsize(self.names[number])
        except OSError:  # the decoder reports what is gone
            return 0

    def close(self) -> None:
        """Release what the source holds until it is fetched from again."""
        if self._contained is not None:
            self._contained.close()


class Arrays(Source):
    """Arrays in `.npy` files, one a sample.

    Args:
        paths: The files.

    Attributes:
        shape: The shape of each array.
        dtype: Their type; float64 becomes float32.

    Raises:
        FastcalError: The first file holds no array.
    """

    def __init__(self, paths: list[str]) -> None:
        self.names = paths
        first = self._load(0)
        self.shape, self.dtype = first.shape, first.dtype

    def fetch(self, numbers: Sequence[int]) -> Any:
        """What these samples are prepared from."""
        arrays = [self._load(number) for number in numbers]
        for number, array in zip(numbers, arrays, strict=True):
            if array.shape != self.shape or array.dtype != self.dtype:
                raise FastcalError(
                    f"{self.names[number]} is {array.dtype} {array.shape}, the first array {self.dtype} {self.shape}; "
                    "all must be alike"
                )
        return np.stack(arrays)

    def _load(self, number: int) -> Any:
        path = self.names[number]
        try:
            with open(path, "rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)  # nothing else, as `numpy.load` would
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "damaged, or no array of numbers"
            raise UnreadableError(number, f"cannot read {path}: {reason}; replace or remove it") from error
        return as_array(array)


class _Record(NamedTuple):
    """A sample's place in a shard."""

    shard: int
    offset: int
    size: int


class Shards(ImageSource):
    """Encoded images in shards, which DALI reads from front to back.

    What was read is kept for a while, since samples are fetched again when another of their run turns out to be
    unreadable.

    Args:
        shards: Paths of the shards.
        limit: How many samples are enough.

    Attributes:
        keep: How many samples to keep.
    """

    def __init__(self, shards: list[str], limit: int | None) -> None:
        self.keep = 0
        self._shards = shards
        self.names: list[str] = []
        self._records: list[_Record] = []
        for number, shard in enumerate(shards):
            for name, offset, size in self._list_samples(shard):
                self.names.append(f"{shard}:{name}")
                self._records.append(_Record(number, offset, size))
            if limit is not None and len(self.names) >= limit:
                break
        if not self.names:
            raise FastcalError(f"{shards[0]} has no sample with an image; {self._remedy}")
        self._reader: Iterator[bytes] = iter(())
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._next = len(self.names)
        self._contained = ContainedDecoder()

    _remedy: str
    _key: str | None

    @abstractmethod
    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        """Name, offset and size of a shard's samples."""

    @abstractmethod
    def _index(self, records: Sequence[_Record]) -> str:
        """An index of one shard as DALI's reader has it."""

    @abstractmethod
    def _operator(self, shards: list[str], indices: list[str]) -> Any:
        """DALI's reader."""

    def select(self, numbers: Sequence[int]) -> None:
        """Keep only these samples, the first ones."""
        del self.names[len(numbers) :], self._records[len(numbers) :]

    def part(self, numbers: Sequence[int]) -> "Shards":
        """Shards are read from front to back."""
        raise FastcalError(
            f"the samples of {self._shards[0]} are read one after another, and cannot be divided among workers; leave "
            "workers out, or unpack it"
        )

    def read_with_dali(self, fetched: Any) -> Any:
        """The operators that make encoded images of what is fetched."""
        return fetched

    def fetch(self, numbers: Sequence[int]) -> Any:
        """What these samples are prepared from."""
        return [_contain(self._contained, self, number) for number in numbers]

    def content(self, number: int, most: int = -1) -> bytes:
        """The encoded image, or so many bytes of it at most."""
        return self._read(number)[: None if most < 0 else most]

    def size(self, number: int) -> int:
        """How many bytes the encoded image has, as far as that is known."""
        return self._records[number].size

    def _within_reach(self) -> Sequence[str]:
        return self.names[: self.keep]

    def add_to_digest(self, digest: Any, *, lenient: bool) -> None:
        """Add what tells the samples from others."""
        add_files(digest, self._shards[: self._records[-1].shard + 1], lenient=lenient)
        key = "" if self._key in (None, TFRECORD_KEY) else f"{self._key}\0"
        digest.update(f"{len(self.names)}\0{key}".encode())

    def close(self) -> None:
        """Release what the source holds until it is fetched from again."""
        self._reader, self._next = iter(()), len(self.names)
        self._kept.clear()
        self._contained.close()

    def _read(self, number: int) -> bytes:
        if number not in self._kept:
            if number < self._next:
                self._reader, self._next = self._start_reader(), 0
            while self._next <= number:
                try:
                    self._kept[self._next] = next(self._reader)
                except BaseException:
                    self._reader, self._next = iter(()), len(self.names)  # begin anew: this one has ended
                    raise
                self._next += 1
                while len(self._kept) > max(self.keep, 1):
                    self._kept.popitem(last=False)
        return self._kept[number]

    def _start_reader(self) -> Iterator[bytes]:
        # A sample a run: records without an image are of other dimensions than those with one.
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=_READ_AHEAD)
        used = self._records[-1].shard + 1
        by_shard: list[list[_Record]] = [[] for _ in range(used)]
        for record in self._records:
            by_shard[record.shard].append(record)
        with tempfile.TemporaryDirectory(prefix="fastcal-") as folder:
            shards, indices = [], []
            for number, records in enumerate(by_shard):
                if records:
                    shards.append(self._shards[number])
                    indices.append(os.path.join(folder, str(number)))
                    Path(indices[-1]).write_text(self._index(records))
            with pipeline:
                pipeline.set_outputs(self._operator(shards, indices))
            pipeline.build()  # reads the indices
        while True:
            name = self.names[self._next]
            try:
                image = np.asarray(pipeline.run()[0].at(0))
            except RuntimeError as error:
                raise FastcalError(
                    f"DALI cannot read the shards from {name} on; were they changed since they were listed?"
                ) from error
            if not image.ndim:
                raise FastcalError(f"{name} has no image; {self._remedy}")
            yield image.tobytes()


class TarShards(Shards):
    """Tar files as WebDataset writes them: the files of a sample follow each other and differ in their extensions.

    Args:
        shards: Paths of the tar files.
        limit: How many samples are enough.
        key: The extension of the files to take, e.g. "jpg" or "left.jpg"; by default any that an image has.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None) -> None:
        self._key = key
        self._remedy = (
            f"the images' extension is the key, {'here ' + repr(key) if key else 'by default .jpg, .png, ...'}"
        )
        super().__init__(shards, limit)

    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        sample = None
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if not member.isreg() or not stem or not self._is_wanted(extension):
                        continue
                    if (folder, stem) == sample:
                        raise FastcalError(
                            f"{shard}: sample {stem!r} has several images; choose one by its extension with key, "
                            f"e.g. {extension!r}"
                        )
                    sample = folder, stem
                    yield member.name, member.offset_data, member.size
        except (OSError, tarfile.TarError) as error:
            raise FastcalError(f"cannot read {shard}: {error}; shards are tar files that are not compressed") from error

    def _is_wanted(self, extension: str) -> bool:
        if self._key is not None:
            return extension.lower() == self._key.lower()
        return kind_of(f"x.{extension}") == "image"

    def _index(self, records: Sequence[_Record]) -> str:
        lines = (f"image {record.offset} {record.size} {number}" for number, record in enumerate(records))
        return f"v1.2 {len(records)}\n" + "\n".join(lines) + "\n"

    def _operator(self, shards: list[str], indices: list[str]) -> Any:
        return fn.readers.webdataset(
            paths=shards, index_paths=indices, ext=["image"], missing_component_behavior="error", dont_use_mmap=True
        )


class TFRecords(Shards):
    """TFRecord files of `tf.train.Example` records.

    Args:
        shards: Paths of the files.
        limit: How many samples are enough.
        key: The feature that holds the encoded image.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None) -> None:
        self._key: str = key or TFRECORD_KEY
        self._remedy = f"the images' feature is the key, here {self._key!r}"
        super().__init__(shards, limit)

    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        try:
            with open(shard, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                offset = number = 0
                while offset < end:
                    # A record: its length, the length's checksum, the record, its checksum.
                    file.seek(offset)
                    header = file.read(12)
                    size = 16 + struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
                    if offset + size > end:
                        raise FastcalError(f"{shard} breaks off in record {number}, or is no TFRecord file; replace it")
                    yield str(number), offset, size
                    offset, number = offset + size, number + 1
        except OSError as error:
            raise FastcalError(f"cannot read {shard}: {error.strerror}; check the path") from error

    def _index(self, records: Sequence[_Record]) -> str:
        return "".join(f"{record.offset} {record.size}\n" for record in records)

    def _operator(self, shards: list[str], indices: list[str]) -> Any:
        features = {self._key: dali_tfrecord.FixedLenFeature([], dali_tfrecord.string, "")}
        read: Any = fn.readers.tfrecord(path=shards, index_path=indices, features=features, dont_use_mmap=True)
        return read[self._key]


def open_source(listing: Listing, *, limit: int | None, key: str | None) -> Source:
    """The samples in files of one kind.

    Args:
        listing: The files.
        limit: For shards: how many samples are enough.
        key: For shards: what the images are called in them.

    Raises:
        FastcalError: A key is given for files that have none, or a shard cannot be read.
    """
    if listing.kind == "tar shard":
        return TarShards(listing.paths, limit, key)
    if listing.kind == "TFRecord":
        return TFRecords(listing.paths, limit, key)
    if key is not None:
        raise FastcalError(f"key {key!r} is for tar shards and TFRecord, not for {listing.paths[0]}; leave it out")
    return ImageFiles(listing.paths) if listing.kind == "image" else Arrays(listing.paths)


def _contain(decoder: ContainedDecoder, source: ImageSource, number: int) -> Any:
    """The encoded image, or where its own decoder is a hazard, what a process of its own made of it."""
    content = source.content(number)
    try:
        return np.frombuffer(decoder.decode(content), np.uint8)
    except ValueError as error:
        name = source.names[number]
        raise UnreadableError(number, f"{name} cannot be decoded: it {error}; replace or remove it") from error
