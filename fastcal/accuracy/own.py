"""A user's own metric: a Python function, or a class that adds up batches."""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastcal.accuracy.base import Metric, Outputs, share
from fastcal.errors import FastcalError


@dataclass
class OwnMetric(Metric):
    """A metric that a user gives.

    Attributes:
        make: A function of the exact outputs of a batch and those to judge, dicts of arrays by output, that returns a
            number; the metric is its mean over the samples. Or a class whose objects take the same in `add`, and
            return the number from `value()`.
    """

    make: Callable[..., Any]
    _object: Any = field(default=None, init=False)
    _sum: float = field(default=0.0, init=False)
    _samples: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        """The name of the function or class."""
        return getattr(self.make, "__name__", type(self.make).__name__)

    def add(self, exact: Outputs, other: Outputs, samples: int) -> None:
        """Add a batch, as `Metric`."""
        self._samples += samples
        if isinstance(self.make, type):
            if self._object is None:
                self._object = self._call(self.make)
            self._call(self._object.add, dict(exact), dict(other))
        else:
            self._sum += samples * self._number(self._call(self.make, dict(exact), dict(other)))

    @property
    def value(self) -> float | None:
        """The number, as `Metric`."""
        if not isinstance(self.make, type):
            return share(self._sum, self._samples)
        return None if self._object is None else self._number(self._call(self._object.value))

    def _call(self, called: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return called(*arguments)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FastcalError(f"metric {self.name} failed: {reason}; correct it") from error

    def _number(self, result: Any) -> float:
        try:
            number = float(result)
        except (TypeError, ValueError) as error:
            raise FastcalError(f"metric {self.name} returned {result!r:.80}; it must return a number") from error
        if not math.isfinite(number):
            raise FastcalError(f"metric {self.name} returned {number}; it must return a finite number")
        return number


def load_metric(place: str) -> OwnMetric:
    """Return the metric that "module:name" or "file.py:name" stands for.

    Raises:
        FastcalError: There is no such module, file or name, or it cannot be called.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name:
        raise FastcalError(f"metric {place!r} is no function; write file.py:name or module:name")
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        found = getattr(module, name)
    except Exception as error:  # of the user's code, too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FastcalError(f"cannot load metric {place}: {reason}; write file.py:name or module:name") from error
    if not callable(found):
        raise FastcalError(f"metric {place} is of type {type(found).__name__}; it must be a function or a class")
    return OwnMetric(found)


def _load_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location("fastcal_own_metric", path)
    assert spec is not None  # for a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
