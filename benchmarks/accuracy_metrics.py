"""Metrics of the accuracy benchmark: how much an INT8 model's answers are those of the FP32 model.

Nothing here is fastcal's. Each metric takes the FP32 and the INT8 outputs of some samples and returns two numbers; the
metric of all samples is the sum of the first over the sum of the second.
"""

import numpy as np
import onnx
import onnxruntime

BATCH = 8
SCORE, SAME_BOX, SUPPRESSED = 0.25, 0.5, 0.45


def session(model, threads):
    """Return an ONNX Runtime session that computes what the model says: no graph optimization fuses Q/DQ pairs away."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def batches(samples):
    """Yield dicts of arrays of at most `BATCH` samples."""
    for first in range(0, len(next(iter(samples.values()))), BATCH):
        yield {name: array[first : first + BATCH] for name, array in samples.items()}


def top1(exact, other):
    """Count the samples whose best class is FP32's."""
    return np.sum(exact.argmax(axis=1) == other.argmax(axis=1)), len(exact)


def lines(exact, other):
    """Count the lines of text that decode (CTC, best path, class 0 is the blank) to the same characters as FP32's."""

    def decoded(best):
        return [int(now) for before, now in zip([-1, *best[:-1]], best, strict=True) if now not in (before, 0)]

    pairs = zip(exact.argmax(axis=2).tolist(), other.argmax(axis=2).tolist(), strict=True)
    return sum(decoded(one) == decoded(two) for one, two in pairs), len(exact)


def mask(exact, other, threshold=0.5):
    """Add up the samples' intersections over unions of the masks above the threshold."""
    one, two = (values.reshape(len(values), -1) > threshold for values in (exact, other))
    both, either = (one & two).sum(axis=1), (one | two).sum(axis=1)
    return np.where(either, both / np.maximum(either, 1), 1).sum(), len(exact)


def textmask(exact, other):
    """Add up the samples' intersections over unions of the masks above PP-OCR's threshold for text."""
    return mask(exact, other, 0.3)


def boxes(exact, other):
    """Count for the F1 score of boxes: twice the boxes that are in both outputs, and all boxes of both."""
    same = total = 0
    for one, two in zip(map(_boxes, exact), map(_boxes, other), strict=True):
        total += len(one) + len(two)
        overlaps = _overlaps(one, two)
        for row in overlaps:  # of FP32's boxes, the best first
            if row.size and row.max() >= SAME_BOX:
                same += 2
                overlaps[:, row.argmax()] = 0
    return same, total


def _boxes(output):
    """Return YOLOv8's boxes of an image, (N, 5): corners and class, the best first, after suppression by class."""
    scores = output[4:].max(axis=0)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= SCORE]
    x, y, w, h = output[:4, order]
    found = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2, output[4:, order].argmax(axis=0)], axis=1)
    kept = np.empty((0, 5))
    for box in found:
        if not (_overlaps(box[None], kept) > SUPPRESSED).any():
            kept = np.vstack([kept, box])
    return kept


def _overlaps(one, two):
    """Return the intersections over unions of boxes, (len(one), len(two)); 0 for boxes of unlike classes."""
    corners = np.maximum(one[:, None, :2], two[None, :, :2]), np.minimum(one[:, None, 2:4], two[None, :, 2:4])
    both = np.prod(np.maximum(corners[1] - corners[0], 0), axis=2)
    areas = [np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1) for boxes in (one, two)]
    overlaps = both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-12)
    return np.where(one[:, None, 4] == two[None, :, 4], overlaps, 0)


METRICS = {function.__name__: function for function in (top1, lines, mask, textmask, boxes)}
LABELS = {
    "top1": "top-1 agreement",
    "lines": "equal lines",
    "mask": "mask IoU",
    "textmask": "mask IoU",
    "boxes": "boxes' F1",
}


def parts(metric, output):
    """Return the parts of an output whose noise is measured apart: a detector's boxes, in pixels, and its scores."""
    return {"boxes": output[:, :4], "scores": output[:, 4:]} if metric == "boxes" else {"output": output}


def int8_share(path, sample, threads):
    """Return the share of multiply-adds in INT8 in the layers with weights, and the same without depthwise layers.

    A layer is in INT8 if a DequantizeLinear gives its input, be it through layers that only move values, and another
    is in what computes its weights.
    """
    model = onnx.load(path)
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    varying = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    for node in graph.node:
        if varying & set(node.input):
            varying.update(node.output)
    layers = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and node.input[0] in varying
        and node.input[1] not in varying
    ]
    names = sorted({name for node in layers for name in (*node.input[:2], node.output[0])})
    known = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    runner = session(model.SerializeToString(), threads)
    shapes = dict(zip(names, (value.shape for value in runner.run(names, sample)), strict=True))
    counts = np.zeros((2, 2))  # of all and of INT8, with and without depthwise layers
    for node in layers:
        work = _multiply_adds(node, *(shapes[name] for name in (*node.input[:2], node.output[0])))
        quantized = _moved_from_int8(node.input[0], producers) and _from_int8(node.input[1], producers)
        depthwise = node.op_type == "Conv" and shapes[node.input[1]][1] == 1 and _attribute(node, "group", 1) > 1
        counts += work * np.outer([1, quantized], [1, not depthwise])
    return counts[1] / counts[0]


def _multiply_adds(node, read, weights, written):
    if node.op_type == "Conv":
        return np.prod(written) * np.prod(weights[1:])
    if node.op_type == "ConvTranspose":
        return np.prod(read) * np.prod(weights[1:])
    return np.prod(written) * weights[-1 if _attribute(node, "transB", 0) else -2]


def _attribute(node, name, default):
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


MOVING = ("Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def _moved_from_int8(name, producers):
    node = producers.get(name)
    if node is None or node.op_type not in MOVING:
        return node is not None and node.op_type == "DequantizeLinear"
    read = node.input if node.op_type == "Concat" else node.input[:1]
    return all(_moved_from_int8(source, producers) for source in read)


def _from_int8(name, producers):
    node = producers.get(name)
    return node is not None and (
        node.op_type == "DequantizeLinear" or any(_from_int8(source, producers) for source in node.input)
    )
