"""`reuse`: whether a cache on the disk is still up to date."""

import os
from pathlib import Path

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record, read_record, why_no_record
from fastcal.errors import FastcalError


def reuse(path: str | os.PathLike[str], header: str, record: Record) -> tuple[bytes | None, str]:
    """Return the cache at `path` if a calibration would write the same one now.

    Args:
        path: The cache.
        header: The header that the calibration would write.
        record: The record that the calibration would write.

    Returns:
        The cache's contents and ""; or None and the reason why it is not reused.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return None, "there is none yet"
    except OSError as error:
        return None, f"it cannot be read ({error.strerror})"
    try:
        found = CalibrationCache.from_bytes(data, str(path))
    except FastcalError as error:
        return None, str(error)
    if found.header != header:
        return None, f"its header is {found.header}, not {header}"
    if not found.scales:
        return None, "it holds no scales"
    earlier = read_record(path, data)
    if earlier is None:
        return None, f"nothing tells what it was made from: {why_no_record(path)}"
    differences = record.differences(earlier)
    if "until_stable" in earlier.entries and "until_stable" not in record.entries:
        differences.append(f"until_stable ({earlier.entries['until_stable']} then: perhaps not all batches)")
    return (None, "it was made from other " + ", ".join(differences)) if differences else (data, "")
