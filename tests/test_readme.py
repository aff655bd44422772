"""Every code block of the README, of the examples' READMEs and of the documentation's pages, run as it stands.

A block runs in a copy of a folder with the files that blocks name: the digits sample as `model.onnx` and `images/`, a
cache of it, the examples, and a `.venv`. Packages are installed already: `pip` and the making of a `.venv` do nothing.
"""

import importlib.util
import os
import re
import shlex
import shutil
import textwrap
import warnings

import pytest

from conftest import DIGITS, ROOT
from fastcal.device import resolve

#: The objects of TensorRT's that a block uses and does not make.
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

NEEDS_GPU = re.compile(r"fastcal build (?!.*--builder rtx)|build\.py|build\.sh|build_engine\(|int8_calibrator")

#: Stands in for trtexec: reads the files that it is told to read, and writes the engine's file.
TRTEXEC = """
for option; do
  case $option in
    --onnx=*|--calib=*) test -s "${option#*=}" || { echo "no ${option#*=}" >&2; exit 1; } ;;
    --saveEngine=*) echo > "${option#*=}" ;;
    --int8|--fp16) ;;
    *) echo "unknown option $option" >&2; exit 1 ;;
  esac
done
"""

#: A line of the shell that starts `fastcal` and uses no other feature of the shell.
FASTCAL = re.compile(r"fastcal [^#$&;<>|\\]*")

#: Packages that a block may show fastcal together with, and that the tests do without.
OTHERS = ("modelopt", "polygraphy", "torch", "ultralytics")


def marks(code):
    """Return the marks of a block that cannot run everywhere."""
    found = []
    if NEEDS_GPU.search(code):
        found.append(pytest.mark.gpu("TensorRT"))
    if "build.sh" in code and shutil.which("trtexec") is None:
        found.append(pytest.mark.skip(reason="no trtexec in PATH; test_examples.py has a stand-in for it"))
    for module in OTHERS:
        if module in code and importlib.util.find_spec(module) is None:
            found.append(pytest.mark.skip(reason=f"no {module} here"))
    if "--workers" in code:
        found.append(pytest.mark.skip(reason="test_with_ray.py runs this command"))
    if "bin/pytest" in code:
        found.append(pytest.mark.skip(reason="these are its tests; .ci/run runs it"))
    return found


READMES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
PAGES = sorted((ROOT / ".docs" / "pages").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def blocks_of(path):
    """Yield the language and the text of each code block of a page."""
    text = path.read_text()
    yield from FENCED.findall(text)
    if path in READMES:
        yield from (("sh", textwrap.dedent(code)) for code in INDENTED.findall(FENCED.sub("", text)))


def blocks():
    """Yield the code blocks of all pages: the folder that a block runs in, its language and its text, each once."""
    seen = set()
    for path in READMES + PAGES:
        folder = path.parent.relative_to(ROOT) if path in READMES else "."
        found = list(blocks_of(path))
        assert found or path in PAGES, f"{path} has no code block"
        for number, (language, code) in enumerate(found, start=1):
            if language == "text" or (str(folder), code) in seen:  # a figure, or a block that another page has
                continue
            seen.add((str(folder), code))
            yield pytest.param(folder, language, code, id=f"{path.relative_to(ROOT)}-{number}", marks=marks(code))


@pytest.fixture(scope="module")
def sample(tmp_path_factory, run_fastcal):
    """A folder of which every block gets a copy."""
    folder = tmp_path_factory.mktemp("readme")
    left_out = shutil.ignore_patterns("*.cache*", "__pycache__", "images", "test")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=left_out)
    for place in (folder, *(folder / "examples").iterdir()):
        shutil.copy2(DIGITS / "digits.onnx", place / "model.onnx")
        (place / "images").symlink_to(DIGITS / "images")  # thousands of files, which no block writes to
    (folder / "examples" / "digits" / "test").symlink_to(DIGITS / "test")
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    scripts = {"python3": '[ "$*" = "-m venv .venv" ]', "pip": "exit 0"}
    if resolve("auto") is None or shutil.which("trtexec") is None:
        scripts["trtexec"] = TRTEXEC
    for name, script in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    for words in ("calibrate model.onnx images/ -o model.cache", "quantize model.onnx model.cache -o other.qdq.onnx"):
        done = run_fastcal(*words.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    shutil.copy(folder / "other.qdq.onnx", folder / "trained.qdq.onnx")
    for suffix in ("", ".json"):
        shutil.copy(folder / f"model.cache{suffix}", folder / f"earlier.cache{suffix}")
    return folder


@pytest.mark.parametrize(("folder", "language", "code"), list(blocks()))
def test_block(request, tmp_path, monkeypatch, run_fastcal, run_shell, sample, folder, language, code):
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("quick_engines")
    top = tmp_path / "top"
    shutil.copytree(sample, top, symlinks=True)
    if language == "python":
        monkeypatch.chdir(top / folder)
        given = BUILDER if "int8_calibrator" in code else ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as a user may
            exec(compile(given + code, "block", "exec"), {})
    elif all(map(FASTCAL.fullmatch, code.splitlines())):
        for line in code.splitlines():
            done = run_fastcal(*shlex.split(line)[1:], cwd=top / folder)
            assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert language == "sh", f"say in this test what becomes of {language!r}"
        programs = top / ".venv" / "bin"
        environment = {**os.environ, "PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
        done = run_shell(["bash", "-euo", "pipefail", "-c", code], programs, cwd=top / folder, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", [*READMES, ROOT / "benchmarks" / "README.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    links = [link for link in LINK.findall(path.read_text()) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_two_commands_show_how_far_they_are():
    """Installing takes a minute: pip must not be quiet."""
    commands = re.findall(r"^python3 -m venv .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert re.search(r"pip install (?!-)", command)
