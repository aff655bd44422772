"""`extract_scales`: a float model and a calibration cache from a model with Q/DQ pairs.

TensorRT 8 to 10 with a calibration cache, and the DLA with TensorRT up to 10, take no pairs.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import onnx

from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.calibration import calibrate
from fastcal.carried import carry_scales
from fastcal.dla import check_target, for_dla
from fastcal.errors import first_few
from fastcal.model import Model
from fastcal.qdq_graph import Graph
from fastcal.unpaired import Unpaired
from fastcal.versions import cache_version

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class Extracted:
    """A model without its Q/DQ pairs, and a calibration cache with their scales.

    Attributes:
        model: The float model, with all its weights.
        cache: The cache, of algorithm "entropy2". Its record is that of the float model as `onnx.save` writes it.
        paired: The tensors whose scales come from pairs.
        missing: The tensors that the cache has no scale for. TensorRT runs the layers that touch them in higher
            precision.
    """

    model: onnx.ModelProto
    cache: CalibrationCache
    paired: tuple[str, ...]
    missing: tuple[str, ...]


def extract_scales(
    model: str | os.PathLike[str] | Model,
    feed: Any = None,
    *,
    tensorrt_version: str | None = None,
    target: str | None = None,
) -> Extracted:
    """Return the float model and the calibration cache that a model with Q/DQ pairs stands for.

    The pairs are those of `fastcal.quantize`, of ONNX Runtime's `quantize_static`, or of an export after
    quantization-aware training. Both nodes of each pair are left out. Weights that a pair rounds stay as they are,
    those that are stored as INT8 are dequantized, and so are biases: TensorRT quantizes weights itself. The scales of
    pairs around activations stand in the cache under the names of the tensors that the pairs read; tensors that hold
    the same values as these, in front of or behind a Reshape, a Relu or a Concat for instance, have their scales too.

    Args:
        model: The ONNX file with the pairs.
        feed: Batches to calibrate the other tensors with, as `calibrate` takes them. By default these have no scale.
        tensorrt_version: The TensorRT that will read the cache, as `calibrate` takes it.
        target: "dla" for a cache as `for_dla` makes it, or None for a GPU.

    Raises:
        ModelError: The model has no pairs, or pairs that a calibration cache cannot stand for: they are not symmetric,
            their scale is computed or differs between the two nodes, an activation has several scales, or a layer
            computes in INT8; or its weights take more than 2 GB in float.
        FastcalError: There is no such target; or as `calibrate`.
    """
    check_target(target, Algorithm())
    version = cache_version(tensorrt_version)
    unpaired = Unpaired(Model.of(model))
    network = unpaired.model
    scales = carry_scales(Graph(network), unpaired.scales)
    missing = [name for name in network.calibrated if name not in scales]
    record = Record.of({}, network.digest)
    if missing and feed is not None:
        found = calibrate(network.showing(missing), feed, tensorrt_version=version)
        scales |= {name: found.scales[name] for name in missing if name in found.scales}
        record = Record({**(found.record or record).entries, **record.entries})
    ordered = {name: scales[name] for name in network.calibrated if name in scales}
    cache = CalibrationCache(ordered, tensorrt_version=version, record=record)
    missing = [name for name in missing if name not in scales]
    if missing:
        _log.warning("no scale for %s: no pair holds one; with images, they are calibrated", first_few(missing))
    if target == "dla":
        cache = for_dla(network, cache)
    return Extracted(network.proto, cache, tuple(unpaired.scales), tuple(missing))
