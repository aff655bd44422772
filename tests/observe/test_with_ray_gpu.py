"""Workers with a GPU each, to the bytes of one process."""

import numpy as np
import pytest

import fastcal
from conftest import DIGITS

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.gpu

MODEL = DIGITS / "digits.onnx"


def digits(**options):
    return fastcal.ImageFeed(DIGITS / "images", preprocess="unit", model=MODEL, batch_size=7, **options)


@pytest.fixture(scope="module")
def gpus():
    """How many GPUs there are, for Ray too."""
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    ray.init(address="local", num_cpus=4, num_gpus=count, include_dashboard=False, log_to_driver=False)
    yield count
    ray.shutdown()


@pytest.mark.gpu("onnxruntime-gpu")
@pytest.mark.parametrize("algorithm", ["minmax", "entropy2", "percentile"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_cache_is_that_of_one_process(gpus, workers, algorithm):
    if gpus < workers:
        pytest.skip(f"needs {workers} GPUs")
    caches, seen = [], []
    for options in ({}, {"workers": workers, "progress": lambda state: seen.append(state.batches)}):
        with digits() as feed:
            assert feed.gpu is not None
            caches.append(fastcal.calibrate(MODEL, feed, algorithm=algorithm, quantile=0.999, **options))
    assert caches[1].observed.backend == "onnxruntime"
    assert caches[0].to_bytes() == caches[1].to_bytes()
    assert caches[0].record == caches[1].record
    assert set(caches[0].scales) > {"image", "logits"}
    assert len(seen) > 2
    assert seen[-1] == 37


@pytest.mark.gpu("onnxruntime-gpu")
def test_arrays_are_counted_on_gpus_too(gpus):
    batches = [{"image": np.random.default_rng(n).standard_normal((7, 3, 32, 32), dtype="f4")} for n in range(9)]
    expected = fastcal.calibrate(MODEL, batches)
    assert fastcal.calibrate(MODEL, batches, workers=1).to_bytes() == expected.to_bytes()


@pytest.mark.gpu("onnxruntime-gpu")
def test_tf32_holds_for_workers(gpus):
    with digits() as feed:
        expected = fastcal.calibrate(MODEL, feed, tf32=True)
        found = fastcal.calibrate(MODEL, feed, tf32=True, workers=1)
    assert found.record.entries["precision"] == "TF32"
    assert found.to_bytes() == expected.to_bytes()


@pytest.mark.gpu("onnxruntime-gpu")
def test_images_that_were_to_be_prepared_on_the_cpu_still_are(gpus):
    with digits(device="cpu") as feed:
        expected = fastcal.calibrate(MODEL, feed, algorithm="minmax")
        found = fastcal.calibrate(MODEL, feed, algorithm="minmax", workers=1)
    assert found.to_bytes() == expected.to_bytes()


@pytest.mark.gpu("TensorRT")
def test_with_tensorrt_the_scales_are_those_of_one_process(gpus):
    # Not the bytes: TensorRT builds an engine in each process, and does not always pick the same kernels for it.
    options = {"backend": "tensorrt", "algorithm": "minmax"}
    options["tactic_sources"] = ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    with digits() as feed:
        expected = fastcal.calibrate(MODEL, feed, **options).scales
        for workers in range(1, min(gpus, 2) + 1):
            found = fastcal.calibrate(MODEL, feed, workers=workers, **options).scales
            assert found == pytest.approx(expected, rel=1e-6)
