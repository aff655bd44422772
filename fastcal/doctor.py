"""What works on this machine: every library that fastcal uses is tried, each in a process of its own.

A library that is broken may end the process that imports it, or never return.
"""

import base64
import ctypes
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
from importlib.metadata import version
from pathlib import Path

from fastcal.versions import installed

#: How long a library may take to do next to nothing. The first start of CuPy and TensorRT on a GPU takes many seconds.
_SECONDS = 120

#: The releases of CUDA that there are extras for.
_OLDEST_CUDA, _NEWEST_CUDA = 12, 13

#: 8x8 pixels of grey 128.
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxl"
    "Z2P/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AP//Z"
)


#: CUDA_ERROR_NO_DEVICE.
_NO_DEVICE = 100


def _try_driver() -> str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ModuleNotFoundError("there is no NVIDIA driver") from error
    number = ctypes.c_int()
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        raise ModuleNotFoundError("the NVIDIA driver sees no GPU")
    if code:
        raise RuntimeError(f"the NVIDIA driver does not start: CUDA error {code}")
    driver.cuDeviceGetCount(ctypes.byref(number))
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), 0)
    found = f"{number.value} x {name.value.decode()}"
    driver.cuDriverGetVersion(ctypes.byref(number))
    release = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    return f"{found}, driver {release[1] if release else 'unknown'}, CUDA {number.value // 1000}"


def _try_onnx() -> str:
    import onnx

    onnx.checker.check_model(_relu())
    return "checked a model"


def _try_onnxruntime() -> str:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(_relu(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.array([-1, 2], np.float32)})
    _expect(result.tolist(), [0, 2])
    return "ran a network"


def _try_numba() -> str:
    import numpy as np

    from fastcal.observe.histogram import Histograms

    with Histograms(1) as histograms:
        histograms.update_all({"x": np.arange(8, dtype=np.float32)})
    _expect(int(histograms["x"].counts.sum()), 8)
    return "counted a histogram"


def _try_dali() -> str:
    return _decode("cpu")


def _try_dali_gpu() -> str:
    return _decode("cuda")


def _decode(device: str) -> str:
    import fastcal
    from fastcal.device import to_host

    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "grey.jpg")).write_bytes(_JPEG)
        preprocess = fastcal.Preprocess(size=(8, 8))
        with fastcal.ImageFeed([path], preprocess=preprocess, batch_size=1, device=device) as feed:
            (batch,) = ({name: to_host(array).mean() for name, array in batch.items()} for batch in feed)
    _expect(abs(batch["input"] - 128) <= 1, True)
    return "decoded an image"


def _try_cupy() -> str:
    import cupy

    square = cupy.ElementwiseKernel("float32 x", "float32 y", "y = x * x", "square")
    _expect(float(square(cupy.arange(4, dtype="float32")).sum()), 14)
    return "compiled and ran a kernel"


def _try_tensorrt() -> str:
    from fastcal import calibrators  # noqa: F401 - says what is wrong with TensorRT
    from fastcal.network import Logger, start_builder, trt

    start_builder(Logger())
    return f"started the builder of TensorRT {trt.__version__}"


def _try_matplotlib() -> str:
    from matplotlib.figure import Figure

    with tempfile.TemporaryFile() as file:
        Figure(figsize=(1, 1)).savefig(file, format="png")
        _expect(file.tell() > 0, True)
    return "drew a picture"


def _try_jinja2() -> str:
    import jinja2

    _expect(jinja2.Template("{{ 1 + 1 }}").render(), "2")
    return "filled in a page"


def _try_ray() -> str:
    import ray

    return f"imported Ray {ray.__version__}"


@dataclass(frozen=True)
class _Probe:
    """One thing to try.

    Attributes:
        label: What a person calls it.
        where: The machines that must have it: "all", those with a "gpu", those without, "cpu", or none, "".
        module: The module whose absence tells that it is not installed.
        wheels: A pattern of the names of the packages that bring the module, each of them alone.
        attempt: Does next to nothing with it, and says what; raises where that fails.
        needs: Names of the others that it cannot be tried without.
    """

    label: str
    where: str
    module: str
    wheels: str
    attempt: Callable[[], str]
    needs: tuple[str, ...] = ()


_DRIVER = _Probe("GPU", "gpu", "", "", _try_driver)

_PROBES = {
    "onnx": _Probe("ONNX", "all", "onnx", "onnx", _try_onnx),
    "onnxruntime": _Probe("ONNX Runtime", "cpu", "onnxruntime", "onnxruntime(-gpu)?", _try_onnxruntime),
    "numba": _Probe("numba", "cpu", "numba", "numba", _try_numba),
    "dali": _Probe("DALI (CPU)", "all", "nvidia", r"nvidia-dali-cuda\d+", _try_dali),
    "cupy": _Probe("CuPy", "gpu", "cupy", r"cupy(-cuda\d+x)?", _try_cupy),
    "dali_gpu": _Probe("DALI (GPU)", "gpu", "nvidia", r"nvidia-dali-cuda\d+", _try_dali_gpu, ("dali", "cupy")),
    "tensorrt": _Probe("TensorRT", "gpu", "tensorrt", r"tensorrt-cu\d+", _try_tensorrt),
    "matplotlib": _Probe("Matplotlib", "", "matplotlib", "matplotlib", _try_matplotlib),
    "jinja2": _Probe("Jinja2", "", "jinja2", "jinja2", _try_jinja2),
    "ray": _Probe("Ray", "", "ray", "ray", _try_ray),
}

#: What fastcal does, and what each needs.
_JOBS = {
    "calibrate on the CPU": ("onnx", "onnxruntime", "numba", "dali"),
    "calibrate and build on the GPU": ("driver", "onnx", "dali_gpu", "cupy", "tensorrt"),
    "quantize": ("onnx",),
    "preview": ("dali", "matplotlib"),
    "report": ("matplotlib", "jinja2"),
}

#: Further packages whose versions can matter.
_FURTHER = "numpy|protobuf|nvidia-(?!dali).*|cuda-.*|tensorrt|tensorrt-.*(libs|bindings)|torch|polygraphy"


@dataclass
class Finding:
    """What came of trying one library.

    Attributes:
        label: What was tried.
        status: "works", "missing" (not installed), "broken", or "unused" (not tried: what it needs is
            not there).
        wheels: The installed packages that bring it, with their versions.
        detail: What it did, or what went wrong, in one line without a folder of this machine.
        fix: The command that puts it right; empty where nothing is to be done.
    """

    label: str
    status: str
    wheels: list[str] = field(default_factory=list)
    detail: str = ""
    fix: str = ""


@dataclass
class Findings:
    """What was found on this machine.

    Attributes:
        system: Name to text: versions of fastcal, Python, the system and further packages.
        libraries: Every library that fastcal uses.
        jobs: What fastcal does: name to the labels of the libraries that it needs and that do not work.
    """

    system: dict[str, str]
    libraries: list[Finding]
    jobs: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        """Whether nothing is to be done."""
        return not any(finding.fix for finding in self.libraries)


def examine(tell: Callable[[str], None]) -> Findings:
    """Try everything; `tell` is called with the label of what is tried next."""
    tell(_DRIVER.label)
    gpu = _run("driver", _DRIVER)
    cuda = re.search(r"CUDA (\d+)$", gpu.detail) if gpu.status == "works" else None
    gpu.fix = _fix_driver(gpu, int(cuda[1]) if cuda else None)
    extra = f"cuda{min(int(cuda[1]), _NEWEST_CUDA)}" if cuda else "cpu"
    findings = {"driver": gpu}
    for name, probe in _PROBES.items():
        lacking = [_PROBES[need].label for need in probe.needs if findings[need].status != "works"]
        if (probe.where == "gpu" and not cuda) or lacking:
            reason = f"needs {', '.join(lacking)}" if cuda else "there is no GPU"
            findings[name] = Finding(probe.label, "unused", installed(probe.wheels), reason)
        else:
            tell(probe.label)
            findings[name] = _run(name, probe)
            findings[name].fix = _fix(findings[name], probe, extra)
    jobs = {
        job: [findings[name].label for name in needed if findings[name].status != "works"]
        for job, needed in _JOBS.items()
    }
    return Findings(_system(), list(findings.values()), jobs)


def attempt(name: str) -> None:
    """Try one library here and now; prints one line of JSON."""
    probe = _PROBES.get(name, _DRIVER)
    try:
        result = {"works": probe.attempt()}
    except ModuleNotFoundError as error:
        found = (error.name or "").partition(".")[0] != probe.module
        result = {"broken": str(error)} if found else {"missing": "not installed" if error.name else str(error)}
    except Exception as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError) and not installed(probe.wheels)
        result = {"missing": "not installed"} if missing else {"broken": str(error) or type(error).__name__}
    print(json.dumps(result))


def _run(name: str, probe: _Probe) -> Finding:
    """Try one library in a process of its own."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from fastcal.doctor import attempt; attempt({name!r})"
    finding = Finding(probe.label, "broken", installed(probe.wheels))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        finding.detail = f"did not return within {_SECONDS} s"
        return finding
    said = done.stdout.splitlines()[-1:]
    if done.returncode == 0 and said:
        ((finding.status, detail),) = json.loads(said[0]).items()
    else:
        ended = (
            f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"status {done.returncode}"
        )
        detail = f"its process ended with {ended}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
    finding.detail = _without_folders(detail)
    return finding


def _fix_driver(gpu: Finding, cuda: int | None) -> str:
    """What to do about the driver, if something must be."""
    if cuda is not None and cuda < _OLDEST_CUDA:
        return "update the NVIDIA driver: to 525 or newer for CUDA 12, to 580 or newer for CUDA 13"
    if gpu.status == "broken":
        return "install the NVIDIA driver again, or restart the machine if it was updated just now"
    if gpu.status == "missing" and Path("/proc/driver/nvidia/version").exists():  # the kernel has it
        return "if this is a container, start it with its GPUs: docker run --gpus all"
    return ""


def _fix(finding: Finding, probe: _Probe, extra: str) -> str:
    """The command that puts a library right, if it must be.

    Args:
        finding: What came of trying it.
        probe: The library.
        extra: fastcal's extra for this machine: "cpu", "cuda12" or "cuda13".
    """
    names = [wheel.split()[0] for wheel in finding.wheels]
    cuda = {name: found[1] for name in names if (found := re.search(r"cu(?:da)?(\d\d)", name))}
    of_extra = f"'fastcal[{extra}]'"
    if len(names) > 1:  # they install the same module, and one has overwritten the other
        return f"pip uninstall -y {' '.join(names)} && pip install {of_extra if cuda else names[0]}"
    if finding.status == "missing":
        needed = probe.where == "all" or (probe.where == "cpu") == (extra == "cpu")
        return f"pip install {of_extra}" if needed and probe.where else ""
    if finding.status == "works":
        return ""
    if extra != "cpu" and any(release != extra[4:] for release in cuda.values()):
        return f"pip uninstall -y {names[0]} && pip install {of_extra}"
    if probe.module == "tensorrt" and names:
        return f"pip install --force-reinstall '{names[0]}<11'"
    return f"pip install --force-reinstall {names[0] if names else of_extra}"


def _system() -> dict[str, str]:
    release = re.search(r'^PRETTY_NAME="(.*)"', _read("/etc/os-release"), re.MULTILINE)
    return {
        "fastcal": version("fastcal"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{release[1] if release else platform.system()}, {platform.machine()}, "
        f"{' '.join(platform.libc_ver())}, {len(os.sched_getaffinity(0))} cores",
        "packages": ", ".join(installed(_FURTHER)),
    }


def _without_folders(text: str) -> str:
    """A message in one line, without the folders in it, which tell who the user is."""
    text = " ".join(text.split())
    for folder in (os.getcwd(), sys.prefix, str(Path.home())):
        if folder != "/":
            text = text.replace(folder, "...")
    return re.sub(r"(?<![\w:/.])(/[^\s/:'\"()]+)+/", ".../", text)


def _relu() -> bytes:
    import onnx

    graph = '<ir_version: 8, opset_import: ["" : 17]> relu (float[2] x) => (float[2] y) { y = Relu(x) }'
    data: bytes = onnx.parser.parse_model(graph).SerializeToString()
    return data


def _expect(value: object, expected: object) -> None:
    if value != expected:
        raise RuntimeError(f"it gave {value}, not {expected}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
