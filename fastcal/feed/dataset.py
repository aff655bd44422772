"""Which samples there are and in which order."""

import glob
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcal.errors import FastcalError, check_range

#: What the names of the files that samples come from end in, by kind of file. Images are the formats that DALI decodes.
EXTENSIONS = {
    "image": (".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    "tar shard": (".tar",),
    "TFRecord": (".tfrecord", ".tfrecords"),
    "array": (".npy",),
}
_KINDS = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}

#: How TensorFlow's own tools name the files of a data set: train-00017-of-01024.
_TENSORFLOW_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")

#: A range of numbers as WebDataset's users write it: train-{000000..000146}.tar.
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")

#: What names files that samples come from: see `list_files`.
Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class Listing:
    """Files of one kind.

    Attributes:
        kind: A key of `EXTENSIONS`.
        paths: Their paths, in order.
        sorted: Whether they were found and sorted, rather than given in an order.
    """

    kind: str
    paths: list[str]
    sorted: bool = False


def list_files(data: Data) -> Listing:
    """The files that samples come from, in order.

    Args:
        data: A folder (searched with its folders, sorted by path; hidden files are left out), a list file (one path a
            line, relative to the file, in its order), one file, a pattern as the shell has them ("train/**/*.jpg",
            sorted by path; "train-{0000..0146}.tar", in the range's order), or a sequence of paths (in its order).

    Raises:
        FastcalError: There is no such path, nothing to take samples from in it, or files of several kinds.
    """
    if not isinstance(data, (str, os.PathLike)):
        return _existing([os.fspath(path) for path in data], "the list of paths")
    path = Path(data)
    if not os.fspath(data):
        raise FastcalError("the name of the data is empty; name a folder of images or a list file")
    if os.path.isdir(path):  # which says no, where Path's own raise an error, of a name that is too long
        return _in_folder(path)
    if not os.path.exists(path):
        if _RANGE.search(str(path)):
            return _existing(_expanded(str(path)), f"pattern {path}")
        if glob.has_magic(str(path)):
            return _matching(str(path))
        raise FastcalError(f"no such file or folder: {path}; name a folder of images or a list file")
    if path.name.lower().endswith(_COMPRESSED):
        raise FastcalError(f"{path} is compressed; shards are read as they are, so decompress it to a .tar file")
    if kind_of(path) is not None:
        return _existing([str(path)], str(path))
    return _in_list_file(path)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What kind of file has such a name: a key of `EXTENSIONS`, or None."""
    kind = _KINDS.get(os.path.splitext(path)[1].lower())
    return "TFRecord" if kind is None and _TENSORFLOW_SHARD.search(os.fspath(path)) else kind


def order(paths: Sequence[str], *, shuffle: bool, seed: int, balance: bool, limit: int | None) -> Sequence[int]:
    """The places in `paths` of those to take, in order.

    Shuffled by the seed (the same on every machine), taken from the classes by turns, cut to `limit`.

    Raises:
        FastcalError: There is one class only to balance.
    """
    places: Sequence[int] = range(len(paths))
    if shuffle:
        places = shuffled(len(paths), seed).tolist()
    if balance:
        places = _by_turns(paths, places)
    return places[:limit]


def shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers below `count` in an order that the seed decides, the same on every machine.

    Raises:
        FastcalError: The seed is none of NumPy's.
    """
    check_range("seed", seed, 0, 2**32 - 1)
    # RandomState's streams are frozen by NumPy's compatibility policy, default_rng's are not.
    return np.random.RandomState(seed).permutation(count)


def _by_turns(paths: Sequence[str], places: Sequence[int]) -> list[int]:
    """One of each class, then the next of each; a class is a folder in the folder that all have in common."""
    root = common_folder(paths)
    classes: dict[str, list[int]] = defaultdict(list)
    for place in places:
        below, _, rest = os.path.relpath(paths[place], root).partition(os.sep)
        classes[below if rest else ""].append(place)
    if len(classes) == 1:
        raise FastcalError(f"the images in {root} are of one class; balancing needs a folder of folders, one per class")
    turns = zip_longest(*(classes[name] for name in sorted(classes)))
    return [place for place in chain.from_iterable(turns) if place is not None]


def check_parallel(listings: Mapping[str, Sequence[str]], found: Collection[str]) -> None:
    """See that what belongs together has the same place in lists of samples.

    Args:
        listings: The samples' names, by input.
        found: The inputs whose samples were found and sorted. Among these, a name (below the common folder, without
            its extension) that two inputs have must be at one place.

    Raises:
        FastcalError: Lists differ in length, or in order; both sides are shown.
    """
    first, *others = listings
    for other in others:
        if len(listings[first]) != len(listings[other]):
            raise FastcalError(
                f"input {first!r} has {len(listings[first])} samples, input {other!r} has {len(listings[other])}; "
                f"every sample needs both{_odd_one(listings[first], listings[other])}"
            )
        if first in found and other in found:
            _check_same_order(first, listings[first], other, listings[other])


def _check_same_order(first: str, ones: Sequence[str], other: str, others: Sequence[str]) -> None:
    stems, other_stems = _stems(ones), _stems(others)
    if stems == other_stems:
        return
    known = set(other_stems)
    for place, (stem, other_stem) in enumerate(zip(stems, other_stems, strict=True)):
        if stem != other_stem and stem in known:
            raise FastcalError(
                f"sample {place} is {ones[place]} for input {first!r} and {others[place]} for input {other!r}, though "
                f"the latter has a {stem!r} too; remove what has no partner, or give lists in the order you mean"
            )


def _odd_one(ones: Sequence[str], others: Sequence[str]) -> str:
    """The first sample without a partner of its name, where most have one."""
    by_stem = dict(zip(_stems(ones), ones, strict=True)), dict(zip(_stems(others), others, strict=True))
    alone = sorted(by_stem[0].keys() ^ by_stem[1].keys())
    if not alone or 2 * len(alone) > len(ones):
        return ""
    return f"; {by_stem[0].get(alone[0]) or by_stem[1].get(alone[0])} has no partner"


def _stems(paths: Sequence[str]) -> list[str]:
    root = common_folder(paths)
    return [os.path.splitext(os.path.relpath(path, root))[0] for path in paths]


def common_folder(paths: Iterable[str]) -> str:
    """The absolute path of the folder that all files lie in, or in folders of it."""
    return os.path.commonpath({os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}})


def _in_folder(folder: Path) -> Listing:
    found: dict[str | None, list[str]] = defaultdict(list)
    others = 0
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            kind = None if name.startswith(".") else kind_of(name)
            if kind is None:
                others += 1
            else:
                found[kind].append(os.path.join(parent, name))
    if not found:
        has = f"has {others} files, none of them an image" if others else "is empty"
        raise FastcalError(f"{folder} {has}; name a folder with {', '.join(EXTENSIONS['image'])} files, or shards")
    return _of_one_kind(found, str(folder), others)


def _refuse(error: OSError) -> None:
    """Fail where a folder in the folder cannot be read: what lies there would be left out silently."""
    raise FastcalError(f"cannot read folder {error.filename}: {error.strerror}; make it readable, or remove it")


def _matching(pattern: str) -> Listing:
    found: dict[str | None, list[str]] = defaultdict(list)
    for path in glob.iglob(pattern, recursive=True):
        if (kind := kind_of(path)) is not None:
            found[kind].append(path)
    if not found:
        raise FastcalError(f"no image or shard matches {pattern}; images are {', '.join(EXTENSIONS['image'])} files")
    return _of_one_kind(found, pattern, 0)


def _of_one_kind(found: Mapping[str | None, list[str]], origin: str, others: int) -> Listing:
    """The files to take samples from: all of one kind, but for arrays that lie beside images or shards."""
    kinds = [kind for kind in EXTENSIONS if kind in found]
    if len(kinds) > 1 and kinds[1] != "array":
        examples = " and ".join(f"{kind}s ({min(found[kind])})" for kind in kinds)
        raise FastcalError(f"{origin} has {examples}; say which with a pattern, like 'folder/*.tar'")
    others += sum(len(found[kind]) for kind in kinds[1:])
    if others:
        _log.info("%s: left out %d files that are not %ss", origin, others, kinds[0])
    return Listing(kinds[0], sorted(found[kinds[0]]), sorted=True)


def _expanded(pattern: str) -> Iterator[str]:
    """The paths that a pattern's ranges stand for, one by one: there may be more than there are files."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise FastcalError(f"range {match[0]} of pattern {pattern} has no numbers; give the smaller one first")
    before, after = pattern[: match.start()], pattern[match.end() :]
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{before}{number:0{len(first)}}{after}")


def _in_list_file(path: Path) -> Listing:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastcalError(f"cannot read list file {path}: {error}; it needs one image path a line") from error
    return _existing([str(path.parent / line) for line in lines if line.strip()], f"list file {path}")


def _existing(paths: Iterable[str], origin: str) -> Listing:
    found = []
    kinds: dict[str, str] = {}
    for number, path in enumerate(paths, start=1):
        if not os.path.isfile(path):
            raise FastcalError(f"{origin}, entry {number}: no such file: {path}; correct or remove it")
        kinds.setdefault(kind_of(path) or "image", path)
        found.append(path)
    if not found:
        raise FastcalError(f"{origin} is empty; it needs at least one path")
    if len(kinds) > 1:
        examples = " and ".join(f"{kind}s ({path})" for kind, path in kinds.items())
        raise FastcalError(f"{origin} has {examples}; all must be of one kind")
    return Listing(next(iter(kinds)), found)
