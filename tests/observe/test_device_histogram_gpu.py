"""The histograms taken on a GPU, against the definition in NumPy."""

from collections import Counter

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


def expected(batches, start=0.0):
    """Counts, range, amax and clamped by the definition, bin by bin; NaN and Inf left out."""
    counts, top, amax, clamped = np.zeros(2048, np.int64), start, 0.0, Counter()
    for batch in batches:
        values = np.abs(batch[np.isfinite(batch)]).ravel()
        largest = float(values.max(initial=0))
        amax = max(amax, largest)
        top = top or 2048 * float(np.float32(largest / 2048))
        while top and largest > top:
            counts = np.concatenate([counts[0::2] + counts[1::2], np.zeros(1024, np.int64)])
            top *= 2
        width = np.float32(top / 2048)
        with np.errstate(all="ignore"):
            bins = np.minimum(values / width, 2047).astype(int) if width > 0 else np.zeros(values.size, int)
        counts += np.bincount(bins, minlength=2048)
        if top:
            clamped[top] += int((values == top).sum())
    return counts, top, amax, +clamped


def check(batches_by_name, offset=0, starts=None):
    """Count batches of several tensors on the GPU and compare; offset elements misalign the arrays."""
    import cupy

    from fastcal.observe.device_histograms import DeviceHistograms

    histograms = DeviceHistograms(list(batches_by_name))
    if starts is not None:
        histograms.update_all({name: cupy.full(7, 5, np.float32) for name in batches_by_name})
        histograms.begin(starts)
    for batches in zip(*batches_by_name.values(), strict=True):
        arrays = {}
        for name, batch in zip(batches_by_name, batches, strict=True):
            array = cupy.empty(batch.size + offset, np.float32)[offset:]
            array[:] = cupy.asarray(batch.ravel())
            arrays[name] = array
        histograms.update_all(arrays)
    found = histograms.fetch()
    assert list(found) == list(batches_by_name)
    for name, batches in batches_by_name.items():
        start = (starts or {}).get(name, 0.0)
        counts, top, amax, clamped = expected(batches, start)
        assert np.array_equal(found[name].counts, counts), name
        assert (found[name].start, found[name].range, found[name].amax) == (start, top, amax), name
        assert found[name].clamped == clamped, name
        assert found[name].nan == sum(int(np.isnan(batch).sum()) for batch in batches)
        assert found[name].inf == sum(int(np.isinf(batch).sum()) for batch in batches)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_every_size_and_alignment(offset):
    random = np.random.default_rng(offset)
    sizes = [1, 2, 3, 4, 5, 127, 2047, 2049, 131071, 131072, 131073, 131076, 500009]
    check({str(n): [random.standard_normal(n, dtype="f4") for _ in range(3)] for n in sizes}, offset)


def test_ranges_that_double():
    random = np.random.default_rng(1)
    batches = {
        str(factors): [np.float32(f) * random.standard_normal(4000, dtype="f4") for f in factors]
        for factors in ([1, 1.9, 1], [1, 4, 3], [1e-3, 1, 1000], [1, 1e9, 1], [1e-30, 1, 1e30], [5, 1, 11])
    }
    check(batches)


def test_an_element_equal_to_the_range_before_and_after_it_doubles():
    check({"x": [np.float32([1, 0.3]), np.float32([1, 0.5]), np.float32([1, 2]), np.float32([2, 1])]})


def test_it_begins_anew_with_the_ranges_that_batches_before_have_set():
    batches = [np.float32([1, 0.3, 2, 2]), np.float32([1, 4]), np.float32([4, 9])]
    tensors = {"known": batches, "above all": batches, "unknown": batches, "zero": [np.zeros(5, "f4")] * 3}
    check(tensors, starts={"known": 1.0, "above all": 64.0, "zero": 3.0})
    check(tensors, starts={})


def test_zeros_first_and_for_ever():
    zeros = np.zeros(70000, "f4")
    check({"x": [zeros, zeros, np.float32([0, 3]).repeat(35000), zeros], "always": [zeros] * 4, "minus": [-zeros] * 4})


def test_nan_and_infinity_are_counted_and_left_out():
    random = np.random.default_rng(2)
    batches = [random.standard_normal(100000, dtype="f4") for _ in range(3)]
    batches[0][[5, 70000]] = np.nan
    batches[1][[6, 7, 8]] = [np.inf, -np.inf, np.inf]
    check({"x": batches, "nothing else": [np.full(9, np.nan, "f4")] * 3})


@pytest.mark.parametrize("top", [1.0, 3.0, 0.1, 1e-20, 1e-35, 1.5e-42, 1e30, 3.4e38, 2048 * (2 - 2**-23)])
def test_edges_of_bins_as_a_cpu_divides(top):
    width = np.float32(np.float64(np.float32(top)) / 2048)
    edges = np.arange(1, 2048, dtype="f4") * width
    around = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(top))])
    random = np.random.default_rng(3)
    check({"x": [np.float32([top]), around[around <= np.float32(top)], np.float32(top) * random.random(300000, "f4")]})


def test_values_of_any_magnitude():
    random = np.random.default_rng(4)
    bits = random.integers(0, 1 << 32, (20, 50000), dtype=np.uint64).astype(np.uint32)
    with np.errstate(all="ignore"):
        check({str(row): [values[:25000], values[25000:]] for row, values in enumerate(bits.view("f4"))})


def test_parts_of_the_tensors_at_a_time():
    import cupy

    from fastcal.observe.device_histograms import DeviceHistograms

    histograms = DeviceHistograms(["a", "b", "never"])
    for _ in range(2):
        histograms.update_all({"b": cupy.ones(10, np.float32)})
        histograms.update_all({"a": cupy.full(5, 2, np.float32)})
    histograms.update_all({"a": cupy.empty((0, 3), np.float32)})
    found = histograms.fetch()
    assert [int(found[name].counts[2047]) for name in found] == [10, 20, 0]
    assert [found[name].range for name in found] == [2, 1, 0]
