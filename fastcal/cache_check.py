"""`check_cache`: whether a calibration cache is complete and still true for a model."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastcal.cache import CalibrationCache
from fastcal.feed.feed import Feed
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
    feed: Feed | Iterable[Mapping[str, Any]] | None = None,
) -> CacheCheck:
    """Compare a cache with a model, and its record with the model and the batches.

    Missing are tensors of float type that depend on the inputs: TensorRT calibrates these under their ONNX names. What
    its parser adds under names of its own is not in the model, so it is neither missing nor unknown.

    Args:
        cache: The cache, its record loaded with it.
        model: The ONNX file.
        feed: The batches that the cache should have been made from, e.g. an `ImageFeed`; None does not compare them.

    Raises:
        FastcalError: The file is not an ONNX model.
    """
    network = Model.of(model)
    known = network.tensors | {name for name in cache.scales if name.startswith("(Unnamed Layer*")}
    record = cache.record
    return CacheCheck(
        missing=tuple(name for name in network.calibrated if name not in cache.scales),
        unknown=tuple(name for name in cache.scales if name not in known),
        stale=() if record is None else tuple(Record.of(feed, network).differences(record)),
        recorded=record is not None,
    )
