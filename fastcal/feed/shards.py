"""Samples in shards: tar files as WebDataset writes them, and TFRecord files."""

import os
import struct
import tarfile
import tempfile
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali import tfrecord as dali_tfrecord

from fastcal.errors import DataError
from fastcal.feed.dataset import add_files, kind_of
from fastcal.feed.sources import ImageSource

#: The feature that holds the encoded image in TensorFlow's own data sets.
TFRECORD_KEY = "image/encoded"

# How many samples DALI reads ahead from shards.
_READ_AHEAD = 4


class _Record(NamedTuple):
    """The place of a sample in a shard."""

    shard: int
    offset: int
    size: int


class _SequentialReader:
    """Reads samples from front to back and keeps the last ones; starts again if an earlier one is asked for.

    Samples are asked for again when another sample of their chunk turns out to be unreadable.

    Args:
        keep: The number of samples to keep.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._samples: Iterator[bytes] | None = None
        self._next = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _SequentialReader, (self.keep,)  # neither samples nor an open pipeline are copied

    def read(self, number: int, start: Callable[[], Iterator[bytes]]) -> bytes:
        """Return a sample; `start` begins to read at the first sample."""
        if number not in self._kept:
            if self._samples is None or number < self._next:
                self._samples, self._next = start(), 0
            while self._next <= number:
                try:
                    self._kept[self._next] = next(self._samples)
                except BaseException:
                    self._samples = None
                    raise
                self._next += 1
                while len(self._kept) > max(self.keep, 1):
                    self._kept.popitem(last=False)
        return self._kept[number]

    def close(self) -> None:
        """Stop reading, and forget the samples."""
        self._samples = None
        self._kept.clear()


class Shards(ImageSource):
    """Encoded images in shards, which DALI reads from front to back.

    Args:
        shards: The paths of the shards.
        limit: The number of samples after which no further shard is listed.
        key: The name of the images in a sample.
        remedy: The remedy that error texts give if a sample has no image.
    """

    def __init__(self, shards: list[str], limit: int | None, key: str | None, remedy: str) -> None:
        self._key = key
        self._remedy = remedy
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
            raise DataError(f"{shards[0]} has no sample with an image; {remedy}")
        self._reader = _SequentialReader(0)

    @abstractmethod
    def _list_samples(self, shard: str) -> Iterator[tuple[str, int, int]]:
        """Yield name, offset and size of each sample of a shard."""

    @abstractmethod
    def _index(self, records: Sequence[_Record]) -> str:
        """Return an index of one shard in the form that DALI's reader takes."""

    @abstractmethod
    def _operator(self, shards: list[str], indices: list[str]) -> Any:
        """Return the node of DALI's reader."""

    def take(self, numbers: Sequence[int]) -> "Shards":
        """Return a source of these samples, which must be the first ones."""
        taken = copy(self)
        taken.names, taken._records = self.names[: len(numbers)], self._records[: len(numbers)]
        taken._reader = copy(self._reader)
        return taken

    def part(self, numbers: Sequence[int]) -> "Shards":
        """Raise DataError: shards are read from front to back."""
        raise DataError(
            f"the samples of {self._shards[0]} are read one after another, and cannot be divided among workers; leave "
            "workers out, or unpack it"
        )

    def keeping(self, samples: int) -> "Shards":
        """Return this source, set to keep so many samples in memory."""
        kept = copy(self)
        kept._reader = _SequentialReader(samples)
        return kept

    def read_with_dali(self, fetched: Any) -> Any:
        """Return DALI's node of encoded images."""
        return fetched

    def fetch(self, numbers: Sequence[int]) -> Any:
        """Return the encoded images."""
        return [self._safe(number) for number in numbers]

    def content(self, number: int, most: int = -1) -> bytes:
        """Return an encoded image, or its first `most` bytes."""
        return self._reader.read(number, self._read_all)[: None if most < 0 else most]

    def size(self, number: int) -> int:
        """Return the size of an encoded image in bytes."""
        return self._records[number].size

    def add_to_digest(self, digest: Any, *, lenient: bool) -> None:
        """Add the identity of the samples to a hash."""
        add_files(digest, self._shards[: self._records[-1].shard + 1], lenient=lenient)
        key = "" if self._key in (None, TFRECORD_KEY) else f"{self._key}\0"
        digest.update(f"{len(self.names)}\0{key}".encode())

    def close(self) -> None:
        """Stop reading, and forget the samples."""
        self._reader.close()

    def _cheap_to_read(self) -> Sequence[str]:
        return self.names[: self._reader.keep]

    def _read_all(self) -> Iterator[bytes]:
        """Yield all encoded images, from the first one on."""
        # One sample a run: records without an image have other dimensions than those with one.
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=_READ_AHEAD)
        by_shard: list[list[_Record]] = [[] for _ in range(self._records[-1].shard + 1)]
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
        for name in self.names:
            try:
                image = np.asarray(pipeline.run()[0].at(0))
            except RuntimeError as error:
                raise DataError(
                    f"DALI cannot read the shards from {name} on; were they changed since they were listed?"
                ) from error
            if not image.ndim:
                raise DataError(f"{name} has no image; {self._remedy}")
            yield image.tobytes()


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
                    # A record: its length, the length's checksum, the record, its checksum.
                    file.seek(offset)
                    header = file.read(12)
                    size = 16 + struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
                    if offset + size > end:
                        raise DataError(f"{shard} breaks off in record {number}, or is no TFRecord file; replace it")
                    yield str(number), offset, size
                    offset, number = offset + size, number + 1
        except OSError as error:
            raise DataError(f"cannot read {shard}: {error.strerror}; check the path") from error

    def _index(self, records: Sequence[_Record]) -> str:
        return "".join(f"{record.offset} {record.size}\n" for record in records)

    def _operator(self, shards: list[str], indices: list[str]) -> Any:
        features = {str(self._key): dali_tfrecord.FixedLenFeature([], dali_tfrecord.string, "")}
        read: Any = fn.readers.tfrecord(path=shards, index_path=indices, features=features, dont_use_mmap=True)
        return read[str(self._key)]
