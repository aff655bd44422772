"""Every code block of the README and of the examples' READMEs, run as it stands.

A block runs in a copy of a folder that has what it names: the digits sample as `model.onnx` and `images/`, a cache of
it, the examples, and a `.venv`. What a block would install is installed: `pip` and the making of a `.venv` do nothing.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from conftest import DIGITS, ROOT

#: What a block that uses TensorRT's objects is given, beside what it names itself.
BUILDER = """
import fastcal
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder, trt
logger = Logger()
builder = start_builder(logger)
network = parse(builder, Model("model.onnx"), logger)
config = builder.create_builder_config()
config.set_flag(trt.BuilderFlag.INT8)
profile = builder.create_optimization_profile()
profile.set_shape("image", *[(32, 3, 32, 32)] * 3)
config.add_optimization_profile(profile)
config.set_calibration_profile(profile)
"""

NEEDS_GPU = re.compile(r"fastcal build |build\.py|build\.sh|int8_calibrator")

#: Packages that a block may show fastcal together with, and that the tests do without.
OTHERS = ("modelopt", "polygraphy", "torch")


def marks(code):
    """Why a block cannot run everywhere."""
    found = []
    if NEEDS_GPU.search(code):
        found.append(pytest.mark.gpu)
    if "build.sh" in code and shutil.which("trtexec") is None:
        found.append(pytest.mark.skip(reason="no trtexec in PATH; test_examples.py has a stand-in for it"))
    for module in OTHERS:
        if module in code and importlib.util.find_spec(module) is None:
            found.append(pytest.mark.skip(reason=f"no {module} here"))
    if "bin/pytest" in code:
        found.append(pytest.mark.skip(reason="these are its tests; .ci/run runs it"))
    return found


READMES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")


def blocks():
    """The code blocks of all READMEs: the folder they run in, their language and text."""
    for path in READMES:
        text = path.read_text()
        found = FENCED.findall(text) + [
            ("sh", textwrap.dedent(code)) for code in INDENTED.findall(FENCED.sub("", text))
        ]
        assert found, f"{path} has no code block"
        for number, (language, code) in enumerate(found, start=1):
            if language == "text":  # a figure
                continue
            folder = path.parent.relative_to(ROOT)
            yield pytest.param(folder, language, code, id=f"{path.relative_to(ROOT)}-{number}", marks=marks(code))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder that the blocks run in copies of."""
    folder = tmp_path_factory.mktemp("readme")
    left_out = shutil.ignore_patterns("*.cache*", "__pycache__", "images", "test")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=left_out)
    for place in (folder, *(folder / "examples").iterdir()):
        shutil.copy2(DIGITS / "digits.onnx", place / "model.onnx")
        (place / "images").symlink_to(DIGITS / "images")  # thousands of files, which no block writes to
    (folder / "examples" / "digits" / "test").symlink_to(DIGITS / "test")
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, script in {
        "fastcal": f'exec "{sys.executable}" -m fastcal "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "python3": f'[ "$*" = "-m venv .venv" ] || exec "{sys.executable}" "$@"',
        "pip": "exit 0",
    }.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    run(folder, ["fastcal", "calibrate", "model.onnx", "images/", "-o", "model.cache"], folder)
    for suffix in ("", ".json"):
        shutil.copy(folder / f"model.cache{suffix}", folder / f"earlier.cache{suffix}")
    return folder


def run(top, command, folder):
    path = os.pathsep.join([str(top / ".venv" / "bin"), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, "PYTHONPATH": python_path}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("folder", "language", "code"), list(blocks()))
def test_block(tmp_path, sample, folder, language, code):
    top = tmp_path / "top"
    shutil.copytree(sample, top, symlinks=True)
    if language == "python":
        given = BUILDER if "int8_calibrator" in code else ""
        run(top, ["python", "-c", given + code], top / folder)
    else:
        assert language == "sh", f"say in this test what becomes of {language!r}"
        run(top, ["bash", "-euo", "pipefail", "-c", code], top / folder)
