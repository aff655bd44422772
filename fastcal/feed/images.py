"""`ImageFeed`: image files as batches, decoded and prepared by DALI ahead of the consumer."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastcal.errors import FastcalError
from fastcal.feed import dataset
from fastcal.feed.feed import Batch, Feed
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
    """Batches of images: {input name: float32 array of shape (batch_size, *preprocess.shape)}.

    A background thread decodes and prepares the next batch while the consumer works on the last one; the arrays are
    allocated once and reused.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file), one image, or a sequence of paths.
        preprocess: The name of a preset ("imagenet", "yolo", "unit", "raw") or a `Preprocess`.
        model: An ONNX file whose image input gives size, layout, number of channels, batch size and input name. The
            preprocessing's own size is used where the model's is dynamic.
        batch_size: Images in a batch; by default the model's where it is fixed, else 32.
        input_name: The network's input; by default the model's, else whatever single input a network has.
        shuffle: Whether to shuffle the images, before `limit`.
        seed: Decides the shuffled order.
        limit: Use this many images at most.
        last_batch: "wrap" completes the last batch with the first images, "drop" leaves it out.
        depth: How many buffers there are, at least 2.
        threads: How many threads decode; by default one per core that this process may use.

    Attributes:
        paths: The images, in order.
        preprocess: The preprocessing.
        batch_size: Images in a batch.
        input_name: The name of the batches' one array.

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
        limit: int | None = None,
        last_batch: str = "wrap",
        depth: int = 2,
        threads: int | None = None,
    ) -> None:
        if isinstance(preprocess, str):
            preprocess = Preprocess.preset(preprocess)
        if model is not None:
            model = model if isinstance(model, Model) else Model(model)
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
            ("batch_size", batch_size, 1), ("limit", limit, 1), ("depth", depth, 2), ("threads", threads, 1)
        ):  # fmt: skip
            if value is not None and value < least:
                raise FastcalError(f"{name} is {value}; it must be at least {least}")
        self.anonymous = input_name is None
        self.input_name = input_name or "input"
        self.preprocess = preprocess
        self.batch_size = batch_size or BATCH_SIZE
        self.paths = dataset.order(dataset.list_images(data), shuffle=shuffle, seed=seed, limit=limit)
        self._length = self._count_batches(last_batch)
        self._depth = depth
        self._threads = threads or len(os.sched_getaffinity(0))
        self._buffers: list[dict[str, Any]] = []
        self._pipeline: ImagePipeline | None = None
        self._end_pass: Callable[[], None] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._end_pass is not None:
            self._end_pass()
        if not self._buffers:
            shape = (self.batch_size, *self.preprocess.shape)
            self._buffers = [{self.input_name: np.empty(shape, np.float32)} for _ in range(self._depth)]
        batches = Prefetcher(self._buffers, self._fill, len(self))
        self._end_pass = batches.close
        return batches

    def close(self) -> None:
        """End a pass that is under way, and release the buffers and the pipeline; a new iteration takes them again."""
        if self._end_pass is not None:
            self._end_pass()
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

    def _fill(self, index: int, buffer: dict[str, Any], ended: Callable[[], bool]) -> None:
        if self._pipeline is None:
            self._pipeline = ImagePipeline(self.preprocess, self._most_in_a_run, self._threads)
        array = buffer[self.input_name]
        filled = 0
        for paths in self._runs(index):
            if ended():
                return
            try:
                self._pipeline.run(paths, array[filled : filled + len(paths)])
            except RuntimeError as error:
                self._pipeline = None
                raise find_unreadable(paths, self.preprocess.channels) or FastcalError(
                    f"DALI cannot prepare the images from {paths[0]} on: {_gist(error)}"
                ) from error
            filled += len(paths)

    @property
    def _most_in_a_run(self) -> int:
        return min(self.batch_size, _IMAGES_PER_THREAD * self._threads)

    def _runs(self, index: int) -> Iterator[list[str]]:
        """The images of a batch in the parts that the pipeline prepares at once.

        Large enough to keep the threads busy, small enough that stopping does not wait long for one to end.
        """
        run: list[str] = []
        encoded = 0
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            path = self.paths[number % len(self.paths)]
            size = os.path.getsize(path) if os.path.exists(path) else 0  # the decoder reports what is gone
            large = len(run) >= self._threads and encoded + size > _BYTES_PER_THREAD * self._threads
            if large or len(run) == self._most_in_a_run:
                yield run
                run, encoded = [], 0
            run.append(path)
            encoded += size
        yield run


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
