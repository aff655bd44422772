"""The caller's batches on a GPU: copied from wherever they are, and none overwritten while it is read."""

import gc
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastcal import ArrayFeed, FastcalError, NumpyFeed

pytestmark = pytest.mark.gpu

BATCHES = 200
SHAPE = (8, 3, 64, 64)


def on_the_host():
    """Batches whose every element is the batch's number, in one array that is written to again and again."""
    array = np.empty(SHAPE, np.float32)
    for number in range(BATCHES):
        array[:] = number
        yield {"x": array}


def of_cupy():
    import cupy

    array = cupy.empty(SHAPE, cupy.float32)
    for number in range(BATCHES):
        array[:] = number  # enqueued only
        yield {"x": array}


def of_cupy_on_a_stream():
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        yield from of_cupy()


def allocated_anew():
    """Each freed as soon as the next is asked for, and its memory used again by the next."""
    import cupy

    for number in range(BATCHES):
        yield {"x": cupy.full(SHAPE, number, cupy.float32)}


def of_polygraphys_form():
    """An address, a shape and a type, as Polygraphy's DeviceView has them, filled on CUDA's default stream."""
    import cupy

    array = cupy.empty(SHAPE, cupy.float32)
    for number in range(BATCHES):
        with cupy.cuda.Stream.null:
            array[:] = number
        yield {"x": SimpleNamespace(ptr=array.data.ptr, shape=array.shape, dtype=np.float32)}


def of_torch():
    import torch

    for number in range(BATCHES):
        yield {"x": torch.full(SHAPE, number, dtype=torch.float32, device="cuda")}


def of_torch_on_a_stream():
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        yield from of_torch()


def of_torch_in_pinned_memory():
    import torch

    for number in range(BATCHES):
        yield {"x": torch.full(SHAPE, number, dtype=torch.float32).pin_memory()}


def of_dali_on_the_gpu():
    from nvidia import dali

    @dali.pipeline_def(batch_size=SHAPE[0], num_threads=2, device_id=0)
    def numbered():
        batches = (np.full(SHAPE, number, np.float32) for number in range(BATCHES))
        return dali.fn.external_source(source=batches, batch=True).gpu() * 1

    return numbered()


SOURCES = [
    on_the_host, of_cupy, of_cupy_on_a_stream, allocated_anew, of_polygraphys_form, of_torch, of_torch_on_a_stream,
    of_torch_in_pinned_memory, of_dali_on_the_gpu,
]  # fmt: skip


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("seconds", [0, 0.002])
@pytest.mark.parametrize("source", SOURCES)
def test_every_batch_is_seen_whole_and_in_order(source, seconds, depth):
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    extremes = cupy.empty((BATCHES, 2), cupy.float32)
    if "torch" in source.__name__:
        pytest.importorskip("torch")
    batches = source() if "dali" in source.__name__ else source
    with ArrayFeed(batches, ["x"], device="cuda", depth=depth) as feed, stream:
        addresses = set()
        for number, batch in enumerate(feed):
            time.sleep(seconds)
            # enqueued only: the buffer must not be filled before this has run
            extremes[number, 0] = batch["x"].min()
            extremes[number, 1] = batch["x"].max()
            addresses.add(batch["x"].data.ptr)
    stream.synchronize()
    assert number == BATCHES - 1
    assert len(addresses) == depth
    assert (extremes.get() == np.repeat(np.arange(BATCHES), 2).reshape(BATCHES, 2)).all()


def test_arrays_are_cupys_on_the_feeds_gpu():
    import cupy

    feed = ArrayFeed([{"x": np.ones((2, 3)), "scalar": np.float32(2)}], device="cuda:0")
    (batch,) = feed
    assert feed.gpu == 0
    assert isinstance(batch["x"], cupy.ndarray)
    assert (batch["x"].device.id, batch["x"].dtype, batch["scalar"].shape) == (0, cupy.float32, ())
    assert float(batch["scalar"]) == 2


@pytest.mark.parametrize("module", ["numpy", "cupy"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_types_orders_and_last_batches_are_as_on_the_cpu(module, device):
    xp = pytest.importorskip(module)

    def given(samples, xp):
        grid = xp.arange(24.0).reshape(2, 3, 4)
        arrays = {
            "double": grid, "turned": grid.astype("f4").transpose(0, 2, 1), "back": grid.astype("f4")[:, ::-1],
            "byte": grid.astype("u1"), "half": grid.astype("f2"), "id": grid.astype("i8"),
        }  # fmt: skip
        return {name: array[:samples] for name, array in arrays.items()}

    for last_batch in ("wrap", "drop", "keep"):
        expected = [
            {name: array.copy() for name, array in batch.items()}
            for batch in ArrayFeed([given(2, np), given(2, np), given(1, np)], last_batch=last_batch, device="cpu")
        ]
        found = [
            {name: _numpy(array) for name, array in batch.items()}
            for batch in ArrayFeed([given(2, xp), given(2, xp), given(1, xp)], last_batch=last_batch, device=device)
        ]
        assert len(found) == len(expected)
        for batch, other in zip(found, expected, strict=True):
            for name, array in other.items():
                assert batch[name].dtype == array.dtype
                assert np.array_equal(batch[name], array)


def _numpy(array):
    return array.copy() if isinstance(array, np.ndarray) else array.get()


class OnlyDLPack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_others_are_waited_for():
    import cupy

    # The copies take long and are only enqueued; what is handed out must be what they leave.
    source, target = cupy.ones(1 << 28, cupy.float32), cupy.zeros(1 << 28, cupy.float32)

    class Foreign:
        __cuda_array_interface__ = {**target.__cuda_array_interface__, "version": 2}  # noqa: RUF012

    del Foreign.__cuda_array_interface__["stream"]
    for foreign in (Foreign, OnlyDLPack(target)):

        def batches(foreign=foreign):
            yield {"x": source}
            target[:] = 0
            for _ in range(20):
                cupy.copyto(target, source)
            yield {"x": foreign}

        with ArrayFeed(batches, device="cuda", last_batch="keep") as feed:
            assert [float(batch["x"].min()) for batch in feed] == [1, 1]


def test_arrays_on_a_gpu_do_not_leave_it():
    import cupy

    feed = ArrayFeed([{"x": cupy.ones((2, 3))}], device="cuda")
    list(feed)
    assert [buffer._staging for buffer in feed._buffers] == [{}, {}]
    feed = ArrayFeed([{"x": np.ones((2, 3))}], device="cuda")
    list(feed)
    assert feed._buffers[0]._staging["x"].shape == (2, 3)


def test_an_array_on_another_gpu():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with cupy.cuda.Device(1):
        array = cupy.ones((2, 3))
    with pytest.raises(
        FastcalError, match=r"lies on GPU 1, the feed's buffers on GPU 0; use ArrayFeed\(batches, device='cuda:1'"
    ):
        list(ArrayFeed([{"x": array}], device="cuda:0"))
    (batch,) = ArrayFeed([{"x": array}], device="cuda:1")
    assert batch["x"].device.id == 1


def test_a_dali_pipeline_on_the_gpu_gives_what_it_gives_on_the_cpu(photographs):
    from nvidia import dali

    @dali.pipeline_def(batch_size=4, num_threads=2)
    def prepared(on_gpu):
        encoded, numbers = dali.fn.readers.file(files=sorted(map(str, photographs.iterdir())))
        images = dali.fn.decoders.image(encoded)
        images = dali.fn.resize(images.gpu() if on_gpu else images, size=(32, 32))
        return dali.fn.cast(images, dtype=dali.types.FLOAT), numbers

    found = []
    for device_id, device in ((None, "cpu"), (0, "cuda"), (0, "cpu")):
        feed = ArrayFeed(prepared(on_gpu=device_id is not None, device_id=device_id), {0: "x", 1: "n"}, device=device)
        found.append([_numpy(batch["x"]) for batch in feed])
    assert len(found[0]) == 2
    assert np.array_equal(found[1], found[2])
    assert np.abs(np.array(found[0]) - found[1]).mean() < 1


def test_tensors_in_files(tmp_path):
    given = np.arange(40, dtype="f4").reshape(10, 4)
    np.save(tmp_path / "0.npy", given[:7])
    np.save(tmp_path / "1.npy", given[7:])
    feed = NumpyFeed(tmp_path, batch_size=4, input_name="x", last_batch="keep", device="cuda")
    for _ in range(2):
        assert np.array_equal(np.concatenate([batch["x"].get() for batch in feed]), given)


def test_passes_left_midway():
    feed = ArrayFeed(of_cupy, device="cuda")
    for _ in range(3):
        next(iter(feed))
    assert [float(batch["x"].max()) for batch in feed] == list(range(BATCHES))
    batches = iter(feed)
    next(batches)
    del feed, batches
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")]
