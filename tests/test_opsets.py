"""Models of older opsets, which are converted on the way: the names and the scales of their tensors stay."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import fastcal
from fastcal.model import Model
from fastcal.qdq import count_quantized

RANDOM = np.random.default_rng(4)

#: A network whose nodes change between the opsets: Squeeze, Unsqueeze, ReduceSum and Softmax over more than one axis.
GRAPH = """f (float[N, 3, 8, 8] x) => (float[N, 5] y) {
  [first] c = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(x, w)
  n = BatchNormalization(c, scale, shift, mean, variance)
  r = Relu(n)
  e = Softmax<axis = 1>(r)
  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(e)
  g = GlobalAveragePool(p)
  s = Squeeze<axes = [2, 3]>(g)
  u = Unsqueeze<axes = [1]>(s)
  t = ReduceSum<axes = [1], keepdims = 0>(u)
  [last] y = Gemm<transB = 1>(t, v, b)
}"""

WEIGHTS = {
    "w": RANDOM.normal(size=(4, 3, 3, 3)).astype("f4"), "v": 9 * RANDOM.normal(size=(5, 4)).astype("f4"),
    "b": np.ones(5, "f4"), "scale": np.ones(4, "f4"), "shift": np.zeros(4, "f4"), "mean": np.zeros(4, "f4"),
    "variance": np.ones(4, "f4"),
}  # fmt: skip
X = {"x": RANDOM.normal(size=(2, 3, 8, 8)).astype("f4")}


def run(data):
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, X)[0]


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 12])
@pytest.mark.parametrize("ir_version", [3, 7])
@pytest.mark.parametrize("is_external", [False, True])
def test_an_old_model_is_quantized(run_fastcal, tmp_path, caplog, opset, ir_version, is_external):
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {GRAPH}')
    for name, array in WEIGHTS.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        if ir_version == 3:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
            model.graph.input.append(value)
    path = tmp_path / "m.onnx"
    data = model.SerializeToString()
    onnx.save(model, path, save_as_external_data=is_external, size_threshold=0)
    cache = fastcal.calibrate(path, [X], backend="onnxruntime")
    assert list(cache.scales) == ["x", *"cnrepgsuty"]
    quantized = fastcal.quantize(path, cache, exclude=["last"])
    assert caplog.messages == []
    onnx.checker.check_model(quantized, full_check=True)
    assert quantized.opset_import[0].version == 13
    assert count_quantized(quantized) == (1, 2)
    quantized = fastcal.quantize(path, cache)
    assert count_quantized(quantized) == (2, 2)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    assert values["x_scale"] == np.float32(cache.scales["x"])
    assert values["w"].tobytes() == WEIGHTS["w"].tobytes()
    exact, int8 = run(data), run(quantized.SerializeToString())
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - int8).sum()) > 25
    assert Model(path).opset == opset
    assert fastcal.compare(path, [X]).best in ("entropy2", "minmax", "percentile")
    cache.save(tmp_path / "c.cache")
    done = run_fastcal("quantize", path, tmp_path / "c.cache", "-o", tmp_path / "q.onnx")
    assert done.returncode == 0, done.stderr
    assert onnx.load(tmp_path / "q.onnx") == quantized


LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("light_s*.onnx"))


@pytest.mark.skipif(not LIGHT, reason="this onnx has no light models")
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_models_that_onnx_ships(path):
    """These are of opset 9, and a constant expression computes each weight."""
    model = Model(path)
    scales = dict.fromkeys([*model.input_names, *model.activations], 0.1)
    quantized = fastcal.quantize(path, fastcal.CalibrationCache(scales))
    counts = count_quantized(quantized)
    assert counts[0] == counts[1] > 20
    onnx.checker.check_model(quantized, full_check=True)
