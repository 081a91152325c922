"""Processes that spend from one budget."""

from __future__ import annotations

import contextvars
import multiprocessing
import random
import time
from concurrent.futures import ThreadPoolExecutor

import litellm
import pytest

from dspy_resilient import BudgetExceededError, LimitPolicy, ResilientLM
from dspy_resilient.budgets import Amount
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.store import SpendReport
from dspy_resilient.testing import Hold

MODEL = "openai/priced"
CENT = 0.01
forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _prices():
    """A model of which a request costs a cent: one word in, one word out."""
    price = {"input_cost_per_token": CENT / 2, "output_cost_per_token": CENT / 2}
    litellm.register_model({MODEL: {**price, "litellm_provider": "openai", "mode": "chat"}})
    yield
    litellm.model_cost.pop(MODEL, None)


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def build(make, shared, **options):
    return make(MODEL, shared=shared, cache=False, max_tokens=1, **options)


def test_clients_of_one_name_have_one_budget(make, shared, patient, ask, provider):
    """What one spends the other has not; clients of another name have their own."""
    limits = LimitPolicy(max_dollars=3 * CENT, per="day")
    here, there = (build(make, shared, name="one", limits=limits) for _ in range(2))
    ask(here, "a"), ask(there, "b"), ask(here, "c")
    for lm in (here, there):
        with pytest.raises(BudgetExceededError) as caught:
            ask(lm, "d")
        assert caught.value.spent == pytest.approx(3 * CENT)
    ask(build(make, shared, name="other", limits=limits), "a")
    assert provider.count == 4


def test_blocks_of_one_name_are_one_budget(make, shared, patient, ask):
    """Whatever the clients are called; what is reserved in one place is not there in another."""
    here, there = (build(make, shared, name=name) for name in ("one", "two"))
    with here.budget(requests=2, name="run 7"):
        ask(here, "a")
    with there.budget(requests=2, name="run 7") as budget:
        ask(there, "b")
        with pytest.raises(BudgetExceededError):
            ask(there, "c")
    assert budget.spent.requests == 2
    with here.budget(requests=2, name="run 8"):
        ask(here, "d")


def test_a_call_waits_for_requests_under_way_elsewhere(make, shared, patient, provider):
    """It is refused only once nothing can be left over."""
    here, there = (build(make, shared, name=name) for name in ("one", "two"))
    hold = Hold()
    provider.script(hold)

    def call(lm, **limits):
        with lm.budget(**limits, name="r"):
            return lm("a")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, here, dollars=1.5 * CENT)
        provider.wait_for(1)
        second = pool.submit(call, there, dollars=1.5 * CENT)
        with pytest.raises(TimeoutError):
            second.result(0.6)
        assert provider.count == 1
        hold.release()
        assert first.result(10) == ["Paris"]
        with pytest.raises(BudgetExceededError):
            second.result(10)


def spend(api_base, url, limit, number, spent):
    """Spend from four threads of this process until nothing fits any more."""

    def calls(thread):
        for each in range(1000):
            try:
                lm(f"{number}-{thread}-{each}")
            except BudgetExceededError:
                return

    lm = ResilientLM(
        MODEL, api_base=api_base, api_key="k", shared=url, cache=False, max_tokens=1, name="fleet"
    )
    with lm.budget(dollars=limit, name="together"), ThreadPoolExecutor(4) as pool:
        for thread in range(4):
            pool.submit(contextvars.copy_context().run, calls, thread)
    spent.put(lm.stats().spent.known_dollars)


@pytest.mark.timeout(120)
def test_two_processes_use_one_budget_up(provider, valkey):
    """Together no more than a call per thread beyond it, and hardly less than all of it."""
    spent = forked.Queue()
    processes = [
        forked.Process(target=spend, args=(provider.api_base, valkey.url, 1.0, number, spent))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    amounts = [spent.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert sum(amounts) == pytest.approx(provider.count * CENT)
    assert 0.97 <= sum(amounts) <= 1.0 + 8 * CENT
    assert all(amount > 0 for amount in amounts)


def test_without_the_store_a_process_goes_on_with_what_it_knows(make, mortal, ask):
    """No call fails for the store, and the budget still ends."""
    server = mortal()
    lm = build(make, server.url, name="one")
    with lm.budget(requests=3, name="r") as budget:
        ask(lm, "a")
        until(lambda: budget.ledger._told.requests == 1)
        server.kill()
        ask(lm, "b"), ask(lm, "c")
        with pytest.raises(BudgetExceededError):
            ask(lm, "d")
    assert budget.spent.requests == 3


def report(member, spent=0, held=0, wants=(), **rest):
    facts = {"limit": Amount(10, float("inf"), float("inf")), "lease": 60.0, "kept": 100.0} | rest
    return SpendReport(
        member=member,
        spent=Amount(spent),
        held=Amount(held),
        wants=tuple(Amount(each) for each in wants),
        **facts,
    )


def test_a_report_that_is_heard_twice_counts_once(store):
    """An answer may be lost on the way; what a member has spent in all is said each time."""
    for _ in range(2):
        view = store.spend("{k}", report("one", spent=4, held=1))
    assert (view.spent.dollars, view.reserved.dollars) == (4, 1)
    view = store.spend("{k}", report("two", spent=2, wants=(3, 3, 1)))
    assert (view.spent.dollars, view.reserved.dollars) == (6, 4)
    assert view.granted.dollars == 3
    assert store.spend("{k}", report("one", spent=5, wants=(1,))).granted.dollars == 0


def test_what_a_lost_process_holds_counts_as_spent():
    """Its requests were sent, and nobody else will say what they cost."""
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    store.spend("{k}", report("lost", held=4))
    now = 61.0
    view = store.spend("{k}", report("here"))
    assert (view.spent.dollars, view.reserved.dollars) == (4, 0)
    view = store.spend("{k}", report("lost", spent=1))  # it was not lost after all
    assert (view.spent.dollars, view.reserved.dollars) == (1, 0)


def test_the_script_keeps_the_books_as_the_memory_does(store):
    """Whatever members say, in whatever order."""
    seed = random.randrange(2**32)
    print("seed", seed)
    pick, now = random.Random(seed), 0.0
    model = MemoryStore(clock=lambda: now)
    for _ in range(300):
        said = report(
            f"m{pick.randrange(5)}",
            spent=pick.randrange(5) / 3,
            held=pick.randrange(5) / 3,
            wants=[pick.randrange(4) / 3 for _ in range(pick.randrange(3))],
            lease=pick.choice([-1.0, 60.0]),
        )
        view = store.spend("{k}", said)
        now = view.at
        other = model.spend("{k}", said)
        for mine, theirs in ((view.spent, other.spent), (view.reserved, other.reserved)):
            assert mine == pytest.approx(theirs)
        assert view.granted == pytest.approx(other.granted)


def test_nonsense_under_the_key_is_no_books(store, valkey):
    """The budget begins anew."""
    valkey.client().set("{k}", b"\x93nonsense")
    assert store.spend("{k}", report("one", spent=1)).spent.dollars == 1
    valkey.client().delete("{k}")


def test_a_name_needs_a_store(make):
    """Without one nothing could be shared, and that is said at once."""
    with pytest.raises(ValueError, match="name needs a client with shared="):
        make().budget(requests=1, name="run")
