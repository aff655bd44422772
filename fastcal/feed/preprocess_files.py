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
        if "image_mean" in values or "image_processor_type" in values:
            return _from_hugging_face(values)
        if "pretrained_cfg" in values or "input_size" in values:
            return _from_timm(values.get("pretrained_cfg", values))
        return _from_attributes(values)
    except (ValueError, TypeError, KeyError) as error:
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
    size = values.get("size", 224)
    resize, fraction = "stretch", Preprocess.crop_fraction
    if isinstance(size, Mapping) and "shortest_edge" in size:
        covered = size["shortest_edge"]
        if values.get("do_center_crop"):
            height, width = _pair(values.get("crop_size", covered))
            resize, fraction = "crop", height / covered
        else:
            height = width = covered
            if covered < _CONVNEXT_STRETCHES_FROM or "crop_pct" not in values:
                resize, fraction = "crop", values.get("crop_pct") or 1.0
    elif values.get("do_center_crop"):
        covered, (height, width) = _pair(size)[0], _pair(values.get("crop_size", size))
        resize, fraction = "crop", height / covered
    else:
        height, width = _pair(size)
    scale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    normalize = values.get("do_normalize", True)
    return Preprocess(
        size=(height, width),
        resize=resize,
        crop_fraction=fraction,
        interpolation=_PIL_FILTERS.get(values.get("resample", 2), f"PIL filter {values.get('resample')}"),
        scale=scale,
        mean=tuple(values["image_mean"]) if normalize else (0.0,),
        std=tuple(values["image_std"]) if normalize else (1.0,),
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
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _text(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
