"""What a user imports, and from where."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

import dspy_resilient


def test_all_names_every_public_name():
    """`__all__` is sorted and equals what is public (section 2)."""
    public = [
        name
        for name, value in vars(dspy_resilient).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert dspy_resilient.__all__ == sorted(public)


def test_star_import_gives_the_public_names():
    """`from dspy_resilient import *` works, and gives nothing else."""
    names = {}
    exec("from dspy_resilient import *", names)
    del names["__builtins__"]
    assert sorted(names) == dspy_resilient.__all__


@pytest.mark.parametrize("name", dspy_resilient.__all__)
def test_every_public_name_is_documented(name):
    """A name that users see says what it is."""
    assert inspect.getdoc(getattr(dspy_resilient, name))


def test_every_error_is_public():
    """What can be raised can be caught by name."""
    errors = importlib.import_module("dspy_resilient.errors")
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert own <= set(dspy_resilient.__all__)


def test_the_class_keeps_its_module():
    """Saved programs name it, so files may move and the name may not."""
    assert dspy_resilient.ResilientLM.__module__ == "dspy_resilient"
    assert dspy_resilient.ResilientLM.__qualname__ == "ResilientLM"


@pytest.mark.parametrize("module", ["dspy_resilient.testing", "dspy_resilient.cache"])
def test_packages_name_what_they_export(module):
    """The same holds for the packages below."""
    package = importlib.import_module(module)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing
    assert package.__all__ == sorted(package.__all__)
