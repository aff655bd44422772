"""Engines from Q/DQ models and from tunings on a GPU, the layers that they consist of, and their speed."""

import json

import pytest
from test_build_gpu import FAST, IMAGES, MODEL, TACTICS, accuracy, load

import fastcal

pytestmark = pytest.mark.gpu

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
    assert found.layers["INT8"] > 0  # in batches of 64: single images of 32x32 are as fast in float


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
