"""Networks that run in segments, one after another."""

import subprocess
import sys
import weakref

import numpy as np
import onnx
import pytest

from conftest import DIGITS, SQUEEZENET, needs_squeezenet
from fastcal.model import Model
from fastcal.observe.segments import cut
from fastcal.observe.with_onnxruntime import PartedRunner

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 4), dtype="f4")
W = RANDOM.standard_normal((4, 4), dtype="f4")

BRANCHES = """f (float[N, 4] x) => (float[N, 4] y) {
  a = MatMul(x, w)
  b = Relu(a)
  s = ReduceSum<keepdims = 0>(b)
  c = Cast<to = 9>(s)
  d = If(c) <then_branch = t () => (float[N, 4] t) { u = Add(a, b) t = MatMul(u, v) },
             else_branch = e () => (float[N, 4] e) { e = Neg(x) }>
  y = Sub(d, a)
}"""

LOOP = """f (float[N, 4] x) => (float[N, 4] y) {
  a = MatMul(x, w)
  b = Relu(a)
  n = Constant<value_int = 3>()
  l = Loop(n, , b) <body = g (int64 i, bool on, float[N, 4] k) => (bool go, float[N, 4] o) {
    go = Identity(on)
    o = Add(k, a)
  }>
  y = Mul(l, a)
}"""

SEQUENCE = """f (float[N, 4] x) => (float[N, 2] y) {
  a = Relu(x)
  s = SplitToSequence<axis = 1>(a, two)
  b = Neg(a)
  p = SequenceAt(s, one)
  c = Exp(b)
  q = SequenceAt(s, zero)
  y = Add(p, q)
}"""

TYPES = """f (float[N, 4] x) => (float[N, 4] y, int64[N] i) {
  h = Cast<to = 10>(x)
  m = Greater(h, h0)
  g = Relu(h)
  z = Where(m, g, h0)
  d = Cast<to = 11>(z)
  i = ArgMax<axis = 1, keepdims = 0>(d)
  k = Unsqueeze(i, one)
  f = Cast<to = 1>(k)
  e = Cast<to = 1>(d)
  y = Add(e, f)
}"""

CONSTANTS = """f (float[N, 4] x, float[4, 4] w) => (float[N, 4] y) {
  k = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
  t = Transpose(w)
  a = MatMul(x, t)
  b = Add(a, k)
  c = MatMul(b, w)
  y = Mul(c, k)
}"""

NETWORKS = {
    "branches": (BRANCHES, {"w": W, "v": W.T}),
    "loop": (LOOP, {"w": W}),
    "sequence": (SEQUENCE, {"two": np.int64(2), "one": np.int64(1), "zero": np.int64(0)}),
    "types": (TYPES, {"h0": np.float16(0), "one": np.int64([1])}),
    "constants": (CONSTANTS, {"w": W}),
}


def all_values(model, batch, memory):
    """The values of all tensors, and the number of segments; each tensor comes once."""
    found = {}
    with PartedRunner(model, memory=memory) as runner:
        for values in runner.run(batch):
            assert found.keys().isdisjoint(values)
            found |= values
        assert list(found) == runner.tensors
        return found, len(runner._runners)


def check_equal(model, batch, memory=1):
    """Check that the values in segments are those of the whole, to the last bit; return the number of segments."""
    whole, one = all_values(model, batch, 1 << 40)
    parted, several = all_values(model, batch, memory)
    assert one == 1
    assert whole.keys() == parted.keys()
    for name, values in whole.items():
        assert values.dtype == parted[name].dtype
        assert values.shape == parted[name].shape
        assert values.tobytes() == parted[name].tobytes(), name
    return several


@pytest.mark.parametrize(
    ("name", "expected"), [("branches", 5), ("loop", 4), ("sequence", 2), ("types", 7), ("constants", 5)]
)
def test_values_are_those_of_the_whole(onnx_file, name, expected):
    text, arrays = NETWORKS[name]
    model = Model(onnx_file(text, arrays))
    assert check_equal(model, {"x": X}) == expected
    assert check_equal(model, {"x": X}, 3 * X.nbytes) <= expected


@needs_squeezenet
@pytest.mark.parametrize("memory", [1, 1 << 24])
def test_convolutions_to_the_last_bit(memory):
    batch = {"input": np.random.default_rng(1).standard_normal((4, 3, 224, 224), dtype="f4")}
    assert check_equal(Model(SQUEEZENET), batch, memory) > 2


def test_weights_in_other_files(tmp_path):
    model = onnx.load(DIGITS / "digits.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    batch = {"image": np.random.default_rng(1).standard_normal((4, 3, 32, 32), dtype="f4")}
    assert check_equal(Model(tmp_path / "m.onnx"), batch) > 5


def test_the_unknown_end_is_left_out(onnx_file):
    text = "f (float[N, 4] x) => (float[N, 4] y) { a = Relu(x) b = Exp(a) c = OnlyElsewhere(b) y = Neg(c) }"
    assert check_equal(Model(onnx_file(text)), {"x": X}) == 2


#: ONNX cannot infer the shape that the square root of a square gives.
HIDDEN = """f (float[N, 4] x) => (float[N, M] y) {
  s = Shape(x) f = Cast<to = 1>(s) q = Mul(f, f) r = Sqrt(q) t = Cast<to = 7>(r)
  a = Reshape(x, t) b = Exp(a) c = Relu(b) y = Neg(c)
}"""


def test_shapes_that_cannot_be_inferred_are_found_out_with_one_sample(onnx_file):
    model = Model(onnx_file(HIDDEN))
    assert "b" not in model.sizes({"x": (3, 4)})
    assert check_equal(model, {"x": X}, 2 * X.nbytes) == 3  # with s, f, q, r and t
    fixed = Model(onnx_file(HIDDEN.replace("[N, 4] x", "[3, 4] x").replace("[N, M]", "[P, M]"), name="fixed.onnx"))
    assert check_equal(fixed, {"x": X}, 2 * X.nbytes) == 1  # no sample can run alone


def names_of(segments):
    return [[node.output[0] for node in segment.nodes] for segment in segments]


def cut_text(text, sizes, memory, types=None):
    graph = onnx.parser.parse_graph(text)
    names = {name for node in graph.node for name in node.output}
    return cut(graph, sizes, dict.fromkeys(names, "tensor(float)") | (types or {}), memory)


CHAIN = "f (float[4] x) => (float[4] d) { a = Relu(x) b = Exp(a) c = Neg(b) d = Add(c, a) }"


@pytest.mark.parametrize(
    ("sizes", "memory", "expected"),
    [
        ({"a": 2, "b": 2, "c": 2, "d": 2}, 8, ["abcd"]),
        ({"a": 2, "b": 2, "c": 2, "d": 2}, 7, ["abc", "d"]),
        ({"a": 2, "b": 2, "c": 2, "d": 2}, 4, ["ab", "cd"]),
        ({"a": 2, "b": 9, "c": 1, "d": 1}, 4, ["a", "b", "cd"]),
        ({"b": 1}, 0, ["abcd"]),
        ({}, 1, ["abcd"]),
    ],
)
def test_segments_are_as_few_as_fit(sizes, memory, expected):
    assert names_of(cut_text(CHAIN, sizes, memory)) == [list(names) for names in expected]


def test_segments_name_what_they_pass_on():
    segments = cut_text(CHAIN, {"a": 1, "b": 1, "c": 1, "d": 1}, 1)
    assert [list(segment.received) for segment in segments] == [[], ["a"], ["b"], ["c", "a"]]
    assert [segment.later - {"x"} for segment in segments] == [{"a", "b", "c"}, {"a", "b", "c"}, {"a", "c"}, set()]


def test_a_type_that_numpy_lacks_is_not_passed_on():
    sizes = {"a": 1, "b": 1, "c": 1, "d": 1}
    assert names_of(cut_text(CHAIN, sizes, 1, {"b": "seq(tensor(float))"})) == [["a"], ["b", "c"], ["d"]]
    assert names_of(cut_text(CHAIN, sizes, 1, {"a": "tensor(bfloat16)"})) == [["a", "b", "c", "d"]]


def test_nodes_out_of_order_stay_together():
    text = "f (float[4] x) => (float[4] b) { b = Exp(a) a = Relu(x) }"
    assert names_of(cut_text(text, {"a": 1, "b": 1}, 1)) == [["b", "a"]]


def test_each_weight_is_where_it_is_read(onnx_file):
    text = "f (float[N, 4] x) => (float[N, 4] c) { a = MatMul(x, w) b = MatMul(a, v) c = Add(b, w) }"
    proto = Model(onnx_file(text, {"w": W, "v": W})).proto
    types = dict.fromkeys("abc", "tensor(float)")
    segments = cut(proto.graph, dict.fromkeys("abc", 1), types, 1)
    models = [segment.model(proto, types).graph for segment in segments]
    assert [[tensor.name for tensor in graph.initializer] for graph in models] == [["w"], ["v"], ["w"]]
    assert [[value.name for value in graph.input] for graph in models] == [["x"], ["a"], ["b"]]
    assert [[value.name for value in graph.output] for graph in models] == [[], [], ["c"]]


def test_a_tensor_is_dropped_after_its_last_reader(onnx_file):
    model = Model(onnx_file(CHAIN.replace("[4]", "[N, 4]")))
    ends, seen = {}, []
    with PartedRunner(model, memory=1) as runner:
        for values in runner.run({"x": X}):
            ends |= {name: weakref.ref(array) for name, array in values.items() if name != "x"}
            del values
            seen.append({name for name, end in ends.items() if end() is not None})
    assert seen == [set(), {"a"}, {"a", "b"}, {"a", "c"}, set()]


def test_smaller_batches_keep_the_segments_and_larger_ones_divide_anew(onnx_file):
    model = Model(onnx_file(CHAIN.replace("[4]", "[N, 4]")))
    with PartedRunner(model, memory=2 * X.nbytes) as runner:
        counts = []
        for times in (1, 1, 2, 4):
            batch = {"x": np.concatenate([X] * times)[: 12 if times > 1 else None]}
            found = {name: values for part in runner.run(batch) for name, values in part.items()}
            positive = np.maximum(batch["x"], 0)
            assert np.allclose(found["d"], positive - np.exp(positive))
            counts.append(len(runner._runners))
        assert counts == [2, 2, 4, 4]
        before = runner._runners
        list(runner.run({"x": X[:1]}))
        assert runner._runners is before


def test_shapes_are_inferred_for_larger_batches_alone(onnx_file, monkeypatch):
    fitted, fit = [], PartedRunner._fit
    monkeypatch.setattr(PartedRunner, "_fit", lambda self, batch: fitted.append(batch["x"].shape) or fit(self, batch))
    with PartedRunner(Model(onnx_file("f (float[N, T] x) => (float[N, T] y) { y = Neg(x) }"))) as runner:
        for shape in ((3, 4), (3, 4), (2, 4), (3, 2), (1, 5), (1, 4), (2, 4), (2, 5)):
            x, y = runner.run({"x": np.ones(shape, "f4")})
            assert x["x"].shape == y["y"].shape == shape
    assert fitted == [(3, 4), (1, 5), (2, 4), (2, 5)]


def test_nodes_that_are_too_large_stay_by_themselves(onnx_file):
    with PartedRunner(Model(onnx_file(CHAIN.replace("[4]", "[N, 4]"))), memory=1) as runner:
        list(runner.run({"x": X}))
        before = runner._runners
        list(runner.run({"x": X[:2]}))
        assert len(before) == 4
        assert runner._runners is before


#: A chain of 24 tensors of 16 MiB, in segments; prints the KiB that two batches take.
PROGRAM = """
import sys
import numpy as np
from fastcal.model import Model
from fastcal.observe.with_onnxruntime import PartedRunner
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
with PartedRunner(Model(sys.argv[1]), 1, int(sys.argv[2])) as runner:
    batch = np.ones(1 << 22, "f4")
    before = peak()
    for _ in range(2):
        for values in runner.run({"t0": batch}):
            del values
    print(peak() - before)
"""


@pytest.mark.parametrize(("segment", "least", "most"), [(1 << 30, 380, 800), (64 << 20, 60, 140), (16 << 20, 14, 50)])
def test_memory_is_that_of_a_segment(onnx_file, segment, least, most):
    nodes = " ".join(f"t{index + 1} = Neg(t{index})" for index in range(24))
    path = onnx_file(f"f (float[N] t0) => (float[N] t24) {{ {nodes} }}")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, str(segment)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert least <= int(run.stdout) / 1024 <= most
