import math
from dataclasses import replace

import numpy as np
import pytest

from conftest import DATA
from fastcal import CalibrationCache, FastcalError, diff_caches

SQUEEZENET = CalibrationCache.load(DATA / "squeezenet1_1.entropy2.cache")


def test_a_cache_does_not_differ_from_itself():
    assert SQUEEZENET.scales["features.12.squeeze.bias"] == 0
    found = diff_caches(SQUEEZENET, SQUEEZENET)
    assert not found
    assert (found.moved, found.removed, found.added, found.compared) == ({}, (), (), 91)


@pytest.mark.parametrize("factor", [1.01, 1 / 1.01])
def test_one_scale_that_moved_by_a_percent_is_named_alone(factor):
    name = "input"
    before = SQUEEZENET.scales[name]
    after = float(np.float32(before * factor))
    moved = replace(SQUEEZENET, scales=SQUEEZENET.scales | {name: after})
    for tolerance in (0, 0.9):
        found = diff_caches(SQUEEZENET, moved, tolerance=tolerance)
        assert found
        assert found.moved == {name: (before, after)}
    assert not diff_caches(SQUEEZENET, moved, tolerance=1.1)


def test_what_moved_most_comes_first():
    before = CalibrationCache({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "e": 2.0, "f": math.nan, "g": math.nan})
    after = CalibrationCache({"g": math.nan, "f": 1.0, "e": 2.0, "d": 1e-9, "c": 4.0, "b": 0.2, "a": 1.5})
    assert list(diff_caches(before, after).moved) == ["d", "f", "b", "c", "a"]


def test_tensors_in_only_one():
    before, after = CalibrationCache({"a": 1.0, "x": 1.0, "y": 2.0}), CalibrationCache({"z": 1.0, "x": 1.0})
    found = diff_caches(before, after, tolerance=100)
    assert found
    assert (found.moved, found.removed, found.added, found.compared) == ({}, ("a", "y"), ("z",), 1)


def test_each_kind_of_difference_counts_alone():
    one, two = CalibrationCache({"x": 1.0}), CalibrationCache({"x": 1.0, "y": 1.0})
    assert diff_caches(one, two)
    assert diff_caches(two, one)


@pytest.mark.parametrize("tolerance", [-1, math.nan])
def test_a_tolerance_that_is_none(tolerance):
    with pytest.raises(FastcalError, match="is not a percentage from 0 on"):
        diff_caches(SQUEEZENET, SQUEEZENET, tolerance=tolerance)
