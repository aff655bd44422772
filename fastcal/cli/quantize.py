"""`fastcal quantize`: a model with Q/DQ layers from a cache or images."""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fastcal
from fastcal.cli.calibrate import calibrate_on, check_report, save_report
from fastcal.cli.options import (
    BackendOption,
    HistogramsOption,
    MemoryOption,
    ReportOption,
    TuningOptions,
    UntilStableOption,
    check_outputs,
    read_memory,
)
from fastcal.cli.scales import ScalesOptions, is_measured
from fastcal.cli.summary import outcome, print_summary, run_rows, tuning_rows
from fastcal.cli.terminal import finish, print_rows, terminal
from fastcal.cli.tune import tune_on, tuning_outcome
from fastcal.errors import FastcalError
from fastcal.files import MOST_IN_A_FILE, check_writable, write_atomically, write_together
from fastcal.versions import DEFAULT_TENSORRT_VERSION, check_tensorrt_version

if TYPE_CHECKING:
    import onnx

    from fastcal.half import HalfType
    from fastcal.model import Model


@dataclass
class QuantizeOptions(ScalesOptions):
    """Options of `quantize`: those of a calibration; a cache may take the place of the images."""

    algorithm: Annotated[
        str,
        typer.Option(
            help="best: the scales, the few layers in float and the biases that keep most on held-out images. Or the "
            "scales of entropy2, entropy, minmax, percentile or mse, and all layers in INT8."
        ),
    ] = "best"
    backend: BackendOption = "auto"
    memory: MemoryOption = None
    until_stable: UntilStableOption = None
    histograms: HistogramsOption = None
    report: ReportOption = None
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The calibration cache: reused if it is up to date, else written."),
    ] = None


@dataclass
class FormOptions:
    """Options of the form of the model that is written: arguments of `fastcal.quantize`."""

    int8_weights: Annotated[
        bool,
        typer.Option(
            "--int8-weights", help="Store the weights as INT8, a quarter of their size, with a DequantizeLinear alone."
        ),
    ] = False
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Run the layers between the pairs in FP16, as TensorRT 11 wants to be told.")
    ] = False
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the layers between the pairs in BF16.")] = False

    def half(self, network: "Model") -> "HalfType | None":
        """Return the type of 16 bits that was asked for, or that the network has; None for FP32."""
        from fastcal.qdq import half_type

        return half_type(self.fp16, self.bf16, network)

    def stored(self, network: "Model") -> str:
        """Return the type of the weights, as text."""
        if self.int8_weights:
            return "INT8"
        if half := self.half(network):
            return f"{half.label}; --int8-weights stores INT8"
        return "float32, since TensorRT rounds them itself; --int8-weights stores INT8"


def quantize(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="MODEL", help="The quantized model to write.")],
    options: QuantizeOptions,
    tuning_options: TuningOptions,
    form: FormOptions,
) -> None:
    """Write the model with QuantizeLinear and DequantizeLinear layers, which TensorRT 11 needs for INT8."""
    with terminal() as console:
        from fastcal.cache.record import check_cache_writable, check_is_no_record
        from fastcal.model import Model
        from fastcal.qdq import check_quantizable

        network = Model(options.model)
        half = form.half(network)
        check_quantizable(network, tuning_options.exclude or (), half)
        has_cache = options.has_cache(tuning_options.for_images())
        outputs = {
            "quantized model": output, "report": options.report, "cache": options.cache,
            "histograms": options.histograms,
        }  # fmt: skip
        size = network.path.stat().st_size + network.external.size(network.proto.graph)
        if size > MOST_IN_A_FILE:
            outputs["external data"] = f"{output}.data"
        check_outputs(network, outputs, options, "the calibration cache" if has_cache else "the data")
        for path in filter(None, outputs.values() if has_cache else ()):
            check_is_no_record(path, options.data)
        check_writable(output, size)
        check_report(options.report)
        if options.cache is not None and not os.path.exists(options.cache):  # an existing one may be reused
            check_cache_writable(options.cache, network.activations)
        writer = _Writer(network, output, tuning_options, form, half)
        if has_cache:
            made, rows = writer.write(options.data)
            print_rows(scales=options.data, **rows)
            finish(**made)
        elif is_measured(network, options, options.backend):
            _tune(console, writer, options)
        else:
            _calibrate(console, writer, options)


def _tune(console: Console, writer: "_Writer", options: QuantizeOptions) -> None:
    """Write the model with what costs its outputs least."""
    with options.feed(writer.network) as feed:
        tuning, progress = tune_on(
            console, writer.network, feed, options, writer.tuning, memory=read_memory(options.memory),
            cache=None if options.report else options.cache, until_stable=options.until_stable,
            histograms=options.histograms, all_tensors=options.report is not None or writer.half is not None,
        )  # fmt: skip
    made, rows = writer.write(tuning)
    rows |= tuning_rows(tuning)
    if options.cache is not None:
        if options.report is not None:
            tuning.cache.save(options.cache)
        rows["cache"] = made["cache"] = options.cache
    print_rows(**run_rows(tuning.cache, feed, progress), **rows, **save_report(options.report, tuning, options))
    found = outcome(tuning.cache, feed, progress) | tuning_outcome(tuning)
    finish(**made, report=options.report, **found)


def _calibrate(console: Console, writer: "_Writer", options: QuantizeOptions) -> None:
    """Write the model with the scales of an algorithm."""
    with options.feed(writer.network) as feed:
        cache, progress = _cache(console, writer.network, feed, options)
    made, rows = writer.write(cache)
    if options.cache is not None:
        rows["cache"] = made["cache"] = options.cache
    if cache.observed is None:
        print_rows(**run_rows(cache, feed, progress), tensors=str(len(cache.scales)), **rows)
        finish(**made, report=None, header=cache.header, tensors=len(cache.scales), batches=0)
        return
    print_summary(cache, feed, progress, **rows, **save_report(options.report, cache, options))
    finish(**made, report=options.report, **outcome(cache, feed, progress))


def _cache(
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
        until_stable=options.until_stable, tensorrt_version=version, histograms=options.histograms,
        cache=None if options.report else options.cache,
    )  # fmt: skip
    if options.cache is not None and options.report is not None:
        cache.save(options.cache)
    return cache, progress


@dataclass
class _Writer:
    """Writes the quantized model."""

    network: "Model"
    output: str
    tuning: TuningOptions
    form: FormOptions
    half: "HalfType | None"

    def write(self, cache: "str | fastcal.CalibrationCache | fastcal.Tuning") -> tuple[dict[str, Any], dict[str, str]]:
        """Write the model; return the summary of it as JSON entries and as rows.

        Its weights are in the same file, or in one beside it if they are too large.
        """
        from fastcal.qdq import WEIGHTED, add_pairs, count_quantized

        model = add_pairs(
            self.network, cache, self.tuning.exclude or (), depthwise=self.tuning.depthwise,
            int8_weights=self.form.int8_weights, half=self.half,
        )  # fmt: skip
        quantized, layers = count_quantized(model)
        rows = {"INT8": f"{quantized} of {layers} {', '.join(WEIGHTED)}", "model": self.output}
        entries = {
            "model": self.output, "quantized": quantized, "layers": layers, "int8_weights": self.form.int8_weights,
            "other_layers": "FP32" if self.half is None else self.half.label,
        }  # fmt: skip
        size, data = self._save(model)
        if data is not None:
            entries["external_data"] = rows["weights"] = data
        return entries | {"bytes": size}, rows | {
            "size": f"{size / 1e6:.3g} MB, weights in {self.form.stored(self.network)}"
        }

    def _save(self, model: "onnx.ModelProto") -> tuple[int, str | None]:
        """Write the files; return the number of bytes, and the name of the second file if there is one."""
        external, output = self.network.external, self.output
        if external.size(model.graph) <= MOST_IN_A_FILE:
            external.load(model.graph)
            write_atomically(output, model.SerializeToString())
            return os.path.getsize(output), None
        data = f"{output}.data"
        write_together({
            data: lambda file: external.move(model.graph, os.path.basename(data), file),
            output: lambda file: file.write(model.SerializeToString()),
        })  # fmt: skip
        return os.path.getsize(output) + os.path.getsize(data), data
