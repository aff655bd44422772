"""What several test files share."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from PIL import Image

from fastcal.batch import UNNAMED

settings.register_profile("untimed", deadline=None)  # a first example may wait for numba
settings.load_profile("untimed")

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
DIGITS = ROOT / "examples" / "digits"
SQUEEZENET = ROOT.parent / "shared" / "facts" / "squeezenet1_1.onnx"
needs_squeezenet = pytest.mark.skipif(not SQUEEZENET.exists(), reason=f"no {SQUEEZENET.name}")


def squeezenet_batches():
    """The four batches that TensorRT's caches of SqueezeNet in the data folder were made with."""
    for batch in range(4):
        yield {"input": np.random.default_rng([99, batch]).standard_normal((4, 3, 224, 224), dtype=np.float32)}


def is_unnamed(batch):
    """Return whether a batch's one array was given no name."""
    return [type(name) for name in batch] == [type(UNNAMED)]


@pytest.fixture(scope="session")
def trt():
    """TensorRT, for tests on a GPU."""
    import tensorrt

    return tensorrt


@pytest.fixture(scope="session")
def tactics(trt):
    """The tactic sources that need neither cuBLAS nor cuDNN."""
    return 1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS) | 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)


@pytest.fixture(autouse=True)
def no_thread_left():
    """No test leaves a thread of ours behind."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fastcal")] == []


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of six images of different sizes and formats with smooth and sharp parts."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for index, (width, height) in enumerate([(451, 300), (300, 451), (256, 256), (333, 500), (90, 60), (640, 427)]):
        coarse = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        for _ in range(5):
            x, y = int(random.integers(width)), int(random.integers(height))
            picture.paste(tuple(random.integers(0, 256, 3).tolist()), (x, y, x + width // 7, y + height // 7))
        picture.save(folder / f"{index}.{'png' if index % 2 else 'jpg'}", **({} if index % 2 else {"quality": 92}))
    return folder


@pytest.fixture(scope="session")
def real_photographs():
    """Paths of photographs that scikit-image ships, JPEG and PNG files in colour and in grey."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    names = "astronaut.png camera.png chelsea.png coffee.png motorcycle_left.png retina.jpg rocket.jpg"
    return [folder / name for name in names.split()]


@pytest.fixture
def onnx_file(tmp_path):
    """A function that writes a model given in ONNX's text format (the graph alone) to a file, with initializers."""

    def write(graph, initializers=None, name="model.onnx"):
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
        for key, values in (initializers or {}).items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, key))
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def run_fastcal():
    """A function that runs the command line in a process of its own."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "fastcal", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)

    return run


ENTRY_POINTS = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
"""


@pytest.fixture(scope="session")
def tensorrt_bindings(tmp_path_factory):
    """Folders for PYTHONPATH and LD_LIBRARY_PATH that make `import tensorrt` give TensorRT 10.16.1's bindings.

    The bindings import against stand-ins for TensorRT's libraries that export the entry points they name and do
    nothing.
    """
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("no TensorRT bindings: pip install tensorrt-cu13-bindings==10.16.1.11")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no TensorRT bindings: no C compiler for the libraries they name")
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "entry_points.c").write_text(ENTRY_POINTS)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = folder / f"lib{name}.so.10"
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library.name}",
            "-o",
            library,
            folder / "entry_points.c",
        ]
        subprocess.run(command, check=True)
    (folder / "tensorrt.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture
def run_on_bindings(tensorrt_bindings, tmp_path):
    """A function that runs a program in an empty folder, with TensorRT's bindings."""

    def run(program):
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60,
            env={**os.environ, **tensorrt_bindings},
        )  # fmt: skip

    return run


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    from fastcal.device import resolve

    if resolve("auto") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and CuPy"))
