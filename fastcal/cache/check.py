"""`check_cache`: whether a calibration cache is complete and up to date."""

import os
from dataclasses import dataclass
from typing import Any

from fastcal.cache.cache import CalibrationCache
from fastcal.cache.record import Record
from fastcal.feed.arrays import as_feed
from fastcal.model import Model


@dataclass(frozen=True)
class CacheCheck:
    """The faults of a cache for a model; empty, and so false, if there are none.

    Attributes:
        missing: The model's tensors that the cache has no scale for, in the model's order. TensorRT takes the cache
            all the same and runs the layers that touch these tensors in higher precision.
        unknown: The cache's tensors that the model does not have, in the cache's order. TensorRT ignores them; if
            there are many, the cache belongs to another model.
        invalid: Tensors of the model whose scale in the cache is NaN, infinite, negative, 0, absurdly small or large,
            or given twice; each with the reason. Constants may have scale 0.
        stale: The entries of the cache's record that differ now.
        recorded: Whether the cache has a record. Without one, `stale` is empty and means nothing.
    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    invalid: tuple[str, ...]
    stale: tuple[str, ...]
    recorded: bool

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.invalid or self.stale)


def check_cache(cache: CalibrationCache, model: str | os.PathLike[str] | Model, feed: Any = None) -> CacheCheck:
    """Compare a cache with a model, and the cache's record with the model and the batches.

    A tensor is missing if its type is float, it depends on the inputs, and the cache has no scale for it: TensorRT
    calibrates these tensors under their ONNX names. Tensors that TensorRT's parser adds under names of its own are not
    in the model, so they are neither missing nor unknown.

    Args:
        cache: The cache, loaded with its record.
        model: The ONNX file; ModelError is raised if it is none.
        feed: The batches that the cache should have been made from: a `Feed`, or anything else that `calibrate` takes.
            None compares no batches.
    """
    network = Model.of(model)
    known = network.tensors | {name for name in cache.scales if name.startswith("(Unnamed Layer*")}
    invalid = {name: fault for name, fault in cache.faults.items() if fault != "0" or name in network.calibrated}
    return CacheCheck(
        missing=tuple(name for name in network.calibrated if name not in cache.scales),
        unknown=tuple(name for name in cache.scales if name not in known),
        invalid=tuple(f"{name} ({fault})" for name, fault in invalid.items()),
        stale=() if cache.record is None else tuple(_record(feed, network).differences(cache.record)),
        recorded=cache.record is not None,
    )


def _record(feed: Any, network: Model) -> Record:
    if feed is None:
        return Record.of({}, network.digest)
    with as_feed(feed, network, "cpu") as batches:
        return Record.of(batches.describe(), network.digest)
