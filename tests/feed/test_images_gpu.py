"""The feed on a GPU: the same batches as on the CPU, none ever overwritten while it is read."""

import gc
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fastcal import FastcalError, ImageFeed, Preprocess

pytestmark = pytest.mark.gpu

#: A feed on a GPU whose images are decoded there; without the second option, the CPU decodes as few as these.
ON_GPU = {"device": "cuda", "hw_decoder_load": 0.9}

decoders = pytest.mark.parametrize("options", [ON_GPU, {"device": "cuda"}], ids=["decoded on the GPU", "on the CPU"])


@pytest.fixture
def numbered(tmp_path):
    """200 images whose every pixel is the image's number."""
    for number in range(200):
        Image.fromarray(np.full((20, 20, 3), number, np.uint8)).save(tmp_path / f"{number:03}.png")
    return tmp_path


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(224, 224), (100, 64)])
@decoders
def test_batches_are_the_cpus(photographs, resize, size, options):
    preprocess = Preprocess(size=size, resize=resize)
    batches = []
    for given in ({"device": "cpu"}, options):
        with ImageFeed(photographs, preprocess=preprocess, batch_size=4, **given) as feed:
            batches.append([np.asarray(getattr(b["input"], "get", lambda b=b: b["input"])()) * 1.0 for b in feed])
    difference = np.abs(np.concatenate(batches[0]) - np.concatenate(batches[1]))
    print(f"{resize} to {size}: mean difference {difference.mean():.3f} levels, largest {difference.max():.0f}")
    assert difference.mean() < 0.1
    assert difference.max() <= 3


@decoders
def test_every_batch_is_seen_whole_and_in_order(numbered, options):
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    for depth in (2, 3, 4):
        for seconds in (0, 0.002):
            feed = ImageFeed(
                [path for path in sorted(numbered.iterdir()) for _ in range(8)],
                preprocess=Preprocess(size=(64, 64)), batch_size=8, depth=depth, **options,
            )  # fmt: skip
            extremes = cupy.empty((200, 2), cupy.float32)
            with feed, stream:
                for number, batch in enumerate(feed):
                    time.sleep(seconds)
                    # enqueued only: the buffer must not be filled before this has run
                    extremes[number, 0] = batch["input"].min()
                    extremes[number, 1] = batch["input"].max()
            stream.synchronize()
            expected = np.repeat(np.arange(200), 2).reshape(200, 2)
            assert (extremes.get() == expected).all()


def test_arrays_are_cupys_and_allocated_once(photographs):
    import cupy

    preprocess = Preprocess(size=(16, 16))
    constants = {"scale": np.float32([2])}
    with ImageFeed(photographs, preprocess=preprocess, batch_size=1, device="cuda:0", constants=constants) as feed:
        batches = [(b["input"].data.ptr, b["scale"].get().tolist()) for _ in range(2) for b in feed]
    assert isinstance(next(iter(feed))["input"], cupy.ndarray)
    assert len({address for address, _ in batches}) == 2
    assert {tuple(scale) for _, scale in batches} == {(2.0,)}
    feed.close()


def test_passes_left_midway(photographs):
    feed = ImageFeed(photographs, preprocess=Preprocess(size=(16, 16)), batch_size=1, **ON_GPU)
    whole = [batch["input"].get() for batch in feed]
    for _ in range(3):
        next(iter(feed))
    assert np.array_equal([batch["input"].get() for batch in feed], whole)
    batches = iter(feed)
    next(batches)
    del feed, batches
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")]


@pytest.mark.parametrize("kind", ["truncated", "garbage"])
@decoders
def test_an_image_that_turns_bad_halfway_is_named(photographs, tmp_path, kind, options):
    for number in range(12):
        (tmp_path / f"{number:02}.jpg").write_bytes((photographs / "0.jpg").read_bytes())
    whole = (tmp_path / "07.jpg").read_bytes()
    (tmp_path / "07.jpg").write_bytes(whole[: len(whole) // 2] if kind == "truncated" else b"no image")
    feed = ImageFeed(tmp_path, preprocess=Preprocess(size=(64, 64)), batch_size=2, **options)
    with feed, pytest.raises(FastcalError, match=r"07.jpg cannot be decoded"):
        for _ in feed:
            pass


def test_a_device_that_is_not_there(photographs):
    with pytest.raises(FastcalError, match="no device cuda:99: CUDA sees"):
        ImageFeed(photographs, device="cuda:99")


def test_a_gpu_that_is_not_the_first(photographs):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    found = []
    for number in (0, 1):
        with ImageFeed(
            photographs, preprocess=Preprocess(size=(64, 64)), batch_size=2, device=f"cuda:{number}"
        ) as feed:
            assert {batch["input"].device.id for batch in feed} == {number}
            found.append([batch["input"].get() for batch in feed])
    assert np.array_equal(*found)
    assert cupy.cuda.runtime.getDevice() == 0
