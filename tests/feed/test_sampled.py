import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastcal
from fastcal.batch import Input
from fastcal.feed.sampled import Sampled


def images(count, batch, **options):
    """A feed of samples that are their own numbers, from 1 on."""
    values = np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1)
    batches = [{"x": values[start : start + batch]} for start in range(0, count, batch)]
    return fastcal.ArrayFeed(batches, device="cpu", **options)


DYNAMIC = (Input("x", (None, 1), np.dtype("f4"), "N"),)


def fixed(size):
    return (Input("x", (size, 1), np.dtype("f4"), ""),)


def numbers(batches):
    return [int(value) for batch in batches for value in batch["x"].reshape(-1)]


def gone_through(feed):
    return numbers([{"x": batch["x"].copy()} for batch in feed])


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 40))
def test_samples_are_passed_on_or_held_out(count, batch, most):
    feed = Sampled(images(count, batch, last_batch="keep"), DYNAMIC, most)
    passed, held_out, shown = gone_through(feed), numbers(feed.held_out), numbers(feed.shown)
    assert sorted(passed + held_out) == list(range(1, count + 1))
    assert len(held_out) <= most
    assert shown
    assert set(shown) <= set(passed)
    assert len(set(shown)) == len(shown)
    assert feed.passed == len(passed)
    assert all(len(batch["x"]) <= 8 for batch in feed.held_out)


@pytest.mark.parametrize(("count", "batch", "most", "held"), [(177, 32, 32, 32), (64, 8, 32, 16), (256, 32, 32, 32)])
def test_the_samples_that_are_held_out_come_from_all_batches_but_the_last(count, batch, most, held):
    feed = Sampled(images(count, batch, last_batch="keep"), DYNAMIC, most)
    gone_through(feed)
    counts = np.bincount([(number - 1) // batch for number in numbers(feed.held_out)], minlength=-(-count // batch))
    assert counts.sum() == held
    assert counts[-1] == 0
    assert counts[:-1].max() - counts[:-1].min() <= 1


def test_a_batch_of_a_fixed_size_is_held_out_whole():
    feed = Sampled(images(40, 4), fixed(4), 8)
    passed = gone_through(feed)
    assert numbers(feed.held_out) == [5, 6, 7, 8, 21, 22, 23, 24]
    assert sorted([*passed, *numbers(feed.held_out)]) == list(range(1, 41))
    assert numbers(feed.shown) == [1, 2, 3, 4, 9, 10, 11, 12]


def test_too_few_samples_are_all_passed_on():
    feed = Sampled(images(3, 3, last_batch="keep"), DYNAMIC, 32)
    assert gone_through(feed) == [1, 2, 3]
    assert feed.held_out == []
    assert numbers(feed.shown) == [1]


def test_samples_that_complete_the_last_batch_are_not_held_out():
    feed = Sampled(images(13, 4), fixed(4), 4)  # ArrayFeed completes 13 with the first three
    gone_through(feed)
    assert numbers(feed.held_out) == [5, 6, 7, 8]


def test_a_generator_of_unknown_length():
    values = np.arange(1, 101, dtype=np.float32).reshape(-1, 1)
    made = lambda: ({"x": values[start : start + 10]} for start in range(0, 100, 10))  # noqa: E731
    feed = Sampled(fastcal.ArrayFeed(made, device="cpu", last_batch="keep"), DYNAMIC, 8)
    passed = gone_through(feed)
    assert len(numbers(feed.held_out)) == 8
    assert sorted(passed + numbers(feed.held_out)) == list(range(1, 101))


def test_only_arrays_that_count_samples_are_divided(onnx_file):
    model = fastcal.Model(onnx_file("net (float[N, 1] x, float[1, 2] s) => (float[N, 2] y) { y = Mul(x, s) }"))
    batch = {"x": np.arange(8, dtype="f4").reshape(8, 1), "s": np.ones((1, 2), "f4")}
    feed = Sampled(fastcal.ArrayFeed([batch] * 9, model=model, device="cpu", last_batch="keep"), model.inputs, 8)
    assert {len(batch["x"]) for batch in feed} == {7, 8}
    for each in (*feed.held_out, *feed.shown):
        assert each["s"].shape == (1, 2)
    assert sum(len(each["x"]) for each in feed.held_out) == 8


def test_every_pass_holds_out_the_same_samples_and_says_so_in_the_record():
    inner = images(64, 8, last_batch="keep")
    feed = Sampled(inner, DYNAMIC, 8)
    first = gone_through(feed), numbers(feed.held_out), numbers(feed.shown)
    assert (gone_through(feed), numbers(feed.held_out), numbers(feed.shown)) == first
    assert feed.describe() == inner.describe() | {"held_out": 8}
    assert Sampled(inner, DYNAMIC, 0).describe() == inner.describe()
    assert (len(feed), feed.batch_size, feed.shapes()) == (8, 8, {"x": (8, 1)})
