"""Samples in shards: tar files as WebDataset writes them, and TFRecord files."""

import os
import struct
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastcal.errors import DataError
from fastcal.feed.dataset import kind_of
from fastcal.feed.digest import add_files
from fastcal.feed.sources import ImageSource, UnreadableError

#: The feature that holds the encoded image in TensorFlow's own data sets.
TFRECORD_KEY = "image/encoded"

# A record of a TFRecord file: its length, the length's checksum, the data, the data's checksum.
_HEADER = struct.Struct("<QI")
_FRAME = _HEADER.size + 4


class _Record(NamedTuple):
    """The place of a sample."""

    shard: str
    offset: int
    size: int


class Shards(ImageSource):
    """Encoded images in shards. The shards are listed once; then each image is read by itself.

    Args:
        shards: The paths of the shards.
        limit: The number of samples after which no further shard is listed.
        key: The name of the images in a sample.
        remedy: The remedy that error texts give if a sample has no image.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None, remedy: str) -> None:
        self._key = key
        self._remedy = remedy
        self.names: list[str] = []
        self._records: list[_Record] = []
        for shard in shards:
            for name, offset, size in self._list_samples(shard):
                self.names.append(f"{shard}:{name}")
                self._records.append(_Record(shard, offset, size))
            if limit is not None and len(self.names) >= limit:
                break
        if not self.names:
            raise DataError(f"{shards[0]} has no sample with an image; {remedy}")

    @abstractmethod
    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        """Yield name, offset and size of each sample of a shard."""

    def take(self, numbers: Sequence[int]) -> "Shards":
        """Return a source of these samples, in this order and numbered anew."""
        taken: Any = super().take(numbers)
        taken._records = [self._records[number] for number in numbers]
        return taken

    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes."""
        record, name = self._records[number], self.names[number]
        size = record.size if most < 0 else min(record.size, most)
        try:
            with open(record.shard, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, record.offset)
        except OSError as error:
            raise UnreadableError(
                number, f"cannot read {name}: {error.strerror}; it was there when the samples were listed"
            ) from error
        if len(content) < size:
            raise self._changed(number)
        return content

    def _changed(self, number: int) -> UnreadableError:
        return UnreadableError(
            number, f"cannot read {self.names[number]}: the shard was changed since it was listed; list it again"
        )

    def size(self, number: int) -> int:
        """Return the size of an encoded image in bytes."""
        return self._records[number].size

    def add_to_digest(self, digest: Any, *, lenient: bool) -> None:
        """Add the shards and the places of the samples to a hash."""
        shards = {record.shard: None for record in self._records}
        numbers = {shard: number for number, shard in enumerate(shards)}
        add_files(digest, list(shards), lenient=lenient)
        key = "" if self._key in (None, TFRECORD_KEY) else f"{self._key}\0"
        digest.update(f"{len(self.names)}\0{key}".encode())
        for shard, offset, _ in self._records:
            digest.update(b"%d\0%d\0" % (numbers[shard], offset))


class TarShards(Shards):
    """Tar files as WebDataset writes them: the files of a sample follow each other and differ in their extensions.

    Args:
        shards: The paths of the tar files.
        limit: The number of samples after which no further shard is listed.
        key: The extension of the files to take, e.g. "jpg" or "left.jpg"; by default any extension of an image.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None) -> None:
        extension = f"here {key!r}" if key else "by default .jpg, .png, ..."
        super().__init__(shards, limit, key, f"the images' extension is the key, {extension}")

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
                        raise DataError(
                            f"{shard}: sample {stem!r} has several images; choose one by its extension with key, "
                            f"e.g. {extension!r}"
                        )
                    sample = folder, stem
                    yield member.name, member.offset_data, member.size
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"cannot read {shard}: {error}; shards are tar files that are not compressed") from error

    def _is_wanted(self, extension: str) -> bool:
        if self._key is not None:
            return extension.lower() == self._key.lower()
        return kind_of(f"x.{extension}") == "image"


class TFRecords(Shards):
    """TFRecord files of `tf.train.Example` records.

    Args:
        shards: The paths of the files.
        limit: The number of samples after which no further shard is listed.
        key: The feature that holds the encoded image.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None) -> None:
        feature = key or TFRECORD_KEY
        super().__init__(shards, limit, feature, f"the images' feature is the key, here {feature!r}")

    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        try:
            with open(shard, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                offset = number = 0
                while offset < end:
                    file.seek(offset)
                    header = file.read(_HEADER.size)
                    size = _FRAME + _HEADER.unpack(header)[0] if len(header) == _HEADER.size else end
                    if offset + size > end:
                        raise DataError(f"{shard} breaks off in record {number}, or is no TFRecord file; replace it")
                    yield str(number), offset, size
                    offset, number = offset + size, number + 1
        except OSError as error:
            raise DataError(f"cannot read {shard}: {error.strerror}; check the path") from error

    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes."""
        record = super().content(number)
        if _HEADER.unpack_from(record)[0] + _FRAME != len(record):
            raise self._changed(number)
        try:
            image = _bytes_feature(memoryview(record)[_HEADER.size : -4], str(self._key).encode())
        except ValueError as error:
            raise UnreadableError(
                number, f"cannot read {self.names[number]}: no tf.train.Example; replace or remove it"
            ) from error
        if image is None:
            raise DataError(f"{self.names[number]} has no image; {self._remedy}")
        return bytes(image if most < 0 else image[:most])

    def first_of_each_kind(self, most: int) -> dict[str, list[int]]:
        """Return the first images: their names have no extensions."""
        return {"": list(range(len(self.names)))[:most]}


def _bytes_feature(example: memoryview, key: bytes) -> memoryview | None:
    """Return the first value of a feature of a serialized `tf.train.Example`; None if it has no bytes.

    An Example has Features (field 1), a map (1) whose entries have a key (1) and a Feature (2); a Feature has a
    BytesList (1) of values (1).
    """
    for features in _fields(example, 1):
        for entry in _fields(features, 1):
            if key in _fields(entry, 1):
                lists = [values for feature in _fields(entry, 2) for values in _fields(feature, 1)]
                return next((value for values in lists for value in _fields(values, 1)), None)
    return None


def _fields(message: memoryview, number: int) -> list[memoryview]:
    """Return the values of a field of a serialized protocol buffer; raise ValueError if it is damaged.

    All fields of a `tf.train.Example` down to the values are of wire type 2: a tag, the length, the data
    (https://protobuf.dev/programming-guides/encoding).
    """
    found, place = [], 0
    while place < len(message):
        tag, place = _varint(message, place)
        size, place = _varint(message, place)
        if tag & 7 != 2 or place + size > len(message):
            raise ValueError(tag)
        if tag >> 3 == number:
            found.append(message[place : place + size])
        place += size
    return found


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return a number of 7 bits per byte, the lowest first, and the place after it."""
    value = 0
    for shift, byte in enumerate(message[place : place + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, place + shift + 1
    raise ValueError(place)
