"""Tensors in .npy and .npz files."""

import os

import numpy as np
import pytest

from conftest import DIGITS, is_unnamed
from fastcal import FastcalError, ImageFeed, NumpyFeed, calibrate
from fastcal.feed.dataset import are_arrays

ONE = "f (float[N, 2, 3] x) => (float[N, 2, 3] y) { y = Relu(x) }"
TWO = "f (float[N, 2] x, int64[N, 1] i) => (float[N, 1] y) { y = GatherElements<axis = 1>(x, i) }"


def sample(number):
    return np.full((2, 3), number, "f4")


def batch(*numbers):
    return np.array([sample(number) for number in numbers], "f4").reshape(-1, 2, 3)


@pytest.fixture
def save(tmp_path):
    """A function that saves arrays: .npy files by name, .npz files where it is given a dict."""

    def save(**files):
        folder = tmp_path / "arrays"
        for name, values in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **values) if isinstance(values, dict) else np.save(path, values)
        return folder

    return save


def seen(feed, name="x"):
    """The samples of a pass by batch, each told by its first element."""
    return [array[name].reshape(len(array[name]), -1)[:, 0].tolist() for array in feed]


@pytest.mark.parametrize(
    "files",
    [
        {"a": sample(0), "b": sample(1), "c__d": sample(2), "e": sample(3), "f": sample(4)},
        {"a": batch(0, 1, 2), "b": batch(3), "c": batch(4)},
        {"all": batch(0, 1, 2, 3, 4)},
        {"a": {"x": batch(0, 1, 2, 3), "label": np.arange(4)}, "b": {"x": batch(4), "label": np.arange(1)}},
        {
            "a": {"x": sample(0)},
            "b": {"x": sample(1)},
            "c": {"x": sample(2)},
            "d": {"x": sample(3)},
            "e": {"x": sample(4)},
        },
        {"a": {"arr_0": batch(0, 1, 2, 3, 4)}},
    ],
)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 2}, [[0, 1], [2, 3], [4]]),
        ({"batch_size": 2, "last_batch": "wrap"}, [[0, 1], [2, 3], [4, 0]]),
        ({"batch_size": 2, "last_batch": "drop"}, [[0, 1], [2, 3]]),
        ({"batch_size": 2, "last_batch": "keep"}, [[0, 1], [2, 3], [4]]),
        ({"batch_size": 7}, [[0, 1, 2, 3, 4]]),
        ({"batch_size": 7, "last_batch": "wrap"}, [[0, 1, 2, 3, 4, 0, 1]]),
        ({"batch_size": 7, "last_batch": "keep"}, [[0, 1, 2, 3, 4]]),
        ({"batch_size": 3, "limit": 3}, [[0, 1, 2]]),
    ],
)
def test_a_file_holds_a_sample_or_a_batch_or_all(onnx_file, save, files, options, expected):
    feed = NumpyFeed(save(**files), model=onnx_file(ONE), device="cpu", **options)
    assert len(feed) == len(expected)
    assert feed.batch_size == len(expected[0])
    assert seen(feed) == seen(feed) == expected
    feed.close()


def test_the_models_batch_size_is_the_default(onnx_file, save):
    folder = save(all=np.zeros((40, 2, 3), "f4"))
    assert NumpyFeed(folder, model=onnx_file(ONE)).batch_size == 32
    fixed = onnx_file(ONE.replace("N", "8"))
    assert NumpyFeed(folder, model=fixed).batch_size == 8
    assert NumpyFeed(folder, model=fixed, batch_size=4).batch_size == 4


def test_without_a_model_the_first_dimension_counts_samples(save):
    folder = save(a=batch(0, 1), b=batch(2, 3))
    feed = NumpyFeed(folder, batch_size=2)
    assert all(map(is_unnamed, feed))
    assert seen(feed, "input") == [[0, 1], [2, 3]]
    assert seen(NumpyFeed(folder, batch_size=4, input_name="x")) == [[0, 1, 2, 3]]
    folder = save(c__d={"x": batch(0, 1), "y": batch(2, 3)})
    (both,) = NumpyFeed(folder / "c" / "d.npz", batch_size=2)
    assert both.keys() == {"x", "y"}


def test_shuffling_is_of_samples_and_the_seeds(save):
    folder = save(a=batch(*range(10)), b=batch(*range(10, 25)))
    orders = [seen(NumpyFeed(folder, batch_size=25, input_name="x", shuffle=True, seed=seed))[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(25)) != orders[0]
    assert seen(NumpyFeed(folder, batch_size=5, input_name="x", shuffle=True, limit=5)) == [orders[0][:5]]


def test_what_can_name_files(save, tmp_path, monkeypatch):
    folder = save(a=batch(0), b=batch(1), c__d=batch(2))
    (folder / "notes.txt").write_text("not an array")
    (folder / ".hidden.npy").write_bytes(b"")
    np.save(folder / ".named.npy", batch(3))
    for data, expected in (
        (folder, [0, 1, 2]),
        (str(folder / "?.npy"), [0, 1]),
        (str(folder / "**" / "*"), [0, 1, 2]),
        (str(folder / ".named*"), [3]),
        (folder / "b.npy", [1]),
        ([folder / "c" / "d.npy", str(folder / "a.npy")], [2, 0]),
    ):
        assert seen(NumpyFeed(data, batch_size=len(expected), input_name="x")) == [expected]


def test_links_list_files_and_ranges(save, tmp_path):
    folder = save(**{f"{number:02}": batch(number) for number in (8, 9, 10)})
    elsewhere = save(other__11=batch(11)) / "other"
    elsewhere.rename(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link" / "circle").symlink_to(folder)
    (folder / "list.txt").write_text("10.npy\n\nlink/11.npy\n")
    for data, expected in (
        (folder, [8, 9, 10, 11]),
        (folder / "list.txt", [10, 11]),
        (f"{folder}/{{08..10}}.npy", [8, 9, 10]),
    ):
        assert are_arrays(str(data))
        assert seen(NumpyFeed(data, batch_size=len(expected), input_name="x")) == [expected]
        assert seen(NumpyFeed({"x": data}, batch_size=len(expected))) == [expected]
    (folder / "list.txt").write_text("10.npy\n12.npy\n")
    with pytest.raises(FastcalError, match=r"list file .*list.txt, entry 2: no such file: .*12.npy"):
        NumpyFeed(folder / "list.txt")
    with pytest.raises(FastcalError, match=r"pattern .*, entry 4: no such file: .*11.npy"):
        NumpyFeed(f"{folder}/{{08..11}}.npy")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.npy"], True),
        (["a.npy", "b/c.NPZ", ".hidden.jpg", "notes.txt"], True),
        (["a.npy", "b/c.jpg"], False),
        (["a.npy", "b.tar"], False),
        (["a.jpg"], False),
        (["notes.txt", ".hidden.npy"], False),
        ([], False),
    ],
)
def test_a_folder_has_arrays_if_it_has_neither_images_nor_shards(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert are_arrays(str(tmp_path)) is expected
    assert are_arrays(f"{tmp_path}/**") is expected
    assert are_arrays([tmp_path / name for name in names if not name.startswith(".")]) is expected
    assert not are_arrays(str(tmp_path / "nowhere"))


def test_names_in_capitals(save):
    folder = save(a=batch(0), b={"x": batch(1)})
    npy, npz = (folder / "a.npy").rename(folder / "A.NPY"), (folder / "b.npz").rename(folder / "B.Npz")
    assert are_arrays(str(npy))
    assert are_arrays(str(npz))
    assert seen(NumpyFeed(npy, batch_size=1, input_name="x")) == [[0]]
    assert seen(NumpyFeed(f"{folder}/B*", batch_size=1)) == [[1]]
    assert seen(NumpyFeed({"x": [npy]}, batch_size=1)) == [[0]]
    assert are_arrays(str(folder))
    with pytest.raises(FastcalError, match=r"has arrays \(.*A.NPY\) and array archives \(.*B.Npz\)"):
        NumpyFeed(folder)


def test_several_inputs(onnx_file, save):
    x, i = np.arange(8, dtype="f4").reshape(4, 2), np.array([[0], [1], [0], [1]])
    folder = save(x__all=x, i__0=i[:2], i__1=i[2:], both={"i": i, "x": x, "label": i})
    model = onnx_file(TWO)
    for data in ({"x": folder / "x", "i": folder / "i"}, folder / "both.npz"):
        feed = NumpyFeed(data, model=model, batch_size=2, device="cpu")
        found = [{name: array.tolist() for name, array in batch.items()} for batch in feed]
        assert found == [{"x": x[:2].tolist(), "i": i[:2].tolist()}, {"x": x[2:].tolist(), "i": i[2:].tolist()}]


def test_arrays_are_converted_to_the_models_types(onnx_file, save):
    folder = save(a={"x": np.uint8([[255, 3]]), "i": np.int32([[1]])})
    ((found),) = NumpyFeed(folder, model=onnx_file(TWO), batch_size=1, device="cpu")
    assert (found["x"].dtype, found["i"].dtype, found["x"].tolist()) == (np.float32, np.int64, [[255, 3]])


def test_a_record_tells_files_and_settings_apart(save):
    folder = save(a=batch(0, 1), b=batch(2, 3))

    def described(**options):
        return NumpyFeed(folder, **{"batch_size": 2, **options}).describe()

    assert described() == described() != described(batch_size=1)
    assert described(limit=2) != described() != described(shuffle=True)
    assert described(shuffle=True) != described(shuffle=True, seed=1)
    samples = [
        described(**options)["samples"]
        for options in ({}, {"shuffle": True}, {"shuffle": True, "seed": 1}, {"input_name": "x"}, {"input_name": "y"})
    ]
    assert len(set(samples)) == len(samples)
    before = described()
    np.save(folder / "b.npy", batch(2, 4))
    os.utime(folder / "b.npy", ns=(1, 1))
    assert described() != before


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "arrays is empty; name a folder with .npy, .npz files"),
        (
            {"a": batch(0), "b": {"x": batch(0)}},
            {},
            r"has arrays \(.*a.npy\) and array archives \(.*b.npz\); say which with a pattern",
        ),
        (
            {"a": batch(0), "b": np.zeros((1, 2, 4), "f4")},
            {},
            r"b.npy is float32 \(1, 2, 4\), .*a.npy float32 \(1, 2, 3\)",
        ),
        ({"a": batch(0), "b": batch(0).astype("f8")}, {}, r"b.npy is float64 .*, .*a.npy float32"),
        ({"a": np.float32(3)}, {}, "a.npy is one number; an array's first dimension is to count samples"),
        ({"a": batch(0)}, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (
            {"a": batch(0)},
            {"batch_size": 10**12},
            r"2 batches of 1000000000000 samples take 44703.5 GiB of memory, and .* are free; use a smaller batch size",
        ),
        ({"a": batch(0)}, {"last_batch": "pad"}, "no last_batch 'pad'"),
        ({"a": batch(0)}, {"batch_size": 2, "last_batch": "drop"}, "1 sample: no batch of 2 is left"),
        (
            {"a": np.zeros((2, 2, 4), "f4")},
            {"model": ONE},
            r"model.onnx takes input 'x' \(\?, 2, 3\), .*a.npy is \(2, 2, 4\)",
        ),
        (
            {"a": np.zeros((2, 4), "f4")},
            {"model": ONE},
            r"takes input 'x' \(\?, 2, 3\), .*a.npy is \(1, 2, 4\); save one",
        ),
        ({"a": np.zeros(3, "f4")}, {"model": ONE}, r"takes input 'x' \(\?, 2, 3\), .*a.npy is \(3\)"),
        ({"a": np.zeros((2, 2, 3), "c8")}, {"model": ONE}, "takes input 'x' as float32, .*a.npy is complex64; convert"),
        ({"a": batch(0)}, {"model": TWO}, "takes the inputs 'x', 'i', .*a.npy has one array without a name; name the"),
        ({"a": {"x": batch(0)}}, {"model": TWO}, r"takes the inputs 'x', 'i', .*a.npz has the arrays 'x'; save it"),
        ({"a": {"x": batch(0)}}, {"input_name": "x"}, "a.npz says itself which input its arrays are for"),
        ({"a": {"x": batch(0)}, "b": {"y": batch(0)}}, {}, "b.npz has no array 'x', which other files have"),
        ({"a": batch(0)}, {"model": ONE, "input_name": "z"}, "takes the inputs 'x', the files are for 'z'; name"),
        ({"a": {}}, {}, "a.npz has no arrays; save it with numpy.savez"),
        ({"a": {"x": batch()}}, {}, "there are no batches; give at least one"),
        ({"a": np.array([{}])}, {}, "cannot read .*a.npy: damaged, or no array of numbers; replace or remove it"),
    ],
)
def test_what_is_wrong_is_named(onnx_file, save, files, options, message):
    if "model" in options:
        options = {**options, "model": onnx_file(options["model"])}
    folder = save(**files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(FastcalError, match=message):
        list(NumpyFeed(folder, device="cpu", **options))


def test_different_numbers_of_samples_and_files_of_the_wrong_kind(onnx_file, save):
    folder = save(x__a=np.zeros((3, 2), "f4"), i__a=np.zeros((2, 1), int), z={"x": batch(0)})
    with pytest.raises(FastcalError, match="different numbers of samples, 'x' 3, 'i' 2; every sample needs"):
        NumpyFeed({"x": folder / "x", "i": folder / "i"}, model=onnx_file(TWO))
    with pytest.raises(FastcalError, match=r"z.npz is an array archive, no array; name .npy files"):
        NumpyFeed({"x": folder / "z.npz"})
    with pytest.raises(FastcalError, match=r"no such file or folder: .*nowhere; name a folder"):
        NumpyFeed(folder / "nowhere")
    with pytest.raises(FastcalError, match=r"no such file or folder: .*x{300}; name a folder"):
        NumpyFeed(folder / ("x" * 300))
    for data in ("", {"x": ""}):
        with pytest.raises(
            FastcalError, match="the name of the data is empty; name a folder, a pattern, a list file or a file"
        ):
            NumpyFeed(data)


def test_as_many_samples_as_there_are_make_a_batch_of_any_size(save):
    folder = save(a=batch(0, 1))
    assert seen(NumpyFeed(folder, batch_size=10**12, last_batch="keep", input_name="x")) == [[0, 1]]


@pytest.mark.parametrize("name", ["b.npy", "b.npz"])
def test_a_damaged_file_is_named(save, name):
    folder = save(a=batch(0), b=batch(1)) if name == "b.npy" else save(a={"x": batch(0)}, b={"x": batch(1)})
    whole = (folder / name).read_bytes()
    unclosed = whole.replace(b"'shape': (", b"'shape': {", 1)  # which Python's tokenizer rejects
    encrypted = whole.replace(b"PK\1\2\x2d\3\x2d\0\0\0", b"PK\1\2\x2d\3\x2d\0\1\0")
    unknown = whole.replace(b"PK\1\2\x2d\3\x2d\0", b"PK\1\2\x2d\3\xff\0")
    damaged = [unclosed] if name == "b.npy" else [encrypted, unknown]
    assert whole not in damaged
    for content in (whole[:-1], whole[:60], b"", b"no array", *damaged):
        (folder / name).write_bytes(content)
        with pytest.raises(FastcalError, match=rf"cannot read .*{name}: damaged, or no array of numbers"):
            list(NumpyFeed(folder, batch_size=1))
        with pytest.raises(FastcalError, match=rf"cannot read .*{name}: damaged, or no array of numbers"):
            NumpyFeed(folder / name, batch_size=1)


def test_a_files_content_decides_and_not_its_name(save):
    folder = save(a=batch(0, 1), b={"x": batch(2, 3)})
    for name, other, numbers in (("a.npy", "c.npz", [0, 1]), ("b.npz", "d.npy", [2, 3]), ("a.npy", "e.dat", [0, 1])):
        (folder / other).write_bytes((folder / name).read_bytes())
        assert seen(NumpyFeed(folder / other, batch_size=2, input_name=None if name == "b.npz" else "x")) == [numbers]


def test_a_file_that_is_gone_in_the_middle_of_a_pass_is_named(save):
    folder = save(**{f"{number:02}": batch(number) for number in range(20)})
    feed = NumpyFeed(folder, batch_size=1, input_name="x")
    batches = iter(feed)
    next(batches)
    (folder / "15.npy").unlink()
    with pytest.raises(FastcalError, match=r"cannot read .*15.npy: No such file or directory"):
        list(batches)


def test_a_calibration_with_arrays_is_the_one_with_the_images_they_were_made_of(tmp_path):
    model = DIGITS / "digits.onnx"
    with ImageFeed(DIGITS / "images", model=model, batch_size=32, device="cpu", limit=64) as feed:
        for number, images in enumerate(feed):
            np.save(tmp_path / f"{number}.npy", images["image"])
        expected = calibrate(model, feed, backend="onnxruntime").scales
    assert calibrate(model, NumpyFeed(tmp_path, model=model), backend="onnxruntime").scales == expected


TEXT = """f (int64[N, T] ids, float[N, T] mask) => (float[N, 4] y) {
  e = Gather(table, ids) i = Unsqueeze(mask, last) m = Mul(e, i) y = ReduceMean<axes = [1], keepdims = 0>(m)
}"""
TABLE = {"table": np.random.default_rng(0).normal(size=(9, 4)).astype("f4"), "last": np.int64([2])}


def text(length, count=None):
    """The inputs for a text of so many words; or for so many texts of one length."""
    ids = np.arange(length) % 9 if count is None else np.tile(np.arange(length) % 9, (count, 1))
    return {"ids": ids, "mask": np.ones(ids.shape, "f4")}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([text(5), text(3), text(8)], [5, 3, 8]),
        ([text(5, 1), text(3, 1)], [5, 3]),
        ([text(5, 2), text(3, 1), text(4, 3)], [5, 5, 3, 4, 4, 4]),
    ],
)
def test_samples_of_different_lengths_come_one_by_one(onnx_file, save, files, expected):
    model = onnx_file(TEXT, TABLE)
    folder = save(**{f"{number}": arrays for number, arrays in enumerate(files)})
    feed = NumpyFeed(folder, model=model, device="cpu")
    assert (feed.batch_size, len(feed), feed.samples) == (1, len(expected), len(expected))
    for _ in range(2):
        assert [batch["ids"].shape for batch in feed] == [(1, length) for length in expected]
    assert [batch["mask"].shape for batch in feed] == [(1, length) for length in expected]
    by_file = calibrate(model, feed, backend="onnxruntime", algorithm="minmax")
    alone = [{name: array.reshape(-1, array.shape[-1])[:1] for name, array in arrays.items()} for arrays in files]
    assert by_file.scales == calibrate(model, alone, backend="onnxruntime", algorithm="minmax").scales
    feed.close()


def test_lengths_that_make_no_batch(onnx_file, save):
    folder = save(a=text(5), b=text(3))
    model = onnx_file(TEXT, TABLE)
    assert len(NumpyFeed(folder, model=model, batch_size=1, device="cpu")) == 2
    with pytest.raises(FastcalError, match="the samples have different shapes, which make no batch of 4; leave out"):
        NumpyFeed(folder, model=model, batch_size=4, device="cpu")


@pytest.mark.parametrize(
    ("shape", "files"),
    [
        ("[N, 4]", [np.zeros((1, 4), "f4"), np.zeros((1, 5), "f4")]),
        ("[2, T]", [np.zeros((2, 4), "f4"), np.zeros((2, 5), "f4")]),
        ("[N, T, 4]", [np.zeros((1, 3, 4), "f4"), np.zeros((1, 3, 5), "f4")]),
        ("[N, T]", [np.zeros((1, 4), "f4"), np.zeros((1, 5, 1), "f4")]),
        ("[N, T]", [np.zeros((1, 4), "f4"), np.zeros((1, 5), "f8")]),
        ("[N]", [np.zeros(3, "f4"), np.zeros((), "f4")]),
    ],
)
def test_lengths_that_the_model_does_not_take(onnx_file, save, shape, files):
    model = onnx_file(f"f (float{shape} x) => (float y) {{ y = ReduceSum<keepdims = 0>(x) }}")
    message = r"1.npy is float.*; samples must have one shape and type, unless a dynamic dimension of 'x' .* one by one"
    with pytest.raises(FastcalError, match=message):
        NumpyFeed(save(**{"0": files[0], "1": files[1]}), model=model, device="cpu")


def test_the_memory_for_the_longest_sample_counts(onnx_file, save, monkeypatch):
    folder, model = save(a=text(5), b=text(30)), onnx_file(TEXT, TABLE)
    for free, fits in ((3 * 30 * (8 + 4), True), (3 * 30 * (8 + 4) - 1, False)):
        monkeypatch.setattr("fastcal.memory.free_memory", lambda free=free: free)
        if fits:
            NumpyFeed(folder, model=model, device="cpu").close()
        else:
            with pytest.raises(FastcalError, match="3 batches of 1 sample take"):
                NumpyFeed(folder, model=model, device="cpu")
