"""Damaged models and caches: each ends well, or in one line."""

import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import fastcal
import fuzz_models
from fastcal.errors import ModelError
from fastcal.model import Model


@pytest.mark.parametrize("kind", ["models", "caches"])
def test_mutated_files(tmp_path, kind):
    models = [fuzz_models.varied().SerializeToString(), fuzz_models.with_external_data(tmp_path)]
    ways = [fuzz_models.change_bytes, fuzz_models.structure_first, fuzz_models.change_fields]
    originals, ways, use, count = {
        "models": (models, ways, fuzz_models.read_model, 150),
        "caches": (list(fuzz_models.cache_files(tmp_path)), ways[:1], fuzz_models.read_cache, 500),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX's evaluator of constants warns of damaged ones
        endings = fuzz_models.go_through(tmp_path, originals, ways, use, count, 0)
    assert endings["fault"] == 0
    assert endings["fine"] > 0
    assert sum(endings.values()) == count


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b"Sigmoid", "op_type"),
        (b"the_node", "name"),
        (b"hidden_tensor", "input"),
        (b"within_a_branch", "op_type"),
        (b"an_attribute", "name"),
    ],
)
def test_text_that_is_none(onnx_file, text, field):
    path = onnx_file(
        "f (float[N, 2] x, bool b) => (float[N, 2] y) { [the_node] hidden_tensor = Sigmoid<an_attribute = 1>(x)"
        "  y = If(b) <then_branch = t () => (float[2] t) { t = within_a_branch(hidden_tensor) },"
        "             else_branch = e () => (float[2] e) { e = Neg(x) }> }"
    )
    data = path.read_bytes()
    assert text in data
    path.write_bytes(data.replace(text, b"\xff" * len(text)))
    with pytest.raises(
        ModelError, match=rf"model.onnx is a damaged ONNX model: a (field|{field}|output) is no text; copy"
    ):
        Model(path)


def test_a_remark_in_another_encoding_does_no_harm(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    proto = onnx.load(path)
    proto.graph.node[0].doc_string = "Gewicht:XX"
    path.write_bytes(proto.SerializeToString().replace(b"XX", b"\xe4\xf6"))
    assert list(fastcal.calibrate(path, [np.ones((1, 2), "f4")], backend="onnxruntime").scales) == ["x", "y"]


@pytest.mark.parametrize("kind", [TensorProto.UNDEFINED, 99, 2**31 - 1])
def test_an_input_of_no_type(tmp_path, kind):
    value = helper.make_tensor_value_info("x", kind, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "f", [value], [])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m.onnx: input 'x' has no type that ONNX knows; export .* of known type"):
        _ = Model(tmp_path / "m.onnx").inputs


def test_sizes_leave_out_what_has_no_type(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("z", 99, [1]))
    onnx.save(proto, path)
    assert Model(path).sizes({"x": (3, 2)}) == {"y": 24}


def test_a_name_with_a_line_end_stays_in_the_line(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { [two_lines] y = MatMul(x, x) }")
    proto = onnx.load(path)
    proto.graph.node[0].name = "two\nlines"
    proto.graph.node[0].input.pop()
    onnx.save(proto, path)
    with pytest.raises(ModelError) as raised:
        Model(path)
    assert "two" in str(raised.value)
    assert "\n" not in str(raised.value)
