"""`CalibrationCache`: the scales of a network's tensors, as TensorRT reads and writes them."""

import codecs
import json
import logging
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcal.algorithm import Algorithm, fault_of_scale, from_hex, packed, to_hex
from fastcal.cache.record import Record, read_record
from fastcal.errors import CacheError, FastcalError, first_few
from fastcal.files import write_atomically
from fastcal.observe.histogram import Observations
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The forms in which `CalibrationCache.save` writes a cache.
FORMS = ("tensorrt", "json")

#: The keys of a cache's settings in JSON.
_SETTINGS = ("algorithm", "tensorrt_version", "quantile", "cutoff")

_log = logging.getLogger("fastcal")


@dataclass
class CalibrationCache:
    """The scales of a network's tensors, as TensorRT reads and writes them.

    Attributes:
        scales: Tensor name to scale, in the order of the file. A scale is the real value of one INT8 step, so a tensor
            is clipped at 127 scales; every scale is exactly a float32. A tensor that is always 0 has scale 0.
        algorithm: The algorithm that picked the scales; a name is taken too.
        tensorrt_version: "major.minor.patch" in the header. TensorRT 8.6.0 takes a cache of 8.6.1 and calibrates again
            if it is given one of 10.16. The header of Legacy calibration ("percentile") has no version: None.
        doubled: The tensors that the file gives more than one scale; `scales` has the last one.
        record: The record of what the cache was made from; None if it is not known.
        observed: The histograms and more, if the cache is a calibration's result; not written to the file.
    """

    scales: dict[str, float] = field(default_factory=dict)
    algorithm: Algorithm = field(default_factory=Algorithm)
    tensorrt_version: str | None = DEFAULT_TENSORRT_VERSION
    doubled: tuple[str, ...] = field(default=(), compare=False, kw_only=True)
    record: Record | None = field(default=None, compare=False)
    observed: Observations | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.algorithm = Algorithm.of(self.algorithm)

    @property
    def header(self) -> str:
        """The first line of the file, without its line end.

        Raises:
            FastcalError: There is no such version of TensorRT, or none is given; or the quantile or the cutoff is not a
                number that a float64 holds.
        """
        return self.algorithm.header(self.tensorrt_version)

    @property
    def faults(self) -> dict[str, str]:
        """The tensors whose scales are of no use for INT8, with the reason: "NaN", "0", "given twice"..."""
        faults = {name: fault_of_scale(scale) for name, scale in self.scales.items()}
        faults |= dict.fromkeys(self.doubled, "given twice")
        return {name: fault for name, fault in faults.items() if fault}

    def to_bytes(self) -> bytes:
        """Return the file's contents.

        Raises:
            CacheError: A tensor's name has a line end, which TensorRT's form cannot hold, or its scale is not a finite
                float32 from 0 on.
            FastcalError: As `header`.
        """
        for name in self.scales:
            if "\n" in name:
                raise CacheError(f"tensor {name!r} has a line end in its name: rename it, or save the cache as JSON")
        scales = (f"{name}: {to_hex(scale, '>f', name)}" for name, scale in self._checked().items())
        return ("\n".join([self.header, *scales]) + "\n").encode(errors="surrogateescape")

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = "calibration cache") -> "CalibrationCache":
        """Read `data` in TensorRT's own form; raise CacheError, in which `origin` names the file, if it is invalid."""
        header, *lines = _text(data).split("\n")
        pairs = []
        found = Algorithm.of_header(header)
        if found is None:
            raise CacheError(f"{origin} is not a TensorRT calibration cache: its first line is {header[:80]!r}")
        cache = cls({}, *found)
        try:
            _ = cache.header
        except FastcalError as error:
            raise CacheError(f"{origin}: {error}") from error
        for number, line in enumerate(lines, start=2):
            if line.strip():
                name, separator, digits = line.rpartition(": ")
                if not separator or not re.fullmatch(r"[0-9a-fA-F]{1,8}\s*", digits):
                    raise CacheError(f"{origin}, line {number}: {line[:80]!r} is not 'tensor name: hex scale'")
                pairs.append((name, from_hex(digits, ">f")))
        cache.scales = dict(pairs)
        cache.doubled = _doubled(pairs)
        return cache

    def _checked(self) -> dict[str, float]:
        """Return the scales as float32; raise CacheError if one is not finite or negative."""
        return {name: _float32(scale, f"the scale of {name!r}") for name, scale in self.scales.items()}

    def to_json(self) -> bytes:
        """Return the cache as a JSON object: algorithm, TensorRT version, scales by tensor, and the record's entries.

        Raises:
            CacheError: A scale is not a finite float32 from 0 on.
            FastcalError: As `header`.
        """
        read_back = Algorithm.of_header(self.header)  # the settings as the numbers of a header
        assert read_back is not None  # else there is no header
        algorithm, version = read_back
        settings = (algorithm.name, version, algorithm.quantile, algorithm.cutoff)
        content: dict[str, Any] = {
            key: value for key, value in zip(_SETTINGS, settings, strict=True) if value is not None
        }
        content["scales"] = self._checked()
        if self.record is not None:
            content["made_from"] = dict(self.record.entries)
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> "CalibrationCache":
        """Read `data`, as `to_json` returns it; raise CacheError, in which `origin` names the file, if it is invalid.

        Scales become float32.
        """
        doubled: list[str] = []

        def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            doubled.extend(_doubled(pairs))
            return dict(pairs)

        try:
            content = json.loads(data, object_pairs_hook=as_object)
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{origin} is neither a calibration cache nor JSON: {error}") from error
        scales = content.get("scales")
        if not isinstance(scales, dict):
            raise CacheError(f'{origin} is no calibration cache in JSON: it has no "scales", an object')
        unknown = content.keys() - {*_SETTINGS, "scales", "made_from", "tuning"}
        if unknown:
            raise CacheError(f"{origin} is no calibration cache in JSON: it has {min(unknown)!r}; a cache has not")
        if not isinstance(content.get("made_from", {}), dict):
            raise CacheError(f'{origin} is no calibration cache in JSON: its "made_from" is no object')
        cache = cls(record=Record(content["made_from"]) if "made_from" in content else None)
        name = content.get("algorithm", cache.algorithm.name)
        version = content.get("tensorrt_version", cache.tensorrt_version)
        try:
            if name == "percentile" and not {"quantile", "cutoff"} <= content.keys():
                raise CacheError("a cache of algorithm percentile needs its quantile and its cutoff, two numbers")
            cache.algorithm = Algorithm(name, content.get("quantile"), content.get("cutoff"))
            cache.tensorrt_version = version if cache.algorithm.has_version else None
            _ = cache.header
        except FastcalError as error:
            raise CacheError(f"{origin}: {error}") from error
        cache.scales = {name: _float32(value, f"{origin}, scale of {name!r}") for name, value in scales.items()}
        cache.doubled = tuple(name for name in doubled if name in scales)
        return cache

    @classmethod
    def from_any(cls, data: bytes, origin: str) -> "CalibrationCache":
        """Read `data`, a file in any form that `save` writes; `origin` and errors as for `from_bytes`."""
        return cls.from_json(data, origin) if _text(data).lstrip()[:1] == "{" else cls.from_bytes(data, origin)

    def save(self, path: str | os.PathLike[str], *, form: str = "tensorrt") -> None:
        """Write the cache to `path`, whole or not at all.

        Args:
            path: The file.
            form: "tensorrt": TensorRT's own form, with the record of what the cache was made from in `path`.json;
                "json": one object with the cache's settings, scales and record.

        Raises:
            CacheError: The form cannot hold the scales.
            FastcalError: There is no such form or version of TensorRT, or the file cannot be written. The older file is
                unchanged then.
        """
        if form not in FORMS:
            raise FastcalError(f"there is no form {form!r} of a cache; choose one of {', '.join(FORMS)}")
        if form == "json":
            write_atomically(path, self.to_json())
        elif self.record is None:
            write_atomically(path, self.to_bytes())
        else:
            self.record.save(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibrationCache":
        """Read the cache at `path`, in any form that `save` writes, and its record.

        Raises:
            CacheError: There is no such file, or it is not a calibration cache.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CacheError(f"cannot read calibration cache {path}: {error.strerror}; check the path") from error
        cache = cls.from_any(data, str(path))
        if cache.doubled:
            _log.warning("%s gives %s more than one scale: the last one counts here", path, first_few(cache.doubled))
        if cache.record is None:
            cache.record = read_record(path, data)
        return cache


def _text(data: bytes) -> str:
    """Return a file's text without its byte order mark: editors and shells of Windows write one, and UTF-16 too."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def _doubled(pairs: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """Return the names that come more than once."""
    counts = Counter(name for name, _ in pairs)
    return tuple(name for name, count in counts.items() if count > 1)


def _float32(value: Any, label: str) -> float:
    scale: float = struct.unpack(">f", packed(value, ">f", label))[0]
    if not 0 <= float(value) < math.inf:
        raise CacheError(f"{label} is {float(value):g}; it must be a finite number from 0 on")
    return scale
