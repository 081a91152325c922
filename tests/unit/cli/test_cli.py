"""The command line: what it takes, what it says, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dspy_resilient import CachePolicy, __version__
from dspy_resilient.cli import main
from dspy_resilient.testing import Hang, Status, content_refused, quota_exceeded, rate_limited

KEY = "sk-this-must-never-be-shown-0123456789"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: command"),
        (["demo", "--seconds", "0"], "from 1 to 120; got 0"),
        (["demo", "--seconds", "nan"], "from 1 to 120; got nan"),
        (["demo", "--api-base", "http://x"], "--api-base needs --model"),
        (["demo", "--max-requests", "9"], "--max-requests needs --model"),
        (["demo", "--max-requests", "0", "--model", "m"], "at least 3; got 0"),
        (["demo", "--scenario", "flood"], "invalid choice: 'flood'"),
        (["check"], "required: model"),
        (["cache"], "required: action"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, told):
    """The message names the argument and the way out."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    """`--version`, `__version__` and the installed package agree."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dspy-resilient {__version__}\n"


def test_the_module_is_the_command():
    """`python -m dspy_resilient` is `dspy-resilient`."""
    command = [sys.executable, "-m", "dspy_resilient", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == f"dspy-resilient {__version__}\n"


# check


def check(provider, model="openai/gpt-4o-mini"):
    return main(["check", model, "--api-base", provider.api_base])


def test_a_model_that_answers_is_well(provider, capsys, monkeypatch):
    """One request; key, endpoint, time, price, abilities; the exit code is 0; no key is shown."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert check(provider) == 0
    assert provider.count == 1
    assert provider.requests[0].headers["authorization"] == f"Bearer {KEY}"
    out = capsys.readouterr().out
    for words in ("found", provider.api_base, "answered in", "$0.0000", "tools", "all is well"):
        assert words in out, words
    assert KEY not in out


def test_rate_limit_headers_are_shown(provider, capsys):
    """What the provider says of its limits is what a user wants to know before a long run."""
    provider.script(Status(200, headers={"x-ratelimit-remaining-requests": "59"}, body=ANSWER))
    assert check(provider) == 0
    assert "x-ratelimit-remaining-requests: 59" in capsys.readouterr().out


ANSWER = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "gpt-4o-mini",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Hello"},
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Status(401), "refuses this key"),
        (quota_exceeded(), "no money"),
        (rate_limited(9), "asks for a pause"),
        (Status(503), "is down"),
        (Status(404), "name of the model"),
        (content_refused(), "content filter"),
    ],
    ids=["key", "money", "pause", "down", "model", "filter"],
)
def test_each_problem_has_a_way_out(provider, capsys, fault, told):
    """One request, one problem, one advice, exit code 1."""
    provider.always(fault)
    assert check(provider) == 1
    out = capsys.readouterr().out
    assert told in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith("do ")
    assert provider.count == 1


def test_an_endpoint_that_hangs_is_told_from_one_that_is_down(provider, capsys, monkeypatch):
    """The check itself has a deadline."""
    monkeypatch.setattr("dspy_resilient.cli.check.TIMEOUT", 0.5)
    provider.always(Hang())
    assert check(provider) == 1
    assert "No answer in" in capsys.readouterr().out


def test_an_endpoint_that_is_not_there(capsys):
    """A refused connection is an address that is wrong, or a network that is."""
    assert main(["check", "openai/x", "--api-base", "http://127.0.0.1:9/v1"]) == 1
    assert "cannot be reached" in capsys.readouterr().out


def test_a_missing_key_is_named(capsys, monkeypatch):
    """Nothing is sent, and the variable to set is named."""
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["check", "openai/gpt-4o-mini"]) == 1
    out = capsys.readouterr().out
    assert "not found: OPENAI_API_KEY" in out
    assert "Set OPENAI_API_KEY" in out


# cache


@pytest.fixture
def folder(make, tmp_path):
    """A cache folder with two answers of one client and one of another."""
    for name, prompts in (("one", ("a", "b")), ("other", ("c",))):
        lm = make(name=name, cache=CachePolicy(disk=tmp_path / name))
        for prompt in prompts:
            lm(prompt)
        lm.close(grace=5)
    return tmp_path


def test_info_counts_what_is_there(folder, capsys):
    """One line for each client."""
    assert main(["cache", "info", "--folder", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [["one", "2"], ["other", "1"]]


def test_info_of_nothing(tmp_path, capsys):
    """No folder is no error."""
    assert main(["cache", "info", "--folder", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "No answers on disk.\n"


def test_the_default_is_dspys_folder(tmp_path, capsys, monkeypatch):
    """`cache info` looks where a client with default settings keeps its answers."""
    (tmp_path / "resilient" / "mine").mkdir(parents=True)
    monkeypatch.setattr("dspy_resilient.cache.disk._dspys_folder", lambda: str(tmp_path))
    assert main(["cache", "info"]) == 0
    assert "mine" in capsys.readouterr().out


def test_clear_deletes_one_clients_answers(folder, capsys):
    """With `--client`, the others stay; a new client finds nothing."""
    assert main(["cache", "clear", "--folder", str(folder), "--client", "one", "--yes"]) == 0
    assert "Deleted 2 answers" in capsys.readouterr().out
    assert len(list(folder.rglob("*.json"))) == 1


@pytest.mark.parametrize(("said", "left"), [("y\n", 0), ("\n", 3)])
def test_clear_asks_first(folder, monkeypatch, said, left):
    """Only a yes is a yes."""
    read, write = os.pipe()
    os.write(write, said.encode())
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["cache", "clear", "--folder", str(folder)]) == (1 if left else 0)
    assert len(list(folder.rglob("*.json"))) == left


def test_export_writes_each_answer(folder, tmp_path, capsys):
    """One JSON object a line; a damaged entry is left out; an existing file is not overwritten."""
    next(folder.glob("one/*/*.json")).write_text("rubbish")
    file = tmp_path / "all.jsonl"
    assert main(["cache", "export", str(file), "--folder", str(folder)]) == 0
    assert "Wrote 2 answers" in capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["client"] for row in rows) == ["one", "other"]
    assert all("Paris" in json.dumps(row["entry"]) for row in rows)
    assert main(["cache", "export", str(file), "--folder", str(folder)]) == 1
    assert "exists" in capsys.readouterr().out


def test_export_to_the_terminal(folder, capsys):
    """`-` is the terminal, and only JSON goes there."""
    assert main(["cache", "export", "-", "--folder", str(folder)]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3
