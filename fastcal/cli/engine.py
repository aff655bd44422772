"""The outcome of a build, an engine's layers and its speed, as rows and as JSON entries."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastcal.errors import first_few

if TYPE_CHECKING:
    from fastcal.engine.contents import Contents
    from fastcal.engine.speed import Speed

#: An engine is not faster if its speed is less than this many times that of FP16.
_FASTER = 1.05


def contents_rows(contents: "Contents | None") -> tuple[dict[str, str], dict[str, Any]]:
    """Return rows and entries about the layers of an engine; nothing if they are not known."""
    if contents is None:
        return {}, {}
    rows = {"layers": ", ".join(f"{count} in {kind}" for kind, count in sorted(contents.layers.items()))}
    if contents.not_int8:
        rows["float"] = first_few([f"{name} ({kind})" for name, kind in contents.not_int8.items()])
    return rows, {"layers": dict(contents.layers), "not_int8": contents.not_int8}


def speed_rows(speeds: "Mapping[str, Speed]") -> tuple[dict[str, str], dict[str, Any]]:
    """Return rows and entries about the speeds of an INT8 engine and of engines in float."""
    rows, entries = {}, {}
    for kind, speed in speeds.items():
        rows[kind] = f"{1e3 * speed.latency:.3g} ms for a batch of {speed.batch}, {speed.throughput:,.0f}/s"
        entries[kind] = {**asdict(speed), "throughput": speed.throughput}
    if speeds:
        ratio = speeds["FP16"].latency / speeds["INT8"].latency
        rows["compared"] = f"{ratio:.2g} times the speed of FP16" if ratio >= _FASTER else "not faster than FP16"
    return rows, {"speed": entries} if entries else {}
