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
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.circuit import SharedCircuit
from dspy_resilient.shared.link import Contact, carry
from dspy_resilient.testing import Clock

BUCKETS = 12
LONGEST_HINT = 30.0
CLOSED = ("closed", "forced_closed")
OUTCOMES = st.sampled_from(["success", "failure", "failure", "neutral"])
GAPS = st.sampled_from([0.0, 0.25, 2.0])
DRAWS = st.sampled_from([0.0, 0.25, 0.5, 0.75])
SWITCHES = st.sampled_from(
    ["trip", "force_open", "force_half_open", "force_closed", "auto", "auto", "reset"]
)
POLICIES = st.builds(
    CircuitPolicy,
    failure_threshold=st.integers(1, 4),
    surprise=st.sampled_from([1e-4, 0.1, 1.0, 0.0]),
    window=st.sampled_from([6.0, 24.0]),
    min_calls=st.integers(1, 6),
    failure_rate=st.sampled_from([None, None, 0.0, 0.25, 1.0]),
    slow_call=st.sampled_from([None, 2.0]),
    slow_rate=st.sampled_from([0.5, 1.0]),
    recovery_time=st.sampled_from([1.0, 8.0]),
    backoff=st.sampled_from([1.0, 1.5, 10.0]),
    max_recovery_time=st.sampled_from([5.0, 40.0]),
    jitter=st.sampled_from([0.0, 0.5]),
    mode=st.sampled_from(["enforce", "enforce", "observe"]),
)


@dataclass(eq=False)
class Call:
    """A permit as the model sees it. `real` is None once the caller has lost it."""

    real: Permit | None
    era: int | None  # None: refused, had it not been for mode="observe"
    began: float
    reported: bool = False


@dataclass
class Model:
    """What the circuit should be, in the plainest terms: everything is kept and looked up."""

    policy: CircuitPolicy
    state: str = "closed"  # or "open", or forced
    era: int = 0
    next_probe: float = 0.0
    probes: list[tuple[float, Call]] = field(default_factory=list)  # since it opened
    run: list[float] = field(default_factory=list)  # when the attempts began that failed in a row
    ended: list[str] = field(default_factory=list)  # the verdicts before the run, oldest first
    verdicts: list[tuple[float, str]] = field(default_factory=list)
    news_since: float = 0.0

    def seen(self, now):
        if self.state in CLOSED:
            return self.state
        is_under_way = bool(self.probes) and not self.probes[-1][1].reported
        return "half_open" if now >= self.next_probe or is_under_way else self.state

    def share(self):
        share = 0.02
        for each in self.ended:
            share += ((each == "failure") - share) / 50
        return min(share, 0.99)

    def lets_in(self, now, draw):
        """None, "call" or "probe"."""
        if self.state in CLOSED:
            return "call"
        if now < self.next_probe:
            return None
        policy = self.policy
        interval = policy.recovery_time
        for _ in range(len(self.probes) + 1):
            longest = max(policy.recovery_time, policy.max_recovery_time)
            interval = min(longest, interval * policy.backoff)
        self.state = "open"
        self.next_probe = now + self.varied(interval, draw)
        return "probe"

    def varied(self, seconds, draw):
        return seconds * (1 + self.policy.jitter * (2 * draw - 1))

    def become(self, state):
        self.state = state
        self.era += 1
        self.probes = []
        if state in CLOSED:
            self.end_run()
            self.verdicts = []

    def end_run(self):
        self.ended += ["failure"] * len(self.run)
        self.run = []

    def open(self, now, draw, hint, news_since):
        self.become("open")
        seconds = self.varied(self.policy.recovery_time, draw)
        self.next_probe = now + max(seconds, min(hint or 0, LONGEST_HINT))
        self.news_since = news_since

    def rate(self, kind, now):
        width = self.policy.window / BUCKETS
        recent = [k for when, k in self.verdicts if when // width > now // width - BUCKETS]
        return recent.count(kind) / len(recent) if len(recent) >= self.policy.min_calls else -1

    def report(self, call, outcome, now, draw, hint, at_once):
        was_reported, call.reported = call.reported, True
        if was_reported or call.era is None:
            return
        slow = self.policy.slow_call is not None and now - call.began >= self.policy.slow_call
        if outcome == "success":
            self.succeed(call, now, draw, slow=slow)
        elif outcome == "failure" and call.era == self.era:
            self.fail(call, now, draw, hint, at_once)

    def succeed(self, call, now, draw, *, slow):
        if self.state == "open":
            if call.began >= self.news_since and not slow:
                self.become("closed")
            return
        self.end_run()
        self.ended.append("success")
        self.verdicts.append((now, "slow" if slow else "fine"))
        if slow and self.state == "closed" and self.rate("slow", now) >= self.policy.slow_rate:
            self.open(now, draw, None, now)

    def fail(self, call, now, draw, hint, at_once):
        if self.state == "open":
            self.next_probe = max(self.next_probe, now + min(hint or 0, LONGEST_HINT))
        if self.state not in CLOSED:
            return
        self.run.append(call.began)
        self.verdicts.append((now, "failure"))
        if self.state == "closed" and (at_once or self.is_outage() or self.is_too_often(now)):
            self.open(now, draw, hint, self.run[0])

    def is_outage(self):
        policy, share = self.policy, self.share()
        if len(self.run) < policy.failure_threshold or policy.surprise == 0:
            return False
        by_chance = share ** len(self.run)
        return share < 0.15 or len(self.run) >= 100 or by_chance <= policy.surprise * (1 + 1e-9)

    def is_too_often(self, now):
        policy = self.policy
        if policy.failure_rate is None:
            return False
        failures = [when for when, kind in self.verdicts if kind == "failure"]
        enough = policy.failure_threshold
        close = len(failures) >= enough and now - failures[-enough] <= policy.window
        return close and self.rate("failure", now) >= policy.failure_rate


class CircuitMachine(RuleBasedStateMachine):
    """Drives the circuit and its model side by side."""

    permits = Bundle("permits")
    waiters = Bundle("waiters")

    @initialize(policy=POLICIES)
    def build(self, policy):
        self.clock = Clock()
        self.draw = 0.5
        self.events = []
        self.breaker = self.make(
            policy, clock=self.clock, random=lambda: self.draw, listener=self.events.append,
            longest_hint=LONGEST_HINT,
        )  # fmt: skip
        self.model = Model(policy)
        self.line = []
        self.sent = []  # when each probe went, and the era

    def make(self, policy, **facts):
        return CircuitBreaker(policy, **facts)

    def try_admit(self):
        return self.breaker.try_admit()

    def settle(self):
        """Let what was reported take effect."""

    def ask(self):
        now, model = self.clock(), self.model
        expected = model.lets_in(now, self.draw)
        permit = self.try_admit()
        observes = model.policy.mode == "observe"
        assert (permit is not None) == (expected is not None or observes)
        if permit is None:
            return Call(None, None, now, reported=True)
        assert permit.probe == (expected == "probe")
        call = Call(permit, model.era if expected else None, now)
        if permit.probe:
            model.probes.append((now, call))
            self.sent.append((now, model.era))
        return call

    def tell(self, call, outcome, hint=None, reason="failures"):
        if call.real is None:
            return
        if outcome == "failure":
            call.real.failure(retry_after=hint, reason=reason)
        else:
            getattr(call.real, outcome)()
        self.settle()
        self.model.report(call, outcome, self.clock(), self.draw, hint, reason == "billing")

    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=6), seconds=GAPS)
    def make_calls(self, outcomes, seconds):
        for outcome in outcomes:
            call = self.ask()
            self.clock.advance(seconds)
            self.tell(call, outcome)
            self.agrees_with_the_model()

    @rule(failures=st.integers(1, 12), times=st.integers(1, 12))
    def fail_partly(self, failures, times):
        for _ in range(times):
            for outcome in ["failure"] * failures + ["success"]:
                self.tell(self.ask(), outcome)

    @rule(target=permits)
    def admit(self):
        return self.ask()

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
        if cancels:
            waiter.cancel()
        self.breaker.leave(waiter)
        self.line.remove(waiter)

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0, 10.0, 100.0]), draw=DRAWS)
    def advance(self, seconds, draw):
        self.clock.advance(seconds)
        self.draw = draw

    @rule(draw=DRAWS)
    def advance_to_the_next_probe(self, draw):
        wait = self.breaker.open_remaining
        if math.isfinite(wait):
            self.clock.advance(wait)
        self.draw = draw

    @rule(switch=SWITCHES, seconds=st.sampled_from([None, 2.0, 1000.0]))
    def switch(self, switch, seconds):
        now, model = self.clock.advance(0.25), self.model
        seen = model.seen(now)
        if switch == "trip":
            self.breaker.trip(retry_after=seconds)
            if seen == "open":
                model.next_probe = max(model.next_probe, now + min(seconds or 0, LONGEST_HINT))
            elif seen in ("closed", "half_open"):
                model.open(now, self.draw, seconds, now)
        elif switch == "force_open":
            self.breaker.force_open(seconds=seconds)
            model.become("forced_open")
            model.next_probe, model.news_since = now + (seconds or math.inf), now
        else:
            getattr(self.breaker, switch)()
            self.follow(switch, now)

    def follow(self, switch, now):
        model = self.model
        if switch == "force_half_open" or (switch == "auto" and model.state == "forced_open"):
            model.become("open")
            model.next_probe = model.news_since = now
        elif switch == "force_closed":
            model.become("forced_closed")
        elif switch == "reset" or model.state == "forced_closed":
            model.become("closed")
        if switch == "reset":
            model.ended = []

    @invariant()
    def agrees_with_the_model(self):
        now, model, breaker = self.clock(), self.model, self.breaker
        assert breaker.state == model.seen(now)
        assert breaker.failure_count == len(model.run)
        remaining = 0.0 if model.state in CLOSED else max(0.0, model.next_probe - now)
        assert breaker.open_remaining == pytest.approx(remaining, rel=1e-12)

    @invariant()
    def sends_at_most_one_probe_per_interval(self):
        policy = self.model.policy
        shortest = min(policy.recovery_time * policy.backoff, 5.0) * (1 - policy.jitter)
        for (before, era), (after, later) in itertools.pairwise(self.sent):
            assert era != later or after - before >= shortest * (1 - 1e-9)

    @invariant()
    def promises_nothing_it_does_not_keep(self):
        """`wait_time` is 0 if and only if a call would be let in, and no wait is without end."""
        model, wait = self.model, self.breaker.wait_time()
        refuses = model.state not in CLOSED and self.clock() < model.next_probe
        assert (wait == 0) == (not refuses or model.policy.mode == "observe")
        if model.state != "forced_open":
            longest = max(model.policy.recovery_time, model.policy.max_recovery_time)
            assert wait <= max(longest * (1 + model.policy.jitter), LONGEST_HINT)

    @invariant()
    def leaves_nobody_waiting_at_a_closed_circuit(self):
        if self.breaker.closed:
            for waiter in self.line:
                assert (
                    waiter.cancelled() or 0 <= waiter.result(0) <= self.model.policy.recovery_time
                )

    @invariant()
    def tells_no_impossible_story(self):
        for before, after in itertools.pairwise(self.events):
            assert before.at <= after.at
            if isinstance(after, CircuitClosed):
                assert isinstance(before, (CircuitOpened, CircuitHalfOpened))

    def teardown(self):
        """Whatever happened, one quick answer to a probe closes it: it is never stuck."""
        if not hasattr(self, "breaker"):
            return
        self.clock.advance(0.25)
        self.breaker.auto()
        self.clock.advance(self.breaker.open_remaining)
        self.try_admit().success()
        self.settle()
        assert self.breaker.closed


class Messenger:
    """Carries what the circuit has to say at once, where a courier has a thread."""

    def __init__(self, clock):
        self.clock = clock
        self.contact = Contact(clock=clock, emit=lambda *_, **__: None)
        self._store = MemoryStore(clock=clock)

    def send(self, link):
        carry(self._store, [link])

    def watch(self, link):
        self.send(link)


class SharedCircuitMachine(CircuitMachine):
    """The same for a circuit whose state lies in a store."""

    def make(self, policy, **facts):
        return SharedCircuit(Messenger(self.clock), "{k}", policy, **facts)

    def try_admit(self):
        with self.breaker.consulting():
            return self.breaker.try_admit()

    def settle(self):
        self.breaker.ask()


TestSharedCircuit = pytest.mark.timeout(600)(SharedCircuitMachine.TestCase)
TestSharedCircuit.settings = settings(stateful_step_count=60)
TestCircuit = pytest.mark.timeout(600)(CircuitMachine.TestCase)
TestCircuit.settings = settings(stateful_step_count=60)
