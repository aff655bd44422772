"""`fastcal quantize`: a model with Q/DQ layers from a cache or images."""

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fastcal
from fastcal.cli.calibrate import calibrate_on, check_report, save_report
from fastcal.cli.options import (
    BackendOption,
    CalibrationOptions,
    MemoryOption,
    ReportOption,
    UntilStableOption,
    check_outputs,
    read_memory,
)
from fastcal.cli.summary import outcome, print_summary
from fastcal.cli.terminal import finish, print_rows, terminal
from fastcal.errors import CacheError, FastcalError
from fastcal.files import check_writable, write_atomically, write_together
from fastcal.versions import DEFAULT_TENSORRT_VERSION, check_tensorrt_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastcal.model import Model

#: The most bytes of a model in one file: Protocol Buffers hold less than 2 GiB.
_MOST_IN_A_FILE = 2_000_000_000


@dataclass
class QuantizeOptions(CalibrationOptions):
    """Options of `quantize`: those of a calibration; a cache may take the place of the images."""

    data: Annotated[
        str, typer.Argument(metavar="CACHE|DATA", help="A calibration cache, or images as calibrate takes them.")
    ]
    backend: BackendOption = "auto"
    memory: MemoryOption = None
    until_stable: UntilStableOption = None
    report: ReportOption = None
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The calibration cache: reused if it is up to date, else written."),
    ] = None

    def has_cache(self) -> bool:
        """Return whether the second argument is a calibration cache."""
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
        if option := self.first_given(field.name for field in fields(self)[2:]):
            raise FastcalError(f"{self.data} is a calibration cache, and {option} is for images; leave one of them out")
        return True


def quantize(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="MODEL", help="The quantized model to write.")],
    options: QuantizeOptions,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to keep in float: a layer, a type of layers, or the layers that read a tensor; with patterns "
            "like '/model.22/*'; may be repeated.",
        ),
    ] = None,
    int8_weights: Annotated[
        bool,
        typer.Option(
            "--int8-weights", help="Store the weights as INT8, a quarter of their size, with a DequantizeLinear alone."
        ),
    ] = False,
) -> None:
    """Write the model with QuantizeLinear and DequantizeLinear layers, which TensorRT 11 needs for INT8."""
    with terminal() as console:
        from fastcal.cache.record import check_cache_writable, check_is_no_record
        from fastcal.model import Model
        from fastcal.qdq import check_quantizable

        network = Model(options.model)
        excluded = exclude or ()
        check_quantizable(network, excluded)
        has_cache = options.has_cache()
        outputs = {"quantized model": output, "report": options.report, "cache": options.cache}
        size = network.path.stat().st_size + network.external.size(network.proto.graph)
        if size > _MOST_IN_A_FILE:
            outputs["external data"] = f"{output}.data"
        check_outputs(network, outputs, options, "the calibration cache" if has_cache else "the data")
        for path in filter(None, outputs.values() if has_cache else ()):
            check_is_no_record(path, options.data)
        check_writable(output, size)
        check_report(options.report)
        if options.cache is not None and not os.path.exists(options.cache):  # an existing one may be reused
            check_cache_writable(options.cache, network.activations)
        if has_cache:
            made, rows = _write_model(network, options.data, excluded, output, int8_weights)
            print_rows(scales=options.data, **rows)
            finish(**made)
        else:
            with options.feed(network) as feed:
                cache, progress = _calibrate(console, network, feed, options)
            made, rows = _write_model(network, cache, excluded, output, int8_weights)
            if options.cache is not None:
                rows["cache"] = made["cache"] = options.cache
            if cache.observed is None:
                print_rows(images="none: the cache was reused", tensors=str(len(cache.scales)), **rows)
                finish(**made, report=None, header=cache.header, tensors=len(cache.scales), batches=0)
                return
            print_summary(cache, feed, progress, **rows, **save_report(options.report, cache, options))
            finish(**made, report=options.report, **outcome(cache, feed, progress))


def _calibrate(
    console: Console, network: "Model", feed: "fastcal.Feed", options: QuantizeOptions
) -> "tuple[fastcal.CalibrationCache, fastcal.Progress]":
    """Return the cache, kept in the file that was asked for, and the last state of the progress.

    A report needs the histograms, so the network runs for it.
    """
    from fastcal.cache.cache import CalibrationCache

    # Any version will do for the model: the installed TensorRT may be one that reads no caches.
    version: str | None = DEFAULT_TENSORRT_VERSION
    if options.cache is not None:
        version = None
        with contextlib.suppress(FastcalError):
            version = check_tensorrt_version(str(CalibrationCache.load(options.cache).tensorrt_version))
    cache, progress = calibrate_on(
        console, network, feed, options, backend=options.backend, memory=read_memory(options.memory),
        until_stable=options.until_stable, tensorrt_version=version,
        cache=None if options.report else options.cache,
    )  # fmt: skip
    if options.cache is not None and options.report is not None:
        cache.save(options.cache)
    return cache, progress


def _write_model(
    network: "Model", cache: "str | fastcal.CalibrationCache", exclude: "Sequence[str]", output: str, int8_weights: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the quantized model; return the summary of it as JSON entries and as rows.

    Its weights are in the same file, or in one beside it if they are too large.
    """
    from fastcal.qdq import WEIGHTED, add_pairs, count_quantized

    model = add_pairs(network, cache, exclude, int8_weights=int8_weights)
    quantized, layers = count_quantized(model)
    rows = {"INT8": f"{quantized} of {layers} {', '.join(WEIGHTED)}", "model": output}
    entries = {"model": output, "quantized": quantized, "layers": layers, "int8_weights": int8_weights}
    if network.external.size(model.graph) <= _MOST_IN_A_FILE:
        network.external.load(model.graph)
        write_atomically(output, model.SerializeToString())
        size = os.path.getsize(output)
    else:
        data = f"{output}.data"
        write_together({
            data: lambda file: network.external.move(model.graph, os.path.basename(data), file),
            output: lambda file: file.write(model.SerializeToString()),
        })  # fmt: skip
        size = os.path.getsize(output) + os.path.getsize(data)
        entries, rows = entries | {"external_data": data}, rows | {"weights": data}
    stored = "INT8" if int8_weights else "float32, since TensorRT rounds them itself; --int8-weights stores INT8"
    return entries | {"bytes": size}, rows | {"size": f"{size / 1e6:.3g} MB, weights in {stored}"}
