"""What the network expects of an image: size, colours, values, layout."""

import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastcal.errors import FastcalError

CHANNELS = ("RGB", "BGR", "GRAY")
LAYOUTS = ("NCHW", "NHWC")
RESIZES = ("stretch", "crop", "letterbox")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

# A share that was made from two numbers of pixels gives the larger back in spite of its rounding.
_SLACK = 1e-6

# How numbers are printed: so that no two of float32 are the same.
_DIGITS = ".9g"


def _check_number(name: str, value: Any) -> None:
    """Raise FastcalError unless it is a number that float32 images can be reckoned with."""
    try:
        usable = isinstance(value, numbers.Real) and (value == 0 or 1e-30 < abs(float(value)) < 1e30)
    except OverflowError:  # an integer that is larger than any float
        usable = False
    if not usable:
        raise FastcalError(f"{name} has {value!r}; give a number, as the network was trained with")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a network's input.

    Decoded to 8 bits a channel and turned upright by its EXIF orientation, resized to `size` with 8-bit results as PIL
    has them, then (pixel * scale - mean) / std in float32.

    Attributes:
        size: Height and width, in pixels.
        resize: "stretch" both sides to `size`; "crop": resize until the image covers size / crop_fraction, then cut
            `size` out of the centre; "letterbox": resize until it fits into `size`, then pad both sides alike.
        crop_fraction: For "crop", the share of each side that stays. 0.875 resizes the shorter side to 256 for 224, as
            torchvision and timm do.
        fill: For "letterbox", the padding's pixel value, 0 to 255.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", PIL's filters of these names.
        antialias: Whether the filter widens when it shrinks an image, as PIL's do and OpenCV's do not.
        channels: "RGB", "BGR" or "GRAY" (one channel: ITU-R 601 luma, as PIL's "L").
        scale: Factor on pixel values 0 to 255.
        mean: Per channel, in the order of `channels`, subtracted after scaling; one value stands for all channels.
        std: Per channel, divided by at last.
        layout: "NCHW" or "NHWC".

    Raises:
        FastcalError: A value is not one of the above.
    """

    size: tuple[int, int] = (224, 224)
    resize: str = "stretch"
    crop_fraction: float = 0.875
    fill: int = 114
    interpolation: str = "bilinear"
    antialias: bool = True
    channels: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("resize", self.resize, RESIZES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("channels", self.channels, CHANNELS),
            ("layout", self.layout, LAYOUTS),
        ):
            if value not in known:
                raise FastcalError(f"there is no {name} {value!r}; choose one of {', '.join(known)}")
        whole = isinstance(self.size, Sequence) and all(
            isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in self.size
        )
        if not whole or len(self.size) != 2 or min(self.size) < 1:
            raise FastcalError(f"size {self.size} is not (height, width) in pixels, e.g. (224, 224)")
        if not 0 < self.crop_fraction <= 1:
            raise FastcalError(f"crop_fraction {self.crop_fraction} is not in (0, 1]; torchvision's is 0.875")
        if not 0 <= self.fill <= 255:
            raise FastcalError(f"fill {self.fill} is not a pixel value from 0 to 255")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if isinstance(values, numbers.Real):
                raise FastcalError(f"{name} is {values}; give a sequence, ({values},) for all channels alike")
            if not hasattr(values, "__len__") or isinstance(values, str):
                raise FastcalError(f"{name} is {values!r}; give a sequence of numbers")
            if len(values) not in (1, self.channel_count):
                raise FastcalError(
                    f"{name} {values} has {len(values)} values, {self.channels} needs "
                    f"{'1' if self.channel_count == 1 else '1 or 3'}; choose another preprocessing: the presets unit "
                    "and raw fit all channels"
                )
            for each in values:
                _check_number(name, each)
        _check_number("scale", self.scale)
        if self.scale == 0:
            raise FastcalError("scale is 0, which makes every image the same; leave pixels as they are with 1")
        if 0 in self.std:
            raise FastcalError(f"std {self.std} has a 0, which cannot be divided by")

    @classmethod
    def preset(cls, name: str) -> "Preprocess":
        """The preprocessing that a family of networks is trained with.

        Args:
            name: "imagenet" (torchvision's classifiers: shorter side to 256, centre 224, ImageNet's mean and standard
                deviation), "clip" (bicubic, shorter side to 224, centre 224, CLIP's mean and standard deviation), "tf"
                (stretched to 224, -1..1, as Keras's mode of that name), "caffe" (stretched to 224, BGR less
                ImageNet's mean, likewise), "yolo" (Ultralytics: letterbox to 640, 0..1), "unit" (stretched to 224,
                0..1) or "raw" (stretched to 224, 0..255).

        Raises:
            FastcalError: There is no such preset.
        """
        if name not in PRESETS:
            raise FastcalError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Preprocess":
        """The preprocessing that a file describes.

        Args:
            path: TOML or JSON with this class's attributes (and `preset` for the others), Hugging Face's
                `preprocessor_config.json`, or timm's `config.json`.

        Raises:
            FastcalError: The file cannot be read, or asks for what this class does not do.
        """
        from fastcal.feed.preprocess_files import load

        return load(path)

    @classmethod
    def from_torchvision(cls, transforms: Any) -> "Preprocess":
        """The preprocessing of torchvision's weights.

        Args:
            transforms: What `weights.transforms()` returns, e.g. of `ResNet50_Weights.DEFAULT`.

        Raises:
            FastcalError: It is no preprocessing for image classification.
        """
        from fastcal.feed.preprocess_files import from_torchvision

        return from_torchvision(transforms)

    @property
    def covered(self) -> tuple[int, int]:
        """For "crop": the height and width that the image is resized to cover, rounded down as timm does."""
        height, width = (int(side / self.crop_fraction + _SLACK) for side in self.size)
        return height, width

    def __str__(self) -> str:
        height, width = self.size
        resize = {"crop": f"crop {self.crop_fraction:{_DIGITS}}", "letterbox": f"letterbox {self.fill}"}.get(
            self.resize, self.resize
        )
        interpolation = "" if self.interpolation == "bilinear" else f"{self.interpolation}, "
        antialias = "" if self.antialias else "not antialiased, "
        values = f"(x * {self.scale:{_DIGITS}} - {_values(self.mean)}) / {_values(self.std)}"
        return f"{resize} to {height}x{width}, {interpolation}{antialias}{self.channels}, {values}, {self.layout}"

    @property
    def channel_count(self) -> int:
        """The number of channels: 1 or 3."""
        return 1 if self.channels == "GRAY" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one prepared image, in the order of `layout`."""
        if self.layout == "NCHW":
            return (self.channel_count, *self.size)
        return (*self.size, self.channel_count)

    def fit(self, shape: tuple[int | None, ...]) -> "Preprocess":
        """This preprocessing with size, layout and number of channels as a network's image input has them.

        Args:
            shape: The input's shape, batch first; None for a dynamic dimension, which leaves a size as it is.

        Raises:
            FastcalError: It is no image input of 1 or 3 channels, or mean and std are for another number of channels.
        """
        if len(shape) != 4 or not {shape[1], shape[3]} & {1, 3}:
            if len(shape) == 4 and None in (shape[1], shape[3]):
                raise FastcalError("its number of channels is dynamic; export it with a fixed one, or feed it arrays")
            raise FastcalError("it takes no images of 1 or 3 channels; feed it arrays instead")
        layout = "NCHW" if shape[1] in (1, 3) else "NHWC"
        channel_count, height, width = (shape[1], *shape[2:]) if layout == "NCHW" else (shape[3], *shape[1:3])
        channels = self.channels
        if channel_count != self.channel_count:
            channels = "GRAY" if channel_count == 1 else "RGB"
        size = (height or self.size[0], width or self.size[1])
        return replace(self, size=size, layout=layout, channels=channels)


def _values(values: tuple[float, ...]) -> str:
    texts = [f"{value:{_DIGITS}}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


#: The presets by name. The means of "clip" are those of OpenAI's CLIP, those of "tf" and "caffe" Keras's.
PRESETS = {
    "imagenet": Preprocess(resize="crop", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "clip": Preprocess(
        resize="crop",
        crop_fraction=1.0,
        interpolation="bicubic",
        scale=1 / 255,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "caffe": Preprocess(channels="BGR", mean=(103.939, 116.779, 123.68)),
    "yolo": Preprocess(size=(640, 640), resize="letterbox", antialias=False, scale=1 / 255),
    "unit": Preprocess(scale=1 / 255),
    "raw": Preprocess(),
}
