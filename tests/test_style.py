"""The shape of fastcal's code: the first words of its docstrings, and the sizes of functions, modules and classes."""

import ast
import functools
import re

from conftest import ROOT

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MODULES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "fastcal").rglob("*.py"))}


@functools.cache
def nodes():
    """Return the modules and the nodes of all their syntax trees."""
    return [(module, node) for module, text in MODULES.items() for node in ast.walk(ast.parse(text))]


def body_length(function):
    """Return the number of lines of a function's body, without its docstring."""
    body = function.body
    first = body[1] if ast.get_docstring(function) and len(body) > 1 else body[0]
    return function.end_lineno - first.lineno + 1


def attributes(defined):
    """Return the names of the attributes that a class sets on self."""
    return {
        node.attr
        for node in ast.walk(defined)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def test_docstrings_begin_with_a_verb_or_a_noun():
    documented = [
        (module, node) for module, node in nodes() if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
    ]
    first_lines = [(module, (ast.get_docstring(node) or "").partition("\n")[0]) for module, node in documented]
    assert len(first_lines) > 500
    assert [f"{m}: {line}" for m, line in first_lines if re.match(r"(What|Who|Where|Whether|How)\b", line)] == []


def test_no_function_is_longer_than_50_lines():
    lengths = [(module, node.name, body_length(node)) for module, node in nodes() if isinstance(node, FUNCTIONS)]
    assert [found for found in lengths if found[2] > 50] == []


def test_no_module_is_longer_than_400_lines():
    lengths = {module: text.count("\n") for module, text in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


def test_no_class_has_more_than_12_attributes():
    counts = [(module, node.name, len(attributes(node))) for module, node in nodes() if isinstance(node, ast.ClassDef)]
    assert [found for found in counts if found[2] > 12] == []
