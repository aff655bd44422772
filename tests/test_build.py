"""`build_engine` up to TensorRT, on TensorRT's own Python bindings. What TensorRT builds is in test_build_gpu.py."""

import re

import numpy as np
import pytest

import fastcal
from conftest import DIGITS

MODEL = DIGITS / "digits.onnx"


@pytest.fixture
def error_of(trt_bindings, tmp_path, monkeypatch):
    """A function that builds an engine with options, and returns the type and text of the error."""
    monkeypatch.chdir(tmp_path)

    def error_of(options, model=MODEL, shape=(4, 3, 32, 32)):
        with pytest.raises(fastcal.FastcalError) as raised:
            fastcal.build_engine(model, [{"image": np.zeros(shape, "f4")}], **options)
        assert "\n" not in str(raised.value)
        return f"{type(raised.value).__name__}: {raised.value}"

    return error_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": 0}, "workspace is 0; it must be at least 1"),
        ({"optimization_level": 6}, "optimization_level is 6; it must be from 0 to 5"),
        ({"optimization_level": -1}, "optimization_level is -1; it must be from 0 to 5"),
        ({"tactic_sources": "CUDNN"}, "tactic_sources is 'CUDNN'; give a list of names"),
        (
            {"tactic_sources": ["JIT_CONVOLUTIONS", "CUBLASS"]},
            "there is no tactic source 'CUBLASS'; TensorRT 10.16.1.11 has",
        ),
        (
            {"opt_batch": 0},
            "the engine's batches are min_batch 1, opt_batch 0, max_batch 4; they must be at least 1",
        ),
        (
            {"min_batch": 9, "max_batch": 8},
            "batches are min_batch 9, opt_batch 9, max_batch 8; they must be at least 1 and in",
        ),
        (
            {"opt_batch": 9, "max_batch": 8},
            "batches are min_batch 1, opt_batch 9, max_batch 8; they must be at least 1 and in",
        ),
        ({"calibration": "mine"}, "FastcalError: there is no calibration 'mine'; choose fastcal or tensorrt"),
        ({"timing_cache": "nowhere/x"}, "cannot write nowhere/x: there is no folder"),
        ({"dla": -1}, "dla is -1; it must be at least 0"),
        ({"gpu_fallback": True}, "gpu_fallback is for what a DLA does not run; set dla too"),
        ({"dla": 0, "explicit": True}, "the DLA needs pairs on every tensor, which fastcal does not make"),
        ({"dla": 0, "max_batch": 8}, "a DLA runs one batch size, and these are 1 to 8; set min_batch and max_batch to"),
    ],
)
def test_an_option_out_of_its_range_is_named(error_of, options, message):
    assert message in error_of(options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workspace": 1, "optimization_level": 5},
        {"min_batch": 2},
        {"max_batch": 2},
        {"tactic_sources": ["CUDNN"]},
        {"tactic_sources": 3},
        {"dla": 0, "gpu_fallback": True, "min_batch": 4},
    ],
)
def test_without_a_gpu_tensorrt_does_not_start(error_of, options):
    assert error_of(options) == (
        "UnavailableError: TensorRT cannot start here (no reason given): it needs an NVIDIA GPU and a driver that "
        "fits; fastcal calibrate needs neither"
    )


def test_tensorrts_last_errors_are_the_reason(trt_bindings):
    from fastcal.network import Logger

    severities = trt_bindings.ILogger
    logger = Logger()
    for severity, message, reasons in (
        (severities.INFO, "starting", "no reason given"),
        (severities.WARNING, "no driver", "no driver"),
        (severities.ERROR, "first\n  line", "first line"),
        (severities.WARNING, "slow", "first line"),
        (severities.INTERNAL_ERROR, "second", "first line; second"),
        (severities.ERROR, "third", "second; third"),
    ):
        logger.log(severity, message)
        assert logger.reasons() == reasons


def test_dynamic_sizes_are_those_of_the_batches(trt_bindings):
    from fastcal.engine.settings import fill_sizes

    preprocess = fastcal.Preprocess(size=(24, 40))
    images = fastcal.ImageFeed(DIGITS / "images", preprocess=preprocess, batch_size=4)
    assert fill_sizes({"image": (-1, 3, -1, -1)}, images) == {"image": (-1, 3, 24, 40)}
    assert len(list(images)) == 64
    arrays = fastcal.ArrayFeed(iter([{"x": np.ones((2, 3, 5), "f4"), "n": np.ones(2, "f4")}] * 3))
    assert fill_sizes({"x": (2, -1, 5), "n": (-1,)}, arrays) == {"x": (2, 3, 5), "n": (-1,)}
    assert fill_sizes({"x": (-1, 3, 5), "n": (-1,)}, None) == {"x": (-1, 3, 5), "n": (-1,)}
    for shape, shown in (((-1, -1, 6), r"\(\?, \?, 6\)"), ((-1, -1), r"\(\?, \?\)")):
        message = rf"^the network takes input 'x' as {shown}, the batches are \(2, 3, 5\); give batches of that shape$"
        with pytest.raises(fastcal.DataError, match=message):
            fill_sizes({"x": shape, "n": (-1,)}, arrays)
    assert len(list(arrays)) == 3


def test_a_batch_range_for_a_fixed_batch(error_of, onnx_file):
    fixed = onnx_file("f (float[4, 3, 8, 8] image) => (float[4, 3, 8, 8] y) { y = Relu(image) }")
    shape = (4, 3, 8, 8)
    message = error_of({"min_batch": 1, "max_batch": 8}, fixed, shape)
    assert re.search(r"has a fixed batch; leave out min_batch and max_batch, or export it with a dynamic one$", message)
    assert "cannot start" in error_of({}, fixed, shape)


def test_a_batch_range_if_one_of_two_inputs_has_a_dynamic_batch(trt_bindings, onnx_file):
    path = onnx_file("f (float[N, 2] x, float[4, 2] z) => (float[4, 2] y) { y = Add(x, z) }")
    arrays = np.zeros((4, 2), "f4")
    with pytest.raises(fastcal.UnavailableError, match=r"^TensorRT cannot start here"):
        fastcal.build_engine(path, [{"x": arrays, "z": arrays}], max_batch=8)
