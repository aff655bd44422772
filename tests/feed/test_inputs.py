"""Several inputs: what belongs together stays together, and mistakes are seen."""

import shutil

import numpy as np
import pytest
from PIL import Image

import fastcal
from conftest import alter, is_unnamed
from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.image_plan import Decoding

SMALL = Preprocess(size=(8, 8))
MODEL = """f (float[N, 3, 8, 8] left, float[N, 3, 6, 4] right, float[N, 2, 3] pose) => (float[N, 2, 3] y)
{ y = Relu(pose) }"""


def write_image(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (level, level, level)).save(path)


@pytest.fixture
def scenes(tmp_path):
    """Left and right images and a pose of scene n, all telling n: 10 n, 10 n + 1, and n times ones."""
    for number in range(7):
        write_image(tmp_path / "left" / f"{number}.png", 10 * number)
        write_image(tmp_path / "right" / f"{number}.png", 10 * number + 1)
        np.save(tmp_path / "left" / f"{number}.npy", np.full((2, 3), number, ">f8"))
    return tmp_path


def all_of(feed):
    with feed:
        return [{name: array.copy() for name, array in batch.items()} for batch in feed]


def scene_numbers(batches):
    """The scenes in the batches' order, which left, right and pose agree on."""
    numbers = []
    for batch in batches:
        left, right = (batch[name].mean(axis=(1, 2, 3)) for name in ("left", "right"))
        np.testing.assert_array_equal(right, left + 1)
        np.testing.assert_array_equal(batch["pose"].mean(axis=(1, 2)) * 10, left)
        numbers += (left / 10).astype(int).tolist()
    return numbers


def data_of(folder):
    return {"left": folder / "left", "right": folder / "right", "pose": str(folder / "left" / "*.npy")}


def test_what_belongs_together_has_one_place(scenes):
    feed = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=3)
    batches = all_of(feed)
    assert {name: (array.shape, array.dtype) for name, array in batches[0].items()} == {
        "left": ((3, 3, 8, 8), np.float32),
        "right": ((3, 3, 8, 8), np.float32),
        "pose": ((3, 2, 3), np.float32),
    }
    assert scene_numbers(batches) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert feed.paths == [str(scenes / "left" / f"{number}.png") for number in range(7)]
    assert not any(map(is_unnamed, batches))
    shuffled = scene_numbers(all_of(ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=7, shuffle=True, seed=3)))
    assert sorted(shuffled) == list(range(7)) != shuffled
    limited = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=2, shuffle=True, seed=3, limit=4)
    assert scene_numbers(all_of(limited)) == shuffled[:4]


def test_a_scene_is_skipped_as_a_whole(scenes):
    (scenes / "left" / "1.png").write_bytes(b"no image")
    (scenes / "right" / "3.png").write_bytes(b"")
    (scenes / "left" / "4.npy").write_bytes(b"no array")
    feed = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=3)
    with feed, pytest.raises(FastcalError, match=r"left/1.png cannot be decoded"):
        list(feed)
    for batch_size in (2, 3):
        feed = ImageFeed(
            data_of(scenes), preprocess=SMALL, batch_size=batch_size, skip_unreadable=True, max_unreadable=50
        )
        for _ in range(2):
            assert scene_numbers(all_of(feed)) == [0, 2, 5, 6, 0, 2][: 4 if batch_size == 2 else 6]
        assert feed.skipped == [str(scenes / "left" / f"{number}.png") for number in (1, 3, 4)]
    (scenes / "left" / "1.png").unlink()
    (scenes / "left" / "1.png").symlink_to(scenes / "left" / "0.png")
    (scenes / "right" / "3.png").unlink()
    shutil.copy(scenes / "right" / "2.png", scenes / "right" / "3.png")
    with (
        ImageFeed(data_of(scenes), preprocess=SMALL) as feed,
        pytest.raises(FastcalError, match=r"cannot read .*4.npy"),
    ):
        list(feed)


def test_a_scene_of_two_broken_images_is_logged_once(scenes, caplog):
    (scenes / "left" / "1.png").write_bytes(b"no image")
    (scenes / "right" / "1.png").write_bytes(b"no image")
    feed = ImageFeed(
        data_of(scenes), preprocess=SMALL, batch_size=1, skip_unreadable=True, max_unreadable=60, device="cpu"
    )
    assert scene_numbers(all_of(feed)) == [0, 2, 3, 4, 5, 6]
    assert len([record for record in caplog.records if "skipped" in record.getMessage()]) == 1


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_fewer_batches_are_left_than_were_begun_with(scenes, monkeypatch, ahead):
    """After scene 1 the pipeline begins again with as many batches as there may be, most of which there are not."""
    monkeypatch.setattr(Decoding, "ahead", ahead)  # as on a GPU
    (scenes / "left" / "1.png").write_bytes(b"no image")
    for number in (4, 5, 6):
        (scenes / "left" / f"{number}.npy").write_bytes(b"no array")
    feed = ImageFeed(
        data_of(scenes), preprocess=SMALL, batch_size=1, skip_unreadable=True, max_unreadable=60, device="cpu"
    )
    for _ in range(3):
        assert scene_numbers(all_of(feed)) == [0, 2, 3]


def test_inputs_have_preprocessings_of_their_own(scenes):
    preprocess = {"left": "unit", "right": Preprocess(size=(5, 6), channels="GRAY", layout="NHWC")}
    data = {"left": scenes / "left", "right": scenes / "right"}
    feed = ImageFeed(data, preprocess=preprocess, batch_size=7)
    (batch,) = all_of(feed)
    assert batch["left"].shape == (7, 3, 224, 224)
    np.testing.assert_allclose(batch["left"][6], 60 / 255, rtol=1e-6)
    assert batch["right"].shape == (7, 5, 6, 1)
    np.testing.assert_array_equal(batch["right"][6], 61)
    assert feed.preprocess == {"left": Preprocess.preset("unit"), "right": preprocess["right"]}
    described = feed.describe()
    assert described["preprocess"] == {name: str(value) for name, value in feed.preprocess.items()}
    other = ImageFeed(data, preprocess={**preprocess, "left": "raw"}, batch_size=7).describe()
    assert {key for key in described if described[key] != other[key]} == {"preprocess"}
    (scenes / "right" / "4.png").touch()
    assert ImageFeed(data, preprocess=preprocess, batch_size=7).describe()["samples"] == described["samples"]
    alter(scenes / "right" / "4.png")
    assert ImageFeed(data, preprocess=preprocess, batch_size=7).describe()["samples"] != described["samples"]
    with pytest.raises(FastcalError, match="preprocess is given for 'left', images for 'left', 'right'; name the same"):
        ImageFeed(data, preprocess={"left": "unit"})


def test_swapped_inputs_are_other_samples(scenes):
    left, right = scenes / "left", scenes / "right"
    one = ImageFeed({"a": left, "b": right}, preprocess=SMALL).describe()
    assert one["samples"] != ImageFeed({"a": right, "b": left}, preprocess=SMALL).describe()["samples"]
    assert one["samples"] == ImageFeed({"a": left, "b": right}, preprocess=SMALL).describe()["samples"]


def test_one_input_and_its_arrays(scenes):
    feed = ImageFeed({"left": scenes / "left", "pose": f"{scenes}/left/*.npy"}, preprocess=SMALL, batch_size=7)
    (batch,) = all_of(feed)
    np.testing.assert_array_equal(batch["pose"][:, 1, 2], np.arange(7))
    assert feed.preprocess == SMALL


def test_constants_join_in(scenes):
    feed = ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=7, constants={"scale": np.float32([2])})
    (batch,) = all_of(feed)
    assert list(batch) == ["left", "right", "pose", "scale"]
    with pytest.raises(FastcalError, match="input 'pose' takes samples; it cannot be a constant too"):
        ImageFeed(data_of(scenes), preprocess=SMALL, constants={"pose": np.float32([2])})


def test_constants_are_no_samples(scenes, onnx_file):
    model = onnx_file(
        "f (float[N, 3, 8, 8] left, float[100, 1] table) => (float[N, 3, 8, 8] y) "
        "{ s = ReduceMax<keepdims = 0>(table) y = Add(left, s) }"
    )
    table = np.zeros((100, 1), np.float32)
    seen = []
    with ImageFeed(
        {"left": scenes / "left"}, preprocess="raw", model=model, batch_size=2, constants={"table": table}, device="cpu"
    ) as feed:
        fastcal.calibrate(model, feed, algorithm="minmax", progress=lambda state: seen.append(state.images))
    assert seen == [2, 4, 6, 7]


def test_constants_are_no_samples_of_a_classifier(scenes, onnx_file):
    model = onnx_file(
        "f (float[N, 3, 8, 8] left, float[100, 1] table) => (float[N, 4] y) "
        "{ s = ReduceMax<keepdims = 0>(table) p = GlobalAveragePool(left) f = Flatten(p) g = MatMul(f, w) "
        "y = Add(g, s) }",
        {"w": np.random.default_rng(0).standard_normal((3, 4), dtype="f4")},
    )
    table = {"table": np.zeros((100, 1), np.float32)}
    with ImageFeed(
        {"left": scenes / "left"}, preprocess="raw", model=model, batch_size=2, constants=table, device="cpu"
    ) as feed:
        compared = fastcal.compare(model, feed)
    assert compared.images == 7
    assert all(quality.agreement is not None for quality in compared.qualities.values())


def test_shapes_are_those_of_the_batches_and_no_pass_is_begun_for_them(scenes):
    with ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=3, constants={"scale": np.float32([2])}) as feed:
        batches = iter(feed)
        shapes = [{name: array.shape for name, array in next(batches).items()}]
        assert [feed.shapes()] == shapes
        assert len(list(batches)) == len(feed) - 1


def test_different_numbers_are_shown_and_the_odd_one_named(scenes):
    (scenes / "right" / "2.png").unlink()
    with pytest.raises(
        FastcalError,
        match=r"input 'left' has 7 samples, input 'right' has 6; every sample needs both; .*left/2.png has no partner",
    ):
        ImageFeed(data_of(scenes), preprocess=SMALL)
    shutil.rmtree(scenes / "right")
    write_image(scenes / "right" / "x.png", 0)
    with pytest.raises(
        FastcalError, match=r"input 'left' has 7 samples, input 'right' has 1; every sample needs both$"
    ):
        ImageFeed(data_of(scenes), preprocess=SMALL)


def test_names_in_another_order_are_a_mistake_unless_it_was_given(scenes):
    (scenes / "right" / "2.png").rename(scenes / "right" / "9.png")
    with pytest.raises(
        FastcalError,
        match=r"sample 3 is .*left/3.png for input 'left' and .*right/4.png for input 'right', though .*'3'",
    ):
        ImageFeed(data_of(scenes), preprocess=SMALL)
    paths = {side: sorted((scenes / side).iterdir())[-4:] for side in ("left", "right")}
    assert len(ImageFeed({**paths, "left": list(scenes.glob("left/*.png"))[:4]}, preprocess=SMALL).paths) == 4
    siamese = {"left": sorted(scenes.glob("left/*.png")), "right": sorted(scenes.glob("left/*.png"))[::-1]}
    (batch,) = all_of(ImageFeed(siamese, preprocess=SMALL, batch_size=7))
    np.testing.assert_array_equal(batch["left"], batch["right"][::-1])


def test_names_that_have_nothing_in_common_go_by_order(scenes):
    for path in (scenes / "right").iterdir():
        path.rename(path.with_name(f"right_{path.name}"))
    assert scene_numbers(all_of(ImageFeed(data_of(scenes), preprocess=SMALL, batch_size=7))) == list(range(7))


def test_the_model_gives_sizes_and_the_batch(scenes, onnx_file):
    feed = ImageFeed(data_of(scenes), preprocess="raw", model=onnx_file(MODEL), batch_size=7)
    (batch,) = all_of(feed)
    assert {name: array.shape for name, array in batch.items()} == {
        "left": (7, 3, 8, 8), "right": (7, 3, 6, 4), "pose": (7, 2, 3)
    }  # fmt: skip
    fixed = onnx_file(MODEL.replace("N", "2"))
    assert ImageFeed(data_of(scenes), preprocess="raw", model=fixed).batch_size == 2


@pytest.mark.parametrize(
    ("graph", "data", "message"),
    [
        (MODEL.replace("pose", "pos"), {}, "takes the inputs 'left', 'right', 'pos', and none of the name 'pose'|"
                                           "the inputs 'left', 'right', 'pos', the feed has none for 'pos'"),
        (MODEL, {"pose": None}, "takes the inputs 'left', 'right', 'pose', the feed has none for 'pose'"),
        (MODEL.replace("2, 3", "3, 3"), {}, r"takes float32 for input 'pose' \(\?, 3, 3\), the arrays are float32 "
                                            r"\(7, 2, 3\)"),
        (MODEL.replace("float[N, 2, 3]", "int64[N, 2, 3]").replace("Relu", "Identity"), {},
         r"takes int64 for input 'pose' \(\?, 2, 3\), the arrays are float32 \(7, 2, 3\); give"),
        (MODEL.replace("8, 8", "8"), {}, r"input 'left' \(\?, 3, 8\): it takes no images"),
        (MODEL.replace("float[N, 3, 8, 8]", "int64[N, 3, 8, 8]"), {}, r"takes int64 for input 'left' .*images are"),
        (MODEL.replace("float[N, 3, 8, 8] l", "int8[N, 3, 8, 8] l"), {}, r"takes int8 for input 'left' .*feed it"),
        (MODEL, {"image": "left"}, "takes the inputs 'left', 'right', 'pose', and none of the name 'image'"),
    ],
)  # fmt: skip
def test_what_contradicts_the_model_is_shown_with_both_sides(scenes, onnx_file, graph, data, message):
    data = data_of(scenes) | {name: where and scenes / where for name, where in data.items()}
    data = {name: where for name, where in data.items() if where is not None}
    with pytest.raises(FastcalError, match=message):
        ImageFeed(data, preprocess="raw", model=onnx_file(graph), batch_size=7)


def test_constants_are_held_against_the_model(scenes, onnx_file):
    model = onnx_file("f (float[1, 3, 8, 8] x, float[2] c) => (float[2] y) { y = Relu(c) }")

    def feed(**constants):
        return ImageFeed(scenes / "left", preprocess="raw", model=model, input_name="x", constants=constants)

    assert feed(c=[1.0, 2.0]).batch_size == 1
    with pytest.raises(FastcalError, match=r"the inputs 'x', 'c'; name the data of each \(NAME=DATA,NAME=DATA"):
        ImageFeed(scenes / "left", preprocess="raw", model=model)
    with pytest.raises(FastcalError, match=r"takes float32 for input 'c' \(2\), the arrays are float32 \(3\)"):
        feed(c=[1.0, 2.0, 3.0])
    with pytest.raises(FastcalError, match="takes the inputs 'x', 'c', and none of the name 'd'"):
        feed(c=[1.0, 2.0], d=[1.0])


def test_arrays_of_other_shapes_are_no_unreadable_ones(scenes):
    np.save(scenes / "left" / "5.npy", np.zeros((2, 4)))
    feed = ImageFeed(data_of(scenes), preprocess=SMALL, skip_unreadable=True)
    with (
        feed,
        pytest.raises(FastcalError, match=r"5.npy is float32 \(2, 4\), the first array float32 \(2, 3\); all must"),
    ):
        list(feed)


def test_a_file_of_several_arrays_is_no_array(scenes):
    np.savez(scenes / "several.npz", x=np.zeros((2, 3)))
    (scenes / "several.npz").rename(scenes / "left" / "0.npy")
    with pytest.raises(FastcalError, match=r"cannot read .*0.npy: damaged, or no array of numbers; replace or remove"):
        ImageFeed(data_of(scenes), preprocess=SMALL)


def test_wrong_uses_are_named(scenes):
    with pytest.raises(FastcalError, match=r"the data are arrays alone; give one .npz file with the inputs' names"):
        ImageFeed({"pose": f"{scenes}/left/*.npy"})
    with pytest.raises(FastcalError, match="the data are arrays alone"):
        ImageFeed(f"{scenes}/left/*.npy")
    with pytest.raises(
        FastcalError, match="input_name 'left' is for data of one input; a dict of data names its inputs"
    ):
        ImageFeed(data_of(scenes), input_name="left")
    with pytest.raises(FastcalError, match=r"input 'right': no such file or folder: .*wrong"):
        ImageFeed(data_of(scenes) | {"right": scenes / "wrong"})
    with pytest.raises(FastcalError, match="there is no data; name at least one input"):
        ImageFeed({})


def test_the_command_takes_data_by_input(scenes, onnx_file, run_fastcal):
    graph = "f (float[N, 3, 8, 8] left, float[N, 3, 8, 8] right) => (float[N, 3, 8, 8] y) { y = Sub(left, right) }"
    arguments = ["--preprocess", "raw", "--algorithm", "minmax", "--batch-size", 7, "-o", scenes / "a.cache"]
    done = run_fastcal("calibrate", onnx_file(graph), f"left={scenes}/left,right={scenes}/right", *arguments)
    assert done.returncode == 0, done.stderr
    assert "prepared   left: stretch to 8x8, RGB, (x * 1 - 0) / 1, NCHW; right: stretch to" in done.stdout
    assert "clipped    less than 0.05 % of every tensor" in done.stdout
    assert fastcal.CalibrationCache.load(scenes / "a.cache").scales["right"] == pytest.approx(61 / 127)
    done = run_fastcal("calibrate", onnx_file(graph), f"left={scenes}/left,rigth={scenes}/right", *arguments)
    assert "takes the inputs 'left', 'right', and none of the name 'rigth'" in done.stderr
