"""The one exception type for what a user can put right, and what several of its texts are made of."""

from collections.abc import Iterable

#: How to get what a GPU needs.
GPU_EXTRAS = "pip install 'fastcal[cuda13]' or 'fastcal[cuda12]'"


class FastcalError(Exception):
    """Something in the input, the settings or the environment stops the work.

    Its text is one line that names the thing and says what to do about it.
    """


#: How to get what runs a network on the CPU; not by the extra, whose DALI would overwrite that of another.
_RUNTIME = "pip install onnxruntime numba"

# Packages and how to get each, by the module whose absence tells.
_PACKAGES = {
    "flatbuffers": ("ONNX Runtime", _RUNTIME),
    "jinja2": ("Jinja2", "pip install 'fastcal[report]'"),
    "matplotlib": ("Matplotlib", "pip install 'fastcal[report]'"),
    "numba": ("numba", _RUNTIME),
    "nvidia": ("NVIDIA DALI", "pip install 'fastcal[cpu]'; for a GPU 'fastcal[cuda13]' or 'fastcal[cuda12]'"),
    "onnxruntime": ("ONNX Runtime", _RUNTIME),
    "ray": ("Ray", "pip install 'fastcal[ray]'"),
}


def missing(what: str, error: ModuleNotFoundError) -> Exception:
    """The error to raise where `what` cannot be had for want of a package; `error` itself where it is not known."""
    known = _PACKAGES.get((error.name or "").partition(".")[0])
    if known is None:
        return error
    package, how = known
    return FastcalError(f"{what} needs {package}, which is not installed: {how}")


#: More threads than this process could use anywhere; DALI aborts where it cannot start so many.
MOST_THREADS = 1024


def check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise FastcalError if a setting of that name is given and out of its range."""
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise FastcalError(f"{name} is {value}; it must be {allowed}")


def quoted(names: Iterable[str | None]) -> str:
    """Names as a text lists them."""
    return ", ".join(map(repr, names))
