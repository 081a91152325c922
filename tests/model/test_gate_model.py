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

from dspy_resilient.limits import GatePermit, ThrottleGate
from dspy_resilient.testing import Clock

FULL = 64


@dataclass(eq=False)
class Call:
    """A permit as the model sees it. `real` is None if there is none, or the caller has lost it."""

    real: GatePermit | None
    era: int
    reported: bool = False
    number: int = 0


@dataclass
class Model:
    """What the gate should be, in the plainest terms."""

    open: bool = True
    era: int = 0
    until: float = -math.inf
    hinted: float = -math.inf
    closings: int = 0
    let_in: int = 0
    answers: int = 0
    share: float = 0.0
    verdicts: int = 0
    numbers: int = 0
    accepted: int = 0
    refused: list = field(default_factory=list)
    under_way: set = field(default_factory=set)
    line: list = field(default_factory=list)
    called: set = field(default_factory=set)

    def due(self, ahead=0):
        """When the next call may go behind others: the time at which enough may have gone."""
        extra = self.let_in + ahead - 2 * self.answers
        return self.until + (math.log2(extra + 2) - 1 if extra > 0 else 0)

    def wait(self, now, ahead=0):
        return 0 if self.open else max(0, self.due(ahead) - now)

    def need(self):
        """How many 429s in a row, or about so many, are too many (logarithms: powers round otherwise)."""
        if self.share < 1e-4:
            return 1
        return min(math.log(1e-4) / math.log(self.share), 30)

    def learn(self, verdict):
        self.verdicts = min(self.verdicts + 1, 50)
        self.share += (verdict - self.share) / self.verdicts

    def send(self, call):
        self.numbers += 1
        call.number = self.numbers
        self.under_way.add(call.number)

    def call_waiters(self, count=math.inf):
        while self.line and count > 0:
            waiter = self.line.pop(0)
            if not waiter.cancelled():
                self.called.add(waiter)
                count -= 1

    def open_if_wide(self, now):
        allowed = 2 ** (min(now - self.until, 30) + 1) - 1 + 2 * self.answers
        if allowed >= max(FULL, self.let_in + len(self.line)):
            self.open = True
            self.call_waiters()

    def admit(self, now):
        if self.wait(now) > 0:
            return False
        if not self.open:
            self.let_in += 1
            self.open_if_wide(now)
        return True

    def answer(self, call, now):
        if call.reported:
            return
        call.reported = True
        if not self.open and call.era != self.era:
            return
        self.under_way.discard(call.number)
        number = call.number or math.inf
        earlier = [each for each in self.refused if each < number]
        for _ in range(min(len(earlier), math.ceil(self.need()))):
            self.learn(1)
        self.refused = [each for each in self.refused if each > number]
        self.accepted = max(self.accepted, call.number)
        self.learn(0)
        if call.era != self.era or self.open:
            return
        self.closings = 0
        self.hinted = -math.inf
        if now >= self.until:
            self.answers += 1
            self.call_waiters(2)
            self.open_if_wide(now)

    def throttle(self, call, hint, now, draw):
        if call.reported:
            return
        call.reported = True
        if not call.number:
            self.send(call)
        self.under_way.discard(call.number)
        if call.number > self.accepted:
            self.refused.append(call.number)
        run = [each for each in self.refused if each > max(self.under_way, default=0)]
        if len(run) < self.need() and now >= self.until:
            return
        news = self.open or call.era == self.era
        if news:
            self.era += 1
            self.closings += 1
        step = min(2 ** max(self.closings - 1, 0), 30)
        pause = step * (0.1 + 0.9 * draw) if hint is None else hint
        if hint is not None:
            self.hinted = max(self.hinted, now + hint)
        self.open, self.let_in, self.answers = False, 0, 0
        self.until = max(self.until, now + pause)

    def release(self, call):
        self.under_way.discard(call.number)
        if not call.reported and not self.open and call.era == self.era and self.let_in:
            self.let_in -= 1
            self.call_waiters(1)
        call.reported = True


class GateMachine(RuleBasedStateMachine):
    """Drives the gate and its model side by side."""

    permits = Bundle("permits")
    waiters = Bundle("waiters")

    @initialize(share=st.sampled_from([0.0, 0.2, 0.9]), verdicts=st.sampled_from([0, 50]))
    def build(self, share, verdicts):
        self.clock = Clock()
        self.draw = 1.0
        self.gate = ThrottleGate(clock=self.clock, random=lambda: self.draw)
        self.model = Model(share=share, verdicts=verdicts)
        self.gate._share, self.gate._verdicts = share, verdicts
        self.promised = -math.inf

    def ask(self):
        expected = self.model.admit(self.clock())
        permit = self.gate.admit()
        assert (permit is not None) == expected
        return Call(permit, self.model.era, reported=permit is None)

    @rule(target=permits, sent=st.booleans())
    def admit(self, sent):
        call = self.ask()
        if sent and call.real is not None:
            call.real.sent()
            self.model.send(call)
        return call

    @rule(call=permits)
    def answered(self, call):
        if call.real is not None:
            call.real.answered()
            self.model.answer(call, self.clock())

    @rule(call=permits, hint=st.sampled_from([None, None, 0.25, 5.0, 3600.0]))
    def throttled(self, call, hint):
        if call.real is None:
            return
        now = self.clock()
        closed_for = call.real.throttled(hint)
        self.model.throttle(call, hint, now, self.draw)
        assert closed_for == (0 if self.model.open else max(0.0, self.model.until - now))
        self.promised = max(self.promised, now + closed_for)

    @rule(call=permits)
    def release(self, call):
        if call.real is not None:
            call.real.release()
            self.model.release(call)

    @rule(call=consumes(permits))
    def lose(self, call):
        """It counts as under way for good, which only requests sent before it notice."""
        call.real = None

    @rule(times=st.integers(1, 8), answered=st.booleans())
    def ask_some(self, times, answered):
        for _ in range(times):
            self.clock.advance(self.gate.wait_time())
            call = self.ask()
            if call.real is None:  # the end of the wait, but for a rounding
                continue
            if answered:
                self.answered(call)
            else:
                self.throttled(call, None)

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

    @rule(draw=st.sampled_from([0.0, 0.5, 0.999]))
    def roll(self, draw):
        self.draw = draw

    @invariant()
    def agrees_with_the_model(self):
        now, model, gate = self.clock(), self.model, self.gate
        assert gate.wait_time() == pytest.approx(model.wait(now))
        behind = model.wait(now, max(0, len(model.line) - 1))
        assert gate.recheck_time() == pytest.approx(behind)
        assert gate.hint == (model.hinted - now if model.hinted > now else None)
        assert gate._share == pytest.approx(model.share)
        assert gate._refused == model.refused

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
        assert self.gate.recheck_time() <= 3600 + 30

    def teardown(self):
        """Whatever happened, time alone opens it in the end."""
        if not hasattr(self, "gate"):
            return
        self.clock.advance(self.gate.wait_time() + 10)
        assert self.gate.admit() is not None
        assert self.gate.wait_time() == 0


TestGate = pytest.mark.timeout(600)(GateMachine.TestCase)
TestGate.settings = settings(stateful_step_count=60)
