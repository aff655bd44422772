"""TensorRT's calibration cache: a header line, then `name: scale` for every tensor."""

import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcal.errors import FastcalError
from fastcal.files import write_atomically

if TYPE_CHECKING:
    from fastcal.observe.observations import Observations
    from fastcal.record import Record

#: The TensorRT version a cache is written for where none is installed and none is asked for: the last 10.x release.
DEFAULT_TENSORRT_VERSION = "10.16.1"

#: How the header of a cache names each algorithm that TensorRT numbers by its version.
CALIBRATION_NAMES = {
    "entropy2": "EntropyCalibration2",
    "entropy": "EntropyCalibration",
    "minmax": "MinMaxCalibration",
}

#: The algorithms `fastcal.calibrate` knows. "percentile" is TensorRT's Legacy calibration with regression cutoff 1.
ALGORITHMS = (*CALIBRATION_NAMES, "percentile")

#: How `CalibrationCache.save` can write a cache.
FORMS = ("tensorrt", "json", "onnxruntime")


@dataclass
class CalibrationCache:
    """The scales of a network's tensors, as TensorRT reads and writes them.

    Attributes:
        scales: Tensor name to scale, in the order of the file. A scale is the real value of one INT8 step, so a tensor
            is clipped at 127 scales; every scale is exactly a float32. A tensor that is always 0 has scale 0.
        algorithm: "entropy2", "entropy", "minmax" or "percentile".
        tensorrt_version: "major.minor.patch" in the header. TensorRT 8.6.0 takes a cache of 8.6.1 and calibrates again
            when handed one of 10.16. Legacy calibration ("percentile") writes no version: None.
        quantile: For "percentile", the share of values that is not clipped.
        cutoff: For "percentile", Legacy calibration's regression cutoff.
        record: What the cache was made from, where that is known.
        observed: What the calibration saw, its histograms for instance, if this is its result; not written to the file.
    """

    scales: dict[str, float] = field(default_factory=dict)
    algorithm: str = "entropy2"
    tensorrt_version: str | None = DEFAULT_TENSORRT_VERSION
    quantile: float | None = None
    cutoff: float | None = None
    record: "Record | None" = field(default=None, compare=False)
    observed: "Observations | None" = field(default=None, compare=False, repr=False)

    @property
    def header(self) -> str:
        """The first line of the file, without its line end.

        Raises:
            FastcalError: There is no such algorithm or version of TensorRT, or none is given; or the quantile or the
                cutoff is not a number that a float64 holds.
        """
        if self.algorithm not in ALGORITHMS:
            raise FastcalError(
                f"there is no algorithm {self.algorithm!r} of a cache; choose one of {', '.join(ALGORITHMS)}"
            )
        if self.algorithm == "percentile":
            if self.quantile is None or self.cutoff is None:
                raise FastcalError("a cache of algorithm percentile needs its quantile and its cutoff, two numbers")
            return f"0 {_hex(self.cutoff, '>d', 'the cutoff')} {_hex(self.quantile, '>d', 'the quantile')}"
        if self.tensorrt_version is None:
            raise FastcalError(f"a cache of algorithm {self.algorithm} needs a TensorRT version, e.g. 10.16.1")
        return f"TRT-{_version_number(self.tensorrt_version)}-{CALIBRATION_NAMES[self.algorithm]}"

    def to_bytes(self) -> bytes:
        """The file's contents.

        Raises:
            FastcalError: A tensor's name has a line end in it, which TensorRT's form cannot hold; its scale is
                not a number that a float32 holds; or the cache can have no header.
        """
        for name in self.scales:
            if "\n" in name:
                raise FastcalError(f"tensor {name!r} has a line end in its name: rename it, or save the cache as JSON")
        scales = (f"{name}: {_hex(scale, '>f', f'the scale of {name!r}')}" for name, scale in self.scales.items())
        lines = [self.header, *scales]
        return ("\n".join(lines) + "\n").encode(errors="surrogateescape")

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = "calibration cache") -> "CalibrationCache":
        """Read `data`, a file's contents in TensorRT's own form; `origin` names them in an error.

        Raises:
            FastcalError: The text is not a calibration cache.
        """
        header, *lines = data.decode(errors="surrogateescape").split("\n")
        cache = cls._from_header(header, origin)
        for number, line in enumerate(lines, start=2):
            if line.strip():
                name, separator, digits = line.rpartition(": ")
                if not separator or not re.fullmatch(r"[0-9a-fA-F]{1,8}\s*", digits):
                    raise FastcalError(f"{origin}, line {number}: {line[:80]!r} is not 'tensor name: hex scale'")
                cache.scales[name] = _unhex(digits, ">f")
        return cache

    @classmethod
    def _from_header(cls, line: str, origin: str) -> "CalibrationCache":
        """A cache without scales."""
        match = re.fullmatch(r"TRT-(\d{4,6})-(\w+)\s*", line)
        for algorithm, name in CALIBRATION_NAMES.items():
            if match and match[2] == name:
                major, rest = divmod(int(match[1]), 10000 if len(match[1]) == 6 else 1000)
                return cls({}, algorithm, f"{major}.{rest // 100}.{rest % 100}")
        match = re.fullmatch(r"0 ([0-9a-f]{1,16}) ([0-9a-f]{1,16})\s*", line)
        if match:
            cutoff, quantile = (_unhex(digits, ">d") for digits in match.groups())
            return cls({}, "percentile", None, quantile, cutoff)
        raise FastcalError(f"{origin} is not a TensorRT calibration cache: its first line is {line[:80]!r}")

    def save(self, path: str | os.PathLike[str], *, form: str = "tensorrt") -> None:
        """Write the cache to `path`, whole or not at all.

        Args:
            path: The file.
            form: "tensorrt": TensorRT's own, with the record of what it was made from in `path`.json; "json": one
                object with everything that is known of the cache; "onnxruntime": the table that ONNX Runtime's TensorRT
                provider reads, which has the scales alone, as amax.

        Raises:
            FastcalError: There is no such form, or it cannot hold the scales, or the file cannot be written, or there
                is no such algorithm or version of TensorRT; an older file is then as it was.
        """
        from fastcal import cache_formats

        if form not in FORMS:
            raise FastcalError(f"there is no form {form!r} of a cache; choose one of {', '.join(FORMS)}")
        if form == "json":
            write_atomically(path, cache_formats.to_json(self))
        elif form == "onnxruntime":
            write_atomically(path, cache_formats.to_onnxruntime(self))
        elif self.record is None:
            write_atomically(path, self.to_bytes())
        else:
            self.record.save(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibrationCache":
        """Read the cache at `path`, in any form that `save` writes, and its record.

        Raises:
            FastcalError: There is no such file, or it is not a calibration cache.
        """
        from fastcal import cache_formats, record

        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise FastcalError(f"cannot read calibration cache {path}: {error.strerror}; check the path") from error
        cache = cache_formats.from_any(data, str(path))
        if cache.record is None:
            cache.record = record.read_record(path, data)
        return cache


def check_algorithm(algorithm: str, quantile: float) -> None:
    """Raise FastcalError unless the algorithm is known and the quantile in (0, 1]."""
    if algorithm not in ALGORITHMS:
        raise FastcalError(f"there is no algorithm {algorithm!r}; choose one of {', '.join(ALGORITHMS)}")
    if not 0 < quantile <= 1:
        raise FastcalError(f"quantile {quantile} is not in (0, 1]; 0.9999 clips one value in ten thousand")


def largest_size(names: Iterable[str]) -> int:
    """How many bytes a cache of tensors of these names has at most."""
    longest_line = len(": ffffffff\n")
    return sum(len(os.fsencode(name)) + longest_line for name in ["header" * 8, *names])


def installed_tensorrt_version() -> str | None:
    """The version of the TensorRT that Python can import here, as "major.minor.patch"; None where there is none."""
    try:
        import tensorrt
    except (ImportError, OSError):  # OSError: the bindings are there, TensorRT's libraries are not
        return None
    version = re.match(r"\d+\.\d+\.\d+", str(tensorrt.__version__))
    return version.group() if version else None


def check_tensorrt_version(version: str) -> str:
    """`version` as "major.minor.patch".

    Raises:
        FastcalError: It is not a TensorRT version that reads calibration caches (8.x to 10.x).
    """
    _version_number(version)
    return ".".join([*version.split("."), "0"][:3])


def _version_number(version: str) -> int:
    """TensorRT's NV_TENSORRT_VERSION: 8.6.0 is 8600; from 10.0 on there are two digits more: 10.3.0 is 100300."""
    form = r"(\d{1,2})\.(\d{1,2})(?:\.(\d{1,2}))?(?:\.\w+)*"
    match = re.fullmatch(form, version) if isinstance(version, str) else None  # a number would be 10.1 for 10.10
    if match is None:
        raise FastcalError(f"{version!r} is not a TensorRT version; write it like 10.16.1")
    major, minor, patch = (int(part or 0) for part in match.groups())
    if not 8 <= major <= 10:
        raise FastcalError(f"TensorRT {version} takes no calibration cache; only 8.x to 10.x do")
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def packed(value: Any, form: str, label: str) -> bytes:
    """A number of any library's in a form of `struct`'s, ">f" or ">d".

    Raises:
        FastcalError: It is none, or too large for the form; `label` names it.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise FastcalError(f"{label} is {value!r}; it must be a number")
    try:
        return struct.pack(form, float(value))
    except OverflowError as error:
        raise FastcalError(f"{label} is too large for a float{8 * struct.calcsize(form)}") from error
    except (TypeError, ValueError) as error:  # an array of several, say
        raise FastcalError(f"{label} is {value!r}; it must be a number") from error


def _hex(value: float, form: str, label: str) -> str:
    return packed(value, form, label).hex().lstrip("0") or "0"


def _unhex(digits: str, form: str) -> float:
    value: float = struct.unpack(form, bytes.fromhex(digits.strip().zfill(2 * struct.calcsize(form))))[0]
    return value
