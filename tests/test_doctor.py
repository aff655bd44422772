"""`fastcal doctor` where libraries are as they should be, absent, broken, or end the process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastcal import doctor
from fastcal.device import resolve

no_gpu = pytest.mark.skipif(resolve("auto") is not None, reason="there is a GPU here")


@pytest.fixture
def examine(spawn_fastcal, tmp_path):
    """A function that runs the doctor with stand-ins for some modules; returns exit status, findings by label, ok."""

    def run(**modules):
        for name, text in modules.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(text)
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        done = spawn_fastcal("doctor", "--json", env={**os.environ, "PYTHONPATH": path})
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)
        return done.returncode, {finding["label"]: finding for finding in found["libraries"]}, found

    return run


@no_gpu
def test_everything_works_on_a_cpu(examine):
    status, libraries, found = examine()
    assert status == 0
    assert found["ok"]
    for label in ("ONNX", "ONNX Runtime", "numba", "DALI (CPU)", "Matplotlib", "Jinja2"):
        assert libraries[label]["status"] == "works", libraries[label]
        assert libraries[label]["fix"] == ""
        assert re.search(r" \d+\.\d+", libraries[label]["wheels"][0])
    for label in ("DALI (GPU)", "CuPy", "TensorRT"):
        assert (libraries[label]["status"], libraries[label]["fix"]) == ("unused", "")
    assert found["jobs"] == {
        "calibrate on the CPU": [],
        "calibrate and build on the GPU": ["GPU", "DALI (GPU)", "CuPy", "TensorRT"],
        "quantize": [],
        "preview": [],
        "report": [],
    }


@pytest.mark.gpu
def test_everything_works_on_a_gpu(examine):
    _, libraries, found = examine()
    assert libraries["GPU"]["status"] == "works"
    assert re.search(r"\d x NVIDIA .*, driver [\d.]+, CUDA 1\d", libraries["GPU"]["detail"])
    assert found["jobs"]["calibrate and build on the GPU"] == []


@no_gpu
def test_a_library_that_crashes_does_not_take_the_doctor_down(examine):
    crash = "import os, signal, sys; sys.stderr.write('about to crash'); os.kill(os.getpid(), signal.SIGSEGV)"
    status, libraries, found = examine(
        onnxruntime=crash,
        numba="import sys; sys.exit(3)",
        ray="import atexit, os; __version__ = '1'; atexit.register(os._exit, 4)",
    )
    assert (status, found["ok"]) == (1, False)
    runtime = libraries["ONNX Runtime"]
    assert runtime["status"] == "broken"
    assert runtime["detail"].startswith("its process ended with signal SIGSEGV: about to crash")
    assert runtime["fix"] == "pip install --force-reinstall onnxruntime"
    assert libraries["numba"]["detail"] == "its process ended with status 3: no reason given"
    assert libraries["Ray"]["detail"].startswith("its process ended with status 4")  # though all had worked until then
    assert libraries["ONNX"]["status"] == libraries["DALI (CPU)"]["status"] == "works"
    assert found["jobs"]["calibrate on the CPU"] == ["ONNX Runtime", "numba"]


@no_gpu
def test_what_is_missing_or_broken_comes_with_a_command(examine, tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'numba'\", name='numba')"
    broken = f"raise ImportError('{Path.home()}/x/lib.so: cannot open {tmp_path}/y z/t.so; see https://a.b/c/d')"
    status, libraries, _ = examine(numba=missing, onnxruntime=broken)
    assert status == 1
    numba = libraries["numba"]
    assert (numba["status"], numba["detail"], numba["fix"]) == (
        "missing",
        "not installed",
        "pip install 'fastcal[cpu]'",
    )
    detail = libraries["ONNX Runtime"]["detail"]
    assert str(Path.home()) not in detail
    assert str(tmp_path) not in detail
    assert detail.endswith("see https://a.b/c/d")
    assert "lib.so: cannot open" in detail


def test_folders_are_left_out_wherever_it_runs(monkeypatch):
    monkeypatch.chdir("/")
    assert doctor._without_folders("cannot open /usr/lib/x.so: no\n/such file") == "cannot open .../x.so: no /such file"


def test_a_library_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    finding = doctor._run("onnx", doctor._PROBES["onnx"])
    assert (finding.status, finding.detail) == ("broken", "did not return within 0.01 s")


@pytest.mark.parametrize(
    ("name", "status", "wheels", "extra", "fix"),
    [
        ("cupy", "missing", [], "cuda12", "pip install 'fastcal[cuda12]'"),
        (
            "cupy", "broken", ["cupy-cuda12x 13.6"], "cuda13",
            "pip uninstall -y cupy-cuda12x && pip install 'fastcal[cuda13]'",
        ),
        ("cupy", "works", ["cupy-cuda12x 13.6"], "cuda13", ""),
        ("cupy", "broken", ["cupy-cuda13x 13.6"], "cuda13", "pip install --force-reinstall cupy-cuda13x"),
        (
            "dali_gpu", "broken", ["nvidia-dali-cuda130 2.0"], "cuda12",
            "pip uninstall -y nvidia-dali-cuda130 && pip install 'fastcal[cuda12]'",
        ),
        (
            "dali", "works", ["nvidia-dali-cuda120 2.0", "nvidia-dali-cuda130 2.0"], "cpu",
            "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130 && pip install 'fastcal[cpu]'",
        ),
        ("tensorrt", "broken", ["tensorrt-cu13 11.0"], "cuda13", "pip install --force-reinstall 'tensorrt-cu13<11'"),
        ("tensorrt", "broken", [], "cuda13", "pip install --force-reinstall 'fastcal[cuda13]'"),
        ("ray", "missing", [], "cpu", ""),
        ("ray", "missing", [], "cuda13", ""),
        ("numba", "missing", [], "cpu", "pip install 'fastcal[cpu]'"),
        ("numba", "missing", [], "cuda13", ""),  # TensorRT runs the network there
        ("dali", "missing", [], "cuda12", "pip install 'fastcal[cuda12]'"),
        (
            "onnxruntime", "works", ["onnxruntime 1.20", "onnxruntime-gpu 1.20"], "cuda13",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime",
        ),
    ],
)  # fmt: skip
def test_the_command_that_puts_it_right(name, status, wheels, extra, fix):
    finding = doctor.Finding("", status, wheels)
    assert doctor._fix(finding, doctor._PROBES[name], extra) == fix


@pytest.mark.parametrize(("release", "extra"), [("13", "cuda13"), ("12", "cuda12"), ("14", "cuda13")])
def test_a_gpu_without_what_uses_it(monkeypatch, release, extra):
    def run(name, probe):
        found = doctor.Finding(probe.label, "missing", [], "not installed")
        if name == "driver":
            found = doctor.Finding(probe.label, "works", [], f"1 x NVIDIA H200, driver 580.1, CUDA {release}")
        elif probe.where != "gpu":
            found = doctor.Finding(probe.label, "works", [f"{name} 1.0"])
        return found

    monkeypatch.setattr(doctor, "_run", run)
    tried = []
    findings = doctor.examine(tried.append)
    by_label = {finding.label: finding for finding in findings.libraries}
    assert not findings.ok
    for label in ("CuPy", "TensorRT"):
        assert by_label[label].fix == f"pip install 'fastcal[{extra}]'"
    assert (by_label["DALI (GPU)"].status, by_label["DALI (GPU)"].detail) == ("unused", "needs CuPy")
    libraries = ["ONNX", "ONNX Runtime", "numba", "DALI (CPU)", "CuPy", "TensorRT", "Matplotlib", "Jinja2", "Ray"]
    assert tried == ["GPU", *libraries]
    assert findings.jobs["calibrate on the CPU"] == []


def test_a_driver_that_is_too_old():
    assert "update the NVIDIA driver: to 525" in doctor._fix_driver(doctor.Finding("GPU", "works"), 11)
    assert doctor._fix_driver(doctor.Finding("GPU", "works"), 12) == ""
    assert "restart" in doctor._fix_driver(doctor.Finding("GPU", "broken"), None)


@no_gpu
def test_for_people_it_is_text_to_paste(spawn_fastcal):
    done = spawn_fastcal("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^ONNX Runtime +works +ran a network +onnxruntime(-gpu)? \d", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "nothing is to be done"
    for private in (str(Path.home()), sys.prefix, os.getcwd()):
        assert private not in done.stdout


def test_it_looks_at_no_library_in_its_own_process():
    program = (
        "import sys, fastcal.cli, fastcal.doctor; print([n for n in ('onnx', 'nvidia', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
