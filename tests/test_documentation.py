"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import dspy
import pytest

import dspy_resilient

README = Path(__file__).parents[1] / "README.md"
RECIPES = README.with_name("RECIPES.md")


def run_blocks(page):
    """Run each Python block of a page, in order."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    try:
        for block in blocks:
            exec(compile(block, page.name, "exec"), namespace)
    finally:
        dspy.configure(lm=None)


def test_the_readmes_code_runs(provider, monkeypatch, capsys):
    """Each Python block of the README, in order, against a provider found in the environment."""
    monkeypatch.setenv("OPENAI_API_BASE", provider.api_base)
    provider.answer = lambda body: "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    run_blocks(README)
    shown = capsys.readouterr().out
    assert "Paris" in shown
    assert "closed" in shown
    assert "nothing was sent: maintenance" in shown


def test_the_recipes_code_runs(provider, monkeypatch, capsys):
    """Each block of the recipes, in order, against providers found in the environment."""
    monkeypatch.setenv("OPENAI_API_BASE", provider.api_base)
    monkeypatch.setenv("OLLAMA_API_BASE", provider.base("ollama"))
    provider.answer = lambda body: "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    run_blocks(RECIPES)
    shown = capsys.readouterr().out
    for words in (
        "(200, {}, 'Paris')",
        "left alone because of maintenance",
        "the program is shutting down",
        "1 request for 100 answers",
        "is left alone for",
        "dspy_resilient_calls_total",
        "forced open for 0.0 s (migration), for 10 min more",
    ):
        assert words in shown, words


def test_every_public_name_is_shown_in_use():
    """A reader finds an example of each, in a page or in a docstring."""
    pages = "".join(page.read_text() for page in (README, RECIPES))
    code = "".join(re.findall(r"```python\n(.*?)```", pages, flags=re.DOTALL))
    sources = (inspect.getsource(importlib.import_module(name)) for name in modules())
    code += "".join(
        line for text in sources for line in re.findall(r"^ *>>> .*", text, re.MULTILINE)
    )
    missing = [n for n in dspy_resilient.__all__ if not re.search(rf"\b{n}\b", code)]
    assert not missing


def modules():
    package = pkgutil.walk_packages(dspy_resilient.__path__, "dspy_resilient.")
    return [each.name for each in package if not each.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    """Every example in a docstring gives what it shows."""
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
