"""`fastcal doctor` with libraries that work, are absent, are broken, or end the process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from fastcal import doctor
from fastcal.device import resolve

no_gpu = pytest.mark.skipif(resolve("auto") is not None, reason="there is a GPU here")
LIBRARIES = {library.module: library for library in (doctor._DRIVER, *doctor._LIBRARIES)}


@pytest.fixture(scope="module")
def findings():
    """What trying each library as it is finds, by module."""
    return {library.module: doctor._run(library) for library in doctor._LIBRARIES if not library.is_for_gpus}


@pytest.fixture
def run_doctor(run_fastcal, findings, monkeypatch, tmp_path):
    """A function that runs the doctor; it tries the modules that have a stand-in, and knows the other findings."""
    attempt = doctor._run

    def run(*options, **modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        known = {module: found for module, found in findings.items() if module not in modules}
        monkeypatch.setattr(doctor, "_run", lambda library: known.get(library.module) or attempt(library))
        return run_fastcal("doctor", *options)

    return run


@pytest.fixture
def examine(run_doctor):
    """A function that runs the doctor with stand-ins for some modules; returns exit status, findings by label, ok."""

    def run(**modules):
        done = run_doctor("--json", **modules)
        assert done.stdout, done.stderr
        told = json.loads(done.stdout)
        return done.returncode, {finding["label"]: finding for finding in told["libraries"]}, told["ok"]

    return run


@no_gpu
def test_everything_works_on_a_cpu(examine):
    status, found, ok = examine()
    assert (status, ok) == (0, True)
    for label in ("ONNX Runtime", "numba", "DALI", "Matplotlib", "Jinja2", "Ray"):
        assert (found[label]["status"], found[label]["fix"]) == ("works", ""), found[label]
        assert re.search(r" \d+\.\d+", found[label]["wheels"][0])
    assert found["DALI"]["detail"] == "decoded an image on the CPU"
    for label in ("CuPy", "TensorRT"):
        assert (found[label]["status"], found[label]["fix"]) == ("unused", "")
    assert (found["NVIDIA driver"]["status"], found["NVIDIA driver"]["fix"]) == ("missing", "")


@pytest.mark.gpu("onnxruntime-gpu")
def test_everything_works_on_a_gpu(examine):
    _, found, _ = examine()
    assert re.fullmatch(r"NVIDIA .*, CUDA 1\d", found["NVIDIA driver"]["detail"])
    for label in ("NVIDIA driver", "CuPy", "DALI", "ONNX Runtime"):
        assert found[label]["status"] == "works", found[label]
    assert found["DALI"]["detail"].startswith("decoded an image on GPU ")
    assert found["ONNX Runtime"]["detail"].startswith("ran a network on GPU ")
    assert found["TensorRT"]["status"] in ("works", "missing"), found["TensorRT"]


@no_gpu
def test_a_library_that_crashes_does_not_take_the_doctor_down(examine):
    crash = "import os, signal, sys; sys.stderr.write('about to crash'); os.kill(os.getpid(), signal.SIGSEGV)"
    status, found, ok = examine(
        onnxruntime=crash,
        numba="import sys; sys.exit(3)",
        ray="import atexit, os; atexit.register(os._exit, 4)",
    )
    assert (status, ok) == (1, False)
    runtime = found["ONNX Runtime"]
    assert runtime["status"] == "broken"
    assert runtime["detail"].startswith("its process ended with signal SIGSEGV: about to crash")
    assert runtime["fix"] == "pip install --force-reinstall onnxruntime"
    assert found["numba"]["detail"] == "its process ended with status 3: no error message"
    assert found["Ray"]["detail"].startswith("its process ended with status 4")  # though all had worked until then
    assert found["DALI"]["status"] == "works"


@no_gpu
def test_what_is_missing_or_broken_comes_with_a_command(examine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "numba", None)
    status, found, _ = examine(
        numba="raise SystemExit('tried')",
        onnxruntime=f"raise ImportError('{Path.home()}/x/lib.so: cannot open {tmp_path}/y z/t.so; see https://a.b/c/d')",
        ray="import no_such_module",
    )
    assert status == 1
    numba = found["numba"]
    assert (numba["status"], numba["detail"]) == ("missing", "not installed")
    assert numba["fix"] == "pip install --force-reinstall numba"  # the package is there, and the module is not
    assert (found["Ray"]["status"], found["Ray"]["detail"]) == ("broken", "No module named 'no_such_module'")
    detail = found["ONNX Runtime"]["detail"]
    assert str(Path.home()) not in detail
    assert str(tmp_path) not in detail
    assert detail.endswith("see https://a.b/c/d")
    assert "lib.so: cannot open" in detail


def test_folders_are_left_out_wherever_it_runs(monkeypatch):
    monkeypatch.chdir("/")
    assert doctor._without_folders("cannot open /usr/lib/x.so: no\n/such file") == "cannot open .../x.so: no /such file"
    assert doctor._without_folders(f"cannot open {Path.home()} from {sys.prefix}") == "cannot open ... from ..."


def test_a_library_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    finding = doctor._run(LIBRARIES["jinja2"])
    assert (finding.status, finding.detail) == ("broken", "did not end within 0.01 s")


@pytest.mark.parametrize(
    ("module", "status", "wheels", "cuda", "fix"),
    [
        ("cupy", "missing", [], 12, "pip install cupy-cuda12x"),
        ("cupy", "missing", [], 14, "pip install cupy-cuda13x"),
        ("cupy", "missing", [], 11, "pip install cupy-cuda12x"),
        # The wheel of another CUDA release was uninstalled, and took the module with it.
        (
            "nvidia.dali", "missing", ["nvidia-dali-cuda130 2.0"], None,
            "pip install --force-reinstall nvidia-dali-cuda130",
        ),
        (
            "cupy", "broken", ["cupy-cuda12x 13.6"], 13,
            "pip uninstall -y cupy-cuda12x && pip install cupy-cuda13x",
        ),
        ("cupy", "works", ["cupy-cuda12x 13.6"], 13, ""),
        ("cupy", "broken", ["cupy-cuda13x 13.6"], 13, "pip install --force-reinstall cupy-cuda13x"),
        (
            "nvidia.dali", "broken", ["nvidia-dali-cuda130 2.0"], 12,
            "pip uninstall -y nvidia-dali-cuda130 && pip install nvidia-dali-cuda120",
        ),
        (
            "nvidia.dali", "works", ["nvidia-dali-cuda120 2.0", "nvidia-dali-cuda130 2.0"], None,
            "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130 && pip install nvidia-dali-cuda130",
        ),
        ("tensorrt", "broken", ["tensorrt-cu13 11.0"], 13, "pip install --force-reinstall tensorrt-cu13"),
        ("tensorrt", "broken", [], 13, "pip install --force-reinstall tensorrt"),
        ("tensorrt", "missing", [], 13, ""),
        ("ray", "missing", [], None, ""),
        ("ray", "missing", [], 13, ""),
        ("numba", "missing", [], None, "pip install numba"),
        ("numba", "missing", [], 13, ""),  # the GPU counts there
        ("nvidia.dali", "missing", [], 12, "pip install nvidia-dali-cuda120"),
        (
            "onnxruntime", "works", ["onnxruntime 1.31", "onnxruntime-gpu 1.31"], 13,
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
        (
            "onnxruntime", "works", ["onnxruntime 1.31", "onnxruntime-gpu 1.31"], None,
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime",
        ),
        (
            "onnxruntime", "broken", ["onnxruntime 1.31"], 12,
            "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'",
        ),
        (
            "onnxruntime", "broken", ["onnxruntime-gpu 1.31"], 12,
            "pip uninstall -y onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'",
        ),
        ("onnxruntime", "works", ["onnxruntime-gpu 1.31"], None, ""),
        ("onnxruntime", "missing", [], 13, "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("", "works", [], 11, "update the NVIDIA driver: to 525 or newer for CUDA 12, to 580 or newer for CUDA 13"),
        ("", "works", [], 12, ""),
        ("", "missing", [], None, ""),
        ("", "broken", [], None, "install the NVIDIA driver again, or restart the machine"),
    ],
)  # fmt: skip
def test_the_command_that_repairs_it(module, status, wheels, cuda, fix):
    assert doctor._fix(doctor.Finding("", status, wheels), LIBRARIES[module], cuda) == fix


def test_a_gpu_whose_packages_are_missing(monkeypatch):
    def run(library):
        if library is doctor._DRIVER:
            return doctor.Finding(library.label, "works", [], "NVIDIA H200, CUDA 13")
        return doctor.Finding(library.label, "missing" if library.needed_on == "gpu" else "works")

    monkeypatch.setattr(doctor, "_run", run)
    tried = []
    fixes = {finding.label: finding.fix for finding in doctor.examine(tried.append) if finding.fix}
    assert fixes == {"CuPy": "pip install cupy-cuda13x"}
    assert tried == [library.label for library in LIBRARIES.values()]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise OSError('libnvinfer.so.10: cannot open')", "engines and calibrators need TensorRT 8.6 to 10.16, which "
         "cannot be imported (libnvinfer.so.10: cannot open)"),
    ],
)  # fmt: skip
def test_a_tensorrt_that_fastcal_cannot_use_is_broken(monkeypatch, tmp_path, text, detail):
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._run(LIBRARIES["tensorrt"])
    assert (finding.status, finding.detail[: len(detail)]) == ("broken", detail)


def test_a_tensorrt_without_calibrators_works(monkeypatch, tmp_path):
    logger = "class ILogger:\n    def __init__(self): pass\n    ERROR = INTERNAL_ERROR = INFO = WARNING = VERBOSE = 0"
    (tmp_path / "tensorrt.py").write_text(f"__version__ = '11.0.0.1'\nBuilder = lambda logger: 1\n{logger}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._run(LIBRARIES["tensorrt"])
    assert finding.status == "works", finding
    assert finding.detail.startswith("started the builder of TensorRT 11.0.0.1, which has no calibrators")


def test_a_cuda_provider_whose_libraries_are_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_shared.so").write_bytes(b"no library")
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    assert "libonnxruntime_providers_shared.so" in doctor._missing_library()


@no_gpu
def test_for_people_it_is_text_to_paste(run_doctor):
    done = run_doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"^ONNX Runtime +works +ran a network on the CPU +onnxruntime(-gpu)? \d", done.stdout, re.MULTILINE
    )
    assert re.search(r"^fastcal +\d.*\nPython .*\nsystem .*\npackages +numpy \d", done.stdout)
    assert done.stdout.splitlines()[-1] == "nothing is to be done"
    for private in (str(Path.home()), sys.prefix, os.getcwd()):
        assert private not in done.stdout


def test_it_looks_at_no_library_in_its_own_process():
    program = (
        "import sys, fastcal.cli, fastcal.doctor; "
        "print([n for n in ('onnx', 'nvidia', 'numpy', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
