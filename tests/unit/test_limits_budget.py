"""The retry budget ends retry storms."""

import threading

from dspy_resilient.limits import RetryBudget
from dspy_resilient.policies import RetryPolicy


def test_default_budget_pays_for_35_retries():
    """500 tokens at 14 a retry: the 36th retry in a row is not made."""
    budget = RetryBudget(RetryPolicy().budget)
    assert [budget.take() for _ in range(36)] == [True] * 35 + [False]
    assert budget.level == 500 - 35 * 14


def test_refused_retry_takes_nothing():
    """Asking in vain leaves the level as it is."""
    budget = RetryBudget(tokens=13)
    assert not budget.take()
    assert budget.level == 13


def test_clean_successes_buy_retries_back():
    """Fourteen clean successes pay for one retry."""
    budget = RetryBudget(tokens=14)
    assert budget.take()
    for _ in range(13):
        budget.refund()
        assert not budget.take()
    budget.refund()
    assert budget.take()


def test_a_retry_that_is_answered_costs_nothing():
    """What it took comes back with the answer: retries that help are never used up."""
    budget = RetryBudget(tokens=14)
    for _ in range(100):
        assert budget.take()
        budget.refund(retried=True)
    assert budget.level == 14


def test_successes_save_no_more_than_the_budget():
    """A long good time buys no storm: the level never exceeds the budget."""
    budget = RetryBudget(tokens=20, retry_cost=14, refund=9)
    for _ in range(100):
        budget.refund()
    assert budget.level == 20
    assert budget.take()
    budget.refund()
    budget.refund()
    assert budget.level == 20


def test_zero_budget_means_no_retries():
    """Zero means itself, before and after successes."""
    budget = RetryBudget(tokens=0)
    budget.refund()
    assert not budget.take()
    assert budget.level == 0


def test_threads_never_overdraw_the_budget():
    """Many threads at once get exactly the retries that there are tokens for."""
    budget = RetryBudget(tokens=50 * 14)
    start = threading.Barrier(16)
    paid = []

    def storm():
        start.wait()
        paid.extend(budget.take() for _ in range(20))

    threads = [threading.Thread(target=storm) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(paid) == 50
    assert budget.level == 0
