"""`check_outputs`: no command writes over a file that it reads."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fastcal.cli.options import FeedOptions, data_by_input, is_pipe
from fastcal.errors import FastcalError

if TYPE_CHECKING:
    from fastcal.model import Model


def check_outputs(
    network: "Model | None", outputs: Mapping[str, str | None], read: FeedOptions, data: str = "the data"
) -> None:
    """Raise FastcalError if one of the `outputs`, by role, would overwrite another, or a file that is read.

    The role "cache" stands for the cache and its record; `data` is the role of the data if they are one file.
    """
    from fastcal.cache.record import record_path

    paths = {role: path for role, path in outputs.items() if path is not None}
    if "cache" in paths:
        paths["cache's record"] = str(record_path(paths["cache"])) if paths["cache"] else ""
    roles = _roles(network, list(paths.values()), read, data)
    for role, path in paths.items():
        if not path:
            raise FastcalError(f"the name of the {role} is empty; name a file")
        other = roles.setdefault(os.path.realpath(path), f"the {role}")
        if other != f"the {role}":
            raise FastcalError(f"{path} is {other}; name another file for the {role}")


def _roles(network: "Model | None", outputs: Sequence[str], read: FeedOptions, data: str) -> dict[str, str]:
    """Return the roles of the files that are read, by real path; of the samples, only those that may be outputs."""
    roles = {os.path.realpath(path): "among the data" for path in _samples_like(outputs, read.data, network)}
    if network is not None:
        roles |= {os.path.realpath(path): "the model's external data" for path in network.external_files}
        roles[os.path.realpath(network.path)] = "the model itself"
    for path, role in ((read.preprocess, "the preprocessing"), (read.data, data)):
        if os.path.isfile(path):
            roles[os.path.realpath(path)] = role
    return roles


def _samples_like(outputs: Sequence[str], data: str, network: "Model | None") -> Iterator[str]:
    """Yield the samples' files that have the name of an existing output. Errors in the data are not reported here."""
    from fastcal.feed.dataset import FOR_ARRAYS, FOR_IMAGES, kind_of, list_files

    existing = [path for path in outputs if os.path.isfile(path)]
    names = {os.path.basename(place) for path in existing for place in (path, os.path.realpath(path))}
    in_folders = any(kind_of(name) is not None for name in names)
    by_input = data_by_input(data, network)
    for place in by_input.values() if isinstance(by_input, dict) else [by_input]:
        if not existing or is_pipe(place) or (os.path.isdir(place) and not in_folders):
            continue
        for kinds in (FOR_IMAGES, FOR_ARRAYS):
            with contextlib.suppress(FastcalError):
                yield from (path for path in list_files(place, kinds).paths if os.path.basename(path) in names)
