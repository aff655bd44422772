"""Which scales TensorRT gives the tensors of small networks of every kind of layer: those of the caches it wrote."""

import json
import struct

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DATA

NETWORKS = json.loads((DATA / "tensorrt_networks.json").read_text())["networks"]


@pytest.fixture(scope="module")
def batch():
    """The batch that TensorRT was given, made as the data file says."""
    x = (
        np.random.default_rng(0).standard_normal((2, 8, 16, 16), dtype="f4")
        * np.arange(1, 9, dtype="f4")[:, None, None]
    )
    x[0, 7, 3, 3] = -40
    return {"x": x}


def model_of(name, folder):
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {NETWORKS[name]["graph"]}'), path)
    return path


def scales_of(name, algorithm):
    written = NETWORKS[name][algorithm]
    return {tensor: struct.unpack(">f", bytes.fromhex(scale.zfill(8)))[0] for tensor, scale in written.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_scales_from_the_cpu(name, batch, tmp_path):
    path = model_of(name, tmp_path)
    for algorithm in ("minmax", "entropy2"):
        theirs = scales_of(name, algorithm)
        ours = fastcal.calibrate(path, [batch], algorithm=algorithm, exact=True, backend="onnxruntime").scales
        by_the_parser = {tensor for tensor in theirs if tensor.startswith("(Unnamed Layer*")}
        of_one_more_shuffle = {"d"} if name == "softmax" else set()  # the parser's own name has the softmax itself
        assert theirs.keys() - ours.keys() == by_the_parser
        assert ours.keys() - theirs.keys() == of_one_more_shuffle
        assert {tensor: ours[tensor] for tensor in ours.keys() & theirs.keys()} == pytest.approx(
            {tensor: theirs[tensor] for tensor in ours.keys() & theirs.keys()}, rel=2e-6
        )


@pytest.mark.gpu("TensorRT")
def test_scales_from_a_gpu(batch, tmp_path):
    import tensorrt as trt

    tactics = [name for name in ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS") if hasattr(trt.TacticSource, name)]
    differ = []
    for name in list(NETWORKS)[::6]:
        path = model_of(name, tmp_path)
        theirs = scales_of(name, "entropy2")
        ours = fastcal.calibrate(path, [batch], exact=True, backend="tensorrt", tactic_sources=tactics).scales
        assert ours.keys() >= theirs.keys()
        differ += [(name, tensor) for tensor in theirs if ours[tensor] != pytest.approx(theirs[tensor], rel=1e-6)]
    assert differ == []
