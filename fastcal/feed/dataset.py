"""Which samples there are and in which order."""

import glob
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from fastcal.errors import FastcalError

#: What an image file's name ends in: the formats that DALI decodes.
EXTENSIONS = frozenset(
    [".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)

_log = logging.getLogger("fastcal")


def list_images(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Paths of images, in order.

    Args:
        data: A folder (searched with its folders, sorted by path; hidden files are left out), a list file (one path a
            line, relative to the file, in its order), one image, a pattern as the shell has them ("train/**/*.jpg",
            sorted by path), or a sequence of paths (in its order).

    Raises:
        FastcalError: There is no such path, or no image in it.
    """
    if not isinstance(data, (str, os.PathLike)):
        return _existing([os.fspath(path) for path in data], "the list of images")
    path = Path(data)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        if glob.has_magic(str(path)):
            return _matching(str(path))
        raise FastcalError(f"no such file or folder: {path}; name a folder of images or a list file")
    if _is_image(path):
        return [str(path)]
    return _in_list_file(path)


def order(paths: list[str], *, shuffle: bool, seed: int, balance: bool, limit: int | None) -> list[str]:
    """`paths` shuffled by the seed (the same on every machine), taken from the classes by turns, cut to `limit`.

    Raises:
        FastcalError: There is one class only to balance.
    """
    if shuffle:
        # RandomState's streams are frozen by NumPy's compatibility policy, default_rng's are not.
        paths = [paths[index] for index in np.random.RandomState(seed).permutation(len(paths))]
    if balance:
        paths = _by_turns(paths)
    return paths[:limit]


def _by_turns(paths: list[str]) -> list[str]:
    """One path of each class, then the next of each; a class is a folder in the folder that all have in common."""
    root = os.path.commonpath({os.path.dirname(path) for path in paths})
    classes: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        below, _, rest = os.path.relpath(path, root).partition(os.sep)
        classes[below if rest else ""].append(path)
    if len(classes) == 1:
        raise FastcalError(f"the images in {root} are of one class; balancing needs a folder of folders, one per class")
    turns = zip_longest(*(classes[name] for name in sorted(classes)))
    return [path for path in chain.from_iterable(turns) if path is not None]


def _in_folder(folder: Path) -> list[str]:
    found, others = [], 0
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            if _is_image(name) and not name.startswith("."):
                found.append(os.path.join(parent, name))
            else:
                others += 1
    if not found:
        has = f"has {others} files, none of them an image" if others else "is empty"
        raise FastcalError(f"{folder} {has}; name a folder with {', '.join(sorted(EXTENSIONS))} files")
    if others:
        _log.info("%s: left out %d files that are not images", folder, others)
    return sorted(found)


def _matching(pattern: str) -> list[str]:
    found = sorted(filter(_is_image, glob.iglob(pattern, recursive=True)))
    if not found:
        raise FastcalError(f"no image matches {pattern}; images are {', '.join(sorted(EXTENSIONS))} files")
    return found


def _is_image(path: str | os.PathLike[str]) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _in_list_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastcalError(f"cannot read list file {path}: {error}; it needs one image path a line") from error
    return _existing([str(path.parent / line) for line in lines if line.strip()], f"list file {path}")


def _existing(paths: list[str], origin: str) -> list[str]:
    if not paths:
        raise FastcalError(f"{origin} is empty; it needs at least one image path")
    for number, path in enumerate(paths, start=1):
        if not os.path.isfile(path):
            raise FastcalError(f"{origin}, entry {number}: no such file: {path}; correct or remove it")
    return paths
