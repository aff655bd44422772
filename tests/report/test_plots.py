"""The histogram that a report draws of each tensor."""

import re

import numpy as np
import pytest

from fastcal.observe.histogram import Histogram
from fastcal.report.plots import draw_histogram


def drawn(values, threshold):
    """The edges and heights of the bars by colour, and the place of the threshold's line, all from 0 to 1."""
    histogram = Histogram()
    histogram.update(np.float32(values))
    found = {}
    paths = re.findall(r'<path d="M (\S+) 1 ([^"]*)" style="\w+: var\(--(\w+)\)"', draw_histogram(histogram, threshold))
    for start, steps, color in paths:
        bars = [(1 - float(y), float(x)) for y, x in re.findall(r"V (\S+) H (\S+)", steps)]
        found[color] = float(start), [height for height, _ in bars], [x for _, x in bars]
    return found


def test_bars_end_at_the_threshold_and_the_rest_has_another_colour():
    values = np.repeat(np.arange(48) / 48 + 1 / 96, np.arange(1, 49))  # one value more in each bar
    found = drawn([*values, 1], 0.75)
    start, kept, edges = found["counts"]
    assert (start, edges) == (0, pytest.approx(np.arange(1, 37) / 48, abs=1e-4))
    start, clipped, edges = found["clipped"]
    assert start == 0.75
    assert edges == pytest.approx(np.linspace(0.75, 1, 12)[1:], abs=1e-4)
    assert np.divide(kept, kept[-1]) == pytest.approx(np.log1p(np.arange(1, 37)) / np.log1p(36), abs=0.02)
    assert max(clipped) == 1
    assert found["threshold"] == (0.75, [], [])


@pytest.mark.parametrize(
    ("values", "threshold", "place", "colors"),
    [
        ([0, 0], 0, 0, {"threshold"}),
        ([0, 2], 0, 0, {"clipped", "threshold"}),
        ([0, 2], 4, 1, {"counts", "threshold"}),
        ([0, 3e38], 1e-38, 0, {"counts", "clipped", "threshold"}),
    ],
)
def test_histograms_at_the_limits(values, threshold, place, colors):
    found = drawn(values, threshold)
    assert set(found) == colors
    assert found["threshold"][0] == pytest.approx(place, abs=1e-30)
