"""The throttle gate against a naive model of it, over every order of events Hypothesis finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from dspy_resilient.limits import GatePass, ThrottleGate
from dspy_resilient.testing import Clock

FULL = 64


@dataclass(eq=False)
class Call:
    """A pass as the model sees it. `real` is None once the caller has lost it."""

    real: GatePass | None
    era: int
    lease: float = -math.inf
    reported: bool = False

    def holds(self, era, now):
        return not self.reported and self.era == era and now < self.lease


@dataclass
class Model:
    """What the gate should be, in the plainest terms."""

    most: float
    open: bool = True
    era: int = 0
    until: float = -math.inf
    hinted: float = -math.inf
    first: float | None = None
    closings: int = 0
    allowance: int = 1
    calls: list[Call] = field(default_factory=list)
    line: list = field(default_factory=list)
    called: set = field(default_factory=set)

    def in_flight(self, now):
        return sum(call.holds(self.era, now) for call in self.calls)

    def wait(self, now):
        if self.open or (now >= self.until and self.in_flight(now) < self.allowance):
            return 0
        return self.until - now if now < self.until else math.inf

    def call_waiters(self, count=math.inf):
        while self.line and count > 0:
            waiter = self.line.pop(0)
            if not waiter.cancelled():
                self.called.add(waiter)
                count -= 1

    def answer(self, call, now):
        if call.reported:
            return
        call.reported = True
        if self.open:
            return
        self.first = None
        if call.era != self.era:
            return
        self.closings = 0
        self.hinted = -math.inf
        if now < self.until:
            return
        self.allowance *= 2
        busy = self.in_flight(now)
        if self.allowance >= max(FULL, busy + len(self.line)):
            self.open = True
            self.call_waiters()
        else:
            self.call_waiters(self.allowance - busy)

    def throttle(self, call, hint, now, draw):
        if call.reported:
            return
        call.reported = True
        news = self.open or call.era == self.era
        if news:
            self.era += 1
            self.closings += 1
        if self.first is None:
            self.first = now
        step = min(2 ** max(self.closings - 1, 0), 30)
        pause = step * (0.1 + 0.9 * draw) if hint is None else min(hint, self.most)
        if hint is not None:
            self.hinted = max(self.hinted, now + hint)
        self.open, self.allowance = False, 1
        if news or now + pause > self.until:
            self.until = max(self.until, now + pause)
            self.call_waiters()

    def release(self, call, now):
        held = not self.open and call.holds(self.era, now)
        call.reported = True
        if held:
            self.call_waiters(1)


class GateMachine(RuleBasedStateMachine):
    """Drives the gate and its model side by side."""

    passes = Bundle("passes")
    waiters = Bundle("waiters")

    @initialize(most=st.sampled_from([0.5, 60.0]))
    def build(self, most):
        self.clock = Clock()
        self.draw = 1.0
        self.gate = ThrottleGate(max_retry_after=most, clock=self.clock, random=lambda: self.draw)
        self.model = Model(most)
        self.promised = -math.inf

    def ask(self, lease=0.0):
        now, model = self.clock(), self.model
        expected = model.wait(now) == 0
        ticket = self.gate.admit(lease)
        assert (ticket is not None) == expected
        if ticket is None:
            return Call(None, -1, reported=True)
        call = Call(ticket, model.era)
        if not model.open:
            call.lease = now + max(60.0, lease)
        model.calls.append(call)
        return call

    @rule(target=passes, lease=st.sampled_from([0.0, 100.0]))
    def admit(self, lease):
        return self.ask(lease)

    @rule(call=passes)
    def answered(self, call):
        if call.real is not None:
            call.real.answered()
            self.model.answer(call, self.clock())

    @rule(call=passes, hint=st.sampled_from([None, None, 0.25, 5.0, 3600.0]))
    def throttled(self, call, hint):
        if call.real is None:
            return
        now = self.clock()
        closed_for = call.real.throttled(hint)
        self.model.throttle(call, hint, now, self.draw)
        assert closed_for == max(0.0, self.model.until - now)
        self.promised = max(self.promised, now + closed_for)

    @rule(call=passes)
    def release(self, call):
        if call.real is not None:
            call.real.release()
            self.model.release(call, self.clock())

    @rule(call=consumes(passes))
    def lose(self, call):
        call.real = None

    @rule(times=st.integers(1, 8))
    def answer_some(self, times):
        for _ in range(times):
            while self.gate.wait_time() > 0:
                self.clock.advance(self.gate.recheck_time())
            call = self.ask()
            call.real.answered()
            self.model.answer(call, self.clock())

    @rule(target=waiters)
    def enlist(self):
        waiter = self.gate.enlist()
        if self.model.wait(self.clock()) == 0:
            self.model.called.add(waiter)
        else:
            self.model.line.append(waiter)
        return waiter

    @rule(waiter=consumes(waiters), cancels=st.booleans())
    def leave(self, waiter, cancels):
        model = self.model
        if cancels:
            waiter.cancel()
        self.gate.leave(waiter)
        if waiter in model.line:
            model.line.remove(waiter)
        elif model.wait(self.clock()) == 0:
            model.call_waiters(1)
        model.called.discard(waiter)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def advance(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def advance_to_the_next_change(self):
        self.clock.advance(self.gate.recheck_time())

    @rule(draw=st.sampled_from([0.0, 0.5, 0.999]))
    def roll(self, draw):
        self.draw = draw

    @invariant()
    def agrees_with_the_model(self):
        now, model, gate = self.clock(), self.model, self.gate
        assert gate.wait_time() == model.wait(now)
        assert gate.hint == (model.hinted - now if model.hinted > now else None)
        assert gate.unbroken == (0 if model.first is None else now - model.first)

    @invariant()
    def never_opens_before_its_time(self):
        """Whatever is answered meanwhile."""
        assert self.clock() + self.gate.wait_time() >= self.promised

    @invariant()
    def calls_the_right_waiters(self):
        assert all(waiter.done() for waiter in self.model.called)
        assert not any(waiter.done() for waiter in self.model.line)

    @invariant()
    def no_wait_is_without_end(self):
        assert self.gate.recheck_time() <= self.gate.wait_time()
        assert self.gate.recheck_time() <= 100 + 60

    def teardown(self):
        """Whatever happened, answers open it in the end."""
        if not hasattr(self, "gate"):
            return
        for _ in range(20):
            while self.gate.wait_time() > 0:
                self.clock.advance(self.gate.recheck_time())
            self.gate.admit().answered()
        assert self.gate.wait_time() == 0


TestGate = pytest.mark.timeout(600)(GateMachine.TestCase)
TestGate.settings = settings(stateful_step_count=60)
