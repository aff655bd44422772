import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fastcal import FastcalError
from fastcal.model import Model


def test_inputs_leave_out_what_has_a_value(onnx_file):
    path = onnx_file("f (float[N, 2] x, float[2] w) => (float[N, 2] y) { y = Mul(x, w) }", {"w": np.ones(2, "f4")})
    (only,) = Model(path).inputs
    assert (only.name, only.shape, only.dtype) == ("x", (None, 2), np.float32)


@pytest.mark.parametrize(
    ("inputs", "batch_size"),
    [("float[4, 2] x", 4), ("float[N, 2] x", None), ("float[4] x, float[4, 1] z", 4), ("float[4] x, float[5] z", None)],
)
def test_batch_size(onnx_file, inputs, batch_size):
    assert Model(onnx_file(f"f ({inputs}) => (float[N, 2] y) {{ y = Relu(x) }}")).batch_size == batch_size


@pytest.mark.parametrize("data", [b"", b"hello world", b"\x08\x08"])
def test_what_is_no_model_is_named(tmp_path, data):
    (tmp_path / "broken.onnx").write_bytes(data)
    with pytest.raises(FastcalError, match=r"broken.onnx is not an ONNX model"):
        Model(tmp_path / "broken.onnx")


def test_inputs_that_no_batch_can_give(tmp_path):
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1])
    for inputs, message in (
        ([], "has no inputs: what it computes is constant"),
        ([tensor], "input 'x' has no shape; export the network with tensors of known rank"),
        ([sequence], "input 'x' is no tensor; export"),
    ):
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "f", inputs, [])
        onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
        with pytest.raises(FastcalError, match=rf"model.onnx:? {message}"):
            _ = Model(tmp_path / "model.onnx").inputs


def test_a_graph_that_onnx_cannot_make_sense_of(onnx_file):
    path = onnx_file("f (float[2] x) => (float[2] y) { y = no.such.domain.Relu(x) }")
    with pytest.raises(FastcalError, match=r"model.onnx is no valid ONNX model: .*no.such.domain.*; export it again"):
        _ = Model(path).calibrated


@pytest.mark.parametrize("name", ["m.txtpb", "m.onnxtxt", "m.textproto"])
def test_text_that_is_no_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"garbage \xff")
    with pytest.raises(FastcalError, match=f"{name} is not an ONNX model"):
        Model(tmp_path / name)


def test_what_is_no_path():
    with pytest.raises(FastcalError, match="the model is a ModelProto; name an ONNX file"):
        Model(onnx.ModelProto())


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FastcalError, match=r"cannot read model .*none.onnx: No such file"):
        Model(tmp_path / "none.onnx")
