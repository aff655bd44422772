"""The parts of a network's outputs that are compared apart: the boxes and the scores of a detector, for instance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx
from onnx import helper

from fastcal.batch import Shape
from fastcal.model import FLOATS, Model

#: The shapes of tensors by name.
Shapes = Mapping[str, tuple[int, ...]]

#: The operators that change neither values nor order nor shape.
_SAME = ("Cast", "Dropout", "Identity")

#: The operators that only change the shape.
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

#: The operators that multiply by weights, and the axis of their channels.
_CHANNELS = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}

#: The operators whose output has the axes of their first input.
_KEEP_AXES = (
    "Add",
    "Clip",
    "Concat",
    "Div",
    "Exp",
    "Mul",
    "Pow",
    "Relu",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sub",
)

#: The most operators that are looked at behind a tensor, and the most parts of an output: more are not kinds of values.
_DEPTH, _MOST = 6, 8

#: The most channels of an output that are looked at one by one.
_MOST_CHANNELS = 1024


@dataclass(frozen=True)
class Part:
    """A part of an output.

    Attributes:
        output: The output's name.
        label: The name to show: the output's, with the part's place if there are several parts.
        index: The part's place, to index the output with.
    """

    output: str
    label: str
    index: tuple[slice, ...] = field(default=(), hash=False)  # before Python 3.12, slices have none


class _Pieces(NamedTuple):
    """Pieces along an axis of a tensor, each of one kind of values: the kinds and the sizes."""

    axis: int
    kinds: tuple[Any, ...]
    sizes: tuple[int, ...]


def parts_of(model: Model, shapes: Shapes | None = None) -> tuple[Part, ...]:
    """Return the parts of the float outputs of a model, in order.

    The inputs of a Concat at the end of the graph are parts if their values are of different kinds: if different
    operators compute them, or different layers as channels. Pieces of one kind, such as the boxes of a detector's
    levels, are one part. An output without such a Concat is one part.

    Args:
        model: The float model.
        shapes: The shapes of the inputs by name, if the model's are dynamic, and perhaps those of the outputs.
    """
    ends = Ends(model, shapes)
    return tuple(part for name in ends.outputs for part in _split(name, ends.pieces(name)))


def channels_of(part: Part, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """Return each channel of a part of an output of this shape: along the axis of the parts, else the second.

    An output of three axes that is one part has no channels, since any axis may be theirs, nor has a part with more
    than 1024 or only one.
    """
    axis = max(len(part.index) - 1, 1)
    if len(shape) <= axis or (len(shape) == 3 and not part.index):
        return ()
    channels = range(shape[axis])[part.index[axis] if part.index else slice(None)]
    if not 1 < len(channels) <= _MOST_CHANNELS:
        return ()
    before = (slice(None),) * axis
    labels = (f"{part.output}[{':, ' * axis}{channel}]" for channel in channels)
    return tuple(
        Part(part.output, label, (*before, slice(channel, channel + 1)))
        for label, channel in zip(labels, channels, strict=True)
    )


def _split(output: str, pieces: _Pieces | None) -> list[Part]:
    if pieces is None:
        return [Part(output, output)]
    starts = [sum(pieces.sizes[:index]) for index in range(len(pieces.sizes))]
    parts = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        place = f"{start}:{'' if end is None else end}"
        index = (*[slice(None)] * pieces.axis, slice(start, end))
        parts.append(Part(output, f"{output}[{':, ' * pieces.axis}{place}]", index))
    return parts


class Ends:
    """The end of a model's graph: what computes the outputs.

    Attributes:
        model: The model.
        outputs: The names of the float outputs that depend on the inputs.
        shapes: The shapes of the tensors by name, as far as they are known.
    """

    def __init__(self, model: Model, shapes: Shapes | None = None) -> None:
        self.model = model
        names = [value.name for value in model.proto.graph.output]
        self.outputs = [name for name in names if model.types.get(name) in FLOATS and name in model.varying]
        self._producers = {name: node for node in model.proto.graph.node for name in node.output if name}
        inputs = {value.name: _known(value.shape) for value in model.inputs}
        inputs |= {name: shape for name, shape in (shapes or {}).items() if name in inputs}
        self.shapes = {**inputs, **model.shapes(inputs), **(shapes or {})}

    def source(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes a tensor's values, whatever changes their shape afterwards."""
        node = self._producers.get(name)
        while node is not None and node.op_type in (*_SAME, *_RESHAPING):
            node = self._producers.get(node.input[0])
        return node

    def pieces(self, name: str) -> _Pieces | None:
        """Return the pieces of a tensor that a Concat puts together; None if there is one kind of values."""
        node = self._producers.get(name)
        if node is None:
            return None
        if node.op_type in (*_SAME, *_RESHAPING):
            inner = self.pieces(node.input[0])
            axis = None if inner is None else self._axis_behind(node, inner.axis)
            return None if inner is None or axis is None else inner._replace(axis=axis)
        return self._joined(node) if node.op_type == "Concat" else None

    def softmax_axis(self, name: str) -> int | None:
        """Return the axis of the classes if a Softmax computes a tensor, whatever changes the shape behind it."""
        node = self._producers.get(name)
        if node is None:
            return None
        if node.op_type in (*_SAME, *_RESHAPING):
            axis = self.softmax_axis(node.input[0])
            return None if axis is None else self._axis_behind(node, axis)
        rank = len(self.shapes.get(name, ()))
        return _attribute(node, "axis", -1) % rank if node.op_type == "Softmax" and rank else None

    def _joined(self, node: onnx.NodeProto) -> _Pieces | None:
        """Return the pieces of a Concat's output."""
        rank = len(self.shapes.get(node.output[0], ()))
        axis = _attribute(node, "axis", 0) % max(rank, 1)
        if axis == 0 or any(len(self.shapes.get(name, ())) != rank for name in node.input):
            return None
        inner = [self.pieces(name) for name in node.input]
        first = inner[0]
        if first is not None and first.axis != axis and len({each and (each.axis, each.sizes) for each in inner}) == 1:
            return first
        kinds: list[Any] = []
        sizes: list[int] = []
        for name, found in zip(node.input, inner, strict=True):
            if found is None or found.axis != axis:
                found = _Pieces(axis, (self._kind(name, axis),), (self.shapes[name][axis],))
            for kind, size in zip(found.kinds, found.sizes, strict=True):
                if kinds[-1:] == [kind]:
                    sizes[-1] += size
                else:
                    kinds.append(kind)
                    sizes.append(size)
        return _Pieces(axis, tuple(kinds), tuple(sizes)) if 1 < len(kinds) <= _MOST else None

    def _kind(self, name: str, axis: int | None) -> Any:
        """Return the kind of values of a tensor: the operators behind it, or its name for channels along the axis.

        Channels of different layers differ in kind; places in an image, as those of a detector's levels, do not.
        """
        operators: list[str] = []
        tensor = name
        while len(operators) < _DEPTH and (node := self._producers.get(tensor)) is not None:
            rank = len(self.shapes.get(tensor, ()))
            if node.op_type in _CHANNELS:
                is_channel = axis is not None and rank and axis == _CHANNELS[node.op_type] % rank
                return name if is_channel else (*operators, node.op_type)
            if node.op_type in (*_SAME, *_RESHAPING):
                axis = None if axis is None else self._axis_before(node, axis)
            else:
                operators.append(node.op_type)
                axis = axis if node.op_type in _KEEP_AXES else None
            tensor = next((each for each in node.input if each in self.model.varying), "")
        return tuple(operators)

    def _axis_behind(self, node: onnx.NodeProto, axis: int) -> int | None:
        """Return the axis of the output of a node that changes the shape, for an axis of its input."""
        if node.op_type in _SAME:
            return axis
        if node.op_type == "Transpose":
            perm = self._perm(node)
            return perm.index(axis) if axis in perm else None
        return _same_axis(self.shapes.get(node.input[0], ()), axis, self.shapes.get(node.output[0], ()))

    def _axis_before(self, node: onnx.NodeProto, axis: int) -> int | None:
        """Return the axis of the input of a node that changes the shape, for an axis of its output."""
        if node.op_type in _SAME:
            return axis
        if node.op_type == "Transpose":
            perm = self._perm(node)
            return perm[axis] if axis < len(perm) else None
        return _same_axis(self.shapes.get(node.output[0], ()), axis, self.shapes.get(node.input[0], ()))

    def _perm(self, node: onnx.NodeProto) -> list[int]:
        rank = len(self.shapes.get(node.input[0], ()))
        return list(_attribute(node, "perm", range(rank)[::-1]))


def _known(shape: Shape) -> tuple[int, ...]:
    """Return a shape with sizes in place of dynamic ones: 1 sample, and any size that strides divide."""
    return tuple(size or (256 if axis else 1) for axis, size in enumerate(shape))


def _same_axis(shape: tuple[int, ...], axis: int, other: tuple[int, ...]) -> int | None:
    """Return the axis of `other` that has the elements of an axis of `shape`, in the same order, after a reshape."""
    if axis >= len(shape):
        return None
    after = math.prod(shape[axis + 1 :])
    same = (index for index, size in enumerate(other) if size == shape[axis] and math.prod(other[index + 1 :]) == after)
    return next(same, None)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(value) for value in node.attribute if value.name == name), default)
