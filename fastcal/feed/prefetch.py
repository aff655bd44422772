"""A ring of buffers: one thread fills the next while the consumer reads the last it was given."""

import atexit
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from fastcal.errors import FastcalError

Buffer = TypeVar("Buffer")

#: fill(index, buffer, ended) returns False if there is no batch `index`. Once ended() is true, the pass is over: the
#: buffer is not used, and `fill` should return.
Fill = Callable[[int, Buffer, Callable[[], bool]], bool | None]


class Prefetcher(Generic[Buffer], Iterator[Buffer]):
    """One pass: an iterator over filled buffers, at most `count`; `prepare(index)` begins work that needs no buffer.

    A background thread fills at least two buffers in turn, and gets back the one that the consumer holds when that asks
    for the next. An error in the thread is raised in the consumer, after the buffers filled before it. The thread ends
    with the pass, with `close`, when the iterator is deleted, and before the interpreter exits.
    """

    def __init__(
        self,
        buffers: Sequence[Buffer],
        fill: Fill[Buffer],
        count: int | None = None,
        prepare: Callable[[int], object] | None = None,
    ) -> None:
        self._ring = _Ring(buffers)
        thread = threading.Thread(
            target=self._ring.produce, args=(fill, count, prepare), name="fastcal-prefetch", daemon=True
        )
        self.close = _stopper(self._ring, thread)
        weakref.finalize(self, self.close).atexit = False  # neither it nor the thread refers to this object
        thread.start()

    def __next__(self) -> Buffer:
        """Give the last buffer back and wait for the next; raise FastcalError if the pass was cut off."""
        try:
            return self._ring.take()
        except BaseException:
            self.close()
            raise


class _Ring(Generic[Buffer]):
    """The state that the thread and the iterator share."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._changed = threading.Condition()
        self._free = deque(buffers)
        self._filled: deque[Buffer] = deque()
        self._held: list[Buffer] = []
        self._ended = False
        self._complete = False  # whether the last buffer has been filled
        self.idle = threading.Event()  # set when the thread will not call `fill` again
        self._error: BaseException | None = None

    def produce(self, fill: Fill[Buffer], count: int | None, prepare: Callable[[int], object] | None) -> None:
        try:
            for index in itertools.count() if count is None else range(count):
                if prepare is not None:
                    prepare(index)
                with self._changed:
                    self._changed.wait_for(lambda: self._free or self._ended)
                    if self._ended:
                        return
                    buffer = self._free.popleft()
                if fill(index, buffer, lambda: self._ended) is False:
                    self._complete = not self._ended
                    return
                with self._changed:
                    if self._ended:  # `fill` may have returned early
                        return
                    self._filled.append(buffer)
                    self._changed.notify_all()
            self._complete = True
        except StopIteration as error:  # the consumer would take it for the end of the pass
            self._error = RuntimeError("the function that fills a buffer raised StopIteration")
            self._error.__cause__ = error
        except BaseException as error:  # handed to the consumer
            self._error = error
        finally:
            self.end()
            self.idle.set()

    def take(self) -> Buffer:
        with self._changed:
            if self._held:
                self._free.append(self._held.pop())
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._filled or self._ended)
            if self._filled:
                self._held.append(self._filled.popleft())
                return self._held[0]
            if self._error is not None:
                raise self._error
            if self._complete:
                raise StopIteration
            raise FastcalError(
                "the pass was cut off: its feed was closed, or another pass begun, before this one had come to its end"
            )

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def discard(self) -> None:
        with self._changed:
            self._complete = self._complete and not self._filled
            self._filled.clear()


def _stopper(ring: _Ring[Buffer], thread: threading.Thread) -> Callable[[], None]:
    """Return a function that ends the thread and waits for it. It is called at the interpreter's exit at the latest.

    A thread left running would be in the middle of a decoder while the interpreter takes the decoder down. Exit
    functions run last in, first out: this one is younger than those of the libraries that `fill` calls. In a fork of
    the process there is no such thread, and the ring's lock may be held for ever.
    """
    process = os.getpid()

    def stop() -> None:
        if os.getpid() != process:
            return
        interrupted = None
        # An event instead of join: up to Python 3.12, a thread whose join is interrupted counts as dead.
        while not ring.idle.is_set():
            try:
                ring.end()
                if thread.ident in (None, threading.get_ident()):  # never started; or deleted by the thread itself
                    break
                ring.idle.wait()
            except KeyboardInterrupt as interrupt:  # a second Ctrl-C
                interrupted = interrupt
        if thread.ident not in (None, threading.get_ident()):
            thread.join()
        ring.discard()
        atexit.unregister(stop)
        if interrupted is not None:
            raise interrupted

    atexit.register(stop)
    return stop
