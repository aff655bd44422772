"""The form in which a network takes images: size, colours, values, layout."""

import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fastcal.errors import DataError
from fastcal.feed import preprocess_files

_CHOICES = {
    "resize": ("stretch", "crop", "letterbox"),
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "channels": ("RGB", "BGR", "GRAY", "RGBA"),
    "bits": (8, 16),
    "layout": ("NCHW", "NHWC"),
    "padding": ("both", "end"),
    "rounding": ("nearest", "down"),
    "dtype": ("float32", "uint8"),
}

# Added to a number of pixels computed from a share, so that rounding down gives the number that the share was made of.
_SLACK = 1e-6

# The smallest mean or standard deviation of pixels that is likely, as a share of the largest value.
_UNLIKELY = 128

# The format of numbers: no two numbers of float32 have the same text.
_DIGITS = ".9g"


def _check_number(name: str, value: Any) -> None:
    """Raise DataError unless `value` is a number that float32 images can be computed with."""
    try:
        usable = isinstance(value, numbers.Real) and (value == 0 or 1e-30 < abs(float(value)) < 1e30)
    except OverflowError:  # an integer that is larger than any float
        usable = False
    if not usable:
        raise DataError(f"{name} has {value!r}; give a number, as the network was trained with")


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that turns an image into a network's input.

    An image is decoded to `bits` a channel, turned upright by its EXIF orientation and resized to `size` with results
    of as many bits, as PIL does it. Its values are then (pixel * scale - mean) / std in float32.

    Attributes:
        size: Height and width, in pixels.
        resize: "stretch" both sides to `size`; "crop": resize until the image covers size / crop_fraction, then cut
            `size` out of the centre; "letterbox": resize until the image fits into `size`, then pad: see `padding`.
        crop_fraction: For "crop", the share of each side that stays. 0.875 resizes the shorter side to 256 for a size
            of 224, as torchvision and timm do.
        fill: For "letterbox", the padding's pixel value, 0 to 255; or "mean": 0 after normalization.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", PIL's filters of these names.
        antialias: Whether the filter widens for an image that shrinks, as PIL's filters do and OpenCV's do not.
        channels: "RGB", "BGR", "GRAY" (one channel: ITU-R 601 luma, as PIL's "L") or "RGBA" (the fourth channel is the
            alpha, 255 for images without one; each channel is resized and padded like the others).
        scale: Factor on pixel values 0 to 255.
        mean: Per channel, in the order of `channels`, subtracted after scaling; one value stands for all channels.
        std: Per channel, the divisor after subtracting the mean; one value stands for all channels.
        layout: "NCHW" or "NHWC".
        padding: For "letterbox", "both": both sides alike; or "end": on the right and below only, as YOLOX, DETR,
            mmdetection and DeepStream do.
        rounding: For "letterbox", "nearest": the sides of the resized image are rounded, as Ultralytics does; or
            "down", as YOLOX and DeepStream do.
        divisor: For "letterbox", the number whose multiples height and width are padded to: images are resized to fit
            `size`, and 32 makes a size of 800x1333 one of 800x1344.
        dtype: "float32"; or "uint8" for a network that normalizes the pixels itself: scale 1, mean 0 and std 1.
        bits: 8; or 16 to keep the depth of 16-bit images. Pixels are 0 to 255 either way, with 16 bits in steps of
            1 / 257: `scale`, `fill` and the presets mean the same, and a scale of 257 gives 0 to 65535. Not for "RGBA".

    Raises:
        DataError: A value is not one of the above.
    """

    size: tuple[int, int] = (224, 224)
    resize: str = "stretch"
    crop_fraction: float = 0.875
    fill: float | str = 114
    interpolation: str = "bilinear"
    antialias: bool = True
    channels: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"
    padding: str = "both"
    divisor: int = 1
    dtype: str = "float32"
    bits: int = 8
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise DataError(
                    f"there is no {name} {getattr(self, name)!r}; choose one of {', '.join(map(str, known))}"
                )
        whole = isinstance(self.size, Sequence) and all(
            isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in self.size
        )
        if not whole or len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"size {self.size} is not (height, width) in pixels, e.g. (224, 224)")
        if not 0 < self.crop_fraction <= 1:
            raise DataError(f"crop_fraction {self.crop_fraction} is not in (0, 1]; torchvision's is 0.875")
        if self.fill != "mean" and not (isinstance(self.fill, numbers.Real) and 0 <= self.fill <= 255):
            raise DataError(f"fill {self.fill!r} is not a pixel value from 0 to 255, nor 'mean'")
        if not isinstance(self.divisor, int) or isinstance(self.divisor, bool) or self.divisor < 1:
            raise DataError(f"divisor {self.divisor!r} is not a number of pixels, e.g. 32")
        if self.bits == 16 and (self.dtype == "uint8" or self.channels == "RGBA"):
            raise DataError(
                "bits 16 is for float32 and the channels RGB, BGR or GRAY; use 8, or feed arrays, .npy files"
            )
        self._check_values()

    def _check_values(self) -> None:
        _check_number("scale", self.scale)
        if self.scale == 0:
            raise DataError("scale is 0, which makes all images the same; use 1 to leave pixels as they are")
        self._check_channels("mean", self.mean)
        self._check_channels("std", self.std)
        if 0 in self.std:
            raise DataError(f"std {self.std} has a 0, which cannot be a divisor")
        if self.dtype == "uint8" and (self.scale, {*self.mean}, {*self.std}) != (1, {0}, {1}):
            raise DataError("dtype uint8 holds pixels as they are; leave out scale, mean and std, or use float32")

    def _check_channels(self, name: str, values: Any) -> None:
        if isinstance(values, numbers.Real):
            raise DataError(f"{name} is {values}; give a sequence, ({values},) for all channels alike")
        if not hasattr(values, "__len__") or isinstance(values, str):
            raise DataError(f"{name} is {values!r}; give a sequence of numbers")
        if len(values) not in (1, self.channel_count):
            several = "" if self.channel_count == 1 else f" or {self.channel_count}"
            raise DataError(
                f"{name} {values} has {len(values)} values, {self.channels} needs 1{several}; choose another "
                "preprocessing: the presets unit and raw fit all channels"
            )
        for value in values:
            _check_number(name, value)

    @classmethod
    def preset(cls, name: str) -> "Preprocess":
        """Return the preprocessing that a family of networks is trained with.

        Args:
            name: "imagenet" (torchvision's classifiers: shorter side to 256, centre 224, ImageNet's mean and standard
                deviation), "clip" (bicubic, shorter side to 224, centre 224, CLIP's mean and standard deviation), "tf"
                (stretched to 224, -1..1, as Keras's mode of that name), "caffe" (stretched to 224, BGR less
                ImageNet's mean, likewise), "yolo" (Ultralytics: letterbox to 640, 0..1), "unit" (stretched to 224,
                0..1) or "raw" (stretched to 224, 0..255).

        Raises:
            DataError: There is no such preset.
        """
        if name not in PRESETS:
            raise DataError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Preprocess":
        """Return the preprocessing that a file describes.

        Args:
            path: TOML or JSON with this class's attributes (and `preset` for the others), Hugging Face's
                `preprocessor_config.json`, timm's `config.json`, or the configuration of DeepStream's nvinfer, in text
                (.txt) or YAML.

        Raises:
            DataError: The file cannot be read, or asks for something that this class does not do.
        """
        try:
            values = preprocess_files.read(path)
            base = cls.preset(values.pop("preset")) if "preset" in values else cls()
            known = {field.name for field in fields(cls)}
            for name in values:
                if name not in known:
                    raise DataError(f"there is no {name!r}; choose from preset, {', '.join(sorted(known))}")
            return replace(base, **values)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; name a preset or a file") from error
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DataError(f"{path} describes no preprocessing: {reason}; see fastcal.Preprocess") from error

    @classmethod
    def from_torchvision(cls, transforms: Any) -> "Preprocess":
        """Return the preprocessing of torchvision's weights.

        Args:
            transforms: The result of `weights.transforms()`, e.g. of `ResNet50_Weights.DEFAULT`.

        Raises:
            DataError: The transforms are no preprocessing for image classification.
        """
        try:
            return cls(**preprocess_files.from_torchvision(transforms))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{type(transforms).__name__} is no torchvision preprocessing for image classification; give the "
                "result of weights.transforms()"
            ) from error

    @property
    def covered(self) -> tuple[int, int]:
        """The height and width that "crop" resizes an image to cover, rounded down as timm does."""
        height, width = (int(side / self.crop_fraction + _SLACK) for side in self.size)
        return height, width

    def __str__(self) -> str:
        height, width = self.size
        sides = "" if self.padding == "both" else " right and below"
        divisor = "" if self.divisor == 1 or self.resize != "letterbox" else f", padded to a multiple of {self.divisor}"
        letterbox = f"letterbox {self.fill}{sides}{', rounded down,' if self.rounding == 'down' else ''}"
        resize = {"crop": f"crop {self.crop_fraction:{_DIGITS}}", "letterbox": letterbox}.get(self.resize, self.resize)
        interpolation = "" if self.interpolation == "bilinear" else f"{self.interpolation}, "
        antialias = "" if self.antialias else "not antialiased, "
        values = f"(x * {self.scale:{_DIGITS}} - {_values(self.mean)}) / {_values(self.std)}"
        values = "uint8" if self.dtype == "uint8" else values
        channels = self.channels if self.bits == 8 else f"{self.channels} of {self.bits} bits"
        return f"{resize} to {height}x{width}{divisor}, {interpolation}{antialias}{channels}, {values}, {self.layout}"

    @property
    def remark(self) -> str:
        """A warning if mean and std are not of the range that pixels have after scaling; else empty."""
        white = 255 * abs(self.scale)
        least, most = white / _UNLIKELY, white * (1 + _SLACK)
        unlikely = [value for value in map(abs, self.mean) if value and not least <= value <= most]
        unlikely += [value for value in map(abs, self.std) if value != 1 and not least <= value <= most]
        if not unlikely:
            return ""
        right = "1 / 255 if they are for 0 to 1" if max(unlikely) <= 1 else "1 if they are for 0 to 255"
        return (
            f"mean {_values(self.mean)} and std {_values(self.std)} are not of the range of the scaled pixels, 0 to "
            f"{white:.4g}: set scale to {right}"
        )

    @property
    def channel_count(self) -> int:
        """The number of channels: 1, 3 or 4."""
        return {"GRAY": 1, "RGBA": 4}.get(self.channels, 3)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one prepared image, in the order of `layout`."""
        if self.layout == "NCHW":
            return (self.channel_count, *self.padded)
        return (*self.padded, self.channel_count)

    @property
    def padded(self) -> tuple[int, int]:
        """The height and width of a prepared image: `size`, for "letterbox" rounded up to multiples of `divisor`."""
        divisor = self.divisor if self.resize == "letterbox" else 1
        height, width = (-(-side // divisor) * divisor for side in self.size)
        return height, width

    def fit(self, shape: tuple[int | None, ...], dtype: Any = None) -> "Preprocess":
        """Return this preprocessing with the size, layout, channels and type of a network's image input.

        Args:
            shape: The input's shape, batch first; None for a dynamic dimension, which leaves a size unchanged.
            dtype: The input's type. For uint8, which only pixels as they are fit, scale, mean and std are left out. By
                default the type stays.

        Raises:
            DataError: The input takes no images of 1 or 3 channels (4 for "RGBA"), or mean and std are for another
                number of channels.
        """
        counts = {1, 3, self.channel_count}
        if len(shape) != 4 or not {shape[1], shape[3]} & counts:
            if len(shape) == 4 and None in (shape[1], shape[3]):
                raise DataError("its number of channels is dynamic; export it with a fixed one, or feed it arrays")
            rgba = " (or set channels to RGBA for those)" if len(shape) == 4 and 4 in (shape[1], shape[3]) else ""
            raise DataError(f"it takes no images of 1 or 3 channels; feed it arrays instead{rgba}")
        layout = "NCHW" if shape[1] in counts else "NHWC"
        channel_count, height, width = (shape[1], *shape[2:]) if layout == "NCHW" else (shape[3], *shape[1:3])
        channels = self.channels
        if channel_count != self.channel_count:
            channels = "GRAY" if channel_count == 1 else "RGB"
        wanted = zip((height, width), self.padded, self.size, strict=True)
        size = tuple(own if theirs in (None, padded) else theirs for theirs, padded, own in wanted)
        changes: dict[str, Any] = {"size": size, "layout": layout, "channels": channels}
        if dtype == "uint8" and self.dtype != "uint8":
            fill = sum(self.mean) / len(self.mean) / self.scale if self.fill == "mean" else self.fill
            changes |= {"dtype": "uint8", "scale": 1.0, "mean": (0.0,), "std": (1.0,), "fill": round(float(fill))}
        return replace(self, **changes)


def _values(values: tuple[float, ...]) -> str:
    texts = [f"{value:{_DIGITS}}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


#: The presets by name. The means of "clip" are from OpenAI's CLIP, those of "tf" and "caffe" from Keras.
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
