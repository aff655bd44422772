"""Help texts that repeat names of the library: the command line starts without importing the modules they are from."""

import re
import subprocess
import sys

import pytest
import typer

from conftest import ROOT
from fastcal.algorithm import ALGORITHMS, DEFAULT_QUANTILE, VERSIONED
from fastcal.cli import app
from fastcal.feed.preprocess import PRESETS
from fastcal.observe.backends import BACKENDS

COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name: {option.name: option for option in command.params}
    for name, command in (COMMANDS | COMMANDS["cache"].commands).items()
}


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("calibrate", "algorithm", ALGORITHMS),
        ("convert", "algorithm", VERSIONED),
        ("calibrate", "backend", BACKENDS),
        ("calibrate", "preprocess", PRESETS),
    ],
)
def test_every_name_is_there(command, option, names):
    assert set(names) <= set(re.findall(r"\w+", OPTIONS[command][option].help))


def test_no_other_algorithm_is_there():
    for command, names in (("calibrate", ALGORITHMS), ("convert", VERSIONED)):
        listed = OPTIONS[command]["algorithm"].help.partition(": ")[2].partition(".")[0]
        assert tuple(re.findall(r"\w+", listed)) == names


def test_the_default_quantile_is_the_librarys():
    for command in ("calibrate", "compare", "quantize", "build"):
        assert OPTIONS[command]["quantile"].default == DEFAULT_QUANTILE


def test_help_imports_no_library():
    program = (
        "import sys; from fastcal.cli import app; app(['--help'], standalone_mode=False); "
        "print([name for name in ('numpy', 'onnx', 'matplotlib', 'nvidia') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_documentations_page_has_every_option():
    """The page of the command line names every option of the commands that calibrate, and no other."""
    page = (ROOT / ".docs" / "pages" / "command-line.md").read_text()
    named = set(re.findall(r"--[a-z][a-z0-9-]+", page))
    commands = ("calibrate", "compare", "quantize", "tune", "preview")
    options = {
        text
        for command in commands
        for each in OPTIONS[command].values()
        for text in (*each.opts, *each.secondary_opts)
    }
    rare = {"--output", "--tf32", "--tactic-sources", "--cache", "--model"}  # --help has them
    assert {text for text in options if text.startswith("--")} - rare <= named
    assert named - options <= {"--help", "--install-completion"}
