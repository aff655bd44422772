"""Detectors of two levels without a backbone: graphs in ONNX's text format, and their constants."""

import numpy as np

RANDOM = np.random.default_rng(0)


def weights(**shapes):
    return {name: RANDOM.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def shape(*sizes):
    return np.array(sizes, np.int64)


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
    c{i} = Conv({map}, wo) grid{i} = Reshape(c{i}, split{i}) rows{i} = Transpose<perm = [0, 1, 3, 4, 2]>(grid{i})
    s{i} = Sigmoid(rows{i}) xy{i}, wh{i}, conf{i} = Split<axis = 4>(s{i}, sizes)
    two{i} = Mul(xy{i}, scale) dxy{i} = Sub(two{i}, half) dwh{i} = Pow(wh{i}, scale)
    row{i} = Concat<axis = -1>(dxy{i}, dwh{i}, conf{i}) flat{i} = Reshape(row{i}, flat)"""
    for i, map in ((1, "a"), (2, "b"))
)
YOLOV5_CONSTANTS = weights(wo=(14, 3, 1, 1)) | {
    "flat": shape(0, -1, 7), "split1": shape(0, 2, 7, 8, 8), "split2": shape(0, 2, 7, 4, 4),
    "sizes": shape(2, 2, 3), "scale": np.float32(2), "half": np.float32(0.5),
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

#: The graphs and constants by name. HEIGHT stands for the images' height and width.
DETECTORS = {
    "yolov8": (
        f"f (float[N, 3, HEIGHT, HEIGHT] x) => (float[N, 10, K] y) {{ {YOLOV8}\ny = Concat<axis = 1>(boxes, scores) }}",
        YOLOV8_CONSTANTS,
    ),
    "yolov8 undecoded": (
        f"f (float[N, 3, HEIGHT, HEIGHT] x) => (float[N, 10, K] all) {{ {YOLOV8} }}",
        YOLOV8_CONSTANTS,
    ),
    "yolov5": (
        f"f (float[N, 3, HEIGHT, HEIGHT] x) => (float[N, K, 7] y) {{ {YOLOV5}\n z = Concat<axis = 1>(flat1, flat2)\n"
        "y = Identity(z) }",
        YOLOV5_CONSTANTS,
    ),
    "yolox": (
        f"f (float[N, 3, HEIGHT, HEIGHT] x) => (float[N, K, 8] y) {{ {YOLOX}\n z = Concat<axis = 2>(flat1, flat2)\n"
        "y = Transpose<perm = [0, 2, 1]>(z) }",
        weights(wb=(4, 3, 1, 1), wo=(1, 3, 1, 1), wc=(3, 3, 1, 1)) | {"flat": shape(0, 8, -1)},
    ),
    "ssd": (
        f"f (float[N, 3, HEIGHT, HEIGHT] x) => (float[N, K, 4] y, float[N, K, 5] z) {{ {SSD}\n"
        "y = Concat<axis = 1>(rbox1, rbox2) l = Concat<axis = 1>(rcls1, rcls2) z = Softmax<axis = 2>(l) }",
        weights(wbox=(8, 3, 1, 1), wcls=(10, 3, 1, 1)) | {"flatbox": shape(0, -1, 4), "flatcls": shape(0, -1, 5)},
    ),
}
