"""INT8 calibration for TensorRT at the speed of the data.

`ImageFeed` decodes and prepares images ahead of the consumer. `calibrate` runs a network over the images, takes the
histograms of its activations and picks the scales that TensorRT would pick. TensorRT reads the `CalibrationCache` that
`calibrate` returns.

Every name is imported at its first use: `import fastcal` needs neither DALI nor ONNX Runtime nor a GPU. The names and
their modules are in `__init__.pyi`.

Nothing is printed: notes and warnings go to the logger "fastcal", TensorRT's messages to "fastcal.tensorrt".
"""

import logging
from typing import Any

import lazy_loader

_load, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)

#: The packages without which a name cannot be imported.
_NEEDS = {
    **dict.fromkeys(("Calibrator", "EntropyCalibrator", "EntropyCalibrator2", "FeedCalibrator"), ("tensorrt",)),
    **dict.fromkeys(("CalibratorStats", "LegacyCalibrator", "MinMaxCalibrator"), ("tensorrt",)),
    **dict.fromkeys(("compare", "tune"), ("onnxruntime", "numba")),
    **dict.fromkeys(("Channel", "Preview", "preview"), ("matplotlib",)),
    "ImageFeed": ("nvidia.dali",),
    "write_report": ("matplotlib", "jinja2"),
}

logging.getLogger("fastcal").addHandler(logging.NullHandler())  # without a handler, Python prints warnings


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, AttributeError) and name not in __all__:
            raise
        from fastcal.errors import missing

        raise missing(name, error) from error


def __dir__() -> list[str]:
    """Return the names that can be imported here: `help` reads all of them, and knows no error but AttributeError."""
    return sorted({*globals(), *(name for name in _names() if all(map(_is_installed, _NEEDS.get(name, ()))))})


def _is_installed(package: str) -> bool:
    from fastcal.versions import has_calibrators, is_installed

    return is_installed(package) and (package != "tensorrt" or has_calibrators())
