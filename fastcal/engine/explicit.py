"""Engines from a model with Q/DQ pairs ("explicit quantization"), the one way of TensorRT 11 and TensorRT for RTX."""

import re
from collections.abc import Sequence
from typing import Any

import onnx

from fastcal.engine.settings import BuildSettings, fill_sizes, input_shapes, make_profile
from fastcal.errors import FastcalError
from fastcal.feed.feed import Feed
from fastcal.library import is_rtx, is_strongly_typed, logger_of, parse_with, start
from fastcal.model import Model


def build_typed(
    library: Any,
    model: Model,
    proto: onnx.ModelProto | None,
    feed: Feed | None,
    settings: BuildSettings,
    *,
    flags: Sequence[str] = (),
    compute_capabilities: Sequence[str] = (),
) -> bytes:
    """Return the engine of a model that names its types itself.

    Args:
        library: The Python module of the builder.
        model: The ONNX file.
        proto: The model that was made from the file; None for the file as it is.
        feed: The batches, whose sizes dynamic inputs take; None if only the batch is dynamic.
        settings: The settings of the build.
        flags: The precisions that TensorRT before 11 may use: "INT8", "FP16" or "BF16".
        compute_capabilities: The GPUs that TensorRT for RTX builds for, like "8.9"; by default the one that is there.
    """
    batches = settings.batches(model, 1 if feed is None else feed.batch_size)
    logger = logger_of(library)
    logger.clear()
    builder = start(library, logger)
    network = parse_with(library, builder, logger, model, proto)
    config = settings.configure(library, builder)
    if not is_strongly_typed(library):
        for flag in flags:
            config.set_flag(getattr(library.BuilderFlag, flag))
    if compute_capabilities:
        _choose_gpus(library, config, compute_capabilities)
    shapes = input_shapes(network)
    if any(-1 in shape for shape in shapes.values()):
        config.add_optimization_profile(make_profile(builder, fill_sizes(shapes, feed), batches))
    return settings.build(builder, network, config, logger, model)


def check_compute_capabilities(library: Any, names: Sequence[str]) -> None:
    """Raise FastcalError if the builder cannot build for these compute capabilities."""
    if isinstance(names, str):
        raise FastcalError(f"compute_capabilities is {names!r}; give a list of names like '8.9'")
    if names and not is_rtx(library):
        raise FastcalError(
            "TensorRT builds for the GPU that is there; leave out compute_capabilities, or take builder rtx"
        )
    known = {} if not names else _known(library)
    for name in names:
        if name not in known:
            raise FastcalError(f"there is no compute capability {name!r}; this TensorRT for RTX has {', '.join(known)}")


def _known(library: Any) -> dict[str, Any]:
    """Return the members of `ComputeCapability` by names like "8.9"."""
    found = {}
    for name, value in library.ComputeCapability.__members__.items():
        if match := re.fullmatch(r"SM(\d+)(\d)", name):
            found[f"{match[1]}.{match[2]}"] = value
    return found


def _choose_gpus(library: Any, config: Any, names: Sequence[str]) -> None:
    known = _known(library)
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)
