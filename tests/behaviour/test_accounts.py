"""The numbers add up, whatever happened, and are those of the provider."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_resilient import CachePolicy, CircuitPolicy, LimitPolicy, RetryPolicy
from dspy_resilient.testing import NoChoices, Provider, Reset, Slow, Status, rate_limited

FAULTS = [Status(500), Status(400), Status(401), rate_limited(0.01), Slow(0.02), Slow(0.3)]
FAULTS += [Reset(), NoChoices(), *[None] * 6]


@pytest.fixture
def eventful(provider, make):
    """Build a client with a fallback, some limits, and providers of whom anything may come."""
    with Provider("Lyon") as second:

        def build(seed, **options):
            chance = random.Random(seed)
            for each in (provider, second):
                each.script(*chance.choices(FAULTS, k=100))
            backup = dspy.LM(
                "openai/backup", engine="litellm", api_base=second.api_base, api_key="k"
            )
            return second, make(
                fallbacks=[backup],
                cache=CachePolicy(ttl=0.05, stale_if_error=10, coalesce_max_age=0.1),
                circuit=CircuitPolicy(failure_threshold=4, recovery_time=0.05),
                limits=LimitPolicy(max_concurrent=2, max_queue=2),
                retry=RetryPolicy(base=0.01),
                max_wait=0.05,
                **options,
            )

        yield build


def outcome(ask):
    try:
        ask()
    except dspy.LMError:
        return "error"
    return "answer"


def assert_they_add_up(stats, outcomes, events):
    heard = Counter(type(event).__name__ for event in events)
    served = stats.hits + stats.stale + stats.coalesced + stats.latency.count
    assert stats.calls == outcomes.total() == heard["CallFinished"]
    assert stats.errors == outcomes["error"]
    assert served == outcomes["answer"]
    assert stats.hits + stats.stale == heard["CacheHit"]
    assert stats.failures == sum(stats.failed.values()) == heard["AttemptFailed"]
    assert stats.rejected == sum(stats.refused.values()) == heard["CallRejected"]
    assert stats.retries == heard["RetryScheduled"]
    assert stats.fallbacks == heard["FellBack"]


@pytest.mark.parametrize("deadline", [None, 0.1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_call_and_each_request_ends_in_one_way(provider, eventful, seed, deadline):
    """Hits, followers, retries, fallbacks, refusals, errors and late answers."""
    events = []
    second, lm = eventful(seed, on_event=events.append, deadline=deadline)
    prompts = random.Random(seed).choices("abcdefg", k=48)
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda prompt: outcome(lambda: lm(prompt)), prompts))
    stats = lm.stats()
    assert_they_add_up(stats, Counter(outcomes), events)
    assert stats.attempts == stats.latency.count + stats.failures
    for _ in range(500):  # what was left behind may be on its way
        if stats.attempts == provider.count + second.count:
            break
        time.sleep(0.02)
    assert stats.attempts == provider.count + second.count
