"""The exceptions that fastcal raises, and the texts and checks that several modules share."""

from collections.abc import Iterable, Sequence

#: The command that installs the packages a GPU needs.
GPU_EXTRAS = "pip install 'fastcal[cuda13]' or 'fastcal[cuda12]'"

#: The command that installs the packages that run a network on the CPU. An extra would overwrite another DALI.
_RUNTIME = "pip install onnxruntime numba"

#: The name of a package and the command that installs it, by the module that is missing without it.
_PACKAGES = {
    "jinja2": ("Jinja2", "pip install 'fastcal[report]'"),
    "matplotlib": ("Matplotlib", "pip install 'fastcal[report]'"),
    "numba": ("numba", _RUNTIME),
    "nvidia": ("NVIDIA DALI", "pip install 'fastcal[cpu]'; for a GPU 'fastcal[cuda13]' or 'fastcal[cuda12]'"),
    "onnxruntime": ("ONNX Runtime", _RUNTIME),
    "ray": ("Ray", "pip install 'fastcal[ray]'"),
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


def missing(what: str, error: ModuleNotFoundError) -> Exception:
    """Return the error to raise if `what` needs a package that is missing; `error` itself for unknown packages."""
    known = _PACKAGES.get((error.name or "").partition(".")[0])
    if known is None:
        return error
    package, command = known
    return UnavailableError(f"{what} needs {package}, which is not installed: {command}", package)


def check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise FastcalError if the setting `name` is given and its value is out of range."""
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise FastcalError(f"{name} is {value}; it must be {allowed}")


def quoted(names: Iterable[str | None]) -> str:
    """Return names in quotation marks, separated by commas."""
    return ", ".join(map(repr, names))


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """Return the first texts, separated by commas, and the number of the others."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
