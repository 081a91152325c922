"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import logging
import pkgutil
import re
from pathlib import Path

import dspy
import pytest

import dspy_resilient

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python(?: title=.*)?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SAID = {
    "README.md": ("Paris", "closed", "nothing was sent: maintenance"),
    "docs/how-to/serving.md": ("(200, {}, 'Paris')",),
    "docs/how-to/errors.md": ("left alone because of maintenance", "the program is shutting down"),
    "docs/how-to/many-workers.md": ("1 request for 100 answers",),
    "docs/how-to/watching.md": ("is left alone for", "dspy_resilient_calls_total"),
    "docs/how-to/budgets.md": ("requests 1.0 0.0 1", "stopped after", "are reserved for"),
    "docs/how-to/maintenance.md": ("(migration)", "ready"),
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    """Yield the Python blocks of a page, each with as many empty lines before it as the page has."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if "--8<--" not in found[1]:
            yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=name_of)
def test_the_code_of_a_page_runs(page, provider, monkeypatch, capsys):
    """Each Python block, in order, against providers found in the environment."""
    monkeypatch.setenv("OPENAI_API_BASE", provider.api_base)
    monkeypatch.setenv("OLLAMA_API_BASE", provider.base("ollama"))
    monkeypatch.setattr(logging.getLogger("dspy_resilient"), "level", logging.WARNING)
    provider.answer = lambda body: "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    namespace = {"__name__": "page"}
    try:
        for block in blocks_of(page):
            exec(compile(block, str(page), "exec"), namespace)
    finally:
        dspy.configure(lm=None)
        for value in namespace.values():
            if isinstance(value, dspy_resilient.ResilientLM):
                value.close(grace=0)
    shown = capsys.readouterr().out
    for words in SAID.get(name_of(page), ()):
        assert words in shown, words


def test_the_pages_that_must_say_something_exist():
    """A page that was moved takes what it must say along."""
    assert set(SAID) <= {name_of(page) for page in PAGES}


def test_every_page_is_in_the_navigation():
    """A page that a reader cannot find is not written."""
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_shows_what_it_does_without_being_run(notebook):
    """It is committed with its outputs, of one run from top to bottom, and none is an error."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 2
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "/tmp/" not in json.dumps(outputs)


def test_every_error_has_its_way_out():
    """Troubleshooting has a line for each error class of the package."""
    table = (ROOT / "docs/troubleshooting.md").read_text().partition("## Every error")[2]
    errors = [
        name
        for name in dspy_resilient.__all__
        if isinstance(getattr(dspy_resilient, name), type)
        and issubclass(getattr(dspy_resilient, name), Exception)
    ]
    assert errors
    assert [name for name in errors if f"| `{name}` |" not in table] == []


def test_every_public_name_is_shown_in_use():
    """A reader finds an example of each, in a page or in a docstring."""
    code = "".join(block for page in PAGES for block in blocks_of(page))
    code += "".join(each.read_text() for each in (ROOT / "docs/examples").glob("*.py"))
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
