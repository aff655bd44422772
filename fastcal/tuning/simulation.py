"""`Simulation`: a network on the CPU with any of its layers in INT8, as ONNX Runtime rounds."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Outputs
from fastcal.model import Model
from fastcal.observe.segments import Segment, cut
from fastcal.observe.with_onnxruntime import FLOAT_TYPES, Session, as_arrays, with_outputs
from fastcal.tuning.rounded import SCALES, Rounded

#: The number of segments that a network is cut into, about: a run with one layer in INT8 begins at the layer's segment.
_SEGMENTS = 8

#: The layers that are in INT8: a Boolean for each.
Choice = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Exact:
    """A batch in float: what runs with layers in INT8 begin with, and are compared with.

    Attributes:
        outputs: The network's float outputs by name.
        alive: For each segment, or for the first alone, the tensors that it or a later one reads.
    """

    outputs: Outputs
    alive: Sequence[Mapping[str, npt.NDArray[Any]]]


class Simulation(AbstractContextManager["Simulation"]):
    """Runs batches through a network in segments, with some layers in INT8.

    Attributes:
        rounded: The network.
        outputs: The names of the float outputs.
    """

    def __init__(self, model: Model, rounded: Rounded, types: Mapping[str, str], threads: int | None = None) -> None:
        """Prepare a model; `types` are ONNX Runtime's types of its activations."""
        self._model, self.rounded = model, rounded
        self._thread = ThreadPoolExecutor(1, "fastcal-runner")
        proto, sizes = rounded.proto, dict.fromkeys(rounded.outputs, 1)
        segments = cut(proto.graph, sizes, types, math.ceil(len(sizes) / _SEGMENTS))  # as many layers in each
        final = [value.name for value in proto.graph.output]
        self.outputs = [name for name in final if types.get(name) in FLOAT_TYPES]
        start = _Start(model, rounded, types, threads, self._thread)
        self._parts = [_Part(start, segment, final) for segment in segments]
        made = {name: index for index, segment in enumerate(segments) for name in segment.computed}
        self._place = np.array([made[name] for name in rounded.outputs])

    def exact(self, batch: Mapping[str, Any], *, keep: bool) -> Exact:
        """Run a batch in float; `keep` tells whether to keep what each segment begins with."""
        alive = as_arrays(self._model, batch)
        found: dict[str, npt.NDArray[Any]] = {}
        kept = []
        for index, part in enumerate(self._parts):
            if keep or not index:
                kept.append(dict(alive))
            found |= part.run(alive)
        return Exact({name: found[name] for name in self.outputs}, kept)

    def run(self, exact: Exact, is_int8: Choice, scales: npt.NDArray[np.float32]) -> Outputs:
        """Run the batch again with some layers in INT8, and return the outputs."""
        if not is_int8.any():
            return exact.outputs
        first = min(int(self._place[is_int8].min()), len(exact.alive) - 1)
        found: dict[str, npt.NDArray[Any]] = dict(exact.outputs)
        alive = dict(exact.alive[first])
        for index, part in enumerate(self._parts[first:], first):
            layers = np.flatnonzero(is_int8 & (self._place == index))
            found |= part.run(alive, [self.rounded.outputs[layer] for layer in layers], scales)
        return {name: found[name] for name in self.outputs}

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


@dataclass(frozen=True)
class _Start:
    """Starts sessions of segments."""

    model: Model
    rounded: Rounded
    types: Mapping[str, str]
    threads: int | None
    thread: ThreadPoolExecutor

    def __call__(self, segment: Segment, in_int8: Sequence[str], shown: Sequence[str]) -> Session:
        """Return the session of a segment with these layers in INT8, that shows some tensors."""
        nodes, constants = self.rounded.replaced(segment.nodes, in_int8)
        proto = replace(segment, nodes=nodes).model(self.rounded.proto, self.types)
        proto.graph.initializer.extend(constants)
        data = with_outputs(proto, shown)
        return Session(self.model, data, self.threads, self.thread, has_arena=True, is_optimized=True)


class _Part:
    """A segment's sessions: in float, and with the last choice of layers in INT8."""

    def __init__(self, start: _Start, segment: Segment, final: Sequence[str]) -> None:
        self._start, self._segment = start, segment
        self._final = [name for name in final if name in segment.computed]
        self._shown = list(dict.fromkeys([*self._final, *(name for name in segment.computed if name in segment.later)]))
        self._exact = start(segment, [], self._shown)
        self._in_int8: Sequence[str] = []
        self._last = self._exact

    def run(
        self,
        alive: dict[str, npt.NDArray[Any]],
        in_int8: Sequence[str] = (),
        scales: npt.NDArray[np.float32] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the network's outputs among the segment's; leave in `alive` what later segments read."""
        given = alive if scales is None else alive | {SCALES: scales}
        values = self._session(in_int8).run(self._shown, given)
        kept = {name: array for name, array in (alive | values).items() if name in self._segment.later}
        alive.clear()
        alive.update(kept)
        return {name: values[name] for name in self._final}

    def _session(self, in_int8: Sequence[str]) -> Session:
        """Return the session with these layers in INT8."""
        if not in_int8:
            return self._exact
        if in_int8 != self._in_int8:
            self._in_int8, self._last = in_int8, self._start(self._segment, in_int8, self._shown)
        return self._last
