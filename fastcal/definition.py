"""`Definition`: a TensorRT `INetworkDefinition` with the interface of a `Model`."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fastcal.batch import Input, known_sizes
from fastcal.errors import ModelError
from fastcal.model import Model


@dataclass(frozen=True)
class Definition:
    """A network that an application has defined with TensorRT's API, or has parsed from an ONNX file.

    Attributes:
        raw: The `tensorrt.INetworkDefinition`.
        digest: The digest of the ONNX file that the network was parsed from; None if the file is not known.
    """

    raw: Any
    digest: str | None = None

    #: False, since fastcal does not look for Q/DQ pairs in an `INetworkDefinition`.
    has_pairs: ClassVar[bool] = False

    #: Empty, since fastcal does not list the tensors of an `INetworkDefinition`.
    activations: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        """The network's name in messages."""
        return f"network {self.raw.name!r}"

    @property
    def input_names(self) -> list[str]:
        """The names of the network's inputs, in order."""
        return [self.raw.get_input(index).name for index in range(self.raw.num_inputs)]

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The network's inputs, in order."""
        from tensorrt import nptype

        values = map(self.raw.get_input, range(self.raw.num_inputs))
        return tuple(Input(value.name, known_sizes(value.shape), np.dtype(nptype(value.dtype))) for value in values)


#: A network in either form. Both forms have `label`, `inputs`, `input_names`, `activations`, `digest` and `has_pairs`.
Network = Model | Definition


def as_network(model: Any) -> Network:
    """Return an ONNX file or a `Model` as a `Model`, and an `INetworkDefinition` as a `Definition`.

    Raises:
        ModelError: `model` is none of these, or the file cannot be read.
    """
    if isinstance(model, str | os.PathLike | Model):
        return Model.of(model)
    if not hasattr(model, "num_inputs"):
        raise ModelError(
            f"the model is a {type(model).__name__}; name an ONNX file (onnx.save writes one), or give an "
            "INetworkDefinition of TensorRT"
        )
    return Definition(model)
