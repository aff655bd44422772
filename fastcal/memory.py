"""The memory that is free, and the tensors of a batch that fit into it together."""

import ctypes
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fastcal.errors import FastcalError

#: The share of the free memory that the tensors of one pass may take; the rest is for the backend and the feed.
SHARE = 0.7

_log = logging.getLogger("fastcal")


def free_memory() -> int | None:
    """Return the bytes that the machine and this process's control groups (a container's) have free, if they tell.

    In a control group, cached files do not count as taken (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    try:
        return min([1024 * _numbers(Path("/proc/meminfo"))["MemAvailable:"], *_allowances()])
    except (OSError, KeyError):
        return None


def check_room(size: int, what: str, remedy: str) -> None:
    """Raise FastcalError if `what` (in the plural) takes more bytes than are free.

    Linux promises more memory than it has, and ends the process that uses it.
    """
    free = free_memory()
    if free is not None and size > free:
        raise FastcalError(
            f"{what} take {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; {remedy}"
        )


def return_freed() -> None:
    """Return to the system what this process has freed: glibc keeps arrays of up to 32 MiB for later ones."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def check_sizes(sizes: Mapping[str, int], memory: int, place: str) -> None:
    """Raise FastcalError if one of the tensors takes more than `memory` (bytes in `place`)."""
    for name, size in sizes.items():
        if size > memory:
            raise FastcalError(
                f"tensor {name!r} of a batch takes {size / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB of {place} may "
                "be used; use a smaller batch size"
            )


def groups(sizes: Mapping[str, int], memory: int, place: str) -> list[list[str]]:
    """Return the tensors in order, in as few groups as fit `memory` (bytes in `place`); warn if there are several."""
    check_sizes(sizes, memory, place)
    found: list[list[str]] = [[]]
    taken = 0
    for name, size in sizes.items():
        if taken + size > memory:
            found.append([])
            taken = 0
        found[-1].append(name)
        taken += size
    if len(found) > 1:
        _log.warning(
            "the tensors of a batch take %.1f GiB, %.1f GiB may be used: the network runs %d times over each batch; a "
            "smaller batch size is faster",
            sum(sizes.values()) / 2**30, memory / 2**30, len(found),
        )  # fmt: skip
    return found


def _allowances() -> Iterator[int]:
    """Yield the number of bytes that each of this process's control groups may still take, if it is limited."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "")
        elif controllers == "memory":  # version 1
            top = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / place.strip("/")
        for level in (group, *group.parents):
            yield from _allowance(level, *names)


def _allowance(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    with suppress(OSError, KeyError, ValueError):  # the group is not visible in a container, or its limit is "max"
        allowed, used = int((group / limit).read_text()), int((group / usage).read_text())
        parts = _numbers(group / "memory.stat")
        yield allowed - used + parts[f"{prefix}inactive_file"] + parts[f"{prefix}active_file"]


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers in a file of the kernel by the word before them."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}
