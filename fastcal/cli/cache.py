"""`fastcal cache`: show, compare, convert, check and extract calibration caches."""

import math
import os
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

import fastcal
from fastcal.cli.extract import extract
from fastcal.cli.options import FeedOptions, with_options
from fastcal.cli.terminal import NOT_OK, finish, print_rows, print_table, say, terminal
from fastcal.errors import FastcalError
from fastcal.versions import check_tensorrt_version

app = typer.Typer(
    help="Show, compare, convert and check calibration caches, and extract them from models.", no_args_is_help=True
)

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", help="The calibration cache, in any form.")]


def show(*, cache: CacheArgument) -> None:
    """Show a cache: the scale and amax of each tensor, the header, and the record of what the cache was made from."""
    with terminal():
        from fastcal.cache.record import why_no_record

        loaded = fastcal.CalibrationCache.load(cache)
        record = dict(loaded.record.entries) if loaded.record else {}
        print_table(
            {"tensor": "left", "scale": "right", "amax": "right"},
            [(name, f"{scale:.6g}", f"{127 * scale:.6g}") for name, scale in loaded.scales.items()],
        )
        print_rows(header=loaded.header, tensors=str(len(loaded.scales)))
        if record:
            say("made from")
            print_rows(**{f"  {name}": str(value) for name, value in record.items()})
        else:
            say(f"made from  not known: {why_no_record(cache)}")
        scales = {name: _number(scale) for name, scale in loaded.scales.items()}
        finish(header=loaded.header, algorithm=loaded.algorithm.name, scales=scales, made_from=record)


def diff(
    *,
    before: Annotated[str, typer.Argument(metavar="A", help="A calibration cache, in any form.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    tolerance: Annotated[
        float, typer.Option(metavar="PERCENT", help="Ignore scales that differ by this or less.")
    ] = 0.0,
) -> None:
    """Show the tensors whose scales differ between two caches, the largest move first. Exit status 1 if any differ."""
    with terminal():
        first, second = fastcal.CalibrationCache.load(before), fastcal.CalibrationCache.load(after)
        found = fastcal.diff_caches(first, second, tolerance=tolerance)
        rows = [(name, f"{a:.6g}", f"{b:.6g}", _factor(a, b)) for name, (a, b) in found.moved.items()]
        rows += [(name, f"{first.scales[name]:.6g}", "none", "") for name in found.removed]
        rows += [(name, "none", f"{second.scales[name]:.6g}", "") for name in found.added]
        if rows:
            print_table({"tensor": "left", "A": "right", "B": "right", "factor": "right"}, rows)
        if first.header != second.header:
            say(f"headers: {first.header} and {second.header}")
        say(_verdict(found, tolerance))
        finish(
            differ=bool(found), headers=[first.header, second.header],
            moved={name: [_number(scale) for scale in pair] for name, pair in found.moved.items()},
            removed=found.removed, added=found.added,
        )  # fmt: skip
    if found:
        raise typer.Exit(NOT_OK)


def convert(
    *,
    cache: CacheArgument,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The file; .json writes JSON.")],
    tensorrt: Annotated[
        str | None, typer.Option(help="The TensorRT version that will read the cache.", show_default="unchanged")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(help="The algorithm in the header: entropy2, entropy, minmax.", show_default="unchanged"),
    ] = None,
) -> None:
    """Write a cache in another form or with another header. The scales do not change."""
    with terminal():
        from fastcal.cache.record import check_is_no_record, record_path

        loaded = fastcal.CalibrationCache.load(cache)
        check_is_no_record(output, cache)
        form = "json" if output.endswith(".json") else "tensorrt"
        if form == "tensorrt" and os.path.realpath(record_path(output)) == os.path.realpath(cache):
            raise FastcalError(f"{cache} would become the record of {output}; name another file")
        converted = _with_header(loaded, cache, tensorrt, algorithm)
        converted.save(output, form=form)
        print_rows(
            tensors=str(len(converted.scales)), cache=output + (f", {converted.header}" if form == "tensorrt" else "")
        )
        finish(cache=output, form=form, header=converted.header, tensors=len(converted.scales))


@dataclass
class CheckOptions(FeedOptions):
    """Options of `cache check`: the model, and perhaps the images with the options that `calibrate` was given."""

    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="The images to compare, with the options that calibrate was given.", show_default=False
        ),
    ] = ""


def check(*, cache: CacheArgument, options: CheckOptions) -> None:
    """Check a cache: missing and unknown tensors, invalid scales, stale entries. Exit status 1 if there are any.

    A cache is stale if its record names another model or, if DATA is given, other images or other preprocessing.
    """
    with terminal():
        from fastcal.cache.record import why_no_record
        from fastcal.model import Model

        network = Model(options.model)
        loaded = fastcal.CalibrationCache.load(cache)
        found = fastcal.check_cache(loaded, network, options.feed(network) if options.data else None)
        kinds = ("missing", "unknown", "invalid", "stale")
        faults = {kind: getattr(found, kind) for kind in kinds}
        for kind, entries in faults.items():
            for entry in entries:
                say(f"{kind:<11}{entry}")
        if not found.recorded:
            say(f"{'note':<11}it is not known what {cache} was made from: {why_no_record(cache)}")
        counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in faults.items())
        say(f"{'not in order' if found else 'in order'}: {counts}")
        finish(ok=not found, **faults, recorded=found.recorded)
    if found:
        raise typer.Exit(NOT_OK)


def _number(scale: float) -> float | None:
    """Return a scale for JSON: None if it is NaN or infinite."""
    return scale if math.isfinite(scale) else None


def _factor(before: float, after: float) -> str:
    return f"{after / before:.6g}" if before else "from 0"


def _verdict(found: "fastcal.CacheDiff", tolerance: float) -> str:
    beyond = f" by more than {tolerance:g} %" if tolerance else ""
    if not found:
        return f"equal: none of {found.compared} scales moved{beyond}"
    parts = []
    if found.moved:
        name, (before, after) = next(iter(found.moved.items()))
        parts.append(
            f"{len(found.moved)} of {found.compared} scales moved{beyond}, most: {name}, {_factor(before, after)}"
        )
    parts += [f"{len(names)} only in {where}" for names, where in ((found.removed, "A"), (found.added, "B")) if names]
    return "different: " + "; ".join(parts)


def _with_header(
    cache: "fastcal.CalibrationCache", path: str, tensorrt: str | None, algorithm: str | None
) -> "fastcal.CalibrationCache":
    """Return the cache with another header."""
    from fastcal.algorithm import VERSIONED, Algorithm

    changes: dict[str, Any] = {}
    if algorithm is not None:
        if algorithm not in VERSIONED:
            raise FastcalError(f"there is no header for algorithm {algorithm!r}; choose one of {', '.join(VERSIONED)}")
        changes["algorithm"] = Algorithm(algorithm)
        if cache.tensorrt_version is None and tensorrt is None:
            raise FastcalError(f"the header of {path} names no TensorRT version; name the one that will read it with "
                               "--tensorrt")  # fmt: skip
    elif not cache.algorithm.has_version and tensorrt is not None:
        raise FastcalError(f"{path} is of Legacy calibration, whose header has no version; leave out --tensorrt, or "
                           "choose another header with --algorithm")  # fmt: skip
    if tensorrt is not None:
        changes["tensorrt_version"] = check_tensorrt_version(tensorrt)
    return replace(cache, **changes)


for _command, _example in (
    (show, "fastcal cache show model.cache"),
    (diff, "fastcal cache diff old.cache new.cache --tolerance 1"),
    (convert, "fastcal cache convert model.cache -o model.8.6.cache --tensorrt 8.6.1"),
    (check, "fastcal cache check model.cache model.onnx images/"),
    (extract, "fastcal cache extract model.qdq.onnx -o model.cache --model model.onnx"),
):
    app.command(epilog=f"Example: {_example}")(with_options(_command))
