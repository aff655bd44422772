"""Engines from Q/DQ models and from tunings on a GPU, the layers that they consist of, and their speed."""

import json

import numpy as np
import pytest
from test_build_gpu import FAST, IMAGES, MODEL, TACTICS, accuracy, load

import fastcal
from conftest import write_onnx

pytestmark = pytest.mark.gpu("TensorRT")

QUICK = {"tactic_sources": TACTICS.split(","), "optimization_level": 0}


@pytest.fixture(scope="module")
def cache():
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=64) as feed:
        return fastcal.calibrate(MODEL, feed)


@pytest.fixture
def contents(trt, tmp_path):
    """A function that writes an engine, and returns its layers after checking that it classifies the test images."""

    def contents(engine):
        from fastcal.engine.contents import contents_of
        from fastcal.model import Model

        (tmp_path / "x.engine").write_bytes(engine)
        assert accuracy(trt, load(trt, tmp_path / "x.engine")) > 0.98
        return contents_of(trt, engine, Model(MODEL))

    return contents


def test_an_explicit_engine_runs_every_weighted_layer_in_int8(cache, contents):
    found = contents(fastcal.build_engine(MODEL, tuning=cache, explicit=True, max_batch=64, **QUICK))
    assert len(found.weighted) == 8
    assert found.not_int8 == {}
    assert found.layers["INT8"] >= 7


def test_a_feed_is_enough_for_an_explicit_engine(contents):
    with fastcal.ImageFeed(IMAGES, model=MODEL, batch_size=64) as feed:
        found = contents(fastcal.build_engine(MODEL, feed, explicit=True, **QUICK))
    assert found.not_int8 == {}


@pytest.mark.parametrize("fp16", [False, True])
def test_an_implicit_engine_keeps_a_tunings_layers_in_float(cache, contents, fp16):
    in_float = {"/3/first/Conv_output_0": "/3/first/Conv", "/5/second/Conv_output_0": "/5/second/Conv"}
    tuning = fastcal.Tuning(cache, in_float=[*in_float], bias={"/0/Conv_output_0": [0.0] * 16})
    found = contents(fastcal.build_engine(MODEL, tuning=tuning, fp16=fp16, opt_batch=64, **QUICK))
    kinds = {found.not_int8[name] for name in in_float.values()}
    assert kinds <= ({"FP16", "FP32"} if fp16 else {"FP32"})


def test_an_implicit_engine_runs_the_other_layers_in_int8(trt, tmp_path):
    """Convolutions of 256 channels, which are faster in INT8; those of the sample may not be."""
    from fastcal.engine.contents import contents_of
    from fastcal.model import Model

    random = np.random.default_rng(0)
    weights = {f"w{n}": random.standard_normal((256, 256, 3, 3), dtype="f4") / 34 for n in range(4)}
    lines = [f"c{n} = Conv<pads = [1, 1, 1, 1]>({f'r{n - 1}' if n else 'x'}, w{n}) r{n} = Relu(c{n})" for n in range(4)]
    graph = f"f (float[N, 256, 28, 28] x) => (float[N, 256, 28, 28] r3) {{ {' '.join(lines)} }}"
    path = write_onnx(tmp_path / "wide.onnx", graph, weights)
    cache = fastcal.calibrate(path, [{"x": random.standard_normal((8, 256, 28, 28), dtype="f4")}])
    for in_float in ([], ["c1"]):
        tuning = fastcal.Tuning(cache, in_float=in_float)
        settings = {"tactic_sources": TACTICS.split(","), "optimization_level": 2}
        engine = fastcal.build_engine(path, tuning=tuning, fp16=False, min_batch=64, max_batch=64, **settings)
        found = contents_of(trt, engine, Model(path))
        assert len(found.weighted) == 4
        assert list(found.not_int8) == in_float, found


@pytest.mark.parametrize("way", ["--implicit", "--explicit"])
def test_the_command_says_what_the_engine_consists_of_and_how_fast_it_is(spawn_fastcal, tmp_path, way):
    words = ("-o", tmp_path / "x.engine", way, "--time", "--json", "--batch-size", 64)
    done = spawn_fastcal("build", MODEL, IMAGES, *words, *FAST)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["layers"]["INT8"] > 0
    assert said["bytes"] == (tmp_path / "x.engine").stat().st_size
    assert said["speed"].keys() == {"INT8", "FP16", "FP32"}
    for speed in said["speed"].values():
        assert speed["batch"] == 64
        assert speed["throughput"] == pytest.approx(64 / speed["latency"])
        assert 1e-6 < speed["latency"] < 1
