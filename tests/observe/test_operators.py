"""Operators that ONNX Runtime does not know: what does not depend on them is calibrated, quantized and compared."""

import numpy as np
import onnx
import pytest
from onnx import helper

import fastcal
from fastcal.errors import ModelError
from fastcal.observe.operators import cut_unknown
from fastcal.qdq import count_quantized

WEIGHTS = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f4"), "v": np.eye(4, dtype="f4")}
X = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype("f4")

HEAD = "f (float[N, 3, 8, 8] x) => (OUTPUTS) { c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c)"

#: Networks around an operator "Plugin": the outputs, the end of the graph, the scales, and what is gone.
NETWORKS = {
    "at the end": ("float[K] y", "y = Plugin(r)", ["x", "c", "r"], ["y"]),
    "several, with layers behind": (
        "float[N, 8, 8, 4] y, int64[K] z",
        "p, q = Plugin(r) t = Transpose<perm = [0, 2, 3, 1]>(p) y = MatMul(t, v) z = Other(q)",
        ["x", "c", "r"],
        ["p", "q", "t", "y", "z"],
    ),
    "beside another branch": (
        "float[N, 8, 8, 4] y, float[K] z",
        "z = Plugin(c) t = Transpose<perm = [0, 2, 3, 1]>(r) y = MatMul(t, v)",
        ["x", "c", "r", "t", "y"],
        ["z"],
    ),
    "in a branch of an If": (
        "float[N, 4, 8, 8] y",
        "s = ReduceSum<keepdims = 0>(r) b = Cast<to = 9>(s) y = If(b) <"
        "then_branch = t () => (float[N, 4, 8, 8] p) { p = Plugin(r) },"
        "else_branch = e () => (float[N, 4, 8, 8] n) { n = Neg(r) }>",
        ["x", "c", "r", "s"],
        ["y"],
    ),
}


@pytest.fixture(params=["TRT", "", "not imported"])
def domain(request):
    return request.param


@pytest.fixture
def network(onnx_file, domain):
    """A function that writes one of NETWORKS, whose operators are of a domain."""

    def write(name):
        outputs, end, *_ = NETWORKS[name]
        path = onnx_file(
            f"{HEAD.replace('OUTPUTS', outputs)} {end} }}", {k: v for k, v in WEIGHTS.items() if k in end + "w"}
        )
        proto = onnx.load(path)
        graphs = [
            proto.graph,
            *(value.g for node in proto.graph.node for value in node.attribute if value.HasField("g")),
        ]
        for node in (node for graph in graphs for node in graph.node if node.op_type in ("Plugin", "Other")):
            node.domain = {"not imported": "custom.plugins"}.get(domain, domain)
        if domain == "TRT":
            proto.opset_import.append(helper.make_opsetid("TRT", 1))
        onnx.save(proto, path)
        return path

    return write


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_depend_on_it_is_calibrated_and_the_rest_named(network, caplog, name):
    *_, scales, gone = NETWORKS[name]
    path = network(name)
    cache = fastcal.calibrate(path, [X], backend="onnxruntime")
    assert list(cache.scales) == scales
    kinds = "Plugin, Other" if name.startswith("several") else "Plugin"
    assert caplog.messages[0] == (
        f"ONNX Runtime does not know {kinds}: there are no scales for what depends on it ({', '.join(gone)}); backend "
        "tensorrt runs TensorRT's plugins"
    )
    quantized = fastcal.quantize(path, cache)
    assert count_quantized(quantized)[0] == (2 if "y" in scales else 1)
    assert [node.op_type for node in quantized.graph.node if node.op_type == "Plugin"] == ["Plugin"] * (
        "If" not in name
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_part_before_it_is_compared(network, name):
    result = fastcal.compare(network(name), [X])
    for quality in result.qualities.values():
        assert list(quality.outputs) == (["y"] if name == "beside another branch" else ["r"])
        assert 20 < quality.sqnr < 80


def test_layers_behind_it_stay_in_float(network, caplog):
    path = network("several, with layers behind")
    fastcal.quantize(path, fastcal.CalibrationCache({"x": 0.1, "c": 0.1, "r": 0.1}))
    assert caplog.messages == ["layers that stay in float: y (no scale for t)"]


def test_a_known_network_is_not_cut(onnx_file):
    proto = onnx.load(onnx_file("f (float[4] x) => (float[4] y) { g = com.microsoft.Gelu(x) y = Relu(g) }"))
    before = proto.SerializeToString()
    rest, *lacking = cut_unknown(proto)
    assert rest is proto
    assert lacking == [[], []]
    assert proto.SerializeToString() == before


def test_a_network_that_depends_on_it_as_a_whole(onnx_file):
    path = onnx_file("f (float[N, 4] x) => (float[N, 4] y) { p = TRT.Plugin(x) y = MatMul(p, v) }", {"v": WEIGHTS["v"]})
    proto = onnx.load(path)
    proto.opset_import.append(helper.make_opsetid("TRT", 1))
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"cannot load .*TRT.*Plugin.*; use backend tensorrt if TensorRT knows it, or"):
        fastcal.calibrate(path, [np.ones((1, 4), "f4")], backend="onnxruntime")
