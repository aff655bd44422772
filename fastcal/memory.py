"""How much memory there is, and which of a batch's tensors fit it together."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastcal.errors import FastcalError

#: The share of the free memory that the tensors of one pass may take; the rest is for what runs the network, and the
#: feed.
SHARE = 0.7

_log = logging.getLogger("fastcal")


def free_memory() -> int | None:
    """How many bytes this process may still take; None where Linux does not tell.

    That is what the machine has, or less where control groups (a container's, say) allow less: there, what has been
    taken counts but for files that are only cached (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    try:
        return min([1024 * _numbers(Path("/proc/meminfo"))["MemAvailable:"], *_allowances()])
    except (OSError, KeyError):
        return None


def check_room(size: int, what: str, remedy: str) -> None:
    """Find out whether so much memory is free: Linux gives more than it has, and ends the process that uses it.

    Args:
        size: How many bytes.
        what: What takes them, several things.
        remedy: What to do where there are fewer.

    Raises:
        FastcalError: There are fewer.
    """
    free = free_memory()
    if free is not None and size > free:
        raise FastcalError(
            f"{what} take {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; {remedy}"
        )


def groups(sizes: Mapping[str, int], memory: int, place: str) -> list[list[str]]:
    """The tensors in order, in as few groups as fit the memory each; a warning is logged where they are several.

    Args:
        sizes: The bytes of each tensor of a batch, by name.
        memory: How many bytes they may take together.
        place: Where that memory is.

    Raises:
        FastcalError: One of them does not fit by itself.
    """
    found: list[list[str]] = [[]]
    taken = 0
    for name, size in sizes.items():
        if size > memory:
            raise FastcalError(
                f"tensor {name!r} of a batch takes {size / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB of {place} may "
                "be used; use a smaller batch size"
            )
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
    """How many bytes each of this process's control groups may still take, where it is limited."""
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
            if level.is_relative_to(top):
                yield from _allowance(level, *names)


def _allowance(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    try:
        allowed, used = int((group / limit).read_text()), int((group / usage).read_text())
        parts = _numbers(group / "memory.stat")
        yield allowed - used + parts[f"{prefix}inactive_file"] + parts[f"{prefix}active_file"]
    except (OSError, KeyError, ValueError):  # no such group, as seen from a container, or no limit: "max"
        return


def _numbers(path: Path) -> dict[str, int]:
    """The numbers in a file of the kernel's, by what stands before them."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}
