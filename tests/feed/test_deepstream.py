"""Preprocessing as DeepStream's nvinfer does it, by its configuration."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

import fastcal
from conftest import DIGITS
from fastcal import DataError, ImageFeed, Preprocess
from references import bilinear, open_upright

#: Every key that changes pixels, with its values; None leaves it out.
KEYS = {
    "model-color-format": (None, 0, 1, 2),
    "offsets": (None, "given"),
    "maintain-aspect-ratio": (None, 0, 1),
    "symmetric-padding": (None, 1),
    "infer-dims": (None, "given"),
    "network-input-order": (None, 0, 1),
}

FACTOR = 0.0173520735727919486
OFFSETS = {"RGB": (123.675, 116.28, 103.53), "BGR": (103.53, 116.28, 123.675), "GRAY": (117.25,)}


def write(path, **keys):
    lines = [f"{key}={value}" for key, value in keys.items() if value is not None]
    path.write_text("\n".join(["# nvinfer", "[property]", *lines, "[class-attrs-all]", "pre-cluster-threshold=0.2"]))
    return path


def prepared(paths, preprocess):
    with ImageFeed(paths, preprocess=preprocess, batch_size=len(paths), device="cpu") as feed:
        (batch,) = (next(iter(batch.values())).copy() for batch in feed)
    return batch


def pixels_of(image, color):
    """The pixels of an image in the order of the network, (height, width, channels)."""
    if color == "GRAY":
        return np.asarray(image.convert("L"), np.float32)[..., None]
    pixels = np.asarray(image.convert("RGB"), np.float32)
    return pixels[..., ::-1] if color == "BGR" else pixels


def nvinfer(image, size, color, offsets, order, keeps, symmetric):
    """Return net-scale-factor * (x - mean) of an image of one colour or of the network's size, padded with black.

    The sizes are those of gst-nvinfer's source: doubles that become unsigned integers.
    """
    height, width = size
    new = width, height
    if keeps:
        across, down = width * image.height / image.width, height * image.width / image.height
        new = (width, int(across)) if across <= height else (int(down), height)
    left, top = ((width - new[0]) // 2, (height - new[1]) // 2) if symmetric and keeps else (0, 0)
    x = np.zeros((height, width, 1 if color == "GRAY" else 3), np.float32)
    x[top : top + new[1], left : left + new[0]] = pixels_of(image.resize(new, Image.Resampling.NEAREST), color)
    y = np.float32(FACTOR) * (x - np.array(offsets, np.float32))
    return y if order == 1 else y.transpose(2, 0, 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of one colour, wide and tall, and one of many colours."""
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (45, 31), (200, 30, 90)).save(folder / "0.png")
    Image.new("RGB", (30, 61), (17, 250, 5)).save(folder / "1.png")
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "2.png")
    return [folder / f"{number}.png" for number in range(3)]


@pytest.mark.parametrize("color", KEYS["model-color-format"])
@pytest.mark.parametrize("infer_dims", KEYS["infer-dims"])
def test_every_combination_of_the_keys(tmp_path, images, color, infer_dims):
    others = [KEYS[key] for key in KEYS if key not in ("model-color-format", "infer-dims")]
    name = ("RGB", "BGR", "GRAY")[color or 0]
    for offsets, keeps, symmetric, order in itertools.product(*others):
        path = write(tmp_path / "config_infer_primary.txt", **{
            "net-scale-factor": FACTOR, "model-color-format": color,
            "offsets": offsets and ";".join(map(str, OFFSETS[name])), "maintain-aspect-ratio": keeps,
            "symmetric-padding": symmetric, "infer-dims": infer_dims and f"{len(OFFSETS[name])};24;40",
            "network-input-order": order,
        })  # fmt: skip
        preprocess = Preprocess.load(path)
        if infer_dims is None:
            assert preprocess.size == (224, 224)
            shape = (1, 24, 40, len(OFFSETS[name])) if order == 1 else (1, len(OFFSETS[name]), 24, 40)
            preprocess = preprocess.fit(shape)
        for image, found in zip(images, prepared(images, preprocess), strict=True):
            given = OFFSETS[name] if offsets else (0,)
            expected = nvinfer(Image.open(image), (24, 40), name, given, order, keeps, symmetric)
            level = FACTOR if name == "GRAY" else 0  # DALI and PIL round luma in different ways
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + level)


def test_yaml_and_words_for_booleans(tmp_path):
    (tmp_path / "c.yml").write_text(
        "property:\n  net-scale-factor: 0.5\n  offsets: 1;2;3\n  infer-dims: 3;8;16\n  maintain-aspect-ratio: true\n"
        "  model-color-format: 1\nclass-attrs-all:\n  topk: 20\n"
    )
    same = write(
        tmp_path / "c.txt", **{
            "net-scale-factor": " 0.5", "offsets": "1;2;3;", "infer-dims": "3; 8; 16", "maintain-aspect-ratio": "true",
            "model-color-format": 1, "symmetric-padding": "false", "input-tensor-from-meta": 0, "scaling-filter": 6,
            "labelfile-path": "labels.txt",
        }
    )  # fmt: skip
    found = Preprocess.load(tmp_path / "c.yml")
    assert found == Preprocess.load(same)
    assert str(found) == (
        "letterbox 0 right and below, rounded down, to 8x16, nearest, not antialiased, BGR, "
        "(x * 0.5 - [0.5, 1, 1.5]) / 1, NCHW"
    )


@pytest.mark.parametrize("number", [0, 1, 6, None])
def test_filters(tmp_path, photographs, number):
    path = write(tmp_path / "c.txt", **{"scaling-filter": number, "infer-dims": "3;50;70", "network-input-order": 1})
    files = sorted(photographs.iterdir())
    for file, found in zip(files, prepared(files, Preprocess.load(path)), strict=True):
        pixels = np.asarray(open_upright(file), np.float32)
        if number == 1:
            assert np.abs(found - bilinear(pixels, 50, 70)).mean() < 0.7
        else:
            rows, columns = (
                ((np.arange(size) + 0.5) * pixels.shape[axis] / size).astype(int) for axis, size in enumerate((50, 70))
            )
            assert np.abs(found - pixels[rows][:, columns]).mean() < 0.7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean-file": "mean.ppm"}, "mean-file is not supported; give offsets in its place"),
        ({"uff-input-dims": "3;8;8;0"}, "uff-input-dims is not supported; give infer-dims in its place"),
        ({"input-dims": "3;8;8;0"}, "input-dims is not supported; give infer-dims in its place"),
        ({"input-tensor-from-meta": 1}, "input-tensor-from-meta is not supported: Gst-nvdspreprocess prepares"),
        ({"scaling-filter": 2}, "scaling-filter 2 is not supported: GPU and Jetson interpolate in different ways"),
        (
            {"model-color-format": 3},
            r"model-color-format 3 is not supported; choose one of 0 \(RGB\), 1 \(BGR\)",
        ),
        ({"network-input-order": -1}, r"network-input-order -1 is not supported; choose one of 0 \(NCHW\), 1 \(NHWC\)"),
        ({"offsets": "1;2"}, "offsets is '1;2'; it needs 3 numbers"),
        ({"offsets": "1;2;x"}, "offsets is '1;2;x'; it needs numbers"),
        ({"infer-dims": "8;8"}, "infer-dims is '8;8'; it needs 3 numbers"),
        ({"infer-dims": "1;8;8"}, "infer-dims has 1 channels, and model-color-format RGB has 3"),
        ({"maintain-aspect-ratio": "yes"}, "maintain-aspect-ratio is 'yes'; it needs 0 or 1"),
        ({"net-scale-factor": 0}, "scale is 0, which makes all images the same"),
    ],
)
def test_keys_that_are_not_supported(tmp_path, keys, message):
    path = write(tmp_path / "c.txt", **keys)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        Preprocess.load(path)


def test_the_last_one_of_equal_keys_counts(tmp_path):
    path = write(tmp_path / "c.txt", **{"infer-dims": "3;8;16\ninfer-dims=3;32;24"})
    assert Preprocess.load(path).size == (32, 24)


def test_keys_that_nvinfer_ignores_too(tmp_path):
    path = write(tmp_path / "c.txt", **{"input-dims": "3;9;9;0", "infer-dims": "3;8;16", "symmetric-padding": 1})
    assert Preprocess.load(path).size == (8, 16)
    assert Preprocess.load(path).resize == "stretch"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "a list\nof images", "it is not a configuration of nvinfer: File contains no section headers"),
        ("c.txt", "[application]\nx=1", "it has no group 'property'"),
        ("c.yml", "property: 3", "it has no group 'property'"),
        ("c.yaml", "- a", "it has no group 'property'"),
        ("c.yaml", "a: [", "it is not a configuration of nvinfer"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        Preprocess.load(tmp_path / name)


def test_the_cache_that_the_configuration_names(run_fastcal, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "config").mkdir()
    write(tmp_path / "config" / "c.txt", **{"net-scale-factor": 1 / 255, "int8-calib-file": "model.cache"})
    words = ("calibrate", DIGITS / "digits.onnx", DIGITS / "images", "--limit", 32, "--json", "--quiet")
    done = run_fastcal(*words, "--preprocess", "../config/c.txt", cwd=tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache"] == "../config/model.cache"
    record = fastcal.CalibrationCache.load(tmp_path / "config" / "model.cache").record
    assert record.entries["preprocess"].startswith("stretch to 32x32, nearest, not antialiased, RGB, (x * 0.00392156")
    done = run_fastcal(*words, "--preprocess", "../config/c.txt", "-o", "x.cache", cwd=tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "x.cache").exists()
    write(tmp_path / "config" / "c.txt", **{"net-scale-factor": 1 / 255})
    for options in ((), ("--preprocess", "unit"), ("--preprocess", "../config/c.txt")):
        done = run_fastcal(*words, *options, cwd=tmp_path / "work")
        assert (done.returncode, done.stderr) == (2, "error: there is no file to write: name the cache with -o\n")
    write(tmp_path / "config" / "c.txt", **{"int8-calib-file": "/model.cache", "scaling-filter": 4})
    done = run_fastcal(*words, "--preprocess", "../config/c.txt", "-o", "y.cache", cwd=tmp_path / "work")
    assert done.returncode == 2
    assert "../config/c.txt: scaling-filter 4 is not supported" in done.stderr
