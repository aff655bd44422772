"""Writing a file so that a reader sees either the old one or the whole new one."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastcal import interrupt
from fastcal.errors import FastcalError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder, fsync and rename.

    A symbolic link at `path` stays one: the file it points to is replaced. On any failure the old file is as it was
    and no temporary file is left.

    Raises:
        FastcalError: The file cannot be written (no such folder, no permission, disk full).
    """
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write several files as `write_atomically` does: none is replaced before all are there.

    Args:
        files: Their contents by path, in the order in which they are replaced.

    Raises:
        FastcalError: One of them cannot be written.
    """
    with ExitStack() as stack:
        written = {path: stack.enter_context(_written_beside(path, data)) for path, data in files.items()}
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
    """Find out now whether `size` bytes can be written to `path` later, by writing that many beside it for a moment.

    Raises:
        FastcalError: `path` is a folder, or its folder is missing, write-protected or full.
    """
    with _written_beside(path, b"\0" * size):
        pass


@contextmanager
def _written_beside(path: str | os.PathLike[str], data: bytes) -> Iterator[tuple[Path, Path]]:
    """A durable temporary file that holds `data`, gone at the end, and the file that it is to replace."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise FastcalError(f"cannot write {path}: it is a folder; name a file")
        if target.exists() and not target.is_file():
            raise FastcalError(f"cannot write {path}: it is no regular file; name another")
        if not target.parent.is_dir():
            raise FastcalError(f"cannot write {path}: there is no folder {target.parent}; make it or choose another")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")  # nobody else's
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FastcalError(f"cannot write {path}: {error.strerror}; make room or choose another place") from error
