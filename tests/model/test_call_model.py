"""Whole calls, many at once, in any order: answered, failed, cancelled, abandoned, kept waiting.

Each call is the generator of `call.complete` with nothing behind it: Hypothesis plays driver,
provider and clock. Whatever it does, nothing is held by anybody once all calls have ended, no limit
is overrun on the way, and nobody waits for something that will not come.
"""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from typing import Any

import dspy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dspy_resilient import CircuitPolicy, LimitPolicy, ResilientLM, RetryPolicy
from dspy_resilient.cache import Answer
from dspy_resilient.pipeline.call import complete
from dspy_resilient.pipeline.client import ClientState
from dspy_resilient.pipeline.state import Disk, Prepare, Wait
from dspy_resilient.targets.fallbacks import Fallbacks
from dspy_resilient.targets.target import Target
from dspy_resilient.testing import Clock

WHICH = st.integers(0, 30)  # one of the calls there are


def throttled(hint):
    return dspy.LMRateLimitError("slow down", model="m", status=429, retry_after=hint)


FAILURES = {
    "500": lambda: dspy.LMServerError("boom", model="m", status=500),
    "cut": lambda: dspy.LMStreamAssemblyError("cut", model="m"),
    "timeout": lambda: dspy.LMTimeoutError("late", model="m"),
    "429": lambda: throttled(None),
    "429 in 2 s": lambda: throttled(2.0),
    "429 in an hour": lambda: throttled(3600.0),
    "401": lambda: dspy.LMAuthError("who are you", model="m", status=401),
    "402": lambda: dspy.LMBillingError("no money", model="m", status=402),
    "400": lambda: dspy.LMInvalidRequestError("what", model="m", status=400),
    "too long": lambda: dspy.ContextWindowExceededError(model="m"),
    "a bug": lambda: TypeError("oops"),
}


@dataclass(eq=False)
class Running:
    """A call under way: its generator, the step it has yielded, and until when it waits."""

    steps: Any
    step: Any = None
    until: float = math.inf

    @property
    def is_sent(self):
        return not isinstance(self.step, Wait)


class CallMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        max_concurrent=st.none() | st.integers(1, 3),
        max_queue=st.none() | st.integers(0, 3),
        rpm=st.none() | st.sampled_from([12, 60]),
        deadline=st.none() | st.sampled_from([0.5, 20.0]),
        max_wait=st.sampled_from([0.0, 3.0, 100.0]),
        spare=st.booleans(),
        luck=st.floats(0, 0.99),
    )
    def start(self, max_concurrent, max_queue, rpm, deadline, max_wait, spare, luck):
        self.clock = Clock(1000.0)
        self.running: list[Running] = []
        self.begun = self.ended = 0
        limits = LimitPolicy(max_concurrent=max_concurrent, max_queue=max_queue, rpm=rpm)
        self.lm = lm = ResilientLM(
            "openai/first",
            api_key="k",
            limits=limits,
            circuit=CircuitPolicy(failure_threshold=2, recovery_time=2.0, jitter=0.0),
            retry=RetryPolicy(max_attempts=3, base=1.0),
            max_wait=max_wait,
            deadline=deadline,
        )
        self.limits = limits
        self.client = lm._runtime = ClientState(lm._runtime.options, clock=self.clock)
        self.client.ready = lambda: True
        self.client.random = lambda: luck
        lm._primary = Target(lm, self.client.routes, self.client, dspy.LM, lm.history)
        names = {"fallbacks": ["openai/second"], "context_window_fallbacks": ["openai/long"]}
        lm._fallbacks = Fallbacks.build(lm, self.client, names if spare else {})

    # What a driver does.

    def go_on(self, call, resume, value=None):
        try:
            call.step = resume(value)
            while isinstance(call.step, Disk):
                call.step = call.steps.send(call.step.work())
        except StopIteration:
            self.end(call)
        except (Exception, asyncio.CancelledError, KeyboardInterrupt) as error:
            assert not isinstance(error, AssertionError), error
            self.end(call)
        else:
            assert not isinstance(call.step, Prepare)
            seconds = call.step.seconds if isinstance(call.step, Wait) else math.inf
            assert seconds >= 0
            call.until = self.clock() + seconds

    def end(self, call):
        self.running.remove(call)
        self.ended += 1

    def wake(self, call):
        """Go on with a call whose wait is over; False if it is not."""
        future = call.step.future
        if future is not None and future.done():
            self.go_on(call, call.steps.send, future.result())
        elif self.clock() >= call.until:
            self.go_on(call, call.steps.send, None)
        else:
            return False
        return True

    def pick(self, which, sent):
        calls = [call for call in self.running if call.is_sent == sent]
        return calls[which % len(calls)] if calls else None

    # What may happen.

    @rule(prompt=st.sampled_from("abc"), cache=st.booleans())
    def begin(self, prompt, cache):
        asked = self.lm._begin("acall", prompt, None, {"cache": cache})
        call = Running(complete(asked, self.client))
        self.running.append(call)
        self.begun += 1
        self.go_on(call, call.steps.send)

    @rule(which=WHICH)
    def answer(self, which):
        if (call := self.pick(which, sent=True)) is not None:
            self.go_on(call, call.steps.send, Answer(["Paris"], None))

    @rule(which=WHICH, kind=st.sampled_from(sorted(FAILURES)))
    def fail(self, which, kind):
        if (call := self.pick(which, sent=True)) is not None:
            self.go_on(call, call.steps.throw, FAILURES[kind]())

    @rule(which=WHICH)
    def go_on_waiting(self, which):
        if (call := self.pick(which, sent=False)) is not None:
            self.wake(call)

    @rule(which=WHICH, sent=st.booleans(), how=st.sampled_from(["cancel", "Ctrl-C", "abandon"]))
    def give_up(self, which, sent, how):
        if (call := self.pick(which, sent=sent)) is None:
            return
        if how == "abandon":
            call.steps.close()
            self.end(call)
        else:
            error = asyncio.CancelledError() if how == "cancel" else KeyboardInterrupt()
            self.go_on(call, call.steps.throw, error)
            assert call not in self.running  # nobody talks a cancellation away

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0, 10.0, 100.0]))
    def pass_time(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def reset(self):
        self.lm.reset()

    # What must hold.

    @invariant()
    def nobody_overruns_a_limit(self):
        for route in self.client.all_routes():
            sent = [c for c in self.running if c.is_sent and c.step.route is route]
            assert len(sent) <= (self.limits.max_concurrent or math.inf)

    @invariant()
    def nobody_stands_in_line_for_a_call_that_has_ended(self):
        waiting = sum(not call.is_sent for call in self.running)
        in_line = 0
        for route in self.client.all_routes():
            parts = [part for part in (route.gate, route.circuit, route.access) if part is not None]
            in_line += sum(part._notifier.waiting for part in parts) + route.limiter.queued
        assert in_line <= waiting

    def teardown(self):
        """Answer whatever is under way: everybody comes to an end, and nothing is left."""
        if not hasattr(self, "running"):
            return
        for _ in range(200 + 60 * self.begun):
            if not self.running:
                break
            woken = [self.wake(call) for call in list(self.running) if not call.is_sent]
            sent = self.pick(0, sent=True)
            if sent is not None:
                self.go_on(sent, sent.steps.send, Answer(["Paris"], None))
            elif not any(woken) and self.running:
                soonest = min(call.until for call in self.running)
                assert math.isfinite(soonest), "somebody waits for what will not come"
                self.clock.advance(max(0.0, soonest - self.clock()))
        assert not self.running, "somebody goes round in circles"
        assert self.begun == self.ended
        assert len(self.client.flights) == 0
        for route in self.client.all_routes():
            for part in (route.gate, route.circuit, route.access):
                if part is not None:
                    assert part._notifier.waiting == 0
            assert (route.limiter.in_use, route.limiter.queued) == (0, 0)
            assert route.limiter._queued_tokens == 0


EXAMPLES = int(os.environ.get("CALL_EXAMPLES", "30"))  # by hand: thousands
CallMachine.TestCase.settings = settings(stateful_step_count=50, max_examples=EXAMPLES)
TestCalls = CallMachine.TestCase
