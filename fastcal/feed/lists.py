"""Files that list samples: plain lists, lists with labels, CSV, Ultralytics' data.yaml and COCO's JSON."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml

from fastcal.errors import DataError
from fastcal.feed.signatures import UTF_16

#: The splits of Ultralytics' data sets, those it calibrates with first.
_SPLITS = ("val", "train", "test")


def read_list(path: Path, is_sample: Callable[[str], bool]) -> list[str]:
    """Return the paths in a list, a line each, relative to the list; labels beside them are left out.

    A line is a path; or blanks, tabs, commas or semicolons (CSV) are between a path and labels. `is_sample` tells
    by its name whether a file may be a sample: a first line without such a name, and without a path, names columns.
    """
    lines = [line for line in _text(path).splitlines() if line.strip()]
    plain = [str(path.parent / line) for line in lines]
    if not plain or os.path.isfile(plain[0]):  # without a look at every file, which may be far away
        return plain
    found = [_path_in(line, path.parent) for line in lines]
    if len(lines) > 1 and found[0] is None and not any(map(is_sample, _fields(lines[0]))):
        del plain[0], found[0]
    return [given if path is None else path for given, path in zip(plain, found, strict=True)]


def _path_in(line: str, folder: Path) -> str | None:
    """Return the path of the file that a line of a list names; None if there is no such file."""
    for text in (line, line.strip(), *_fields(line)):
        if text and os.path.isfile(place := str(folder / text)):
            return place
    return None


def _fields(line: str) -> Iterator[str]:
    """Yield the parts of a line that may be its path."""
    for delimiter in (",", "\t", ";"):
        if delimiter in line:
            yield from (field.strip() for field in next(csv.reader([line], delimiter=delimiter)))
    parts = line.split()
    yield from (line.strip()[: -len(parts[-1])].rstrip(), parts[0], parts[-1])


def read_coco(path: Path) -> list[str]:
    """Return the paths of the images of a COCO file.

    `file_name` is looked for in the file's folder and the one above, and in their folders `images` and of the split:
    `annotations/instances_val2017.json` has its images in `val2017` or `images/val2017`.
    """
    try:
        content = json.loads(_text(path))
        names = [str(image["file_name"]) for image in content["images"]]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}; correct it, or name the images another way") from error
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f'{path} is JSON without COCO\'s "images" and "file_name"; name the images another way'
        ) from error
    if not names:
        raise DataError(f"{path} lists no images; name another file")
    split = path.stem.rpartition("_")[2]
    roots = [top / below for top in (path.parent, path.parent.parent)
             for below in (".", "images", split, f"images/{split}")]  # fmt: skip
    root = next((root for root in roots if (root / names[0]).is_file()), None)
    if root is None:
        raise DataError(
            f"{path} lists {names[0]}, which is neither beside it nor in {' or '.join(map(repr, ('images', split)))}; "
            "put the images there, or name their folder instead"
        )
    return [str(root / name) for name in names]


def read_yaml(path: Path) -> tuple[str, list[str]]:
    """Return the split that Ultralytics' description of a data set has images of, and their folders, lists or files."""
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no YAML: {reason}; correct it, or name the images another way") from error
    split = next((name for name in _SPLITS if isinstance(content, Mapping) and content.get(name)), None)
    if split is None:
        raise DataError(f"{path} names no images: it has neither {' nor '.join(_SPLITS)}; name a folder, or a list")
    named = content[split] if isinstance(content[split], list) else [content[split]]
    root = _root(path.parent, str(content.get("path") or "."))
    return split, [_place(root, str(name)) for name in named]


def _root(folder: Path, named: str) -> Path:
    """Return the folder that the places in a data set's description are relative to."""
    places = (folder / named, Path(named), folder / Path(named).name)
    return next((place for place in places if place.is_dir()), folder)


def _place(root: Path, name: str) -> str:
    """Return a place relative to `root`; "../train" may mean "train", as Ultralytics has it."""
    inside = root / re.sub(r"^(\.\./)+", "", name)
    return str(inside if not (root / name).exists() and inside.exists() else root / name)


def _text(path: Path) -> str:
    """Return the text of a file; bytes that are not UTF-8 become what file names have in their place."""
    try:
        content = path.read_bytes()
        return (
            content.decode("utf-16") if content.startswith(UTF_16) else content.decode("utf-8-sig", "surrogateescape")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read list file {path}: {error}; it needs one path a line") from error
