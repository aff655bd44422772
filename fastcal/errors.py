"""The one exception type for what a user can put right, and the one for a package that is missing."""


class FastcalError(Exception):
    """Something in the input, the settings or the environment stops the work.

    Its text is one line that names the thing and says what to do about it.
    """


# Packages that the extra "cpu" brings, by the module whose absence tells.
_PACKAGES = {"flatbuffers": "ONNX Runtime", "numba": "numba", "nvidia": "NVIDIA DALI", "onnxruntime": "ONNX Runtime"}


def missing(what: str, error: ModuleNotFoundError) -> Exception:
    """The error to raise where `what` cannot be had for want of a package; `error` itself where no extra brings it."""
    package = _PACKAGES.get((error.name or "").partition(".")[0])
    if package is None:
        return error
    return FastcalError(f"{what} needs {package}, which is not installed: pip install 'fastcal[cpu]'")
