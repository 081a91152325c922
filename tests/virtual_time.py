"""Whole calls in virtual time: hours of outage in a second, the same every time.

The generator of `call.complete` decides and never waits, so a third driver can perform its steps
on a clock that jumps: real circuit, gate, limits, retries and flights, and a provider that is a
function of the time. Nothing here sends anything.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient import ResilientLM
from dspy_resilient.cache import Answer
from dspy_resilient.pipeline.call import complete
from dspy_resilient.pipeline.client import ClientState
from dspy_resilient.pipeline.state import Prepare, Wait
from dspy_resilient.targets.target import Target
from dspy_resilient.testing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable


class VirtualTime:
    """Does what is due, in order, and moves the clock from one to the next."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._due: list[tuple[float, int, Callable[[], Any]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, work: Callable[[], Any]) -> None:
        heapq.heappush(self._due, (self.clock() + seconds, next(self._numbers), work))

    def run(self) -> None:
        while self._due:
            when, _, work = heapq.heappop(self._due)
            self.clock.advance(max(0.0, when - self.clock()))
            work()


class Drill:
    """Callers who make calls one after another, and what became of them.

    Args:
        fails: Returns an error for a request sent at a time, or None for an answer; also gets dice.
        latency: Shortest and longest time an attempt takes.
        seed: Of the dice.
        options: Of the `ResilientLM`.
    """

    def __init__(
        self,
        fails: Callable[[float, random.Random], Exception | None],
        *,
        latency: tuple[float, float] = (0.5, 2.0),
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.time = VirtualTime()
        self.dice = random.Random(seed)
        self.sent = 0
        self.answered = 0
        self.seconds = 0.0
        self.errors: Counter[str] = Counter()
        self._fails = fails
        self._latency = latency
        self._lm = lm = ResilientLM("openai/test", api_key="k", **{"cache": False, **options})
        lm._runtime = runtime = ClientState(lm._runtime.options, clock=self.time.clock)
        runtime.random = self.dice.random
        runtime.ready = lambda: True
        lm._primary = Target(lm, runtime.routes, runtime, dspy.LM, [])

    @property
    def failed(self) -> int:
        return self.errors.total()

    def run(self, callers: int, calls: int) -> Drill:
        """Let `callers` make `calls` each."""
        for _ in range(callers):
            self._call_again(calls)
        self.time.run()
        return self

    def _call_again(self, calls: int) -> None:
        if calls:
            call = self._lm._begin("__call__", "?", None, {})
            steps = complete(call, self._lm._runtime)
            self._go_on(steps, calls, steps.send, None)

    def _go_on(self, steps, calls, resume, value) -> None:
        try:
            step = resume(value)
        except StopIteration:
            self.answered += 1
        except Exception as error:
            self.errors[type(error).__name__] += 1
        else:
            self._perform(steps, calls, step)
            return
        self.seconds = self.time.clock()
        self.time.after(0.0, lambda: self._call_again(calls - 1))

    def _perform(self, steps, calls, step) -> None:
        if isinstance(step, Wait):
            self._wait(step, lambda value: self._go_on(steps, calls, steps.send, value))
        elif isinstance(step, Prepare):
            self._go_on(steps, calls, steps.send, None)
        else:
            self.sent += 1
            error = self._fails(self.time.clock(), self.dice)
            resume = steps.send if error is None else steps.throw
            value = Answer(["Paris"], None) if error is None else error
            took = self.dice.uniform(*self._latency)
            self.time.after(took, lambda: self._go_on(steps, calls, resume, value))

    def _wait(self, step, go_on) -> None:
        waiting = [True]

        def wake(value=None) -> None:
            if waiting:
                waiting.clear()
                go_on(value)

        if math.isfinite(step.seconds):
            self.time.after(step.seconds, wake)
        if step.future is not None:
            step.future.add_done_callback(
                lambda done: self.time.after(0.0, lambda: wake(done.result()))
            )


def down(error: Callable[[], Exception], *spans: tuple[float, float], share: float = 1.0):
    """Return a provider that fails a share of its requests during the given spans of time."""

    def fails(now: float, dice: random.Random) -> Exception | None:
        hit = any(begin <= now < end for begin, end in spans) and dice.random() < share
        return error() if hit else None

    return fails


def server_error() -> Exception:
    return dspy.LMServerError("boom", model="openai/test", status=500)
