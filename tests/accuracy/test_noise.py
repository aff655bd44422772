"""The noise at the outputs, against the formula over all samples at once."""

import math

import numpy as np
import pytest

from fastcal.accuracy.noise import Noise, decibels, without_padding
from fastcal.accuracy.outputs import Part

BOXES = Part("y", "y[:, 0:4]", (slice(None), slice(0, 4)))
SCORES = Part("y", "y[:, 4:]", (slice(None), slice(4, None)))
OTHER = Part("z", "z")


def outputs(seed, samples=3):
    random = np.random.default_rng(seed)
    scale = np.array([300] * 4 + [1] * 2)[:, None]
    return {"y": (random.random((samples, 6, 5)) * scale).astype("f4"), "z": random.random((samples, 7)).astype("f4")}


def error(exact, other):
    exact, other = exact.astype(float), other.astype(float)
    return np.sum((exact - other) ** 2) / np.sum(exact**2)


def test_parts_are_apart_and_batches_add_up():
    exact, other = outputs(0), outputs(1)
    noise = Noise([BOXES, SCORES, OTHER])
    for batch in (slice(0, 1), slice(1, 3)):
        noise.add(*({name: array[batch] for name, array in each.items()} for each in (exact, other)))
    expected = {
        "y[:, 0:4]": error(exact["y"][:, :4], other["y"][:, :4]),
        "y[:, 4:]": error(exact["y"][:, 4:], other["y"][:, 4:]),
        "z": error(exact["z"], other["z"]),
    }
    assert noise.errors == pytest.approx(expected, rel=1e-12)
    assert noise.error == max(noise.errors.values())
    assert noise.sqnr == pytest.approx(-10 * math.log10(max(expected.values())))


def test_small_scores_count_as_much_as_large_boxes():
    exact = outputs(0)
    wrong = {name: array.copy() for name, array in exact.items()}
    wrong["y"][:, 4:] = 0
    noise = Noise([BOXES, SCORES, OTHER])
    noise.add(exact, wrong)
    assert noise.errors == {"y[:, 0:4]": 0, "y[:, 4:]": 1, "z": 0}
    assert noise.error == 1


def test_values_that_are_not_finite():
    exact = {"z": np.array([[1, np.nan, np.inf, 2, 1e39]])}
    noise = Noise([OTHER])
    noise.add(exact, {"z": np.array([[1, 7, 7, 1, 7.0]])})
    assert (noise.elements["z"], noise.left_out["z"]) == (5, 3)
    assert noise.errors == {"z": 1 / 5}
    noise.add(exact, {"z": np.array([[np.nan, 7, 7, 1, 7]])})
    assert noise.errors == {"z": math.inf}
    assert noise.sqnr == -math.inf
    only = Noise([OTHER])
    only.add({"z": np.array([np.nan])}, {"z": np.array([1.0])})
    assert (only.errors, only.error) == ({}, 0)


def test_decibels():
    assert [decibels(error) for error in (0, 0.01, 1, math.inf)] == [math.inf, 20, 0, -math.inf]
    noise = Noise([OTHER])
    noise.add({"z": np.zeros(3)}, {"z": np.zeros(3)})
    assert noise.sqnr == math.inf
    noise.add({"z": np.zeros(3)}, {"z": np.ones(3)})
    assert noise.sqnr == -math.inf


def test_padding_is_left_out_of_outputs_with_a_batch_axis():
    given = {"y": np.arange(8).reshape(4, 2), "total": np.array(3.0), "time": np.zeros((5, 4, 2))}
    cut = without_padding(given, 4, 3)
    assert {name: array.shape for name, array in cut.items()} == {"y": (3, 2), "total": (), "time": (5, 4, 2)}
    np.testing.assert_array_equal(cut["y"], given["y"][:3])
