"""The programs in docs/examples, run as a reader would, against a provider that fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import dspy
import pytest
from fastapi.testclient import TestClient

from dspy_resilient.testing import Provider, Status, dspy_answers

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture
def provider(monkeypatch):
    with Provider(dspy_answers({"Capital of France?": "Paris"})) as running:
        monkeypatch.setenv("OPENAI_API_BASE", running.api_base)
        yield running


@pytest.fixture(autouse=True)
def _configuration_is_restored():
    yield
    dspy.configure(lm=None)


def load(name):
    """Return an example as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_here_and_shown():
    """A new example comes with a test and a place on the page."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"fastapi_service", "batch_budget", "optimizer_overnight"}
    page = (EXAMPLES / "index.md").read_text()
    assert all(f'--8<-- "examples/{name}.py"' in page for name in names)


# The service


@pytest.fixture
def fallback(monkeypatch):
    with Provider(dspy_answers({"Capital of France?": "Lutetia"})) as running:
        monkeypatch.setenv("ANTHROPIC_API_BASE", running.base("anthropic"))
        yield running


@pytest.fixture
def service(provider, fallback):
    with TestClient(load("fastapi_service").app, raise_server_exceptions=False) as client:
        yield client


ASK = {"question": "Capital of France?"}


def test_the_service_answers(service):
    """In one piece, and word by word."""
    assert service.get("/ask", params=ASK).json() == {"answer": "Paris"}
    assert service.get("/stream", params=ASK).text == "Paris"
    assert service.get("/health").json()["state"] == "ready"


def test_the_service_goes_on_with_its_fallback(service, provider, fallback):
    """The primary is down: another model answers."""
    provider.down(Status(503))
    assert service.get("/ask", params=ASK).json() == {"answer": "Lutetia"}
    assert fallback.count == 1


@pytest.mark.parametrize("path", ["/ask", "/stream"])
def test_the_service_is_honest_when_nothing_answers(service, provider, fallback, path):
    """Both are down: a 503 in both cases, and no half answer with a 200."""
    provider.down(Status(503))
    fallback.down(Status(503))
    answer = service.get(path, params=ASK)
    assert answer.status_code == 503
    assert answer.json() == {"error": "Please try again soon."}


def test_the_service_says_when_to_come_back(service, provider, fallback):
    """With open circuits, the 503 has a Retry-After."""
    for circuit in service.app.state.lm.circuits.values():
        circuit.force_open("maintenance", seconds=30)
    answer = service.get("/ask", params=ASK)
    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert provider.count == fallback.count == 0


def test_the_service_tells_a_bad_question_from_a_bad_day(service, provider):
    """What the model refuses is no 503."""
    provider.always(Status(400))
    assert service.get("/ask", params=ASK).status_code == 502


# The batch


def test_the_batch_stops_at_its_budget_and_goes_on_later(provider, tmp_path, capsys):
    """The first run pays for some of the answers, the second for the others; none is paid twice."""
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("".join(f"Question {n}?\n" for n in range(40)))
    batch = load("batch_budget")
    left = batch.main([str(questions), str(answers), "--max-dollars", "0.0004"])
    assert 0 < left < 40
    assert "Run it again" in capsys.readouterr().out
    assert batch.main([str(questions), str(answers), "--max-dollars", "1"]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == provider.count == 40
    assert batch.main([str(questions), str(answers), "--max-dollars", "1"]) == 0
    assert provider.count == 40


# The optimizer


def test_the_optimizer_sleeps_through_an_outage(provider, tmp_path, capsys):
    """It ends, saves a program that loads, and no example was lost."""
    data, saved = tmp_path / "data.jsonl", tmp_path / "program.json"
    rows = [{"question": "Capital of France?", "answer": "Paris"}, {"question": "?", "answer": "?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    provider.script(*[Status(503)] * 6)
    load("optimizer_overnight").main(data, saved)
    assert "Errors that cost an example its score: 0." in capsys.readouterr().out
    program = dspy.ChainOfThought("question -> answer")
    program.load(saved, allow_unsafe_lm_state=True)
    assert program(question="Capital of France?").answer == "Paris"
