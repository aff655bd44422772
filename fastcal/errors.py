"""The exceptions that fastcal raises, and the texts and checks that several modules share."""

import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import PurePath

#: The command that installs CuPy.
CUPY = "pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12"

#: The command that installs a TensorRT that has calibrators.
TENSORRT = "pip install 'tensorrt<11'"

#: The command that installs the packages that run a network on the CPU. An extra would overwrite another DALI.
_RUNTIME = "pip install onnxruntime numba"

#: The command that installs the packages that draw.
_DRAWING = "pip install jinja2 matplotlib"

#: The name of a package and the command that installs it, by the module that is missing without it.
_PACKAGES = {
    "PIL": ("Pillow", "pip install pillow"),
    "jinja2": ("Jinja2", _DRAWING),
    "matplotlib": ("Matplotlib", _DRAWING),
    "numba": ("numba", _RUNTIME),
    "nvidia": ("NVIDIA DALI", "pip install nvidia-dali-cuda130, or nvidia-dali-cuda120 for a GPU with CUDA 12"),
    "onnxruntime": ("ONNX Runtime", _RUNTIME),
    "ray": ("Ray", "pip install ray"),
    "yaml": ("PyYAML", "pip install pyyaml"),
}

#: DALI aborts the process if it cannot start as many threads as it was asked for; no machine needs more than this.
MOST_THREADS = 1024


class FastcalError(Exception):
    """The base of every error that a user can correct; raised itself for settings and for files to write.

    The text is one line that names the problem and the remedy.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # the name of a tensor or a file may have line ends


class ModelError(FastcalError):
    """The ONNX model or the network is invalid, not supported, or does not fit the request."""


class DataError(FastcalError):
    """Images, arrays, batches or their preprocessing are missing, unreadable, or do not fit the network."""


class CacheError(FastcalError):
    """A calibration cache or its record is missing, damaged, or belongs to another model."""


class UnavailableError(FastcalError):
    """A package, a library or a device is missing or does not work here; `text` names it and the remedy.

    Attributes:
        package: The package that is missing, for instance "Ray"; empty if the cause is not one package.
    """

    def __init__(self, text: str, package: str = "") -> None:
        super().__init__(text)
        self.package = package


def missing(what: str, error: BaseException) -> BaseException:
    """Return the error to raise if `what` needs a package that cannot be imported, for whatever reason.

    The result is `error` itself if that did not come up in the import of another package.
    """
    module = _being_imported(error)
    if module is None:
        return error
    package, command = _PACKAGES.get(module, (module, f"pip install {module}"))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == module:
        return UnavailableError(f"{what} needs {package}, which is not installed: {command}", package)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = f"install it again ({command}), and see fastcal doctor"
    if sys.flags.optimize > 1:
        remedy = "start Python without -OO (PYTHONOPTIMIZE=2), which takes the docstrings away that some packages need"
    return UnavailableError(f"{what} needs {package}, which cannot be imported here ({reason}); {remedy}", package)


def _being_imported(error: BaseException) -> str | None:
    """Return the package of others, the first on the way, that was being imported when an error came up."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in sys.modules:
        return error.name.partition(".")[0]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package not in ("", "__main__", "fastcal"):
            return package
    if isinstance(error, SyntaxError) and error.filename:  # which no frame of the package has seen
        folders = [folder for folder in sys.path if folder and PurePath(error.filename).is_relative_to(folder)]
        return PurePath(error.filename).relative_to(max(folders, key=len)).parts[0] if folders else None
    return (error.name or "").partition(".")[0] or None if isinstance(error, ImportError) else None


def check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise FastcalError if the setting `name` is given and its value is out of range."""
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise FastcalError(f"{name} is {value}; it must be {allowed}")


def counted(count: int, what: str) -> str:
    """Return a number with the noun that it counts, given in the singular."""
    ending = "" if count == 1 else "es" if what.endswith(("ch", "s")) else "s"
    return f"{count} {what}{ending}"


def quoted(names: Iterable[str | None]) -> str:
    """Return names in quotation marks, separated by commas."""
    return ", ".join(map(repr, names))


def listed(texts: Sequence[str]) -> str:
    """Return texts as "a, b and c"."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """Return the first texts, separated by commas, and the number of the others."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def decibels_text(value: float) -> str:
    """Return a signal-to-quantization-noise ratio, in dB, as text."""
    return "exact" if value == float("inf") else f"{value:.1f} dB"
