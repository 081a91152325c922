"""An outage, with and without this package, shown while it happens.

One small DSPy program judges the same texts through a plain `dspy.LM` and through a
`ResilientLM`, each at a provider of its own on this machine, which goes down and comes back.
Every number shown was counted: by the callers, or by the provider that got the requests.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import dspy

from dspy_resilient.lm import ResilientLM
from dspy_resilient.policies import CachePolicy, CircuitPolicy
from dspy_resilient.testing import Provider, Status, dspy_answers

CALLERS = 12
LATENCY = 0.4
OUTAGE = (0.25, 0.7)
"""When the provider goes down and comes back, as shares of the whole time."""
TICK = 0.2
GRACE = 10.0
"""Seconds that calls still under way at the end are waited for."""

DEAD = Status(503)

_GOOD = ("wonderful", "charming", "crisp")
_WORDS = (*_GOOD, "dreadful", "bland", "rude")
_THINGS = ("soup", "waiter", "salad", "view", "bread")


class Side:
    """One way to call the model: its callers, and what they met.

    Args:
        name: Heads its column.
        lm: What the callers use.
        provider: The local provider that only this side calls, or None for a real one.
    """

    def __init__(self, name: str, lm: dspy.LM, provider: Provider | None) -> None:
        self.name = name
        self.lm = lm
        self.provider = provider
        self.answers = self.errors = self.waiting = 0
        self.lost = self.slowest = 0.0
        self.first_answer: float | None = None
        self._program = dspy.Predict("review -> sentiment: Literal['positive', 'negative']")
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._back_at: float | None = None

    def call_until(self, over: threading.Event) -> None:
        """Make one call after the other; runs in several threads."""
        while not over.is_set():
            with self._lock:
                review = review_of(next(self._numbers))
                self.waiting += 1
            started = time.monotonic()
            try:
                with dspy.context(lm=self.lm, adapter=dspy.ChatAdapter()):
                    self._program(review=review)
            except Exception:  # noqa: BLE001  # counting them is the point
                self._note(started, answered=False)
            else:
                self._note(started, answered=True)

    def _note(self, started: float, *, answered: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self.waiting -= 1
            if not answered:
                self.errors += 1
                self.lost += now - started
                return
            self.answers += 1
            self.slowest = max(self.slowest, now - started)
            if self._back_at is not None and self.first_answer is None:
                self.first_answer = now - self._back_at

    def go_down(self) -> None:
        """Begin this side's outage."""
        if self.provider is not None:
            self.provider.down(DEAD)

    def come_back(self) -> None:
        """End it."""
        if self.provider is not None:
            self.provider.up()
            self._back_at = time.monotonic()

    def close(self) -> None:
        """Close the client; a `ResilientLM` ends what its callers wait for, too."""
        if isinstance(self.lm, ResilientLM):
            self.lm.close(grace=0.0)
        else:
            self.lm.close()

    @property
    def sent_while_down(self) -> int | None:
        """Requests that the dead provider had to refuse; None for a real one."""
        if self.provider is None:
            return None
        return sum(request.status == DEAD.code for request in self.provider.requests)

    def column(self) -> list[str]:
        """Return the side's numbers, one for each of `ROWS`."""
        with self._lock:
            hits = self.lm.stats().hits if isinstance(self.lm, ResilientLM) else 0
            back = "-" if self.first_answer is None else f"{self.first_answer:.1f} s"
            sent = "-" if self.sent_while_down is None else str(self.sent_while_down)
            lost, slowest = f"{self.lost:.1f}", f"{self.slowest:.1f} s"
            counts = [str(self.answers), str(hits), str(self.waiting), str(self.errors)]
            return [*counts, lost, slowest, sent, back, circuit_of(self.lm)]


ROWS = (
    "answers",
    "  of them from the cache",
    "calls under way",
    "errors",
    "seconds lost in errors",
    "slowest answer",
    "requests sent to the dead provider",
    "first answer after its return",
    "circuit",
)


def review_of(number: int) -> str:
    """Return the text to judge in call `number`; one call in eight repeats a popular one."""
    popular = number % 8 == 0
    pick = number // 8 % 3 if popular else number
    text = f"The {_THINGS[pick % len(_THINGS)]} was {_WORDS[pick % len(_WORDS)]}."
    return text if popular else f"{text} ({number})"


def sentiment_of(review: str) -> str:
    """Return what the local model thinks of a review."""
    return "positive" if any(word in review for word in _GOOD) else "negative"


def circuit_of(lm: dspy.LM) -> str:
    """Return a circuit's state in words, "none" where there is none."""
    circuit = lm.circuit if isinstance(lm, ResilientLM) else None
    if circuit is None:
        return "none"
    remaining = circuit.open_remaining
    return f"{circuit.state} {remaining:.1f} s" if remaining else str(circuit.state)


def table(sides: Sequence[Side], headline: str) -> str:
    """Return the sides' numbers side by side."""
    columns = [[side.name, *side.column()] for side in sides]
    lines = [headline, ""]
    for label, *values in zip(("", *ROWS), *columns, strict=True):
        lines.append(f"  {label:<36}" + "".join(f"{value:>16}" for value in values))
    return "\n".join(lines) + "\n"


class Board:
    """Shows the sides while they run: a redrawn table on a terminal, a line now and then else."""

    def __init__(self, sides: Sequence[Side], out: TextIO) -> None:
        self._sides = sides
        self._out = out
        self._live = out.isatty()
        self._drawn = 0
        self._next_line = 0.0

    def show(self, elapsed: float, state: str) -> None:
        """Draw the state of affairs `elapsed` seconds after the start."""
        if self._live:
            self._draw(table(self._sides, f"{elapsed:5.1f} s   provider: {state}"))
        elif elapsed >= self._next_line:
            self._next_line = elapsed + 2.0
            told = "   ".join(f"{s.name}: {s.answers} ok, {s.errors} errors" for s in self._sides)
            self._out.write(f"{elapsed:5.1f} s   provider: {state:<8}{told}\n")
            self._out.flush()

    def close(self, elapsed: float) -> None:
        """Draw the end."""
        self._draw(table(self._sides, f"After {elapsed:.1f} s:"))

    def _draw(self, text: str) -> None:
        above = f"\x1b[{self._drawn}F\x1b[J" if self._live and self._drawn else ""
        self._out.write(above + text)
        self._out.flush()
        self._drawn = text.count("\n")


def run_demo(seconds: float, model: str | None, api_base: str | None, out: TextIO) -> None:
    """Run both sides for `seconds`, show them on `out`, and leave nothing behind."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no network for a local demo
    out.write("Loading ...\n")
    over = threading.Event()
    callers: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_logging())
        stack.callback(_wait_for, callers, 1.0)  # what the closing below leaves of them
        sides = [
            stack.enter_context(_side("dspy.LM", _plain, model, api_base)),
            stack.enter_context(_side("ResilientLM", _resilient, model, api_base)),
        ]
        stack.callback(over.set)
        board = Board(sides, out)
        started = time.monotonic()
        for side in sides * CALLERS:
            caller = threading.Thread(
                target=side.call_until, args=(over,), name=f"demo-{side.name}", daemon=True
            )
            caller.start()
            callers.append(caller)
        _stage(sides, board, seconds, outage=model is None)
        over.set()
        _wait_for(callers, GRACE)
        board.close(time.monotonic() - started)


def _wait_for(callers: Sequence[threading.Thread], seconds: float) -> None:
    end = time.monotonic() + seconds
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))


def _stage(sides: Sequence[Side], board: Board, seconds: float, *, outage: bool) -> None:
    """Let the time pass, with an outage in the middle of it."""
    down_at, back_at = (share * seconds for share in OUTAGE)
    plan = [(down_at, "DOWN", Side.go_down), (back_at, "up", Side.come_back)] if outage else []
    state = "up" if outage else "real"
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        if plan and elapsed >= plan[0][0]:
            _, state, act = plan.pop(0)
            for side in sides:
                act(side)
        board.show(elapsed, state)
        time.sleep(TICK)


@contextlib.contextmanager
def _side(
    name: str, make: Callable[..., dspy.LM], model: str | None, api_base: str | None
) -> Iterator[Side]:
    with contextlib.ExitStack() as stack:
        provider = None
        where: dict[str, Any] = {} if api_base is None else {"api_base": api_base}
        if model is None:
            provider = stack.enter_context(Provider(dspy_answers(sentiment_of), latency=LATENCY))
            where = {"api_base": provider.api_base, "api_key": "none"}
        side = Side(name, make(model or "openai/demo", **where), provider)
        stack.callback(side.close)
        side.lm("Say hello.")  # imports and connects before the clock runs
        yield side


def _plain(model: str, **where: Any) -> dspy.LM:
    return dspy.LM(model, engine="litellm", cache=False, **where)


def _resilient(model: str, **where: Any) -> ResilientLM:
    return ResilientLM(
        model,
        cache=CachePolicy(disk=None),
        circuit=CircuitPolicy(recovery_time=1.0, max_recovery_time=2.0),
        max_wait=30.0,
        **where,
    )


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    """Keep what the libraries log out of the table; the errors are counted in it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
