"""Preprocessing as files and other libraries describe it."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastcal.errors import FastcalError
from fastcal.feed.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: PIL's numbers of its filters, which Hugging Face writes down.
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

#: Below this size Hugging Face's ConvNeXT cuts out the centre, from it on it stretches.
_CONVNEXT_STRETCHES_FROM = 384

#: Hugging Face's processors that stretch both sides to a size that is one number; others that crop take it for the
#: shorter side's.
_SQUARE = ("Beit", "DeiT", "EfficientNet", "Flava", "OwlViT")

#: The steps of Hugging Face's processors that are done here, or that change no pixels; any other is refused.
_STEPS = (
    "do_center_crop",
    "do_convert_annotations",
    "do_convert_rgb",
    "do_flip_channel_order",
    "do_normalize",
    "do_reduce_labels",
    "do_rescale",
    "do_resize",
    "do_resize_and_center_crop",
)

#: What else changes pixels. To rescale with an offset subtracts 127.5 before it in some versions, 1 after it in others.
_NOT_DONE = ("keep_aspect_ratio", "max_size", "offset", "rescale_offset", "size_divisor")


def load(path: str | os.PathLike[str]) -> Preprocess:
    """See `Preprocess.load`."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FastcalError(f"cannot read {path}: {error.strerror}; name a preset or a file") from error
    try:
        read = tomllib.loads if Path(path).suffix == ".toml" else json.loads
        values = read(content.decode())
        if not isinstance(values, dict):
            raise FastcalError("it holds no table of names and values")
        if not values.keys().isdisjoint(("image_mean", "image_processor_type", "feature_extractor_type")):
            return _from_hugging_face(values)
        if "pretrained_cfg" in values or "input_size" in values:
            return _from_timm(values.get("pretrained_cfg", values))
        return _from_attributes(values)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise FastcalError(f"{path} describes no preprocessing: {_text(error)}; see fastcal.Preprocess") from error
    except FastcalError as error:
        raise FastcalError(f"{path}: {error}") from error


def from_torchvision(transforms: Any) -> Preprocess:
    """See `Preprocess.from_torchvision`."""
    try:
        (covered,), (size,) = transforms.resize_size, transforms.crop_size
        return Preprocess(
            size=(size, size),
            resize="crop",
            crop_fraction=size / covered,
            interpolation=str(getattr(transforms.interpolation, "value", transforms.interpolation)),
            scale=1 / 255,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise FastcalError(
            f"{type(transforms).__name__} is no torchvision preprocessing for image classification; give what "
            "weights.transforms() returns"
        ) from error


def _from_attributes(values: Mapping[str, Any]) -> Preprocess:
    """Of our own attributes by name."""
    values = dict(values)
    base = Preprocess.preset(values.pop("preset")) if "preset" in values else Preprocess()
    known = {field.name for field in fields(Preprocess)}
    for name in values:
        if name not in known:
            raise FastcalError(f"there is no {name!r}; choose from preset, {', '.join(sorted(known))}")
    for name in ("size", "mean", "std"):
        if name in values:
            values[name] = tuple(values[name]) if isinstance(values[name], list) else (values[name],)
    if len(values.get("size", ())) == 1:
        values["size"] *= 2
    return replace(base, **values)


def _from_hugging_face(values: Mapping[str, Any]) -> Preprocess:
    """Of an image processor of Hugging Face's transformers."""
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    for name, value in values.items():
        if value and (name in _NOT_DONE or (name.startswith("do_") and name not in _STEPS)):
            raise _refusal(f"{name} {value!r}")
    if values.get("do_resize") is False:
        raise _refusal(f"do_resize {values['do_resize']!r}")
    size, resize, fraction = _geometry(values, kind)
    normalize = values.get("do_normalize", not kind.startswith("MobileViT"))
    flip = values.get("do_flip_channel_order", kind.startswith("MobileViT"))
    if flip and normalize:  # in an order that only the processor's source tells
        raise _refusal("do_flip_channel_order together with do_normalize")
    # EfficientNet's divides once more by the standard deviation, for networks with their classifier.
    divisions = bool(normalize) + bool(values.get("include_top", kind.startswith("EfficientNet")))
    return Preprocess(
        size=size,
        resize=resize,
        crop_fraction=fraction,
        interpolation=_PIL_FILTERS.get(values.get("resample", 2), f"PIL filter {values.get('resample')}"),
        channels="BGR" if flip else "RGB",
        scale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
        mean=tuple(values["image_mean"]) if normalize else (0.0,),
        std=tuple(value**divisions for value in values["image_std"]) if divisions else (1.0,),
    )


def _geometry(values: Mapping[str, Any], kind: str) -> tuple[tuple[int, int], str, float]:
    """The size, the way of resizing and the crop fraction of an image processor of Hugging Face's."""
    size, crop_pct = values.get("size", 224), values.get("crop_pct")
    is_cropped = values.get("do_center_crop") or values.get("do_resize_and_center_crop")
    if isinstance(size, Mapping):
        size = {name: side for name, side in size.items() if side is not None}
        if not size.keys() <= {"shortest_edge", "height", "width"}:
            raise _refusal(f"size {size}")
        stretches = "shortest_edge" not in size
    else:
        stretches = kind.startswith(_SQUARE) or not (is_cropped or crop_pct)
    height, width = _pair(size["shortest_edge"] if isinstance(size, Mapping) and not stretches else size)
    if stretches and not (crop_pct and height == width):
        if is_cropped and _pair(values.get("crop_size") or size) != (height, width):
            raise _refusal(f"stretching to {height}x{width} and cropping then")
        return (height, width), "stretch", Preprocess.crop_fraction
    if not is_cropped:
        if height >= _CONVNEXT_STRETCHES_FROM and "crop_pct" in values:
            return (height, width), "stretch", Preprocess.crop_fraction
        return (height, width), "crop", crop_pct or 1.0
    covered = int(height / crop_pct) if crop_pct else height  # PoolFormer's
    if kind.startswith("Levit"):
        covered = int(256 / 224 * height)
    height, width = _pair(values.get("crop_size") or height)
    if height != width:
        raise _refusal(f"crop_size {height}x{width} of an image whose shorter side is {covered}")
    return (height, width), "crop", height / covered


def _refusal(what: str) -> FastcalError:
    return FastcalError(
        f"{what} is not supported; describe what is near enough with fastcal.Preprocess's attributes, or prepare the "
        "images as it says and feed arrays, .npy files"
    )


def _from_timm(values: Mapping[str, Any]) -> Preprocess:
    """Of a model's configuration in timm."""
    _, height, width = values["input_size"]
    modes = {"center": "crop", "squash": "stretch"}
    mode = values.get("crop_mode") or "center"
    if mode not in modes:
        raise FastcalError(f"crop_mode {mode!r} is not supported; choose one of {', '.join(modes)}")
    return Preprocess(
        size=(height, width),
        resize=modes[mode],
        crop_fraction=values.get("crop_pct") or 0.875,
        interpolation=values.get("interpolation") or "bilinear",
        scale=1 / 255,
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, from a number or a table of both."""
    sides = (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise FastcalError(f"a side of {side!r} is none of an image; give a number of pixels")
    return sides


def _text(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
