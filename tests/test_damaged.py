"""Damaged models and caches: each ends well, or in one line."""

import logging
import resource
import sys
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import fastcal
import fuzz
from fastcal.errors import ModelError
from fastcal.model import Model

#: Few, and the same ones each time; `fuzz.py` goes through any number.
COUNTS = {"models": 25, "caches": 120, "records": 40, "lists": 50, "arrays": 50, "preprocessing": 100}
COUNTS |= {"histograms": 25, "tunings": 60}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.filterwarnings("ignore")  # ONNX's evaluator of constants warns of damaged ones
def test_mutated_files(tmp_path, kind):
    endings = fuzz.go_through(tmp_path, fuzz.KINDS[kind], COUNTS[kind], 0)
    assert endings["fault"] == 0
    assert endings["fine"] > 0
    assert endings.total() == COUNTS[kind]


@pytest.mark.parametrize("kind", fuzz.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_files_as_they_were_are_read(tmp_path, kind):
    fuzz.with_digits(tmp_path)
    for name, data in list(fuzz.KINDS[kind].originals(tmp_path)):
        (tmp_path / name).write_bytes(data)
        fuzz.KINDS[kind].use(tmp_path / name)


def test_a_lost_file_is_seen(tmp_path, capsys):
    def lose(path):
        (path.parent / "images" / "val" / "0.png").unlink(missing_ok=True)

    kind = replace(fuzz.KINDS["lists"], use=lose)
    assert fuzz.go_through(tmp_path, kind, 3, 0)["fault"] == 1
    assert "lost or changed" in capsys.readouterr().out


def test_the_script_fails_if_there_is_a_fault(monkeypatch):
    def main(use):
        monkeypatch.setitem(fuzz.KINDS, "lists", replace(fuzz.KINDS["lists"], use=use))
        with warnings.catch_warnings():
            return fuzz.main()

    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--kind", "lists", "--count", "2"])
    monkeypatch.setattr(resource, "setrlimit", lambda *limits: None)  # which other tests may be beyond
    level = logging.getLogger("fastcal").level
    try:
        assert [main(use) for use in (lambda path: None, lambda path: 1 / 0)] == [0, 1]
    finally:
        logging.getLogger("fastcal").setLevel(level)


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


def test_a_constant_of_no_type(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    proto = onnx.load(path)
    proto.graph.initializer.append(TensorProto(name="w", data_type=2**31 - 1, dims=[1]))
    proto.graph.node.append(helper.make_node("Reshape", ["y", "w"], ["z"]))
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"^[^\n]*model.onnx is not a valid ONNX model: [^\n]*[^.]; export the"):
        fastcal.check_cache(fastcal.CalibrationCache(), path)
    assert Model(path).sizes({"x": (3, 2)}) == {}


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
