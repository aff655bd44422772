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

#: The most threads for a GPU; decoding there keeps no more of them busy.
_MOST_GPU_THREADS = 8

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
        is_tried: Whether the first images of each kind have been tried, on another machine.
    """

    gpu: int | None
    stays_on_cpu: bool
    threads: int | None
    cores: int
    queue_depth: int
    hw_decoder_load: float
    on_cpu: bool | None = None
    is_tried: bool = False

    @property
    def thread_count(self) -> int:
        """The number of threads that read and decode."""
        return self.threads or (self.cores if self.gpu is None else min(self.cores, _MOST_GPU_THREADS))

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
        images = {name: (value.shape, np.float32) for name, value in self.preprocesses.items()}
        arrays = {name: (source.shape, source.dtype) for name, source in self.arrays.items()}
        return {name: ((self.batch_size, *shape), dtype) for name, (shape, dtype) in (images | arrays).items()}

    @property
    def chunk_size(self) -> ChunkSize | None:
        """The largest size of a chunk: it keeps the threads busy, and ends soon when the feed stops; None on a GPU."""
        if self.gpu is not None:
            return None
        sources, threads = [value.source for value in self.images.values()], self.decoding.thread_count
        return ChunkSize(
            most=min(self.batch_size, _IMAGES_PER_THREAD * threads),
            few=threads,
            most_bytes=_BYTES_PER_THREAD * threads,
            size_of=lambda number: sum(source.size(number) for source in sources),
        )

    @cached_property
    def has_rgb(self) -> bool:
        """True if JPEG files of RGB components are among the first images; a GPU's decoder takes them for YCbCr."""
        if self.decoding.on_cpu is not None:
            return self.decoding.on_cpu
        return any(_has_rgb(value.source) for value in self.images.values())

    def count_batches(self, unreadable: int = 0) -> int:
        """Return the number of batches in a pass that leaves out so many samples."""
        return count_batches(self.samples - unreadable, self.batch_size, self.last_batch == "wrap")

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "ImagePlan":
        """Return the plan of some of the batches, with a list of their samples alone."""
        if self.max_unreadable is not None:
            raise DataError(
                "batches that skip unreadable samples depend on those before, and cannot be divided among workers; "
                "leave skip_unreadable or workers out"
            )
        numbers = [n % self.samples for n in range(batches.start * self.batch_size, batches.stop * self.batch_size)]
        gpu = None if self.decoding.stays_on_cpu else gpu
        # The kinds of images are looked for among all samples, of which a part has few.
        on_cpu = self.decoding.on_cpu if gpu is None else self.has_rgb
        decoding = replace(self.decoding, gpu=gpu, cores=threads, on_cpu=on_cpu, is_tried=True)
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
            "last_batch": self.last_batch,
            "seed": self.seed,
            "preprocess": preprocess if len(self.sources) > 1 else str(self.preprocess),
            "skip_unreadable": is_lenient,
            "samples": digest.hexdigest(),
            "samples_by": " and ".join(sorted(counted)),
        }


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
