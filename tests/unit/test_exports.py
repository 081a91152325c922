"""What a user imports, and from where."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

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


# What users may import, and from where. Every other module and name may change at any time.
PUBLIC = {
    "dspy_resilient": dspy_resilient.__all__,
    "dspy_resilient.errors": ["CallRejectedError", "ResilienceError"],
    "dspy_resilient.events": ["CallFinished", "CircuitOpened", "Event", "StoreLost"],
    "dspy_resilient.observe.otel": ["instrument"],
    "dspy_resilient.observe.prometheus": ["ClientCollector"],
    "dspy_resilient.providers": ["async_client", "client"],
    "dspy_resilient.shared": ["MemoryStore", "RedisStore", "Store"],
    "dspy_resilient.stats": ["Latency", "Stats"],
    "dspy_resilient.testing": importlib.import_module("dspy_resilient.testing").__all__,
}
NAMES = [
    *("AllTargetsFailedError", "BrokenStateError", "Budget", "BudgetExceededError", "BudgetStop"),
    *("CachePolicy", "CallRejectedError", "CircuitBreaker", "CircuitOpenError", "CircuitPolicy"),
    *("CircuitState", "ClientClosedError", "Clients", "DeadlineExceededError", "Evaluate"),
    *("Health", "HealthState", "LimitExceededError", "LimitPolicy", "ResilienceError"),
    *("ResilientLM", "RestartLimitError", "RetryPolicy", "ThrottledError"),
]
MODULES = {
    *("_support", "budgets", "cache", "circuit", "cli", "clients", "demo", "errors", "evaluation"),
    *("events", "limits", "lm", "observe", "outcomes", "pipeline", "policies", "providers"),
    *("shared", "stats", "targets", "testing"),
}
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_list_of_public_names_is_held():
    """A name that is added, renamed or taken away is a decision, made here too."""
    assert dspy_resilient.__all__ == NAMES


def test_the_list_of_modules_at_the_top_level_is_held():
    """A new room of the house is a decision too."""
    found = {each.name for each in pkgutil.iter_modules(dspy_resilient.__path__)}
    assert found - {"__main__"} == MODULES


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_documented(module):
    """What users may import can be imported from there."""
    package = importlib.import_module(module)
    assert package.__doc__
    for name in PUBLIC[module]:
        assert inspect.getdoc(getattr(package, name)) or not callable(getattr(package, name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_documentation_imports_only_what_is_public(page):
    """What it shows, users copy."""
    for module, names in re.findall(
        r"^from (dspy_resilient[\w.]*) import ([^\n#(]+|\([^)]*\))", page.read_text(), re.MULTILINE
    ):
        assert module in PUBLIC, module
        given = {name.strip().partition(" as ")[0] for name in names.strip("() \n").split(",")}
        public = set(PUBLIC[module])
        if module in ("dspy_resilient.errors", "dspy_resilient.events"):
            public = {n for n in vars(importlib.import_module(module)) if n[0].isupper()}
        assert given - {""} <= public, module


@pytest.mark.parametrize("module", ["dspy_resilient.testing", "dspy_resilient.cache"])
def test_packages_name_what_they_export(module):
    """The same holds for the packages below."""
    package = importlib.import_module(module)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing
    assert package.__all__ == sorted(package.__all__)
