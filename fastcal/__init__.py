"""INT8 calibration for TensorRT at the speed of the data.

`ImageFeed` decodes and prepares images ahead of whoever consumes them; `calibrate` runs a network over them, takes the
histograms of its activations and picks the scales TensorRT would pick; the `CalibrationCache` it returns is read by
TensorRT as its own.

Everything is imported when it is first used: `import fastcal` needs neither DALI nor ONNX Runtime nor a GPU.

Nothing is printed: what is worth knowing goes to the logger "fastcal", and what TensorRT says to "fastcal.tensorrt".
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcal.build import build_engine
    from fastcal.cache.cache import CalibrationCache
    from fastcal.cache.check import CacheCheck, check_cache
    from fastcal.cache.diff import CacheDiff, diff_caches
    from fastcal.calibration import calibrate
    from fastcal.calibrators import (
        Calibrator,
        EntropyCalibrator,
        EntropyCalibrator2,
        LegacyCalibrator,
        MinMaxCalibrator,
    )
    from fastcal.errors import FastcalError
    from fastcal.feed.arrays import ArrayFeed
    from fastcal.feed.feed import Feed
    from fastcal.feed.images import ImageFeed
    from fastcal.feed.numpy_files import NumpyFeed
    from fastcal.feed.preprocess import Preprocess
    from fastcal.progress import Progress
    from fastcal.qdq import quantize
    from fastcal.report.comparison import compare
    from fastcal.report.contact_sheet import Preview, preview
    from fastcal.report.quality import Comparison
    from fastcal.report.report import write_report

__all__ = [
    "ArrayFeed",
    "CacheCheck",
    "CacheDiff",
    "CalibrationCache",
    "Calibrator",
    "Comparison",
    "EntropyCalibrator",
    "EntropyCalibrator2",
    "FastcalError",
    "Feed",
    "ImageFeed",
    "LegacyCalibrator",
    "MinMaxCalibrator",
    "NumpyFeed",
    "Preprocess",
    "Preview",
    "Progress",
    "build_engine",
    "calibrate",
    "check_cache",
    "compare",
    "diff_caches",
    "preview",
    "quantize",
    "write_report",
]

logging.getLogger("fastcal").addHandler(logging.NullHandler())  # else Python prints warnings that nobody handles

_MODULES = {
    "ArrayFeed": "fastcal.feed.arrays",
    "CacheCheck": "fastcal.cache.check",
    "CacheDiff": "fastcal.cache.diff",
    "CalibrationCache": "fastcal.cache.cache",
    "Calibrator": "fastcal.calibrators",
    "Comparison": "fastcal.report.quality",
    "EntropyCalibrator": "fastcal.calibrators",
    "EntropyCalibrator2": "fastcal.calibrators",
    "FastcalError": "fastcal.errors",
    "Feed": "fastcal.feed.feed",
    "ImageFeed": "fastcal.feed.images",
    "LegacyCalibrator": "fastcal.calibrators",
    "MinMaxCalibrator": "fastcal.calibrators",
    "NumpyFeed": "fastcal.feed.numpy_files",
    "Preprocess": "fastcal.feed.preprocess",
    "Preview": "fastcal.report.contact_sheet",
    "Progress": "fastcal.progress",
    "build_engine": "fastcal.build",
    "calibrate": "fastcal.calibration",
    "check_cache": "fastcal.cache.check",
    "compare": "fastcal.report.comparison",
    "diff_caches": "fastcal.cache.diff",
    "preview": "fastcal.report.contact_sheet",
    "quantize": "fastcal.qdq",
    "write_report": "fastcal.report.report",
}


if not TYPE_CHECKING:  # or else a type checker would take any name for one of fastcal's

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'fastcal' has no attribute {name!r}")
        try:
            return getattr(import_module(_MODULES[name]), name)
        except ModuleNotFoundError as error:
            from fastcal.errors import missing

            raise missing(name, error) from error


def __dir__() -> list[str]:
    """What can be had here: `help` and completion ask for all of it, and know no error but AttributeError."""
    return sorted({*globals(), *filter(_is_there, __all__)})


def _is_there(name: str) -> bool:
    from fastcal.errors import FastcalError

    try:
        getattr(import_module(_MODULES[name]), name)
    except (FastcalError, ImportError):
        return False
    return True
