"""The parts of outputs: each is what one input of a Concat holds, whatever stands between."""

import numpy as np
import onnx
import onnxruntime
import pytest

from fastcal.accuracy.outputs import parts_of
from fastcal.model import Model

RANDOM = np.random.default_rng(0)


def weights(**shapes):
    return {name: RANDOM.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def shape(*sizes):
    return np.array(sizes, np.int64)


def values_of(path, names):
    """Return the tensors of a network by name, as ONNX Runtime computes them for two images."""
    model = onnx.load(path)
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return dict(zip(names, session.run(names, {"x": RANDOM.standard_normal((2, 3, 8, 8)).astype("f4")}), strict=True))


#: Two levels of a detector: feature maps of 8x8 and 4x4.
LEVELS = "a = Relu(x)\n b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)\n"

YOLOV8 = (
    LEVELS
    + """
    box1 = Conv(a, wb) cls1 = Conv(a, wc) both1 = Concat<axis = 1>(box1, cls1) flat1 = Reshape(both1, flat)
    box2 = Conv(b, wb) cls2 = Conv(b, wc) both2 = Concat<axis = 1>(box2, cls2) flat2 = Reshape(both2, flat)
    all = Concat<axis = 2>(flat1, flat2)
    box, cls = Split<axis = 1>(all, sizes)
    boxes = Mul(box, stride) scores = Sigmoid(cls)"""
)
YOLOV8_CONSTANTS = weights(wb=(4, 3, 1, 1), wc=(6, 3, 1, 1)) | {
    "flat": shape(0, 10, -1), "sizes": shape(4, 6), "stride": np.float32(8),
}  # fmt: skip

YOLOV5 = LEVELS + "".join(
    f"""
    c{i} = Conv({map}, wo) grid{i} = Reshape(c{i}, split) rows{i} = Transpose<perm = [0, 1, 3, 4, 2]>(grid{i})
    s{i} = Sigmoid(rows{i}) xy{i}, wh{i}, conf{i} = Split<axis = 4>(s{i}, sizes)
    two{i} = Mul(xy{i}, scale) dxy{i} = Sub(two{i}, half) dwh{i} = Pow(wh{i}, scale)
    row{i} = Concat<axis = -1>(dxy{i}, dwh{i}, conf{i}) flat{i} = Reshape(row{i}, flat)"""
    for i, map in ((1, "a"), (2, "b"))
)
YOLOV5_CONSTANTS = weights(wo=(14, 3, 1, 1)) | {
    "flat": shape(0, -1, 7), "sizes": shape(2, 2, 3), "scale": np.float32(2), "half": np.float32(0.5),
}  # fmt: skip

#: What a YOLOX has on each level: boxes, objects and classes of convolutions of their own.
YOLOX = LEVELS + "".join(
    f"""
    box{i} = Conv({map}, wb) o{i} = Conv({map}, wo) k{i} = Conv({map}, wc) obj{i} = Sigmoid(o{i}) cls{i} = Sigmoid(k{i})
    level{i} = Concat<axis = 1>(box{i}, obj{i}, cls{i}) flat{i} = Reshape(level{i}, flat)"""
    for i, map in ((1, "a"), (2, "b"))
)

SSD = LEVELS + "".join(
    f"""
    {kind}{i} = Conv({map}, w{kind}) t{kind}{i} = Transpose<perm = [0, 2, 3, 1]>({kind}{i})
    r{kind}{i} = Reshape(t{kind}{i}, flat{kind})"""
    for kind in ("box", "cls")
    for i, map in ((1, "a"), (2, "b"))
)


@pytest.mark.parametrize("height", ["8", "H"])
def test_boxes_and_scores_of_all_levels(onnx_file, height):
    path = onnx_file(
        f"f (float[N, 3, {height}, {height}] x) => (float[N, 10, K] y) {{ {YOLOV8}\n"
        "y = Concat<axis = 1>(boxes, scores) }",
        YOLOV8_CONSTANTS,
    )
    found = values_of(path, ["y", "boxes", "scores"])
    for shapes in (None, {"x": (2, 3, 8, 8)}):
        boxes, scores = parts_of(Model(path), shapes)
        assert (boxes.label, scores.label) == ("y[:, 0:4]", "y[:, 4:]")
        assert boxes.axis == scores.axis == 1
        np.testing.assert_array_equal(found["y"][boxes.index], found["boxes"])
        np.testing.assert_array_equal(found["y"][scores.index], found["scores"])


def test_channels_of_different_layers_differ_in_kind_and_levels_do_not(onnx_file):
    path = onnx_file(f"f (float[N, 3, 8, 8] x) => (float[N, 10, K] all) {{ {YOLOV8} }}", YOLOV8_CONSTANTS)
    found = values_of(path, ["all", "box", "cls"])
    boxes, classes = parts_of(Model(path))
    np.testing.assert_array_equal(found["all"][boxes.index], found["box"])
    np.testing.assert_array_equal(found["all"][classes.index], found["cls"])


@pytest.mark.parametrize(
    "outer", ["y = Concat<axis = 1>(flat1, flat2)", "z = Concat<axis = 1>(flat1, flat2) y = Identity(z)"]
)
def test_kinds_within_each_level(onnx_file, outer):
    split = shape(0, 2, 7, 8, 8)
    second = YOLOV5.replace("Reshape(c2, split)", "Reshape(c2, split2)")
    constants = YOLOV5_CONSTANTS | {"split": split, "split2": shape(0, 2, 7, 4, 4)}
    path = onnx_file(f"f (float[N, 3, 8, 8] x) => (float[N, K, 7] y) {{ {second}\n {outer} }}", constants)
    names = ["y", "dxy1", "dwh1", "conf1", "dxy2", "dwh2", "conf2"]
    found = values_of(path, names)
    parts = parts_of(Model(path))
    assert [part.label for part in parts] == ["y[:, :, 0:2]", "y[:, :, 2:4]", "y[:, :, 4:]"]
    for part, kind in zip(parts, ("dxy", "dwh", "conf"), strict=True):
        both = [found[f"{kind}{level}"] for level in (1, 2)]
        expected = np.concatenate([each.reshape(2, -1, each.shape[-1]) for each in both], axis=1)
        np.testing.assert_array_equal(found["y"][part.index], expected)


def test_they_are_followed_through_a_transpose(onnx_file):
    path = onnx_file(
        f"f (float[N, 3, 8, 8] x) => (float[N, K, 8] y) {{ {YOLOX}\n z = Concat<axis = 2>(flat1, flat2) "
        "y = Transpose<perm = [0, 2, 1]>(z) }",
        weights(wb=(4, 3, 1, 1), wo=(1, 3, 1, 1), wc=(3, 3, 1, 1)) | {"flat": shape(0, 8, -1)},
    )
    assert [part.label for part in parts_of(Model(path))] == ["y[:, :, 0:4]", "y[:, :, 4:5]", "y[:, :, 5:]"]


def test_levels_alone_are_one_part(onnx_file):
    path = onnx_file(
        f"f (float[N, 3, 8, 8] x) => (float[N, K, 4] y, float[N, K, 5] z) {{ {SSD}\n"
        "y = Concat<axis = 1>(rbox1, rbox2) l = Concat<axis = 1>(rcls1, rcls2) z = Softmax<axis = 2>(l) }",
        weights(wbox=(8, 3, 1, 1), wcls=(10, 3, 1, 1)) | {"flatbox": shape(0, -1, 4), "flatcls": shape(0, -1, 5)},
    )
    assert [(part.label, part.index) for part in parts_of(Model(path))] == [("y", ()), ("z", ())]


def test_outputs_that_are_no_float_or_constant_are_left_out(onnx_file):
    path = onnx_file(
        "f (float[N, 3] x) => (float[N, 3] y, int64[N, 1] k, float[2] c) { y = Relu(x)\n k = ArgMax<axis = 1>(x) }",
        {"c": np.ones(2, np.float32)},
    )
    assert [part.output for part in parts_of(Model(path))] == ["y"]
