"""What calls have cost: every answer and no hit, beside plain `dspy.LM` on the same provider."""

from __future__ import annotations

import asyncio
import time

import dspy
import pytest

from dspy_resilient import RetryPolicy
from dspy_resilient.observe.prometheus import ClientCollector
from dspy_resilient.stats import Spending
from dspy_resilient.testing import (
    CutStream,
    Filtered,
    Hang,
    NoChoices,
    Reset,
    Status,
    Truncated,
    dspy_answers,
)

QUICK = RetryPolicy(base=0.0)
MODEL = "openai/gpt-4o-mini"


@pytest.fixture
def priced(make):
    """Make clients of a model whose price LiteLLM knows."""
    return lambda **options: make(MODEL, retry=QUICK, **options)


def plain(provider, **options):
    return dspy.LM(MODEL, api_base=provider.api_base, api_key="k", engine="litellm", **options)


def bill(lm):
    """Return what DSPy's history says the calls cost, hits apart."""
    return sum(entry["cost"] for entry in lm.history if not entry.get("cache_hit"))


def test_spending_is_that_of_the_history(priced, provider, ask):
    """Tokens and dollars are those of plain `dspy.LM`, and of the client's own history."""
    lm, other = priced(), plain(provider, cache=False)
    for prompt in ("one", "two words", "two words"):
        ask(lm, prompt)
    other("one"), other("two words")
    with dspy.track_usage() as tracker:
        ask(lm, "three more words")
        other("three more words")
    spent = lm.stats().spent
    assert spent.known_dollars == pytest.approx(bill(other)) == pytest.approx(bill(lm))
    assert spent.dollars > 0
    assert spent.prompt_tokens == sum(entry["usage"]["prompt_tokens"] for entry in other.history)
    assert (spent.requests, spent.unpriced, spent.unanswered) == (3, 0, 0)
    tracked = tracker.get_total_tokens()[MODEL]
    assert tracked["prompt_tokens"] == 2 * 3  # what is tracked is what is counted: both calls


def test_failed_attempts_cost_what_the_provider_bills(priced, provider, ask):
    """A refusal costs nothing; an answer of no use costs what it costs."""
    lm = priced()
    provider.script(Status(500), Status(429, retry_after=0.01), None)
    ask(lm, "some words")
    assert lm.stats().spent == Spending(
        requests=3,
        prompt_tokens=2,
        completion_tokens=lm.history[-1]["usage"]["completion_tokens"],
        known_dollars=pytest.approx(bill(lm)),
    )
    for useless in (Truncated(), Filtered()):
        provider.script(useless)
        ask(lm, f"{useless}")
    assert lm.stats().spent.known_dollars == pytest.approx(bill(lm))


@pytest.mark.parametrize("fault", [Reset(), Hang()])
def test_a_request_without_an_answer_is_shown_as_one(priced, provider, ask, fault):
    """What a provider bills for a request that was cut off nobody here knows, and it is said so."""
    lm = priced(timeout=0.3)
    provider.script(fault)
    ask(lm, "some words")
    spent = lm.stats().spent
    assert (spent.requests, spent.unanswered) == (2, 1)
    assert spent.known_dollars == pytest.approx(bill(lm))
    assert "may be billed" in str(lm.stats())


def test_a_provider_that_was_not_reached_bills_nothing(priced, provider, ask):
    """No connection, no bill."""
    lm = priced(max_wait=0)
    provider.down()
    with pytest.raises(dspy.LMError):
        ask(lm, "some words")
    assert lm.stats().spent.unanswered == 0
    assert lm.stats().spent.requests > 0


def test_an_unusable_answer_is_billed_too(priced, provider, ask):
    """An answer without choices, which is tried again, was billed as well."""
    lm = priced()
    provider.script(NoChoices())
    ask(lm, "some words")
    spent = lm.stats().spent
    assert spent.requests == 2
    assert spent.prompt_tokens == 4


def test_fallbacks_are_counted_where_they_were_billed(priced, provider, ask):
    """Per target: the fallback's price for what the fallback answered."""
    other = "openai/gpt-4o"
    lm = priced(fallbacks=[other], max_wait=0)
    provider.script(Status(401))
    ask(lm, "some words")
    by_target = lm.stats().spent_by_target
    assert sorted(by_target) == sorted(
        [f"{MODEL} at {provider.api_base}", f"{other} at {provider.api_base}"]
    )
    assert by_target[f"{MODEL} at {provider.api_base}"] == Spending(requests=1)
    assert by_target[f"{other} at {provider.api_base}"].known_dollars == pytest.approx(bill(lm))
    assert f"  {other}" in str(lm.stats())


def test_an_unknown_price_is_unknown(make, provider, ask):
    """Never 0: neither in the numbers nor in what people see."""
    lm = make("openai/of-my-own")
    ask(lm, "some words")
    stats = lm.stats()
    assert stats.spent.dollars is None
    assert stats.spent.unpriced == 1
    assert "unknown (1 answers)" in str(stats)
    assert "unknown (1 answers)" in lm._repr_html_()
    names = {
        sample.name: sample.value
        for metric in ClientCollector(lm).collect()
        for sample in metric.samples
    }
    assert names["dspy_resilient_unpriced_total"] == 1
    assert "dspy_resilient_dollars_spent_total" not in names
    assert names["dspy_resilient_prompt_tokens_total"] == 2


def test_a_typed_call_is_priced_too(priced, provider):
    """DSPy names no cost for it, but LiteLLM knows the model and the provider counted the tokens."""
    lm = priced()
    lm(dspy.lm15.Request(model=MODEL, messages=[dspy.lm15.Message.user("some words")]))
    lm("some words")
    typed, ordinary = (entry["cost"] for entry in lm.history)
    assert typed is None
    assert lm.stats().spent.known_dollars == pytest.approx(2 * ordinary)


def test_a_stream_is_billed_once(priced, provider):
    """A streamed answer costs what its usage says; one that is cut is shown as unanswered."""
    lm = priced()
    provider.answer = dspy_answers()
    program = dspy.streamify(dspy.Predict("question -> answer"))

    async def consume(question):
        with dspy.context(lm=lm):
            async for _ in program(question=question):
                pass

    asyncio.run(consume("some words"))
    spent = lm.stats().spent
    assert (spent.requests, spent.unanswered) == (1, 0)
    assert spent.prompt_tokens == lm.history[-1]["usage"]["prompt_tokens"] > 0
    provider.script(CutStream())
    with pytest.raises(Exception):  # noqa: B017, PT011  # DSPy has put it into a group of its own
        asyncio.run(consume("other words"))
    assert lm.stats().spent.requests == 2
    assert lm.stats().spent.unanswered == 1


def test_a_cancelled_call_may_be_billed(priced, provider):
    """The request was sent: its bill is unknown, and it is not counted as nothing."""
    lm = priced()

    async def cancel():
        task = asyncio.create_task(lm.acall("some words"))
        await asyncio.to_thread(provider.wait_for, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    provider.script(Hang())
    asyncio.run(cancel())
    assert lm.stats().spent == Spending(requests=1, unanswered=1)


def test_a_late_answer_is_counted_once_it_is_there(priced, provider):
    """A caller that left at its deadline does not make the answer free."""
    lm = priced(deadline=0.3)
    provider.latency = 0.8
    with pytest.raises(dspy.LMError):
        lm("some words")
    assert_soon(lambda: lm.stats().spent.prompt_tokens == 2)
    assert lm.stats().spent.unanswered == 0


def assert_soon(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_copies_spend_together(priced, ask):
    """A rollout is the same client."""
    lm = priced()
    ask(lm, "a")
    ask(lm.copy(rollout_id=1, temperature=1.0), "a")
    assert lm.stats().spent.requests == 2


def test_cached_and_reasoning_tokens_are_parts():
    """They are read wherever a provider's usage has them."""
    chat = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 80},
        "completion_tokens_details": {"reasoning_tokens": 30},
    }
    responses = {
        "input_tokens": 100,
        "output_tokens": 50,
        "input_tokens_details": {"cached_tokens": 80},
        "output_tokens_details": {"reasoning_tokens": 30},
    }
    expected = Spending(
        requests=1,
        prompt_tokens=100,
        completion_tokens=50,
        cached_tokens=80,
        reasoning_tokens=30,
        known_dollars=0.5,
    )
    for usage in (chat, responses):
        assert Spending.of({"usage": usage, "cost": 0.5}, lambda _: None) == expected
    assert Spending.of({}, lambda _: 0.0).dollars is None


def test_spending_adds_up():
    """Sums and differences, and an unknown price makes a sum unknown."""
    one = Spending(requests=1, known_dollars=0.5)
    two = Spending(requests=1, unpriced=1)
    assert sum([one, two]).dollars is None
    assert (one + two) - two == one
    assert not (one - one)


def test_the_last_minute_has_its_own_bill(priced, ask):
    """What was spent lately stands beside what was spent in all."""
    lm = priced()
    ask(lm, "some words")
    stats = lm.stats()
    assert stats.recent.spent == stats.spent
    lm.reset()
    assert not lm.stats().spent


def test_opentelemetry_counts_it_too(priced):
    """By client and target, as Prometheus does."""
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    from dspy_resilient.observe.otel import instrument

    lm, reader = priced(), export.InMemoryMetricReader()
    meters = metrics.MeterProvider([reader], shutdown_on_exit=False)
    with instrument(lm, meter_provider=meters):
        lm("some words")
        points = {
            metric.name: [getattr(point, "value", None) for point in metric.data.data_points]
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }
    assert points["dspy_resilient.dollars_spent"] == [pytest.approx(bill(lm))]
    assert points["dspy_resilient.prompt_tokens"] == [2]
