"""`fastcal cache extract`: a cache and a float model from a model with Q/DQ pairs."""

import contextlib
from dataclasses import dataclass
from typing import Annotated

import typer

import fastcal
from fastcal.cli.options import FeedOptions, TargetOption, TensorRTOption, check_outputs
from fastcal.cli.terminal import finish, print_rows, terminal
from fastcal.errors import counted, first_few
from fastcal.files import check_writable, write_atomically


@dataclass
class ExtractOptions(FeedOptions):
    """Options of `cache extract`: the model, and perhaps images."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX model with Q/DQ pairs.")]
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DATA", help="Images as calibrate takes them, to calibrate the tensors without a pair.",
            show_default="none",
        ),
    ] = ""  # fmt: skip


def extract(
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="CACHE", help="The cache to write.")],
    options: ExtractOptions,
    float_model: Annotated[
        str | None, typer.Option("--model", metavar="FILE", help="The float model to write: MODEL without the pairs.")
    ] = None,
    tensorrt: TensorRTOption = None,
    target: TargetOption = None,
) -> None:
    """Write the scales of a model with Q/DQ pairs to a cache, for TensorRT up to 10 and the DLA."""
    with terminal():
        from fastcal.cache.record import check_cache_writable
        from fastcal.model import Model

        network = Model(options.model)
        check_outputs(network, {"cache": output, "float model": float_model}, options)
        check_cache_writable(output, network.activations)
        if float_model is not None:
            check_writable(float_model, network.path.stat().st_size)
        with contextlib.nullcontext() if not options.data else options.feed(network) as feed:
            found = fastcal.extract_scales(network, feed, tensorrt_version=tensorrt, target=target)
        if float_model is not None:
            write_atomically(float_model, found.model.SerializeToString())
        found.cache.save(output)
        files = {} if float_model is None else {"model": float_model}
        rows = {}
        if found.missing:
            rows["missing"] = f"{counted(len(found.missing), 'tensor')}: {first_few(found.missing)}"
        print_rows(
            pairs=f"scales of {counted(len(found.paired), 'tensor')}", tensors=str(len(found.cache.scales)), **rows,
            **files, cache=f"{output}, {found.cache.header}",
        )  # fmt: skip
        finish(
            cache=output, **files, header=found.cache.header, tensors=len(found.cache.scales), paired=found.paired,
            missing=found.missing,
        )  # fmt: skip
