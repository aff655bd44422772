"""`ImageFeed`: image files as batches, decoded and prepared by DALI ahead of the consumer."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastcal.errors import FastcalError
from fastcal.feed import dataset
from fastcal.feed.buffers import Buffer, DeviceBuffer, hand_out
from fastcal.feed.device import resolve
from fastcal.feed.feed import Batch, Feed, add_to_digest
from fastcal.feed.pipeline import ImagePipeline, find_unreadable
from fastcal.feed.prefetch import Prefetcher
from fastcal.feed.preprocess import Preprocess
from fastcal.model import Model, ModelInput

#: The batch size where neither the caller nor the model says one.
BATCH_SIZE = 32

# What one run of the DALI pipeline prepares at most, per thread: 8 images, or so many that their files have 2 MiB, but
# at least one.
_IMAGES_PER_THREAD = 8
_BYTES_PER_THREAD = 2 << 20

_log = logging.getLogger("fastcal")


class ImageFeed(Feed):
    """Batches of images: {input name: float32 array of shape (batch_size, *preprocess.shape)}, and the constants.

    A background thread decodes and prepares the next batch while the consumer works on the last one; the arrays are
    allocated once and reused.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file), one image, a pattern ("train/**/*.jpg"), or a sequence of paths.
        preprocess: The name of a preset ("imagenet", "yolo", "unit", "raw") or a `Preprocess`.
        model: An ONNX file whose image input gives size, layout, number of channels, batch size and input name. The
            preprocessing's own size is used where the model's is dynamic.
        batch_size: Images in a batch; by default the model's where it is fixed, else 32.
        input_name: The network's input; by default the model's, else whatever single input a network has.
        shuffle: Whether to shuffle the images, before `limit`.
        seed: Decides the shuffled order.
        balance: Whether to take the images by turns from each class, a folder in the data's folder, before `limit`.
        limit: Use this many images at most.
        last_batch: "wrap" completes the last batch with the first images, "drop" leaves it out.
        constants: Further inputs that are the same in every batch: arrays by input name.
        device: "auto" (a GPU where there is one and CuPy is installed, else the CPU), "cpu", "cuda" or "cuda:N". On a
            GPU, images are decoded and prepared there and the batches are CuPy arrays, filled on a stream of the
            feed's own and ready for any stream; reading that is enqueued on a stream other than CuPy's current one
            must have ended before the next batch is asked for.
        depth: How many buffers there are, at least 2.
        threads: How many threads read and decode; by default one per core that this process may use, on a GPU 8 at
            most.
        prefetch_queue_depth: On a GPU, how many batches DALI works on at once.
        hw_decoder_load: The share of JPEG images that a GPU's own JPEG decoder is given, where it has one.

    Attributes:
        paths: The images, in order.
        preprocess: The preprocessing.
        batch_size: Images in a batch.
        input_name: The name of the batches' one array.
        gpu: The number of the GPU that the batches lie on; None for host memory.

    Raises:
        FastcalError: There are no images at `data`, or an argument is not one of the above, or contradicts the model.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        preprocess: str | Preprocess = "imagenet",
        model: str | os.PathLike[str] | Model | None = None,
        batch_size: int | None = None,
        input_name: str | None = None,
        shuffle: bool = False,
        seed: int = 0,
        balance: bool = False,
        limit: int | None = None,
        last_batch: str = "wrap",
        constants: Mapping[str, Any] | None = None,
        device: str = "auto",
        depth: int = 2,
        threads: int | None = None,
        prefetch_queue_depth: int = 2,
        hw_decoder_load: float = 0.9,
    ) -> None:
        if isinstance(preprocess, str):
            preprocess = Preprocess.preset(preprocess)
        if model is not None:
            model = Model.of(model)
            image_input = _image_input(model, input_name)
            input_name = image_input.name
            try:
                preprocess = preprocess.fit(image_input.shape)
            except FastcalError as error:
                raise FastcalError(f"{model.path}, input {image_input}: {error}") from error
            batch_size = image_input.shape[0] if batch_size is None else batch_size
        if last_batch not in ("wrap", "drop"):
            raise FastcalError(f"there is no last_batch {last_batch!r}; choose wrap or drop")
        for name, value, least in (
            ("batch_size", batch_size, 1), ("limit", limit, 1), ("depth", depth, 2), ("threads", threads, 1),
            ("prefetch_queue_depth", prefetch_queue_depth, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise FastcalError(f"{name} is {value}; it must be at least {least}")
        self.anonymous = input_name is None and not constants
        self.input_name = input_name or "input"
        self.preprocess = preprocess
        self.batch_size = batch_size or BATCH_SIZE
        self.paths = dataset.order(dataset.list_images(data), shuffle=shuffle, seed=seed, balance=balance, limit=limit)
        self._seed = seed if shuffle else None
        self._length = self._count_batches(last_batch)
        self._depth = depth
        self.gpu = resolve(device)
        cores = len(os.sched_getaffinity(0))
        self._threads = threads or (cores if self.gpu is None else min(cores, 8))
        self._prefetch_queue_depth = prefetch_queue_depth
        self._hw_decoder_load = hw_decoder_load
        self._constants = {name: np.asarray(values) for name, values in (constants or {}).items()}
        if self.input_name in self._constants:
            raise FastcalError(f"input {self.input_name!r} takes the images; it cannot be a constant too")
        self._buffers: list[Buffer] = []
        self._stream: Any = None
        self._pipeline: ImagePipeline | None = None
        self._runs: Iterator[list[str]] = iter(())
        self._end_pass: Callable[[], None] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._end_pass is not None:
            self._end_pass()
        if not self._buffers:
            self._allocate()
        if self._pipeline is not None and self._pipeline.under_way:
            self._pipeline = None  # the pass before was left midway
        self._runs = self._split_into_runs()
        prefetcher = Prefetcher(self._buffers, self._fill, len(self))
        self._end_pass = prefetcher.close
        return hand_out(prefetcher)

    def describe(self) -> dict[str, Any]:
        """The images in order, by path below their common folder, size and time; and what is done to them."""
        digest = hashlib.sha256()
        root = os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in self.paths})
        for path in map(os.path.abspath, self.paths):
            try:
                status = os.stat(path)
            except OSError as error:
                raise FastcalError(f"cannot read {path}: {error.strerror}; correct or remove it") from error
            name = os.fsencode(os.path.relpath(path, root))
            digest.update(b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns))
        for key, values in sorted(self._constants.items()):
            add_to_digest(digest, key, values)
        return {
            "images": len(self.paths),
            "batches": len(self),
            "batch_size": self.batch_size,
            "seed": self._seed,
            "preprocess": str(self.preprocess),
            "samples": digest.hexdigest(),
        }

    def close(self) -> None:
        """End a pass that is under way, and release the buffers and the pipeline; a new iteration takes them again."""
        if self._end_pass is not None:
            self._end_pass()
            self._end_pass = None  # it refers to the buffers
        self._buffers = []
        self._pipeline = None

    def _count_batches(self, last_batch: str) -> int:
        batches, over = divmod(len(self.paths), self.batch_size)
        if not over:
            return batches
        if last_batch == "wrap":
            _log.info(
                "%d images in batches of %d: the last is completed with the first %d",
                len(self.paths), self.batch_size, self.batch_size - over,
            )  # fmt: skip
            return batches + 1
        _log.info("%d images in batches of %d: the last %d are dropped", len(self.paths), self.batch_size, over)
        if not batches:
            raise FastcalError(
                f"{len(self.paths)} images make no batch of {self.batch_size} when the last one is dropped; "
                "use a smaller batch size, or wrap"
            )
        return batches

    def _allocate(self) -> None:
        shapes = {self.input_name: ((self.batch_size, *self.preprocess.shape), np.float32)}
        if self.gpu is None:
            self._buffers = [Buffer(shapes, self._constants) for _ in range(self._depth)]
            return
        import cupy

        device = cupy.cuda.Device(self.gpu)
        with device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
            constants = {name: cupy.asarray(values) for name, values in self._constants.items()}
            cupy.cuda.get_current_stream().synchronize()
        self._buffers = [DeviceBuffer(shapes, constants, device, self._stream) for _ in range(self._depth)]

    def _fill(self, index: int, buffer: Buffer, ended: Callable[[], bool]) -> None:
        if self._pipeline is None:
            self._pipeline = self._start_pipeline()
        pipeline, array, filled = self._pipeline, buffer.arrays[self.input_name], 0
        with buffer.filling():
            while filled < self.batch_size and not ended():
                while len(pipeline.under_way) < pipeline.ahead and (paths := next(self._runs, None)):
                    pipeline.submit(paths)
                upto = filled + len(pipeline.under_way[0])
                try:
                    pipeline.collect(array[filled:upto], self._stream)
                except RuntimeError as error:
                    self._pipeline = None
                    raise self._explain(error, [path for paths in pipeline.under_way for path in paths]) from error
                filled = upto

    def _start_pipeline(self) -> ImagePipeline:
        # On the CPU one run at a time: the ring already works ahead, and runs under way would have to end before the
        # feed can stop. On a GPU the decoding of one batch and the resizing of the last overlap.
        ahead = 1 if self.gpu is None else min(self._prefetch_queue_depth, len(self))
        return ImagePipeline(
            self.preprocess,
            most=self._most_in_a_run,
            threads=self._threads,
            gpu=self.gpu,
            ahead=ahead,
            hw_decoder_load=self._hw_decoder_load,
        )

    def _explain(self, error: RuntimeError, paths: list[str]) -> FastcalError:
        return find_unreadable(paths, self.preprocess.channels) or FastcalError(
            f"DALI cannot prepare the images from {paths[0]} on: {_gist(error)}"
        )

    @property
    def _most_in_a_run(self) -> int:
        return self.batch_size if self.gpu is not None else min(self.batch_size, _IMAGES_PER_THREAD * self._threads)

    def _split_into_runs(self) -> Iterator[list[str]]:
        """The images of a pass, in the parts that the pipeline prepares at once, none of them in two batches.

        On a GPU a batch is one part. On the CPU a part is large enough to keep the threads busy, and small enough that
        stopping does not wait long for it to end.
        """
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            run: list[str] = []
            encoded = 0
            for number in range(first, first + self.batch_size):
                path = self.paths[number % len(self.paths)]
                if self.gpu is None:
                    size = _size(path)
                    large = len(run) >= self._threads and encoded + size > _BYTES_PER_THREAD * self._threads
                    if large or len(run) == self._most_in_a_run:
                        yield run
                        run, encoded = [], 0
                    encoded += size
                run.append(path)
            yield run


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # the decoder reports what is gone
        return 0


def _image_input(model: Model, name: str | None) -> ModelInput:
    """The input of that name, or the only one."""
    fitting = [value for value in model.inputs if name in (None, value.name)]
    if len(fitting) != 1:
        names = ", ".join(repr(value.name) for value in model.inputs)
        raise FastcalError(f"{model.path} takes the inputs {names}; say which one takes the images (input name)")
    return fitting[0]


def _gist(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened."""
    _, _, text = str(error).partition("encountered:")
    return next((line.strip() for line in (text or str(error)).splitlines() if line.strip()), "no reason given")
