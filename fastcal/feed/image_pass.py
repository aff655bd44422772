"""A pass over images: DALI's work ahead, and the recovery from unreadable samples."""

import logging
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from fastcal.errors import DataError, FastcalError, counted
from fastcal.feed.buffers import Allocator, Buffer
from fastcal.feed.chunks import Chunk, Order
from fastcal.feed.image_plan import TRIED, ImagePlan
from fastcal.feed.pipeline import ImagePipeline, find_unreadable
from fastcal.feed.plan import Pass, Passes
from fastcal.feed.sources import UnreadableError

# The number of samples that are tried on the CPU first after a GPU's pipeline has failed; twice as many the next time.
# Starting a pipeline on a GPU takes 2 s, as long as trying some thousand images on the CPU.
_FIRST_SUSPECTS = 128

# The number of unreadable samples that are logged; all are listed in `skipped`.
_LOGGED = 3

_log = logging.getLogger("fastcal")


class ImagePasses(Passes):
    """The state that passes over images share.

    Attributes:
        unreadable: The errors of the samples to leave out, by sample.
        pipeline: The pipeline, which passes use one after another; None if the next use must start one.
        images: The inputs that take images.
        suspects: The number of the next samples that must be tried on the CPU before the pipeline gets them.
    """

    def __init__(self, plan: ImagePlan) -> None:
        self.unreadable: dict[int, UnreadableError] = {}
        self.pipeline: ImagePipeline | None = None
        self.images = plan.images
        self.suspects = 0
        self._next_suspects = _FIRST_SUSPECTS
        self._plan = plan
        self._is_tried = plan.decoding.is_part

    def begin(self, allocator: Allocator) -> "ImagePass":
        """Begin a pass, with the pipeline of the last one if it can be used on."""
        pipeline = self.pipeline
        if pipeline is not None and pipeline.process != os.getpid():
            raise FastcalError(
                "a feed that was used before its process forked cannot be used in the child, since DALI's threads are "
                "the parent's; make the feed in the child"
            )
        allocator.synchronize()  # copies from the pipeline, and reads of the last pass's batches, are complete
        if pipeline is not None and (
            pipeline.under_way or pipeline.ahead < min(self._plan.decoding.ahead, self.length())
        ):
            self.pipeline = None  # the last pass was cut off, or started its pipeline near its end
        return ImagePass(self._plan, self)

    def length(self) -> int:
        """Return the number of batches in a pass."""
        return self._plan.count_batches(len(self.unreadable))

    def take_over(self, earlier: Passes) -> None:
        """Use the pipeline of the passes over another part of the same feed: starting one on a GPU takes long."""
        if not isinstance(earlier, ImagePasses) or earlier.pipeline is None:
            return
        if all(earlier.images[name].is_fed_like(value) for name, value in self.images.items()):
            self.pipeline, earlier.pipeline = earlier.pipeline, None
            self.pipeline.inputs = self.images

    def close(self) -> None:
        """Release the pipeline."""
        self.pipeline = None

    def start_pipeline(self, batches: int) -> ImagePipeline:
        """Start a pipeline for so many batches."""
        plan, size = self._plan, self._plan.chunk_size
        if not self._is_tried:
            self._is_tried = True
            self._try_kinds()
        self.pipeline = ImagePipeline(
            self.images,
            most=plan.batch_size if size is None else size.most,
            threads=plan.thread_count,
            gpu=plan.gpu,
            # The next part of the same feed may be longer, and takes the pipeline over.
            ahead=plan.decoding.ahead if plan.decoding.is_part else min(plan.decoding.ahead, batches),
            hw_decoder_load=plan.decoding.hw_share,
            decode_on_cpu=plan.gpu is not None and plan.decodes_on_cpu,
        )
        return self.pipeline

    def read_here(self) -> bool:
        """Have DALI read no files from now on: some may be of other formats than named; return whether it did."""
        before = self.images
        self.images = {name: replace(value, source=value.source.read_here()) for name, value in before.items()}
        return self.images != before

    def expect_failures(self) -> None:
        """Have the next samples tried on the CPU if a GPU's pipeline has failed: starting another one takes long."""
        if self._plan.gpu is not None:
            self.suspects, self._next_suspects = self._next_suspects, 2 * self._next_suspects

    def leave_out(self, errors: Iterable[UnreadableError]) -> bool:
        """Leave out samples from now on; return whether any were not left out before.

        The error is raised if none or not so many may be left out.
        """
        before, most, every = len(self.unreadable), self._plan.max_unreadable, len(self._plan.sample_names)
        for error in errors:
            if most is None:
                raise error
            # The frames of a traceback would keep the pipeline and its threads.
            error = UnreadableError(error.number, str(error))
            if error.number not in self.unreadable:
                self.unreadable[error.number] = error
                if len(self.unreadable) <= _LOGGED:
                    _log.warning("skipped: %s", error)
            bad = len(self.unreadable)
            if bad == every or bad > most / 100 * every:
                which = "all" if bad == every else f"more than max_unreadable allows ({most:g} %)"
                raise DataError(f"{bad} of {counted(every, 'sample')} cannot be read, {which}; the last was: {error}")
        return len(self.unreadable) > before

    def _try_kinds(self) -> None:
        """Try the first images of each kind that comes after the first batch.

        They are tried in a pipeline of their own: from its first run, nvImageCodec decides once and for all how many
        images of a batch a GPU's JPEG decoder gets (`NVIMGCODEC_LOAD_HINT_POLICY_FIXED`).
        """
        for value in self._plan.images.values():
            for extension, numbers in value.source.first_of_each_kind(TRIED).items():
                if numbers[0] < self._plan.batch_size:
                    continue
                found = list(find_unreadable([value], numbers, self._plan.gpu))
                if len(found) < len(numbers):
                    continue
                tried = ", ".join(value.source.names[number] for number in numbers)
                text = f"DALI decodes no {extension} image here: tried {tried}; convert them or leave them out"
                if self._plan.max_unreadable is None:
                    raise DataError(text if len(found) > 1 else str(found[0]))
                if len(found) > 1:
                    _log.warning("%s", text)


class ImagePass(Pass):
    """One pass over images."""

    def __init__(self, plan: ImagePlan, passes: ImagePasses) -> None:
        self._plan = plan
        self._arrays = plan.arrays
        self._passes = passes
        self._order = Order(
            len(plan.sample_names), plan.batch_size, plan.last_batch, passes.unreadable, plan.chunk_size
        )
        self.count = passes.length()

    def prepare(self, index: int) -> None:
        """Have DALI work on batch `index`."""
        self._work_ahead(self._passes.length() - index)

    def fill(self, index: int, buffer: Buffer, ended: Callable[[], bool]) -> bool:
        """Fill a buffer with batch `index`."""
        filled = 0
        with buffer.filling():
            while filled < self._plan.batch_size and not ended():
                pipeline = self._work_ahead(self._passes.length() - index)
                if pipeline is None:
                    if self._plan.last_batch != "keep" or not filled:
                        return False
                    break
                chunk = pipeline.under_way[0]
                upto = filled + len(chunk.numbers)
                try:
                    pipeline.collect(
                        {name: buffer.arrays[name][filled:upto] for name in self._passes.images}, buffer.stream
                    )
                except RuntimeError as error:
                    self._recover(error, pipeline.under_way)
                    continue
                for name, values in chunk.arrays.items():
                    buffer.put(name, slice(filled, upto), values)
                filled = upto
        buffer.samples = filled
        return True

    def _work_ahead(self, batches: int) -> ImagePipeline | None:
        """Return the pipeline with as many chunks under way as it may have; None at the end of the pass."""
        while True:
            pipeline = self._passes.pipeline
            if pipeline is None:
                if not batches:
                    return None
                pipeline = self._passes.start_pipeline(batches)
            while len(pipeline.under_way) < pipeline.ahead and (chunk := self._order.next_chunk()):
                self._submit(pipeline, chunk)
            if not pipeline.under_way:
                return None
            if not pipeline.has_begun and self._plan.decoding.is_part:
                pipeline.begin_with_fewer()
            if pipeline.has_begun:
                return pipeline
            # Fewer chunks are left than the pipeline begins with.
            batches = len(pipeline.under_way)
            self._order.go_back(pipeline.under_way[0])
            self._passes.pipeline = None

    def _submit(self, pipeline: ImagePipeline, chunk: Chunk) -> None:
        try:
            for name, source in self._arrays.items():
                chunk.arrays[name] = source.fetch(chunk.numbers)
            if self._passes.suspects > 0:
                self._passes.suspects -= len(chunk.numbers)
                threads = self._plan.thread_count
                if self._passes.leave_out(
                    find_unreadable(self._passes.images.values(), chunk.numbers, threads=threads)
                ):
                    self._order.go_back(chunk)
                    return
            fetched = {name: value.source.fetch(chunk.numbers) for name, value in self._passes.images.items()}
            pipeline.submit(chunk, fetched)
        except UnreadableError as error:
            self._passes.leave_out([error])
            self._order.go_back(chunk)

    def _recover(self, error: RuntimeError, under_way: Collection[Chunk]) -> None:
        """Leave out the samples that the pipeline failed on, and begin again with the chunks that were under way."""
        self._passes.pipeline = None
        first, *later = under_way
        others = [number for chunk in later for number in chunk.numbers]
        for numbers, gpu in ((first.numbers, None), (others, None), (first.numbers + others, self._plan.gpu)):
            if self._passes.leave_out(find_unreadable(self._passes.images.values(), numbers, gpu)):
                self._order.go_back(first)
                self._passes.expect_failures()
                return
        if self._passes.read_here():
            self._order.go_back(first)
            return
        raise DataError(
            f"DALI cannot prepare the images from {self._plan.sample_names[first.numbers[0]]} on: {_reason(error)}"
        ) from error


def _reason(error: RuntimeError) -> str:
    """Return the line of DALI's message that gives the reason."""
    return str(error).split("encountered:", 1)[-1].strip().partition("\n")[0].strip() or "no reason given"
