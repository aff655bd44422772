import gc
import subprocess
import sys
import threading
import time

import pytest

from fastcal import FastcalError
from fastcal.feed.prefetch import Prefetcher


def numbered(index, buffer, ended):
    buffer[:] = [index] * len(buffer)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastcal-prefetch"]


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize(("fill_seconds", "read_seconds"), [(0, 0), (0.002, 0), (0, 0.002)])
def test_every_buffer_arrives_whole_and_in_order(depth, fill_seconds, read_seconds):
    buffers = [[-1] * 50 for _ in range(depth)]

    def fill(index, buffer, ended):
        for place in range(50):
            buffer[place] = index
            if place == 25:
                time.sleep(fill_seconds)

    seen = 0
    for index, buffer in enumerate(Prefetcher(buffers, fill, 200)):
        first = list(buffer)
        time.sleep(read_seconds)
        assert first == list(buffer) == [index] * 50
        seen += 1
    assert seen == 200


def test_the_next_buffer_fills_while_one_is_read():
    filled = threading.Semaphore(0)
    buffers = [[0], [0]]

    def fill(index, buffer, ended):
        numbered(index, buffer, ended)
        filled.release()

    batches = Prefetcher(buffers, fill, 3)
    assert next(batches) is buffers[0]
    assert filled.acquire(timeout=10)
    assert filled.acquire(timeout=10)  # buffer 1, while buffer 0 is held
    assert not filled.acquire(timeout=0.05)  # not buffer 0 again
    assert (buffers[0], buffers[1]) == ([0], [1])
    batches.close()


def test_the_buffer_after_those_is_prepared_while_none_is_free():
    calls, prepared = [], threading.Semaphore(0)

    def prepare(index):
        calls.append(("prepare", index))
        if index == 2:
            prepared.release()

    batches = Prefetcher([[0], [0]], lambda index, *_: calls.append(("fill", index)), 3, prepare)
    assert prepared.acquire(timeout=10)
    time.sleep(0.05)
    assert calls == [("prepare", 0), ("fill", 0), ("prepare", 1), ("fill", 1), ("prepare", 2)]
    assert len(list(batches)) == 3
    assert calls[5:] == [("fill", 2)]


@pytest.mark.parametrize("where", ["fill", "prepare"])
def test_an_error_comes_after_the_buffers_before_it(where):
    def fail(index):
        if index == 2:
            raise KeyError("broken")

    def fill(index, buffer, ended):
        numbered(index, buffer, ended)
        fail(index)

    prepare = {"fill": None, "prepare": fail}[where]
    batches = Prefetcher([[0], [0]], fill if where == "fill" else numbered, 5, prepare)
    assert [list(next(batches)), list(next(batches))] == [[0], [1]]
    with pytest.raises(KeyError, match="broken"):
        next(batches)
    assert threads() == []


def test_a_stop_iteration_in_the_thread_is_an_error():
    def fill(index, buffer, ended):
        if index == 1:
            next(iter(()))

    batches = Prefetcher([[0], [0]], fill, 5)
    next(batches)
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(batches)


def test_an_ended_pass_stays_ended():
    batches = Prefetcher([[0], [0]], numbered, 1)
    assert [list(buffer) for buffer in batches] == [[0]]
    with pytest.raises(StopIteration):
        next(batches)
    assert threads() == []


@pytest.mark.parametrize("count", [100, 3])
def test_closing_midway_ends_the_thread_and_cuts_off_the_pass(count):
    batches = Prefetcher([[0], [0], [0]], numbered, count)
    next(batches)
    batches.close()
    assert threads() == []
    for _ in range(2):
        with pytest.raises(FastcalError, match="cut off"):
            next(batches)


def test_closing_after_the_last_batch_changes_nothing():
    batches = Prefetcher([[0], [0]], numbered, 2)
    assert [list(next(batches)), list(next(batches))] == [[0], [1]]
    while threads():
        time.sleep(0.01)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_long_fill_learns_that_the_pass_has_ended():
    heard = []

    def fill(index, buffer, ended):
        if index == 1:
            heard.append(ended())
            for _ in range(1000):
                if ended():
                    heard.append(True)
                    return
                time.sleep(0.01)

    batches = Prefetcher([[0], [0]], fill, 5)
    next(batches)
    while not heard:
        time.sleep(0.01)
    batches.close()
    assert heard == [False, True]


def test_deleting_the_iterator_ends_the_thread():
    batches = Prefetcher([[0], [0]], numbered, 100)
    next(batches)
    del batches
    gc.collect()
    assert threads() == []


def test_closing_wakes_a_waiting_consumer():
    filling, go_on = threading.Event(), threading.Event()

    def fill(index, buffer, ended):
        filling.set()
        go_on.wait(10)

    batches = Prefetcher([[0], [0]], fill, 5)
    ended = []

    def consume():
        with pytest.raises(FastcalError, match="cut off"):
            next(batches)
        ended.append(True)

    consumer = threading.Thread(target=consume)
    consumer.start()
    filling.wait(10)
    threading.Timer(0.05, go_on.set).start()
    batches.close()
    consumer.join(10)
    assert ended == [True]


def test_the_interpreter_exits_with_a_pass_under_way():
    program = """
import atexit
from fastcal import FastcalError
from fastcal.feed.prefetch import Prefetcher
import time
def fill(index, buffer, ended):
    time.sleep(0.5)
    print("filled", index, flush=True)
atexit.register(lambda: print("exit function of an older library", flush=True))
batches = Prefetcher([[0], [0]], fill, 1000)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["filled 0", "filled 1", "exit function of an older library"]
