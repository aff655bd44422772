"""`ImageFeed`: images as batches, decoded and prepared by DALI ahead of the consumer."""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from fastcal.device import resolve
from fastcal.errors import FastcalError
from fastcal.feed.buffers import Batches, Buffer, DeviceBuffer, Shape
from fastcal.feed.dataset import Data
from fastcal.feed.digest import add_array
from fastcal.feed.feed import BATCH_SIZE, Batch, Feed, Turns, as_array, check_settings
from fastcal.feed.inputs import check_inputs, image_input, image_inputs, name_inputs, open_sources
from fastcal.feed.jpeg import has_rgb_components
from fastcal.feed.pipeline import ImageInput, ImagePipeline, find_unreadable
from fastcal.feed.prefetch import Prefetcher
from fastcal.feed.preprocess import Preprocess
from fastcal.feed.runs import Pass, Run, RunSize, count_batches, say_how_it_ends
from fastcal.feed.sources import Arrays, Shards, UnreadableError
from fastcal.memory import check_room
from fastcal.model import Model

# What one run of the DALI pipeline prepares at most, per thread: 8 images, or so many that their files have 2 MiB, but
# at least one.
_IMAGES_PER_THREAD = 8
_BYTES_PER_THREAD = 2 << 20

# How many images of a kind are tried before it is said that none can be decoded.
_TRIED = 3

# How many bytes of a JPEG file have its markers; thumbnails and colour profiles are among them.
_HEADER = 1 << 18

# How many samples are tried on the CPU first once a GPU's pipeline has failed; twice as many the next time. What a new
# pipeline on a GPU takes, 2 s, is what trying some thousand images takes on the CPU.
_FIRST_SUSPECTS = 128

# How many unreadable samples are logged; all are listed in `skipped`.
_SHOWN = 3

_log = logging.getLogger("fastcal")


class ImageFeed(Feed):
    """Batches of images: {input name: float32 array of shape (batch_size, *preprocess.shape)}, and the constants.

    A background thread decodes and prepares the next batch while the consumer works on the last one; the arrays are
    allocated once and reused.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file), one image, a pattern ("train/**/*.jpg", "train-{0000..0146}.tar"), or a sequence of paths. What these
            name are images, tar shards as WebDataset writes them, or TFRecord files. For several inputs, a dict of
            these by input name, which have the same samples in the same order: {"left": "left/", "right": "right/"}. An
            input may take arrays too, `.npy` files, one a sample: {"image": "scenes/", "pose": "scenes/*.npy"}.
        preprocess: The name of a preset, see `Preprocess.preset`, or a `Preprocess`; for several inputs, one for all or
            a dict by input name.
        model: An ONNX file whose image inputs give size, layout, number of channels, batch size and input name. The
            preprocessing's own size is used where the model's is dynamic.
        batch_size: Samples in a batch; by default the model's where it is fixed, else 32.
        input_name: The network's input, where there is one; by default the model's, else whatever single input a
            network has.
        key: What the images are called in shards: for tar shards their extension (by default any that an image has),
            for TFRecord their feature (by default "image/encoded"); for several inputs, one for all or a dict by input
            name: {"left": "left.jpg", "right": "right.jpg"}.
        shuffle: Whether to shuffle the samples, before `limit`. Shards are not shuffled.
        seed: Decides the shuffled order.
        balance: Whether to take the images by turns from each class, a folder in the data's folder (for several inputs,
            the first's), before `limit`.
        limit: Use this many samples at most.
        last_batch: "wrap" completes the last batch with the first samples, "drop" leaves it out.
        skip_unreadable: Whether to go on without samples that cannot be read or decoded. The next ones take their
            places. By default the first ends the pass with an error that names it.
        max_unreadable: With `skip_unreadable`, the percentage of samples that may be unreadable; more end the pass.
        constants: Further inputs that are the same in every batch: arrays by input name.
        device: "auto" (a GPU where there is one and CuPy is installed, else the CPU), "cpu", "cuda" or "cuda:N". On a
            GPU, images are decoded and prepared there and the batches are CuPy arrays, filled on a stream of the
            feed's own and ready for any stream; reading that is enqueued on a stream other than CuPy's current one
            must have ended before the next batch is asked for. Pixels are those of the CPU but for rounding: JPEG files
            are decoded to within 3 levels, 0.03 on average at most, on an H100. A GPU's decoder takes JPEG files of RGB
            components, which are rare, for YCbCr: where they are among the first of a kind, all images are decoded on
            the CPU.
        depth: How many buffers there are, at least 2.
        threads: How many threads read and decode; by default one per core that this process may use, on a GPU 8 at
            most.
        prefetch_queue_depth: On a GPU, how many batches DALI works on at once.
        hw_decoder_load: The share of JPEG images that a GPU's own JPEG decoder is given, where it has one.

    Attributes:
        paths: The samples, in order: the paths of images, "shard:name" in shards; for several inputs, those of the
            first.
        preprocess: The preprocessing; for several inputs that take images, a dict by input name.
        batch_size: Samples in a batch.
        gpu: The number of the GPU that the batches lie on; None for host memory.

    Raises:
        FastcalError: There are no images at `data`, or an argument is not one of the above, or contradicts the model or
            another.
    """

    def __init__(
        self,
        data: Data | Mapping[str, Data],
        *,
        preprocess: str | Preprocess | Mapping[str, str | Preprocess] = "imagenet",
        model: str | os.PathLike[str] | Model | None = None,
        batch_size: int | None = None,
        input_name: str | None = None,
        key: str | Mapping[str, str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        balance: bool = False,
        limit: int | None = None,
        last_batch: str = "wrap",
        skip_unreadable: bool = False,
        max_unreadable: float = 5.0,
        constants: Mapping[str, Any] | None = None,
        device: str = "auto",
        depth: int = 2,
        threads: int | None = None,
        prefetch_queue_depth: int = 4,
        hw_decoder_load: float = 0.9,
    ) -> None:
        check_settings(
            last_batch, ("wrap", "drop"), batch_size=batch_size, limit=limit, depth=depth, threads=threads,
            prefetch_queue_depth=prefetch_queue_depth,
        )  # fmt: skip
        if not 0 <= hw_decoder_load <= 1:
            raise FastcalError(f"hw_decoder_load is {hw_decoder_load}; it is a share from 0 to 1")
        if not 0 <= max_unreadable <= 100:
            raise FastcalError(f"max_unreadable is {max_unreadable}; it is a percentage from 0 to 100")
        network = None if model is None else Model.of(model)
        named = name_inputs(data, input_name, network)
        self._constants = {name: as_array(values) for name, values in (constants or {}).items()}
        self._sources = open_sources(named, key, shuffle=shuffle, seed=seed, balance=balance, limit=limit)
        self._images = image_inputs(self._sources, preprocess, network)
        if network is not None and batch_size is None:
            batch_size = image_input(network, next(iter(self._images))).shape[0]
        self.batch_size = batch_size or BATCH_SIZE
        check_inputs(network, self._sources, self._constants, self.batch_size)
        settings = {name: value.preprocess for name, value in self._images.items()}
        self.preprocess = settings if len(settings) > 1 else next(iter(settings.values()))
        self.paths = next(iter(self._sources.values())).names
        self._seed = seed if shuffle else None
        self._last_batch = last_batch
        self._skip = skip_unreadable
        self._max_unreadable = max_unreadable
        self._unreadable: dict[int, UnreadableError] = {}
        self._next_suspects = _FIRST_SUSPECTS
        self._suspects = 0  # how many of the next samples are tried first
        say_how_it_ends(len(self.paths), self.batch_size, last_batch, "images")
        self._depth = depth
        self.gpu = resolve(device)
        self._on_cpu = device == "cpu"
        self._threads_asked = threads
        self._prefetch_queue_depth = prefetch_queue_depth
        self._share_out(len(os.sched_getaffinity(0)))
        self._hw_decoder_load = hw_decoder_load
        for source in self._sources.values():
            if isinstance(source, Shards):
                source.keep = (self._ahead + 1) * self.batch_size
        self._is_probed = False
        self._forget()

    def _share_out(self, cores: int) -> None:
        """Decide on how many threads and batches DALI works at once."""
        self._threads = self._threads_asked or (cores if self.gpu is None else min(cores, 8))
        # On the CPU one run at a time: the ring already works ahead, and runs under way would have to end before the
        # feed can stop. On a GPU the decoding of one batch and the resizing of the last overlap.
        self._ahead = 1 if self.gpu is None else min(self._prefetch_queue_depth, len(self))

    def _forget(self) -> None:
        """Hold nothing that a pass needs."""
        self._turns = Turns()
        self._buffers: list[Buffer] = []
        self._stream: Any = None
        self._pipeline: ImagePipeline | None = None
        self._pass: Pass | None = None
        self._end_pass: Callable[[], None] | None = None

    def __len__(self) -> int:
        return count_batches(len(self.paths) - len(self._unreadable), self.batch_size, self._last_batch == "wrap")

    def __iter__(self) -> Iterator[Batch]:
        with self._turns:
            return self._start()

    def _start(self) -> Batches:
        if self._pipeline is not None and self._pipeline.process != os.getpid():
            raise FastcalError(
                "a feed that was used before its process forked is of no use in the child: DALI's threads stayed with "
                "the parent; make the feed in the child"
            )
        if self._end_pass is not None:
            self._end_pass()
            if self.gpu is not None:
                import cupy

                cupy.cuda.Device(self.gpu).synchronize()  # who left that pass midway may still read its batch
        if not self._buffers:
            self._allocate()
        pipeline = self._pipeline
        if pipeline is not None and (pipeline.under_way or pipeline.ahead < min(self._ahead, len(self))):
            self._pipeline = None  # the pass before was left midway, or begun again near its end
        self._pass = Pass(
            len(self.paths), self.batch_size, self._last_batch == "wrap", self._unreadable, self._run_size
        )
        prefetcher = Prefetcher(self._buffers, self._fill, len(self), self._prepare)
        self._end_pass = prefetcher.close
        return Batches(prefetcher)

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples, skipped ones left out."""
        return len(self.paths) - len(self._unreadable)

    @property
    def sample_names(self) -> list[str]:  # type: ignore[override]
        """The names of the samples in order, skipped ones left out; see `paths`."""
        return [path for number, path in enumerate(self.paths) if number not in self._unreadable]

    @property
    def skipped(self) -> list[str]:
        """The samples that the passes so far have found unreadable and left out, in order; see `paths`."""
        return [self.paths[number] for number in sorted(self._unreadable)]

    def samples_of(self, batch: Batch) -> int:
        """See `Feed.samples_of`: every `batch` is whole."""
        return self.batch_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Feed.shapes`; no pass is begun."""
        filled = {name: shape for name, (shape, _) in self._filled_shapes.items()}
        return filled | {name: values.shape for name, values in self._constants.items()}

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "ImageFeed":
        """See `Feed.part`: `batches` with a list of their samples alone, to be prepared on `gpu` with `threads`."""
        if self._skip:
            raise FastcalError(
                "batches that skip what is unreadable depend on those before, and cannot be divided among workers; "
                "leave skip_unreadable or workers out"
            )
        row = range(batches.start * self.batch_size, batches.stop * self.batch_size)
        numbers = [number % len(self.paths) for number in row]
        if gpu is not None and not self._on_cpu:
            _ = self._has_rgb  # found out among all, and copied
        part = copy(self)
        vars(part).pop("_kinds", None)  # which are of all samples
        images = {name: replace(value, source=value.source.part(numbers)) for name, value in self._images.items()}
        part._sources = {
            name: images[name].source if name in images else source.part(numbers)
            for name, source in self._sources.items()
        }
        part._images = images
        part.paths = next(iter(part._sources.values())).names
        part._unreadable = {}
        part.gpu = None if self._on_cpu else gpu
        part._share_out(threads)
        part._is_probed = True  # kinds of images are looked for among all
        part._forget()
        return part

    def describe(self) -> dict[str, Any]:
        """The samples in order, by path below their common folder, size and time; and what is done to them."""
        digest = hashlib.sha256()
        for name, source in self._sources.items():
            if len(self._sources) > 1:
                digest.update(f"{name}\0".encode())
            source.add_to_digest(digest, lenient=self._skip)
        for key, values in sorted(self._constants.items()):
            add_array(digest, key, values)
        preprocess = {name: str(value.preprocess) for name, value in self._images.items()}
        return {
            "images": len(self.paths),
            "batch_size": self.batch_size,
            "last_batch": self._last_batch,
            "seed": self._seed,
            "preprocess": preprocess if len(self._sources) > 1 else str(self.preprocess),
            "skip_unreadable": self._skip,
            "samples": digest.hexdigest(),
        }

    def close(self) -> None:
        """End a pass that is under way, and release the buffers and the pipeline; a new iteration takes them again."""
        with self._turns:
            if self._end_pass is not None:
                self._end_pass()
                self._end_pass = None  # it refers to the buffers
            self._buffers = []
            self._pipeline = None
            for source in self._sources.values():
                source.close()

    def _allocate(self) -> None:
        shapes = self._filled_shapes
        if self.gpu is None:
            size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
            what = f"{self._depth} batches of {self.batch_size} samples"
            check_room(self._depth * size, what, "use a smaller batch size, or make the images smaller")
            self._buffers = [Buffer(shapes, self._constants) for _ in range(self._depth)]
            return
        import cupy

        device = cupy.cuda.Device(self.gpu)
        with device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
            constants = {name: cupy.asarray(values) for name, values in self._constants.items()}
            cupy.cuda.get_current_stream().synchronize()
        self._buffers = [DeviceBuffer(shapes, constants, device, self._stream) for _ in range(self._depth)]

    def _prepare(self, index: int) -> None:
        self._work_ahead(len(self) - index)

    def _fill(self, index: int, buffer: Buffer, ended: Callable[[], bool]) -> bool:
        filled = 0
        with buffer.filling():
            while filled < self.batch_size and not ended():
                pipeline = self._work_ahead(len(self) - index)
                if pipeline is None:
                    return False
                run = pipeline.under_way[0]
                upto = filled + len(run.numbers)
                try:
                    pipeline.collect({name: buffer.arrays[name][filled:upto] for name in self._images}, self._stream)
                except RuntimeError as error:
                    self._recover(error, pipeline.under_way)
                    continue
                for name, values in run.arrays.items():
                    buffer.put(name, slice(filled, upto), values)
                filled = upto
        return True

    def _work_ahead(self, batches: int) -> ImagePipeline | None:
        """The pipeline with as many runs under way as it may have; None at the end of the pass."""
        assert self._pass is not None
        while True:
            if self._pipeline is None:
                if not batches:
                    return None
                self._pipeline = self._start_pipeline(min(self._ahead, batches))
            pipeline = self._pipeline
            while len(pipeline.under_way) < pipeline.ahead and (run := self._pass.next_run()):
                self._submit(pipeline, run)
            if not pipeline.under_way:
                return None
            if pipeline.has_begun:
                return pipeline
            # Fewer runs are left than it begins with.
            batches = len(pipeline.under_way)
            self._pass.go_back(pipeline.under_way[0])
            self._pipeline = None

    def _submit(self, pipeline: ImagePipeline, run: Run) -> None:
        assert self._pass is not None
        try:
            for name, source in self._arrays.items():
                run.arrays[name] = source.fetch(run.numbers)
            if self._suspects > 0:
                self._suspects -= len(run.numbers)
                if self._leave_out(find_unreadable(self._images.values(), run.numbers, threads=self._threads)):
                    self._pass.go_back(run)
                    return
            pipeline.submit(run, self._fetch(run))
        except UnreadableError as error:
            self._leave_out([error])
            self._pass.go_back(run)

    def _fetch(self, run: Run) -> dict[str, Any]:
        return {name: value.source.fetch(run.numbers) for name, value in self._images.items()}

    def _start_pipeline(self, ahead: int) -> ImagePipeline:
        if not self._is_probed:
            self._is_probed = True
            self._try_kinds()
        return ImagePipeline(
            self._images,
            most=self._most_in_a_run,
            threads=self._threads,
            gpu=self.gpu,
            ahead=ahead,
            hw_decoder_load=self._hw_decoder_load,
            decode_on_cpu=self.gpu is not None and self._has_rgb,
        )

    @cached_property
    def _kinds(self) -> list[tuple[ImageInput, str, list[int]]]:
        """The first samples of each kind of images: the input, what their names end in, and their numbers."""
        return [
            (value, extension, numbers)
            for value in self._images.values()
            for extension, numbers in value.source.first_of_each_kind(_TRIED).items()
        ]

    @cached_property
    def _has_rgb(self) -> bool:
        """Whether among the first of a kind are JPEG files of RGB components, which a GPU takes for YCbCr."""
        for value, _, numbers in self._kinds:
            for number in numbers:
                try:
                    is_rgb = has_rgb_components(value.source.content(number, _HEADER))
                except UnreadableError:  # said when it is its turn
                    continue
                if is_rgb:
                    _log.warning(
                        "%s has RGB components, which a GPU's JPEG decoder takes for YCbCr: images are decoded on the "
                        "CPU",
                        value.source.names[number],
                    )  # fmt: skip
                    return True
        return False

    def _try_kinds(self) -> None:
        """Try the first images of each kind that comes after the first batch.

        In a pipeline of its own: from the first run of a pipeline nvImageCodec reckons, once and for all, how many
        images of a batch a GPU's JPEG decoder is given (`NVIMGCODEC_LOAD_HINT_POLICY_FIXED`).

        Raises:
            FastcalError: Images of some kind cannot be decoded on this device. Where samples are skipped, that is only
                logged.
        """
        for value, extension, numbers in self._kinds:
            if numbers[0] < self.batch_size:
                continue
            found = list(find_unreadable([value], numbers, self.gpu))
            if len(found) < len(numbers):
                continue
            tried = ", ".join(value.source.names[number] for number in numbers)
            text = f"DALI decodes no {extension} image here: tried {tried}; convert them or leave them out"
            if not self._skip:
                raise FastcalError(text if len(found) > 1 else str(found[0]))
            if len(found) > 1:
                _log.warning("%s", text)

    def _recover(self, error: RuntimeError, under_way: Collection[Run]) -> None:
        """Leave out the samples that the pipeline failed on, and begin again with those that were under way.

        Raises:
            FastcalError: Samples are not left out, too many would be, or none of them is to blame.
        """
        assert self._pass is not None
        self._pipeline = None
        first, *later = under_way
        others = [number for run in later for number in run.numbers]
        for numbers, gpu in ((first.numbers, None), (others, None), (first.numbers + others, self.gpu)):
            if self._leave_out(find_unreadable(self._images.values(), numbers, gpu)):
                self._pass.go_back(first)
                if self.gpu is not None:
                    self._suspects, self._next_suspects = self._next_suspects, 2 * self._next_suspects
                return
        raise FastcalError(
            f"DALI cannot prepare the images from {self.paths[first.numbers[0]]} on: {_gist(error)}"
        ) from error

    def _leave_out(self, errors: Iterable[UnreadableError]) -> bool:
        """Leave out unreadable samples from now on; whether there were any.

        Raises:
            FastcalError: Samples are not left out, or too many would be.
        """
        before = len(self._unreadable)
        for error in errors:
            if not self._skip:
                raise error
            if error.number not in self._unreadable:
                self._unreadable[error.number] = error
                if len(self._unreadable) <= _SHOWN:
                    _log.warning("skipped: %s", error)
            bad, every = len(self._unreadable), len(self.paths)
            if bad == every or bad > self._max_unreadable / 100 * every:
                which = "all" if bad == every else f"more than max_unreadable allows ({self._max_unreadable:g} %)"
                raise FastcalError(f"{bad} of {every} samples cannot be read, {which}; the last was: {error}")
        return len(self._unreadable) > before

    @property
    def _filled_shapes(self) -> dict[str, Shape]:
        """The shapes and types of the arrays that are filled with samples."""
        images = {name: (value.preprocess.shape, np.float32) for name, value in self._images.items()}
        arrays = {name: (source.shape, source.dtype) for name, source in self._arrays.items()}
        return {name: ((self.batch_size, *shape), dtype) for name, (shape, dtype) in (images | arrays).items()}

    @property
    def _arrays(self) -> dict[str, Arrays]:
        return {name: source for name, source in self._sources.items() if isinstance(source, Arrays)}

    @property
    def _most_in_a_run(self) -> int:
        return self.batch_size if self.gpu is not None else min(self.batch_size, _IMAGES_PER_THREAD * self._threads)

    @property
    def _run_size(self) -> RunSize | None:
        """How large a run may be.

        On a GPU a batch is one run. On the CPU a run is large enough to keep the threads busy, and small enough that
        stopping does not wait long for it to end.
        """
        if self.gpu is not None:
            return None
        sources = [value.source for value in self._images.values()]
        return RunSize(
            most=self._most_in_a_run,
            few=self._threads,
            most_bytes=_BYTES_PER_THREAD * self._threads,
            size_of=lambda number: sum(source.size(number) for source in sources),
        )


def _gist(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened."""
    _, _, text = str(error).partition("encountered:")
    return next((line.strip() for line in (text or str(error)).splitlines() if line.strip()), "no reason given")
