"""What a program does wrong opens no circuit: neither what never left the process, nor any text."""

from __future__ import annotations

import contextlib
import json

import dspy
import pytest

from dspy_resilient import CircuitOpenError, ResilientLM
from dspy_resilient.testing import Provider, Status

CALLS = 7


class Thing:
    """Nothing that JSON knows."""


NEVER_SENT = {
    "newline in the key": {"api_key": "a\nb"},
    "control character in the key": {"api_key": "a\x00b"},
    "letters beyond ASCII in the key": {"api_key": "schlüssel"},
    "newline in a header": {"extra_headers": {"X-Trace": "a\nb"}},
    "letters beyond ASCII in a header": {"extra_headers": {"X-Trace": "日本"}},
    "no name of a header": {"extra_headers": {"X Trace\n": "a"}},
    "a header that is a number": {"extra_headers": {"X-Trace": 5}},
    "a set in the body": {"extra_body": {"x": {1, 2}}},
    "an object in the body": {"extra_body": {"x": Thing()}},
    "stop that is a set": {"stop": {"a"}},
    "stop that is an object": {"stop": Thing()},
    "stop in bytes": {"stop": [b"a"]},
    "logit_bias of an object": {"logit_bias": {1: Thing()}},
    "a timeout in words": {"timeout": "soon"},
    "no address": {"api_base": "nowhere"},
    "half an address": {"api_base": "http://[::1"},
    "an address of files": {"api_base": "ftp://127.0.0.1/v1"},
    "a line end in an address": {"api_base": "http://127.0.0.1:80/\n"},
}


@pytest.mark.parametrize("fault", NEVER_SENT)
@pytest.mark.parametrize("model", ["openai/m", "groq/m", "anthropic/claude-x"])
def test_what_never_left_the_process_opens_nothing(provider, ask, model, fault):
    """LiteLLM calls it a 500; the provider, which has seen nothing of it, is as well as before.

    What a provider that takes more of it was sent after all, it has answered.
    """
    base = provider.base(model.partition("/")[0])
    lm = ResilientLM(model, cache=False, num_retries=0, max_wait=0, api_base=base, api_key="k")
    lm = lm.copy(**NEVER_SENT[fault])
    for _ in range(CALLS):
        try:
            ask(lm, "?")
        except dspy.LMError as error:
            assert type(error).__name__ != "CircuitOpenError"
    assert {circuit.state for circuit in lm.circuits.values()} == {"closed"}
    assert sum(circuit.failure_count for circuit in lm.circuits.values()) == 0
    stats = lm.stats()
    assert stats.attempts == CALLS
    sent = len(provider.requests)
    assert sent in (0, CALLS)
    if sent == 0:
        assert dict(stats.failed) == {"local": CALLS}


@pytest.mark.parametrize("setting", [{"temperature": float("nan")}, {"top_p": float("inf")}])
def test_no_number_is_no_fault_of_the_providers(provider, make, ask, setting):
    """What JSON has no word for is not sent."""
    lm = make(cache=False, num_retries=0, max_wait=0, **setting)
    for _ in range(CALLS):
        with pytest.raises(dspy.LMError):
            ask(lm, "?")
    assert len(provider.requests) == 0
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)


def test_a_negative_timeout_is_no_fault_of_the_providers(provider, make, ask):
    """Whether the request left before its time was over or not."""
    lm = make(cache=False, num_retries=0, max_wait=0, timeout=-1)
    for _ in range(CALLS):
        with contextlib.suppress(dspy.LMTimeoutError, dspy.LMServerError):
            ask(lm, "?")
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)


def refused(status, error):
    """What a provider of OpenAI's language says when it refuses."""
    return Status(status, body=json.dumps({"error": error}))


BILLING = {
    "402": refused(402, {"message": "no"}),
    "quota": refused(429, {"message": "no", "code": "insufficient_quota"}),
    "organization's limit": refused(429, {"code": "organization_spend_limit_exceeded"}),
    "project's limit": refused(429, {"code": "project_spend_limit_exceeded"}),
    "used up": refused(429, {"type": "insufficient_quota", "code": "credit_balance_exhausted"}),
    "Zhipu": refused(429, {"code": "1113", "message": "no"}),
    "DashScope": refused(400, {"code": "Arrearage", "message": "no"}),
    "Moonshot": refused(429, {"type": "exceeded_current_quota_error", "message": "no"}),
}


@pytest.mark.parametrize("answer", BILLING.values(), ids=BILLING)
@pytest.mark.parametrize("model", ["openai/m", "groq/m"])
def test_an_empty_account_is_not_asked_again(provider, ask, model, answer):
    """One such answer closes the door for this credential, and for no other."""
    lm = ResilientLM(model, cache=False, api_base=provider.base("openai"), api_key="k", max_wait=0)
    provider.always(answer)
    for _ in range(3):
        with pytest.raises(dspy.LMError):
            ask(lm, "?")
    assert len(provider.requests) == 1
    provider.always(None)
    assert ask(lm, "?", api_key="another") == ["Paris"]


ECHOES = {
    "a prompt about quota": refused(400, {"message": "bad prompt: insufficient_quota"}),
    "a prompt about billing": refused(400, {"message": "billing_not_active", "code": "bad"}),
    "a prompt about keys": refused(400, {"message": "Incorrect API key provided", "code": "bad"}),
    "credit": refused(400, {"message": "Your credit balance is too low to say so"}),
    "DashScope's inspection": refused(400, {"code": "data_inspection_failed", "message": "no"}),
    "moderation": refused(
        403, {"code": 403, "message": "no", "metadata": {"reasons": ["x"], "flagged_input": "y"}}
    ),
}


@pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("model", ["openai/m", "groq/m", "openrouter/m"])
def test_no_text_and_no_moderation_opens_a_circuit(provider, ask, model, answer):
    """A provider that refuses a prompt goes on being asked others."""
    lm = ResilientLM(model, cache=False, api_base=provider.base("openai"), api_key="k", max_wait=0)
    provider.always(answer)
    for _ in range(CALLS):
        with pytest.raises(dspy.LMError):
            ask(lm, "?")
    assert len(provider.requests) == CALLS
    provider.always(None)
    assert ask(lm, "?") == ["Paris"]


SENTENCES = {
    "Anthropic's": "Your credit balance is too low to access the Anthropic API. Please go to Plans.",
    "a prompt's": "cannot translate 'your credit balance is too low'",
}


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=SENTENCES)
@pytest.mark.parametrize("model", ["anthropic/claude-x", "openai/m"])
def test_an_empty_account_that_has_no_code_leads_to_a_fallback_and_to_nothing_else(
    provider, ask, model, sentence
):
    """Nobody can tell it from a prompt that is echoed: asking another does no harm."""
    dialect = model.partition("/")[0]
    refusal = {"type": "invalid_request_error", "message": sentence}
    provider.always(refused(400, refusal))
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/backup", engine="litellm", api_base=second.api_base, api_key="k")
        with ResilientLM(
            model, cache=False, api_base=provider.base(dialect), api_key="k", fallbacks=[backup]
        ) as lm:
            for _ in range(CALLS):
                assert ask(lm, "?") == ["Lyon"]
            assert len(provider.requests) == CALLS  # each once: no retry, and no circuit opened
            assert {str(circuit.state) for circuit in lm.circuits.values()} == {"closed"}
    provider.always(refused(400, refusal | {"message": "your temperature is too low"}))
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/backup", engine="litellm", api_base=second.api_base, api_key="k")
        lm = ResilientLM(
            model, cache=False, api_base=provider.base(dialect), api_key="k", fallbacks=[backup]
        )
        with pytest.raises(dspy.LMInvalidRequestError):
            ask(lm, "?")
        assert not second.requests


def test_a_refused_key_shows_among_the_circuits_and_can_be_let_in_again(provider, make, ask):
    """Three in a row; two refused among others that are answered do nothing."""
    lm = make(cache=False, max_wait=0)
    provider.script(*[Status(401), Status(401), None] * 2)
    for number in range(6):
        with contextlib.suppress(dspy.LMAuthError):
            ask(lm, f"{number}")
    assert {circuit.state for circuit in lm.circuits.values()} == {"closed"}
    provider.always(Status(401))
    for _ in range(3):
        with pytest.raises(dspy.LMAuthError):
            ask(lm, "?")
    before = len(provider.requests)
    with pytest.raises(CircuitOpenError) as caught:
        ask(lm, "?")
    assert caught.value.reason == "auth"
    assert len(provider.requests) == before
    states = {label: str(circuit.state) for label, circuit in lm.circuits.items()}
    assert sorted(states.values()) == ["closed", "open"]
    assert lm.health().state == "open"
    assert "open" in repr(lm)
    provider.always(None)
    assert ask(lm, "?", api_key="another") == ["Paris"]
    lm.reset()
    assert ask(lm, "?") == ["Paris"]
    assert {circuit.state for circuit in lm.circuits.values()} == {"closed"}


def test_a_call_does_not_wait_for_a_key_to_be_accepted(provider, make, ask):
    """Patience is for a provider that is down; who has a fallback asks it at once."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/b", engine="litellm", api_base=second.api_base, api_key="k")
        lm = make(cache=False, max_wait=600)
        with_backup = make(cache=False, max_wait=600, fallbacks=[backup])
        provider.always(Status(401))
        for _ in range(4):
            with pytest.raises(dspy.LMError) as caught:
                ask(lm, "?")
            assert ask(with_backup, "?") == ["Lyon"]
        assert isinstance(caught.value, CircuitOpenError)
        assert len(provider.requests) == 6
