"""Batches of the caller's in every form they come in. Arrays on a GPU are in test_arrays_gpu.py."""

import gc
import importlib.util
import itertools
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import is_unnamed
from fastcal import ArrayFeed, FastcalError, Feed, ImageFeed, Preprocess, calibrate
from fastcal.device import is_on_gpu, with_interface
from fastcal.feed.feed import length


class Loader:
    """What a PyTorch DataLoader is to a feed: batches as often as it is iterated over, and perhaps a length."""

    def __init__(self, batches):
        self.batches = batches
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


class SizedLoader(Loader):
    def __len__(self):
        return len(self.batches)


class CallableLoader(Loader):
    def __call__(self):
        raise AssertionError("a loader is iterated over")


class OnlyDLPack:
    """An array of a library that NumPy reads through DLPack alone."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def numbers(*sizes):
    """Batches of these sizes, of samples 0, 1, 2 and so on."""
    starts = np.cumsum([0, *sizes])
    return [
        {"x": np.arange(start, start + size, dtype="f4").reshape(-1, 1)}
        for start, size in zip(starts, sizes, strict=False)
    ]


def copied(feed):
    """A pass's batches, as they are when they are handed out."""
    return [{name: array.copy() for name, array in batch.items()} for batch in feed]


def samples(feed):
    """A pass's samples by batch."""
    return [batch["x"].ravel().tolist() for batch in feed]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastcal")]


IMAGE, OTHER, LABEL = np.full((2, 3), 7, "f4"), np.full((2, 1), 8, "f4"), np.array([1, 0])


@pytest.mark.parametrize(
    ("batch", "names", "expected"),
    [
        ({"a": IMAGE, "b": OTHER}, None, {"a": IMAGE, "b": OTHER}),
        ({"a": IMAGE, "b": OTHER, "label": LABEL}, ["b", "a"], {"a": IMAGE, "b": OTHER}),
        ({"pixel_values": IMAGE, "label": LABEL}, {"pixel_values": "a"}, {"a": IMAGE}),
        ((IMAGE, LABEL), None, {"input": IMAGE}),
        ([IMAGE, LABEL], ["a"], {"a": IMAGE}),
        ((IMAGE, OTHER, LABEL), ("a", "b"), {"a": IMAGE, "b": OTHER}),
        ((LABEL, IMAGE), {1: "a"}, {"a": IMAGE}),
        (IMAGE, None, {"input": IMAGE}),
        (IMAGE, ["a"], {"a": IMAGE}),
        (OnlyDLPack(IMAGE), ["a"], {"a": IMAGE}),
        ({"a": [[7, 7, 7], [7, 7, 7]]}, None, {"a": IMAGE}),
    ],
)
def test_arrays_go_to_the_inputs_they_are_named_after(batch, names, expected):
    with ArrayFeed([batch], names) as feed:
        (found,) = copied(feed)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array)
    assert is_unnamed(found) is (names is None and not isinstance(batch, dict))
    assert feed.batch_size == 2


@pytest.mark.parametrize("make", [list, Loader, SizedLoader, CallableLoader, lambda batches: lambda: iter(batches)])
def test_every_pass_has_the_same_batches(make):
    feed = ArrayFeed(make(numbers(2, 2, 2)))
    assert samples(feed) == samples(feed) == [[0, 1], [2, 3], [4, 5]]
    assert len(feed) == 3


def test_a_generator_will_do_for_one_pass():
    feed = ArrayFeed(batch for batch in numbers(2, 2))
    assert feed.batch_size == 2  # which begins the pass and loses nothing
    assert samples(feed) == [[0, 1], [2, 3]]
    with pytest.raises(FastcalError, match="a generator can be gone through only once; give a list, or the function"):
        iter(feed)


@pytest.mark.parametrize(
    "make", [Loader, lambda batches: lambda: batches, lambda batches: (batch for batch in batches)]
)
def test_a_length_that_nobody_tells_is_known_after_a_pass(make):
    feed = ArrayFeed(make(numbers(2, 2, 1)))
    with pytest.raises(TypeError, match="not known before"):
        len(feed)
    assert len(samples(feed)) == len(feed) == 3


def test_a_pass_begun_to_find_something_out_that_fails_is_not_handed_out():
    failures = [OSError("gone")]

    def batches():
        if failures:
            raise failures.pop()
        yield from numbers(2, 2)

    feed = ArrayFeed(batches)
    with pytest.raises(OSError, match="gone"):
        _ = feed.batch_size
    assert samples(feed) == [[0, 1], [2, 3]]


def test_asking_for_the_batch_size_begins_the_pass_that_is_handed_out():
    loader = Loader(numbers(2, 2))
    feed = ArrayFeed(loader)
    assert (feed.batch_size, feed.shapes(), loader.passes) == (2, {"x": (2, 1)}, 1)
    assert samples(feed) == [[0, 1], [2, 3]]
    assert loader.passes == 1
    assert samples(feed) == [[0, 1], [2, 3]]
    assert loader.passes == 2


@pytest.mark.parametrize("ask", [lambda feed: feed.batch_size, lambda feed: feed.shapes()])
def test_asking_during_a_pass_leaves_it_alone(ask):
    def slowly():
        for number in range(3):
            time.sleep(0.05)
            yield np.full((2, 1), number)

    feed = ArrayFeed(slowly(), device="cpu")
    batches = iter(feed)
    ask(feed)
    assert [batch["input"][0, 0] for batch in batches] == [0, 1, 2]


def test_asking_for_shapes_begins_the_pass_that_is_handed_out():
    feed = ArrayFeed({"x": np.ones((2, number + 1), "f4")} for number in range(3))
    assert feed.shapes() == {"x": (2, 1)}
    assert [batch["x"].shape for batch in feed] == [(2, 1), (2, 2), (2, 3)]
    assert feed.shapes() == {"x": (2, 1)}


def test_a_feed_that_was_closed_begins_anew():
    feed = ArrayFeed(SizedLoader(numbers(2, 2)))
    assert feed.batch_size == 2
    feed.close()
    assert samples(feed) == [[0, 1], [2, 3]]
    feed.close()
    assert samples(feed) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("last_batch", "expected"),
    [
        ("wrap", [[0, 1, 2], [3, 4, 5], [6, 0, 1]]),
        ("drop", [[0, 1, 2], [3, 4, 5]]),
        ("keep", [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
def test_a_last_batch_of_fewer_samples(last_batch, expected):
    feed = ArrayFeed(SizedLoader(numbers(3, 3, 1)), last_batch=last_batch)
    assert length(feed) == (None if last_batch == "drop" else 3)  # who knows whether the last is complete
    assert samples(feed) == samples(feed) == expected
    assert len(feed) == len(expected)


def test_batches_of_any_size_and_shape_can_be_kept():
    batches = [{"x": np.full(shape, index, "f4")} for index, shape in enumerate([(2, 3), (5, 3), (1, 4), (2, 3)])]
    for batch, given in zip(ArrayFeed(batches, last_batch="keep"), batches, strict=True):
        assert np.array_equal(batch["x"], given["x"])


def test_types_and_orders_in_memory():
    grid = np.arange(12.0).reshape(3, 4)
    given = {
        "double": grid, "big": grid.astype(">f4"), "turned": grid.astype("f4").T.copy().T, "back": grid[:, ::-1],
        "byte": grid.astype("u1"), "half": grid.astype("f2"), "id": grid.astype("i8"), "mask": grid > 5,
        "scalar": np.float32(3), "big double": grid.astype(">f8"),
    }  # fmt: skip
    (batch,) = copied(ArrayFeed([given]))
    for name, array in batch.items():
        assert np.array_equal(array, given[name])
        assert array.flags.c_contiguous
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "double": "float32", "big": "float32", "turned": "float32", "back": "float32", "byte": "uint8",
        "half": "float16", "id": "int64", "mask": "bool", "scalar": "float32",
        "big double": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize(("make_seconds", "read_seconds"), [(0, 0), (0.002, 0), (0, 0.002)])
def test_no_batch_is_overwritten_while_it_is_read_nor_by_the_next_of_its_owner(depth, make_seconds, read_seconds):
    def batches():
        array = np.empty((4, 50), np.float32)
        for number in range(100):
            time.sleep(make_seconds)
            array[:] = number
            yield {"x": array}  # always the same, as loaders with a buffer of their own do

    addresses = set()
    for number, batch in enumerate(ArrayFeed(batches(), depth=depth)):
        first = batch["x"].copy()
        time.sleep(read_seconds)
        assert (first == number).all()
        assert (batch["x"] == number).all()
        addresses.add(batch["x"].ctypes.data)
    assert number == 99
    assert len(addresses) == depth


def test_the_callers_code_runs_in_the_background():
    seen = []

    def batches():
        for batch in numbers(2, 2):
            seen.append(threading.current_thread())
            yield batch

    samples(ArrayFeed(batches))
    assert len(set(seen)) == 1
    assert threading.main_thread() not in seen


def test_an_error_of_the_callers_comes_through_as_it_is():
    error = ZeroDivisionError("mine")

    def batches():
        yield from numbers(2, 2)
        raise error

    feed = iter(ArrayFeed(batches))
    assert [next(feed)["x"].tolist(), next(feed)["x"].tolist()] == [[[0], [1]], [[2], [3]]]
    with pytest.raises(ZeroDivisionError) as caught:
        next(feed)
    assert caught.value is error
    assert threads() == []


def test_an_error_before_the_first_batch_is_that_of_whoever_asks():
    def batches():
        raise ZeroDivisionError("mine")
        yield

    for ask in (lambda feed: feed.batch_size, lambda feed: feed.describe(), lambda feed: next(iter(feed))):
        with pytest.raises(ZeroDivisionError, match="mine"):
            ask(ArrayFeed(batches))


def test_a_feed_that_is_left_or_deleted_leaves_no_thread_and_ends_the_callers_code():
    ended = []

    def batches():
        try:
            yield from numbers(2, 2, 2, 2, 2, 2)
        finally:
            ended.append(True)

    def left(feed):
        next(iter(feed))
        feed.close()

    def deleted(feed):
        next(iter(feed))

    def only_asked(feed):
        assert feed.batch_size == 2

    for leave in (left, deleted, only_asked):
        leave(ArrayFeed(batches))
        gc.collect()
        assert threads() == []
        assert ended.pop()


def test_a_closed_feed_holds_no_batch():
    def batches():
        for _ in range(3):
            yield {"x": np.ones((1000, 250), "f4")}  # 1 MB

    tracemalloc.start()
    try:
        feed = ArrayFeed(batches)
        samples(feed)
        assert tracemalloc.get_traced_memory()[0] > 2e6
        feed.close()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 0.5e6
    finally:
        tracemalloc.stop()


def test_a_new_pass_cuts_off_the_one_before():
    feed = ArrayFeed(numbers(2, 2, 2))
    first = iter(feed)
    next(first)
    assert samples(feed) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(FastcalError, match="another pass begun, before this one"):
        next(first)


def test_a_list_is_described_by_its_values_and_a_loader_by_its_first_batch():
    def described(make, batches, **options):
        with ArrayFeed(make(batches), **options) as feed:
            return feed.describe()

    batches, others, later = numbers(2, 2), numbers(2, 2), numbers(2, 2)
    others[0]["x"][0] = 9
    later[1]["x"][0] = 9
    for make in (list, Loader, SizedLoader):
        assert described(make, batches) == described(make, numbers(2, 2))
        assert described(make, batches) != described(make, others)
        assert described(make, batches) != described(make, batches, last_batch="drop")
    assert described(list, batches) != described(list, later)
    assert described(Loader, batches) == described(Loader, later)  # nobody has seen so far
    assert described(SizedLoader, batches) != described(SizedLoader, numbers(2, 2, 2))


def test_what_describes_a_feed_does_not_change_with_its_passes():
    feed = ArrayFeed(Loader(numbers(2, 2)))
    before = feed.describe()
    samples(feed)
    samples(feed)
    assert feed.describe() == before


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("requires grad\nand more")


@pytest.mark.parametrize(
    ("batches", "names", "message"),
    [
        ([], None, "there are no batches; give at least one"),
        (lambda: [], None, "there are no batches"),
        (
            lambda: None,
            None,
            "the function that makes batches returned a NoneType; let it return a list, a loader or",
        ),
        ([{"a": np.ones(3), "b": np.ones(4)}], None, r"arrays of batch 0 have first dimensions \[3, 4\]; one size"),
        ([{"a": np.float32(1)}], None, r"arrays of batch 0 have first dimensions \[\]"),
        ([{"a": np.ones((0, 3))}], None, "batch 0 has no samples; leave it out"),
        ([{"a": np.ones(3)}, {"b": np.ones(3)}], None, r"batch 1 has the inputs \['b'\], batch 0 has \['a'\]"),
        ([{"a": np.ones(3)}, {"a": np.ones(3, int)}], None, "batch 1 has 'a' of int64, batch 0 of float32; all need"),
        (numbers(2, 3), None, "batch 1 has 3 samples, batch 0 has 2; only the last may have fewer"),
        (numbers(2, 1, 2), None, "batch 1 has 1 sample, batch 0 has 2; only the last may have fewer"),
        (numbers(2, 1, 1), None, "batch 1 has 1 sample, batch 0 has 2; only the last may have fewer"),
        (
            [{"a": np.ones((3, 2))}, {"a": np.ones((1, 4))}],
            None,
            r"batch 1 has 'a' of shape \(1, 4\), which samples of batch 0, of shape \(3, 2\), cannot complete; drop or",
        ),
        (
            [{"a": IMAGE}],
            ["b"],
            r"batch 0 has 'a', and none for input 'b'; name the arrays after the inputs, or",
        ),
        ([(IMAGE,)], ["a", "b"], "batch 0 has 1 arrays without names, and none for input 'b'"),
        ([{}], ["b"], "batch 0 has no arrays, and none for input 'b'"),
        ([(IMAGE,)], {"a": "x"}, "batch 0 has 1 arrays without names, and none for input 'x'"),
        ([{"a": "text"}], None, r"batch 0, input 'a' holds <U4, str; arrays of numbers are needed"),
        ([{"a": None}], None, "batch 0, input 'a' holds object, NoneType"),
        ([{"a": [[1], [1, 2]]}], None, "batch 0, input 'a' is no array that can be read: setting an array element"),
        ([{"a": Unreadable()}], None, "batch 0, input 'a' is no array that can be read: requires grad$"),
    ],
)
def test_what_is_wrong_with_batches_is_named(batches, names, message):
    with pytest.raises(FastcalError, match=message):
        copied(ArrayFeed(batches, names))
    assert threads() == []


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ({"a": np.ones(3)}, {}, "takes a list of batches, a loader or a DALI pipeline, not a dict"),
        ("images/", {}, "not a str; for files there are ImageFeed and NumpyFeed"),
        (3, {}, "not a int"),
        ([IMAGE], {"names": "a"}, "names is 'a'; give a list of the inputs' names, or a dict"),
        ([IMAGE], {"names": 3}, "names is 3; give a list"),
        ([IMAGE], {"last_batch": "pad"}, "no last_batch 'pad'; choose wrap, drop or keep"),
        ([IMAGE], {"depth": 1}, "depth is 1; it must be at least 2"),
    ],
)
def test_what_is_wrong_with_arguments_is_said_at_once(batches, options, message):
    with pytest.raises(FastcalError, match=message):
        ArrayFeed(batches, **options)


def test_pytorchs_tensors():
    torch = pytest.importorskip("torch")
    images = torch.arange(48, dtype=torch.float64).reshape(2, 3, 2, 4)
    given = {"turned": images.to(torch.float32).contiguous(memory_format=torch.channels_last), "half": images.half()}
    (batch,) = copied(ArrayFeed([given | {"double": images}]))
    for array in batch.values():
        assert array.flags.c_contiguous
        assert np.array_equal(array, images.numpy())
    assert [str(batch[name].dtype) for name in ("turned", "half", "double")] == ["float32", "float16", "float32"]
    with pytest.raises(FastcalError, match=r"batch 0, input 'x' is no array that can be read: .*requires grad"):
        next(iter(ArrayFeed([{"x": torch.ones(2, requires_grad=True)}])))
    with pytest.raises(FastcalError, match=r"batch 0, input 'x' is no array that can be read: .*BFloat16"):
        next(iter(ArrayFeed([{"x": torch.ones(2, dtype=torch.bfloat16)}])))


@pytest.mark.parametrize("workers", [0, 2])
def test_pytorchs_loader(workers):
    torch = pytest.importorskip("torch")
    images = torch.arange(20, dtype=torch.float32).reshape(10, 2)
    data = torch.utils.data.TensorDataset(images, torch.arange(10))
    feed = ArrayFeed(torch.utils.data.DataLoader(data, batch_size=4, num_workers=workers), ["x"], last_batch="keep")
    assert (len(feed), feed.batch_size) == (3, 4)
    for _ in range(2):
        assert np.array_equal(np.concatenate([batch["x"] for batch in copied(feed)]), images.numpy())
    next(iter(feed))
    feed.close()


def test_a_feed_of_pytorchs_tensors_calibrates(onnx_file):
    torch = pytest.importorskip("torch")

    class Own(Feed):
        batch_size = 2

        def __len__(self):
            return 1

        def __iter__(self):
            return iter([{"x": torch.tensor([[1.0], [-3.0]])}])

    path = onnx_file("f (float[N, 1] x) => (float[N, 1] y) { y = Relu(x) }")
    assert calibrate(path, Own(), algorithm="minmax", backend="onnxruntime").scales["x"] == float(
        np.float32(3) / np.float32(127)
    )


@pytest.mark.parametrize("kind", ["arrays", "images"])
def test_threads_that_begin_passes_cut_each_other_off(photographs, kind):
    if kind == "arrays":
        feed = ArrayFeed([np.full((2, 4), number, "f4") for number in range(6)], ["input"], device="cpu")
    else:
        feed = ImageFeed(photographs, preprocess=Preprocess(size=(8, 8)), batch_size=1, device="cpu")
    whole = [batch["input"].copy() for batch in feed]
    found = []

    def work():
        for _ in range(20):
            try:
                found.append([batch["input"].copy() for batch in feed])
            except FastcalError as error:
                assert "cut off" in str(error)  # noqa: PT017
                found.append(None)
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(batches is None or len(batches) == len(whole) for batches in found), found


def test_passes_change_nothing_in_what_a_feed_is_made_from():
    numbers = itertools.count()
    feed = ArrayFeed(lambda: [np.full((2, 1), next(numbers), "f4")], device="cpu")
    described = feed.describe()
    for _ in range(3):
        list(feed)
    assert feed.describe() == described


class View:
    """An array of Polygraphy's form: an address, a shape and a type."""

    def __init__(self, ptr, shape, dtype):
        self.ptr, self.shape, self.dtype = ptr, shape, dtype


@pytest.mark.parametrize("dtype", [np.float16, SimpleNamespace(name="float16")])
def test_an_address_with_a_shape_and_a_type_is_an_array_on_a_gpu(dtype):
    array = with_interface(View(4096, (2, 3), dtype))
    assert array.__cuda_array_interface__ == {
        "data": (4096, False), "shape": (2, 3), "typestr": "<f2", "version": 3, "stream": 1,
    }  # fmt: skip
    assert is_on_gpu(array)
    own = np.ones(3)
    assert with_interface(own) is own


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy reads it: see test_arrays_gpu.py")
def test_an_address_needs_cupy():
    with (
        ArrayFeed([{"x": View(4096, (2, 3), np.float32)}], device="cpu") as feed,
        pytest.raises(FastcalError, match="lies on a GPU, and CuPy, which reads it, is not installed"),
    ):
        list(feed)


@pytest.mark.parametrize("value", [7, 2**47, np.int64(3), np.uint64(2**47)])
@pytest.mark.parametrize("form", [dict, tuple, list])
def test_a_plain_integer_is_no_array(value, form):
    batch = {"x": value, "y": np.ones((1, 2))} if form is dict else form([value, np.ones((1, 2))])
    with (
        ArrayFeed([batch], ["x", "y"], device="cpu") as feed,
        pytest.raises(
            FastcalError,
            match=rf"^batch 0, input 'x' is the number {value}; if it is a device address, give an array over",
        ),
    ):
        list(feed)


def test_an_array_of_one_integer_is_one(onnx_file):
    model = onnx_file("f (int64 k, float[N] x) => (float[N] y) { c = Cast<to = 1>(k) y = Mul(x, c) }")
    batch = {"k": np.array(3), "x": np.array([2.0])}
    assert calibrate(model, [batch], algorithm="minmax", backend="onnxruntime").scales["y"] == pytest.approx(6 / 127)
    with pytest.raises(FastcalError, match="input 'k' is the number 3"):
        calibrate(model, [batch | {"k": 3}], backend="onnxruntime")
