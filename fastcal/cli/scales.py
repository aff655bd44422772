"""The options of commands that take a calibration cache or a tuning in place of images."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastcal.cli.options import CalibrationOptions
from fastcal.errors import CacheError, FastcalError

if TYPE_CHECKING:
    from fastcal.model import Model


@dataclass
class ScalesOptions(CalibrationOptions):
    """Options of a calibration; a calibration cache or a tuning may take the place of the images."""

    data: Annotated[
        str,
        typer.Argument(
            metavar="CACHE|DATA", help="A calibration cache, or what tune wrote, or images as calibrate takes them."
        ),
    ]

    def has_cache(self, other: str | None = None) -> bool:
        """Return whether the second argument is a calibration cache or a tuning, after checking the other options.

        `other` is a further option for images that was given.
        """
        from fastcal.cache.cache import CalibrationCache
        from fastcal.feed.signatures import CACHE, TEXT, identify

        path = Path(self.data)
        if self.data.endswith(".cache") and not path.exists():
            raise CacheError(f"no such file: {self.data}; name a calibration cache, or images")
        kind = identify(path) if path.is_file() else ""
        if kind not in (TEXT, CACHE):  # a shard may be too large to read
            return False
        content = path.read_bytes()
        try:
            CalibrationCache.from_any(content, self.data)
        except FastcalError:
            if kind == CACHE or (content.startswith(b"{") and b'"images"' not in content):  # COCO's JSON
                raise
            return False
        option = self.first_given(field.name for field in fields(self)[2:]) or other
        if option is not None:
            raise FastcalError(f"{self.data} is a calibration cache, and {option} is for images; leave one of them out")
        return True


def is_measured(network: "Model", options: ScalesOptions, backend: str = "auto") -> bool:
    """Return True if INT8 is to be measured; if that was asked for and ONNX Runtime cannot, say so."""
    from fastcal.observe.backends import unknown_to_onnxruntime

    if options.algorithm != "best":
        return False
    foreign = unknown_to_onnxruntime(network)
    if backend != "tensorrt" and not foreign:
        return True
    reason = f"it does not know {', '.join(foreign)}" if foreign else "TensorRT is to run the network"
    logging.getLogger("fastcal").info("ONNX Runtime cannot measure INT8, since %s: scales by entropy2", reason)
    options.algorithm = "entropy2"
    return False
