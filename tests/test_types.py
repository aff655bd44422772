"""The types that applications see: `downstream.py` uses all public names, and mypy checks it with the package."""

import ast
from importlib.resources import files
from pathlib import Path

import fastcal


def used(source):
    """Return the attributes of `fastcal` that a source names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastcal"
    }


def test_an_application_that_uses_everything_is_typed():
    assert set(fastcal.__all__) <= used((Path(__file__).parent / "downstream.py").read_text())
    assert (files("fastcal") / "py.typed").is_file()  # else the types are not an application's
