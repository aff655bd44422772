"""The files that samples come from, their identity, and the order of the samples."""

import glob
import hashlib
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.errors import DataError, check_range, counted
from fastcal.feed import lists
from fastcal.feed.signatures import TEXT, identify

#: The extensions of the files that samples come from, by kind of file. DALI or Pillow decodes the images.
EXTENSIONS = {
    "image": (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
              ".tiff", ".webp"),
    "tar shard": (".tar",),
    "TFRecord": (".record", ".tfrec", ".tfrecord", ".tfrecords"),
    "array": (".npy",),
    "array archive": (".npz",),
}  # fmt: skip
_KINDS = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}

#: The most bytes of files that are hashed: it takes about half a second.
_MOST_HASHED = 1 << 28

#: What counts when files are compared with those of a record: `add_files` returns one of these.
BY_CONTENT, BY_SIZE = "names and contents", "names and sizes"

#: The kinds of files that an `ImageFeed` takes, and those that a `NumpyFeed` takes.
FOR_IMAGES = ("image", "tar shard", "TFRecord", "array")
FOR_ARRAYS = ("array", "array archive")

#: The names that TensorFlow's own tools give the files of a data set: train-00017-of-01024.
_TENSORFLOW_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

#: The data that an error names instead of a file of another kind.
_READ = "name images, shards, arrays, a list of their paths, Ultralytics' data.yaml or COCO's .json"

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")

#: A range of numbers as WebDataset's users write it: train-{000000..000146}.tar.
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")

#: The user's name for the files that samples come from: see `list_files`.
Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class Listing:
    """Files of one kind, in order."""

    kind: str  # a key of `EXTENSIONS`
    paths: list[str]
    sorted: bool = False  # the files were found and sorted, rather than given in an order


def list_files(data: Data, kinds: Sequence[str] = FOR_IMAGES) -> Listing:
    """Return the files of some kinds, in the order that `fastcal.ImageFeed` and `NumpyFeed` describe.

    In a folder, links are followed and hidden files left out. A pattern's range has its own order, "{0..9}.npy".
    """
    named = _name(data)
    if named.note:
        _log.info("%s", named.note)
    return _choose(named, kinds) if named.is_found else _check(named, kinds)


def are_arrays(data: Data) -> bool:
    """Return whether there are `.npy` or `.npz` files at `data`, and neither images nor shards."""
    are_found = False
    with suppress(DataError):  # raised again by whatever lists the files
        named = _name(data)
        for kind in map(named.kind_of, named.paths):
            if kind in FOR_ARRAYS:
                are_found = True
            elif kind is not None:
                return False
    return are_found


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of a file with such a name, a key of `EXTENSIONS`; None for other names."""
    kind = _KINDS.get(os.path.splitext(path)[1].lower())
    return "TFRecord" if kind is None and _TENSORFLOW_SHARD.search(os.fspath(path)) else kind


def order(
    paths: Sequence[str], *, shuffle: bool, seed: int, balance: bool, limit: int | None, spread: bool = False
) -> Sequence[int]:
    """Return the places in `paths` of the samples to take, in order: shuffled, then balanced, then limited.

    The limit takes the first places; if they are `spread`, places at equal distances.
    """
    places: Sequence[int] = shuffled(len(paths), seed).tolist() if shuffle else range(len(paths))
    if balance:
        places = _by_turns(paths, places)
    return [places[number] for number in spread_over(len(places), limit)] if spread else places[:limit]


def spread_over(count: int, limit: int | None) -> list[int]:
    """Return at most `limit` of the numbers below `count`, at equal distances."""
    taken = count if limit is None else min(count, limit)
    return [number * count // taken for number in range(taken)]


def shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the numbers below `count` in an order that the seed decides, the same on every machine."""
    check_range("seed", seed, 0, 2**32 - 1)
    # RandomState's streams are frozen by NumPy's compatibility policy, default_rng's are not.
    return np.random.RandomState(seed).permutation(count)


def _by_turns(paths: Sequence[str], places: Sequence[int]) -> list[int]:
    """Return places class by class in turn; a class is a folder in the folder that all paths have in common."""
    root = common_folder(paths)
    classes: dict[str, list[int]] = defaultdict(list)
    for place in places:
        below, _, rest = os.path.relpath(paths[place], root).partition(os.sep)
        classes[below if rest else ""].append(place)
    if len(classes) == 1:
        raise DataError(f"the images in {root} are of one class; balancing needs a folder of folders, one per class")
    turns = zip_longest(*(classes[name] for name in sorted(classes)))
    return [place for place in chain.from_iterable(turns) if place is not None]


def check_parallel(listings: Mapping[str, Sequence[str]], found: Collection[str]) -> None:
    """Raise DataError unless the lists of samples, by input, are equally long, and those found and sorted in one order.

    In one order, samples of one name (below the common folder, without the extension) have one place.
    """
    first, *others = listings
    ones = listings[first]
    for other in others:
        twos = listings[other]
        if len(ones) != len(twos):
            have = f"input {first!r} has {counted(len(ones), 'sample')}, input {other!r} has {len(twos)}"
            raise DataError(f"{have}; every sample needs both{_odd_one(ones, twos)}")
        if first not in found or other not in found:
            continue
        stems = _stems(twos)
        known = set(stems)
        for place, stem in enumerate(_stems(ones)):
            if stem != stems[place] and stem in known:
                raise DataError(
                    f"sample {place} is {ones[place]} for input {first!r} and {twos[place]} for input {other!r}, "
                    f"though the latter has a {stem!r} too; remove samples without a partner, or give lists in the "
                    "intended order"
                )


def _odd_one(ones: Sequence[str], others: Sequence[str]) -> str:
    """Return the end of an error text that names the first sample without a partner, if most samples have one."""
    by_stem = dict(zip(_stems(ones), ones, strict=True)), dict(zip(_stems(others), others, strict=True))
    alone = sorted(by_stem[0].keys() ^ by_stem[1].keys())
    if not alone or 2 * len(alone) > len(ones):
        return ""
    return f"; {by_stem[0].get(alone[0]) or by_stem[1].get(alone[0])} has no partner"


def _stems(paths: Sequence[str]) -> list[str]:
    root = common_folder(paths)
    return [os.path.splitext(os.path.relpath(path, root))[0] for path in paths]


def common_folder(paths: Iterable[str]) -> str:
    """Return the absolute path of the deepest folder that all files lie below."""
    return os.path.commonpath({os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}})


def add_files(digest: Any, paths: Sequence[str], *, lenient: bool = False) -> str:
    """Add the paths of files below their common folder, in order, and the size and the contents of each file.

    The contents count if all files together take no more than 256 MiB. Return what counts: `BY_CONTENT` or `BY_SIZE`.

    If `lenient`, files may be missing or unreadable, and the hash includes which are. A pipe, for instance, may be none
    of the files: it cannot be read twice.
    """
    sizes = _add_sizes(digest, paths, lenient)
    if sum(sizes.values()) > _MOST_HASHED:
        return BY_SIZE
    for path in sizes:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.sha256(file.read()).digest())
        except OSError as error:
            if not lenient:
                raise DataError(f"cannot read {path}: {error.strerror}; replace or remove it") from error
    return BY_CONTENT


def _add_sizes(digest: Any, paths: Sequence[str], lenient: bool) -> dict[str, int]:
    """Add paths and sizes for `add_files`; return the sizes of the files that are there, by absolute path."""
    sizes = {}
    root = common_folder(map(os.path.abspath, paths))
    for path in map(os.path.abspath, paths):
        name = os.fsencode(os.path.relpath(path, root))
        try:
            status = os.stat(path)
        except OSError as error:
            if not lenient:
                raise DataError(f"cannot read {path}: {error.strerror}; replace or remove it") from error
            digest.update(b"%s\0missing\0" % name)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no regular file; replace or remove it")
        sizes[path] = status.st_size
        digest.update(b"%s\0%d\0" % (name, status.st_size))
        if lenient:
            digest.update(b"%d\0" % os.access(path, os.R_OK))
    return sizes


@dataclass(frozen=True)
class _Named:
    """Files as the user names them."""

    origin: str  # the name, for error texts
    paths: Iterable[str]  # one by one: a range may have more than there are files
    kind: str | None = None  # of all files, by their content; by default a file's name tells
    is_found: bool = False  # in no order; else the user gave them
    is_folder: bool = False  # found in a folder, where hidden files do not count
    note: str = ""  # to be logged

    def kind_of(self, path: str) -> str | None:
        """Return the kind of one of the paths; None for files to leave out."""
        if self.is_folder and os.path.basename(path).startswith("."):
            return None
        return self.kind or kind_of(path)


def _name(data: Data) -> _Named:
    if not isinstance(data, (str, os.PathLike)):
        return _Named("the list of paths", (os.fspath(path) for path in data))
    name = os.fspath(data)
    if not name:
        raise DataError("the name of the data is empty; name a folder, a pattern, a list file or a file")
    if os.path.isdir(name):  # False for a name that is too long, unlike Path's, which raises an error
        return _Named(name, _walk(name), is_found=True, is_folder=True)
    if not os.path.exists(name):
        if _RANGE.search(name):
            return _Named(f"pattern {name}", _expand(name))
        if glob.has_magic(name):
            return _Named(f"pattern {name}", glob.iglob(name, recursive=True), is_found=True)
        raise DataError(f"no such file or folder: {name}; name a folder, a pattern, a list file or a file")
    return _name_file(name)


def _name_file(name: str) -> _Named:
    """Return what a file stands for, by its content and then by its name: itself, or the files that it lists."""
    path, kind = Path(name), kind_of(name)
    content = identify(name) if os.path.isfile(name) else TEXT  # a pipe can be read only once
    if content in EXTENSIONS:
        return _Named(name, [name], content)
    if content == "compressed" or name.lower().endswith(_COMPRESSED):
        raise DataError(f"{name} is compressed; shards are read as they are, so decompress it to a .tar file")
    if content not in ("", TEXT) or (not content and kind is None and os.path.getsize(name)):
        raise DataError(f"{name} is {content or 'of no known format'}; {_READ}")
    if kind is not None:
        return _Named(name, [name])
    if path.suffix.lower() in (".yaml", ".yml"):
        split, places = lists.read_yaml(path)
        return replace(_joined(name, map(_name, places)), note=f"{name}: the images of {split} are used")
    if path.suffix.lower() == ".json":
        return _Named(f"COCO file {name}", lists.read_coco(path))
    return _Named(f"list file {name}", lists.read_list(path, lambda text: kind_of(text) is not None))


def _joined(name: str, parts: Iterable[_Named]) -> _Named:
    """Return the files of several places as one; files of a place that is a folder or a pattern are sorted."""
    first, *others = parts
    if not others:
        return first
    listings = [_choose(part, FOR_IMAGES) if part.is_found else _check(part, FOR_IMAGES) for part in (first, *others)]
    return _Named(name, list(chain.from_iterable(listing.paths for listing in listings)))


def _walk(folder: str) -> Iterator[str]:
    """Yield the files in a folder and its folders."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_reject):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (os.path.join(parent, name) for name in files)


def _reject(error: OSError) -> None:
    """Raise DataError for a folder that cannot be read: the files in it would be left out silently."""
    raise DataError(f"cannot read folder {error.filename}: {error.strerror}; make it readable, or remove it")


def _expand(pattern: str) -> Iterator[str]:
    """Yield the paths that a pattern's ranges stand for."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"range {match[0]} of pattern {pattern} has no numbers; give the smaller one first")
    before, after = pattern[: match.start()], pattern[match.end() :]
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{before}{number:0{len(first)}}{after}")


def _choose(named: _Named, kinds: Sequence[str]) -> Listing:
    """Return the files of the first of these kinds; arrays may lie beside images or shards, other kinds may not."""
    found: dict[str | None, list[str]] = defaultdict(list)
    for path in named.paths:
        found[named.kind_of(path)].append(path)
    if not any(kind in found for kind in kinds):
        found = _by_content(found)
    wanted = [kind for kind in kinds if kind in found]
    if not wanted:
        raise DataError(f"{named.origin} {_lack(named, found, kinds)}; name a folder with {_extensions(kinds)} files")
    if len(wanted) > 1 and wanted[1] != "array":
        raise DataError(f"{named.origin} has {_examples(found, wanted)}; say which with a pattern, like 'folder/*.tar'")
    others = sum(len(paths) for kind, paths in found.items() if kind != wanted[0])
    if others:
        _log.info("%s: left out %s that are not %ss", named.origin, counted(others, "file"), wanted[0])
    return Listing(wanted[0], sorted(found[wanted[0]]), sorted=True)


def _by_content(found: Mapping[str | None, list[str]]) -> dict[str | None, list[str]]:
    """Return files by kind, those whose names tell none by their content; hidden ones are left out."""
    kinds: dict[str | None, list[str]] = defaultdict(list, {kind: paths for kind, paths in found.items() if kind})
    for path in found.get(None, ()):
        is_readable = os.path.isfile(path) and not os.path.basename(path).startswith(".")
        kinds[identify(path) or None if is_readable else None].append(path)
    return kinds


def _lack(named: _Named, found: Mapping[str | None, list[str]], kinds: Sequence[str]) -> str:
    """Return what an error says of files none of which is of the kinds that are looked for."""
    count = sum(map(len, found.values()))
    if not count:
        return "is empty" if named.is_folder else "matches nothing"
    other = next(((kind, paths[0]) for kind, paths in found.items() if kind), None)
    example = f" ({other[1]} is {_with_article(other[0])})" if other else ""
    return f"has {counted(count, 'file')}, none of them an {kinds[0]}{example}"


def _with_article(kind: str) -> str:
    """Return the name of a kind of file as a text has it."""
    return kind if kind not in EXTENSIONS else f"an {kind}" if kind[0] in "aei" else f"a {kind}"


def _check(named: _Named, kinds: Sequence[str]) -> Listing:
    """Return files that the user gave, which must exist and be of one kind; an unknown extension may be an image's."""
    found: dict[str, list[str]] = defaultdict(list)
    for number, path in enumerate(named.paths, start=1):
        if not os.path.isfile(path):
            form = " (a list has one path a line)" if number == 1 and named.origin.startswith("list") else ""
            raise DataError(f"{named.origin}, entry {number}: no such file: {path}; correct or remove it{form}")
        kind = named.kind_of(path) or identify(path) or "image"
        if kind not in kinds:
            raise DataError(
                f"{path} is {_with_article(kind)}, no {' or '.join(kinds)}; name {_extensions(kinds)} files"
            )
        found[kind].append(path)
    if not found:
        raise DataError(f"{named.origin} is empty; it needs at least one path")
    if len(found) > 1:
        raise DataError(f"{named.origin} has {_examples(found, found)}; all must be of one kind")
    ((kind, paths),) = found.items()
    return Listing(kind, paths)


def _extensions(kinds: Iterable[str]) -> str:
    return ", ".join(extension for kind in kinds for extension in EXTENSIONS[kind])


def _examples(found: Mapping[Any, Sequence[str]], kinds: Iterable[str]) -> str:
    return " and ".join(f"{kind}s ({min(found[kind])})" for kind in kinds)
