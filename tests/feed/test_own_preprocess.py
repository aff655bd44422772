"""The preprocessing that a model names itself, compared with that of its own library."""

import json
import logging

import numpy as np
import onnx
import pytest
from PIL import Image

import fastcal
from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.own_preprocess import choose_preprocess
from fastcal.feed.preprocess import PRESETS
from references import open_upright

#: The metadata of `yolo export model=yolov8n.pt format=onnx imgsz=320`, as Ultralytics 8.3 writes them.
YOLO = {
    "description": "Ultralytics YOLOv8n model trained on /usr/src/ultralytics/ultralytics/cfg/datasets/coco.yaml",
    "author": "Ultralytics",
    "date": "2024-11-07T10:12:41.353513",
    "version": "8.3.27",
    "license": "AGPL-3.0 License (https://ultralytics.com/license)",
    "docs": "https://docs.ultralytics.com",
    "stride": "32",
    "task": "detect",
    "batch": "1",
    "imgsz": "[320, 320]",
    "names": "{0: 'person', 1: 'bicycle'}",
    "args": "{'batch': 1, 'half': False, 'dynamic': True, 'simplify': True, 'nms': False}",
}

GRAPH = "yolo (float[N, 3, {}, {}] images) => (float[N, 3, A, B] y) {{ y = AveragePool<kernel_shape = [16, 16], " \
        "strides = [16, 16]>(images) }}"  # fmt: skip
CLASSIFIER = "c (float[N, 3, 64, 64] images) => (float[N, 3] y) { y = ReduceMean<axes = [2, 3], keepdims = 0>(images) }"


@pytest.fixture
def exported(onnx_file):
    """A function that writes a model with metadata."""

    def write(metadata, graph=None, sides=("H", "W"), name="yolo.onnx"):
        path = onnx_file(graph or GRAPH.format(*sides), name=name)
        model = onnx.load(path)
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)
        return path

    return write


def letterbox(image, height, width):
    """Ultralytics' LetterBox(auto=False), resized by Pillow without antialiasing, which is OpenCV's INTER_LINEAR."""
    ratio = min(height / image.height, width / image.width)
    new_width, new_height = round(image.width * ratio), round(image.height * ratio)
    factors = image.width / new_width, image.height / new_height
    resized = image.transform(
        (new_width, new_height), Image.Transform.AFFINE, (factors[0], 0, 0, 0, factors[1], 0),
        Image.Resampling.BILINEAR,
    )  # fmt: skip
    left, top = round((width - new_width) / 2 - 0.1), round((height - new_height) / 2 - 0.1)
    out = Image.new("RGB", (width, height), (114, 114, 114))
    out.paste(resized, (left, top))
    return np.asarray(out, np.float32).transpose(2, 0, 1) / 255


def prepared(model, data, **options):
    with ImageFeed(data, model=model, batch_size=1, device="cpu", **options) as feed:
        return feed.paths, np.concatenate([batch["images"].copy() for batch in feed])


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
@pytest.mark.parametrize(
    ("imgsz", "sides", "size"),
    [
        ("[320, 320]", ("H", "W"), (320, 320)),
        ("[192, 416]", ("H", "W"), (192, 416)),
        ("[300, 300]", ("H", "W"), (320, 320)),  # rounded up to the stride
        ("256", ("H", "W"), (256, 256)),
        ("[320, 320]", (160, 224), (160, 224)),  # the model's own
    ],
)
def test_ultralytics_letterbox(exported, photographs, task, imgsz, sides, size):
    model = exported(YOLO | {"task": task, "imgsz": imgsz}, sides=sides)
    paths, found = prepared(model, photographs)
    assert found.shape[2:] == size
    for path, image in zip(paths, found, strict=True):
        difference = np.abs(image - letterbox(open_upright(path), *size)) * 255
        assert difference.mean() < 0.6, path  # Pillow cuts off a fraction
        assert np.percentile(difference, 99.9) <= 2, path


def test_the_command_line_prepares_as_ultralytics_does(exported, photographs, tmp_path, run_fastcal):
    graph = """yolo (float[N, 3, H, W] images) => (float[1, 1, H, 1] rows, float[1, 1, 1, W] columns,
      float[1, 3, 1, 1] a) { rows = ReduceMean<axes = [0, 1, 3]>(images) columns = ReduceMean<axes = [0, 1, 2]>(images)
      a = ReduceMean<axes = [0, 2, 3]>(images) }"""
    model, output = exported(YOLO, graph), tmp_path / "c.cache"
    done = run_fastcal("calibrate", model, photographs, "-o", output, "--algorithm", "minmax", "--batch-size", "6")
    said = f"note: preprocessing as the metadata of {model} (Ultralytics, task detect) says: letterbox 114 to 320x320"
    assert (done.returncode, done.stderr.count(said), done.stderr.count("preprocessing")) == (0, 1, 1)
    paths = sorted(photographs.iterdir())
    batch = np.stack([letterbox(open_upright(path), 320, 320) for path in paths])
    expected = fastcal.calibrate(model, [batch], algorithm="minmax", backend="onnxruntime").scales
    found = fastcal.CalibrationCache.load(output).scales
    assert found == pytest.approx(expected, rel=0.005)
    crop = Preprocess(resize="crop", size=(320, 320), scale=1 / 255)
    cropped = ImageFeed(photographs, model=model, preprocess=crop, batch_size=6)
    assert fastcal.calibrate(model, cropped, algorithm="minmax", backend="onnxruntime").scales != pytest.approx(
        expected, rel=0.005
    )


def test_ultralytics_classifier(exported, photographs):
    """Shorter side to the size, centre, 0 to 1: torchvision's Resize and CenterCrop, as Ultralytics calls them."""
    model = exported(YOLO | {"task": "classify", "imgsz": "[64, 64]"}, CLASSIFIER)
    paths, found = prepared(model, photographs)
    for path, image in zip(paths, found, strict=True):
        upright = open_upright(path)
        short = min(upright.size)
        size = [int(64 * side / short) for side in upright.size]
        left, top = (round((side - 64) / 2) for side in size)
        resized = upright.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
        difference = np.abs(image * 255 - np.asarray(resized, np.float32).transpose(2, 0, 1))
        assert difference.mean() <= 1, path


def test_other_exports_of_ultralytics(exported):
    five = {"stride": "32", "names": "{0: 'person'}"}
    assert choose(exported(five)).resize == "letterbox"
    assert choose(exported(five, sides=(96, 128))).size == (96, 128)
    assert choose(exported(five, CLASSIFIER)) == PRESETS["imagenet"]  # what YOLOv5's classifiers take
    stretched = choose(exported(YOLO | {"description": "Ultralytics rtdetr-l model trained on coco.yaml"}))
    assert (stretched.resize, stretched.size) == ("stretch", (320, 320))
    for metadata in ({"task": "detect"}, YOLO | {"task": "a new one"}, {"stride": "32"}, {}):
        assert choose(exported(metadata)) == PRESETS["imagenet"]
    for imgsz in ("big", "[1]", "[0, 3]", "['a', 'b']", "(" * 9000, ""):
        assert choose(exported(YOLO | {"imgsz": imgsz})).size == (640, 640)


def choose(path):
    return choose_preprocess(fastcal.Model(path))[0]


def test_a_presets_size_is_that_of_the_metadata(exported, photographs, run_fastcal, tmp_path):
    model = exported(YOLO)
    assert prepared(model, photographs, preprocess="yolo")[1].shape[2:] == (320, 320)
    own = Preprocess(size=(64, 96), resize="letterbox")
    assert prepared(model, photographs, preprocess=own)[1].shape[2:] == (64, 96)
    for options, size in ((("--preprocess", "yolo"), "320x320"), (("--size", "96x64"), "96x64")):
        done = run_fastcal("calibrate", model, photographs, "-o", tmp_path / "c", *options)
        assert f"letterbox 114 to {size}, not antialiased" in done.stdout


VIT = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 48, "width": 48}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.5, 0.25],
}  # fmt: skip
TIMM = {"architecture": "resnet18", "pretrained_cfg": {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}  # fmt: skip
TRANSFORMERS = {"architectures": ["ViTForImageClassification"], "hidden_size": 768}


@pytest.mark.parametrize(
    ("files", "model", "expected", "origin"),
    [
        ({"preprocessor_config.json": VIT}, "m.onnx", VIT, "preprocessor_config.json"),
        ({"config.json": TIMM}, "m.onnx", TIMM, "config.json"),
        ({"config.json": TRANSFORMERS, "preprocessor_config.json": VIT}, "m.onnx", VIT, "preprocessor_config.json"),
        (
            {"preprocessor_config.json": VIT, "config.json": TRANSFORMERS},
            "onnx/m.onnx",
            VIT,
            "preprocessor_config.json",
        ),
        ({"preprocessor_config.json": VIT}, "other/m.onnx", None, None),
        ({"config.json": TRANSFORMERS}, "m.onnx", None, None),
        ({}, "m.onnx", None, None),
    ],
)
def test_a_file_beside_the_model(tmp_path, onnx_file, photographs, caplog, files, model, expected, origin):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / model).parent.mkdir(exist_ok=True)
    onnx_file(GRAPH.format("H", "W"), name=model)
    with caplog.at_level(logging.INFO, "fastcal"):
        feed = ImageFeed(photographs, model=tmp_path / model, batch_size=1, device="cpu")
    (text,) = [message for message in caplog.messages if "preprocessing" in message]
    if expected is None:
        assert feed.preprocess == PRESETS["imagenet"]
        assert text == (
            f"the preprocessing imagenet is assumed, since {tmp_path / model} names none; choose another with "
            "preprocess if it is not right"
        )
    else:
        (tmp_path / "expected.json").write_text(json.dumps(expected))
        assert feed.preprocess == Preprocess.load(tmp_path / "expected.json") != PRESETS["imagenet"]
        assert text == f"preprocessing as {tmp_path / origin} says: {feed.preprocess}"


def test_the_metadata_come_before_a_file(tmp_path, exported):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    assert choose(exported(YOLO)).resize == "letterbox"


def test_a_file_that_cannot_be_followed_is_an_error_unless_another_preprocessing_is_given(
    tmp_path, onnx_file, photographs
):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT | {"do_pad": True}))
    model = onnx_file(GRAPH.format("H", "W"))
    with pytest.raises(FastcalError, match=r"config.json: do_pad True is not supported; .* than the one beside"):
        ImageFeed(photographs, model=model, batch_size=1)
    assert ImageFeed(photographs, model=model, batch_size=1, preprocess="tf").preprocess.size == (224, 224)


def test_what_is_given_needs_no_line(exported, photographs, caplog):
    with caplog.at_level(logging.INFO, "fastcal"):
        ImageFeed(photographs, model=exported(YOLO), preprocess="imagenet", batch_size=1)
    assert "preprocessing" not in caplog.text


def test_preview_shows_what_the_model_names(exported, photographs, tmp_path, run_fastcal):
    done = run_fastcal("preview", photographs, "--model", exported(YOLO), "-o", tmp_path / "s.png")
    assert "prepared: letterbox 114 to 320x320" in done.stdout
    assert "colours and values: those of preset yolo and unit" in done.stdout
    np.save(tmp_path / "x.npy", prepared(exported(YOLO), photographs)[1])
    done = run_fastcal("preview", tmp_path / "x.npy", "--model", exported(YOLO), "-o", tmp_path / "s.png")
    assert "colours and values: those of preset yolo and unit" in done.stdout
