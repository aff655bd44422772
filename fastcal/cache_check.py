"""`check_cache`: whether a calibration cache is complete and still true for a model."""

import os
from dataclasses import dataclass
from typing import Any

from fastcal.cache import CalibrationCache
from fastcal.feed.arrays import as_feed
from fastcal.model import Model
from fastcal.record import Record


@dataclass(frozen=True)
class CacheCheck:
    """What is wrong with a cache for a model; empty, and so false, where nothing is.

    Attributes:
        missing: The model's tensors that the cache has no scale for, in the model's order. TensorRT takes the cache
            all the same and runs the layers that touch them in higher precision.
        unknown: The cache's tensors that the model has not, in the cache's order. TensorRT ignores them; many of them
            say that the cache is another model's.
        stale: What the cache's record says of what it was made from and is otherwise now.
        recorded: Whether the cache has a record. Without one `stale` is empty, and says nothing.
    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    stale: tuple[str, ...]
    recorded: bool

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.stale)


def check_cache(
    cache: CalibrationCache,
    model: str | os.PathLike[str] | Model,
    feed: Any = None,
) -> CacheCheck:
    """Compare a cache with a model, and its record with the model and the batches.

    Missing are tensors of float type that depend on the inputs: TensorRT calibrates these under their ONNX names. What
    its parser adds under names of its own is not in the model, so it is neither missing nor unknown.

    Args:
        cache: The cache, its record loaded with it.
        model: The ONNX file.
        feed: The batches that the cache should have been made from, a `Feed` or whatever else `calibrate` was given;
            None does not compare them.

    Raises:
        FastcalError: The file is not an ONNX model.
    """
    network = Model.of(model)
    known = network.tensors | {name for name in cache.scales if name.startswith("(Unnamed Layer*")}
    return CacheCheck(
        missing=tuple(name for name in network.calibrated if name not in cache.scales),
        unknown=tuple(name for name in cache.scales if name not in known),
        stale=() if cache.record is None else tuple(_record(feed, network).differences(cache.record)),
        recorded=cache.record is not None,
    )


def _record(feed: Any, network: Model) -> Record:
    """What a calibration with these batches would be made from."""
    if feed is None:
        return Record.of(None, network)
    with as_feed(feed, [value.name for value in network.inputs], "cpu") as batches:
        return Record.of(batches, network)
