"""Which tensors a cache lacks, or has too many, held against the caches that TensorRT wrote."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DATA, DIGITS, SQUEEZENET, needs_squeezenet
from fastcal.cache.record import Record

NETWORKS = json.loads((DATA / "tensorrt_networks.json").read_text())["networks"]
MODEL = DIGITS / "digits.onnx"


def test_tensorrts_own_caches_are_in_order(tmp_path):
    for name, network in NETWORKS.items():
        path = tmp_path / "model.onnx"
        onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {network["graph"]}'), path)
        found = fastcal.check_cache(fastcal.CalibrationCache(dict.fromkeys(network["minmax"], 1.0)), path)
        # Of this one TensorRT's parser names the output itself.
        assert (found.missing, found.unknown) == (("d",) if name == "softmax" else (), ()), name


@needs_squeezenet
@pytest.mark.parametrize("algorithm", ["entropy2", "minmax"])
def test_squeezenets_caches_are_in_order(algorithm):
    cache = fastcal.CalibrationCache.load(DATA / f"squeezenet1_1.{algorithm}.cache")
    assert not fastcal.check_cache(cache, SQUEEZENET)


@pytest.fixture(scope="module")
def feed():
    return fastcal.ImageFeed(DIGITS / "test", model=MODEL, batch_size=45, limit=90)


@pytest.fixture(scope="module")
def cache(feed):
    with feed:
        return fastcal.calibrate(MODEL, feed, backend="onnxruntime", tensorrt_version="10.3.0")


def test_our_own_is_in_order(cache, feed):
    found = fastcal.check_cache(cache, MODEL, feed)
    assert not found
    assert found.recorded


def test_missing_and_unknown_tensors_are_named(cache):
    scales = cache.scales | {"(Unnamed Layer* 3) [Constant]_output": 0.0, "conv9": 1.0}
    del scales["/1/Relu_output_0"]
    found = fastcal.check_cache(replace(cache, scales=scales), MODEL)
    assert found
    assert (found.missing, found.unknown, found.stale) == (("/1/Relu_output_0",), ("conv9",), ())


def test_another_model_makes_it_stale(cache, tmp_path):
    model = onnx.load(MODEL)
    model.doc_string = "retrained"
    onnx.save(model, tmp_path / "model.onnx")
    found = fastcal.check_cache(cache, tmp_path / "model.onnx")
    assert (found.missing, found.unknown, found.stale) == ((), (), ("model",))


def test_other_images_make_it_stale(cache):
    fewer = fastcal.ImageFeed(DIGITS / "test", model=MODEL, batch_size=45, limit=45)
    assert set(fastcal.check_cache(cache, MODEL, fewer).stale) == {
        "images (90 then, 45 now)",
        "samples",
    }
    other = fastcal.ImageFeed(DIGITS / "test", preprocess="unit", model=MODEL, batch_size=45, limit=90)
    (stale,) = fastcal.check_cache(cache, MODEL, other).stale
    assert stale.startswith("preprocess")


def test_without_a_record_nothing_is_known(cache, feed):
    found = fastcal.check_cache(replace(cache, record=None), MODEL, feed)
    assert not found
    assert not found.recorded


def test_only_what_depends_on_the_inputs_and_is_float_is_asked_for(onnx_file):
    graph = """f (float[2, 4] x, int64[2] i, bool b) => (float[2, 4] y) {
        j = Add(i, i)
        shape = Shape(x)
        c = Transpose(w)
        d = Constant <value = float {1.0}> ()
        e = Mul(c, d)
        g = Gather(x, j)
        h = Reshape(g, shape)
        y = MatMul(h, e)
        k = Cast <to = 10> (y)
        l = If (b) <
            then_branch = f () => (float[2, 4] m) { m = Relu(y) },
            else_branch = f () => (float[2, 4] n) { n = Neg(y) }
        >
    }"""
    path = onnx_file(graph, {"w": np.ones((4, 4), "f4")})
    found = fastcal.check_cache(fastcal.CalibrationCache(), path)
    assert found.missing == ("x", "g", "h", "y", "k", "l", "m", "n")
    assert not fastcal.check_cache(fastcal.CalibrationCache(dict.fromkeys("xghyklmnwcde", 1.0)), path).unknown


def test_the_record_alone_can_be_wrong(cache):
    found = fastcal.check_cache(replace(cache, record=Record({})), MODEL)
    assert found.stale == ("model (not recorded)",)
