"""`BuildSettings`: what both ways of building an engine have in common."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcal.batch import format_shape, known_sizes, match_names, shape_fits
from fastcal.device import resolve
from fastcal.errors import DataError, FastcalError, ModelError, UnavailableError, check_range, counted
from fastcal.feed.feed import Feed
from fastcal.files import check_writable, write_atomically
from fastcal.library import Messages, is_rtx, tactic_bits
from fastcal.model import Model

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class BuildSettings:
    """The settings of a build, as `build_engine` takes them."""

    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    workspace: int | None = None
    timing_cache: str | os.PathLike[str] | None = None
    optimization_level: int | None = None
    tactic_sources: int | Iterable[str] | None = None
    dla: int | None = None
    gpu_fallback: bool = False

    @property
    def target(self) -> str | None:
        """The target of a calibration: "dla", or None for a GPU."""
        return None if self.dla is None else "dla"

    def check(self, library: Any) -> None:
        """Raise FastcalError if a setting is out of range, or unknown to the library."""
        check_range("workspace", self.workspace, 1)
        check_range("optimization_level", self.optimization_level, 0, 5)
        check_range("dla", self.dla, 0)
        if self.gpu_fallback and self.dla is None:
            raise FastcalError("gpu_fallback is for what a DLA does not run; set dla too, or leave gpu_fallback out")
        tactic_bits(library, self.tactic_sources)
        if self.timing_cache is not None and is_rtx(library):
            raise FastcalError("TensorRT for RTX keeps no timings; leave out timing_cache")
        if self.timing_cache is not None:
            check_writable(self.timing_cache, 1)
            _read_timings(self.timing_cache)

    def batches(self, model: Model, calibrated: int) -> tuple[int, int, int]:
        """Return the smallest batch that the engine runs, the one that it is tuned for, and the largest."""
        asked = {"min_batch": self.min_batch, "opt_batch": self.opt_batch, "max_batch": self.max_batch}
        given = [name for name, value in asked.items() if value is not None]
        if given and all(value.shape[:1] != (None,) for value in model.inputs):
            raise FastcalError(
                f"{model.label} has a fixed batch; leave out {' and '.join(given)}, or export it with a dynamic one"
            )
        least = 1 if self.min_batch is None else self.min_batch
        opt, most = self.opt_batch, self.max_batch
        if opt is None:
            opt = max(least, calibrated if most is None else min(most, calibrated))
        most = max(opt, calibrated) if most is None else most
        if not 1 <= least <= opt <= most:
            raise FastcalError(
                f"the engine's batches are min_batch {least}, opt_batch {opt}, max_batch {most}; they must be at least "
                "1 and in this order"
            )
        if self.dla is not None and least < most and any(value.shape[:1] == (None,) for value in model.inputs):
            raise FastcalError(
                f"a DLA runs one batch size, and these are {least} to {most}; set min_batch and max_batch to the same"
            )
        return least, opt, most

    def configure(self, library: Any, builder: Any) -> Any:
        """Return an `IBuilderConfig` with these settings; its engine can tell its layers."""
        config = builder.create_builder_config()
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        if self.workspace is not None:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, self.workspace)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        tactics = tactic_bits(library, self.tactic_sources)
        if tactics is not None:
            config.set_tactic_sources(tactics)
        if self.dla is not None:
            _choose_dla(library, builder, config, self.dla)
            if self.gpu_fallback:
                config.set_flag(library.BuilderFlag.GPU_FALLBACK)
        return config

    def build(self, builder: Any, network: Any, config: Any, logger: Messages, model: Model) -> bytes:
        """Return the serialized engine of a network; raise ModelError if TensorRT builds none."""
        with timings(self.timing_cache, config, logger):
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                raise ModelError(f"TensorRT builds no engine from {model.label}: {logger.reasons()}")
        return bytes(engine)


def _choose_dla(library: Any, builder: Any, config: Any, core: int) -> None:
    """Let a core of the DLA run what it can; raise UnavailableError if there is no such core."""
    found = counted(builder.num_DLA_cores, "DLA core")
    if core >= builder.num_DLA_cores:
        raise UnavailableError(
            f"dla is {core}, and TensorRT finds {found} here: the first one is 0, on Jetson Xavier and Orin; leave dla "
            "out to build for the GPU"
        )
    config.default_device_type = library.DeviceType.DLA
    config.DLA_core = core


def check_gpu(feed: Feed) -> None:
    """Raise FastcalError if a feed's batches are on another GPU than the current one."""
    current = None if feed.gpu is None else resolve("cuda")
    if current != feed.gpu:
        raise FastcalError(
            f"the batches are on GPU {feed.gpu}, but TensorRT builds on the current GPU, {current}; make the feed with "
            f"device='cuda:{current}', or make GPU {feed.gpu} current"
        )


def input_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's inputs by name, -1 for a dynamic size."""
    return {value.name: tuple(value.shape) for value in map(network.get_input, range(network.num_inputs))}


def make_profile(builder: Any, shapes: dict[str, tuple[int, ...]], batches: Iterable[int]) -> Any:
    """Return an optimization profile for these least, best and largest batches; other sizes are those of `shapes`."""
    profile, sizes = builder.create_optimization_profile(), tuple(batches)
    for name, shape in shapes.items():
        profile.set_shape(name, *[(size, *shape[1:]) if shape[:1] == (-1,) else shape for size in sizes])
    return profile


def fill_sizes(shapes: dict[str, tuple[int, ...]], feed: Feed | None) -> dict[str, tuple[int, ...]]:
    """Return inputs' shapes with the sizes of the feed's batches in place of -1 for all dimensions but the batch."""
    if not any(-1 in shape[1:] for shape in shapes.values()):
        return shapes
    if feed is None:
        name = next(name for name, shape in shapes.items() if -1 in shape[1:])
        raise DataError(
            f"input {name!r} is dynamic in more than its batch; give batches, whose sizes the engine takes, or export "
            "the network with fixed sizes"
        )
    given = match_names(list(shapes), "the network", feed.shapes())
    filled = {}
    for name, shape in shapes.items():
        wanted = known_sizes(shape[1:])
        if not shape_fits(wanted, given[name][1:]):
            raise DataError(
                f"the network takes input {name!r} as {format_shape((None, *wanted))}, the batches are "
                f"{format_shape(given[name])}; give batches of that shape"
            )
        filled[name] = (*shape[:1], *given[name][1:])
    return filled


@contextmanager
def timings(path: str | os.PathLike[str] | None, config: Any, logger: Messages) -> Iterator[None]:
    """Let a build use the timings in a file; if the build succeeds, write them and those that it added."""
    if path is None:
        yield
        return
    timings = config.create_timing_cache(_read_timings(path))
    is_rejected = timings is None or not config.set_timing_cache(timings, ignore_mismatch=False)
    if is_rejected:
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    yield  # TensorRT needs `timings` until the build has ended
    # TensorRT 8.6 accepts a file that is not a timing cache, and only logs a message.
    if is_rejected or any("timing cache will not be used" in message for message in logger.errors + logger.warnings):
        _log.info("%s was rejected: it is of another TensorRT or GPU, or is not a timing cache", path)
    try:
        write_atomically(path, bytes(config.get_timing_cache().serialize()))
    except FastcalError as error:  # the engine took longer to build, and must not be lost for this
        _log.warning("the timings are not saved: %s", error)


def _read_timings(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes() if Path(path).exists() else b""
    except OSError as error:
        raise FastcalError(f"cannot read timing cache {path}: {error.strerror}; name another file") from error
