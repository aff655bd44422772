"""Descriptions of preprocessing in files and in other libraries, as attributes of `fastcal.Preprocess` by name.

Settings that fastcal cannot reproduce exactly are rejected. So are processors of Hugging Face's transformers that do
something else than their configuration says.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcal.errors import DataError
from fastcal.feed import deepstream

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: PIL's numbers of its filters, which Hugging Face writes down.
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

#: Steps of Hugging Face's processors that `fastcal.Preprocess` has, or that change no pixels.
_STEPS = (
    "do_center_crop",
    "do_convert_annotations",
    "do_convert_rgb",
    "do_flip_channel_order",
    "do_normalize",
    "do_reduce_labels",
    "do_rescale",
    "do_resize",
)

#: Other settings that change pixels. Rescaling with an offset subtracts 127.5 before it in some versions, 1 after it in
#: others; some processors divide once more by the standard deviation if the network includes its top.
_REJECTED = ("include_top", "keep_aspect_ratio", "max_size", "offset", "rescale_offset", "size_divisor")

#: Processors that do something else than their configuration says: they resize to another size, change the order of the
#: channels, normalize twice, or crop first.
_REJECTED_TYPES = ("EfficientNet", "LayoutLMv2", "Levit", "MobileViT", "Perceiver")

#: From this size on, processors with a `crop_pct` may stretch instead of cropping.
_CROP_PCT_BELOW = 384


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the attributes, and perhaps "preset", that a file describes: see `fastcal.Preprocess.load`.

    A file of other contents raises ValueError, TypeError, KeyError, ArithmeticError or RecursionError.
    """
    if Path(path).suffix in deepstream.SUFFIXES:
        return deepstream.read_nvinfer(path)
    parse = tomllib.loads if Path(path).suffix == ".toml" else json.loads
    values = parse(Path(path).read_bytes().decode())
    if not isinstance(values, dict):
        raise DataError("it holds no table of names and values")
    if not values.keys().isdisjoint(("image_mean", "image_processor_type", "feature_extractor_type")):
        return _from_hugging_face(values)
    if "pretrained_cfg" in values or "input_size" in values:
        return _from_timm(values.get("pretrained_cfg", values))
    return _from_attributes(values)


def from_torchvision(transforms: Any) -> dict[str, Any]:
    """Return the attributes of torchvision's transforms: see `fastcal.Preprocess.from_torchvision`."""
    (covered,), (size,) = transforms.resize_size, transforms.crop_size
    return {
        "size": (size, size),
        "resize": "crop",
        "crop_fraction": size / covered,
        "interpolation": str(getattr(transforms.interpolation, "value", transforms.interpolation)),
        "scale": 1 / 255,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }


def _from_attributes(values: dict[str, Any]) -> dict[str, Any]:
    """Return our own attributes by name; a number stands for a tuple."""
    for name in ("size", "mean", "std"):
        if name in values:
            values[name] = tuple(values[name]) if isinstance(values[name], list) else (values[name],)
    if len(values.get("size", ())) == 1:
        values["size"] *= 2
    return values


def _from_hugging_face(values: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    if kind.startswith(_REJECTED_TYPES) or (kind.startswith("ConvNext") and not values.get("crop_pct")):
        raise _rejection(f"{kind}, which does something else than its configuration says,")
    for name, value in values.items():
        if value and (name in _REJECTED or (name.startswith("do_") and name not in _STEPS)):
            raise _rejection(f"{name} {value!r}")
    if values.get("do_resize") is False:
        raise _rejection(f"do_resize {values['do_resize']!r}")
    normalize, flip = values.get("do_normalize", True), values.get("do_flip_channel_order", False)
    if flip and normalize:  # in an order that only the processor's source tells
        raise _rejection("do_flip_channel_order together with do_normalize")
    return {
        **_geometry(values),
        "interpolation": _PIL_FILTERS.get(values.get("resample", 2), f"PIL filter {values.get('resample')}"),
        "channels": "BGR" if flip else "RGB",
        "scale": values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
        "mean": tuple(values["image_mean"]) if normalize else (0.0,),
        "std": tuple(values["image_std"]) if normalize else (1.0,),
    }


def _geometry(values: Mapping[str, Any]) -> dict[str, Any]:
    size, crop_pct, is_cropped = values["size"], values.get("crop_pct"), values.get("do_center_crop")
    if isinstance(size, Mapping):
        size = {name: side for name, side in size.items() if side is not None}
        if not size.keys() <= {"shortest_edge", "height", "width"}:
            raise _rejection(f"size {size}")
    has_shortest = isinstance(size, Mapping) and "shortest_edge" in size
    height, width = _pair(size["shortest_edge"] if has_shortest else size)
    if crop_pct:
        if height != width or height >= _CROP_PCT_BELOW or is_cropped is False:
            raise _rejection(f"crop_pct {crop_pct} of size {height}x{width}")
        return _crop(values.get("crop_size") or height, int(height / crop_pct))
    if has_shortest:
        if not is_cropped:
            raise _rejection(f"size {size} without do_center_crop")
        return _crop(values["crop_size"], height)
    if is_cropped:
        if not isinstance(size, Mapping):  # both sides in some processors, in others the shorter one
            raise _rejection(f"size {size} with do_center_crop, instead of its shortest_edge, or height and width,")
        if _pair(values["crop_size"]) != (height, width):
            raise _rejection(f"stretching to {height}x{width} and cropping then")
    return {"size": (height, width), "resize": "stretch"}


def _crop(size: Any, covered: int) -> dict[str, Any]:
    height, width = _pair(size)
    if height != width:
        raise _rejection(f"crop_size {height}x{width} of an image whose shorter side is {covered}")
    return {"size": (height, width), "resize": "crop", "crop_fraction": height / covered}


def _rejection(what: str) -> DataError:
    return DataError(
        f"{what} is not supported; describe what is near enough with fastcal.Preprocess's attributes, or prepare the "
        "images as it says and feed arrays, .npy files"
    )


def _from_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    _, height, width = values["input_size"]
    modes = {"center": "crop", "squash": "stretch"}
    mode = values.get("crop_mode") or "center"
    if mode not in modes:
        raise DataError(f"crop_mode {mode!r} is not supported; choose one of {', '.join(modes)}")
    return {
        "size": (height, width),
        "resize": modes[mode],
        "crop_fraction": values.get("crop_pct") or 0.875,
        "interpolation": values.get("interpolation") or "bilinear",
        "scale": 1 / 255,
        "mean": tuple(values["mean"]),
        "std": tuple(values["std"]),
    }


def _pair(size: Any) -> tuple[int, int]:
    """Return height and width, from a number or a table of both."""
    sides = (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise DataError(f"{side!r} is not a valid image side; give a number of pixels")
    return sides
