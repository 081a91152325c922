"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import dspy
import pytest

import dspy_resilient

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_code_runs(provider, monkeypatch, capsys):
    """Each Python block of the README, in order, against a provider found in the environment."""
    monkeypatch.setenv("OPENAI_API_BASE", provider.api_base)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    provider.answer = lambda body: "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    finally:
        dspy.configure(lm=None)
    shown = capsys.readouterr().out
    assert "Paris" in shown
    assert "closed" in shown
    assert "nothing was sent: maintenance" in shown


def modules():
    package = pkgutil.walk_packages(dspy_resilient.__path__, "dspy_resilient.")
    return [each.name for each in package if not each.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    """Every example in a docstring gives what it shows."""
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
