"""DeepStream's configurations of Gst-nvinfer, as attributes of `fastcal.Preprocess` by name.

nvinfer computes y = net-scale-factor * (x - offset) of the pixels x, 0 to 255, in the order of `model-color-format`. It
stretches an image to the network's size; or, with `maintain-aspect-ratio`, resizes it to fit, both sides rounded down,
and pads it with black, on the right and below or, with `symmetric-padding`, on all sides.
"""

import configparser
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastcal.errors import DataError

#: The endings of the names of such files.
SUFFIXES = (".txt", ".yml", ".yaml")

_GROUP = "property"
_COLORS = ("RGB", "BGR", "GRAY")
_LAYOUTS = ("NCHW", "NHWC")

#: The filters that a GPU and the VIC of a Jetson have in common, by the numbers of NvBufSurfTransform_Inter.
_FILTERS = {0: "nearest", 1: "bilinear", 6: "nearest"}
_DEFAULT_FILTER = 6

#: The keys that change pixels in a way that no attribute of `fastcal.Preprocess` has.
_REJECTED = {
    "mean-file": "give offsets in its place, a value for each channel",
    "input-dims": "give infer-dims in its place",
    "uff-input-dims": "give infer-dims in its place",
}


def read_nvinfer(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the attributes that a configuration of nvinfer describes.

    Raises:
        DataError: The file is none, or asks for something that `fastcal.Preprocess` does not do.
        OSError: The file cannot be read.
    """
    keys = _Keys(_properties(path))
    for key, remedy in _REJECTED.items():
        if key in keys.values and (key == "mean-file" or "infer-dims" not in keys.values):
            raise DataError(f"{key} is not supported; {remedy}")
    if keys.flag("input-tensor-from-meta"):
        raise DataError(
            "input-tensor-from-meta is not supported: Gst-nvdspreprocess prepares the images then; describe what that "
            "does with fastcal.Preprocess's attributes"
        )
    channels = keys.choice("model-color-format", _COLORS)
    count = 1 if channels == "GRAY" else 3
    scale = keys.number("net-scale-factor", 1.0, float)
    mean = [scale * offset for offset in keys.numbers("offsets", float, count)] or [0.0]
    keeps = keys.flag("maintain-aspect-ratio")
    found: dict[str, Any] = {
        "resize": "letterbox" if keeps else "stretch",
        "padding": "both" if keys.flag("symmetric-padding") else "end",
        "rounding": "down",
        "fill": 0,
        "interpolation": keys.filter(),
        "antialias": False,
        "channels": channels,
        "scale": scale,
        "mean": tuple(mean),
        "layout": keys.choice("network-input-order", _LAYOUTS),
    }
    if dims := keys.numbers("infer-dims", int, 3):
        if dims[0] != count:
            raise DataError(f"infer-dims has {dims[0]} channels, and model-color-format {channels} has {count}")
        found["size"] = (dims[1], dims[2])
    return found


def calibration_file(path: str | os.PathLike[str] | None) -> str | None:
    """Return the path of the `int8-calib-file` that a configuration of nvinfer names; None if it names none.

    A relative path starts at the configuration's folder. Errors are not reported here.
    """
    if path is None or not os.fspath(path).endswith(SUFFIXES):
        return None
    try:
        named = _properties(path).get("int8-calib-file")
    except (DataError, OSError):
        return None
    return None if named is None else str(Path(path).parent / named)


def _properties(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the values of the group [property], as texts."""
    import yaml  # every command imports this module

    text = Path(path).read_text(errors="surrogateescape")
    try:
        if os.fspath(path).endswith(".txt"):
            parser = configparser.RawConfigParser(delimiters="=", comment_prefixes="#", strict=False)
            parser.read_string(text)
            values: Any = dict(parser[_GROUP]) if parser.has_section(_GROUP) else None
        else:
            content = yaml.safe_load(text)
            values = content.get(_GROUP) if isinstance(content, Mapping) else None
    except (configparser.Error, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"it is not a configuration of nvinfer: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise DataError(f"it has no group {_GROUP!r}; name a configuration of nvinfer, a preset or another file")
    return {str(key): str(value).strip() for key, value in values.items()}


class _Keys:
    """The keys of a configuration, read as nvinfer reads them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def number(self, key: str, default: Any, kind: Callable[[str], Any]) -> Any:
        """Return a number."""
        return self.numbers(key, kind, 1)[0] if key in self.values else default

    def numbers(self, key: str, kind: Callable[[str], Any], count: int) -> list[Any]:
        """Return the numbers of a list; an empty list if there is no such key."""
        texts = [text for text in self.values.get(key, "").split(";") if text.strip()]
        if key in self.values and len(texts) != count:
            raise DataError(f"{key} is {self.values[key]!r}; it needs {count} numbers")
        try:
            return [kind(text) for text in texts]
        except ValueError as error:
            raise DataError(f"{key} is {self.values[key]!r}; it needs numbers") from error

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        """Return what a number stands for, by default 0."""
        number: int = self.number(key, 0, int)
        if not 0 <= number < len(known):
            texts = ", ".join(f"{index} ({name})" for index, name in enumerate(known))
            raise DataError(f"{key} {number} is not supported; choose one of {texts}")
        return known[number]

    def flag(self, key: str) -> bool:
        """Return a boolean, by default False."""
        text = self.values.get(key, "0").lower()
        if text not in ("0", "1", "false", "true"):
            raise DataError(f"{key} is {self.values[key]!r}; it needs 0 or 1")
        return text in ("1", "true")

    def filter(self) -> str:
        """Return the interpolation."""
        number: int = self.number("scaling-filter", _DEFAULT_FILTER, int)
        if number not in _FILTERS:
            raise DataError(
                f"scaling-filter {number} is not supported: GPU and Jetson interpolate in different ways; choose 0 "
                "(nearest) or 1 (bilinear)"
            )
        return _FILTERS[number]
