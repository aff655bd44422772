"""The options of commands that take a calibration cache or a tuning in place of images."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from fastcal.cli.options import CalibrationOptions
from fastcal.errors import CacheError, FastcalError


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
