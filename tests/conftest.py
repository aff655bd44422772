"""Fixtures and helpers that several test files share."""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from unittest import mock

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # before libraries count the cores that they may use
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import numpy as np
import onnx
import pytest
from hypothesis import settings
from PIL import Image

import fastcal
from fastcal.batch import UNNAMED
from fastcal.errors import UnavailableError

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


def alter(path):
    """Change the last byte of a file, and leave its size and time as they are."""
    times, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


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


@pytest.fixture
def quick_engines(trt, tactics):
    """TensorRT builds as fast as it can, without cuBLAS and cuDNN, where nothing else is asked of it."""
    create = trt.Builder.create_builder_config

    def create_quick(builder):
        config = create(builder)
        config.builder_optimization_level = 0
        config.set_tactic_sources(tactics)
        return config

    with mock.patch.object(trt.Builder, "create_builder_config", create_quick):
        yield


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
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = "astronaut.png camera.png chelsea.png coffee.png motorcycle_left.png retina.jpg rocket.jpg"
    return [folder / name for name in names.split()]


def write_onnx(path, graph, initializers=None):
    """Write a model given in ONNX's text format (the graph alone) with initializers by name; return its path."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    for key, values in (initializers or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, key))
    onnx.save(model, path)
    return path


@pytest.fixture
def onnx_file(tmp_path):
    """A function that writes a model given in ONNX's text format (the graph alone) to a file, with initializers."""

    def write(graph, initializers=None, name="model.onnx"):
        return write_onnx(tmp_path / name, graph, initializers)

    return write


@pytest.fixture(scope="session")
def spawn_fastcal():
    """A function that runs the command line in a process of its own."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "fastcal", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)

    return run


@contextlib.contextmanager
def as_in_a_new_process(cwd, env):
    """Give the block a folder and variables of its own, and undo what the command line leaves behind."""
    from fastcal.cli.terminal import Output, output

    folder, logger = os.getcwd(), logging.getLogger("fastcal")
    level = logger.level
    with mock.patch.dict(os.environ, os.environ if env is None else env, clear=True):
        os.chdir(folder if cwd is None else cwd)
        try:
            yield
        finally:
            os.chdir(folder)
            logger.setLevel(level)
            vars(output).update(vars(Output()))


@contextlib.contextmanager
def captured():
    """Yield two files that receive what the block, C libraries included, writes to the standard output and error."""
    with contextlib.ExitStack() as stack:
        files = []
        for descriptor, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
            file = stack.enter_context(tempfile.TemporaryFile())
            stream, copy = getattr(sys, name), os.dup(descriptor)
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, descriptor)
            stack.callback(setattr, sys, name, stream)
            stream.flush()
            os.dup2(file.fileno(), descriptor)
            mine = open(descriptor, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115 - below
            setattr(sys, name, stack.enter_context(mine))
            files.append(file)
        yield files


def run_here(function, words, cwd, env):
    """Call a function that ends by SystemExit as a process with these words; return what `subprocess.run` would."""
    with captured() as files:
        with as_in_a_new_process(cwd, env), mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as ended:
            function()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        texts = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in files]
    return subprocess.CompletedProcess(words, ended.value.code or 0, *texts)


@pytest.fixture(scope="session")
def run_fastcal():
    """A function that runs the command line in this process, and returns what `subprocess.run` would return."""
    import typer.main

    from fastcal.cli import app

    command = typer.main.get_command(app)  # made once; a call of `app` makes it anew

    def run(*arguments, cwd=None, env=None):
        words = [*map(str, arguments)]
        return run_here(lambda: command(words, prog_name="fastcal"), ["fastcal", *words], cwd, env)

    return run


def run_script(*words, cwd, env):
    """Run a Python script in this process as `python` does; return what `subprocess.run` would return."""

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as a user may
            runpy.run_path(os.path.abspath(words[0]), run_name="__main__")
        sys.exit()

    return run_here(run, [*words], cwd, env)


#: A program of the shell that hands its words to the process of the tests, and says what that says.
HAND_OVER = """#!/bin/sh
{{ printf '%s\\037' {name} "$PWD" "$@"; echo; }} > "{folder}/calls"
read -r status < "{folder}/answers"
{cat} "{folder}/stdout"
{cat} "{folder}/stderr" >&2
exit "$status"
"""


@pytest.fixture
def run_shell(tmp_path_factory, run_fastcal):
    """A function that runs a command whose `fastcal` and `python` run in this process, where libraries are loaded.

    It takes the command, the folder for both programs, and the options of `subprocess.Popen`; it returns what
    `subprocess.run` would return.
    """
    folder = tmp_path_factory.mktemp("shell")
    pipes = folder / "calls", folder / "answers"
    for path in pipes:
        os.mkfifo(path)

    def tell_end(process, calls):
        process.wait()
        os.write(calls, b"\n")

    def answer(line, answers, env):
        name, place, *words = line.split("\037")[:-1]
        done = (run_fastcal if name == "fastcal" else run_script)(*words, cwd=place, env=env)
        for stream in ("stdout", "stderr"):
            (folder / stream).write_text(getattr(done, stream))
        print(done.returncode, file=answers, flush=True)

    def run(command, programs, *, env, **options):
        for name in ("fastcal", "python"):
            (programs / name).write_text(HAND_OVER.format(name=name, folder=folder, cat=shutil.which("cat")))
            (programs / name).chmod(0o755)
        with contextlib.ExitStack() as stack:
            texts = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            # Both are open at both ends all the time: neither side meets an end, or waits for the other to open one.
            calls, answers = (
                stack.enter_context(open(os.open(path, os.O_RDWR), mode))
                for path, mode in zip(pipes, "rw", strict=True)
            )
            process = subprocess.Popen(
                command, stdout=texts[0], stderr=texts[1], env=env, start_new_session=True, **options
            )
            thread = threading.Thread(target=tell_end, args=(process, calls.fileno()))
            thread.start()
            stack.callback(thread.join)
            while (line := calls.readline()) != "\n":
                try:
                    answer(line, answers, env)
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)  # else the program would wait for its answer
                    raise
            for text in texts:
                text.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, *(text.read() for text in texts))

    return run


@pytest.fixture(scope="session")
def without_libraries(tmp_path_factory):
    """The environment of a process in which the doctor is fast: of most libraries it tries, the import fails."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("jinja2", "matplotlib", "numba", "onnxruntime", "ray"):
        (folder / f"{name}.py").write_text("raise ImportError('broken')")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


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


def make_stand_ins(folder, release):
    """Return the environment in which bindings import against stand-ins for TensorRT's libraries of that release.

    The stand-ins export the entry points that the bindings name, and do nothing.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no TensorRT bindings: no C compiler for the libraries they name")
    (folder / "entry_points.c").write_text(ENTRY_POINTS)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = folder / f"lib{name}.so.{release}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library]
        subprocess.run([compiler, *options, folder / "entry_points.c"], check=True)
    (folder / "tensorrt.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="session")
def tensorrt_bindings(tmp_path_factory):
    """The environment in which `import tensorrt` gives TensorRT 10.16.1's bindings."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("no TensorRT bindings: pip install tensorrt-cu13-bindings==10.16.1.11")
    return make_stand_ins(tmp_path_factory.mktemp("tensorrt"), 10)


@pytest.fixture(scope="session")
def tensorrt_11_bindings(tmp_path_factory):
    """The environment in which `import tensorrt` gives TensorRT 11.4's bindings.

    They cannot be installed beside those of TensorRT 10: FASTCAL_TENSORRT_11 names the folder that has them.
    """
    bindings = os.environ.get("FASTCAL_TENSORRT_11")
    if bindings is None:
        wheel = "tensorrt-cu13-bindings==11.4.0.106"
        pytest.skip(f"no TensorRT bindings: pip install --no-deps --target F {wheel}, and set FASTCAL_TENSORRT_11=F")
    folder = tmp_path_factory.mktemp("tensorrt11")
    (folder / "tensorrt_bindings").symlink_to(Path(bindings).resolve() / "tensorrt_bindings")
    return make_stand_ins(folder, 11)


@functools.cache
def start_rtx():
    """Return TensorRT for RTX, which keeps the first logger that it is given: fastcal's, in any order of tests."""
    import tensorrt_rtx

    from fastcal.library import logger_of

    tensorrt_rtx.Builder(logger_of(tensorrt_rtx))
    return tensorrt_rtx


@pytest.fixture(scope="session")
def loaded_bindings(tensorrt_bindings):
    """The module `tensorrt_bindings`, loaded into this process."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT itself is installed: its libraries and the stand-ins do not go into one process")
    if importlib.util.find_spec("tensorrt_rtx") is not None:  # its first builder looks symbols up: not in the stand-ins
        start_rtx()
    for library in sorted(Path(tensorrt_bindings["LD_LIBRARY_PATH"]).glob("*.so.10")):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")


def forget_modules_on(dependency):
    """Remove the modules of fastcal that use a module, directly or through another module, from where imports look."""
    gone = {dependency.__name__}

    def depends(module):
        values = [*vars(module).values()]
        return any(value is dependency or getattr(value, "__module__", None) in gone for value in values)

    while found := [name for name, module in [*sys.modules.items()] if name.startswith("fastcal.") and depends(module)]:
        for name in found:
            package, _, attribute = name.rpartition(".")
            if getattr(sys.modules[package], attribute, None) is sys.modules.pop(name):
                delattr(sys.modules[package], attribute)
        gone.update(found)
    for name, value in [*vars(fastcal).items()]:  # names that were loaded lazily
        if getattr(value, "__module__", None) in gone:
            delattr(fastcal, name)


@pytest.fixture
def rtx(monkeypatch):
    """TensorRT for RTX, whose parser and builder need no GPU; `import tensorrt` gives it for the length of a test."""
    tensorrt_rtx = start_rtx()
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    yield tensorrt_rtx
    forget_modules_on(tensorrt_rtx)


@pytest.fixture
def trt_bindings(loaded_bindings, monkeypatch):
    """TensorRT 10.16.1's Python bindings, which `import tensorrt` gives for the length of a test."""
    tensorrt = module_from_spec(ModuleSpec("tensorrt", None))
    vars(tensorrt).update({name: value for name, value in vars(loaded_bindings).items() if name[0] != "_"})
    tensorrt.__version__ = loaded_bindings.__version__
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    yield tensorrt
    forget_modules_on(tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError):
        fastcal.EntropyCalibrator2  # noqa: B018 - nothing is left of the bindings


#: The files that take long and would be the last to start: they start first, so that all processes end about together.
LONGEST = ("test_with_ray.py", "test_cli.py", "test_readme.py", "test_typed.py")


def pytest_configure(config):
    """Let pytest-xdist hand the files out in their order, and not by their numbers of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Put the longest files first, and skip what needs a GPU, or a package on a GPU, where there is none."""
    from fastcal.device import resolve
    from fastcal.observe.backends import has_cuda_provider

    items.sort(key=lambda item: item.path.name not in LONGEST)
    gpu = "an NVIDIA GPU and CuPy"
    missing = {gpu}
    if resolve("auto") is not None:
        found = {"TensorRT": importlib.util.find_spec("tensorrt") is not None, "onnxruntime-gpu": has_cuda_provider()}
        missing = {name for name, is_there in found.items() if not is_there}
    for item in items:
        if (mark := item.get_closest_marker("gpu")) is not None:
            for need in missing.intersection([gpu, *mark.args]):
                item.add_marker(pytest.mark.skip(reason=f"needs {need}"))
