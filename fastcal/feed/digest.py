"""The identity of samples, added to a hash of `hashlib`: their files, or the values of arrays."""

import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcal.errors import DataError
from fastcal.feed.dataset import common_folder


def add_files(digest: Any, paths: Sequence[str], *, lenient: bool = False) -> None:
    """Add the paths of files below their common folder, in order, and the size and time of each file.

    If `lenient`, files may be missing or unreadable, and the hash includes which are. A pipe, for instance, may be none
    of the files: it cannot be read twice.
    """
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
        digest.update(b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns))
        if lenient:
            digest.update(b"%d\0" % os.access(path, os.R_OK))


def add_array(digest: Any, name: str, array: Any) -> None:
    """Add the name, type, shape and values of a NumPy array."""
    digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
