"""The demo keeps its promises: it ends, it counts honestly, and it leaves nothing behind."""

from __future__ import annotations

import io
import re
import threading
import time

import dspy
import pytest

from dspy_resilient import ResilientLM
from dspy_resilient.cli import main
from dspy_resilient.demo import board
from dspy_resilient.demo.board import LiveBoard, PlainBoard, board_for, summary
from dspy_resilient.demo.scenarios import SCENARIOS
from dspy_resilient.demo.side import ROWS, Side, circuit_of, review_of, sentiment_of
from dspy_resilient.testing import Provider, Reset, Status, dspy_answers, rate_limited


class Calls:
    """An event that is set after some calls."""

    def __init__(self, number):
        self.left = number

    def is_set(self):
        self.left -= 1
        return self.left < 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def provider():
    with Provider(dspy_answers(sentiment_of)) as running:
        yield running


@pytest.fixture
def plain(provider):
    options = {"engine": "litellm", "cache": False, "num_retries": 0}
    return dspy.LM("openai/test", api_base=provider.api_base, api_key="dummy", **options)


def numbers(text):
    """The final table's numbers by row, one per side."""
    rows = {}
    for line in text.partition("After ")[2].splitlines():
        for row in ROWS:
            if line.startswith(f"{row}  "):
                rows[row.strip()] = re.split(r" {2,}", line[len(row) :].strip())
    return rows


def nothing_is_left():
    return not [t for t in threading.enumerate() if t.name == "dspy-resilient-provider"]


@pytest.mark.timeout(90)
def test_the_demo_ends_by_itself_with_both_sides_counted(capsys):
    """An outage is announced, staged and summed up; both sides answer, and the exit code is 0."""
    assert main(["demo", "--seconds", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "From 0.5 s to 1.4 s the provider (on this machine) answers 503 to everything.\n" in out
    rows = numbers(out)
    assert len(rows) == len(ROWS)
    assert all(int(count) > 0 for count in rows["answers"])
    assert all(int(count) > 0 for count in rows["of them unanswered"])
    lost, answers = rows["calls lost"], rows["answers"]
    for name, failed, ok in zip(("dspy.LM", "ResilientLM"), lost, answers, strict=True):
        assert f"{name} lost {failed} of {int(failed) + int(ok)} calls" in out
    assert nothing_is_left()


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "outage"])
@pytest.mark.timeout(120)
def test_every_scenario_does_what_it_says(scenario, capsys):
    """Its trouble reaches both sides, and its announcement names it."""
    assert main(["demo", "--scenario", scenario, "--seconds", "3"]) == 0
    out = capsys.readouterr().out
    assert SCENARIOS[scenario].what in out
    rows = numbers(out)
    assert all(int(count) > 0 for count in rows["of them unanswered"])
    if scenario == "fallback":
        assert rows["calls lost"][1] == "0"
        assert "has a fallback" in out
    assert nothing_is_left()


def test_ctrl_c_ends_the_demo_cleanly(monkeypatch):
    """An interruption is an ending like any other: no traceback, no provider left."""

    class Interrupted(io.StringIO):
        def write(self, text):
            if "0 ok, 0 lost" in text:
                raise KeyboardInterrupt
            return super().write(text)

    out = Interrupted()
    monkeypatch.setattr("sys.stdout", out)
    assert main(["demo", "--seconds", "5"]) == 130
    assert out.getvalue().endswith("Stopped.\n")
    assert nothing_is_left()
    callers = [t for t in threading.enumerate() if t.name.startswith("demo-")]
    end = time.monotonic() + 15  # nothing ends the retries of plain dspy.LM
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))
    assert not [each.name for each in callers if each.is_alive()]


# With a real model


def real(provider, *arguments):
    return main(["demo", "--model", "openai/real", "--api-base", provider.api_base, *arguments])


def test_a_real_model_gets_no_more_requests_than_allowed(provider, capsys):
    """Both sides call it, nothing is staged, and the check counts too."""
    assert real(provider, "--max-requests", "7", "--yes") == 0
    assert provider.count == 7
    assert {request.body["model"] for request in provider.requests} == {"real"}
    out = capsys.readouterr().out
    assert "at most 7 requests to openai/real, whose price is not known" in out
    rows = numbers(out)
    assert rows["answers"] == ["3", "3"]
    assert rows["requests sent"] == ["-", "-"]


def test_a_real_models_failures_are_not_repeated(provider, capsys):
    """A retry would be a request more than was allowed."""
    provider.script(None, *[Status(503)] * 50)
    assert real(provider, "--max-requests", "7", "--yes") == 0
    assert provider.count <= 7
    assert "dspy.LM lost 3 of 3 calls" in capsys.readouterr().out


def test_a_price_that_is_known_is_said(capsys, monkeypatch):
    """The question comes with the price; without a terminal nobody can agree, and nothing is sent."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["demo", "--model", "openai/gpt-4o-mini"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"at most 20 requests to openai/gpt-4o-mini, for about \$0\.00\d\d", out)
    assert "Say --yes" in out


@pytest.mark.parametrize(("said", "sent"), [("y\n", 3), ("yes\n", 3), ("\n", 0), ("no\n", 0)])
def test_it_asks_before_a_real_model_is_used(provider, monkeypatch, said, sent):
    """Only a yes is a yes."""
    monkeypatch.setattr("sys.stdin", Terminal(said))
    assert real(provider, "--max-requests", "3") == (0 if sent else 1)
    assert provider.count == sent


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Status(401), "refuses this key"),
        (rate_limited(9), "asks for a pause"),
        (Status(500), "down"),
    ],
    ids=["key", "quota", "down"],
)
def test_a_real_model_that_does_not_answer_is_one_line(provider, capsys, fault, told):
    """Key and endpoint are checked with one request before the rest is sent."""
    provider.always(fault)
    assert real(provider, "--yes") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # what it would send, and the problem
    assert told in lines[1]
    assert provider.count == 1


# The sides


def test_a_side_counts_what_its_callers_met(provider, plain):
    """Answers, errors and unanswered requests are counted one by one."""
    side = Side("plain", plain, provider)
    side.call_until(Calls(3))
    side.trouble(Status(503))
    side.call_until(Calls(2))
    counted = (side.answers, side.errors, side.waiting, side.requests, side.failed_requests)
    assert counted == (3, 2, 0, 5, 2)
    assert side.first_answer is None
    side.trouble(None)
    side.call_until(Calls(1))
    assert (side.answers, side.failed_requests) == (4, 2)
    assert side.first_answer > 0
    assert provider.count == 6


def test_an_unexpected_error_is_counted_too(provider, plain):
    """Whatever a call raises, its caller goes on."""
    provider.script(Reset(), Status(401))
    side = Side("plain", plain, provider)
    side.call_until(Calls(3))
    assert (side.answers, side.errors) == (1, 2)
    assert isinstance(side.last_error, dspy.LMAuthError)


def test_a_side_that_closes_ends_what_its_callers_wait_for(make):
    """Ctrl-C need not wait for an outage to end."""
    side = Side("ours", make(max_wait=60), None)
    side.lm.circuit.force_open(seconds=50)
    caller = threading.Thread(target=side.call)
    caller.start()
    while not side.lm.health().in_flight:
        time.sleep(0.01)
    started = time.monotonic()
    side.close()
    caller.join(10)
    assert time.monotonic() - started < 10
    assert (side.answers, side.errors) == (0, 1)


def test_no_review_repeats():
    """No cache has anything to hide."""
    reviews = [review_of(number) for number in range(800)]
    assert len(set(reviews)) == 800
    assert {sentiment_of(review) for review in reviews} == {"positive", "negative"}


def test_the_circuit_row_says_how_long(make):
    """An open circuit shows the time that is left; a plain LM has none."""
    lm = make()
    assert circuit_of(lm) == "closed"
    lm.circuit.force_open(seconds=50)
    assert circuit_of(lm) == "forced open 50 s"
    assert circuit_of(make(circuit=False)) == "none"
    assert isinstance(lm, ResilientLM)


# The boards


@pytest.fixture
def sides(provider, plain):
    return [Side("dspy.LM", plain, provider), Side("ResilientLM", plain, None)]


def lines_of(text):
    """What a terminal would show, without the sequences that colour and move."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_live_table_fits(sides, monkeypatch, columns):
    """Every row is whole and on one line, at each width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with board_for(sides, out) as shown:
        assert isinstance(shown, LiveBoard)
        shown.show(0.0, "up")
        shown.show(0.1, "DOWN")
        shown.close(0.2)
    lines = lines_of(out.getvalue())
    assert max(map(len, lines)) <= columns
    for row in ROWS:
        assert any(row in line for line in lines), row


def test_colours_end_with_no_color(sides, monkeypatch):
    """A user who has said NO_COLOR gets none."""
    monkeypatch.setenv("TERM", "xterm-256color")
    colours = {}
    for setting in ("", "1"):
        monkeypatch.setenv("NO_COLOR", setting)
        out = Terminal()
        with board_for(sides, out) as shown:
            shown.show(0.0, "DOWN")
        colours[setting] = re.findall(r"\x1b\[[0-9;]*3[0-7]m", out.getvalue())
    assert colours[""]
    assert not colours["1"]


@pytest.mark.parametrize("why", ["file", "dumb", "no rich"])
def test_plain_lines_where_no_table_can_live(sides, monkeypatch, why):
    """No terminal, one that cannot move its cursor, or no rich."""
    monkeypatch.setenv("TERM", "dumb" if why == "dumb" else "xterm")
    if why == "no rich":
        monkeypatch.setattr(board, "find_spec", lambda name: None)
    out = io.StringIO() if why == "file" else Terminal()
    with board_for(sides, out) as shown:
        assert isinstance(shown, PlainBoard)
        shown.show(0.0, "up")
        shown.close(0.2)
    assert "\x1b" not in out.getvalue()


def test_a_file_gets_a_line_now_and_then(sides):
    """At most one in two seconds, and the table at the end; all within 60 columns."""
    out = io.StringIO()
    shown = PlainBoard(sides, out)
    for tenths in range(41):
        shown.show(tenths / 10, "40 % 503")
    assert out.getvalue().count("\n") == 1 + 3
    assert "0 ok, 0 lost" in out.getvalue()
    shown.close(4.1)
    assert max(map(len, out.getvalue().splitlines())) <= 60
    assert len(numbers(out.getvalue())) == len(ROWS)


def test_the_summary_says_what_was_counted(sides):
    """Lost calls, unanswered requests, and the calls that were still waiting."""
    sides[1].waiting = 2
    assert summary(*sides) == (
        "\ndspy.LM lost 0 of 0 calls and sent 0 requests that were not answered.\n"
        "ResilientLM lost 0 of 0 calls; 2 calls were still waiting at the end.\n"
    )
