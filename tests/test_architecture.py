"""The direction of imports, and what is private."""

import ast
import logging

import pytest

from conftest import ROOT

MODULES = sorted((ROOT / "fastcal").rglob("*.py"))


def test_imports_go_down_and_in_no_circle(monkeypatch):
    cli = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    for name in logging.Logger.manager.loggerDict:  # it disables the loggers that there are
        monkeypatch.setattr(logging.getLogger(name), "disabled", logging.getLogger(name).disabled)
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == cli.EXIT_STATUS_SUCCESS


def test_no_private_name_is_imported_elsewhere():
    found = [
        f"{path.name}: {node.module}.{alias.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert found == []
