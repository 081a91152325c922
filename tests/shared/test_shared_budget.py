"""Clients in several places, and one retry budget between them."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from types import SimpleNamespace

import dspy
import pytest

from dspy_resilient import ResilientLM, RetryPolicy
from dspy_resilient.limits import RetryBudget
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.budget import SharedBudget
from dspy_resilient.shared.link import carry
from dspy_resilient.shared.store import BudgetReport
from dspy_resilient.testing import Status

PROCESSES = int(os.environ.get("FLEET_PROCESSES", "8"))
CALLS = 12
TWO_RETRIES = RetryPolicy(max_attempts=2, base=0, budget=28)
ONCE = {"cache": False, "name": "fast", "circuit": False, "api_key": "dummy-key-for-tests"}
forked = multiprocessing.get_context("fork")


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def budget_of(lm):
    return lm._runtime.routes.find(lm, {}).budget


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


def fail(ask, lm, times):
    for _ in range(times):
        with pytest.raises(dspy.LMServerError):
            ask(lm, "q")


def test_clients_spend_one_budget(provider, make, shared, patient, ask):
    """What here has been spent on retries, there is not any more."""
    here, there = (make(shared=shared, retry=TWO_RETRIES, **ONCE) for _ in range(2))
    provider.always(Status(500))
    fail(ask, here, 2)
    assert provider.count == 4
    until(lambda: budget_of(here)._net == 0 and budget_of(here)._under_way is None)
    fail(ask, there, 2)
    assert provider.count == 6


def test_successes_pay_for_retries_elsewhere(provider, make, shared, patient, ask):
    """Fourteen clean answers here, and there is a retry again there."""
    here, there = (make(shared=shared, retry=TWO_RETRIES, **ONCE) for _ in range(2))
    provider.always(Status(500))
    fail(ask, here, 2)
    provider.always(None)
    for _ in range(14):
        assert ask(here, "q") == ["Paris"]
    until(lambda: _told(here))
    provider.always(Status(500))
    count = provider.count
    fail(ask, there, 2)
    assert provider.count == count + 3


def _told(lm):
    budget = budget_of(lm)
    budget.ask()
    time.sleep(0.02)
    return budget._net == 0 and budget.level == 14


def test_without_the_store_the_budget_is_this_process_s(provider, make, mortal, ask):
    """It is spent as ever, and the store is told when it is back."""
    server = mortal()
    here = make(shared=server.url, retry=TWO_RETRIES, **ONCE)
    assert ask(here, "q") == ["Paris"]
    server.kill()
    provider.always(Status(500))
    fail(ask, here, 3)
    assert provider.count == 1 + 3 + 2
    server.start()
    until(lambda: _asks(ask, here))
    there = make(shared=server.url, retry=TWO_RETRIES, **ONCE)
    count = provider.count
    fail(ask, there, 1)
    assert provider.count == count + 1


def _asks(ask, lm):
    fail(ask, lm, 1)
    return not budget_of(lm).alone and budget_of(lm)._net == 0


def work(api_base, url, start):
    lm = ResilientLM("openai/test", shared=url, api_base=api_base, num_retries=3,
                     **ONCE)  # fmt: skip
    lm._runtime.random = lambda: 0.0  # no pause before a retry
    start.wait()
    for _ in range(CALLS):
        try:
            lm("q")
        except dspy.LMError:
            pass
    os._exit(0)


def test_an_outage_costs_the_retries_of_one_budget(provider, valkey):
    """However many processes: 35 retries, and those decided on before hearing of them.

    Budgets of their own would pay for 35 retries in each.
    """
    provider.always(Status(500))
    start = forked.Event()
    workers = [
        forked.Process(target=work, args=(provider.api_base, valkey.url, start))
        for _ in range(PROCESSES)
    ]
    for each in workers:
        each.start()
    start.set()
    for each in workers:
        each.join(60)
        assert each.exitcode == 0
    retries = provider.count - CALLS * PROCESSES
    assert 35 <= retries <= 35 + 3 * PROCESSES


@pytest.mark.parametrize("rubbish", [b"", b"\xff", b"nan", b"-1", b"1e300", b"0.5", b"0x1F"])
def test_rubbish_under_our_key_is_replaced(store, valkey, rubbish):
    """A hostile value runs nothing; what the client believes counts."""
    client = valkey.client()
    client.set("{k}", rubbish)
    spent = store.budget("{k}", BudgetReport(net=14, least=14, most=500, believed=28)).spent
    assert spent in (42, 31 + 14)  # a number is a number, however it is written
    client.close()


def test_the_script_decides_as_the_store_in_memory_does(store):
    """Several clients at once: each answer is the model's, asked in the server's order."""
    log, seed = [], random.randrange(2**32)
    print("seed", seed)

    def say(number):
        pick = random.Random(seed + number)
        for _ in range(100):
            least = pick.choice([0, 0, 14, 28])
            report = BudgetReport(
                net=least - pick.choice([0, 1, 14]), least=least, most=pick.choice([50, 100]),
                believed=pick.randrange(100),
            )  # fmt: skip
            view = store.budget("{k}", report)
            log.append((view.at, report, view))

    threads = [threading.Thread(target=say, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.sort(key=lambda entry: entry[0])
    assert len({at for at, *_ in log}) == len(log) == 400
    model = MemoryStore(clock=lambda: 0.0)
    for _, report, view in log:
        assert model.budget("{k}", report).spent == view.spent


class Errands:
    """A courier that goes when the test says so, and may find the store away."""

    def __init__(self, store):
        self.store = store
        self.now = 0.0
        self.links = []
        self.contact = SimpleNamespace(note=lambda *_: None)

    def clock(self):
        self.now += 1.0
        return self.now

    def send(self, link):
        self.links.append(link)

    def go(self, store=None):
        links, self.links = self.links, []
        for link in links:
            carry(store or self.store, [link])


class Away:
    def together(self, _):
        raise ConnectionError


@pytest.mark.parametrize("seed", range(20))
def test_several_budgets_are_one_if_everybody_hears_at_once(seed):
    """Random takes and refunds in three places: all levels are those of one plain budget."""
    pick, store = random.Random(seed), MemoryStore()
    model, courier = RetryBudget(60), Errands(store)
    budgets = [SharedBudget(courier, "k", 60) for _ in range(3)]
    for _ in range(300):
        here = pick.choice(budgets)
        if pick.random() < 0.5:
            assert here.take() is model.take()
        else:
            retried = pick.random() < 0.3
            here.refund(retried=retried), model.refund(retried=retried)
        here.ask()
        courier.go()
        for each in budgets:
            each.ask()
        courier.go()
        assert {each.level for each in budgets} == {model.level}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_done_between_two_reports_counts_as_done_in_that_order(seed):
    """However late one client reports, and however often in vain: its level is a plain budget's."""
    pick, store = random.Random(seed), MemoryStore()
    model, courier = RetryBudget(60), Errands(store)
    here = SharedBudget(courier, "k", 60)
    for _ in range(300):
        if pick.random() < 0.4:
            assert here.take() is model.take()
        else:
            retried = pick.random() < 0.3
            here.refund(retried=retried), model.refund(retried=retried)
        if pick.random() < 0.3:
            courier.go(pick.choice([None, None, Away()]))
        assert here.level == model.level
    here.ask()
    courier.go()
    assert store.budget("k", BudgetReport(most=60)).spent == 60 - model.level


def test_a_budget_of_none_leaves_that_of_others_alone():
    """Clients of one name may have different policies; 0 means no retries here."""
    courier = Errands(MemoryStore())
    here, there = SharedBudget(courier, "k", 0), SharedBudget(courier, "k", 28)
    assert there.take()
    assert not here.take()
    courier.go()
    assert not here.take()
    assert (here.level, there.level) == (0, 14)
