"""Versions of the TensorRT that reads a cache, and of the packages that are installed."""

import logging
import re
import sys
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec

from fastcal.errors import FastcalError

#: The TensorRT version of a cache if TensorRT is not installed and no version is given: the last 10.x release.
DEFAULT_TENSORRT_VERSION = "10.16.1"

#: The last TensorRT that has calibrators and reads caches.
LAST_MAJOR = 10

_log = logging.getLogger("fastcal")


def installed_tensorrt_version() -> str | None:
    """Return the version of the TensorRT that can be imported, as "major.minor.patch"; None if there is none."""
    try:
        import tensorrt
    except Exception:  # OSError: the bindings are installed, TensorRT's libraries are not
        return None
    version = re.match(r"\d+\.\d+\.\d+", str(tensorrt.__version__))
    return version.group() if version else None


def has_calibrators() -> bool:
    """Return whether the installed TensorRT has calibrators, as the versions before 11 have; it is not imported."""
    found = [package.split()[1] for package in installed(r"tensorrt(-cu\d+)?(-bindings)?")]
    return all(int(version.partition(".")[0]) <= LAST_MAJOR for version in found)


def check_tensorrt_version(version: str) -> str:
    """Return `version` as "major.minor.patch"; FastcalError if it reads no calibration caches (5.x to 10.x do)."""
    version_number(version)
    return ".".join([*version.split("."), "0"][:3])


def cache_version(asked: str | None) -> str:
    """Return the TensorRT version for a cache: `asked`, else the installed one if it reads caches, else the default."""
    if asked is not None:
        return check_tensorrt_version(asked)
    installed = installed_tensorrt_version()
    if installed is not None and int(installed.partition(".")[0]) <= LAST_MAJOR:
        return check_tensorrt_version(installed)
    here = "TensorRT is not installed here" if installed is None else f"TensorRT {installed} reads no caches"
    _log.info("%s: the cache is written for TensorRT %s", here, DEFAULT_TENSORRT_VERSION)
    return DEFAULT_TENSORRT_VERSION


def version_number(version: str) -> int:
    """Return NV_TENSORRT_VERSION as TensorRT's header defines it: 8600 for 8.6.0, 101601 for 10.16.1."""
    form = r"(\d{1,2})\.(\d{1,2})(?:\.(\d{1,2}))?(?:\.\w+)*"
    match = re.fullmatch(form, version) if isinstance(version, str) else None  # a float cannot tell 10.10 from 10.1
    if match is None:
        raise FastcalError(f"{version!r} is not a TensorRT version; write it like 10.16.1")
    major, minor, patch = (int(part or 0) for part in match.groups())
    if not 5 <= major <= LAST_MAJOR:
        raise FastcalError(f"TensorRT {version} takes no calibration cache; only 5.x to 10.x do")
    if major < 10 <= minor:  # the number in a header would be that of no version
        raise FastcalError(f"there is no TensorRT {version}; write the version like 8.6.1")
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def version_of_number(number: str) -> str:
    """Return "major.minor.patch" for the digits of an NV_TENSORRT_VERSION: "8.6.0" for "8600"."""
    major, rest = divmod(int(number), 10000 if len(number) == 6 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def is_installed(module: str) -> bool:
    """Return whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around the module is missing
        return False


def installed(wheels: str) -> list[str]:
    """Return the installed packages whose names match the regular expression `wheels`, each with its version."""
    found = _packages(tuple(sys.path))
    return sorted(f"{name} {found[name]}" for name in found if wheels and re.fullmatch(wheels, name))


@cache  # reading what 100 packages say of themselves takes 0.1 s
def _packages(path: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages in these folders, by name."""
    described = [package.metadata for package in distributions(path=list(path))]
    return {(each["Name"] or "").lower().replace("_", "-"): each["Version"] for each in described}
