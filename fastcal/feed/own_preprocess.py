"""The preprocessing that a model names itself: in the metadata of its file, or in a file beside it."""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcal.errors import DataError
from fastcal.feed.preprocess import PRESETS, Preprocess
from fastcal.model import Model

#: The preprocessing of each task of Ultralytics', for its default size; classifiers are cropped as torchvision does.
_ULTRALYTICS = {
    **dict.fromkeys(("detect", "segment", "pose", "obb"), PRESETS["yolo"]),
    "classify": Preprocess(resize="crop", crop_fraction=1.0, scale=1 / 255),
}

#: The files that describe a preprocessing, beside the model.
_HUGGING_FACE, _TIMM = "preprocessor_config.json", "config.json"

#: The folder in which Hugging Face's repositories have their ONNX models, below that of their other files.
_ONNX_FOLDER = "onnx"


def choose_preprocess(model: Model | None) -> tuple[Preprocess, str]:
    """Return the preprocessing that a model names itself, else the preset "imagenet", and a line that says which.

    Raises:
        DataError: The model names a preprocessing that fastcal cannot reproduce.
    """
    found = None if model is None else _in_metadata(model) or _beside(model)
    if found is not None:
        preprocess, origin = found
        return preprocess, f"preprocessing as {origin} says: {preprocess}"
    lacking = "" if model is None else f", since {model.label} names none"
    line = f"the preprocessing imagenet is assumed{lacking}; choose another with preprocess if it is not right"
    return PRESETS["imagenet"], line


def preset_for(name: str, model: Model | None) -> Preprocess:
    """Return a preset, with the size that the model's metadata names if they do."""
    preset = Preprocess.preset(name)
    size = None if model is None else _image_size(_metadata(model))
    return preset if size is None else replace(preset, size=size)


def _in_metadata(model: Model) -> tuple[Preprocess, str] | None:
    """Return the preprocessing of a model that Ultralytics exported; YOLOv5 names neither task nor size."""
    metadata = _metadata(model)
    if not {"stride", "names"} <= metadata.keys():
        return None
    task = metadata.get("task", "detect" if _has_boxes(model) else "")
    if task not in _ULTRALYTICS:
        return None
    preprocess = _ULTRALYTICS[task]
    if "rtdetr" in metadata.get("description", "").lower():
        preprocess = replace(preprocess, resize="stretch")
    size = _image_size(metadata)
    preprocess = preprocess if size is None else replace(preprocess, size=size)
    return _fitted(preprocess, model), f"the metadata of {model.label} (Ultralytics, task {task})"


def _metadata(model: Model) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.proto.metadata_props}


def _image_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Return height and width of `imgsz`, rounded up to multiples of `stride`, as Ultralytics does; None if unknown."""
    size, stride = _value(metadata.get("imgsz")), _value(metadata.get("stride"))
    sides = [size, size] if isinstance(size, int) else size
    divisor = max(stride) if isinstance(stride, list | tuple) and stride else stride
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not isinstance(divisor, int) or divisor < 1:
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    height, width = (math.ceil(side / divisor) * divisor for side in sides)
    return height, width


def _value(text: str | None) -> Any:
    """Return the Python value that a text of the metadata stands for; None for other texts."""
    try:
        return None if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _has_boxes(model: Model) -> bool:
    """Return whether an output has more than two dimensions, as that of a classifier has not."""
    return any(len(value.type.tensor_type.shape.dim) > 2 for value in model.proto.graph.output)


def _beside(model: Model) -> tuple[Preprocess, str] | None:
    """Return the preprocessing that a file in the model's folder describes; in the folder above for Hugging Face's."""
    folder = Path(model.path).absolute().parent
    for place in (folder, folder.parent) if folder.name == _ONNX_FOLDER else (folder,):
        for name in (_HUGGING_FACE, _TIMM):
            path = place / name
            if path.is_file() and (name == _HUGGING_FACE or _is_timms(path)):
                try:
                    return _fitted(Preprocess.load(path), model), str(path)
                except DataError as error:
                    raise DataError(
                        f"{error}; or choose another preprocessing than the one beside the model"
                    ) from error
    return None


def _is_timms(path: Path) -> bool:
    """Return whether a `config.json` describes a model of timm's; transformers gives its own the same name."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not {"pretrained_cfg", "input_size"}.isdisjoint(content)


def _fitted(preprocess: Preprocess, model: Model) -> Preprocess:
    """Return a preprocessing with the form of the model's input, if it has one alone that takes images."""
    try:
        (value,) = model.inputs
        return preprocess.fit(value.shape, value.dtype)
    except (ValueError, DataError):
        return preprocess
