"""The types that applications see: one that uses all public names passes mypy's strictest checks."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastcal

DOWNSTREAM = Path(__file__).parent / "downstream.py"


def used(source):
    """Return the attributes of `fastcal` that a source names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastcal"
    }


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="no mypy: pip install '.[dev]'")
def test_an_application_that_uses_everything_is_typed(tmp_path):
    assert set(fastcal.__all__) <= used(DOWNSTREAM.read_text())
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import fastcal\nfastcal.calibrate(1)\nfastcal.no_such_name\nfastcal.ImageFeed('x').paths + 1\n")
    # Without this project's own settings: applications have the package and its py.typed.
    options = ("--strict", "--config-file", "", "--cache-dir", os.devnull)
    command = [sys.executable, "-m", "mypy", *options, DOWNSTREAM, wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    errors = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error: " in line]
    assert errors == [["wrong.py", "2"], ["wrong.py", "3"], ["wrong.py", "4"]], done.stdout
