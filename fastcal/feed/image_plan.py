"""The plan of a feed of images."""

import hashlib
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fastcal.device import add_array
from fastcal.errors import DataError
from fastcal.feed.buffers import Shape
from fastcal.feed.chunks import ChunkSize, count_batches
from fastcal.feed.jpeg import has_rgb_components
from fastcal.feed.pipeline import ImageInput
from fastcal.feed.plan import Plan
from fastcal.feed.preprocess import Preprocess
from fastcal.feed.sources import Arrays, ImageSource, Source, UnreadableError

# The largest size of a chunk, per thread: 8 images, or as many as have 2 MiB together, but at least one.
_IMAGES_PER_THREAD = 8
_BYTES_PER_THREAD = 2 << 20

#: The share of JPEG images for a GPU's own JPEG decoder that was fastest on an H100.
_HW_SHARE = 0.9

#: The most threads for a GPU; decoding there keeps no more of them busy.
_MOST_GPU_THREADS = 8

#: The bytes of images per core that the CPU decodes in the 1.6 s in which nvJPEG starts on a GPU, and in the time of
#: its decoding: 1000 JPEG files of 400x500. The number of images that are looked at to estimate the bytes of all.
_BYTES_PER_CORE = 60_000_000
_WEIGHED = 64

#: The number of images of a kind that are tried before the kind counts as one that cannot be decoded.
TRIED = 3

# The number of bytes at the beginning of a JPEG file that have its markers; thumbnails and colour profiles are in them.
_HEADER = 1 << 18

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class Decoding:
    """The place where images are decoded and prepared, and the resources for it.

    Attributes:
        stays_on_cpu: Whether a part of the feed on a machine with a GPU must not use it.
        on_cpu: Whether a GPU's images are decoded on the CPU all the same; None if that must be found out.
        is_part: Whether the feed is a part of another, which has tried the first images of each kind.
    """

    gpu: int | None
    stays_on_cpu: bool
    threads: int | None
    cores: int
    queue_depth: int
    hw_decoder_load: float | None
    on_cpu: bool | None = None
    is_part: bool = False

    @property
    def hw_share(self) -> float:
        """The share of JPEG images for a GPU's own JPEG decoder."""
        return _HW_SHARE if self.hw_decoder_load is None else self.hw_decoder_load

    @property
    def ahead(self) -> int:
        """The largest number of chunks that DALI works on at once."""
        # On the CPU the ring of buffers works ahead already, and all chunks would have to end before the feed can stop.
        return 1 if self.gpu is None else self.queue_depth


@dataclass(frozen=True, eq=False)
class ImagePlan(Plan):
    """Batches of images, perhaps with arrays and constants for other inputs: see `fastcal.ImageFeed`.

    Attributes:
        sources: The samples, by input: those of one number belong together.
        seed: The seed of the samples' order; None if it is not shuffled.
        max_unreadable: The percentage of samples that may be unreadable and left out; None if the first is an error.
    """

    sources: Mapping[str, Source]
    preprocesses: Mapping[str, Preprocess]
    constants: Mapping[str, Any]
    repeated: frozenset[str]
    batch_size: int
    last_batch: str
    seed: int | None
    max_unreadable: float | None
    depth: int
    decoding: Decoding

    @property
    def gpu(self) -> int | None:  # type: ignore[override]
        """The GPU that the batches lie on; None for host memory."""
        return self.decoding.gpu

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples."""
        return len(self.sample_names)

    @property
    def sample_names(self) -> list[str]:  # type: ignore[override]
        """The names of the samples: those of the first input."""
        return next(iter(self.sources.values())).names

    @property
    def preprocess(self) -> Preprocess | Mapping[str, Preprocess]:  # type: ignore[override]
        """The preprocessing; by input if several take images."""
        several = len(self.preprocesses) > 1
        return self.preprocesses if several else next(iter(self.preprocesses.values()))

    @property
    def images(self) -> dict[str, ImageInput]:
        """The inputs that take images."""
        return {name: ImageInput(self.sources[name], value) for name, value in self.preprocesses.items()}  # type: ignore[arg-type]

    @property
    def arrays(self) -> dict[str, Arrays]:
        """The inputs that take arrays."""
        return {name: source for name, source in self.sources.items() if isinstance(source, Arrays)}

    @property
    def filled(self) -> dict[str, Shape]:  # type: ignore[override]
        """The shapes and types of the arrays that samples fill, by input."""
        images = {name: (value.shape, np.dtype(value.dtype)) for name, value in self.preprocesses.items()}
        arrays = {name: (source.shape, source.dtype) for name, source in self.arrays.items()}
        return {name: ((self.batch_size, *shape), dtype) for name, (shape, dtype) in (images | arrays).items()}

    @property
    def chunk_size(self) -> ChunkSize | None:
        """The largest size of a chunk: it keeps the threads busy, and ends soon when the feed stops; None on a GPU."""
        if self.gpu is not None:
            return None
        sources, threads = [value.source for value in self.images.values()], self.thread_count
        return ChunkSize(
            most=min(self.batch_size, _IMAGES_PER_THREAD * threads),
            few=threads,
            most_bytes=_BYTES_PER_THREAD * threads,
            size_of=lambda number: sum(source.size(number) for source in sources),
        )

    @cached_property
    def decodes_on_cpu(self) -> bool:
        """True if the CPU decodes what a GPU prepares.

        It does if the files are small, since a GPU's decoder takes long to start, or if JPEG files of RGB components
        are among the first images, which a GPU's decoder takes for YCbCr.
        """
        if self.decoding.on_cpu is not None:
            return self.decoding.on_cpu
        sources = [value.source for value in self.images.values()]
        is_small = (
            self.decoding.hw_decoder_load is None and sum(map(_bytes, sources)) <= _BYTES_PER_CORE * self.decoding.cores
        )
        return is_small or any(map(_has_rgb, sources))

    @property
    def thread_count(self) -> int:
        """The number of threads that read and decode."""
        decoding = self.decoding
        most = decoding.cores if decoding.gpu is None or self.decodes_on_cpu else _MOST_GPU_THREADS
        return decoding.threads or min(decoding.cores, most)

    @property
    def is_uneven(self) -> bool:
        """True if the last batch may have fewer samples than the others, before its fate."""
        return self.samples % self.batch_size > 0 or self.max_unreadable is not None

    @property
    def may_end_smaller(self) -> bool:
        """True if the last batch that is handed out may be smaller than the others."""
        return self.last_batch == "keep" and self.is_uneven

    def count_batches(self, unreadable: int = 0) -> int:
        """Return the number of batches in a pass that leaves out so many samples."""
        return count_batches(self.samples - unreadable, self.batch_size, self.last_batch)

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "ImagePlan":
        """Return the plan of some of the batches, with a list of their samples alone."""
        if self.max_unreadable is not None:
            raise DataError(
                "batches that skip unreadable samples depend on those before, and cannot be divided among workers; "
                "leave skip_unreadable or workers out"
            )
        count, stop = self.samples, batches.stop * self.batch_size
        stop = min(stop, count) if self.last_batch == "keep" else stop
        numbers = [number % count for number in range(batches.start * self.batch_size, stop)]
        gpu = None if self.decoding.stays_on_cpu else gpu
        # The kinds of images are looked for among all samples, of which a part has few.
        on_cpu = self.decoding.on_cpu if gpu is None else self.decodes_on_cpu
        decoding = replace(self.decoding, gpu=gpu, cores=threads, on_cpu=on_cpu, is_part=True)
        sources = {name: source.take(numbers) for name, source in self.sources.items()}
        return replace(self, sources=sources, decoding=decoding)

    def describe(self) -> dict[str, Any]:
        """Return the samples in order, by path below their common folder and contents or size, and the settings."""
        is_lenient = self.max_unreadable is not None
        digest, counted = hashlib.sha256(), set[str]()
        for name, source in self.sources.items():
            if len(self.sources) > 1:
                digest.update(f"{name}\0".encode())
            counted.add(source.add_to_digest(digest, lenient=is_lenient))
        for key, values in sorted(self.constants.items()):
            add_array(digest, key, values)
        preprocess = {name: str(value) for name, value in self.preprocesses.items()}
        return {
            "images": self.samples,
            "batch_size": self.batch_size,
            "last_batch": self.last_batch if self.is_uneven else "wrap",
            "seed": self.seed,
            "preprocess": preprocess if len(self.sources) > 1 else str(self.preprocess),
            "skip_unreadable": is_lenient,
            "samples": digest.hexdigest(),
            "samples_by": " and ".join(sorted(counted)),
        }


def _bytes(source: ImageSource) -> float:
    """Return the bytes of all images of a source, estimated from some of them."""
    count = len(source.names)
    sizes = [source.size(number) for number in range(0, count, max(count // _WEIGHED, 1))]
    return sum(sizes) / len(sizes) * count


def _has_rgb(source: ImageSource) -> bool:
    """Return whether JPEG files of RGB components are among the first images of a kind; log the first of them."""
    for number in itertools.chain.from_iterable(source.first_of_each_kind(TRIED).values()):
        try:
            if has_rgb_components(source.content(number, _HEADER)):
                _log.warning(
                    "%s has RGB components, which a GPU's JPEG decoder takes for YCbCr: images are decoded on the CPU",
                    source.names[number],
                )
                return True
        except UnreadableError:  # reported when it is the sample's turn
            continue
    return False
