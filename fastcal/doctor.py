"""`fastcal doctor`: a try of every library that fastcal uses, each in a process of its own.

A broken library may end the process that imports it, or hang.
"""

import ctypes
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from fastcal.errors import UnavailableError
from fastcal.versions import installed, is_installed

#: The time limit of a try. The first start of CuPy or TensorRT on a GPU takes many seconds.
_SECONDS = 120

#: The CUDA releases that fastcal has extras for.
_OLDEST_CUDA, _NEWEST_CUDA = 12, 13

#: Packages whose versions are shown besides those of the libraries.
_PACKAGES = "numpy|protobuf|nvidia-(?!dali).*|cuda-.*|tensorrt|tensorrt-.*(libs|bindings)|torch|polygraphy"

#: A model in ONNX's text form.
_RELU = '<ir_version: 8, opset_import: ["" : 17]> relu (float[2] x) => (float[2] y) { y = Relu(x) }'


@dataclass
class Finding:
    """The result of trying one library; `detail` is one line without folder names, `fix` is empty if all is well."""

    label: str
    status: str  # "works", "missing" (not installed), "broken", or "unused" (not tried: there is no GPU)
    wheels: list[str] = field(default_factory=list)
    detail: str = ""
    fix: str = ""


def examine(tell: Callable[[str], None]) -> list[Finding]:
    """Try the NVIDIA driver, then every library; `tell` is called with the label of each before its try."""
    tell(_DRIVER.label)
    driver = _run(_DRIVER)
    release = re.search(r"CUDA (\d+)$", driver.detail)
    cuda = int(release[1]) if release else None
    if driver.status == "works" and cuda is None:
        driver.status = "missing"
    driver.fix = _fix(driver, _DRIVER, cuda)
    findings = [driver]
    for library in _LIBRARIES:
        if library.is_for_gpus and cuda is None:
            findings.append(Finding(library.label, "unused", installed(library.wheels), "there is no GPU"))
        else:
            tell(library.label)
            findings.append(_run(library))
            findings[-1].fix = _fix(findings[-1], library, cuda)
    return findings


def versions() -> dict[str, str]:
    """Return the versions of fastcal, Python, the system and further packages, by name."""
    return {
        "fastcal": version("fastcal"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores",
        "packages": ", ".join(installed(_PACKAGES)),
    }


def attempt(label: str) -> None:
    """Try one library in this process, and print the status and the detail as JSON."""
    (library,) = (each for each in (_DRIVER, *_LIBRARIES) if each.label == label)
    try:
        result = ("works", library.attempt())
    except Exception as error:
        result = ("broken", str(error) or type(error).__name__)
    print(json.dumps(result))


def _run(library: "_Library") -> Finding:
    """Try one library in a process of its own."""
    wheels = installed(library.wheels)
    if library.module and not is_installed(library.module):
        return Finding(library.label, "missing", wheels, "not installed")
    program = f"import sys; sys.path[:] = {sys.path!r}; from fastcal.doctor import attempt; attempt({library.label!r})"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(library.label, "broken", wheels, f"did not end within {_SECONDS} s")
    code = done.returncode
    if code == 0 and done.stdout:
        status, detail = json.loads(done.stdout.splitlines()[-1])
    else:
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        message = (done.stderr.strip() or "no error message").splitlines()[-1]
        status, detail = "broken", f"its process ended with {end}: {message}"
    return Finding(library.label, status, wheels, _without_folders(detail))


def _fix(finding: Finding, library: "_Library", cuda: int | None) -> str:
    """Return the command that repairs a library, if one is needed; `cuda` is the driver's CUDA release."""
    if library is _DRIVER:
        if cuda is not None and cuda < _OLDEST_CUDA:
            return "update the NVIDIA driver: to 525 or newer for CUDA 12, to 580 or newer for CUDA 13"
        return "install the NVIDIA driver again, or restart the machine" if finding.status == "broken" else ""
    package = library.package(cuda)
    names = [wheel.split()[0] for wheel in finding.wheels]
    if len(names) > 1:  # they install the same module, and one has overwritten the other
        return f"pip uninstall -y {' '.join(names)} && pip install {package}"
    if finding.status == "works":
        return ""
    if finding.status == "missing" and not names:
        is_needed = library.needed_on in ("all", "cpu" if cuda is None else "gpu")
        return f"pip install {package}" if is_needed else ""
    if names and cuda is not None and library.packages and _is_for_another(names[0], package):
        return f"pip uninstall -y {names[0]} && pip install {package}"
    return f"pip install --force-reinstall {names[0] if names else package}"


def _is_for_another(name: str, package: str) -> bool:
    """Return whether an installed package is for another CUDA release than the one to install, or for the CPU."""
    release = re.search(r"cu(?:da)?(\d\d)", name)
    return "onnxruntime" in name or (release is not None and release[1] not in package)


def _without_folders(text: str) -> str:
    """Return a message in one line without its folder names, which may name the user."""
    text = " ".join(text.split())
    for folder in (os.getcwd(), sys.prefix, str(Path.home())):
        if folder != "/":
            text = text.replace(folder, "...")
    return re.sub(r"(?<![\w:/.])(/[^\s/:'\"()]+)+/", ".../", text)


def _try_driver() -> str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    code = driver.cuInit(0)
    if code == 100:  # CUDA_ERROR_NO_DEVICE
        return "the NVIDIA driver finds no GPU"
    if code:
        raise RuntimeError(f"the NVIDIA driver does not start: CUDA error {code}")
    release, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDriverGetVersion(ctypes.byref(release))
    return f"{name.value.decode()}, CUDA {release.value // 1000}"


def _try_onnxruntime() -> str:
    import numpy as np
    import onnx
    import onnxruntime

    from fastcal.device import resolve
    from fastcal.model import Model
    from fastcal.observe.backends import OnnxRuntimeBackend, has_cuda_provider

    model = onnx.parser.parse_model(_RELU)
    x = np.array([-1, 2], np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    _expect(result.tolist() == [0, 2], "")
    gpu = resolve("auto")
    if gpu is None:
        return "ran a network on the CPU"
    if not has_cuda_provider():
        raise RuntimeError("onnxruntime has no CUDA provider, which onnxruntime-gpu has: the CPU would run networks")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, path := Path(folder, "relu.onnx"))
        try:
            with OnnxRuntimeBackend().observer(Model(path), gpu) as observer:
                observer.observe({"x": x})
                amax = observer.histograms()["y"].amax
        except UnavailableError as error:
            raise RuntimeError(f"the CUDA provider does not start: {_missing_library() or error}") from error
    return _expect(amax == 2, f"ran a network on GPU {gpu}")


def _missing_library() -> str:
    """Return the reason why the CUDA provider cannot be loaded; "" if it can."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return ""


def _try_numba() -> str:
    import numba

    return _expect(numba.njit("int64(int64)")(lambda x: x + x)(21) == 42, "compiled and ran a function")


def _try_dali() -> str:
    from PIL import Image

    import fastcal
    from fastcal.device import to_host

    with tempfile.TemporaryDirectory() as folder:
        Image.new("L", (8, 8), 128).save(path := Path(folder, "grey.jpg"))
        with fastcal.ImageFeed([path], preprocess=fastcal.Preprocess(size=(8, 8)), batch_size=1) as feed:
            means = [to_host(array).mean() for batch in feed for array in batch.values()]
    device = "the CPU" if feed.gpu is None else f"GPU {feed.gpu}"
    return _expect(len(means) == 1 and abs(means[0] - 128) <= 1, f"decoded an image on {device}")


def _try_cupy() -> str:
    import cupy

    square = cupy.ElementwiseKernel("float32 x", "float32 y", "y = x * x", "square")
    return _expect(float(square(cupy.arange(4, dtype="float32")).sum()) == 14, "compiled and ran a kernel")


def _try_tensorrt() -> str:
    from fastcal.network import Logger, start_builder, trt

    start_builder(Logger())
    lacking = "" if hasattr(trt, "IInt8EntropyCalibrator2") else ", which has no calibrators: it takes Q/DQ models"
    return f"started the builder of TensorRT {trt.__version__}{lacking}"


def _import(module: str) -> str:
    importlib.import_module(module)
    return "imported"


def _expect(is_right: bool, done: str) -> str:
    if not is_right:
        raise RuntimeError("the result is wrong")
    return done


class _Library(NamedTuple):
    label: str
    needed_on: str  # the machines that need it: "all", "gpu" (those with one), "cpu" (those without) or "none"
    attempt: Callable[[], str]  # does a small piece of work and returns its description
    module: str = ""
    wheels: str = ""  # a pattern of the names of the packages with the module, of which one must be installed
    is_for_gpus: bool = False  # not tried without one
    packages: tuple[str, ...] = ()  # the package to install for the CPU, CUDA 12 and CUDA 13, if they differ

    def package(self, cuda: int | None) -> str:
        """Return the package to install for a driver of this CUDA release; None: without a GPU."""
        place = 0 if cuda is None else min(max(cuda, _OLDEST_CUDA), _NEWEST_CUDA) - _OLDEST_CUDA + 1
        return self.packages[place] if self.packages else self.module


_DRIVER = _Library("NVIDIA driver", "gpu", _try_driver, is_for_gpus=True)

_LIBRARIES = (
    _Library(
        "ONNX Runtime", "all", _try_onnxruntime, "onnxruntime", "onnxruntime(-gpu)?",
        packages=("onnxruntime", "'onnxruntime-gpu[cuda,cudnn]<1.27'", "'onnxruntime-gpu[cuda,cudnn]'"),
    ),
    _Library("numba", "cpu", _try_numba, "numba", "numba"),
    _Library(
        "CuPy", "gpu", _try_cupy, "cupy", r"cupy(-cuda\d+x)?", True, ("cupy", "cupy-cuda12x", "cupy-cuda13x")
    ),
    _Library(
        "DALI", "all", _try_dali, "nvidia.dali", r"nvidia-dali-cuda\d+",
        packages=("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    ),
    _Library("TensorRT", "none", _try_tensorrt, "tensorrt", r"tensorrt-cu\d+", True),
    _Library("Matplotlib", "none", partial(_import, "matplotlib.figure"), "matplotlib", "matplotlib"),
    _Library("Jinja2", "none", partial(_import, "jinja2"), "jinja2", "jinja2"),
    _Library("Ray", "none", partial(_import, "ray"), "ray", "ray"),
)  # fmt: skip
