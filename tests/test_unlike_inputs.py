"""Inputs without a first dimension in common, and inputs that are the same for every sample."""

import json

import numpy as np
import onnx
import pytest
from PIL import Image

import fastcal
from fastcal import ArrayFeed, FastcalError, ImageFeed, NumpyFeed
from fastcal.cli.constants import read_constants

#: A recurrent network's step: the state has layers first, and the batch second.
RECURRENT = """f (float[N, 4] x, float[2, N, 4] h) => (float[N, 4] y)
{ s = ReduceSum<keepdims = 0>(h, axes) y = Add(x, s) }"""
AXES = {"axes": np.array([0])}

#: A network with three first dimensions: fixed, of one name, and of another.
POINTS = """f (float[B, 3, 4, 4] image, float[P, 2] points, float[2] size, float[B, 1] weight) => (float[2] y)
{ i = ReduceMean<keepdims = 0>(image) p = ReduceSum<keepdims = 0>(points) w = ReduceMean<keepdims = 0>(weight)
  a = Add(i, p) b = Add(a, w) y = Mul(size, b) }"""


def amax(model, feed):
    cache = fastcal.calibrate(model, feed, algorithm="minmax", backend="onnxruntime")
    return {name: 127 * scale for name, scale in cache.scales.items()}


def step(number, samples=3):
    return {"x": np.full((samples, 4), number, "f4"), "h": np.full((2, samples, 4), 10 * number, "f4")}


def points(number, images=2, weights=None):
    return {
        "image": np.full((images, 3, 4, 4), number, "f4"),
        "points": np.full((5 + number, 2), 1, "f4"),
        "size": np.array([3, 4], "f4"),
        "weight": np.zeros((images if weights is None else weights, 1), "f4"),
    }


def test_a_state_with_the_batch_second(onnx_file):
    model = onnx_file(RECURRENT, AXES)
    found = amax(model, [step(1), step(2), step(3, samples=2)])
    assert found == pytest.approx({"x": 3, "h": 30, "s": 60, "y": 63})
    assert amax(model, (step(number) for number in range(4))) == pytest.approx(found)
    with pytest.raises(FastcalError, match=r"takes input 'h' \(2, \?, 4\), the batches are \(3, 3, 4\)"):
        amax(model, [{"x": np.ones((2, 4), "f4"), "h": np.ones((3, 3, 4), "f4")}])


def test_first_dimensions_of_three_kinds(onnx_file):
    model = onnx_file(POINTS)
    found = amax(model, [points(0), points(1)])
    assert (found["p"], found["size"], found["y"]) == pytest.approx((12, 4, 52))
    progress = []
    fastcal.calibrate(model, [points(0), points(1, images=3)], backend="onnxruntime", progress=progress.append)
    assert progress[-1].images == 5
    with pytest.raises(FastcalError, match=r"batch 1 have first dimensions \[2, 3\]; one size is needed, the number"):
        amax(model, [points(0), points(1, weights=3)])


def test_an_array_feed_with_a_model(onnx_file):
    model = onnx_file(RECURRENT, AXES)
    with pytest.raises(FastcalError, match=r"first dimensions \[2, 3\]; .* with ArrayFeed\(batches, model=\.\.\.\)"):
        list(ArrayFeed([step(1)], device="cpu"))
    with ArrayFeed([(step(1)["x"], step(1)["h"], "a label")], model=model, device="cpu") as feed:
        assert (feed.batch_size, list(feed.shapes())) == (3, ["x", "h"])
    with ArrayFeed([step(1), step(2, samples=1)], model=model, device="cpu", last_batch="keep") as feed:
        assert [batch["x"].shape[0] for batch in feed] == [3, 1]


def test_a_last_batch_is_completed_where_the_arrays_count_samples(onnx_file):
    model = onnx_file("""f (float[N, 2] a, float[1, 3] b) => (float[N, 2] y)
    { s = ReduceMax<keepdims=0>(b) y = Add(a, s) }""")
    batches = [{"a": np.full((n, 2), n, "f4"), "b": np.full((1, 3), n, "f4")} for n in (4, 3)]
    with ArrayFeed(batches, model=model, device="cpu") as feed:
        last = [{name: array.copy() for name, array in batch.items()} for batch in feed][-1]
    np.testing.assert_array_equal(last["a"], [[3, 3]] * 3 + [[4, 4]])
    np.testing.assert_array_equal(last["b"], [[3, 3, 3]])


def test_numbers_alone(onnx_file):
    model = onnx_file("f (float a, float b) => (float y) { y = Add(a, b) }")
    assert amax(model, [{"a": np.float32(2), "b": np.float32(3)}] * 2) == pytest.approx({"a": 2, "b": 3, "y": 5})


@pytest.mark.parametrize("limit", [None, 1])
def test_files_whose_arrays_fit_exactly_are_batches(onnx_file, tmp_path, run_fastcal, limit):
    model = onnx_file("""f (float[1, 3, 4, 4] image, float[2] size, float[3, 1, 1] kernel) => (float[3, 4, 4] y)
    { i = Squeeze(image, zero) k = Mul(i, kernel) s = ReduceProd<keepdims = 0>(size) y = Mul(k, s) }""",
    {"zero": np.array([0])})  # fmt: skip
    (tmp_path / "data").mkdir()
    for number in (1, 2):
        arrays = {"image": np.full((3, 4, 4), number), "size": np.array([2, 3.0]), "kernel": np.ones((3, 1, 1), "f4")}
        np.savez(tmp_path / "data" / f"{number}.npz", **arrays)
    feed = NumpyFeed(tmp_path / "data", model=model, device="cpu", limit=limit)
    assert (len(feed), feed.samples, feed.batch_size) == (limit or 2, limit or 2, 1)
    assert amax(model, feed) == pytest.approx(
        {"image": limit or 2, "size": 3, "kernel": 1, "i": limit or 2, "k": limit or 2, "s": 6, "y": 6 * (limit or 2)}
    )
    done = run_fastcal("calibrate", model, tmp_path / "data", "-o", tmp_path / "c.cache")
    assert (done.returncode, "2 in 2 batches" in done.stdout) == (0, True)
    np.savez(tmp_path / "other.npz", **arrays | {"image": np.zeros((2, 3, 4, 4))})
    with pytest.raises(FastcalError, match="different numbers of samples, 'image' 2, 'size' 2, 'kernel' 3"):
        NumpyFeed(tmp_path / "other.npz", model=model)
    with pytest.raises(FastcalError, match="different numbers of samples, 'image' 2, 'size' 4, 'kernel' 6"):
        NumpyFeed(tmp_path / "data", model=model, batch_size=2)


@pytest.mark.parametrize("size", [0, -1, -9])
def test_sizes_below_one_are_dynamic(tmp_path, size):
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size, 3]) for name in "xay"]
    nodes = [onnx.helper.make_node("Abs", ["x"], ["a"]), onnx.helper.make_node("Neg", ["a"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[2:], value_info=value[1:2])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    model = fastcal.Model(tmp_path / "m.onnx")
    assert (model.inputs[0].shape, model.batch_size, model.sizes({"x": (4, 3)})) == (
        (None, 3),
        None,
        {"a": 48, "y": 48},
    )
    assert amax(model, [np.full((n, 3), n, "f4") for n in (4, 2)]) == pytest.approx({"x": 4, "a": 4, "y": 4})


SCALED = """f (float[N, 3, 8, 8] image, float[N, 2] scale, float[2] shift, int64[1] k) => (float[N, 2] y)
{ m = ReduceMean<axes = [1, 2, 3], keepdims = 0>(image) u = Unsqueeze(m, one) s = Mul(u, scale) c = Cast<to = 1>(k)
  t = Add(s, shift) y = Mul(t, c) }"""
ONE = {"one": np.array([1])}


@pytest.fixture
def scaled(onnx_file, tmp_path):
    for level in (10, 20, 30):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{level}.png")
        np.save(tmp_path / f"{level}.npy", np.full((1, 3, 8, 8), level, "f4"))
    return onnx_file(SCALED, ONE)


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_constants_at_the_command_line(scaled, tmp_path, run_fastcal, kind):
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "shift.npy", np.array([0.5, 5]))
    options = ("--preprocess", "raw") if kind == "png" else ()
    done = run_fastcal(
        "calibrate", scaled, tmp_path / f"*.{kind}", "-o", tmp_path / "c.cache", "--algorithm", "minmax", *options,
        "--constant", "scale=1,2", "--constant", f"shift={tmp_path}/arrays/shift.npy", "--constant", "k=3", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scales = fastcal.CalibrationCache.load(tmp_path / "c.cache").scales
    found = {name: 127 * scales[name] for name in ("image", "scale", "shift", "s", "y")}
    assert found == pytest.approx({"image": 30, "scale": 2, "shift": 5, "s": 60, "y": 195}, rel=1e-6)
    record = json.loads((tmp_path / "c.cache.json").read_text())["made_from"]["samples"]
    again = run_fastcal(
        "cache", "check", tmp_path / "c.cache", scaled, tmp_path / f"*.{kind}", *options,
        "--constant", "scale=1,3", "--constant", f"shift={tmp_path}/arrays/shift.npy", "--constant", "k=3",
    )  # fmt: skip
    assert (again.returncode, "stale      samples" in again.stdout, bool(record)) == (1, True, True)


def test_a_constant_of_one_sample_is_repeated(scaled, tmp_path):
    constants = {"scale": np.array([[1.0, 2]]), "shift": np.zeros(2), "k": np.array([1])}
    for feed in (
        ImageFeed(
            str(tmp_path / "*.png"), model=scaled, preprocess="raw", constants=constants, batch_size=2, device="cpu"
        ),
        NumpyFeed(str(tmp_path / "*.npy"), model=scaled, constants=constants, batch_size=2, device="cpu"),
    ):
        with feed:
            shapes = [{name: array.shape for name, array in batch.items()} for batch in feed]
        assert shapes[0] == {"image": (2, 3, 8, 8), "scale": (2, 2), "shift": (2,), "k": (1,)}


@pytest.mark.parametrize(
    ("given", "shape", "dtype", "expected"),
    [
        ("x=7", (None, 2), "f4", [[7, 7]]),
        ("x=1,2", (2,), "f2", [1, 2]),
        ("x=1,2", (1, 2), "i8", [[1, 2]]),
        ("x=1,2,3,4", (2, 2), "f4", [[1, 2], [3, 4]]),
        ("x=1,2,3,4", (None, 2), "f4", [[1, 2], [3, 4]]),
        ("x=1,2,3", (None,), "i4", [1, 2, 3]),
        ("x=-1e3", (), "f4", -1000),
        ("x=1", (3,), "?", [True] * 3),
        (f"x={2**53 + 1}", (1,), "i8", [2**53 + 1]),
    ],
)
def test_numbers_take_the_inputs_shape_and_type(given, shape, dtype, expected):
    found = read_constants([given], Network(shape, dtype))["x"]
    assert (found.tolist(), found.dtype) == (expected, np.dtype(dtype))


class Network:
    """A network of one input."""

    def __init__(self, shape, dtype):
        self.inputs = (fastcal.Input("x", shape, np.dtype(dtype)),)


@pytest.mark.parametrize(
    ("given", "shape", "dtype", "message"),
    [
        (["x"], (1,), "f4", r"--constant x: write NAME=NUMBER,NUMBER or NAME=FILE.npy, with one of the inputs 'x'"),
        (["y=1"], (1,), "f4", r"--constant y=1: write NAME"),
        (["x=1", "x=2"], (1,), "f4", r"--constant gives input 'x' twice"),
        (
            ["x=1,2"],
            (3,),
            "f4",
            r"--constant x=1,2 has 2 numbers, and the input is 'x' \(3\); give that many, or one for",
        ),
        (["x=1,2"], (None, None), "f4", r"has 2 numbers"),
        (["x=a"], (1,), "f4", r"--constant x=a: could not convert.*; the input takes float32"),
        (["x=1.5"], (1,), "i8", r"--constant x=1.5: invalid literal.*; the input takes int64"),
        (["x=300"], (1,), "u1", r"--constant x=300: .*; the input takes uint8"),
        (["x=nan"], (1,), "f4", r"--constant x=nan: give numbers that float32 can hold"),
        (["x=none.npy"], (1,), "f4", r"--constant x: cannot read none.npy: No such file or directory"),
    ],
)
def test_constants_that_do_not_fit(given, shape, dtype, message):
    with pytest.raises(FastcalError, match=message):
        read_constants(given, Network(shape, dtype))


def test_a_constant_in_a_file_that_its_input_cannot_hold(tmp_path):
    np.save(tmp_path / "x.npy", np.array([2**40]))
    with pytest.raises(FastcalError, match=r"x.npy takes input 'x' as int32, which cannot hold 1099511627776"):
        read_constants([f"x={tmp_path}/x.npy"], Network((1,), "i4"))
