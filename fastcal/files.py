"""Atomic writing: a reader of a file sees either the old contents or all of the new ones."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastcal import interrupt
from fastcal.errors import FastcalError

#: The most bytes of a model in one file, or in memory: Protocol Buffers hold less than 2 GiB.
MOST_IN_A_FILE = 2_000_000_000


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` through a temporary file in the same folder, fsync and rename; a symbolic link stays.

    On any failure the old file is unchanged, no temporary file is left, and FastcalError is raised.
    """
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike[str], bytes | Callable[[BinaryIO], object]]) -> None:
    """Write several files as `write_atomically` does; none is replaced before all are on the disk.

    `files` has the contents by path, or functions that write them to an open file; these are called in order.
    """
    with ExitStack() as stack:
        fillers = {path: partial(_write, content=content) for path, content in files.items()}
        written = {path: stack.enter_context(_temporary_for(path, fill)) for path, fill in fillers.items()}
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
    """Raise FastcalError if a file of `size` bytes cannot be written; a temporary file takes the space for a moment."""
    with _temporary_for(path, lambda file: os.posix_fallocate(file.fileno(), 0, max(size, 1))):
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


def _write(file: BinaryIO, content: bytes | Callable[[BinaryIO], object]) -> None:
    if isinstance(content, bytes):
        file.write(content)
    else:
        content(file)
    file.flush()
    os.fsync(file.fileno())
