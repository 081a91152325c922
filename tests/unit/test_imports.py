"""What an import costs, and which way imports point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

A_PROGRAM = """
import json, logging, sys, threading
import dspy
before, threads = set(sys.modules), threading.active_count()
import dspy_resilient
imported = sorted(set(sys.modules) - before)
has_litellm = "litellm" in sys.modules
lm = dspy_resilient.ResilientLM("openai/x", fallbacks=["anthropic/y"], limits=3, deadline=9.0)
lm.copy(temperature=1.0, rollout_id=1).dump_state(), repr(lm), lm.stats(), lm.explain(), lm.close()
print(json.dumps({
    "imported": imported,
    "litellm at import": has_litellm,
    "litellm once built": "litellm" in sys.modules,
    "threads": threading.active_count() - threads,
    "handlers": len(logging.getLogger("dspy_resilient").handlers),
}))
"""


@pytest.fixture(scope="module")
def found():
    """What a fresh interpreter finds after the import, and after building a client."""
    done = subprocess.run([sys.executable, "-c", A_PROGRAM], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_importing_does_not_import_litellm(found):
    """LiteLLM takes seconds and is imported with the first call."""
    assert not found["litellm at import"]


def test_building_a_client_does_not_import_litellm(found):
    """A program may be set up, copied and saved without paying for LiteLLM."""
    assert not found["litellm once built"]


def test_importing_brings_little_beyond_dspy(found):
    """Two small packages; no HTTP client, no redis, no telemetry."""
    foreign = {name.partition(".")[0] for name in found["imported"]} - {"dspy_resilient"}
    assert foreign <= {"cachetools", "circuitbreaker", "orjson", *sys.stdlib_module_names}


def test_importing_leaves_alone_what_only_some_need(found):
    """Test doubles, the command line and shared stores load when they are asked for."""
    parts = {name.split(".")[1] for name in found["imported"] if name.startswith("dspy_resilient.")}
    assert parts.isdisjoint({"testing", "cli", "shared"})


def test_neither_import_nor_construction_starts_a_thread(found):
    """Whatever runs was started by a call."""
    assert found["threads"] == 0


def test_no_handler_is_installed(found):
    """Where the log goes is for the program to say."""
    assert found["handlers"] == 0


def test_imports_point_one_way():
    """The contracts of pyproject.toml hold: layers, and what the call page may know."""
    pytest.importorskip("importlinter")
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    command = [sys.executable, "-c", code]  # a process of its own: it disables loggers
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
