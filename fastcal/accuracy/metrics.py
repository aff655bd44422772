"""`metric_for`: the metric of what a network's users see."""

from collections.abc import Callable, Mapping
from itertools import accumulate

import onnx

from fastcal.accuracy.base import Metric
from fastcal.accuracy.detections import Detections, Layout
from fastcal.accuracy.labels import Cosine, Sequences, TopOne
from fastcal.accuracy.masks import Masks
from fastcal.accuracy.outputs import Ends, Shapes
from fastcal.errors import FastcalError, ModelError
from fastcal.model import Model

#: The most boxes of a detector that suppresses them itself, with the score and the class of each.
_FEW_BOXES = 1000

#: The least size of a mask as a share of the image's, and the tolerance of its form.
_LEAST, _TOLERANCE = 0.22, 0.05

_SOFTMAX = ("Softmax", "LogSoftmax")
_NORMALIZATIONS = ("BatchNormalization", "LayerNormalization", "LpNormalization")


def metric_for(
    model: Model, shapes: Shapes | None = None, *, name: str | None = None, threshold: float | None = None
) -> Metric | None:
    """Return the metric of what a network's users see, by its outputs' shapes and by what computes them.

    - "boxes": an output of four values for a box and scores, or one of boxes beside one of scores;
    - "masks": an output of the image's form, at least a quarter of its size;
    - "sequences": (N, T, classes) behind a Softmax or a MatMul;
    - "cosine": (N, size) behind a normalization;
    - "top-1": (N, classes) as the only output, or (N, tokens, classes) of a network whose inputs are integers.

    Args:
        model: The float model.
        shapes: The shapes of the inputs and outputs by name, if the model's are dynamic.
        name: The metric to take, whatever computes the outputs, as far as the shapes allow it.
        threshold: The least score of a box, 0.25 by default, or of a mask's pixel, 0.5 by default.

    Returns:
        The metric, without batches; None if the outputs fit none.

    Raises:
        ModelError: No output fits the metric that was named, or the threshold.
        FastcalError: As `check_metric`.
    """
    check_metric(name, threshold)
    ends = Ends(model, shapes)
    names = METRICS if name is None else [name]
    found = next(filter(None, (METRICS[each](ends, each == name) for each in names)), None)
    if found is None and name is not None:
        raise ModelError(f"no output of {model.label} fits metric {name!r}; take another, or a function of your own")
    if threshold is not None:
        if not isinstance(found, Detections | Masks):
            raise ModelError(f"{model.label} has neither boxes nor masks; leave the threshold out")
        found.threshold = threshold
    return found


def check_metric(name: str | None, threshold: float | None) -> None:
    """Raise FastcalError if the name of a metric is unknown, or a threshold out of range."""
    if threshold is not None and not 0 < threshold < 1:
        raise FastcalError(f"the threshold is {threshold}; it must be above 0 and below 1")
    if name is not None and name not in METRICS:
        raise FastcalError(f"there is no metric {name!r}; take one of {', '.join(METRICS)}, or a function of your own")


def _boxes(ends: Ends, is_named: bool) -> Metric | None:
    for output in ends.outputs:
        if layout := _layout(ends, output):
            return Detections(layout)
    rows = {name: _rows(ends.shapes.get(name, ())) for name in ends.outputs}
    for boxes, (count, values) in rows.items():
        scores = [name for name, row in rows.items() if name != boxes and row[0] == count > 1]
        if values == 4 and scores:
            return Detections(Layout(boxes, scores[0], 2, 0, None, "classes"))
    return None


def _layout(ends: Ends, output: str) -> Layout | None:
    """Return the layout of an output that has boxes and scores; None if it does not."""
    shape, pieces = ends.shapes.get(output, ()), ends.pieces(output)
    if pieces is None or len(shape) != 3 or 4 not in (cuts := list(accumulate(pieces.sizes))):
        return None
    if pieces.axis == 2 and 2 not in cuts and cuts == [4, 5, 6] and shape[1] <= _FEW_BOXES:
        return Layout(output, output, 2, 4, None, "labels")
    has_objects = pieces.axis == 2 and not {2, 5}.isdisjoint(cuts[:-1])
    last = None if has_objects else cuts[cuts.index(4) + 1] if cuts[-1] > 4 else 4
    return None if last == 4 else Layout(output, output, pieces.axis, 4, last, "objects" if has_objects else "classes")


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of rows of a sample and that of their values, for boxes or scores; 0 if there are none."""
    if len(shape) == 2:
        return shape[1], 1
    if len(shape) == 4 and shape[2] == 1:
        return shape[1], shape[3]
    return (shape[1], shape[2]) if len(shape) == 3 else (0, 0)


def _masks(ends: Ends, is_named: bool) -> Metric | None:
    size = _image_size(ends)
    large = [name for name in ends.outputs if len(ends.shapes.get(name, ())) in (3, 4)]
    if size is None or not large:
        return None
    axes = {name: _class_axis(ends.shapes[name], size) for name in large}
    if any(axis is False for axis in axes.values()):
        return None
    output, axis = large[0], axes[large[0]]
    classes = 1 if axis is None else ends.shapes[output][axis]
    exclusive = classes > 1 and _operator(ends.source(output)) != "Sigmoid"
    return Masks(output, axis, exclusive)


def _image_size(ends: Ends) -> tuple[int, int] | None:
    shapes = (ends.shapes[name] for name in ends.model.input_names)
    shape = next((shape for shape in shapes if len(shape) == 4), None)
    if shape is None:
        return None
    return shape[1:3] if shape[3] <= 4 < shape[1] else shape[2:]


def _class_axis(shape: tuple[int, ...], size: tuple[int, int]) -> int | bool | None:
    """Return the axis of the classes of masks; None if there is no such axis, False if the shape is no masks'."""
    places = {(1, 2): None} if len(shape) == 3 else {(2, 3): 1, (1, 2): 3}
    for place, axis in places.items():
        ratios = [shape[mine] / whole for mine, whole in zip(place, size, strict=True)]
        is_large = shape[place[0]] * shape[place[1]] > 1
        if is_large and min(ratios) >= _LEAST and max(ratios) <= (1 + _TOLERANCE) * min(ratios):
            return axis
    return False


def _sequences(ends: Ends, is_named: bool) -> Metric | None:
    outputs = [name for name in ends.outputs if len(ends.shapes.get(name, ())) == 3 and ends.shapes[name][2] > 1]
    found = next((name for name in outputs if is_named or _has_scores(ends, name)), None)
    if found is None:
        return None
    if not is_named and all(value.dtype.kind in "iu" for value in ends.model.inputs):
        return TopOne(found, ends.shapes[found][2], tokens=True)
    return Sequences(found)


def _has_scores(ends: Ends, output: str) -> bool:
    """Return True if an output is behind a Softmax, or a MatMul and perhaps a bias."""
    node = ends.source(output)
    if _operator(node) == "Add":
        assert node is not None
        varying = [name for name in node.input if name in ends.model.varying]
        node = ends.source(varying[0]) if len(varying) == 1 else None
    return _operator(node) in (*_SOFTMAX, "MatMul", "Gemm")


def _cosine(ends: Ends, is_named: bool) -> Metric | None:
    vectors = _vectors(ends)
    found = next((name for name in vectors if is_named or _is_normalized(ends, name)), None)
    return None if found is None else Cosine(found)


def _is_normalized(ends: Ends, output: str) -> bool:
    """Return True if an output is normalized: it is divided by its length, or behind an affine normalization."""
    node = ends.source(output)
    if node is None or node.op_type in _NORMALIZATIONS:
        return node is not None
    length = ends.source(node.input[1]) if node.op_type == "Div" else None
    while length is not None and length.op_type in ("Add", "Clip", "Expand", "Max"):
        length = ends.source(length.input[0])
    if _operator(length) in ("Pow", "Sqrt"):
        assert length is not None
        return _operator(ends.source(length.input[0])) in ("ReduceSum", "ReduceSumSquare")
    return _operator(length) == "ReduceL2"


def _top_one(ends: Ends, is_named: bool) -> Metric | None:
    vectors = _vectors(ends)
    if not vectors or (len(ends.outputs) > 1 and not is_named):
        return None
    classes = ends.shapes[vectors[0]][1]
    is_probability = classes > 1 or _operator(ends.source(vectors[0])) == "Sigmoid"
    return TopOne(vectors[0], classes) if is_probability else None


def _vectors(ends: Ends) -> list[str]:
    """Return the outputs of shape (N, size), perhaps with further dimensions of 1."""
    shapes = {name: ends.shapes.get(name, ()) for name in ends.outputs}
    return [name for name, shape in shapes.items() if len(shape) >= 2 and all(size == 1 for size in shape[2:])]


def _operator(node: onnx.NodeProto | None) -> str:
    return "" if node is None else node.op_type


#: The metrics by name, the first that fits is taken: what finds the outputs for each, also if it was named.
METRICS: Mapping[str, Callable[[Ends, bool], Metric | None]] = {
    "boxes": _boxes, "masks": _masks, "sequences": _sequences, "cosine": _cosine, "top-1": _top_one,
}  # fmt: skip
