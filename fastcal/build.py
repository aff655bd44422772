"""`build_engine`: an INT8 engine from an ONNX model and calibration images, or from scales that are known."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastcal.cache.cache import CalibrationCache
from fastcal.calibration import calibrate
from fastcal.engine.explicit import build_typed, check_compute_capabilities
from fastcal.engine.settings import BuildSettings
from fastcal.errors import FastcalError
from fastcal.feed.arrays import as_feed
from fastcal.feed.feed import Feed
from fastcal.half import HalfType
from fastcal.library import is_rtx, is_strongly_typed, load_library, tactic_bits
from fastcal.model import Model
from fastcal.observe.backends import unknown_to_onnxruntime
from fastcal.qdq import add_pairs, check_quantizable, half_type
from fastcal.tune import tune
from fastcal.tuning.tuned import Tuning
from fastcal.versions import DEFAULT_TENSORRT_VERSION

#: The values of `calibration`: fastcal calibrates, or TensorRT's builder does.
CALIBRATIONS = ("fastcal", "tensorrt")

#: The layers that TensorRT for RTX 1.7 never runs in INT8: a pair would round their inputs for nothing. Depthwise
#: convolutions have no pairs there either: in INT8 they make the engine larger.
_FLOAT_ON_RTX = ("AveragePool", "ConvTranspose", "GlobalAveragePool")


def build_engine(
    model: str | os.PathLike[str] | Model,
    calibrator: Any = None,
    *,
    tuning: Tuning | CalibrationCache | str | os.PathLike[str] | None = None,
    explicit: bool | None = None,
    builder: str = "tensorrt",
    compute_capabilities: Sequence[str] = (),
    calibration: str = "fastcal",
    exact: bool = False,
    tf32: bool = False,
    fp16: bool = True,
    bf16: bool = False,
    min_batch: int | None = None,
    opt_batch: int | None = None,
    max_batch: int | None = None,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    optimization_level: int | None = None,
    tactic_sources: int | Iterable[str] | None = None,
    dla: int | None = None,
    gpu_fallback: bool = False,
) -> bytes:
    """Build an INT8 engine with TensorRT from a model and calibration images, or from scales that are known.

    TensorRT before 11 quantizes implicitly by default: it chooses the layers that run in INT8, by their speed. With
    `explicit`, and on TensorRT 11 and TensorRT for RTX in any case, the engine is built from the Q/DQ model of
    `fastcal.quantize`; there `fp16` and `bf16` make it a typed model.

    If an input is dynamic in more than its batch, the engine takes the other sizes from the first calibration batch.
    TensorRT's messages go to the logger "fastcal.tensorrt".

    Args:
        model: The ONNX file.
        calibrator: The batches: a `Feed`, or anything that `ArrayFeed` takes. An explicit build tunes with them, as
            `fastcal.tune`; an implicit one calibrates with "entropy2", and takes one of fastcal's calibrators too. With
            a tuning, only the sizes of the batches count.
        tuning: A calibration cache or a `Tuning`, or the file of either, in place of a calibration. Layers that a
            tuning leaves in float stay in float, and the biases that it corrects are corrected. An implicit build needs
            the scales of all tensors: tune with `all_tensors`.
        explicit: Whether to build from a model with Q/DQ pairs; by default only if TensorRT has no other way.
        builder: "tensorrt", or "rtx" for TensorRT for RTX, which builds without a GPU too.
        compute_capabilities: The GPUs that TensorRT for RTX builds for, "8.9" for instance; by default those that it
            chooses itself.
        calibration: "fastcal" calibrates at the speed of the data; "tensorrt" lets TensorRT's builder calibrate, on one
            CPU core. With `exact`, the scales are the same.
        exact: Whether fastcal clips outputs and tensors with a known range as TensorRT does: see `fastcal.calibrate`.
        tf32: Whether fastcal's calibration may use TF32: see `fastcal.calibrate`.
        fp16: Whether TensorRT may run layers in FP16; in a typed model, those that are not in INT8 do.
        bf16: Whether an explicit build takes BF16 in place of FP16.
        min_batch: The smallest batch that the engine runs, if the model's batch is dynamic; by default 1.
        opt_batch: The batch that the engine is tuned for; by default the calibrator's, limited by the other two.
        max_batch: The largest batch that the engine runs; by default the largest of the other two and the calibrator's.
        workspace: The bytes of GPU memory that TensorRT may use for scratch; by default all.
        timing_cache: A file with TensorRT's timings, which makes a second build faster. It is read if it exists, and
            the new timings are added.
        optimization_level: 0 (the engine is built fastest) to 5 (the engine runs fastest); by default TensorRT's 3.
        tactic_sources: Names of `tensorrt.TacticSource`, or their bits; by default TensorRT's own.
        dla: The core of NVIDIA's DLA that an implicit build is for, 0 or 1; by default the engine is for the GPU. The
            scales are those of `for_dla`.
        gpu_fallback: Whether the GPU runs what the DLA does not; else that is an error.

    Returns:
        The serialized engine.

    Raises:
        ModelError: TensorRT cannot parse the model or builds no engine from it, or the model cannot be quantized.
        DataError: The batches do not fit the model.
        CacheError: The scales cannot be read, or belong to another model.
        UnavailableError: TensorRT cannot start, for instance because there is no GPU.
        FastcalError: A setting is out of range, or TensorRT does not have it.
        Exception: As the feed.
    """
    model = Model.of(model)
    library = load_library(builder)
    settings = BuildSettings(
        min_batch, opt_batch, max_batch, workspace, timing_cache, optimization_level, tactic_sources, dla, gpu_fallback
    )  # fmt: skip
    check_calibration(calibration, is_known=tuning is not None or is_explicit(library, explicit))
    if calibrator is None and tuning is None:
        raise FastcalError("there are neither batches nor scales; give a feed, or a calibration cache as tuning")
    settings.check(library)
    check_compute_capabilities(library, compute_capabilities)
    if is_explicit(library, explicit):
        if dla is not None:
            raise FastcalError("the DLA needs pairs on every tensor, which fastcal does not make; leave out dla")
        half = half_type(fp16 and not bf16, bf16, model)
        return _build_explicit(
            library, model, calibrator, tuning, settings, half, compute_capabilities, exact=exact, tf32=tf32
        )
    if bf16:
        raise FastcalError("bf16 is for an explicit build; set explicit too")
    from fastcal.engine import implicit  # needs TensorRT's calibrators

    if tuning is not None:
        with _feed(calibrator, model) as feed:
            return implicit.build_tuned(model, Tuning.of(tuning), feed, settings, fp16=fp16)
    return implicit.build_calibrated(
        model, calibrator, settings, fp16=fp16, calibrates=calibration == "fastcal", exact=exact, tf32=tf32,
        tactic_sources=tactic_bits(library, tactic_sources),
    )  # fmt: skip


def check_calibration(calibration: str, *, is_known: bool) -> None:
    """Raise FastcalError if nothing calibrates so; `is_known` is whether TensorRT is given the scales."""
    if calibration not in CALIBRATIONS:
        raise FastcalError(f"there is no calibration {calibration!r}; choose {' or '.join(CALIBRATIONS)}")
    if calibration == "tensorrt" and is_known:
        raise FastcalError(
            "TensorRT itself calibrates in an implicit build alone, up to TensorRT 10 and without given scales; leave "
            "out calibration"
        )


def is_explicit(library: Any, explicit: bool | None) -> bool:
    """Return whether a build is explicit; raise FastcalError if it is to be implicit and the library cannot do that."""
    if not is_strongly_typed(library):
        return bool(explicit)
    if explicit is False:
        raise FastcalError(f"TensorRT {library.__version__} has no implicit quantization; leave out explicit")
    return True


def pair_options(library: Any, model: Model) -> dict[str, Any]:
    """Return the arguments of `tune` and `quantize` for the layers that a builder should run in INT8."""
    types = {node.op_type for node in model.proto.graph.node}
    exclude = types.intersection(_FLOAT_ON_RTX if is_rtx(library) else ())
    return {"exclude": sorted(exclude), "depthwise": not is_rtx(library)}


def _feed(batches: Any, model: Model) -> AbstractContextManager[Feed | None]:
    return nullcontext() if batches is None else as_feed(batches, model, "cpu")


def _build_explicit(
    library: Any,
    model: Model,
    batches: Any,
    tuning: Any,
    settings: BuildSettings,
    half: HalfType | None,
    compute_capabilities: Sequence[str],
    **options: Any,
) -> bytes:
    """Return the engine of a quantized model; without a tuning, tune with `options`, as ONNX Runtime runs the model."""
    if hasattr(batches, "get_batch"):
        raise FastcalError("an explicit build takes no calibrator; give its feed, or a calibration cache as tuning")
    typed = half if is_strongly_typed(library) else None
    check_quantizable(model, half=typed)
    with _feed(batches, model) as feed:
        places = pair_options(library, model)
        if tuning is None and unknown_to_onnxruntime(model):
            tuning = calibrate(model, feed, tensorrt_version=DEFAULT_TENSORRT_VERSION, **options)
        elif tuning is None:
            tuning = tune(model, feed, all_tensors=typed is not None, **places, **options)
        proto = add_pairs(model, tuning, half=typed, **places)
        flags = ["INT8", *([] if half is None else [half.label])]
        return build_typed(
            library, model, proto, feed, settings, flags=flags, compute_capabilities=compute_capabilities
        )
