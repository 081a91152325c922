"""An outage, with and without this package, shown while it happens.

One small DSPy program judges the same texts through a plain `dspy.LM` and through a `ResilientLM`. Each
has its defaults, no cache, and a provider of its own on this machine. Every number shown was
counted: by the callers, or by the provider that got the requests.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

import dspy

from dspy_resilient.demo.board import board_for, summary
from dspy_resilient.demo.scenarios import SCENARIOS, Scenario
from dspy_resilient.demo.side import Side, sentiment_of
from dspy_resilient.lm import ResilientLM
from dspy_resilient.testing import Provider, dspy_answers

CALLERS = 12
LATENCY = 0.4
TICK = 0.2
GRACE = 10.0
"""Seconds that calls still under way at the end are waited for."""


def run_demo(name: str, seconds: float, out: TextIO) -> None:
    """Run both sides through a scenario for `seconds`, show them on `out`, leave nothing behind."""
    scenario = SCENARIOS[name]
    over = threading.Event()
    callers: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.callback(wait_for, callers, 1.0)  # what the closing below leaves of them
        sides = [
            stack.enter_context(_side("dspy.LM", dspy.LM, scenario)),
            stack.enter_context(_side("ResilientLM", ResilientLM, scenario)),
        ]
        stack.callback(over.set)
        out.write(scenario.announce(CALLERS, seconds))
        board = stack.enter_context(board_for(sides, out))
        started = time.monotonic()
        for side in sides * CALLERS:
            caller = threading.Thread(
                target=side.call_until, args=(over,), name=f"demo-{side.name}", daemon=True
            )
            caller.start()
            callers.append(caller)
        for elapsed, state in _stage(sides, scenario, seconds, started):
            board.show(elapsed, state)
        over.set()
        wait_for(callers, GRACE)
        board.close(time.monotonic() - started)
        out.write(summary(*sides))


def wait_for(callers: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for the threads, but no longer than `seconds` for all of them."""
    end = time.monotonic() + seconds
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries log out of the table; the errors are counted in it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _stage(
    sides: Sequence[Side], scenario: Scenario, seconds: float, started: float
) -> Iterator[tuple[float, str]]:
    """Let the time pass, with the trouble in the middle of it; yield it now and then."""
    begin, end = (share * seconds for share in scenario.window)
    plan = [(begin, scenario.state, scenario.fault), (end, "up", None)]
    state = "up"
    while (elapsed := time.monotonic() - started) < seconds:
        if plan and elapsed >= plan[0][0]:
            _, state, fault = plan.pop(0)
            for side in sides:
                side.trouble(fault)
        yield elapsed, state
        time.sleep(TICK)


@contextlib.contextmanager
def _side(name: str, kind: type[dspy.LM], scenario: Scenario) -> Iterator[Side]:
    with contextlib.ExitStack() as stack:
        providers = [
            stack.enter_context(Provider(dspy_answers(sentiment_of), latency=LATENCY))
            for _ in range(2)
        ]
        primary, other = ({"api_base": each.api_base, "api_key": "none"} for each in providers)
        settings = dict(scenario.settings)
        if scenario.fallback and kind is ResilientLM:
            settings["fallbacks"] = [{"model": "openai/demo-fallback", **other}]
        side = Side(name, kind("openai/demo", cache=False, **primary, **settings), providers[0])
        stack.callback(side.close)
        side.lm("Say hello.")  # imports and connects before the clock runs
        providers[0].clear()
        yield side
