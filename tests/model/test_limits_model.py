"""The limiter against a naive model: lists, a counter, and buckets that are filled step by step.

Callers come, look, wait, are served, give up and come back in any order, while time passes. The
model decides slowly and obviously; the limiter must agree after every step.
"""

import math
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from dspy_resilient.errors import LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.limits.rate import BURST_SECONDS
from dspy_resilient.policies import LimitPolicy
from dspy_resilient.testing.clock import Clock

CLOSE = 1e-5  # float dust in seconds, requests and tokens
WHICH = st.integers(0, 20)  # one of the callers there are


@dataclass
class Bucket:
    """A textbook token bucket: a level, refilled whenever time passes."""

    per_minute: float | None
    level: float = 0.0
    charges: list = field(default_factory=list)

    def __post_init__(self):
        self.rate = math.inf if self.per_minute is None else self.per_minute / 60
        self.burst = self.rate * BURST_SECONDS
        self.level = self.burst

    def pass_time(self, seconds):
        if seconds:
            self.level = min(self.burst, self.level + self.rate * seconds)

    def lacks(self, amount):
        """Seconds until `amount` may be taken."""
        if self.per_minute is None:
            return 0.0
        return max(0.0, (min(amount, self.burst) - self.level) / self.rate)

    def take(self, amount, now, granted):
        if self.per_minute is not None:
            self.level = min(self.burst, self.level - amount)
            self.charges.append((now, amount, granted))

    def check_windows(self):
        """However it is cut, time until a grant sees no more than the rate and one burst.

        Debt found at the end of an attempt cannot be refused: it may overshoot, but nobody is
        granted anything before it fits.
        """
        now, _, granted = self.charges[-1] if self.charges else (0, 0, False)
        if granted:
            burst = max(self.burst, *(amount for _, amount, granted in self.charges if granted))
            total = 0.0
            for began, amount, _ in reversed(self.charges):
                total += amount
                assert total <= burst + self.rate * (now - began) + CLOSE


@dataclass(eq=False)
class Caller:
    """Somebody with a slot, and until when it sleeps if nobody wakes it."""

    slot: object
    tokens: int
    began: int | None = None
    future: object = None
    until: float = math.inf


class LimiterMachine(RuleBasedStateMachine):
    """Random callers; see the module."""

    @initialize(
        max_concurrent=st.none() | st.integers(1, 4),
        max_queue=st.none() | st.integers(0, 4),
        rpm=st.none() | st.sampled_from([3, 7, 60, 240, 1000.5]),
        tpm=st.none() | st.sampled_from([60, 600, 12_345]),
        adaptive=st.booleans(),
    )
    def start(self, max_concurrent, max_queue, rpm, tpm, adaptive):
        self.clock = Clock(1234.5)
        self.policy = LimitPolicy(
            max_concurrent=max_concurrent,
            max_queue=max_queue,
            rpm=rpm,
            tpm=tpm,
            adaptive=adaptive,
        )
        self.limiter = Limiter(self.policy, clock=self.clock)
        self.requests, self.tokens = Bucket(rpm), Bucket(tpm)
        self.queue, self.offered, self.granted, self.gone = [], [], [], []
        first = 16 if adaptive else math.inf
        self.limit = first if max_concurrent is None else max_concurrent
        self.ceiling = 256 if max_concurrent is None else max_concurrent
        self.grants = self.last_cut = self.clean = 0

    # What the model does with everything that happens.

    def in_use(self):
        return len(self.offered) + len(self.granted)

    def lacks(self, caller):
        """Seconds until the head may go, or inf while there is no place."""
        if self.in_use() >= self.limit:
            return math.inf
        return max(self.requests.lacks(1), self.tokens.lacks(caller.tokens))

    def charge(self, requests, tokens, *, granted=False):
        for bucket, amount in ((self.requests, requests), (self.tokens, tokens)):
            bucket.take(amount, self.clock(), granted)
            bucket.check_windows()

    def place(self, caller, where):
        caller.began = self.grants
        self.grants += 1
        where.append(caller)
        self.charge(1, caller.tokens, granted=True)

    def advance(self):
        """Offer places from the head of the queue on, as long as it may go."""
        while self.queue and self.lacks(self.queue[0]) <= CLOSE / 2:
            caller = self.queue.pop(0)
            self.place(caller, self.offered)

    def learn(self, caller, throttled, slow, ok):
        if not self.policy.adaptive or caller.began < self.last_cut:
            return
        if throttled or slow:
            self.limit = max(1, int(self.limit * (0.5 if throttled else 0.8)))
            self.last_cut, self.clean = self.grants, 0
        elif ok:
            self.clean += 1
            if self.clean >= self.limit:
                self.limit, self.clean = min(self.limit + 1, self.ceiling), 0

    def sleep(self, caller):
        """Do as a caller does: look how long, and wait on the future for so long."""
        caller.future = caller.slot.future
        caller.until = self.clock() + caller.slot.wait_time()

    # What callers do.

    @rule(tokens=st.integers(0, 60) | st.just(5000))
    def enter(self, tokens):
        self.advance()
        full = len(self.queue) >= (math.inf if (q := self.policy.max_queue) is None else q)
        caller = Caller(None, tokens)
        at_once = not self.queue and self.lacks(caller) <= CLOSE / 2
        try:
            caller.slot = self.limiter.enter(tokens)
        except LimitExceededError as error:
            assert full
            assert not at_once
            lacks = self.lacks((self.queue or [caller])[0])
            told = math.inf if error.retry_after is None else error.retry_after
            assert told == lacks or abs(told - lacks) < CLOSE
            return
        assert caller.slot.granted == at_once
        if at_once:
            self.place(caller, self.granted)
        else:
            assert not full
            self.queue.append(caller)
            self.sleep(caller)

    @rule(which=WHICH)
    def look(self, which):
        """A waiter wakes, for whatever reason, and looks again."""
        waiting = self.queue + self.offered
        if not waiting:
            return
        caller = waiting[which % len(waiting)]
        self.advance()
        granted = caller.slot.poll()
        assert granted == (caller in self.offered)
        if granted:
            self.offered.remove(caller)
            self.granted.append(caller)
        else:
            self.sleep(caller)

    @rule()
    def wait_exactly(self):
        """The head waits as long as it is told to, and is granted."""
        if not self.queue:
            return
        head = self.queue[0]
        wait = head.slot.wait_time()
        assert wait == (lacks := self.lacks(head)) or abs(wait - lacks) < CLOSE
        if math.isfinite(wait):
            self.pass_time(wait)
            self.advance()
            assert head.slot.poll()
            self.offered.remove(head)
            self.granted.append(head)

    @rule(which=WHICH, sent=st.booleans())
    def give_up(self, which, sent):
        """A waiter is cancelled or out of time; it may not even know that it was offered."""
        waiting = self.queue + self.offered
        if not waiting:
            return
        caller = waiting[which % len(waiting)]
        if caller in self.offered:
            self.offered.remove(caller)
            self.charge(-1, -caller.tokens)
        else:
            self.queue.remove(caller)
        caller.slot.release(sent=sent)
        self.gone.append(caller)
        self.advance()

    @rule(
        which=WHICH,
        used=st.none() | st.integers(0, 200),
        sent=st.sampled_from([True, True, True, False]),
        ending=st.sampled_from(["ok", "ok", "ok", "failed", "slow", "throttled"]),
    )
    def finish(self, which, used, sent, ending):
        if not self.granted:
            return
        caller = self.granted[which % len(self.granted)]
        ok = ending in ("ok", "slow")
        signal = {"throttled": ending == "throttled", "slow": ending == "slow", "ok": ok}
        caller.slot.release(tokens=used, sent=sent, **signal)
        self.granted.remove(caller)
        self.gone.append(caller)
        if not sent:
            self.charge(-1, -caller.tokens)
        else:
            if used is not None:
                self.charge(0, used - caller.tokens)
            self.learn(caller, **signal)
        self.advance()

    @rule(which=WHICH)
    def leave_again(self, which):
        """A second leave changes nothing but that somebody has come by."""
        if self.gone:
            self.gone[which % len(self.gone)].slot.release(tokens=99, throttled=True)
            self.advance()

    @rule(seconds=st.sampled_from([0.001, 0.25, 1.0, 5.0, 17.3, 600.0]))
    def pass_time(self, seconds):
        before = self.clock()
        passed = self.clock.advance(seconds) - before
        self.requests.pass_time(passed)
        self.tokens.pass_time(passed)

    # What must always be true.

    @invariant()
    def numbers_agree(self):
        assert self.limiter.in_use == self.in_use()
        assert self.limiter.queued == len(self.queue)
        assert self.limiter.limit == (None if math.isinf(self.limit) else self.limit)

    @invariant()
    def everybody_knows_where_they_stand(self):
        assert all(caller.slot.granted for caller in self.granted)
        waiting = self.queue + self.offered + self.gone
        assert not any(caller.slot.granted for caller in waiting)

    @invariant()
    def nobody_sleeps_past_their_turn(self):
        """Whoever has a place is woken; the head wakes by itself when the rate lets it go."""
        assert all(caller.future.done() for caller in self.offered)
        if self.queue and not (head := self.queue[0]).future.done():
            turn = self.clock() + self.lacks(head)
            assert head.until <= turn + CLOSE

    def teardown(self):
        if not hasattr(self, "limiter"):
            return
        for caller in self.queue + self.offered + self.granted:
            caller.slot.release(ok=False)
        assert (self.limiter.in_use, self.limiter.queued) == (0, 0)
        self.clock.advance(1e9)
        limit = self.limiter.limit or 1000
        burst = 1000 if self.policy.rpm is None else max(1, int(self.requests.burst + CLOSE))
        slots = [self.limiter.enter() for _ in range(min(limit, burst))]
        assert all(slot.granted for slot in slots)


TestLimiterModel = LimiterMachine.TestCase
