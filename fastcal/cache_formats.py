"""The forms a calibration cache is kept in besides TensorRT's own: JSON, and the table of ONNX Runtime's provider."""

import json
import math
import struct
from typing import Any

from fastcal.cache import CalibrationCache, packed
from fastcal.errors import FastcalError, missing
from fastcal.record import Record

#: What the JSON form holds of a cache besides its scales.
_SETTINGS = ("algorithm", "tensorrt_version", "quantile", "cutoff")


def from_any(data: bytes, origin: str) -> CalibrationCache:
    """Read a cache in whichever of the forms its contents are; `origin` names them in an error.

    Raises:
        FastcalError: The contents are no calibration cache.
    """
    if data.lstrip()[:1] == b"{":
        return from_json(data, origin)
    if b"\0" in data:  # the others are text
        return from_onnxruntime(data, origin)
    return CalibrationCache.from_bytes(data, origin)


def to_json(cache: CalibrationCache) -> bytes:
    """The cache as a JSON object: algorithm, TensorRT version, scales by tensor, and what it was made from.

    Raises:
        FastcalError: A scale is no finite float32 from 0 on, or the cache can have no header.
    """
    settings = _settings(cache)
    content: dict[str, Any] = {name: value for name in _SETTINGS if (value := getattr(settings, name)) is not None}
    content["scales"] = {name: _scale(scale, f"the scale of {name!r}") for name, scale in cache.scales.items()}
    if cache.record is not None:
        content["made_from"] = dict(cache.record.entries)
    return json.dumps(content, indent=1).encode() + b"\n"


def from_json(data: bytes, origin: str) -> CalibrationCache:
    """Read what `to_json` gives; scales are rounded to float32.

    Raises:
        FastcalError: It is no such JSON.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FastcalError(f"{origin} is neither a calibration cache nor JSON: {error}") from error
    scales = content.get("scales")
    if not isinstance(scales, dict):
        raise FastcalError(f'{origin} is no calibration cache in JSON: it has no "scales", an object')
    unknown = content.keys() - {*_SETTINGS, "scales", "made_from"}
    if unknown:
        raise FastcalError(f"{origin} is no calibration cache in JSON: it has {min(unknown)!r}; a cache has not")
    try:
        cache = _settings(CalibrationCache(**{name: content[name] for name in _SETTINGS if name in content}))
    except FastcalError as error:
        raise FastcalError(f"{origin}: {error}") from error
    cache.scales = {name: _scale(value, f"{origin}, scale of {name!r}") for name, value in scales.items()}
    if "made_from" in content:
        if not isinstance(content["made_from"], dict):
            raise FastcalError(f'{origin} is no calibration cache in JSON: its "made_from" is no object')
        cache.record = Record(content["made_from"])
    return cache


def _settings(cache: CalibrationCache) -> CalibrationCache:
    """A cache of the same settings, as the header has them, and no scales.

    Raises:
        FastcalError: The cache can have no header.
    """
    return CalibrationCache.from_bytes(cache.header.encode())


def to_onnxruntime(cache: CalibrationCache) -> bytes:
    """The cache as the table that ONNX Runtime's TensorRT provider reads.

    It is the one named by `trt_int8_calibration_table_name` while `trt_int8_use_native_calibration_table` is off: a
    FlatBuffers table from tensor to amax as text, the schema being `onnxruntime.quantization.CalTableFlatBuffers`.
    amax is 127 scales, written to the last bit. The algorithm, the TensorRT version and the record are not in it.

    With `trt_int8_use_native_calibration_table` the provider reads TensorRT's own form instead, as it is: any header
    with a TensorRT version, so none of "percentile", and a tensor's name up to its first colon (`ReadDynamicRange` in
    the provider's source).

    Raises:
        FastcalError: A scale is no finite float32 from 0 on, or ONNX Runtime is not installed.
    """
    flatbuffers, key_value, table = _schema()
    builder = flatbuffers.Builder(1024)
    entries = []
    for name, scale in cache.scales.items():
        amax = _scale(scale, f"the scale of {name!r}") * 127  # exact: the product of a float32 and 127 fits a float64
        key = builder.CreateString(name.encode(errors="surrogateescape"))
        value = builder.CreateString(repr(amax))
        key_value.Start(builder)
        key_value.AddKey(builder, key)
        key_value.AddValue(builder, value)
        entries.append(key_value.End(builder))
    table.StartDictVector(builder, len(entries))
    for entry in reversed(entries):  # vectors are built from their end
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    table.Start(builder)
    table.AddDict(builder, vector)
    builder.Finish(table.End(builder))
    return bytes(builder.Output())


def from_onnxruntime(data: bytes, origin: str) -> CalibrationCache:
    """Read ONNX Runtime's table: that of `to_onnxruntime`, or of `onnxruntime.quantization.write_calibration_table`.

    A scale is amax / 127. The table does not say which algorithm picked it; the cache is entropy2's, whose header most
    builders ask for.

    Raises:
        FastcalError: It is no such table, or ONNX Runtime is not installed.
    """
    _, _, table = _schema()
    cache = CalibrationCache()
    try:
        root = table.TrtTable.GetRootAs(data, 0)
        for index in range(root.DictLength()):
            entry = root.Dict(index)
            name, value = entry.Key().decode(errors="surrogateescape"), float(entry.Value())
            cache.scales[name] = _scale(value / 127, f"{origin}, scale of {name!r}")
    except (AttributeError, IndexError, TypeError, ValueError, struct.error) as error:  # what its reader runs into
        raise FastcalError(f"{origin} is neither a calibration cache nor ONNX Runtime's table of one") from error
    if not cache.scales:
        raise FastcalError(f"{origin} is neither a calibration cache nor ONNX Runtime's table of one: it has no tensor")
    return cache


def _schema() -> tuple[Any, Any, Any]:
    """FlatBuffers, and the schema's two classes."""
    try:
        import flatbuffers
        from onnxruntime.quantization.CalTableFlatBuffers import KeyValue, TrtTable
    except ModuleNotFoundError as error:
        raise missing("ONNX Runtime's calibration table", error) from error
    return flatbuffers, KeyValue, TrtTable


def _scale(value: Any, label: str) -> float:
    """A scale as the float32 it stands for."""
    scale: float = struct.unpack(">f", packed(value, ">f", label))[0]
    if not 0 <= float(value) < math.inf:
        raise FastcalError(f"{label} is {float(value):g}; it must be a finite number from 0 on")
    return scale
