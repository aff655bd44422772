"""The interface of TensorRT 11's Python bindings, which import against stand-ins for its libraries, and of RTX's."""

import ast
import json
import os
import subprocess
import sys

import pytest

from conftest import DIGITS, ROOT

#: The modules that build, inspect and time engines of TensorRT 11.
MODULES = ("library.py", "engine/explicit.py", "engine/settings.py", "engine/contents.py", "engine/speed.py")

#: The classes of the objects that these modules keep under names.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "loaded": "ICudaEngine", "engine": "ICudaEngine",
    "context": "IExecutionContext", "inspector": "EngineInspector",
}  # fmt: skip

#: What TensorRT for RTX alone has.
FOR_RTX = ("ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability")


def used():
    """The names that the modules use of TensorRT's module, classes' attributes with their classes."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse((ROOT / "fastcal" / path).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            names, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                names.insert(0, inner.attr)
                inner = inner.value
            start = inner.id if isinstance(inner, ast.Name) else ""
            if start == "library" or (start == "self" and names[0] == "library"):
                found.add(".".join(names[start == "self" :]))
            elif start in CLASSES:
                found.add(f"{CLASSES[start]}.{names[0]}")
    return sorted(name for name in found if name)


PROGRAM = """
import functools, json, sys
import tensorrt
def has(name):
    try:
        functools.reduce(getattr, name.split("."), tensorrt)
    except AttributeError:
        return False
    return True
print(json.dumps([tensorrt.__version__, [name for name in json.loads(sys.argv[1]) if not has(name)]]))
"""


def lacking(names, environment):
    command = [sys.executable, "-c", PROGRAM, json.dumps(names)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_that_is_used_is_in_tensorrt_11(tensorrt_11_bindings):
    names = used()
    assert {"Builder", "IBuilderConfig.set_flag", "ProfilingVerbosity.DETAILED", "OnnxParser.parse"} <= set(names)
    assert len(names) > 35
    version, missing = lacking([*names, "BuilderFlag.INT8", "IInt8EntropyCalibrator2"], tensorrt_11_bindings)
    assert version.startswith("11.")
    assert [name for name in missing if not name.startswith(FOR_RTX)] == ["BuilderFlag.INT8", "IInt8EntropyCalibrator2"]


def test_all_that_is_used_is_in_tensorrt_for_rtx():
    module = pytest.importorskip("tensorrt_rtx")
    for name in used():
        thing = module
        for part in name.split("."):
            thing = getattr(thing, part)


def test_tensorrt_11_quantizes_and_then_needs_a_gpu(tensorrt_11_bindings, tmp_path):
    """The build goes as far as TensorRT's builder, which the stand-ins do not have."""
    program = f"""
import numpy, fastcal
try:
    fastcal.build_engine({str(DIGITS / "digits.onnx")!r}, [{{"image": numpy.ones((2, 3, 32, 32), "f4")}}])
except fastcal.UnavailableError as error:
    print(error)
for options in ({{"calibration": "tensorrt"}}, {{"explicit": False}}, {{"compute_capabilities": ["8.9"]}}):
    try:
        fastcal.build_engine({str(DIGITS / "digits.onnx")!r}, tuning=fastcal.CalibrationCache(), **options)
    except fastcal.FastcalError as error:
        print(error)
"""
    environment = {**os.environ, **tensorrt_11_bindings}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("TensorRT cannot start here (")
    assert lines[1].startswith("TensorRT itself calibrates in an implicit build alone, up to TensorRT 10")
    assert lines[2] == "TensorRT 11.4.0.106 has no implicit quantization; leave out explicit"
    assert lines[3].startswith("TensorRT builds for the GPU that is there; leave out compute_capabilities")
