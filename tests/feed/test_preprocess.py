import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from fastcal import ImageFeed
from fastcal.errors import DataError
from fastcal.feed.preprocess import PRESETS, Preprocess


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "squash"}, "no resize 'squash'; choose one of stretch, crop, letterbox"),
        ({"channels": "ARGB"}, "no channels 'ARGB'; choose one of RGB, BGR, GRAY, RGBA"),
        ({"interpolation": "cubic"}, "no interpolation 'cubic'; choose one of nearest, bilinear, bicubic, lanczos"),
        ({"layout": "CHW"}, "no layout 'CHW'; choose one of NCHW, NHWC"),
        ({"size": (0, 5)}, r"size \(0, 5\)"),
        ({"size": (5,)}, r"size \(5,\)"),
        ({"crop_fraction": 0}, "crop_fraction 0"),
        ({"fill": 300}, "fill 300"),
        ({"mean": (1.0, 2.0)}, "mean .* has 2 values, RGB needs 1 or 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std .* has a 0"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(DataError, match=message):
        Preprocess(**values)


IMAGENET = Preprocess.preset("imagenet")
MEAN, STD = list(IMAGENET.mean), list(IMAGENET.std)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.toml", 'preset = "imagenet"\nsize = [96, 128]\n', replace(IMAGENET, size=(96, 128))),
        ("p.toml", 'resize = "letterbox"\nsize = 64\nmean = 0.5', Preprocess((64, 64), "letterbox", mean=(0.5,))),
        ("p.json", json.dumps(asdict(IMAGENET)), IMAGENET),
        (  # a ViT of Hugging Face
            "preprocessor_config.json",
            json.dumps({"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2,
                        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}}),
            Preprocess((384, 384), scale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        (  # its CLIP
            "preprocessor_config.json",
            json.dumps({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 3,
                        "image_mean": list(Preprocess.preset("clip").mean), "size": {"shortest_edge": 224},
                        "image_std": list(Preprocess.preset("clip").std), "rescale_factor": 1 / 255}),
            Preprocess.preset("clip"),
        ),
        (
            "preprocessor_config.json",
            json.dumps({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_rescale": False,
                        "do_normalize": False, "image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 256}}),
            Preprocess(resize="crop"),
        ),
        (  # its ResNet, which is a ConvNeXT's
            "preprocessor_config.json",
            json.dumps({"crop_pct": 0.875, "do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 3,
                        "size": {"shortest_edge": 224}}),
            replace(IMAGENET, interpolation="bicubic"),
        ),
        (  # the same as it was written before there were image processors
            "preprocessor_config.json",
            json.dumps({"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "image_mean": MEAN,
                        "image_std": STD, "resample": 3, "size": 224}),
            replace(IMAGENET, interpolation="bicubic"),
        ),
        (
            "preprocessor_config.json",
            json.dumps({"crop_size": {"height": 256, "width": 256}, "do_center_crop": True, "resample": 2,
                        "do_flip_channel_order": True, "do_normalize": False, "size": {"shortest_edge": 288},
                        "image_mean": MEAN}),
            Preprocess((256, 256), "crop", crop_fraction=256 / 288, channels="BGR", scale=1 / 255),
        ),
        (  # its RT-DETR: boxes are converted, not pixels, and what is not set is null
            "preprocessor_config.json",
            json.dumps({"do_convert_annotations": True, "do_normalize": False, "do_pad": False, "do_resize": None,
                        "image_mean": MEAN, "image_std": STD, "size": {"height": 640, "width": 640}}),
            Preprocess((640, 640), scale=1 / 255),
        ),
        (  # its PoolFormer
            "preprocessor_config.json",
            json.dumps({"crop_pct": 0.9, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
                        "image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 224, "longest_edge": None}}),
            replace(IMAGENET, crop_fraction=224 / 248),
        ),
        (
            "preprocessor_config.json",
            json.dumps({"crop_pct": 0.95, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
                        "image_mean": MEAN, "image_std": STD, "size": {"height": 224, "width": 224}}),
            replace(IMAGENET, crop_fraction=224 / 235),
        ),
        (  # its BEiT
            "preprocessor_config.json",
            json.dumps({"crop_size": {"height": 192, "width": 224}, "do_center_crop": True, "do_reduce_labels": True,
                        "image_mean": MEAN, "image_std": STD, "size": {"height": 192, "width": 224}}),
            replace(IMAGENET, size=(192, 224), resize="stretch"),
        ),
        (  # a model of timm
            "config.json",
            json.dumps({"architecture": "x", "pretrained_cfg": {"input_size": [3, 288, 288], "interpolation": "bicubic",
                        "crop_pct": 0.95, "crop_mode": "center", "mean": MEAN, "std": STD}}),
            replace(IMAGENET, size=(288, 288), interpolation="bicubic", crop_fraction=0.95),
        ),
    ],
)  # fmt: skip
def test_files_that_describe_it(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert Preprocess.load(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.toml", "size = [", r"p.toml describes no preprocessing: .*; see fastcal.Preprocess"),
        ("p.json", "[1, 2]", r"p.json: it holds no table of names and values"),
        ("p.json", '{"sise": 3}', r"p.json: there is no 'sise'; choose from preset, antialias, bits, channels, "),
        ("p.json", '{"preset": "imagnet"}', r"p.json: there is no preset 'imagnet'"),
        ("p.json", '{"size": "large"}', r"p.json: size \('large', 'large'\) is not \(height, width\)"),
        ("p.json", '{"crop_fraction": "large"}', r"p.json describes no preprocessing: "),
        ("p.json", '{"input_size": [3, 8, 8]}', r"p.json describes no preprocessing: 'mean' is missing"),
        ("p.json", '{"image_mean": [0], "image_std": [1], "resample": 5, "size": 8}', r"p.json: there is no i.* 'PIL "),
        ("p.json", '{"input_size": [3, 8, 8], "crop_mode": "border"}', r"p.json: crop_mode 'border' is not supported"),
        ("p.json", '[' * 100_000, r"p.json describes no preprocessing: maximum recursion depth exceeded"),
        ("p.json", f'{{"scale": 1{"0" * 400}}}', r"p.json: scale has 10+; give a number"),
        ("p.json", '{"size": true}', r"p.json: size \(True, True\) is not \(height, width\)"),
    ],
)  # fmt: skip
def test_files_that_do_not(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        Preprocess.load(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rescale_offset": True},
            "rescale_offset True is not supported; describe what is near enough with fastcal.Preprocess's attributes",
        ),
        ({"do_resize": False}, "do_resize False is not supported"),
        ({"do_thumbnail": True}, "do_thumbnail True is not supported"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order together with do_normalize is not supported"),
        (
            {"size": {"shortest_edge": 800, "longest_edge": 1333}},
            "size {'shortest_edge': 800, 'longest_edge': 1333} is",
        ),
        ({"size": {"shortest_edge": 0}, "do_center_crop": True, "crop_size": 224}, "0 is not a valid image side"),
        ({"size": {"shortest_edge": True}}, "True is not a valid image side; give a number of pixels"),
        ({"size": True}, "True is not a valid image side"),
        ({"size": {"height": 8}}, "p.json describes no preprocessing: 'width' is missing"),
        (
            {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
            "stretching to 256x256 and cropping then is not supported",
        ),
        (
            {"size": 256, "do_center_crop": True, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"},
            "size 256 with do_center_crop, instead of its shortest_edge, or height and width, is not supported",
        ),
        ({"size": {"shortest_edge": 224}}, "size {'shortest_edge': 224} without do_center_crop is not supported"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": True}, "'crop_size' is missing"),
        ({}, "'size' is missing"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, "crop_pct 0.875 of size 384x384 is not supported"),
        ({"size": {"height": 9, "width": 8}, "crop_pct": 0.5}, "crop_pct 0.5 of size 9x8 is not supported"),
        ({"size": 8, "crop_pct": 0.5, "do_center_crop": False}, "crop_pct 0.5 of size 8x8 is not supported"),
        ({"size": 8, "do_resize_and_center_crop": True}, "do_resize_and_center_crop True is not supported"),
        ({"size": 8, "include_top": True}, "include_top True is not supported"),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 192}},
            "crop_size 224x192 of an image whose shorter side is 256 is not supported",
        ),
        ({"size": 8, "do_center_crop": True, "crop_pct": 1e-320}, "p.json describes no preprocessing: "),
        ({"image_mean": None}, "p.json describes no preprocessing: "),
        ({"size": 800, "max_size": 1333}, "max_size 1333 is not supported"),
    ],
)
def test_what_only_hugging_faces_processors_do(tmp_path, values, message):
    (tmp_path / "p.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, **values}))
    with pytest.raises(DataError, match=message):
        Preprocess.load(tmp_path / "p.json")


@pytest.mark.parametrize(
    "kind",
    ["ConvNextImageProcessor", "EfficientNetImageProcessor", "LayoutLMv2FeatureExtractor", "LevitFeatureExtractor",
     "MobileViTImageProcessor", "PerceiverImageProcessor"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_processors_that_do_something_else_than_their_configurations_say(tmp_path, kind, key):
    (tmp_path / "p.json").write_text(json.dumps({key: kind, "image_mean": MEAN, "image_std": STD, "size": 8}))
    message = f"p.json: {kind}, which does something else than its configuration says, is not supported; describe what"
    with pytest.raises(DataError, match=message):
        Preprocess.load(tmp_path / "p.json")


def test_a_mean_that_is_missing(tmp_path):
    (tmp_path / "p.json").write_text('{"image_processor_type": "ViTImageProcessor", "size": 8}')
    with pytest.raises(DataError, match=r"p.json describes no preprocessing: 'image_mean' is missing"):
        Preprocess.load(tmp_path / "p.json")


def test_a_file_that_is_not_there():
    with pytest.raises(DataError, match=r"cannot read no.toml: No such file"):
        Preprocess.load("no.toml")


def test_torchvisions_transforms():
    models = pytest.importorskip("torchvision.models")
    assert Preprocess.from_torchvision(models.ResNet50_Weights.IMAGENET1K_V1.transforms()) == IMAGENET
    version_2 = Preprocess.from_torchvision(models.ResNet50_Weights.IMAGENET1K_V2.transforms())
    assert version_2.covered == (232, 232)


def test_what_is_not_torchvisions():
    with pytest.raises(DataError, match="dict is no torchvision preprocessing for image classification"):
        Preprocess.from_torchvision({})


def test_pixels_that_are_covered_do_not_suffer_from_rounding():
    for covered in range(225, 600):
        assert Preprocess(resize="crop", crop_fraction=224 / covered).covered == (covered, covered)


def test_an_unknown_preset_is_named():
    with pytest.raises(
        DataError, match="no preset 'imagnet'; choose one of imagenet, clip, tf, caffe, yolo, unit, raw"
    ):
        Preprocess.preset("imagnet")


def test_it_fits_itself_to_an_image_input():
    unit = Preprocess.preset("unit")
    assert unit.fit((None, 3, 96, 128)).shape == (3, 96, 128)
    assert unit.fit((4, 96, 128, 3)).shape == (96, 128, 3)
    assert unit.fit((1, 1, 28, 28)).channels == "GRAY"
    assert unit.fit((None, 3, None, None)).size == unit.size


@pytest.mark.parametrize("shape", [(4, 3), (4, 10, 10), (1, 4, 8, 8), (1, 5, 8, 8, 3)])
def test_an_input_that_takes_no_images(shape):
    with pytest.raises(DataError, match="takes no images"):
        Preprocess.preset("unit").fit(shape)


@pytest.mark.parametrize("shape", [(None, None, None, None), (1, None, 8, 8), (1, 8, 8, None)])
def test_an_input_whose_channels_are_dynamic(shape):
    with pytest.raises(DataError, match="its number of channels is dynamic; export it with a fixed one"):
        Preprocess.preset("unit").fit(shape)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"size": 224}, r"size 224 is not \(height, width\) in pixels"),
        ({"size": (224.5, 224)}, r"size \(224.5, 224\) is not \(height, width\)"),
        ({"mean": 0.5}, r"mean is 0.5; give a sequence, \(0.5,\) for all channels alike"),
        ({"std": 2}, r"std is 2; give a sequence"),
        ({"mean": None}, "mean is None; give a sequence of numbers"),
        ({"mean": (float("nan"),)}, "mean has nan; give a number"),
        ({"std": (1, float("inf"), 1)}, "std has inf; give a number"),
        ({"scale": 1e-40}, "scale has 1e-40; give a number"),
        ({"scale": "1"}, "scale has '1'; give a number"),
        ({"scale": 10**400}, "scale has 10+; give a number"),
        ({"size": (True, 224)}, r"size \(True, 224\) is not \(height, width\)"),
    ],
)
def test_attributes_of_another_type(attributes, message):
    with pytest.raises(DataError, match=message):
        Preprocess(**attributes)
    assert Preprocess(size=[8, np.int64(9)], mean=[0.5], std=np.ones(3)).shape == (3, 8, 9)


def test_a_mean_for_other_channels_than_the_networks():
    with pytest.raises(DataError, match=r"mean .* has 3 values, GRAY needs 1; choose another preproc"):
        Preprocess.preset("imagenet").fit((1, 1, 28, 28))


def test_it_prints_what_it_does():
    assert str(Preprocess.preset("imagenet")) == (
        "crop 0.875 to 224x224, RGB, (x * 0.00392156863 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], NCHW"
    )
    assert str(Preprocess(resize="letterbox", size=(8, 9))) == "letterbox 114 to 8x9, RGB, (x * 1 - 0) / 1, NCHW"


@pytest.mark.parametrize(
    "change",
    [
        {"antialias": False},
        {"crop_fraction": 0.8750001},
        {"scale": np.nextafter(np.float32(1 / 255), 1)},
        {"mean": (np.nextafter(np.float32(0.485), 1), *MEAN[1:])},
        {"std": (*STD[:2], 0.22500002)},
    ],
)
def test_what_gives_other_pixels_prints_otherwise(change):
    assert str(replace(IMAGENET, **change)) != str(IMAGENET)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "1 / 255"),
        ({"mean": (0.5,), "std": (0.5,)}, "1 / 255"),
        ({"std": (0.25,)}, "1 / 255"),
        ({"mean": (0.449,)}, "1 / 255"),
        ({"std": (1 / 255,)}, "1 / 255"),
        ({"scale": 1 / 255, "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, "1 if"),
        ({"scale": 1 / 255, "mean": (127.5,)}, "1 if"),
        ({"scale": 1 / 255, "std": (127.5,)}, "1 if"),
    ],
)
def test_mean_and_std_of_another_range_than_the_pixels_are_remarked_on(tmp_path, caplog, values, remedy):
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    ImageFeed(tmp_path, preprocess=Preprocess(size=(8, 8), **values), device="cpu")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"not of the range of the scaled pixels, 0 to {255 * values.get('scale', 1):.4g}: set scale to {remedy}" in (
        record.getMessage()
    )


@pytest.mark.parametrize(
    "preprocess",
    [
        *map(Preprocess.preset, PRESETS),
        Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
        Preprocess(mean=(127.5,), std=(127.5,)),
        Preprocess(std=(255.0,)),
        Preprocess(scale=1 / 255, mean=(0.1307,), std=(0.3081,), channels="GRAY"),
        Preprocess(scale=2 / 255, mean=(1.0,)),
        Preprocess(scale=1 / 255, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.1)),
    ],
)
def test_usual_means_and_stds_are_not_remarked_on(preprocess):
    assert preprocess.remark == ""
