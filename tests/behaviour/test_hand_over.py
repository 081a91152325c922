"""How soon a healthy fallback answers over real HTTP, how often that is told, and what errors say."""

from __future__ import annotations

import dspy
import pytest

from dspy_resilient import (
    AllTargetsFailedError,
    CircuitOpenError,
    CircuitPolicy,
    DeadlineExceededError,
)
from dspy_resilient.events import FellBack
from dspy_resilient.testing import Hang, Provider, Status, rate_limited

FRAGILE = CircuitPolicy(failure_threshold=1, recovery_time=60.0, max_recovery_time=60.0)
WAYS = {
    "defaults": {},
    "deadline": {"deadline": 10},
    "serving": {"deadline": 10, "max_wait": 0},
}


@pytest.fixture
def second():
    """A provider that is in good health."""
    with Provider("Lyon") as running:
        yield running


@pytest.fixture
def pair(make, second):
    """Build a client with a fallback at the second provider."""
    fallback = {"model": "openai/second", "api_base": second.api_base, "api_key": "k"}

    def build(**options):
        return make(fallbacks=[fallback], **options)

    return build


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fault", "seconds"),
    [(rate_limited(retry_after=30), 1.0), (rate_limited(), 1.0), (Status(503), 2.0)],
    ids=["429 with a hint", "429", "503"],
)
def test_a_healthy_fallback_is_asked_within_seconds(
    provider, second, pair, ask, fault, seconds, way
):
    """Within 1 s of the primary's 429, and within 2 s of its 503."""
    lm = pair(**WAYS[way])
    provider.always(fault)
    assert ask(lm, "q") == ["Lyon"]
    assert second.requests[0].at - provider.requests[0].at < seconds


@pytest.mark.parametrize("way", WAYS)
def test_a_healthy_fallback_is_asked_within_a_second_of_a_timeout(provider, second, pair, ask, way):
    """The primary is not asked again first."""
    lm = pair(timeout=0.5, **WAYS[way])
    provider.always(Hang())
    assert ask(lm, "q") == ["Lyon"]
    assert second.requests[0].at - provider.requests[0].at < 0.5 + 1
    assert provider.count == 1


def test_a_hand_over_is_counted_once(provider, second, pair, ask):
    """Also where the fallback itself has to be asked more than once before it answers."""
    events = []
    lm = pair(on_event=events.append)
    provider.always(Status(503))
    second.script(Status(503), Status(503))
    assert ask(lm, "q") == ["Lyon"]
    assert lm.stats().fallbacks == 1
    assert [each.target for each in events if isinstance(each, FellBack)] == [
        f"openai/second at {second.api_base}"
    ]


def test_cause_and_time_of_each_target_are_named(provider, second, pair, ask):
    """By the error of a call that neither has answered."""
    lm = pair(max_wait=0, num_retries=0)
    provider.down("refuse")
    second.always(Status(503))
    with pytest.raises(AllTargetsFailedError) as caught:
        ask(lm, "q")
    told = str(caught.value)
    first, _, rest = told.partition("; ")
    assert f"openai/test at {provider.api_base}: " in first
    assert "refused" in first.lower()
    assert "InternalServerError" not in first
    assert " 500" not in first
    assert f"openai/second at {second.api_base}: " in rest
    assert "503" in rest
    for part in (first, rest):
        assert " s" in part.rpartition("after 1 attempt")[2], told


def test_an_open_circuit_names_the_refused_connection(provider, make, ask):
    """And not the status that LiteLLM makes up for it; no request was sent by the refused call."""
    lm = make(circuit=FRAGILE, max_wait=0, num_retries=0)
    provider.down("refuse")
    with pytest.raises(dspy.LMError) as failed:
        ask(lm, "q")
    assert [each.outcome for each in failed.value.attempts] == ["failure"]
    with pytest.raises(CircuitOpenError) as caught:
        ask(lm, "another")
    assert "refused" in caught.value.last_error.lower()
    assert "500" not in caught.value.last_error
    assert caught.value.attempts == ()


def test_a_refusal_says_what_the_call_had_sent_before(provider, make, ask):
    """The circuit opened at the call's own first attempt."""
    lm = make(circuit=FRAGILE, max_wait=0, num_retries=3)
    provider.always(Status(503))
    with pytest.raises(CircuitOpenError) as caught:
        ask(lm, "q")
    assert [each.outcome for each in caught.value.attempts] == ["failure"]
    assert provider.count == 1


def test_a_probe_that_hangs_ends_with_the_deadline_of_its_call(provider, make, ask):
    """And the error says so, not that the circuit is open."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1, recovery_time=0.1), deadline=3.0)
    provider.script(Status(503), Hang())
    with pytest.raises(DeadlineExceededError) as caught:
        ask(lm, "q")
    assert provider.count == 2
    assert [each.outcome for each in caught.value.attempts] == ["failure", "timeout"]
