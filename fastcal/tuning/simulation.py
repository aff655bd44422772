"""`Simulation`: a network on the CPU with any of its layers in INT8, as ONNX Runtime rounds."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.accuracy.base import Outputs
from fastcal.model import Model
from fastcal.observe.segments import Segment, cut
from fastcal.observe.with_onnxruntime import FLOAT_TYPES, Session, as_arrays, with_outputs
from fastcal.tuning.switches import IS_INT8, SCALES, Switched

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
    """Runs batches through a network with switches, in segments.

    Attributes:
        switched: The network.
        outputs: The names of the float outputs.
    """

    def __init__(self, model: Model, switched: Switched, types: Mapping[str, str], threads: int | None = None) -> None:
        """Prepare a model; `types` are ONNX Runtime's types of its activations."""
        self._model, self.switched = model, switched
        self._thread = ThreadPoolExecutor(1, "fastcal-runner")
        proto, sizes = switched.proto, dict.fromkeys(switched.begins, 1)
        segments = cut(proto.graph, sizes, types, math.ceil(len(sizes) / _SEGMENTS))  # as many layers in each
        final = [value.name for value in proto.graph.output]
        self.outputs = [name for name in final if types.get(name) in FLOAT_TYPES]
        self._parts = [
            _Part(model, segment, segment.model(proto, types), final, threads, self._thread) for segment in segments
        ]
        made = {name: index for index, segment in enumerate(segments) for name in segment.computed}
        self._first = np.array([made[name] for name in switched.begins])

    def exact(self, batch: Mapping[str, Any], *, keep: bool) -> Exact:
        """Run a batch in float; `keep` tells whether to keep what each segment begins with."""
        alive = as_arrays(self._model, batch) | self._settings(np.zeros(len(self._first), bool), None)
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
        first = min(int(self._first[is_int8].min()), len(exact.alive) - 1)
        found: dict[str, npt.NDArray[Any]] = dict(exact.outputs)
        alive = dict(exact.alive[first]) | self._settings(is_int8, scales)
        for part in self._parts[first:]:
            found |= part.run(alive)
        return {name: found[name] for name in self.outputs}

    def _settings(self, is_int8: Choice, scales: npt.NDArray[np.float32] | None) -> dict[str, npt.NDArray[Any]]:
        unit = np.ones(len(self.switched.tensors), np.float32)
        return {IS_INT8: is_int8, SCALES: unit if scales is None else scales}

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


class _Part:
    """A segment's session."""

    def __init__(
        self,
        model: Model,
        segment: Segment,
        proto: Any,
        final: Sequence[str],
        threads: int | None,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._later = segment.later
        self._final = [name for name in final if name in segment.computed]
        self._shown = list(dict.fromkeys([*self._final, *(name for name in segment.computed if name in segment.later)]))
        self._session = Session(model, with_outputs(proto, self._shown), threads, thread, has_arena=True)

    def run(self, alive: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the network's outputs among the segment's; leave in `alive` what later segments read."""
        values = self._session.run(self._shown, alive)
        kept = {name: array for name, array in (alive | values).items() if name in self._later}
        alive.clear()
        alive.update(kept)
        return {name: values[name] for name in self._final}
