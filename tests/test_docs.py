"""The documentation: it builds without a warning, and leaves out no public name and none of their parameters."""

import re
import subprocess
import sys

import pytest

import fastcal
from conftest import ROOT

griffe = pytest.importorskip("griffe", reason="no mkdocs: pip install '.[docs]'")


def public_objects():
    """Yield every public name, and its public methods and properties, as griffe reads them from the source."""
    package = griffe.load("fastcal", search_paths=[ROOT], docstring_parser="google", resolve_aliases=True)
    for name in fastcal.__all__:
        thing = package[name]
        yield name, thing.final_target if thing.is_alias else thing
        if thing.is_class:
            for member in thing.all_members.values():
                if (member.is_function or member.is_attribute) and not member.name.startswith("_"):
                    yield f"{name}.{member.name}", member.final_target if member.is_alias else member


def parameters(thing):
    """Return the parameters of a function, or of a class's construction, that its docstring must explain."""
    if thing.is_class:
        thing = thing.all_members.get("__init__", thing)
    return [p.name for p in getattr(thing, "parameters", []) if p.name not in ("self", "cls", "_")]


def explained(thing):
    """Return the names that a docstring explains, in a list of arguments or in its text."""
    sections = thing.docstring.parsed if thing.docstring else []
    texts = [section.value for section in sections if section.kind.value == "text"]
    items = [
        item for section in sections if section.kind.value in ("parameters", "attributes") for item in section.value
    ]
    return {item.name.lstrip("*") for item in items} | set(re.findall(r"`(\w+)`", " ".join(texts)))


def test_every_public_name_is_documented():
    lacking = []
    for name, thing in public_objects():
        if thing.is_attribute and "property" not in thing.labels:
            continue  # explained under its class's attributes
        if thing.docstring is None:
            lacking.append(name)
        else:
            lacking += [f"{name}: {parameter}" for parameter in parameters(thing) if parameter not in explained(thing)]
    assert lacking == []


def test_it_builds_without_a_warning_and_holds_every_public_name(tmp_path):
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", ROOT / ".docs" / "mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "reference.html").read_text()
    assert [name for name in fastcal.__all__ if f'id="fastcal.{name}"' not in page] == []
