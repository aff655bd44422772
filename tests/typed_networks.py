"""Small networks of the structures that people quantize, with random weights, for the tests of typed models."""

import numpy as np
import onnx
from onnx import numpy_helper

#: By name: the graph in ONNX's text format, the shapes of its weights, and the shapes of its inputs.
NETWORKS = {
    "residual": (
        """f (float[N, 3, 16, 16] x) => (float[N, 8, 8, 8] y) {
          c0 = Conv<pads = [1, 1, 1, 1]>(x, w0, b) n0 = BatchNormalization(c0, b, b, b, v) r0 = Relu(n0)
          c1 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r0, w1, b) r1 = Relu(c1)
          c2 = Conv<pads = [1, 1, 1, 1]>(r1, w1, b) short = Conv<strides = [2, 2]>(r0, w2, b)
          s = Add(c2, short) y = Relu(s)
        }""",
        {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 8, 1, 1), "b": (8,), "v": (8,)},
        {"x": (2, 3, 16, 16)},
    ),
    "depthwise": (
        """f (float[N, 8, 12, 12] x) => (float[N, 8, 12, 12] y) {
          e = Conv(x, w0, b16) es = Sigmoid(e) ea = Mul(e, es)
          d = Conv<group = 16, pads = [1, 1, 1, 1]>(ea, wd, b16) ds = Sigmoid(d) da = Mul(d, ds)
          m = ReduceMean<axes = [2, 3], keepdims = 1>(da) q = Conv(m, w1, b4) qr = HardSwish(q)
          u = Conv(qr, w2, b16) g = HardSigmoid(u) se = Mul(da, g) p = Conv(se, w3, b8) y = Add(p, x)
        }""",
        {
            "w0": (16, 8, 1, 1), "wd": (16, 1, 3, 3), "w1": (4, 16, 1, 1), "w2": (16, 4, 1, 1), "w3": (8, 16, 1, 1),
            "b4": (4,), "b8": (8,), "b16": (16,),
        },
        {"x": (2, 8, 12, 12)},
    ),
    "concat": (
        """f (float[N, 8, 16, 16] x) => (float[N, 4, 64] boxes, float[N, 3, 64] scores) {
          a = Conv(x, w0, b) as = Sigmoid(a) am = Mul(a, as)
          l, r = Split<axis = 1>(am, halves) k = Conv<pads = [1, 1, 1, 1]>(r, w1, b4) km = Relu(k) z = Add(r, km)
          t = Concat<axis = 1>(l, r, z) c = Conv<strides = [2, 2]>(t, w2, b)
          p = MaxPool<kernel_shape = [5, 5], pads = [2, 2, 2, 2]>(c) i = Resize<mode = "nearest">(p, , sizes)
          j = Concat<axis = 1>(i, am) h = Conv<strides = [2, 2]>(j, w3, b7) f = Reshape(h, shape)
          box, score = Split<axis = 1>(f, parts) soft = Softmax<axis = 1>(box) boxes = Mul(soft, anchors)
          scores = Sigmoid(score)
        }""",
        {
            "w0": (8, 8, 1, 1), "w1": (4, 4, 3, 3), "w2": (8, 12, 1, 1), "w3": (7, 16, 1, 1), "b": (8,), "b4": (4,),
            "b7": (7,), "anchors": (1, 4, 64), "halves": np.int64([4, 4]), "parts": np.int64([4, 3]),
            "shape": np.int64([0, 7, 64]), "sizes": np.float32([1, 1, 2, 2]),
        },
        {"x": (2, 8, 16, 16)},
    ),
    "transposed": (
        """f (float[N, 4, 8, 8] x) => (float[N, 2, 32, 32] y) {
          c = Conv<pads = [1, 1, 1, 1]>(x, w0, b) r = LeakyRelu<alpha = 0.1>(c)
          u = ConvTranspose<strides = [2, 2]>(r, w1, b) n = InstanceNormalization(u, b, b) k = Relu(n)
          g = ConvTranspose<strides = [2, 2], group = 2>(k, w2, b2) y = Tanh(g)
        }""",
        {"w0": (6, 4, 3, 3), "w1": (6, 6, 2, 2), "w2": (6, 1, 2, 2), "b": (6,), "b2": (2,)},
        {"x": (2, 4, 8, 8)},
    ),
    "attention": (
        """f (float[N, 6, 16] x) => (float[N, 6, 16] y) {
          l = LayerNormalization<axis = -1>(x, g, g) qp = MatMul(l, wq) q0 = Add(qp, g) kp = MatMul(l, wk)
          vp = MatMul(l, wv) q1 = Reshape(q0, heads) k1 = Reshape(kp, heads) v1 = Reshape(vp, heads)
          q = Transpose<perm = [0, 2, 1, 3]>(q1) k = Transpose<perm = [0, 2, 3, 1]>(k1)
          v = Transpose<perm = [0, 2, 1, 3]>(v1) s0 = MatMul(q, k) s = Mul(s0, half) p = Softmax<axis = -1>(s)
          o = MatMul(p, v) o1 = Transpose<perm = [0, 2, 1, 3]>(o) o2 = Reshape(o1, flat) o3 = MatMul(o2, wo)
          a = Add(o3, x) m = ReduceMean<axes = [-1]>(a) d = Sub(a, m) d2 = Pow(d, two)
          var = ReduceMean<axes = [-1]>(d2) ve = Add(var, eps) sd = Sqrt(ve) n = Div(d, sd) ng = Mul(n, g)
          f = MatMul(ng, w1) e0 = Mul(f, half) e1 = Erf(e0) e2 = Add(e1, one) e3 = Mul(f, e2) h = MatMul(e3, w2)
          y = Add(h, a)
        }""",
        {
            "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "w1": (16, 32), "w2": (32, 16), "g": (16,),
            "heads": np.int64([0, 6, 2, 8]), "flat": np.int64([0, 6, 16]), "half": np.float32(0.5),
            "two": np.float32(2), "one": np.float32(1), "eps": np.float32(1e-12),
        },
        {"x": (2, 6, 16)},
    ),
    "lstm": (
        """f (float[2, 4, 6, 10] x) => (float[10, 2, 5] y) {
          c = Conv<pads = [1, 1, 1, 1]>(x, w0, b) r = Relu(c) m = MaxPool<kernel_shape = [6, 1]>(r)
          s = Squeeze(m, axis) t = Transpose<perm = [2, 0, 1]>(s)
          l, h, cell = LSTM<hidden_size = 5, direction = "bidirectional">(t, wl, rl, bl)
          u = Transpose<perm = [0, 2, 1, 3]>(l) v = Reshape(u, shape) z = MatMul(v, w1) y = Add(z, b5)
        }""",
        {
            "w0": (8, 4, 3, 3), "wl": (2, 20, 8), "rl": (2, 20, 5), "bl": (2, 40), "w1": (10, 5), "b": (8,),
            "b5": (5,), "axis": np.int64([2]), "shape": np.int64([10, 2, 10]),
        },
        {"x": (2, 4, 6, 10)},
    ),
    "gemm": (
        """f (float[N, 12] x) => (float[N, 3] y, float[N, 3] log_odds, int64[N, 1] best) {
          g = Gemm<transB = 1>(x, w0, b) r = Relu(g) log_odds = Gemm<beta = 0.5>(r, w1, b3)
          y = Softmax<axis = 1>(log_odds) best = ArgMax<axis = 1>(log_odds)
        }""",
        {"w0": (8, 12), "w1": (8, 3), "b": (8,), "b3": (3,)},
        {"x": (64, 12)},
    ),
    "grouped": (
        """f (float[N, 8, 10, 10] x) => (float[N, 5] y) {
          c = Conv<pads = [1, 1, 1, 1], group = 2>(x, w0, b) r = Clip(c, zero, six)
          s = Reshape(r, groups) t = Transpose<perm = [0, 2, 1, 3, 4]>(s) u = Reshape(t, joined)
          d = Conv<group = 4>(u, w1, b) e = PRelu(d, slope) p = AveragePool<kernel_shape = [2, 2]>(e)
          k = Conv(p, w2, b) g = GlobalAveragePool(k) f = Flatten(g) y = Gemm<transB = 1>(f, w3, b5)
        }""",
        {
            "w0": (8, 4, 3, 3), "w1": (8, 2, 1, 1), "w2": (8, 8, 3, 3), "w3": (5, 8), "b": (8,), "b5": (5,),
            "slope": (8, 1, 1), "zero": np.float32(0), "six": np.float32(6), "groups": np.int64([0, 2, 4, 10, 10]),
            "joined": np.int64([0, 8, 10, 10]),
        },
        {"x": (4, 8, 10, 10)},
    ),
}  # fmt: skip


def write_network(name, folder, opset=17):
    """Write a network of `NETWORKS`; return its path and three batches."""
    graph, shapes, inputs = NETWORKS[name]
    random = np.random.default_rng(len(graph))
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')
    for key, shape in shapes.items():
        if isinstance(shape, tuple):
            values = random.standard_normal(shape, dtype="f4") / np.float32(np.sqrt(np.prod(shape[1:])))
            values = np.abs(values) + np.float32(0.5) if key in ("v", "g") else values
        else:
            values = shape
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), key))
    onnx.save(model, folder / f"{name}.onnx")
    batches = [{key: random.standard_normal(shape, dtype="f4") for key, shape in inputs.items()} for _ in range(3)]
    return folder / f"{name}.onnx", batches
