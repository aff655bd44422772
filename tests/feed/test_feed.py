import numpy as np
import pytest

from fastcal import ArrayFeed, FastcalError


def test_arrays_are_handed_on_as_they_are_in_every_pass():
    batches = [
        {"a": np.ones((2, 3), "f4"), "b": np.zeros((2,), "i8")},
        {"a": np.zeros((2, 3), "f4"), "b": np.ones(2, "i8")},
    ]
    feed = ArrayFeed(batches)
    assert (len(feed), feed.batch_size) == (2, 2)
    for _ in range(2):
        for given, batch in zip(batches, feed, strict=True):
            assert batch["a"] is given["a"]
            assert batch["b"] is given["b"]


def test_float64_becomes_float32_and_lists_become_arrays():
    (batch,) = ArrayFeed([{"a": [[1.5, 2.5]], "b": np.zeros((1, 2))}])
    assert batch["a"].dtype == batch["b"].dtype == np.float32
    assert batch["a"].tolist() == [[1.5, 2.5]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ({"a": np.ones(3)}, "takes a list of dicts, not a dict"),
        (iter([{"a": np.ones(3)}]), "takes a list of dicts, not a list_iterator"),
        ([{"a": np.ones(3), "b": np.ones(4)}], r"batch 0 have first dimensions \[3, 4\]"),
        ([{"a": np.ones(3)}, {"b": np.ones(3)}], r"batch 1 has the inputs \['b'\], batch 0 has \['a'\]"),
        ([{"a": np.ones((3, 2))}, {"a": np.ones((3, 1))}], r"batch 1 has 'a' of shape \(3, 1\)"),
    ],
)
def test_what_is_wrong_is_named(batches, message):
    with pytest.raises(FastcalError, match=message):
        ArrayFeed(batches)
