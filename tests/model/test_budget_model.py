"""The books of a budget beside a naive model, and sixteen threads at any interleaving."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from dspy_resilient.budgets import Amount, Hold, Ledger, Meter, unlimited_but
from dspy_resilient.providers.prices import Price
from dspy_resilient.stats import Spending

LIMIT = 100  # whole numbers: the model adds up without rounding
amounts = st.integers(0, 40)


class Books(RuleBasedStateMachine):
    """What is reserved and spent is a list of numbers; whoever waits is woken by every change."""

    open_holds = Bundle("open_holds")
    settled = Bundle("settled")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.ledger = Ledger(unlimited_but(LIMIT), seconds=1000.0, clock=lambda: self.now)
        self.reserved = []
        self.spent = []
        self.beyond = 0  # what was billed beyond its reservation
        self.waiting = []

    @rule(target=open_holds, amount=amounts)
    def reserve(self, amount):
        found = self.ledger.reserve(Amount(amount, 3 * amount, 1))
        spent, reserved = sum(self.spent), sum(self.reserved)
        if spent + amount > LIMIT:
            assert found is None
        elif spent + reserved + amount > LIMIT:
            assert isinstance(found, Future)
            assert not found.done()
            self.waiting.append(found)
        else:
            assert isinstance(found, Hold)
            self.reserved.append(amount)
            return found
        return multiple()

    @rule(target=settled, hold=consumes(open_holds), real=amounts)
    def settle(self, hold, real):
        hold.settle(Amount(real, 3 * real, 1))
        self.reserved.remove(hold.amount.dollars)
        self.spent.append(real)
        self.beyond += max(0, real - hold.amount.dollars)
        self._all_woken()
        return hold, real

    @rule(hold=consumes(open_holds))
    def release(self, hold):
        hold.release()
        hold.release()
        self.reserved.remove(hold.amount.dollars)
        self._all_woken()

    @rule(pair=consumes(settled), target=settled, real=amounts)
    def correct(self, pair, real):
        hold, before = pair
        hold.settle(Amount(real, 3 * real, 1))
        hold.release()  # too late: it was sent
        if before in self.spent:
            self.spent.remove(before)
            self.spent.append(real)
        else:  # another period's: only the difference is this one's
            self.spent.append(real - before)
        self.beyond += max(0, real - before)
        self._all_woken()
        return hold, real

    @rule(seconds=st.sampled_from([100.0, 1000.0]))
    def pass_time(self, seconds):
        period = self.now // 1000
        self.now += seconds
        if self.now // 1000 != period:
            self.spent = []

    def _all_woken(self):
        assert all(future.done() for future in self.waiting)
        self.waiting = []

    @invariant()
    def adds_up(self):
        assert self.ledger.spent.dollars == sum(self.spent)
        assert self.ledger.reserved.dollars == sum(self.reserved)
        assert self.ledger.reserved.requests == len(self.reserved)

    @invariant()
    def exceeds_by_what_was_billed_beyond(self):
        assert sum(self.spent) <= LIMIT + self.beyond

    @invariant()
    def waits_only_for_what_is_under_way(self):
        assert self.reserved or not self.waiting


TestBooks = Books.TestCase


PRICE = Price(0.0001, 0.0001, 0.0001)
MOST = 250  # tokens of an answer: 0.025 dollars at most, with the prompt


@settings(max_examples=200)
@given(st.integers(1, 16), st.integers(20, MOST - 30), st.integers())
def test_threads_use_a_budget_up_and_hardly_more(threads, mean, seed):
    """At every interleaving: at most a call per thread beyond it, and at least 97 % of it."""
    ledger, meter = Ledger(unlimited_but(1.0)), Meter()
    under_way, waiting, over = {}, {}, set()
    random = Random(seed)
    biggest = 0.0
    while len(over) < threads:
        thread = random.choice([each for each in range(threads) if each not in over])
        if thread in under_way:
            hold, answer = under_way.pop(thread)
            spent = Spending(
                requests=1,
                prompt_tokens=4,
                completion_tokens=answer,
                known_dollars=(4 + answer) * 0.0001,
            )
            meter.learn(4, spent, PRICE)
            hold.settle(Amount(spent.known_dollars, spent.tokens, 1))
            biggest = max(biggest, spent.known_dollars)
            continue
        if thread in waiting:
            if not waiting[thread].done():
                assert under_way  # it waits for those, and they will settle
                continue
            del waiting[thread]
        found = ledger.reserve(meter.estimate(4, None, PRICE))
        if isinstance(found, Hold):
            under_way[thread] = found, random.randint(mean - 19, mean + 30)
        elif found is None:
            over.add(thread)
        else:
            waiting[thread] = found
    assert ledger.reserved == pytest.approx((0, 0, 0))
    assert 0.97 <= ledger.spent.dollars <= 1.0 + threads * biggest
