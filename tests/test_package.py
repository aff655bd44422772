"""The package: how light its import is, its public names, and what it says without an optional package."""

import functools
import importlib
import json
import os
import pydoc
import subprocess
import sys

import pytest

import fastcal
from conftest import DIGITS, ROOT

#: What a program may do before it imports a library that takes long to import.
LIGHT = {
    "import": "import fastcal",
    "dir": "import fastcal; dir(fastcal)",
}


@pytest.mark.parametrize("program", LIGHT.values(), ids=LIGHT)
def test_what_is_light_imports_no_heavy_library(program):
    heavy = ("nvidia.dali", "onnx", "onnxruntime", "numba", "numpy", "ray", "tensorrt", "cupy", "matplotlib", "jinja2")
    program += f"; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_all_public_names_are_there():
    missing = []
    for name in fastcal.__all__:
        try:
            assert getattr(fastcal, name).__module__.startswith("fastcal.")
        except fastcal.FastcalError as error:
            assert "need TensorRT 8.6 to 10.16" in str(error)  # noqa: PT017 - only where TensorRT is not installed
            missing.append(name)
    assert set(fastcal.__all__) - set(dir(fastcal)) == set(missing)
    assert not hasattr(fastcal, "no_such_name")


@pytest.fixture
def import_without(monkeypatch):
    """A function that imports fastcal anew, as if a package were not installed."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fastcal"}

    def import_without(package):
        for name in [*sys.modules]:
            if name in before or name == package or name.startswith(f"{package}."):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        return importlib.import_module("fastcal")

    yield import_without
    for name in [*sys.modules]:
        if name.partition(".")[0] == "fastcal":
            del sys.modules[name]
    sys.modules.update(before)


def test_help_shows_what_can_be_had(import_without):
    text = pydoc.plain(pydoc.render_doc(import_without("tensorrt")))
    assert "class ImageFeed(" in text
    assert "class EntropyCalibrator2(" not in text


def calibrate(package, *batches, **options):
    return package.calibrate(
        DIGITS / "digits.onnx", batches, backend="onnxruntime", tensorrt_version="10.3.0", **options
    )


@pytest.mark.parametrize(
    ("missing", "use", "text"),
    [
        (
            "nvidia.dali",
            lambda package: package.ImageFeed,
            "ImageFeed needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130, or "
            "nvidia-dali-cuda120 for a GPU with CUDA 12",
        ),
        (
            "onnxruntime",
            calibrate,
            "backend onnxruntime needs ONNX Runtime, which is not installed: pip install onnxruntime numba",
        ),
        (
            "matplotlib",
            lambda package: package.preview,
            "preview needs Matplotlib, which is not installed: pip install jinja2 matplotlib",
        ),
        (
            "jinja2",
            lambda package: package.write_report,
            "write_report needs Jinja2, which is not installed: pip install jinja2 matplotlib",
        ),
        (
            "onnxruntime",
            lambda package: package.compare,
            "compare needs ONNX Runtime, which is not installed: pip install onnxruntime numba",
        ),
        (
            "numba",
            calibrate,
            "backend onnxruntime needs numba, which is not installed: pip install onnxruntime numba",
        ),
        (
            "ray",
            functools.partial(calibrate, workers=2),
            "a calibration with workers needs Ray, which is not installed: pip install ray",
        ),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(import_without, missing, use, text):
    package = import_without(missing)
    with pytest.raises(package.FastcalError) as raised:
        use(package)
    assert str(raised.value) == text
    assert f" needs {raised.value.package}, which is not installed" in text


@pytest.mark.parametrize(
    ("module", "program", "command", "name", "reason"),
    [
        ("nvidia", "None + 'text'", "calibrate", "NVIDIA DALI", "TypeError: unsupported operand"),
        (
            "onnxruntime",
            "raise OSError('libcudart.so: none')",
            "calibrate",
            "ONNX Runtime",
            "OSError: libcudart",
        ),
        ("numba", "raise SystemError('initialization failed')", "compare", "numba", "SystemError: initialization"),
        ("matplotlib", "def broken(:", "preview", "Matplotlib", "SyntaxError: "),
        ("jinja2", "raise SystemExit(3)", "report", "Jinja2", "SystemExit: 3"),
        ("matplotlib", "import no_such_module", "preview", "no_such_module", ""),
        ("onnx", "import sys; sys.no_such_attribute", "calibrate", "onnx", "AttributeError: module 'sys'"),
        ("numpy", "raise ImportError('numpy.core failed')", "calibrate", "numpy", "ImportError: numpy.core failed"),
        ("yaml", "raise ValueError('size changed')", "calibrate", "PyYAML", "ValueError: size changed"),
        ("typer", "raise RuntimeError('old')", "calibrate", "typer", "RuntimeError: old"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(tmp_path, spawn_fastcal, module, program, command, name, reason):
    (tmp_path / module).mkdir(parents=True)
    (tmp_path / module / "__init__.py").write_text(program)
    options = {
        "calibrate": ("calibrate", DIGITS / "digits.onnx", DIGITS / "images", "-o", tmp_path / "c"),
        "compare": ("compare", DIGITS / "digits.onnx", DIGITS / "images"),
        "preview": ("preview", DIGITS / "images", "-o", tmp_path / "c.png"),
    }
    options["report"] = (*options["calibrate"], "--report", tmp_path / "r.html")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = spawn_fastcal(*options[command], "--json", env={**os.environ, "PYTHONPATH": path})
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    what = f"cannot be imported here ({reason}" if reason else "is not installed: pip install"
    assert f" needs {name}, which {what}" in errors[0]
    assert not (tmp_path / "c").exists()
    event = {"event": "error", "message": errors[0].removeprefix("error: ")}
    assert module == "typer" or json.loads(done.stdout) == event


def test_an_error_that_standard_error_is_closed_for_goes_nowhere_else(tmp_path):
    (tmp_path / "typer.py").write_text("raise RuntimeError('old')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(f"{sys.executable} -m fastcal doctor 2>&-", shell=True, stdout=subprocess.PIPE, env=env)
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_error_of_fastcals_own_is_not_taken_for_a_missing_package(monkeypatch):
    monkeypatch.delattr(fastcal, "ImageFeed", raising=False)
    monkeypatch.setattr(fastcal, "_load", lambda name: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fastcal.ImageFeed  # noqa: B018


def test_python_without_docstrings(tmp_path, spawn_fastcal):
    arguments = ("calibrate", DIGITS / "digits.onnx", DIGITS / "images", "-o", tmp_path / "c")
    done = spawn_fastcal(*arguments, env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert done.returncode == 2
    assert "ImageFeed needs NVIDIA DALI, which cannot be imported here (TypeError" in done.stderr
    assert "start Python without -OO" in done.stderr.splitlines()[-1]


def test_it_prints_nothing(tmp_path):
    program = f"""
import sys
import numpy as np, onnx
import fastcal
model, images = {str(DIGITS / "digits.onnx")!r}, {str(DIGITS / "images")!r}
with fastcal.ImageFeed(images, model=model, batch_size=100) as feed:  # the last batch is completed, says the log
    cache = fastcal.calibrate(model, feed, backend="onnxruntime")
    fastcal.check_cache(cache, model, feed)
fastcal.calibrate(model, [{{"image": np.full((1, 3, 32, 32), np.nan, np.float32)}}], backend="onnxruntime")  # a warning
for form in ("tensorrt", "json"):
    cache.save("x", form=form)
    fastcal.diff_caches(cache, fastcal.CalibrationCache.load("x"))
cache.scales["logits"] = 0.0
fastcal.quantize(model, cache)
fastcal.quantize(model, fastcal.CalibrationCache({{**cache.scales, "7": 1.0, "/7/Flatten_output_0": 0.0}}))  # a warning
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
