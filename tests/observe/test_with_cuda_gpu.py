"""A network observed on a GPU by ONNX Runtime: the scales of the CPU, and TensorRT's, whatever the network."""

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import onnx
import pytest

import fastcal
from conftest import DATA, DIGITS, ROOT, SQUEEZENET, needs_squeezenet, squeezenet_batches
from fastcal import FastcalError, ImageFeed
from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.model import Model
from fastcal.observe.histogram import BINS
from fastcal.thresholds import divergences

pytestmark = pytest.mark.gpu("onnxruntime-gpu")

with_cuda = pytest.importorskip("fastcal.observe.with_cuda", exc_type=ImportError)


def on_cpu(path, batches):
    """Return the histograms of a network's tensors on the CPU, and the tensors that share scales."""
    from fastcal.observe.with_onnxruntime import OnnxRuntimeObserver

    with OnnxRuntimeObserver(Model(path)) as observer:
        for batch in batches:
            observer.observe(batch)
        return dict(observer.histograms()), observer.shared_scales


def scales_on_cpu(path, batches, algorithm):
    histograms, shared = on_cpu(path, batches)
    scales = Algorithm.of(algorithm).pick_all(histograms)
    return scales | {name: scales[source] for name, source in shared.items()}


def excess(histogram, scale):
    """Return the divergence of a scale less the smallest divergence, as a share of the smallest."""
    bins = round(scale * 127 / histogram.width - 0.5)
    found = divergences(histogram.counts[None])[0]
    return found[bins - 128] / found.min() - 1 if 128 <= bins <= BINS else np.inf


@needs_squeezenet
@pytest.mark.parametrize(("algorithm", "share", "tolerance"), [("minmax", 1, 1e-6), ("entropy2", 0.97, 1e-5)])
def test_squeezenet_has_tensorrts_scales(algorithm, share, tolerance):
    theirs = CalibrationCache.load(DATA / f"squeezenet1_1.{algorithm}.cache").scales
    cache = fastcal.calibrate(SQUEEZENET, list(squeezenet_batches()), algorithm=algorithm, exact=True)
    assert cache.observed.backend == "onnxruntime"
    ours, histograms, shared = cache.scales, cache.observed.histograms, cache.observed.shared_scales
    assert all("Constant" in name for name in theirs.keys() - ours.keys())
    far = [name for name in ours if ours[name] != pytest.approx(theirs[name], rel=tolerance)]
    assert len(far) <= (1 - share) * len(ours)
    assert max((excess(histograms[shared.get(name, name)], theirs[name]) for name in far), default=0) < 0.001


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two networks of torchvision: one with channel shuffles, one with hard-swish and squeeze-and-excitation."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision to export networks with")
    folder = tmp_path_factory.mktemp("exported")
    subprocess.run([sys.executable, ROOT / "benchmarks" / "export.py", folder], check=True)
    return folder


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_networks_have_the_scales_of_the_cpu(exported, name):
    path = exported / f"{name}.onnx"
    batches = [{"input": np.random.default_rng(n).standard_normal((4, 3, 128, 128), dtype="f4")} for n in range(4)]
    histograms, _ = on_cpu(path, batches)
    # Both round to float32, and each differs by up to 2e-6 from the same network in float64.
    for algorithm, tolerance in (("minmax", 4e-6), ("entropy2", 1e-5)):
        expected = scales_on_cpu(path, batches, algorithm)
        found = fastcal.calibrate(path, batches, algorithm=algorithm, exact=True).scales
        assert found.keys() == expected.keys()
        worst = max(abs(found[key] / expected[key] - 1) for key in found if expected[key])
        far = [name for name in found if found[name] != pytest.approx(expected[name], rel=tolerance)]
        print(f"{name}, {algorithm}: {len(found) - len(far)} of {len(found)} within {tolerance}, worst {worst:.1e}")
        assert len(far) <= (0 if algorithm == "minmax" else 0.03 * len(found))
        assert max((excess(histograms[name], found[name]) for name in far), default=0) < 0.001


def normal(*shape, dtype="f4", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rows(dtype="f4", count=5):
    return [{"x": (number + 1) * normal(4, 8, seed=number).astype(dtype)} for number in range(count)]


#: Graphs, each with batches for it.
GRAPHS = {
    "operators without a CUDA kernel": (
        """f (float[N, 8] x) => (float[N, 8] y)
        { a = Relu(x) u = LpNormalization(a) s = Softplus(u) t = Atanh(u) v = Exp(a) y = Sinh(s) }""",
        rows(),
    ),
    "sizes computed in float": (
        """f (float[N, 1, 8, 8] x) => (float[N, 1, P, Q] y) {
            a = Relu(x) s = Shape(a) f = Cast<to = 1>(s) k = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>()
            g = Mul(f, k) i = Cast<to = 7>(g) y = Resize(a, , , i) }""",
        [{"x": normal(3, 1, 8, 8, seed=number)} for number in range(3)],
    ),
    "shapes that depend on the data": (
        """f (float[N, 8] x) => (float[M] y) {
            n = NonZero(x) f = Cast<to = 1>(n) g = Relu(f) t = Transpose(n) v = GatherND(x, t) y = Exp(v) }""",
        [{"x": np.maximum(batch["x"], 0)} for batch in rows()],
    ),
    "half precision": ("f (float16[N, 8] x) => (float[N, 8] y) { a = Relu(x) y = Cast<to = 1>(a) }", rows("f2")),
    "double precision": ("f (double[N, 8] x) => (double[N, 8] y) { a = Relu(x) y = Sigmoid(a) }", rows("f8")),
    "If": (
        """f (float[N, 8] x) => (float[N, 8] y) {
            s = ReduceSum<keepdims = 0>(x) z = Constant<value = float {0.0}>() c = Greater(s, z)
            w = If (c) <then_branch = a () => (float[N, 8] p) { p = Relu(x) },
                        else_branch = b () => (float[N, 8] q) { q = Sigmoid(x) }>
            y = Exp(w) }""",
        rows(),
    ),
    "Loop": (
        """f (float[N, 8] x) => (float[N, 8] y) {
            n = Constant<value = int64 {3}>() c = Constant<value = bool {1}>()
            w = Loop (n, c, x) <body = b (int64 i, bool g, float[N, 8] p) => (bool h, float[N, 8] q)
                { h = Identity(g) q = Mul(p, p) }>
            y = Relu(w) }""",
        rows(count=2),
    ),
    "rounding up in pooling": (
        """f (float[N, 2, 9, 9] x) => (float[N, 2, P, Q] y) {
            a = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1>(x)
            b = AveragePool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(x) c = Relu(a) y = Relu(b) }""",
        [{"x": normal(3, 2, 9, 9, seed=number)} for number in range(3)],
    ),
    "batches of different sizes": (
        "f (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) y = Sigmoid(a) }",
        [{"x": size * normal(size, 8, seed=size)} for size in (3, 5, 3, 1)],
    ),
    "an integer input": (
        """f (int64[N, 2] i, float[N, 8] x) => (float[N, 8] y)
        { f = Cast<to = 1>(i) s = ReduceMax<keepdims = 1, axes = [1]>(f) y = Mul(x, s) }""",
        [{"i": np.random.default_rng(0).integers(0, 5, (4, 2)), **batch} for batch in rows()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("on_device", [False, True], ids=["from the host", "on the GPU"])
def test_every_tensor_counts_as_on_the_cpu(onnx_file, name, on_device):
    import cupy

    graph, batches = GRAPHS[name]
    path = onnx_file(graph)
    given = [{key: cupy.asarray(array) for key, array in batch.items()} for batch in batches] if on_device else batches
    found = fastcal.calibrate(path, given, algorithm="minmax")
    assert found.scales == pytest.approx(scales_on_cpu(path, batches, "minmax"), rel=1e-5)
    counts = {key: int(histogram.counts.sum()) for key, histogram in found.observed.histograms.items()}
    assert counts == {key: int(histogram.counts.sum()) for key, histogram in on_cpu(path, batches)[0].items()}


def test_a_shape_that_onnx_infers_wrongly_is_found_out(onnx_file, monkeypatch, caplog):
    monkeypatch.setattr(Model, "shapes", lambda *_: {"a": (7, 7), "y": (4, 8)})
    path = onnx_file("f (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) y = Sigmoid(a) }")
    expected = scales_on_cpu(path, rows(), "minmax")
    with caplog.at_level(logging.DEBUG, "fastcal"):
        assert fastcal.calibrate(path, rows(), algorithm="minmax").scales == pytest.approx(expected, rel=1e-6)
    assert "allocates the tensors" in caplog.text


def test_tensors_that_do_not_fit_the_memory_are_seen_in_several_passes(onnx_file, caplog):
    path = onnx_file("f (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) b = Exp(a) y = Sigmoid(b) }")
    found = []
    for memory in (None, 600):
        with (
            caplog.at_level(logging.WARNING, "fastcal"),
            with_cuda.CudaObserver(Model(path), memory=memory) as observer,
        ):
            for batch in rows():
                observer.observe(batch)
            found.append({name: histogram.counts.tolist() for name, histogram in observer.histograms().items()})
            addresses = [array.data.mem.ptr for runner in observer._runners for array in runner._shown.values()]
            assert len(set(addresses)) == 1  # the sessions share a block
            if memory is not None:
                assert max(runner.bytes for runner in observer._runners) <= memory
    assert found[0] == found[1]
    assert "the network runs 2 times over each batch" in caplog.text
    with (
        pytest.raises(FastcalError, match=r"'a' of a batch takes .* smaller batch size"),
        with_cuda.CudaObserver(Model(path), memory=100) as observer,
    ):
        observer.observe(rows()[0])


def test_the_same_bytes_every_time(tmp_path):
    caches = []
    for _ in range(3):
        with ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=50, device="cuda") as feed:
            caches.append(fastcal.calibrate(DIGITS / "digits.onnx", feed).to_bytes())
    assert len(set(caches)) == 1


def test_tf32_is_rounded_and_recorded():
    batches = [{"image": np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype="f4")}]
    caches = {
        tf32: fastcal.calibrate(DIGITS / "digits.onnx", batches, algorithm="minmax", tf32=tf32)
        for tf32 in (False, True)
    }
    assert [cache.record.entries["precision"] for cache in caches.values()] == ["FP32", "TF32"]
    exact = scales_on_cpu(DIGITS / "digits.onnx", batches, "minmax")
    assert caches[False].scales == pytest.approx(exact, rel=1e-6)
    assert caches[True].scales == pytest.approx(exact, rel=1e-2)
    assert caches[True].scales != pytest.approx(exact, rel=1e-6)


def test_the_operators_on_the_cpu_are_named_once(onnx_file, caplog):
    graph, batches = GRAPHS["operators without a CUDA kernel"]
    with caplog.at_level(logging.DEBUG, "fastcal"):
        fastcal.calibrate(onnx_file(graph), batches)
    said = [record.getMessage() for record in caplog.records if "CUDA kernel" in record.getMessage()]
    assert said == ["ONNX Runtime has no CUDA kernel for Atanh, Sinh, or prefers the CPU there"]


def test_what_was_started_early_is_taken_over(onnx_file, monkeypatch):
    from fastcal.observe.backends import start_early

    path = onnx_file("f (float[N, 8] x) => (float[N, 8] y) { y = Relu(x) }")
    expected = fastcal.calibrate(path, rows()).to_bytes()
    model = Model(path)
    start_early(model, "auto", tf32=False, batch_size=4)
    made = []
    init = with_cuda.CudaObserver.__init__
    monkeypatch.setattr(with_cuda.CudaObserver, "__init__", lambda *a, **k: (made.append(1), init(*a, **k))[1])
    assert fastcal.calibrate(model, rows()).to_bytes() == expected
    assert len(made) <= 1  # in the thread, or before the patch
    start_early(model, "auto", tf32=True, batch_size=4)  # other settings: not used
    assert fastcal.calibrate(model, rows()).record.entries["precision"] == "FP32"


def test_an_error_of_an_early_start_is_raised_when_it_is_taken_over(tmp_path):
    from fastcal.observe.backends import start_early

    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> f (float[N, 8] x) => (float[N, 8] y) { y = Gemm(x, x) }'
    )
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, tmp_path / "model.onnx")
    model = Model(tmp_path / "model.onnx")
    start_early(model, "onnxruntime", tf32=False, batch_size=4)
    with pytest.raises(FastcalError, match="NoSuchOperator"):
        fastcal.calibrate(model, rows(), backend="onnxruntime")


def test_a_gpu_that_is_not_the_first():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    caches = []
    for number in (0, 1):
        with ImageFeed(DIGITS / "images", model=DIGITS / "digits.onnx", batch_size=64, device=f"cuda:{number}") as feed:
            caches.append(fastcal.calibrate(DIGITS / "digits.onnx", feed).to_bytes())
    assert caches[0] == caches[1]
    assert cupy.cuda.runtime.getDevice() == 0


def test_nan_is_reported_by_tensor(onnx_file, caplog):
    path = onnx_file("f (float[N, 3] x) => (float[N, 3] y) { y = Sqrt(x) }")
    with caplog.at_level(logging.WARNING, "fastcal"):
        fastcal.calibrate(path, [{"x": np.float32([[-1, 4, 9]])}], algorithm="minmax")
    assert "y (1 NaN, 0 Inf)" in caplog.text


def test_a_batch_too_large_for_the_gpu_names_the_remedy(onnx_file):
    path = onnx_file("f (float[N, 1024, 1024] x) => (float[N, 1024, 1024] y) { y = Relu(x) }")
    observer = with_cuda.CudaObserver(Model(path), memory=1 << 20)
    with pytest.raises(FastcalError, match="use a smaller batch size"), observer:
        observer.observe({"x": np.ones((2, 1024, 1024), "f4")})
