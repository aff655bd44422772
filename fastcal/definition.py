"""`Definition`: a TensorRT `INetworkDefinition` with the face of a `Model`."""

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
    """A network that an application has defined with TensorRT, or parsed from an ONNX file.

    Attributes:
        raw: The `tensorrt.INetworkDefinition`.
        digest: The digest of the ONNX file that it was parsed from; None if it is not known.
    """

    raw: Any
    digest: str | None = None

    #: Whether the network has Q/DQ pairs; those of an `INetworkDefinition` are not looked for.
    has_pairs: ClassVar[bool] = False

    #: The names of the tensors that its layers compute, if they are known.
    activations: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        """The network's name in texts."""
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


#: A network in either form: both have `label`, `inputs`, `input_names`, `activations`, `digest` and `has_pairs`.
Network = Model | Definition


def as_network(model: Any) -> Network:
    """Return an ONNX file or a `Model` as a `Model`, and an `INetworkDefinition` as a `Definition`.

    Raises:
        ModelError: It is none of these, or the file cannot be read.
    """
    if isinstance(model, str | os.PathLike | Model):
        return Model.of(model)
    if not hasattr(model, "num_inputs"):
        raise ModelError(
            f"the model is a {type(model).__name__}; name an ONNX file (onnx.save writes one), or give an "
            "INetworkDefinition of TensorRT's"
        )
    return Definition(model)
