"""The circuit against a naive model of it, over every order of events Hypothesis can think of."""

from __future__ import annotations

import itertools
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

from dspy_resilient.circuit import CircuitBreaker, Permit
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.testing import Clock

BUCKETS = 12
CLOSED = ("closed", "forced_closed")
OUTCOMES = st.sampled_from(["success", "failure", "failure", "neutral"])
LONGEST_LEASE = 100.0
GAPS = st.sampled_from([0.0, 0.25, 2.0])
DRAWS = st.sampled_from([0.0, 0.25, 0.5, 0.999])
SWITCHES = st.sampled_from(
    ["trip", "force_open", "force_half_open", "force_closed", "auto", "auto", "reset"]
)
POLICIES = st.builds(
    CircuitPolicy,
    failure_threshold=st.integers(1, 4),
    window=st.sampled_from([6.0, 24.0]),
    min_calls=st.integers(1, 6),
    failure_rate=st.sampled_from([0.25, 0.5, 1.0]),
    slow_call=st.sampled_from([None, 2.0]),
    slow_rate=st.sampled_from([0.5, 1.0]),
    recovery_time=st.sampled_from([1.0, 5.0]),
    backoff=st.sampled_from([1.0, 2.0, 10.0]),
    max_recovery_time=st.sampled_from([5.0, 40.0]),
    jitter=st.sampled_from([0.0, 0.5]),
    probes=st.integers(1, 3),
    successes_to_close=st.integers(1, 3),
    probe_lease=st.sampled_from([3.0, 60.0]),
    mode=st.sampled_from(["enforce", "enforce", "observe"]),
)


@dataclass(eq=False)
class Call:
    """A permit as the model sees it. `real` is None once the caller has lost it."""

    real: Permit | None
    era: int
    began: float
    lease: float = math.inf
    holds: bool = False
    reported: bool = False


@dataclass
class Model:
    """What the circuit should be, in the plainest terms: everything is kept and looked up."""

    policy: CircuitPolicy
    state: str = "closed"
    era: int = 0
    since: float = 0.0
    until: float = 0.0
    row: int = 0
    openings: float = 0
    successes: int = 0
    verdicts: list[tuple[float, str]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def seen(self, now):
        return "half_open" if self.state.endswith("open") and self.is_over(now) else self.state

    def is_over(self, now):
        return self.state in ("open", "forced_open") and now >= self.until

    def probing(self, now):
        return sum(c.holds and c.era == self.era and now < c.lease for c in self.calls)

    def lets_in(self, now):
        """None, "call" or "probe"."""
        if self.state in CLOSED:
            return "call"
        if self.is_over(now):
            self.become("half_open", now)
        if self.state == "half_open" and self.probing(now) < self.policy.probes:
            return "probe"
        return None

    def become(self, state, now):
        if self.state in CLOSED:
            forgiven = (now - self.since) // self.policy.recovery_time
            self.openings = max(0, self.openings - forgiven)
        self.state, self.since = state, now
        self.era += 1
        self.successes = 0
        if state in CLOSED:
            self.row = 0
            self.verdicts = []
            worth = 1
            while self.length(worth - 1) < self.policy.max_recovery_time and worth < 1000:
                worth += 1
            self.openings = min(self.openings, worth)

    def length(self, openings):
        policy = self.policy
        return min(policy.max_recovery_time, policy.recovery_time * policy.backoff**openings)

    def open(self, now, draw, hint):
        if self.successes:
            self.openings = max(0, self.openings - 1)
        self.become("open", now)
        spread = 1 + self.policy.jitter * (2 * draw - 1)
        floor = min(hint or 0, self.policy.max_recovery_time)
        self.until = now + max(self.length(self.openings) * spread, floor)
        self.openings += 1

    def rate(self, kind, now):
        width = self.policy.window / BUCKETS
        recent = [k for when, k in self.verdicts if when // width > now // width - BUCKETS]
        return recent.count(kind) / len(recent) if len(recent) >= self.policy.min_calls else 0

    def report(self, call, outcome, now, draw, hint, at_once):
        stale = call.reported or call.era != self.era
        call.reported = True
        call.holds = False
        if stale or outcome == "neutral":
            return
        slow = self.policy.slow_call is not None and now - call.began >= self.policy.slow_call
        kind = "failure" if outcome == "failure" else "slow" if slow else "fine"
        self.row = self.row + 1 if kind == "failure" else self.row
        if self.state == "half_open":
            self.judge_probe(kind, now, draw, hint)
            return
        self.row = self.row if kind == "failure" else 0
        self.verdicts.append((now, kind))
        too_many = kind == "failure" and (
            at_once
            or self.row >= self.policy.failure_threshold
            or self.rate("failure", now) >= self.policy.failure_rate
        )
        too_slow = kind == "slow" and self.rate("slow", now) >= self.policy.slow_rate
        if self.state == "closed" and (too_many or too_slow):
            self.open(now, draw, hint if kind == "failure" else None)

    def judge_probe(self, kind, now, draw, hint):
        if kind == "fine":
            self.successes += 1
            if self.successes >= self.policy.successes_to_close:
                self.become("closed", now)
        else:
            self.open(now, draw, hint if kind == "failure" else None)


class CircuitMachine(RuleBasedStateMachine):
    """Drives the circuit and its model side by side."""

    permits = Bundle("permits")
    waiters = Bundle("waiters")

    @initialize(policy=POLICIES)
    def build(self, policy):
        self.clock = Clock()
        self.draw = 0.5
        self.events = []
        self.breaker = CircuitBreaker(
            policy, clock=self.clock, random=lambda: self.draw, listener=self.events.append
        )
        self.model = Model(policy)
        self.line = []

    def check_line(self, *, owed):
        """Nobody waits uncalled for a place that a report, a hand or a leaver has made free.

        One that time has made free is not `owed`: for that, each waiter has its `recheck_time`.
        """
        called = [waiter for waiter in self.line if waiter.done()]
        if owed and len(called) < len(self.line) and self.breaker.wait_time() == 0:
            assert called

    def ask(self, lease=0.0):
        now = self.clock()
        expected = self.model.lets_in(now)
        permit = self.breaker.try_admit(lease)
        observes = self.model.policy.mode == "observe"
        assert (permit is not None) == (expected is not None or observes)
        if permit is None:
            return Call(None, -1, now, reported=True)
        assert permit.probe == (expected == "probe")
        call = Call(permit, self.model.era if expected else -1, now)
        if permit.probe:
            call.holds = True
            call.lease = now + max(self.model.policy.probe_lease, lease)
        self.model.calls.append(call)
        return call

    def tell(self, call, outcome, hint=None, reason="failures"):
        if call.real is None:
            return
        owed = self.breaker.wait_time() > 0
        if outcome == "failure":
            call.real.failure(retry_after=hint, reason=reason)
        else:
            getattr(call.real, outcome)()
        self.model.report(call, outcome, self.clock(), self.draw, hint, reason == "billing")
        self.check_line(owed=owed)

    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=6), seconds=GAPS)
    def make_calls(self, outcomes, seconds):
        for outcome in outcomes:
            call = self.ask()
            self.clock.advance(seconds)
            self.tell(call, outcome)
            self.agrees_with_the_model()

    @rule(target=permits, lease=st.sampled_from([0.0, 10.0, 100.0]))
    def admit(self, lease):
        return self.ask(lease)

    @rule(
        call=permits,
        outcomes=st.lists(OUTCOMES, min_size=1, max_size=2),
        hint=st.sampled_from([None, None, 3.0, 1000.0]),
        reason=st.sampled_from(["failures", "failures", "auth", "billing"]),
    )
    def report(self, call, outcomes, hint, reason):
        for outcome in outcomes:
            self.tell(call, outcome, hint, reason)

    @rule(call=consumes(permits))
    def lose(self, call):
        call.real = None

    @rule(target=waiters)
    def enlist(self):
        waiter = self.breaker.enlist()
        self.line.append(waiter)
        assert waiter.done() == (self.breaker.wait_time() == 0)
        return waiter

    @rule(waiter=consumes(waiters), cancels=st.booleans())
    def leave(self, waiter, cancels):
        owed = waiter.done()
        if cancels:
            waiter.cancel()
        self.breaker.leave(waiter)
        self.line.remove(waiter)
        self.check_line(owed=owed)

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0, 10.0, 100.0]), draw=DRAWS)
    def advance(self, seconds, draw):
        self.clock.advance(seconds)
        self.draw = draw

    @rule(draw=DRAWS)
    def advance_to_the_next_change(self, draw):
        wait = self.breaker.recheck_time()
        if math.isfinite(wait):
            self.clock.advance(wait)
        self.draw = draw

    @rule(switch=SWITCHES, seconds=st.sampled_from([None, 2.0, 1000.0]))
    def switch(self, switch, seconds):
        now, model = self.clock(), self.model
        seen, owed = model.seen(now), self.breaker.wait_time() > 0
        if switch == "trip":
            self.breaker.trip(retry_after=seconds)
            if seen == "open":
                least = min(seconds or 0, model.policy.max_recovery_time)
                model.until = max(model.until, now + least)
            elif seen in ("closed", "half_open"):
                model.open(now, self.draw, seconds)
        elif switch == "force_open":
            self.breaker.force_open(seconds=seconds)
            model.become("forced_open", now)
            model.until = now + (seconds or math.inf)
        else:
            getattr(self.breaker, switch)()
            self.follow(switch, now)
        self.check_line(owed=owed)

    def follow(self, switch, now):
        model = self.model
        if switch == "force_half_open" or (switch == "auto" and model.state == "forced_open"):
            model.become("half_open", now)
        elif switch == "force_closed":
            model.become("forced_closed", now)
        elif switch == "reset" or model.state == "forced_closed":
            model.become("closed", now)
        if switch == "reset":
            model.openings = 0

    @invariant()
    def agrees_with_the_model(self):
        now, model, breaker = self.clock(), self.model, self.breaker
        assert breaker.state == model.seen(now)
        assert breaker.failure_count == model.row
        refusing = model.state in ("open", "forced_open")
        remaining = max(0.0, model.until - now) if refusing else 0.0
        assert breaker.open_remaining == pytest.approx(remaining, rel=1e-12)

    @invariant()
    def never_has_more_probes_than_allowed(self):
        assert self.model.probing(self.clock()) <= self.model.policy.probes

    @invariant()
    def promises_nothing_it_does_not_keep(self):
        """`wait_time` is 0 if and only if a call would be let in, and no wait is without end."""
        now, model = self.clock(), self.model
        wait, recheck = self.breaker.wait_time(), self.breaker.recheck_time()
        free = model.seen(now) == "half_open" and (
            model.is_over(now) or model.probing(now) < model.policy.probes
        )
        lets_in = model.state in CLOSED or free or model.policy.mode == "observe"
        assert (wait == 0) == lets_in
        assert recheck <= wait
        if model.until < math.inf or model.state != "forced_open":
            assert math.isfinite(recheck)

    @invariant()
    def tells_no_impossible_story(self):
        for before, after in itertools.pairwise(self.events):
            assert before.at <= after.at
            if isinstance(after, CircuitClosed):
                assert isinstance(before, (CircuitOpened, CircuitHalfOpened))

    def teardown(self):
        """Whatever happened, healthy probes close it in the end: it is never stuck."""
        if not hasattr(self, "breaker"):
            return
        self.breaker.auto()
        for _ in range(20):
            if self.breaker.closed:
                return
            self.clock.advance(max(self.breaker.open_remaining, LONGEST_LEASE))
            permit = self.breaker.try_admit()
            permit.success()
        pytest.fail(f"stuck: {self.breaker!r}")


TestCircuit = pytest.mark.timeout(600)(CircuitMachine.TestCase)
TestCircuit.settings = settings(stateful_step_count=60)
