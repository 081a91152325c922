"""Three processes that spend from one budget, with every order of their trips to the store."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspy_resilient.budgets import Amount, Hold, unlimited_but
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.ledger import SharedLedger

LIMIT = 100  # whole numbers: the model adds up without rounding
PLACES = 3
places = st.integers(0, PLACES - 1)
amounts = st.integers(1, 40)


class Fleet(RuleBasedStateMachine):
    """The truth is a list of what was really spent; the store and each process only hear of it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)
        courier = SimpleNamespace(
            clock=lambda: self.now,
            send=lambda link: None,
            watch=lambda link: None,
            contact=SimpleNamespace(note=lambda link, error: None),
        )
        self.ledgers = [SharedLedger(courier, "{k}", unlimited_but(LIMIT)) for _ in range(PLACES)]
        self.trips = [None] * PLACES
        self.replies = [None] * PLACES
        self.holds = []
        self.spent = 0
        self.beyond = 0
        self.faults = 0

    @rule(place=places, amount=amounts)
    def reserve(self, place, amount):
        ledger = self.ledgers[place]
        found = ledger.reserve(Amount(amount, 0, 1))
        self.faults += ledger.alone  # the store has taken too long
        if isinstance(found, Hold):
            self.holds.append(found)
        elif found is None:
            assert ledger.spent.dollars + amount > LIMIT
        else:
            assert isinstance(found, Future)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), real=amounts)
    def settle(self, data, real):
        hold = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        hold.settle(Amount(real, 0, 1))
        self.spent += real
        self.beyond += max(0, real - hold.amount.dollars)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data):
        self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1))).release()

    @rule(place=places)
    def look_round(self, place):
        ledger = self.ledgers[place]
        if ledger.wants_news() and ledger.is_old:
            ledger.ask()

    @rule(place=places)
    def set_out(self, place):
        if self.trips[place] is None:
            self.trips[place] = self.ledgers[place].set_out()

    @rule(place=places)
    def reach_the_store(self, place):
        if self.trips[place] is not None and self.replies[place] is None:
            (self.replies[place],) = self.store.together([self.trips[place].verb])

    @rule(place=places)
    def come_back(self, place):
        if self.replies[place] is not None:
            self.ledgers[place].come_back(self.trips[place], self.replies[place])
            self.trips[place] = self.replies[place] = None

    @rule(place=places)
    def lose_the_way(self, place):
        """Whether the store has heard it or not."""
        if self.trips[place] is not None:
            self.faults += 1
            self.ledgers[place].come_back(self.trips[place], ConnectionError())
            self.trips[place] = self.replies[place] = None

    @rule(place=places)
    def lose_patience(self, place):
        if self.trips[place] is not None:
            self.faults += 1
            self.ledgers[place].go_alone()

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @invariant()
    def keeps_within_the_limit_together(self):
        if not self.faults:
            reserved = sum(hold.amount.dollars for hold in self.holds)
            assert self.spent + reserved <= LIMIT + self.beyond

    @invariant()
    def nobody_thinks_less_is_spent_than_it_spent_itself(self):
        assert sum(ledger._mine.dollars for ledger in self.ledgers) == self.spent

    @invariant()
    def whoever_waits_will_hear(self):
        for ledger in self.ledgers:
            waits = any(not future.done() for future in ledger._waiting)
            assert not waits or ledger.alone or ledger.wants_news()

    def teardown(self):
        """Once the store is there again, everybody knows what was spent, and nothing is held."""
        for hold in self.holds:
            hold.release()
        for _ in range(4):
            self.now += 10.0
            for place, ledger in enumerate(self.ledgers):
                if self.trips[place] is not None:
                    self.reach_the_store(place)
                    self.come_back(place)
                ledger.ask()
                trip = ledger.set_out()
                ledger.come_back(trip, *self.store.together([trip.verb]))
        assert [ledger.spent.dollars for ledger in self.ledgers] == [self.spent] * PLACES
        assert not any(ledger.alone for ledger in self.ledgers)
        most = self.ledgers[0].reserve(Amount(max(0, LIMIT - self.spent), 0, 1), at_once=True)
        if self.spent < LIMIT:
            assert isinstance(most, Hold)


TestFleet = Fleet.TestCase
