"""`ArrayFeed`: arrays that the caller has or makes, copied into the feed's buffers ahead of the consumer."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np

from fastcal.device import resolve
from fastcal.errors import FastcalError
from fastcal.feed.buffers import Batches, Buffer
from fastcal.feed.feed import Batch, Feed, Turns, check_settings
from fastcal.feed.prefetch import Prefetcher
from fastcal.feed.reader import Reader, is_source

#: What can become of a last batch of fewer samples.
LAST_BATCHES = ("wrap", "drop", "keep")


class ArrayFeed(Feed):
    """Batches that the caller has or makes, copied into buffers that are filled and read by turns.

    A background thread goes through the batches and copies the next one while the consumer works on the last. On a
    GPU, arrays in host memory go there through pinned memory, and those that are there already do not leave it.

    Args:
        batches: A list of batches; or anything that is iterated over to get them, a PyTorch `DataLoader` for instance;
            or a DALI pipeline, run for one epoch of its reader or until its sources end; or a function that returns
            one of these, called for every pass. Every pass must give the same batches, so nothing may shuffle; a
            generator will do for one pass.

            A batch is a dict of arrays, a tuple or list of them, or one array; the first dimension counts samples.
            Arrays are NumPy's, CuPy's, PyTorch's or any that speak DLPack or the CUDA array interface; what makes them
            on a GPU must have been enqueued on their library's current stream. float64 becomes float32, other types
            of numbers stay.
        names: The network's inputs. Of a tuple these are its first arrays, and what comes after them, labels for
            instance, is left out; of a dict, those of its arrays that are inputs. A dict gives the input for a key or
            a position: `{"pixel_values": "input"}`, `{1: "input"}`. By default a dict's arrays all go by their keys,
            and of anything else the first array goes to whatever single input a network has.
        last_batch: A last batch of fewer samples is completed with the first ones ("wrap"), left out ("drop"), or
            handed on as it is ("keep"). With "keep" the others may be of any size, too.
        device: Where the buffers are: "auto" (a GPU where there is one and CuPy is installed, else the CPU), "cpu",
            "cuda" or "cuda:N".
        depth: How many buffers there are, at least 2.

    Attributes:
        batch_size: Samples in the first batch; to ask for it begins a pass.
        gpu: The number of the GPU that the batches lie on; None for host memory.

    Raises:
        FastcalError: An argument is not one of the above; in a pass, a batch fits neither the names nor the batches
            before it, or there is none. What the caller's code raises comes through as it is.
    """

    def __init__(
        self,
        batches: Any,
        names: Sequence[str] | Mapping[Any, str] | None = None,
        *,
        last_batch: str = "wrap",
        device: str = "auto",
        depth: int = 2,
    ) -> None:
        if not is_source(batches):
            raise FastcalError(
                f"ArrayFeed takes a list of batches, a loader or a DALI pipeline, not a {type(batches).__name__}; for "
                "files there are ImageFeed and NumpyFeed"
            )
        if isinstance(names, str) or not isinstance(names, Sequence | Mapping | None):
            raise FastcalError(f"names is {names!r}; give a list of the inputs' names, or a dict")
        check_settings(last_batch, LAST_BATCHES, depth=depth)
        self.gpu = resolve(device)
        self._reader = Reader(batches, names, last_batch, self.gpu)
        self._depth = depth
        self._turns = Turns()
        self._buffers: list[Buffer] = []
        self._peeked: Batches | None = None
        self._running: weakref.ref[Batches] | None = None  # the last pass begun, while somebody has it
        self._end_pass: Callable[[], None] | None = None

    def __len__(self) -> int:
        """The number of batches in a pass.

        Raises:
            TypeError: It is not known before a pass has come to its end.
        """
        length = self._reader.length()
        if length is None:
            raise TypeError("how many batches there are is not known before a pass has come to its end")
        return length

    def __iter__(self) -> Iterator[Batch]:
        with self._turns:
            peeked, self._peeked = self._peeked, None
            return self._start() if peeked is None else peeked

    # What a feed sets when it is made, this one finds out when it is asked.

    @cached_property
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples in the first batch."""
        return self._peek().batch_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Feed.shapes`; a pass begun for that goes on with the next iteration."""
        return self._peek().shapes

    def part(self, batches: range, *, gpu: int | None, threads: int) -> "ArrayFeed":
        """See `Feed.part`: `batches` of a list, in host memory; `gpu` and `threads` are nothing to it."""
        listed = self._reader.listed
        if listed is None:
            raise FastcalError(
                "batches that are no list cannot be divided among workers; leave workers out, or give list(...) of them"
            )
        completed = batches.stop == len(listed) > 1  # the last one with the first, perhaps
        some = [listed[0]] * completed + list(listed[batches.start : batches.stop])
        with ArrayFeed(some, self._reader.names, last_batch=self._reader.last_batch, device="cpu") as feed:
            copied = [{name: np.array(array) for name, array in batch.items()} for batch in feed][completed:]
        return ArrayFeed(copied, last_batch="keep", device="cpu")

    def describe(self) -> dict[str, Any]:
        """What is known of the samples without going through all of them.

        That is a digest of all names, types, shapes and values of a list; but where batches are made anew for every
        pass, of the first batch only: they are taken to be the same where they begin alike.
        """
        return self._reader.describe_list() or self._peek().describe_first()

    def close(self) -> None:
        """End a pass that is under way, and release the buffers; a new iteration takes them again."""
        with self._turns:
            if self._end_pass is not None:
                self._end_pass()
                self._end_pass = None  # it refers to the buffers
            self._peeked = self._running = None
            self._buffers = []
            self._reader.release()

    def _start(self) -> Batches:
        if self._end_pass is not None:
            self._end_pass()
        fill = self._reader.begin()
        if not self._buffers:
            self._buffers = self._reader.make_buffers(self._depth)
        prefetcher = Prefetcher(self._buffers, fill)
        self._end_pass = prefetcher.close
        batches = Batches(prefetcher)
        self._running = weakref.ref(batches)
        return batches

    def _peek(self) -> Reader:
        """The reader, once it has seen a first batch: of the pass that is under way, or else of one begun for that.

        The latter goes on with the next iteration.
        """
        with self._turns:
            if not self._reader.batch_size:
                running = None if self._running is None else self._running()
                if running is None:
                    running = self._peeked = self._start()
                try:
                    running.peek()
                except BaseException:
                    self._peeked = None  # which has ended with this
                    raise
            return self._reader


def as_feed(batches: Any, names: Sequence[str] | None, device: str) -> AbstractContextManager[Feed]:
    """`batches` itself if it is a feed, which stays open; else a feed of it, with batches of any size.

    Args:
        batches: A feed, or what `ArrayFeed` takes.
        names: The network's inputs, where they are known.
        device: Where that feed's buffers are.
    """
    if isinstance(batches, Feed):
        return nullcontext(batches)
    return ArrayFeed(batches, names, last_batch="keep", device=device)
