"""External data: where it lies, what identifies it, and models too large for one file."""

import importlib
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastcal
from fastcal.errors import FastcalError, ModelError
from fastcal.external import tensors_in
from fastcal.files import write_together
from fastcal.model import Model
from fastcal.qdq import count_quantized

RANDOM = np.random.default_rng(8)
W, V = (RANDOM.normal(size=(4, 4)).astype("f4") for _ in range(2))
X = RANDOM.normal(size=(2, 4)).astype("f4")

#: A network with weights in an initializer, a Constant, and both branches of an If.
GRAPH = """f (float[N, 4] x) => (float[N, 4] y) {
  a = MatMul(x, w)
  b = MatMul(a, v)
  s = ReduceSum<keepdims = 0>(b)
  c = Cast<to = 9>(s)
  y = If(c) <then_branch = t () => (float[N, 4] t) { t = MatMul(b, inner) },
             else_branch = e () => (float[N, 4] e) { e = Neg(b) }>
}"""


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, f"{name}_value"))


def network():
    """GRAPH with its weights, in memory."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {GRAPH}')
    model.graph.node.insert(0, constant("v", V))
    branch = next(value.g for node in model.graph.node for value in node.attribute if value.name == "then_branch")
    branch.node.insert(0, constant("inner", W + V))
    model.graph.initializer.append(numpy_helper.from_array(W, "w"))
    return model


def save(path, model=None):
    """Write a network whose tensors all lie in other files, one each; return the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = network() if model is None else model
    files = []
    for number, tensor in enumerate(tensors_in(model.graph)):
        files.append(path.parent / f"{number}.bin")
        files[-1].write_bytes(b"pad:" * 2 + tensor.raw_data + b"end")
        size = len(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, files[-1].name, offset=8, length=size)
        tensor.ClearField("raw_data")
    onnx.save(model, path)
    return files


def run(model):
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def calibrate(path):
    return fastcal.calibrate(path, [X], backend="onnxruntime")


def test_all_tensors_are_found_also_those_of_attributes_and_subgraphs(tmp_path):
    files = save(tmp_path / "m.onnx")
    assert len(files) == 3
    assert Model(tmp_path / "m.onnx").external_files == files


def test_external_data_changes_no_result(tmp_path):
    onnx.save(network(), tmp_path / "one.onnx")
    save(tmp_path / "apart" / "m.onnx")
    paths = tmp_path / "one.onnx", tmp_path / "apart" / "m.onnx"
    caches = [calibrate(path) for path in paths]
    assert caches[0].scales == caches[1].scales
    models = [fastcal.quantize(path, cache) for path, cache in zip(paths, caches, strict=True)]
    assert models[0] == models[1]
    assert count_quantized(models[1]) == (2, 3)
    assert fastcal.compare(paths[0], [X]) == fastcal.compare(paths[1], [X])


def test_a_copy_is_the_same_model_and_other_contents_are_another(tmp_path):
    files = save(tmp_path / "a" / "m.onnx")
    cache = calibrate(tmp_path / "a" / "m.onnx")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    for file in (tmp_path / "b").iterdir():
        os.utime(file, ns=(0, 10**18))
    assert not fastcal.check_cache(cache, tmp_path / "b" / "m.onnx").stale
    fastcal.quantize(tmp_path / "b" / "m.onnx", cache)
    for file in files:
        other = tmp_path / "b" / file.name
        before, times = other.read_bytes(), other.stat()
        other.write_bytes(before[:-4] + bytes([before[-4] ^ 1]) + before[-3:])  # as large
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert fastcal.check_cache(cache, tmp_path / "b" / "m.onnx").stale == ("model",)
        other.write_bytes(before)
    assert not fastcal.check_cache(cache, tmp_path / "b" / "m.onnx").stale


def test_files_behind_links_anywhere(tmp_path):
    files = save(tmp_path / "there" / "m.onnx")
    want = calibrate(tmp_path / "there" / "m.onnx")
    (tmp_path / "here").mkdir()
    for number, file in enumerate([*files, tmp_path / "there" / "m.onnx"]):
        store = tmp_path / f"store{number % 2}" / "deep"
        store.mkdir(parents=True, exist_ok=True)
        shutil.move(file, store / f"{number}.hash")
        os.symlink(os.path.relpath(store / f"{number}.hash", tmp_path / "here"), tmp_path / "here" / file.name)
    os.symlink(tmp_path / "here", tmp_path / "linked")
    for folder in ("here", "linked"):
        path = tmp_path / folder / "m.onnx"
        cache = calibrate(path)
        assert cache.scales == want.scales
        assert cache.record.entries["model"] == want.record.entries["model"]
        onnx.checker.check_model(fastcal.quantize(path, cache))
        fastcal.compare(path, [X])


@pytest.mark.parametrize("location", ["../weights.bin", "/weights.bin", "sub/../../weights.bin", "a\0b"])
def test_a_file_outside_the_folder(tmp_path, location):
    model = network()
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=rf"m.onnx has external data outside its folder: {location}; keep it beside"):
        Model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), r"cannot load .*m.onnx: 1.bin: No such file.*; keep its external data beside it"),
        (
            lambda file: file.write_bytes(b""),
            r"m.onnx: the external data of 'v_value' is not within 1.bin; copy the file",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), r"the external data of 'v_value' is not within 1.bin"),
        (lambda file: (file.unlink(), file.mkdir()), r"cannot load .*m.onnx: 1.bin: Is a directory"),
    ],
)
def test_files_that_are_not_whole(tmp_path, change, message):
    save(tmp_path / "m.onnx")
    change(tmp_path / "1.bin")
    with pytest.raises(ModelError, match=message):
        fastcal.quantize(tmp_path / "m.onnx", fastcal.CalibrationCache({"x": 0.1, "a": 0.1}))
    with pytest.raises(ModelError):
        calibrate(tmp_path / "m.onnx")


@pytest.mark.parametrize("entries", [{"offset": "-1"}, {"length": "many"}, {"offset": "9" * 30}])
def test_places_that_are_none(tmp_path, entries):
    save(tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m.onnx: the external data of 'w' is not within 0.bin; copy the file again"):
        fastcal.quantize(tmp_path / "m.onnx", fastcal.CalibrationCache({"x": 0.1, "a": 0.1}))


def test_a_size_that_is_not_that_of_the_shape(onnx_file):
    path = onnx_file("f (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, w) }", {"w": W})
    for location in (None, "w.bin"):
        proto = onnx.load(path)
        proto.graph.initializer[0].dims[0] = 5
        if location:
            (path.parent / location).write_bytes(W.tobytes())
            onnx.external_data_helper.set_external_data(proto.graph.initializer[0], location)
            proto.graph.initializer[0].ClearField("raw_data")
        onnx.save(proto, path.with_name("other.onnx"))
        with pytest.raises(
            ModelError, match=r"other.onnx is not a valid ONNX model: 'w' does not hold the values of its"
        ):
            fastcal.quantize(path.with_name("other.onnx"), fastcal.CalibrationCache({"x": 0.1}))


def test_weights_of_four_bits(tmp_path):
    values = np.arange(-8, 8).reshape(4, 4)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> f (float[N, 4] x) => (float[N, 4] y)'
        "{ w = DequantizeLinear(q, s) y = MatMul(x, w) }"
    )
    packed = helper.make_tensor("q", TensorProto.INT4, [4, 4], values.ravel())
    packed = numpy_helper.from_array(numpy_helper.to_array(packed), "q")
    model.graph.initializer.extend([packed, numpy_helper.from_array(np.float32(0.5), "s")])
    save(tmp_path / "m.onnx", model)
    quantized = fastcal.quantize(tmp_path / "m.onnx", fastcal.CalibrationCache({"x": 0.1}))
    (weights,) = [numpy_helper.to_array(each) for each in quantized.graph.initializer if each.name == "w"]
    assert weights.tolist() == (values * 0.5).tolist()


@pytest.fixture
def small_files(monkeypatch):
    """No more than 150 bytes of weights go into one file."""
    monkeypatch.setattr(importlib.import_module("fastcal.cli.quantize"), "MOST_IN_A_FILE", 150)
    monkeypatch.setattr("fastcal.external._SMALL", 60)


@pytest.mark.parametrize("is_external", [True, False])
def test_a_model_too_large_for_one_file(run_fastcal, tmp_path, small_files, is_external):
    path = tmp_path / "source" / "m.onnx"
    save(path)
    if not is_external:
        onnx.save(network(), path)
    cache = calibrate(path)
    cache.save(tmp_path / "c.cache")
    (tmp_path / "out").mkdir()
    done = run_fastcal("quantize", path, tmp_path / "c.cache", "-o", "q.onnx", cwd=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    *_, weights, last = done.stdout.splitlines()
    assert weights == "weights    q.onnx.data"
    assert last.startswith(f"size       {size / 1e6:.3g} MB, weights in float32")
    assert sorted(os.listdir(tmp_path / "out")) == ["q.onnx", "q.onnx.data"]
    shutil.rmtree(path.parent) if is_external else None
    written = onnx.load(tmp_path / "out" / "q.onnx", load_external_data=False)
    large = [tensor for tensor in tensors_in(written.graph) if np.prod(tensor.dims) == 16 and "zero" not in tensor.name]
    assert len(large) == 3
    for tensor in large:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "q.onnx.data"
        assert int(entries["offset"]) % 4096 == 0
    whole = onnx.load(tmp_path / "out" / "q.onnx")
    onnx.checker.check_model(whole, full_check=True)
    if not is_external:
        assert run(tmp_path / "out" / "q.onnx").tobytes() == run(fastcal.quantize(path, cache)).tobytes()
    else:
        assert np.isfinite(run(tmp_path / "out" / "q.onnx")).all()


def test_weights_are_not_written_over_what_is_read(run_fastcal, tmp_path, small_files):
    save(tmp_path / "m.onnx")
    calibrate(tmp_path / "m.onnx").save(tmp_path / "q.onnx.data")
    done = run_fastcal("quantize", "m.onnx", "q.onnx.data", "-o", "q.onnx", cwd=tmp_path)
    assert done.returncode == 2
    assert "q.onnx.data is the calibration cache; name another file for the external data" in done.stderr


def test_files_that_are_written_together_are_written_by_functions_too(tmp_path):
    order = []
    write_together({tmp_path / "a": lambda file: order.append(file.write(b"one")), tmp_path / "b": b"two"})
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"one", b"two")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FastcalError, match=r"cannot write .*b: No space left on device"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": fail})
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"one", b"two")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_constant_that_is_computed_from_external_data(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> f (float[N, 4] x) => (float[N, 4] y)'
        "{ t = Transpose(v) y = MatMul(x, t) }"
    )
    model.graph.node.insert(0, constant("v", V))
    onnx.save(model, tmp_path / "one.onnx")
    save(tmp_path / "apart" / "m.onnx", model)
    cache = fastcal.CalibrationCache({"x": 0.1})
    assert fastcal.quantize(tmp_path / "apart" / "m.onnx", cache) == fastcal.quantize(tmp_path / "one.onnx", cache)
