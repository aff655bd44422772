import subprocess
import sys

import fastcal
from conftest import DIGITS


def test_importing_it_imports_none_of_what_it_can_do_without():
    program = (
        "import sys, fastcal; print([name for name in ('nvidia', 'onnx', 'onnxruntime', 'numba', 'numpy', 'ray',"
        " 'tensorrt', 'cupy', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


def test_help_shows_what_can_be_had():
    program = "import sys; sys.modules['tensorrt'] = None; import fastcal; help(fastcal)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "class ImageFeed(" in done.stdout
    assert "class EntropyCalibrator2(" not in done.stdout


def test_a_missing_package_is_named_with_what_brings_it():
    program = """
import sys
sys.modules[sys.argv[1]] = None
import fastcal
try:
    eval("fastcal." + sys.argv[2])
except fastcal.FastcalError as error:
    print(error)
"""
    run = f"calibrate({str(DIGITS / 'digits.onnx')!r}, [], backend='onnxruntime', tensorrt_version='10.3.0')"
    for module, name, text in (
        (
            "nvidia.dali",
            "ImageFeed",
            "ImageFeed needs NVIDIA DALI, which is not installed: pip install 'fastcal[cpu]'; for a GPU "
            "'fastcal[cuda13]' or 'fastcal[cuda12]'",
        ),
        (
            "onnxruntime",
            run,
            "backend onnxruntime needs ONNX Runtime, which is not installed: pip install onnxruntime numba",
        ),
        ("matplotlib", "preview", "preview needs Matplotlib, which is not installed: pip install 'fastcal[report]'"),
        ("jinja2", "write_report", "write_report needs Jinja2, which is not installed: pip install 'fastcal[report]'"),
        ("onnxruntime", "compare", "compare needs ONNX Runtime, which is not installed: pip install onnxruntime numba"),
        ("numba", run, "backend onnxruntime needs numba, which is not installed: pip install onnxruntime numba"),
        (
            "ray",
            run.replace("[]", "[], workers=2"),
            "a calibration with workers needs Ray, which is not installed: pip install 'fastcal[ray]'",
        ),
    ):
        command = [sys.executable, "-c", program, module, name]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == text


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
