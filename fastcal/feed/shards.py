"""Samples in shards: tar files as WebDataset writes them, and TFRecord files."""

import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fastcal.errors import DataError
from fastcal.feed.dataset import add_files, kind_of
from fastcal.feed.sources import ImageSource, UnreadableError

#: The feature that holds the encoded image in TensorFlow's own data sets.
TFRECORD_KEY = "image/encoded"

# A record of a TFRecord file: its length, the length's checksum, the data, the data's checksum.
_HEADER = struct.Struct("<QI")
_FRAME = _HEADER.size + 4


class _Place(NamedTuple):
    shard: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shards(ImageSource):
    """Encoded images in shards. The shards are listed once; then each image is read by itself.

    Attributes:
        key: The name of the images in a sample, as the user gave it.
        feature: The feature of TFRecord files that holds the images; None for tar files.
    """

    per_sample: ClassVar = ("names", "places")

    names: list[str]
    places: list[_Place]
    key: str | None
    feature: str | None
    has_alpha: bool = False

    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes."""
        (shard, offset, size), name = self.places[number], self.names[number]
        wanted = size if most < 0 or self.feature else min(size, most)
        try:
            with open(shard, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), wanted, offset)
            if len(content) < wanted or (self.feature and _HEADER.unpack_from(content)[0] + _FRAME != size):
                raise UnreadableError(
                    number, f"cannot read {name}: the shard was changed since it was listed; replace it"
                )
            if not self.feature:
                return content
            image = _bytes_feature(memoryview(content)[_HEADER.size : -4], self.feature.encode())
        except OSError as error:
            raise UnreadableError(number, f"cannot read {name}: {error.strerror}; it was there when listed") from error
        except ValueError as error:
            raise UnreadableError(number, f"cannot read {name}: no tf.train.Example; replace or remove it") from error
        if image is None:
            raise DataError(f"{name} has no image; {_remedy(self.key, self.feature)}")
        return bytes(image if most < 0 else image[:most])

    def size(self, number: int) -> int:
        """Return the size of an encoded image in bytes, with the rest of its record."""
        return self.places[number].size

    def add_to_digest(self, digest: Any, *, lenient: bool) -> str:
        """Add the shards and the places of the samples to a hash; return what counts of the shards."""
        numbers = {shard: number for number, shard in enumerate(dict.fromkeys(place.shard for place in self.places))}
        counted = add_files(digest, list(numbers), lenient=lenient)
        key = "" if self.key in (None, TFRECORD_KEY) else f"{self.key}\0"
        digest.update(f"{len(self.names)}\0{key}".encode())
        for shard, offset, _ in self.places:
            digest.update(b"%d\0%d\0" % (numbers[shard], offset))
        return counted


def open_shards(shards: list[str], limit: int | None, key: str | None, *, are_tar: bool) -> Shards:
    """Return the samples in shards.

    Args:
        shards: The paths of the shards.
        limit: The number of samples after which no further shard is listed.
        key: For tar files, the extension of the images, e.g. "jpg" or "left.jpg"; by default any extension of an
            image. For TFRecord, the feature that holds the encoded image.
        are_tar: Whether the shards are tar files.
    """
    feature = None if are_tar else key or TFRECORD_KEY
    names, places = [], []
    for shard in shards:
        for name, offset, size in _list_tar(shard, key) if are_tar else _list_tfrecord(shard):
            names.append(f"{shard}:{name}")
            places.append(_Place(shard, offset, size))
        if limit is not None and len(names) >= limit:
            break
    if not names:
        raise DataError(f"{shards[0]} has no sample with an image; {_remedy(key, feature)}")
    return Shards(names, places, key, feature)


def _remedy(key: str | None, feature: str | None) -> str:
    if feature is not None:
        return f"the images' feature is the key, here {feature!r}"
    return f"the images' extension is the key, {f'here {key!r}' if key else 'by default .jpg, .png, ...'}"


def _list_tar(shard: str, key: str | None) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each sample's image; WebDataset writes the files of a sample one after another."""
    sample = None
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                wanted = extension.lower() == key.lower() if key is not None else kind_of(f"x.{extension}") == "image"
                if not member.isreg() or not stem or not wanted:
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


def _list_tfrecord(shard: str) -> Iterator[tuple[str, int, int]]:
    """Yield number, offset and size of each record."""
    try:
        with open(shard, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            offset = number = 0
            while offset < end:
                file.seek(offset)
                header = file.read(_HEADER.size)
                size = _FRAME + (_HEADER.unpack(header)[0] if len(header) == _HEADER.size else 0)
                if offset + size > end:
                    raise DataError(f"{shard} breaks off in record {number}, or is no TFRecord file; replace it")
                yield str(number), offset, size
                offset, number = offset + size, number + 1
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error.strerror}; check the path") from error


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
