import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import fastcal
from fastcal.batch import Input, check_values
from fastcal.errors import DataError, ModelError
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
    with pytest.raises(ModelError, match=r"broken.onnx is not an ONNX model"):
        Model(tmp_path / "broken.onnx")


def test_inputs_that_no_batch_can_give(tmp_path):
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1])
    for inputs, message in (
        ([], "has no inputs: its outputs are constant and need no calibration$"),
        ([tensor], "input 'x' has no shape; export the network with tensors of known rank"),
        ([sequence], "input 'x' is not a tensor; export"),
    ):
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "f", inputs, [])
        onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
        with pytest.raises(ModelError, match=rf"model.onnx:? {message}"):
            _ = Model(tmp_path / "model.onnx").inputs


def test_a_model_that_does_not_name_its_opset(onnx_file):
    path = onnx_file("f (float[2] x) => (float[2] y) { y = Relu(x) }")
    proto = onnx.load(path)
    del proto.opset_import[:]
    onnx.save(proto, path)
    with pytest.raises(
        ModelError, match=r"model.onnx is not a valid ONNX model: .*No opset import.*; export .* again$"
    ):
        _ = Model(path).calibrated


@pytest.mark.parametrize("name", ["m.txtpb", "m.onnxtxt", "m.textproto"])
def test_text_that_is_no_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"garbage \xff")
    with pytest.raises(ModelError, match=f"{name} is not an ONNX model"):
        Model(tmp_path / name)


def test_what_is_no_path():
    with pytest.raises(ModelError, match="the model is a ModelProto; name an ONNX file"):
        Model(onnx.ModelProto())


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"cannot read model .*none.onnx: No such file"):
        Model(tmp_path / "none.onnx")


def test_a_size_below_1_is_dynamic(onnx_file, photographs, tmp_path):
    path = onnx_file("f (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { r = Relu(x) y = Neg(r) }")
    proto = onnx.load(path)
    for size in (0, -1):
        for value in (proto.graph.input[0], proto.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = size
        onnx.save(proto, path)
        model = Model(path)
        assert model.inputs[0].shape == (None, 3, 8, 8)
        assert model.batch_size is None
    assert model.sizes({"x": (5, 3, 8, 8)}) == dict.fromkeys(["r", "y"], 4 * 5 * 3 * 8 * 8)
    np.save(tmp_path / "x.npy", np.ones((6, 3, 8, 8), np.float32))
    with (
        fastcal.ImageFeed(photographs, model=path, batch_size=2, device="cpu") as images,
        fastcal.NumpyFeed(tmp_path / "x.npy", model=path, batch_size=2, device="cpu") as arrays,
    ):
        for feed in (images, arrays, [np.ones((2, 3, 8, 8), np.float32)]):
            assert list(fastcal.calibrate(path, feed, backend="onnxruntime").scales) == ["x", "r", "y"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([], ["p"], "node 'pool' has 0 inputs, and MaxPool needs at least 1; export the network again$"),
        (["x"], [], "node 'pool' has 0 outputs, and MaxPool needs at least 1; export the network again$"),
    ],
)
def test_a_node_without_what_its_operator_needs(tmp_path, inputs, outputs, message):
    pool = helper.make_node("MaxPool", inputs, outputs, "pool", kernel_shape=[2, 2])
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
    graph = helper.make_graph([pool, helper.make_node("Relu", ["x"], ["y"])], "f", [image], [])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=rf"model.onnx is not a valid ONNX model: {message}"):
        fastcal.calibrate(tmp_path / "model.onnx", [np.ones((1, 1, 4, 4), "f4")], backend="onnxruntime")


def test_a_node_of_another_domain_may_have_any_inputs_and_outputs(onnx_file):
    path = onnx_file("f (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    proto = onnx.load(path)
    proto.graph.node.append(helper.make_node("Relu", [], [], domain="custom"))
    onnx.save(proto, path)
    assert Model(path).activations == ("y",)


def test_a_sparse_constant_is_no_input(onnx_file):
    path = onnx_file("f (float[N, 2] x, float[2] w) => (float[N, 2] y) { y = Mul(x, w) }")
    proto = onnx.load(path)
    values, indices = onnx.numpy_helper.from_array(np.ones(1, "f4"), "w"), onnx.numpy_helper.from_array(np.array([1]))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2]))
    onnx.save(proto, path)
    assert Model(path).input_names == ["x"]
    del proto.graph.input[1]
    onnx.save(proto, path)
    assert Model(path).tensors == {"x", "w", "y"}


def test_infinity_fits_every_float():
    value = Input("x", (2,), np.dtype(np.float16))
    check_values(np.float32([np.inf, -np.inf]), value, "m.onnx")
    with pytest.raises(DataError, match=r"m.onnx takes input 'x' as float16, which cannot hold 1000000.0; give"):
        check_values(np.float32([np.inf, 1e6]), value, "m.onnx")
