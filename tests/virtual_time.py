"""Whole calls in virtual time: hours of outage in a second, the same every time.

The generator of `call.complete` decides and never waits, so a third driver can perform its steps
on a clock that jumps: real circuit, gate, limits, retries and flights, and a provider that is a
function of the time. Plain `dspy.LM` goes through the same weather with its own waits. Nothing
here sends anything.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import dspy
from dspy.clients.execution import _delay

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


class Fault(NamedTuple):
    """What becomes of a request: an error after so many seconds (None: as long as an answer)."""

    error: Exception
    seconds: float | None = None


class Drill:
    """Callers who make calls one after another, and what became of them.

    The dice are those of the caller, the call and the attempt, so that two drills in the same
    weather differ in what they decide, not in their luck.

    Args:
        fails: Returns what goes wrong with a request sent at a time (an error or a `Fault`), or
            None for an answer; also gets dice.
        latency: Shortest and longest time an attempt takes.
        seed: Of the dice.
        plain: Whether the calls are those of plain `dspy.LM`.
        options: Of the `ResilientLM`.
    """

    def __init__(
        self,
        fails: Callable[[float, random.Random], Exception | Fault | None],
        *,
        latency: tuple[float, float] = (0.5, 2.0),
        seed: int = 0,
        plain: bool = False,
        **options: Any,
    ) -> None:
        self.time = VirtualTime()
        self.sent = 0
        self.answered = 0
        self.seconds = 0.0
        self.errors: Counter[str] = Counter()
        self.times: list[float] = []
        self._seed = seed
        self._fails = fails
        self._latency = latency
        self._lm: Any = None if plain else self._client(options)

    def _client(self, options: dict[str, Any]) -> ResilientLM:
        lm = ResilientLM("openai/test", api_key="k", **{"cache": False, **options})
        lm._runtime = runtime = ClientState(lm._runtime.options, clock=self.time.clock)
        runtime.random = random.Random(self._seed).random
        runtime.ready = lambda: True
        lm._primary = Target(lm, runtime.routes, runtime, dspy.LM, [])
        return lm

    @property
    def failed(self) -> int:
        return self.errors.total()

    @property
    def p95(self) -> float:
        times = sorted(self.times)
        return times[int(0.95 * len(times))] if times else math.nan

    def run(self, callers: int, calls: int) -> Drill:
        """Let `callers` make `calls` each."""
        for caller in range(callers):
            self._call_again(caller, calls)
        self.time.run()
        return self

    def _call_again(self, caller: int, calls: int) -> None:
        if not calls:
            return
        began = self.time.clock()

        def end(error: Exception | None) -> None:
            self.seconds = self.time.clock()
            if error is None:
                self.answered += 1
                self.times.append(self.seconds - began)
            else:
                self.errors[type(error).__name__] += 1
            self.time.after(0.0, lambda: self._call_again(caller, calls - 1))

        dice = (random.Random(f"{self._seed} {caller} {calls} {n}") for n in itertools.count())
        if self._lm is None:
            self._plain(dice, 0, end)
        else:
            call = self._lm._begin("__call__", "?", None, {})
            steps = complete(call, self._lm._runtime)
            self._go_on(steps, dice, end, steps.send, None)

    def _send(self, dice, land) -> None:
        """Send a request, and call `land` with its error or None in the end."""
        self.sent += 1
        luck = next(dice)
        fault = self._fails(self.time.clock(), luck)
        took = luck.uniform(*self._latency)
        if isinstance(fault, Fault):
            took, fault = took if fault.seconds is None else fault.seconds, fault.error
        self.time.after(took, lambda: land(fault))

    def _plain(self, dice, attempt, end) -> None:
        """Do as `dspy.clients.execution` does with three retries."""

        def land(error) -> None:
            if error is None or attempt == 3 or not dspy.is_retryable_lm_error(error):
                end(error)
            else:
                wait = _delay(error, attempt)
                self.time.after(wait, lambda: self._plain(dice, attempt + 1, end))

        self._send(dice, land)

    def _go_on(self, steps, dice, end, resume, value) -> None:
        try:
            step = resume(value)
        except StopIteration:
            end(None)
        except Exception as error:
            end(error)
        else:
            self._perform(steps, dice, end, step)

    def _perform(self, steps, dice, end, step) -> None:
        def send(value=None) -> None:
            self._go_on(steps, dice, end, steps.send, value)

        def land(error) -> None:
            if error is None:
                send(Answer(["Paris"], None))
            else:
                self._go_on(steps, dice, end, steps.throw, error)

        if isinstance(step, Wait):
            self._wait(step, send)
        elif isinstance(step, Prepare):
            send()
        else:
            self._send(dice, land)

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


def throttled(hint: float | None) -> Exception:
    return dspy.LMRateLimitError("slow down", model="openai/test", status=429, retry_after=hint)


def timed_out() -> Exception:
    return dspy.LMTimeoutError("no answer", model="openai/test")
