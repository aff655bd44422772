"""`HalfType`: the float types of 16 bits, FP16 and BF16, as far as a typed model needs them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

#: The relative error of a single constant or a scale that changes no result much: 1 %.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class HalfType:
    """A float type of 16 bits.

    Attributes:
        name: ONNX's name.
        label: The name in messages.
        kind: The number in `onnx.TensorProto.DataType`.
        largest: The largest finite value.
        opset: The first opset in which the pairs, and the layers of a convolutional network, take the type.
        lacking: The operators that TensorRT for RTX 1.7 does not build in the type, of those that it builds in FP32.
    """

    name: str
    label: str
    kind: int
    largest: float
    opset: int
    lacking: frozenset[str]

    def bits(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Return float32 values, rounded to the nearest of the type, as their 16 bits."""
        values = np.ascontiguousarray(values, np.float32)
        if self.kind == TensorProto.FLOAT16:
            with np.errstate(over="ignore"):
                halves: npt.NDArray[np.uint16] = values.astype(np.float16).view(np.uint16)
            return halves
        words = values.view(np.uint32)
        rounded = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
        return np.asarray(np.where(np.isfinite(values), rounded, words) >> np.uint32(16), np.uint16)

    def values(self, bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Return the values of 16 bits each as float32."""
        is_fp16 = self.kind == TensorProto.FLOAT16
        values: npt.NDArray[np.float32] = (
            bits.view(np.float16).astype(np.float32)
            if is_fp16
            else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        )
        return values

    def rounded(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return float32 values, rounded to the nearest of the type."""
        return self.values(self.bits(values))

    def holds(self, values: npt.NDArray[np.float32]) -> bool:
        """Return True if no value changes by more than 1 % when it is rounded to the type, which changes no result."""
        return bool((np.abs(self.rounded(values) - values) <= _TOLERANCE * np.abs(values)).all())

    def rounded_up(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return positive float32 values, rounded up to values of the type."""
        bits = self.bits(values)
        return self.values(np.where(self.values(bits) < values, bits + np.uint16(1), bits))

    def tensor(self, values: npt.NDArray[Any], name: str) -> onnx.TensorProto:
        """Return a stored tensor of the type with these float32 values."""
        return helper.make_tensor(name, self.kind, values.shape, self.bits(values).tobytes(), raw=True)


FP16 = HalfType("float16", "FP16", TensorProto.FLOAT16, 65504.0, 19, frozenset({"Celu"}))
BF16 = HalfType(
    "bfloat16", "BF16", TensorProto.BFLOAT16, float(np.finfo(np.float32).max), 22,
    frozenset({"Celu", "ConvTranspose", "GRU", "HardSwish", "Mish"}),
)  # fmt: skip
