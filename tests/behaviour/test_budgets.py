"""What calls may spend together, and what happens to the one that does not fit."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dspy
import litellm
import pytest

from dspy_resilient import (
    Budget,
    BudgetExceededError,
    CallRejectedError,
    LimitPolicy,
    RetryPolicy,
)
from dspy_resilient.testing import Hang, Hold, Status, dspy_answers

MODEL = "openai/priced"
CENT = 0.01
DEMO = "question -> answer"


@pytest.fixture(autouse=True)
def _prices():
    """A model of which a request costs a cent: one word in, one word out."""
    litellm.register_model(
        {
            MODEL: {
                "input_cost_per_token": CENT / 2,
                "output_cost_per_token": CENT / 2,
                "litellm_provider": "openai",
                "mode": "chat",
            }
        }
    )
    yield
    litellm.model_cost.pop(MODEL, None)


@pytest.fixture
def priced(make):
    """Make clients of that model; an answer has at most one word."""
    options = {"max_tokens": 1, "retry": RetryPolicy(base=0.0)}
    return lambda **own: make(MODEL, **{**options, **own})


def test_a_call_that_does_not_fit_is_refused(priced, provider, ask):
    """Nothing is sent, the error says how things stand, and answers from the cache go on."""
    lm = priced()
    with lm.budget(dollars=3 * CENT) as budget:
        for prompt in ("a", "b", "c"):
            ask(lm, prompt)
        for prompt in ("d", "e"):
            with pytest.raises(BudgetExceededError) as caught:
                ask(lm, prompt)
        assert ask(lm, "a") == ["Paris"]
    error = caught.value
    assert isinstance(error, CallRejectedError)
    assert (error.unit, error.limit, error.reserved) == ("dollars", 3 * CENT, 0.0)
    assert error.spent == pytest.approx(3 * CENT)
    assert provider.count == 3
    assert budget.spent == (pytest.approx(3 * CENT), 6, 3)
    assert budget.left.dollars == pytest.approx(0.0)
    assert lm.stats().refused == {"budget_exceeded": 2}
    assert ask(lm, "d") == ["Paris"]  # the block is over


def test_tokens_and_requests_are_bounded_too(priced, provider, ask):
    """Whatever is used up first; a request counts that failed."""
    lm = priced()
    with lm.budget(tokens=4):
        ask(lm, "a"), ask(lm, "b")
        with pytest.raises(BudgetExceededError, match="tokens"):
            ask(lm, "c")
    assert provider.count == 2
    provider.script(Status(500))
    with lm.budget(requests=2):
        ask(lm, "d")
        with pytest.raises(BudgetExceededError, match="requests"):
            ask(lm, "e")
    assert provider.count == 4


def test_blocks_inside_blocks_count_for_each(priced, ask):
    """The inner one ends first, and what it has spent the outer one has spent."""
    lm = priced()
    with lm.budget(requests=3) as outer:
        with lm.budget(requests=2) as inner:
            ask(lm, "a"), ask(lm, "b")
            with pytest.raises(BudgetExceededError):
                ask(lm, "c")
        ask(lm, "c")
        with pytest.raises(BudgetExceededError):
            ask(lm, "d")
    assert (inner.spent.requests, outer.spent.requests) == (2, 3)


def test_copies_and_fallbacks_spend_from_the_same_budget(priced, provider, ask):
    """A rollout is the same client, and a fallback answers for it; another client does not count."""
    lm, other = priced(fallbacks=["openai/gpt-4o"], max_wait=0), priced()
    provider.script(Status(401), None, None)
    with lm.budget(requests=4) as budget:
        ask(lm, "a")
        ask(copy.deepcopy(lm), "b", cache=False)
        ask(lm.copy(rollout_id=1, temperature=1.0), "a")
        ask(other, "x")
        with pytest.raises(BudgetExceededError):
            ask(lm, "c")
    assert budget.spent.requests == 4


def test_a_budget_may_cover_several_clients(priced, ask):
    """Those it names, or all."""
    one, two, three = priced(), priced(), priced()
    with Budget(one, two, requests=2), Budget(requests=3) as everything:
        ask(one, "a"), ask(two, "a"), ask(three, "a")
        with pytest.raises(BudgetExceededError):
            ask(one, "b")
    assert everything.spent.requests == 3


def test_a_model_without_a_price_is_refused(make, provider, ask):
    """Dollars cannot be bounded where the price is unknown; tokens can."""
    lm = make("openai/of-my-own", max_tokens=1)
    with lm.budget(dollars=1.0), pytest.raises(BudgetExceededError, match="price"):
        ask(lm, "a")
    assert provider.count == 0
    with lm.budget(tokens=2):
        ask(lm, "a")
        with pytest.raises(BudgetExceededError):
            ask(lm, "b")


def test_what_may_be_billed_counts_as_estimated(priced, provider, ask):
    """A request that hangs is paid for, one that is refused is not."""
    lm = priced(timeout=0.3, retry=RetryPolicy(max_attempts=1), max_wait=0)
    provider.script(Hang(), Status(500))
    with lm.budget(dollars=1.0) as budget:
        for prompt in ("words words", "other words"):
            with pytest.raises(dspy.LMError):
                ask(lm, prompt)
    assert 0 < budget.spent.dollars <= 2 * CENT
    assert budget.spent.requests == 2
    assert budget.reserved == (0, 0, 0)


def test_a_cancelled_call_leaves_no_reservation(priced, provider):
    """Neither one that waits nor one that is under way."""
    lm = priced()
    provider.script(Hang())

    async def cancel_both():
        with lm.budget(dollars=1.5 * CENT) as budget:
            sent = asyncio.create_task(lm.acall("a"))
            await asyncio.to_thread(provider.wait_for, 1)
            waits = asyncio.create_task(lm.acall("b"))
            await asyncio.to_thread(await_one, budget.ledger)
            for task in (waits, sent):
                task.cancel()
            await asyncio.gather(sent, waits, return_exceptions=True)
        return budget

    assert asyncio.run(cancel_both()).reserved == (0, 0, 0)


def test_a_call_waits_for_those_under_way(priced, provider, ask):
    """What they have reserved may yet be left over: it is refused only if it cannot fit."""
    lm = priced(max_tokens=100)
    hold = Hold()
    provider.script(hold)
    with lm.budget(dollars=2 * CENT), ThreadPoolExecutor(2) as pool:
        first = pool.submit(contextvars.copy_context().run, ask, lm, "a", max_tokens=2)
        provider.wait_for(1)
        second = pool.submit(contextvars.copy_context().run, ask, lm, "b", max_tokens=2)
        hold.release()
        assert first.result(10) == second.result(10) == ["Paris"]


def await_one(ledger):
    """Return once a call waits for those under way to settle."""
    until = time.monotonic() + 10
    while not ledger._waiting:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("threads", [1, 4])
def test_dspy_parallel_is_bounded(priced, provider, threads):
    """Its workers stand inside the block, and it ends with the budget: it would swallow an error."""
    lm = priced(max_tokens=None)
    provider.answer = dspy_answers()
    qa = dspy.Predict(DEMO)
    pairs = [(qa, {"question": f"q{i}"}) for i in range(12)]
    with dspy.context(lm=lm):
        if threads == 1:
            with pytest.raises(Exception, match="cancelled"), lm.budget(requests=2):
                dspy.Parallel(num_threads=1, max_errors=1)(pairs)
        else:
            with pytest.raises(BudgetExceededError), lm.budget(requests=2):
                dspy.Parallel(num_threads=threads, max_errors=1000)(pairs)
    assert provider.count == 2


@pytest.mark.parametrize("threads", [1, 4])
def test_an_evaluation_ends_with_the_budget(priced, provider, threads):
    """At once, with that error, whatever `max_errors` says."""
    lm = priced(max_tokens=None)
    provider.answer = dspy_answers()
    examples = [dspy.Example(question=f"q{i}").with_inputs("question") for i in range(12)]
    evaluate = dspy.Evaluate(
        devset=examples, metric=lambda *_: 1, num_threads=threads, max_errors=1000
    )
    with dspy.context(lm=lm), pytest.raises(BudgetExceededError), lm.budget(requests=3) as budget:
        evaluate(dspy.Predict(DEMO))
    assert provider.count == 3
    with dspy.context(lm=lm):
        assert evaluate(dspy.Predict(DEMO)).score == 100
    assert provider.count == 12  # what was answered is not asked again
    assert budget.spent.requests == 3


def test_a_program_in_the_block_gets_the_error_itself(priced, provider):
    """On the block's own thread, and under asyncify, where no DSPy code swallows it."""
    lm = priced(max_tokens=None)
    provider.answer = dspy_answers()
    qa = dspy.Predict(DEMO)
    with dspy.context(lm=lm), lm.budget(requests=1):
        qa(question="a")
        for _ in range(2):
            with pytest.raises(BudgetExceededError):
                qa(question="b")
        with pytest.raises(BudgetExceededError):
            asyncio.run(dspy.asyncify(qa)(question="c"))
        with pytest.raises(BudgetExceededError):
            asyncio.run(qa.acall(question="d"))
    assert provider.count == 1


def test_streams_are_bounded(priced, provider):
    """A streamed program in the block spends from it, and the error reaches its consumer."""
    lm = priced(max_tokens=None)
    provider.answer = dspy_answers()
    program = dspy.streamify(dspy.Predict(DEMO))

    async def consume(question):
        async for _ in program(question=question):
            pass

    with dspy.context(lm=lm), lm.budget(requests=1):
        asyncio.run(consume("a"))
        with pytest.raises(BudgetExceededError):
            asyncio.run(consume("b"))
    assert provider.count == 1


def test_a_plain_thread_stands_outside(priced, provider):
    """Unless it carries a copy of the context, or enters the block itself."""
    lm = priced()
    refused = []

    def call(prompt):
        try:
            lm(prompt)
        except BudgetExceededError:
            refused.append(prompt)

    def enter(budget, prompt):
        with budget:
            call(prompt)

    with lm.budget(requests=1) as budget:
        lm("a")
        for target in (
            threading.Thread(target=call, args=("outside",)),
            threading.Thread(target=contextvars.copy_context().run, args=(call, "copied")),
            threading.Thread(target=enter, args=(budget, "entered")),
        ):
            target.start()
            target.join()
    assert refused == ["copied", "entered"]
    assert budget.spent.requests == 1


def test_tasks_stand_in_the_block_that_made_them(priced):
    """Each task in its own: two blocks on one loop do not mix."""
    lm = priced()

    async def spend(number):
        with lm.budget(requests=2) as budget:
            await asyncio.gather(*(lm.acall(f"{number} {i}") for i in range(2)))
            with pytest.raises(BudgetExceededError):
                await lm.acall(f"{number} more")
        return budget.spent.requests

    async def both():
        return await asyncio.gather(spend(1), spend(2))

    assert asyncio.run(both()) == [2, 2]


def test_a_block_may_be_entered_again(priced, ask):
    """What was spent stays spent; inside itself it counts once per block."""
    lm = priced()
    budget = lm.budget(requests=2)
    with budget:
        ask(lm, "a")
    with budget:
        ask(lm, "b")
        with pytest.raises(BudgetExceededError):
            ask(lm, "c")


def test_a_client_may_have_a_budget_of_its_own(priced, provider, ask):
    """`max_dollars` bounds all its calls, block or no block; a reset does not give it back."""
    lm = priced(limits=LimitPolicy(max_dollars=2 * CENT))
    ask(lm, "a"), ask(lm.copy(temperature=0.5), "b")
    lm.reset()
    with pytest.raises(BudgetExceededError) as caught:
        ask(lm, "c")
    assert caught.value.retry_after is None
    assert provider.count == 2


def test_a_budget_of_a_day_begins_anew(priced, ask):
    """At midnight UTC; until then the error says how long that is."""
    lm = priced(limits=LimitPolicy(max_dollars=CENT, per="day"))
    now = [86_400 * 100 + 3600.0]
    lm._runtime.ledger._clock = lambda: now[0]
    ask(lm, "a")
    with pytest.raises(BudgetExceededError) as caught:
        ask(lm, "b")
    assert caught.value.retry_after == 82_800
    now[0] += 82_800
    ask(lm, "b")


def test_a_lent_clients_budget_leads_on(make, priced, provider, ask):
    """A fallback whose own client is out of money is passed over; the caller's own budget ends all."""
    poor = priced(limits=LimitPolicy(max_dollars=CENT / 100), name="poor")
    lm = make("openai/gpt-4o-mini", fallbacks=[poor, "openai/gpt-4o"], max_wait=0)
    provider.script(Status(401))
    ask(lm, "a")
    assert lm.history[-1]["model"] == "openai/gpt-4o"
    with lm.budget(requests=1):
        provider.script(Status(401))
        with pytest.raises(BudgetExceededError):
            ask(lm, "b")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"dollars": 0}, {"dollars": "4"}, {"requests": 1.5}, {"tokens": -1}],
)
def test_a_wrong_budget_is_refused(priced, wrong):
    """At once, naming the argument."""
    with pytest.raises((TypeError, ValueError), match="Budget: "):
        priced().budget(**wrong)
    with pytest.raises(TypeError, match="Budget: clients"):
        Budget("openai/gpt-4o", dollars=1)
    with pytest.raises(ValueError, match="LimitPolicy: per"):
        LimitPolicy(max_dollars=1, per="week")


def test_sixteen_threads_use_a_budget_up(priced, provider):
    """No more than a call each beyond the limit, and hardly less than the limit."""
    lm = priced(max_tokens=50)

    def spend(thread):
        try:
            for number in range(100):
                lm(f"{thread} {number}", temperature=0.5)
        except BudgetExceededError:
            return

    cost = 1.5 * CENT  # two words in, one out
    with lm.budget(dollars=1.0) as budget, ThreadPoolExecutor(16) as pool:
        for thread in range(16):
            pool.submit(contextvars.copy_context().run, spend, thread)
    assert 0.97 <= budget.spent.dollars <= 1.0 + 16 * cost
    assert budget.spent.dollars == pytest.approx(provider.count * cost)
    assert budget.spent.dollars == pytest.approx(lm.stats().spent.dollars)
    assert budget.reserved == (pytest.approx(0, abs=1e-9),) * 3
