import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcal.accuracy.amplified import Amplified
from fastcal.accuracy.labels import TopOne
from fastcal.accuracy.masks import Masks
from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.tuning.choice import best, expected_noises, fewest, in_order, rank_groups, within
from fastcal.tuning.curve import Curve
from fastcal.tuning.layers import Layer, depthwise_in, layers_of
from fastcal.tuning.meter import Errors


def layers(*multiply_adds):
    return [Layer(number, f"layer {number}", f"y{number}", float(cost)) for number, cost in enumerate(multiply_adds)]


@given(st.integers(1, 70), st.integers(0, 80), st.integers(0, 80))
def test_the_first_that_suffices_is_found_with_few_tries(count, least, guess):
    lengths, tried = list(range(count)), []
    found = fewest(lengths, lambda length: tried.append(length) or length >= least, guess)
    assert found == min(least, lengths[-1])
    assert len(tried) == len(set(tried))
    assert len(tried) <= 3 + 2 * math.log2(1 + abs(guess - least))


def test_noises_of_layers_add_up():
    assert expected_noises([1.0, 5.0, 0.0, 3.0], [1, 3], 2.0).tolist() == [18.0, 8.0, 2.0]
    assert expected_noises([1.0, 5.0], [1, 0], 0.5).tolist() == [6.0, 1.0, 0.0]


def test_orders_begin_with_the_worst_and_leave_out_what_costs_nothing():
    by_noise, by_cost = in_order(layers(100, 10, 0, 50), [3.0, 1.0, 0.1, 0.0])
    assert by_noise == [0, 1, 2]
    assert by_cost == [1, 2, 0]  # an Add counts as one multiply-add


def test_layers_in_float_keep_within_the_share():
    found = layers(100, 10, 0, 50, 40)
    noises = [5.0, 3.0, 1.0, 0.01, 2.0]
    assert within(found, [0, 1, 4, 2, 3], noises, 0.15) == [1, 2]  # 30 of 200, and 3 has too little noise
    assert within(found, [0, 1, 4, 2, 3], noises, 0.2) == [1, 2]  # after 1, 30 of 40 are left
    assert within(found, [0, 1, 4, 2, 3], noises, 0.25) == [1, 4, 2]
    assert within(found, [0, 1, 4, 2, 3], noises, 0.0) == [2]
    assert within(found, [0, 1, 4, 2, 3], noises, 1.0) == [0, 1, 4, 2]


def test_multiply_adds_are_those_of_the_definitions(onnx_file):
    constants = {
        "w1": np.ones((6, 3, 3, 3), "f4"), "w2": np.ones((6, 1, 3, 3), "f4"), "w3": np.ones((6, 4, 2, 2), "f4"),
        "w4": np.ones((5, 64), "f4"), "rows": np.array([0, -1], np.int64),
    }  # fmt: skip
    model = Model(onnx_file("""
        net (float[N, 3, 10, 10] x) => (float[N, 5] y, float[N, 4, M] z) {
            a = Conv(x, w1) b = Conv<group = 6>(a, w2) c = ConvTranspose<strides = [2, 2]>(b, w3)
            p = AveragePool<kernel_shape = [3, 3], strides = [3, 3]>(c) f = Flatten(p) y = Gemm<transB = 1>(f, w4)
            q = Flatten<axis = 2>(p) t = Transpose<perm = [0, 2, 1]>(q) z = MatMul(q, t)
        }""", constants))  # fmt: skip
    shapes = {"x": (2, 3, 10, 10), "a": (2, 6, 8, 8), "b": (2, 6, 6, 6), "c": (2, 4, 12, 12), "p": (2, 4, 4, 4),
              "f": (2, 64), "y": (2, 5), "q": (2, 4, 16), "t": (2, 16, 4), "z": (2, 4, 4)}  # fmt: skip
    graph = Graph(model)
    found = {layer.output: layer.multiply_adds for layer in layers_of(graph, [0, 1, 2, 3, 5, 8], shapes, 2)}
    assert found == {
        "a": 6 * 8 * 8 * 3 * 3 * 3, "b": 6 * 6 * 6 * 3 * 3, "c": 6 * 6 * 6 * 4 * 2 * 2, "p": 0, "y": 64 * 5,
        "z": 4 * 4 * 16,
    }  # fmt: skip
    assert depthwise_in(graph) == {1}


def test_depthwise_is_one_channel_for_each_of_several_groups(onnx_file):
    shapes = {"w1": (4, 1, 1, 1), "w2": (4, 2, 1, 1), "w3": (1, 1, 1, 1), "w4": (8, 1, 1, 1), "w5": (4, 3, 1, 1)}
    constants = {name: np.ones(shape, "f4") for name, shape in shapes.items()}
    model = Model(onnx_file("""
        net (float[N, 4, 4, 4] x, float[N, 1, 4, 4] z, float[M, N, 1, 1] w) => (float[N, 4, 4, 4] y) {
            a = Conv<group = 4>(x, w1) b = Conv<group = 2>(x, w2) c = Conv(z, w3) d = Conv<group = 4>(x, w4)
            e = ConvTranspose<group = 4>(x, w5) f = ConvTranspose<group = 2>(x, w2) y = Conv<group = 4>(x, w)
        }""", constants))  # fmt: skip
    assert depthwise_in(Graph(model)) == {0, 3, 4}


class AdditiveMeter:
    """Layers whose noises add up, whatever the scales are."""

    def __init__(self, noises, *multiply_adds):
        self.layers, self._noises = layers(*multiply_adds), np.array(noises)

    def choice(self, is_int8):
        return np.full(len(self.layers), is_int8)

    def errors(self, is_int8, scales, metrics=()):
        noise = float(self._noises[is_int8].sum())
        return Errors({"y": noise}, noise)


@pytest.mark.parametrize(("noises", "in_float"), [([0.13, 0.06, 0.06], [0]), ([0.11, 0.06, 0.06], [1, 2])])
def test_of_the_two_orders_the_one_with_less_noise_wins(noises, in_float):
    meter = AdditiveMeter(noises, 100, 50, 50)
    assert sorted(Curve(meter, {}, None, None).choose(noises, 0.5)) == in_float


def test_layers_are_not_left_in_float_if_int8_is_good_enough():
    noises = [1e-4, 2e-3, 3e-4]
    meter = AdditiveMeter(noises, 100, 50, 50)
    assert Curve(meter, {}, None, None).choose(noises, 1.0) == [1]
    assert Curve(AdditiveMeter([1e-4, 1e-4, 3e-4], 100, 50, 50), {}, None, None).choose([1e-4, 1e-4, 3e-4], 1.0) == []


@pytest.mark.parametrize(("target", "count"), [(0.5, 0), (0.79, 1), (0.93, 2), (0.999, 3)])
def test_a_target_takes_the_fewest_layers_of_an_order(target, count):
    noises = [0.03, 0.15, 0.01, 0.1, 0.02]
    meter = AdditiveMeter(noises, 10, 10, 10, 10, 10)
    found = Curve(meter, {}, None, target).choose(noises, 0.0)
    assert found == [1, 3, 0, 4][: count if count < 3 else 4]  # the last one stays in INT8, whatever is asked for


def test_a_target_adds_to_the_layers_that_stay_in_float_without_one():
    noises = [0.03, 0.15, 0.01, 0.1, 0.02]
    meter = AdditiveMeter(noises, 10, 10, 10, 10, 10)
    without = Curve(meter, {}, None, None).choose(noises, 0.4)
    assert without == [1, 3]
    for target, expected in ((0.5, [1, 3]), (0.92, [1, 3]), (0.96, [1, 3, 0])):
        assert Curve(meter, {}, None, target).choose(noises, 0.4) == expected


@pytest.mark.parametrize(("factor", "expected"), [(1, 0.98), (4, 0.985)])
def test_larger_errors_tell_more_of_few_samples(factor, expected):
    """Of 100 samples whose leads are 0 to 99, errors of 1.5 change two, and errors of 6 change six."""
    leads = np.arange(100.0)
    exact, error = np.stack([leads, np.zeros(100)], 1), np.tile([0, 1.5], (100, 1))
    metric = Amplified(TopOne("y", 2), factor)
    metric.add({"y": exact}, {"y": exact + error}, 100)
    assert metric.value == pytest.approx(expected)
    assert metric.fresh().value is None
    assert metric.name == "top-1"


@pytest.mark.parametrize(("has_more", "expected", "count"), [(False, 13, 2), (True, 11, 10)])
def test_few_choices_are_measured(has_more, expected, count):
    """Each layer has 0.8 times the noise of the one before.

    So 11 layers are the first to leave less than 0.001, and 13 less than 0.0006, which suffices for about sure.
    """
    noises = [0.002 * 0.8**number for number in range(40)]
    curve = Curve(AdditiveMeter(noises, *[10] * 40), {}, None, None, has_more=has_more)
    assert curve.choose(noises, 1.0) == [*range(expected)]
    # One to begin with, and 13; or 12, 10 and 11 too, and 0, 1, 2, 4 and 8.
    assert len(curve.points) == count


def test_all_layers_that_are_worth_it_stay_in_float_if_they_just_suffice():
    """With both in float 0.0008 is left, with one 0.0048."""
    noises = [0.004, 0.004, *[0.00008] * 10]
    curve = Curve(AdditiveMeter(noises, *[10] * 12), {}, None, None)
    assert curve.choose(noises, 1.0) == [0, 1]
    assert len(curve.points) == 1


@pytest.mark.parametrize(
    ("ranked", "real", "has_more", "expected"),
    [
        ([0.01, 0.002, 0.0001], [0.01, 0.0004, 0.0001], False, [0, 1]),  # with 0 alone, 0.0021 are expected
        ([0.01, 0.002, 0.0001], [0.01, 0.0004, 0.0001], True, [0]),
        ([0.01, 0.0004, 0.0001], [0.01, 0.002, 0.0001], False, [0, 1]),  # 0.0005 are expected, and it is 0.0021
        ([0.01, 0.0004, 0.0001], [0.01, 0.002, 0.0001], True, [0, 1]),
    ],
)
def test_a_number_that_suffices_as_expected_is_taken_unless_there_is_time(ranked, real, has_more, expected):
    curve = Curve(AdditiveMeter(real, 10, 10, 10), {}, None, None, has_more=has_more)
    assert curve.choose(ranked, 1.0) == expected


class LeadMeter(AdditiveMeter):
    """Noises that take so much from the leads of 40 samples, which are 0.5, 1.5, 2.5 ..."""

    samples = 40

    def errors(self, is_int8, scales, metrics=()):
        found = super().errors(is_int8, scales)
        exact = np.stack([np.arange(40) + 0.5, np.zeros(40)], 1)
        for metric in metrics:
            metric.add({"y": exact}, {"y": exact - [found.noise, 0]}, 40)
        return found


@pytest.mark.parametrize(("target", "count"), [(0.95, 1), (0.99, 3)])
def test_a_target_is_reached_with_larger_errors_too(target, count):
    """0.99 allows 0.4 of 40 samples to differ: with errors of 1.5 / 0.4 = 3.75 times the size, at most one.

    With two layers in float, the noise of 0.45 changes no sample, and two if it is 3.75 times as large.
    """
    noises = [3.0, 0.3, 0.25, 0.2]
    found = Curve(LeadMeter(noises, 10, 10, 10, 10), {}, TopOne("y", 2), target).choose(noises, 0.0)
    assert found == [*range(count)]


class MaskMeter(AdditiveMeter):
    """Noises that take so many of 100 pixels from the mask of every second image."""

    samples = 40

    def errors(self, is_int8, scales, metrics=()):
        found = super().errors(is_int8, scales)
        exact = np.ones((40, 10, 10), "f4")
        other = exact.copy()
        other[::2].reshape(20, 100)[:, : round(found.noise)] = 0
        for metric in metrics:
            metric.add({"y": exact}, {"y": other}, 40)
        return found


@pytest.mark.parametrize(("target", "count"), [(0.931, 0), (0.932, 1), (0.944, 1), (0.968, 1), (0.97, 2), (0.974, 2)])
def test_masks_reach_a_target_by_standard_errors_more(target, count):
    """IoUs of 1 and 1 - p: the mean is 1 - p / 2, 1.5 standard errors are 1.5 * p / 2 / sqrt(39)."""
    meter = MaskMeter([6.0, 4.0, 1.0], 10, 10, 10)
    found = Curve(meter, {}, Masks("y", None, False), target).choose([6.0, 4.0, 1.0], 0.0)
    assert found == [0, 1, 2][:count]


class CountingMeter(AdditiveMeter):
    """Counts runs; `combine` computes the noise of several layers from their own."""

    def __init__(self, noises, combine=np.sum):
        super().__init__(noises, *[1] * len(noises))
        self._combine, self.runs = combine, 0

    def noise(self, is_int8, scales):
        self.runs += 1
        return float(self._combine(self._noises[is_int8]))


def ranked(meter):
    return rank_groups(meter, {}, lambda done, of: None)


def test_groups_of_layers_that_cost_little_are_not_told_apart():
    noises = np.full(64, 1e-6)
    noises[[3, 20, 42]] = 0.5, 0.009, 0.1  # 20 has 1.5 percent of the noise at most
    meter, told = CountingMeter(noises), []
    found = rank_groups(meter, {}, lambda done, of: told.append((done, of)))
    # Eight groups; 4-7, and each of 0-3; 44-47, and each of 40-43.
    assert meter.runs == 8 + 5 + 5
    noises[16:24] = noises[16:24].mean()
    np.testing.assert_allclose(found, noises, rtol=1e-6)
    assert told[-1] == (64, 64)
    assert told == sorted(told)
    np.testing.assert_allclose(ranked(CountingMeter([0.2, 0.1])), [0.2, 0.1])
    silent = CountingMeter(np.zeros(64))
    assert ranked(silent) == [0.0] * 64
    assert silent.runs == 8


@given(st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.5]), min_size=1, max_size=40))
def test_layers_that_cost_something_are_told_apart(noises):
    meter = CountingMeter(noises)
    found = ranked(meter)
    assert len(found) == len(noises)
    assert sum(found) == pytest.approx(sum(noises))
    for layer, noise in zip(found, noises, strict=True):
        if noise > 0.0151 * sum(noises):
            assert layer == pytest.approx(noise)


def test_layers_are_told_apart_with_fewer_runs_than_layers():
    """One of each eight layers costs something, like the attention's second product in a transformer."""
    noises = np.where(np.arange(96) % 8 == 5, 1e-3, 1e-6)
    meter = CountingMeter(noises)
    found = np.array(ranked(meter))
    np.testing.assert_allclose(found[noises == 1e-3], 1e-3)
    assert meter.runs < 80


def test_four_layers_are_not_halved():
    noises = np.zeros(16)
    noises[[0, 3]] = 0.5
    meter = CountingMeter(noises)
    np.testing.assert_array_equal(ranked(meter), noises)
    assert meter.runs == 4 + 4


def test_a_small_rest_is_measured():
    """The noise of several layers is that of the noisiest: two equal ones hide each other."""
    noises = np.zeros(36)
    noises[[0, 5]] = 0.5
    meter = CountingMeter(noises, np.max)
    np.testing.assert_array_equal(ranked(meter), noises)
    assert meter.runs == 6 + 2 + 6  # six groups, both halves of 0-5, and their layers


class TableMeter(AdditiveMeter):
    """Noises by the scale of x, after each batch."""

    def __init__(self, table, sizes):
        super().__init__([1.0], 1)
        self._table, self._sizes, self.samples, self.runs = table, sizes, sum(sizes), 0

    def growing(self, is_int8, scales):
        assert is_int8.all()
        samples = 0
        for size, noise in zip(self._sizes, self._table[scales["x"]], strict=True):
            samples += size
            self.runs += 1
            yield samples, noise


@pytest.mark.parametrize(
    ("sizes", "table", "expected", "runs"),
    [
        # After 4 samples, the third has more than 1 + 5 / 4 times the least; the fourth has less.
        ((4, 4), {1.0: (0.1, 0.15), 2.0: (0.12, 0.11), 3.0: (0.226, 0.01), 4.0: (0.224, 0.3)}, 2.0, 4 + 3),
        # After 8, the second has more than 1 + 5 / 8 times the least, and the first is left.
        ((8, 4), {1.0: (0.1, 0.15), 2.0: (0.163, 0.01)}, 1.0, 2),
        # Noise over fewer samples does not count.
        ((8, 4), {1.0: (0.1, 0.3), 2.0: (0.1, 0.4), 3.0: (0.17, 0.0)}, 1.0, 5),
        # After 16, the comparison ends.
        ((4, 4, 8, 8), {1.0: (0.1, 0.1, 0.12, 0.1), 2.0: (0.12, 0.12, 0.11, 0.2)}, 2.0, 6),
        ((2,), {1.0: (0.0,), 2.0: (0.1,)}, 1.0, 2),
        ((2, 2), {1.0: (0.0, 0.1), 2.0: (0.0, 0.0)}, 2.0, 4),
    ],
)
def test_close_algorithms_are_compared_on_more_samples(sizes, table, expected, runs):
    meter = TableMeter(table, sizes)
    name, scales = best(meter, {str(scale): {"x": scale} for scale in table})
    assert (name, scales) == (str(expected), {"x": expected})
    assert meter.runs == runs
