"""Single-flight against a naive model: for each key a list of who sends and a list of who waits.

Callers join, send, land, fail, give up, leave and take over in any order while time passes. The
model decides slowly and obviously; the flights must agree after every step.
"""

import itertools
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspy_resilient.cache import Answer, Failed, Flights, Landed, Lead, Waiter
from dspy_resilient.testing.clock import Clock

MAX_AGE = 10.0
WHICH = st.integers(0, 30)  # one of those there are


@dataclass(eq=False)
class Sender:
    """Somebody who has to send."""

    lead: Lead
    shared: "Shared"
    sent_at: float | None = None
    landed: object = None


@dataclass(eq=False)
class Follower:
    """Somebody who waits, and what must have come of it."""

    waiter: Waiter
    shared: "Shared"
    news: object = None  # None, an answer, an error, or a Sender


@dataclass(eq=False)
class Shared:
    """What the callers of one key share."""

    key: str
    senders: list = field(default_factory=list)
    followers: list = field(default_factory=list)
    landed: object = None

    def worth_waiting(self, now):
        return any(s.sent_at is None or now - s.sent_at < MAX_AGE for s in self.senders)


class FlightModel(RuleBasedStateMachine):
    """Drives flights and model side by side."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.flights = Flights(clock=self.clock, max_age=MAX_AGE)
        self.by_key = {}
        self.senders, self.followers, self.finished = [], [], []
        self.numbers = itertools.count()

    @rule(key=st.sampled_from("ab"))
    def join(self, key):
        place = self.flights.join(key)
        shared = self.by_key.setdefault(key, Shared(key))
        if shared.worth_waiting(self.clock()):
            assert isinstance(place, Waiter)
            follower = Follower(place, shared)
            shared.followers.append(follower)
            self.followers.append(follower)
        else:
            assert isinstance(place, Lead)
            self.start_sender(place, shared)

    def start_sender(self, lead, shared):
        sender = Sender(lead, shared)
        shared.senders.append(sender)
        self.senders.append(sender)
        return sender

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 10.0, 30.0]))
    def pass_time(self, seconds):
        self.clock.advance(seconds)

    def pick(self, which, people):
        return people[which % len(people)]

    @precondition(lambda self: self.senders)
    @rule(which=WHICH)
    def send(self, which):
        sender = self.pick(which, self.senders)
        sender.lead.sent()
        sender.sent_at = self.clock()

    @precondition(lambda self: self.senders)
    @rule(which=WHICH)
    def land(self, which):
        sender = self.pick(which, self.senders)
        answer = Answer.of([str(next(self.numbers))], None)
        sender.lead.land(answer)
        self.finish(sender)
        shared = sender.shared
        if sender in shared.senders:
            shared.landed = answer
            self.end(shared, answer)

    @precondition(lambda self: self.senders)
    @rule(which=WHICH)
    def fail(self, which):
        sender = self.pick(which, self.senders)
        error = RuntimeError(str(next(self.numbers)))
        sender.lead.fail(error)
        self.finish(sender)
        shared = sender.shared
        if sender in shared.senders:
            shared.senders.remove(sender)
            if not shared.senders:
                self.end(shared, error)

    @precondition(lambda self: self.senders)
    @rule(which=WHICH)
    def abandon(self, which):
        sender = self.pick(which, self.senders)
        sender.lead.abandon()
        self.finish(sender)
        self.give_up(sender)

    @precondition(lambda self: self.finished)
    @rule(which=WHICH, end=st.sampled_from(["land", "fail", "abandon"]))
    def end_again(self, which, end):
        """Whoever has ended says so again: nothing may change."""
        lead = self.pick(which, self.finished).lead
        {
            "land": lambda: lead.land(Answer.of(["too late"], None)),
            "fail": lambda: lead.fail(RuntimeError("too late")),
            "abandon": lead.abandon,
        }[end]()

    @precondition(lambda self: self.followers)
    @rule(which=WHICH)
    def leave(self, which):
        follower = self.pick(which, self.followers)
        follower.waiter.leave()
        self.followers.remove(follower)
        if follower in follower.shared.followers:
            follower.shared.followers.remove(follower)
        if isinstance(follower.news, Sender):
            self.give_up(follower.news)

    @precondition(lambda self: any(isinstance(f.news, Sender) for f in self.followers))
    @rule(which=WHICH)
    def take_over(self, which):
        heirs = [f for f in self.followers if isinstance(f.news, Sender)]
        follower = self.pick(which, heirs)
        self.followers.remove(follower)
        self.senders.append(follower.news)

    def finish(self, sender):
        self.senders.remove(sender)
        self.finished.append(sender)

    def give_up(self, sender):
        shared = sender.shared
        if sender not in shared.senders:
            return
        shared.senders.remove(sender)
        if shared.worth_waiting(self.clock()):
            return
        if shared.followers:
            heir = shared.followers.pop(0)
            assert heir.waiter.future.done()
            heir.news = Sender(heir.waiter.future.result(), shared)
            shared.senders.append(heir.news)
        elif not shared.senders:
            self.end(shared, None)

    def end(self, shared, news):
        for follower in shared.followers:
            follower.news = news
        shared.followers.clear()
        shared.senders.clear()
        del self.by_key[shared.key]

    @invariant()
    def flights_agree(self):
        assert len(self.flights) == len(self.by_key)
        for sender in self.senders:
            assert sender.lead.flight.answer is sender.shared.landed
        for follower in self.followers:
            future = follower.waiter.future
            assert future.done() == (follower.news is not None)
            if future.done():
                self.check_news(future.result(), follower.news)

    def check_news(self, got, expected):
        if isinstance(expected, Sender):
            assert got is expected.lead
        elif isinstance(expected, Answer):
            assert isinstance(got, Landed)
            assert got.answer is expected
        else:
            assert isinstance(got, Failed)
            assert got.error is not expected
            assert got.error.__cause__ is expected

    @invariant()
    def nobody_waits_for_nobody(self):
        for shared in self.by_key.values():
            assert shared.senders


TestFlights = FlightModel.TestCase
