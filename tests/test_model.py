import numpy as np
import pytest

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


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FastcalError, match=r"cannot read model .*none.onnx: No such file"):
        Model(tmp_path / "none.onnx")
