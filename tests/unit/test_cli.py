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
from dspy_resilient.demo import ROWS, Board, Side, circuit_of, review_of, sentiment_of, table
from dspy_resilient.testing import Provider, Reset, Status, dspy_answers


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
            if line.startswith(f"  {row}  "):
                rows[row.strip()] = re.split(r" {2,}", line[len(row) + 2 :].strip())
    return rows


@pytest.mark.timeout(60)
def test_the_demo_ends_by_itself_with_both_sides_counted(capsys):
    """An outage is staged, both sides answer before and after it, and the exit code is 0."""
    assert main(["demo", "--seconds", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "provider: up" in out
    rows = numbers(out)
    assert len(rows) == len(ROWS)
    assert all(int(count) > 0 for count in rows["answers"])
    assert all(int(count) > 0 for count in rows["requests sent to the dead provider"])
    assert rows["of them from the cache"][0] == "0"
    assert not [t for t in threading.enumerate() if t.name == "dspy-resilient-provider"]


def test_a_real_model_meets_no_outage(provider, capsys):
    """With --model the demo only calls and counts."""
    to = ["--model", "openai/real", "--api-base", provider.api_base]
    assert main(["demo", "--seconds", "1", *to]) == 0
    assert {request.status for request in provider.requests} == {200}
    assert {request.body["model"] for request in provider.requests} == {"real"}
    rows = numbers(capsys.readouterr().out)
    assert rows["requests sent to the dead provider"] == ["-", "-"]
    assert rows["errors"] == ["0", "0"]


def test_ctrl_c_ends_the_demo_cleanly(monkeypatch):
    """An interruption is an ending like any other: no traceback, no provider left."""

    class Interrupted(io.StringIO):
        def write(self, text):
            if "provider:" in text:
                raise KeyboardInterrupt
            return super().write(text)

    out = Interrupted()
    monkeypatch.setattr("sys.stdout", out)
    assert main(["demo", "--seconds", "5"]) == 130
    assert out.getvalue().endswith("Stopped.\n")
    assert not [t for t in threading.enumerate() if t.name == "dspy-resilient-provider"]
    callers = [t for t in threading.enumerate() if t.name.startswith("demo-")]
    end = time.monotonic() + 15  # nothing ends the retries of plain dspy.LM
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))
    assert not [each.name for each in callers if each.is_alive()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: command"),
        (["demo", "--seconds", "0"], "from 1 to 45; got 0"),
        (["demo", "--seconds", "nan"], "from 1 to 45; got nan"),
        (["demo", "--api-base", "http://x"], "needs --model"),
    ],
    ids=["nothing", "zero", "nan", "base"],
)
def test_wrong_arguments_are_refused(capsys, arguments, told):
    """The message names the argument and the way out."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_side_counts_what_its_callers_met(provider, plain):
    """Answers, errors, lost seconds and refused requests are counted one by one."""
    side = Side("plain", plain, provider)
    side.call_until(Calls(3))
    side.go_down()
    side.call_until(Calls(2))
    assert (side.answers, side.errors, side.waiting, side.sent_while_down) == (3, 2, 0, 2)
    assert side.lost > 0
    assert side.first_answer is None
    side.come_back()
    side.call_until(Calls(1))
    assert (side.answers, side.sent_while_down) == (4, 2)
    assert side.first_answer > 0
    assert provider.count == 6


def test_an_unexpected_error_is_counted_too(provider, plain):
    """Whatever a call raises, its caller goes on."""
    provider.script(Reset(), Status(401))
    side = Side("plain", plain, provider)
    side.call_until(Calls(3))
    assert (side.answers, side.errors) == (1, 2)


def test_a_side_that_closes_ends_what_its_callers_wait_for(make):
    """Ctrl-C need not wait for an outage to end."""
    side = Side("ours", make(max_wait=60), None)
    side.lm.circuit.force_open(seconds=50)
    caller = threading.Thread(target=side.call_until, args=(Calls(1),))
    caller.start()
    while not side.lm.health().in_flight:
        time.sleep(0.01)
    started = time.monotonic()
    side.close()
    caller.join(10)
    assert time.monotonic() - started < 10
    assert (side.answers, side.errors) == (0, 1)


def test_some_reviews_repeat_and_the_rest_differ():
    """A cache has little to hide: one call in eight can be a hit."""
    reviews = [review_of(number) for number in range(800)]
    assert len(set(reviews)) == 700 + 3
    assert {sentiment_of(review) for review in reviews} == {"positive", "negative"}


def test_the_circuit_column_says_how_long(make):
    """An open circuit shows the time that is left; a plain LM has none."""
    lm = make()
    assert circuit_of(lm) == "closed"
    lm.circuit.force_open(seconds=50)
    assert re.fullmatch(r"forced_open (49\.9|50\.0) s", circuit_of(lm))
    assert circuit_of(make(circuit=False)) == "none"
    assert isinstance(lm, ResilientLM)


def test_a_terminal_is_redrawn_in_place(provider, plain):
    """Each table goes up exactly as many lines as the last one took."""
    out = Terminal()
    board = Board([Side("plain", plain, provider)], out)
    board.show(0.0, "up")
    board.show(0.1, "DOWN")
    board.close(0.2)
    first, second, third = re.split(r"\x1b\[\d+F\x1b\[J", out.getvalue())
    ups = [int(up) for up in re.findall(r"\x1b\[(\d+)F", out.getvalue())]
    assert ups == [first.count("\n"), second.count("\n")]
    assert third.startswith("After 0.2 s:")


def test_a_file_gets_a_line_now_and_then(provider, plain):
    """Without a terminal there are plain lines, at most one in two seconds."""
    out = io.StringIO()
    board = Board([Side("plain", plain, provider)], out)
    for tenths in range(41):
        board.show(tenths / 10, "up")
    assert out.getvalue().count("\n") == 3
    assert "plain: 0 ok, 0 errors" in out.getvalue()


def test_the_table_has_one_column_per_side(provider, plain):
    """Every row has a value for every side."""
    sides = [Side("left", plain, provider), Side("right", plain, None)]
    head, _, names, *rows = table(sides, "head").splitlines()
    assert (head, names.split()) == ("head", ["left", "right"])
    assert len(rows) == len(ROWS)
