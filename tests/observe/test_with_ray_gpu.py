"""Workers with a GPU each, to the bytes of one process."""

import pytest

import fastcal
from conftest import DIGITS

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus():
    """How many GPUs there are, for Ray too."""
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    ray.init(address="local", num_cpus=4, num_gpus=count, include_dashboard=False, log_to_driver=False)
    yield count
    ray.shutdown()


@pytest.mark.parametrize("algorithm", ["minmax", "entropy2", "percentile"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_cache_is_that_of_one_process(trt, gpus, workers, algorithm):
    if gpus < workers:
        pytest.skip(f"needs {workers} GPUs")
    caches, seen = [], []
    for options in ({}, {"workers": workers, "progress": lambda state: seen.append(state.batches)}):
        feed = fastcal.ImageFeed(DIGITS / "images", preprocess="unit", model=DIGITS / "digits.onnx", batch_size=7)
        with feed:
            assert feed.gpu is not None
            caches.append(
                fastcal.calibrate(
                    DIGITS / "digits.onnx", feed, algorithm=algorithm, quantile=0.999,
                    tactic_sources=["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"], **options,
                )
            )  # fmt: skip
    assert caches[0].to_bytes() == caches[1].to_bytes()
    assert caches[0].record == caches[1].record
    assert set(caches[0].scales) > {"image", "logits"}
    assert len(seen) > 2
    assert seen[-1] == 37


def test_images_are_prepared_on_gpus_for_onnxruntime_too(trt, gpus):
    pytest.importorskip("onnxruntime")
    feed = fastcal.ImageFeed(DIGITS / "images", preprocess="unit", model=DIGITS / "digits.onnx", device="cuda")
    with feed:
        expected = fastcal.calibrate(DIGITS / "digits.onnx", feed, backend="onnxruntime", algorithm="minmax")
    found = fastcal.calibrate(DIGITS / "digits.onnx", feed, backend="onnxruntime", algorithm="minmax", workers=1)
    assert found.to_bytes() == expected.to_bytes()


def test_images_that_were_to_be_prepared_on_the_cpu_still_are(trt, gpus):
    feed = fastcal.ImageFeed(DIGITS / "images", preprocess="unit", model=DIGITS / "digits.onnx", device="cpu")
    options = {"algorithm": "minmax", "tactic_sources": ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]}
    expected = fastcal.calibrate(DIGITS / "digits.onnx", feed, backend="tensorrt", **options)
    found = fastcal.calibrate(DIGITS / "digits.onnx", feed, backend="tensorrt", workers=1, **options)
    assert found.to_bytes() == expected.to_bytes()
