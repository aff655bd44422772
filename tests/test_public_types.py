"""Public signatures name only fastcal's public types, and those of the standard library, NumPy and ONNX."""

import ast
import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable

import pytest

import fastcal
from fastcal.errors import UnavailableError

#: The packages whose types a public signature may name.
KNOWN = {*sys.stdlib_module_names, "numpy", "onnx"}

#: Methods that Python calls for users: what they take and return is public.
SPECIAL = {"__init__", "__call__", "__enter__", "__iter__", "__len__", "__getitem__"}


def names_for_type_checkers(module):
    """Return what a module imports under TYPE_CHECKING."""
    tree = ast.parse(inspect.getsource(module))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for guard in guarded for node in guard.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in imports
        for alias in node.names
    }


def hints(annotated):
    """Return the annotations of a function or class, by parameter or attribute."""
    own = inspect.get_annotations(annotated)
    if not own:
        return {}
    known = names_for_type_checkers(sys.modules[annotated.__module__])
    return {key: hint for key, hint in typing.get_type_hints(annotated, localns=known).items() if key in own}


def is_public(name):
    """Return whether users may use a class's member."""
    return name in SPECIAL or not name.startswith("_")


def function_of(member):
    """Return the function behind a method, class method or property; None if there is none."""
    for attribute in ("__func__", "fget", "func"):
        member = getattr(member, attribute, member)
    return member if inspect.isfunction(member) else None


def annotations(name):
    """Yield each annotation of a public name, with the place that it is in."""
    public = getattr(fastcal, name)
    if inspect.isfunction(public):
        yield from ((f"{name}({key})", hint) for key, hint in hints(public).items())
        return
    overridden: set[str] = set()
    for kind in public.__mro__:
        if not kind.__module__.startswith("fastcal"):
            continue
        yield from ((f"{name}.{key}", hint) for key, hint in hints(kind).items() if is_public(key))
        for member, value in vars(kind).items():
            function = function_of(value)
            is_made = dataclasses.is_dataclass(kind) and member == "__init__"  # from the fields
            if is_public(member) and member not in overridden and function is not None and not is_made:
                yield from ((f"{name}.{member}({key})", hint) for key, hint in hints(function).items())
        overridden |= vars(kind).keys()


def classes(annotation):
    """Yield the classes that an annotation names."""
    for inner in typing.get_args(annotation):
        yield from [] if typing.get_origin(annotation) is typing.Literal else classes(inner)
    if isinstance(annotation, (list, tuple)):  # the parameters of a Callable
        for inner in annotation:
            yield from classes(inner)
    elif isinstance(typing.get_origin(annotation) or annotation, type):
        yield typing.get_origin(annotation) or annotation


def is_exported(kind):
    """Return whether users can import a class from where they know it."""
    package, _, _ = kind.__module__.partition(".")
    if package == "fastcal":
        return kind.__name__ in fastcal.__all__ and getattr(fastcal, kind.__name__) is kind
    return package in KNOWN


@pytest.mark.parametrize("name", fastcal.__all__)
def test_its_signatures_name_exported_types_alone(name, request):
    try:
        getattr(fastcal, name)
    except UnavailableError:  # TensorRT is not installed
        request.getfixturevalue("trt_bindings")
    found = list(annotations(name))
    assert [
        f"{place}: {kind.__name__}" for place, hint in found for kind in classes(hint) if not is_exported(kind)
    ] == []


def test_every_class_in_an_annotation_is_seen():
    def takes(a: "dict[str, fastcal.Feed]", b: Callable[[fastcal.Progress], None] | None) -> type[int]: ...

    seen = {key: {*classes(hint)} - {types.UnionType} for key, hint in hints(takes).items()}
    assert seen == {
        "a": {dict, str, fastcal.Feed},
        "b": {Callable, fastcal.Progress, type(None)},
        "return": {type, int},
    }
