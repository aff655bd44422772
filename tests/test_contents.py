"""An engine's layers as TensorRT's inspector names them, and the rows about them."""

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np

from fastcal.cli.engine import contents_rows, speed_rows
from fastcal.engine.contents import contents_of, read_contents
from fastcal.engine.speed import Speed
from fastcal.model import Model

GRAPH = """f (float[N, 4, 8, 8] x) => (float[N, 5] y) {
  [a_conv] a = Conv(x, w) [a_relu] r = Relu(a) b = Conv(r, w) [c_conv] c = Conv(b, w) [add] s = Add(c, r)
  [pool] p = GlobalAveragePool(s) [flat] f = Flatten(p) [fc] y = Gemm(f, v)
}"""

INT8 = "Thirty-two wide channel vectorized row major Int8 format."


def layer(name, kind, reads, metadata=None):
    """A layer in the form of the inspector's JSON."""
    tensor = {"Name": "t", "Dimensions": [1, 4, 8, 8], "Format/Datatype": reads}
    entry = {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [{**tensor, "Format/Datatype": INT8}]}
    return entry if metadata is None else {**entry, "Metadata": metadata}


def test_layers_are_counted_and_weighted_ones_named(onnx_file):
    model = Model(onnx_file(GRAPH, {"w": np.ones((4, 4, 1, 1), "f4"), "v": np.ones((4, 5), "f4")}))
    layers = [
        layer("Reformatting CopyNode for Input Tensor 0 to a_conv", "Reformat", "Row major linear FP32"),
        layer("w + QuantizeLinear + a_conv + a_relu", "CaskConvolution", INT8),
        layer("node_of_b", "CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
        layer("__myl_fused_0", "gemm", "Int8 NHWC", "[ONNX Layer: c_conv]\x1e[ONNX Layer: add]"),
        layer("pool", "CaskPooling", "Row major linear BF16 format"),
        layer("fc", "CaskGemmMatrixMultiply", "Row major linear FP32"),
        {"Name": "odd", "LayerType": "Shape", "Inputs": [], "Outputs": []},
        "a layer without details",
    ]
    contents = read_contents(json.dumps({"Layers": layers, "Bindings": []}), model)
    assert contents.layers == {"INT8": 2, "FP16": 1, "BF16": 1, "FP32": 1, "other": 1}
    assert contents.weighted == {"a_conv": "INT8", "b": "FP16", "c_conv": "INT8", "fc": "FP32"}
    assert contents.not_int8 == {"b": "FP16", "fc": "FP32"}
    rows, entries = contents_rows(contents)
    assert rows == {
        "layers": "1 in BF16, 1 in FP16, 1 in FP32, 2 in INT8, 1 in other",
        "float": "b (FP16), fc (FP32)",
    }
    assert entries == {"layers": contents.layers, "not_int8": contents.not_int8}
    assert contents_rows(None) == ({}, {})


def test_weights_tell_the_type_of_a_layer_of_unknown_formats(onnx_file):
    model = Model(onnx_file(GRAPH, {"w": np.ones((4, 4, 1, 1), "f4"), "v": np.ones((4, 5), "f4")}))
    unknown = "N/A due to dynamic shapes"
    layers = [
        layer("w + a_conv", "CaskConvolution", unknown) | {"Weights": {"Type": "Int8", "Count": 16}},
        layer("node_of_b + pool", "CaskConvActPool", unknown) | {"ConvWeights": {"Type": "Half", "Count": 16}},
        layer("c_conv", "CaskConvolution", INT8) | {"Weights": {"Type": "Float", "Count": 16}},
        layer("flat", "CaskPooling", unknown),
    ]
    contents = read_contents(json.dumps({"Layers": layers}), model)
    assert contents.layers == {"INT8": 2, "FP16": 1, "other": 1}
    assert contents.weighted == {"a_conv": "INT8", "b": "FP16", "c_conv": "INT8"}


def test_speeds_are_compared_with_fp16():
    speeds = {"INT8": Speed(0.001, 32), "FP16": Speed(0.0019, 32), "FP32": Speed(0.004, 32)}
    rows, entries = speed_rows(speeds)
    assert rows == {
        "INT8": "1 ms for a batch of 32, 32,000/s",
        "FP16": "1.9 ms for a batch of 32, 16,842/s",
        "FP32": "4 ms for a batch of 32, 8,000/s",
        "compared": "1.9 times the speed of FP16",
    }
    assert entries["speed"]["INT8"] == {"latency": 0.001, "batch": 32, "throughput": 32000.0}
    slow = speed_rows(speeds | {"FP16": Speed(0.00104, 32)})[0]
    assert slow["compared"] == "not faster than FP16"
    assert speed_rows({}) == ({}, {})


LOGGED = """Layers:
Name: __myl_CastMul_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float, Format: (Linear) Row major }], \
Outputs: [ { Name: t, Datatype: Int8 }], Metadata: [ONNX Layer: x_Cast][ONNX Layer: a_conv]
Name: a_conv_myl0_1, LayerType: correlation, Inputs: [ { Name: t, Datatype: Int8, Format: (NHWC) }], Outputs: [ { \
Name: u, Datatype: Float }], Metadata: [ONNX Layer: a_conv][ONNX Layer: w_DequantizeLinear]
Name: __myl_Cast_myl0_4, LayerType: kgen, Inputs: [ { Name: t, Datatype: Int8 }], Metadata: [ONNX Layer: node_of_b]
Name: __myl_Cast_myl0_5, LayerType: kgen, Inputs: [ { Name: t, Datatype: Half }], Metadata: [ONNX Layer: fc]
Name: node_of_b_myl0_2, LayerType: correlation, Inputs: [ { Name: u, Datatype: Half }], Metadata: [ONNX Layer: \
node_of_b]
Name: c_conv_myl0_3, LayerType: correlation, Inputs: [ { Name: u, Datatype: BFloat16 }], Metadata: [ONNX Layer: c_conv]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float, Dimensions: [4], Location: Device
"""


def test_layers_of_the_builders_log(onnx_file):
    """Only kernels that multiply count for a weighted layer: others cast, scale or pad for it."""
    model = Model(onnx_file(GRAPH, {"w": np.ones((4, 4, 1, 1), "f4"), "v": np.ones((4, 5), "f4")}))
    library = SimpleNamespace()
    with mock.patch("fastcal.engine.contents.logger_of", return_value=SimpleNamespace(layers=LOGGED)):
        contents = contents_of(library, b"", model)
    assert contents.layers == {"FP32": 1, "INT8": 2, "FP16": 2, "BF16": 1}
    assert contents.weighted == {"a_conv": "INT8", "b": "FP16", "c_conv": "BF16", "fc": "FP16"}
