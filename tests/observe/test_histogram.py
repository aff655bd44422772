import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fastcal
import fastcal.observe.count  # loaded now, not on hypothesis's time
from fastcal.observe.histogram import BINS, Histogram, Histograms


def histogram_of(*batches, start=0.0):
    histogram = Histogram(start)
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


floats = arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))
any_floats = arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


@given(first=floats, rest=floats, data=st.data())
def test_how_later_values_are_split_over_batches_changes_nothing(first, rest, data):
    # An element equal to a range falls where its batch finds the range: TensorRT's own exception, tested below.
    amax = float(np.abs(first).max())
    assume(amax > 2**-100 and not np.isin(np.frexp(np.abs(rest))[0], np.frexp(amax)[0]).any())
    whole = histogram_of(first, rest)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rest)), max_size=4)))
    split = histogram_of(first, *np.split(rest, cuts))
    assert (split.range, split.amax) == (whole.range, whole.amax)
    np.testing.assert_array_equal(split.counts, whole.counts)


@given(batches=st.lists(any_floats, max_size=5))
def test_no_count_is_ever_lost(batches):
    histogram = histogram_of(*batches)
    together = np.concatenate([np.zeros(0, np.float32), *batches])
    assert histogram.counts.sum() == np.isfinite(together).sum()
    assert histogram.nan == np.isnan(together).sum()
    assert histogram.inf == np.isinf(together).sum()
    assert histogram.amax == np.abs(together[np.isfinite(together)]).max(initial=0)
    assert histogram.amax <= histogram.range or (histogram.range == 0 and histogram.amax <= 2.0**-139)


@given(values=floats)
def test_bins_follow_the_definition(values):
    magnitudes = np.abs(values)
    width = np.float32(magnitudes.max() / 2048)
    assume(width >= np.finfo(np.float32).tiny)  # below, it is rounded
    bins = np.minimum(np.floor(magnitudes / width), 2047).astype(int)
    np.testing.assert_array_equal(histogram_of(values).counts, np.bincount(bins, minlength=BINS))


@pytest.mark.parametrize("size", [1, 3, 4, 2047, 2048, 2049, 3 * 2048 + 5, 100_003])
def test_sizes_around_the_blocks(size):
    values = np.random.default_rng(size).standard_normal(size, dtype=np.float32)
    width = np.float32(np.abs(values).max() / 2048)
    bins = np.minimum(np.abs(values) / width, 2047).astype(int)
    np.testing.assert_array_equal(histogram_of(values).counts, np.bincount(bins, minlength=BINS))


def test_an_element_equal_to_the_range_falls_where_its_batch_finds_the_range():
    before = histogram_of([1.0], [1.0], [2.0])
    after = histogram_of([1.0], [2.0], [1.0])
    assert {int(i): int(before.counts[i]) for i in before.counts.nonzero()[0]} == {1023: 2, 2047: 1}
    assert {int(i): int(after.counts[i]) for i in after.counts.nonzero()[0]} == {1023: 1, 1024: 1, 2047: 1}


def assert_equal(found, expected):
    assert (found.range, found.amax, found.nan, found.inf) == (
        expected.range,
        expected.amax,
        expected.nan,
        expected.inf,
    )
    assert {int(i): int(found.counts[i]) for i in found.counts.nonzero()[0]} == {
        int(i): int(expected.counts[i]) for i in expected.counts.nonzero()[0]
    }


# Few values, so that batches often have an element equal to the range, from where a bin's width is no normal number on.
often_the_range = st.lists(
    st.sampled_from([0, 1, 1, 2, 4, 4096, 0.5, 2**-11, 3, 1.5, 0.3, np.nan, np.inf, 2.0**-115, 2.0**-138, 2.0**-141]),
    max_size=4,
)


@given(parts=st.lists(st.lists(often_the_range, max_size=4), max_size=6), lag=st.integers(1, 4))
@example(parts=[[[2397 * 2.0**-149]], [[5001 * 2.0**-149]], [[2048 * 2.0**-149]]], lag=2)  # the width is rounded
def test_parts_counted_apart_are_appended_to_the_same_counts(parts, lag):
    whole = histogram_of(*(batch for part in parts for batch in part))
    total, known = Histogram(), [0.0] * lag
    for part in parts:
        # A part knows the range of some time ago, as when several are under way.
        counted = histogram_of(*part, start=known[-lag])
        if not total.can_append(counted):
            assert known[-lag] == 0
            counted = histogram_of(*part, start=total.range)
        assert total.can_append(counted)
        total.append(counted)
        known.append(total.range)
    assert_equal(total, whole)


@given(batches=st.lists(often_the_range, min_size=3, max_size=3))
def test_parts_may_be_put_together_in_any_grouping(batches):
    first, second, third = (histogram_of(np.float32([1]), batch) for batch in batches)
    expected = histogram_of([1.0], batches[0], [1.0], batches[1], [1.0], batches[2])
    second.append(third)
    first.append(second)
    assert_equal(first, expected)


def test_an_element_equal_to_the_range_falls_in_a_part_where_it_would_in_one():
    total = histogram_of([1.0], [2.0])
    assert total.clamped == {1.0: 1, 2.0: 1}
    late, exceeded = histogram_of([1.0, -1.0], start=1.0), histogram_of([2.0], [4.0, 4.0], start=1.0)
    assert (late.clamped, exceeded.clamped) == ({1.0: 2}, {2.0: 1, 4.0: 2})
    total.append(late)  # after 2.0: not clamped
    total.append(exceeded)  # 2.0 is clamped: nothing before was larger
    assert {int(i): int(total.counts[i]) for i in total.counts.nonzero()[0]} == {511: 1, 512: 2, 1023: 2, 2047: 2}


def test_a_part_that_began_with_a_range_of_its_own_does_not_fit():
    total = histogram_of([3.0])
    assert not total.can_append(histogram_of([1.0]))
    assert total.can_append(histogram_of([1.0], start=3.0))
    assert total.can_append(histogram_of([100.0], start=6.0))
    assert total.can_append(histogram_of([0.0]))
    assert Histogram().can_append(histogram_of([1.0]))


def test_the_range_doubles_until_it_fits():
    histogram = histogram_of([1.0], [9.0])
    assert histogram.range == 16.0
    assert histogram.counts[2048 // 16 - 1] == 1
    assert histogram.counts[9 * 2048 // 16] == 1


def test_the_first_batch_that_is_not_all_0_sets_the_range():
    histogram = histogram_of([0.0, 0.0], [0.0], [3.0, 0.0])
    assert histogram.range == 3.0
    assert histogram.counts[0] == 4
    assert histogram.counts[2047] == 1


def test_the_range_may_exceed_what_float32_holds():
    histogram = histogram_of([3e38], [3.4e38])
    assert histogram.range == 2 * float(np.float32(3e38))
    assert histogram.counts.sum() == 2


def test_values_too_small_for_a_bin_width_are_counted():
    histogram = histogram_of([1e-44, 0.0])
    assert histogram.counts.sum() == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_counted_as_float32(dtype):
    values = np.linspace(-1, 1, 50).astype(dtype)
    histogram = Histogram()
    histogram.update(values)
    np.testing.assert_array_equal(histogram.counts, histogram_of(values.astype(np.float32)).counts)


def test_arrays_that_cannot_be_written():
    values = np.random.default_rng(0).standard_normal(100, dtype=np.float32)
    expected = histogram_of(values).counts
    values.flags.writeable = False
    np.testing.assert_array_equal(histogram_of(values).counts, expected)


def test_arrays_that_are_not_contiguous():
    values = np.random.default_rng(0).standard_normal((20, 30), dtype=np.float32)
    np.testing.assert_array_equal(histogram_of(values.T[::2]).counts, histogram_of(values.T[::2].copy()).counts)


def test_all_tensors_at_once():
    random = np.random.default_rng(0)
    batches = [{name: random.standard_normal(size) for name, size in (("a", 10), ("b", 5000))} for _ in range(3)]
    with Histograms(threads=2) as histograms:
        for batch in batches:
            histograms.update_all(batch)
    assert list(histograms) == ["a", "b"]
    for name, histogram in histograms.items():
        np.testing.assert_array_equal(histogram.counts, histogram_of(*(batch[name] for batch in batches)).counts)


def test_it_counts_where_the_compiled_loop_cannot_be_kept(tmp_path):
    shutil.copytree(Path(fastcal.__file__).parent, tmp_path / "fastcal", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fastcal" / "observe" / "__pycache__").touch()  # a file where the folder would be
    program = (
        "import fastcal.observe.histogram as h, numpy; x = h.Histogram(); x.update(numpy.ones(5)); print(x.counts[-1])"
    )
    nowhere = {
        "PYTHONPATH": str(tmp_path),
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "/dev/null",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=nowhere, cwd=tmp_path
    )
    assert done.stdout.strip() == "5"


def test_the_share_that_is_clipped():
    histogram = Histogram()
    assert histogram.clipped(1.0) == 0
    values = np.linspace(-1, 1, 200_001, dtype=np.float32)
    histogram.update(values)
    for threshold in (0.0, 0.3, 0.5, 0.99999, 1.0, 2.0):
        assert histogram.clipped(threshold) == pytest.approx(np.mean(np.abs(values) > threshold), abs=1e-4)
    assert histogram.below(np.array([0, 0.25, 1])) == pytest.approx([0, 50_000, 200_001], abs=30)
    zeros = Histogram()
    zeros.update(np.zeros(5, np.float32))
    assert zeros.clipped(0.0) == 0
