"""Atomic writing: a reader of a file sees either the old contents or all of the new ones."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastcal import interrupt
from fastcal.errors import FastcalError

#: Errors of a filesystem, or of a C library, that cannot reserve space.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

#: The bytes that are written at a time where space cannot be reserved.
_CHUNK = 2**20


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder, fsync and rename.

    If `path` is a symbolic link, the link stays and the file it points to is replaced. On any failure the old file is
    unchanged and no temporary file is left.

    Raises:
        FastcalError: The file cannot be written (no such folder, no permission, disk full).
    """
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write several files as `write_atomically` does; none is replaced before all of them are on the disk.

    Args:
        files: The contents by path, in the order in which the files are replaced.

    Raises:
        FastcalError: One of the files cannot be written.
    """
    with ExitStack() as stack:
        written = {
            path: stack.enter_context(_temporary_for(path, partial(_write, data=data))) for path, data in files.items()
        }
        for path, (temporary, target) in written.items():
            temporary.replace(target)
            interrupt.wrote(path)
        for folder in {target.parent for _, target in written.values()}:
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)  # makes the renames themselves durable
            finally:
                os.close(opened)


def check_writable(path: str | os.PathLike[str], size: int) -> None:
    """Raise FastcalError if a file of `size` bytes cannot be written to `path`.

    The space is reserved in a temporary file for a moment. `path` itself is unchanged.

    Raises:
        FastcalError: `path` is a folder, or its folder is missing, write-protected or full.
    """
    with _temporary_for(path, partial(_reserve, size=size)):
        pass


@contextmanager
def _temporary_for(path: str | os.PathLike[str], fill: Callable[[BinaryIO], None]) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary file, filled by `fill` and removed at the end, and the file that it is to replace."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise FastcalError(f"cannot write {path}: it is a folder; name a file")
        if target.exists() and not target.is_file():
            raise FastcalError(f"cannot write {path}: it is no regular file; name another")
        if not target.parent.is_dir():
            raise FastcalError(f"cannot write {path}: there is no folder {target.parent}; make it or choose another")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")  # no other process has this name
        try:
            with temporary.open("xb") as file:
                fill(file)
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FastcalError(f"cannot write {path}: {error.strerror}; make room or choose another place") from error


def _write(file: BinaryIO, data: bytes) -> None:
    """Write `data` through to the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve `size` bytes on the disk; where a filesystem cannot, write that many zeros."""
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        for start in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - start)))
        _write(file, b"")
