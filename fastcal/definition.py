"""`Definition`: TensorRT's `INetworkDefinition`, with the interface of a `Model`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fastcal.batch import Input, known_sizes
from fastcal.errors import ModelError
from fastcal.model import Model


@dataclass(frozen=True)
class Definition:
    """An `INetworkDefinition`, `raw`, with the ONNX file that it was parsed from, if that is known.

    Q/DQ pairs are not looked for, and the tensors are not listed.
    """

    raw: Any
    file: Model | None = None
    has_pairs: ClassVar[bool] = False
    activations: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        """The network's name in messages."""
        return f"network {self.raw.name!r}"

    @property
    def input_names(self) -> list[str]:
        """The names of `inputs`."""
        return [self.raw.get_input(index).name for index in range(self.raw.num_inputs)]

    @property
    def least_thresholds(self) -> Mapping[str, float]:
        """The tensors that must not be clipped: those of the file, else the network's outputs, by their largest |x|."""
        if self.file is not None:
            return self.file.least_thresholds
        return {self.raw.get_output(index).name: 0.0 for index in range(self.raw.num_outputs)}

    @property
    def digest(self) -> str | None:
        """The digest of the file, if that is known; errors as `Model.digest`."""
        return None if self.file is None else self.file.digest

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The network's inputs, in order."""
        from tensorrt import nptype

        values = map(self.raw.get_input, range(self.raw.num_inputs))
        return tuple(Input(value.name, known_sizes(value.shape), np.dtype(nptype(value.dtype))) for value in values)


#: A network in either form. Both have `label`, `inputs`, `input_names`, `activations`, `least_thresholds`, `digest` and
#: `has_pairs`.
Network = Model | Definition


def as_network(model: Any) -> Network:
    """Return an ONNX file or a `Model` as a `Model`, and an `INetworkDefinition` as a `Definition`."""
    if isinstance(model, str | os.PathLike | Model):
        return Model.of(model)
    if not hasattr(model, "num_inputs"):
        raise ModelError(
            f"the model is a {type(model).__name__}; name an ONNX file (onnx.save writes one), or give an "
            "INetworkDefinition of TensorRT"
        )
    return Definition(model)
