"""How an error is judged: what the circuit hears, and what may be tried next.

Of the changes of one operator, constant or statement in `outcome.py`, `causes.py` and `hint.py`,
those that no test notices change nothing: `__slots__`, None for what is read as false or for what a
function returns at its end, a last `continue`, and the text of an error that has none.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import email.utils
import itertools
import json
import pkgutil
import socket
import ssl
import sys
import time

import anyio
import dspy
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_resilient import errors
from dspy_resilient.outcomes.causes import Causes
from dspy_resilient.outcomes.classify import Kind, classify, empty_answer, redacted, retry_after
from dspy_resilient.outcomes.outcome import Outcome

NOW = 1_790_000_000.0


def wall():
    return NOW


def linked(*chain):
    """Let each error be the cause of the one before it; return the first."""
    for outer, inner in itertools.pairwise(chain):
        outer.__cause__ = inner
    return chain[0]


def named(name, /, *bases, **attributes):
    """An error of a class that is only known by its name, as LiteLLM's are."""
    error = type(name, bases or (Exception,), {})()
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    return error


def wire(status, headers=None, text=""):
    """httpx's error for a response with this status."""
    request = httpx.Request("POST", "http://provider/v1")
    response = httpx.Response(status, headers=headers, text=text, request=request)
    return httpx.HTTPStatusError("boom", request=request, response=response)


def decode_error():
    return json.JSONDecodeError("Expecting value", "<html>", 0)


TABLE = {
    # what was raised -> kind
    "DSPy server error": (dspy.LMServerError(status=500), Kind.FAILURE),
    "500": (linked(dspy.LMServerError(status=500), wire(500)), Kind.FAILURE),
    "529 that LiteLLM calls 500": (linked(dspy.LMServerError(status=500), wire(529)), Kind.FAILURE),
    "502 that LiteLLM calls 500": (
        linked(dspy.LMTransportError(status=500), wire(502)),
        Kind.FAILURE,
    ),
    "503 that is called a refused key": (
        linked(dspy.LMAuthError(status=401), named("AuthenticationError"), wire(503)),
        Kind.FAILURE,
    ),
    "504 from a gateway": (linked(dspy.LMTimeoutError(status=504), wire(504)), Kind.FAILURE),
    "504, native engine": (dspy.LMTimeoutError(status=504), Kind.FAILURE),
    "connection refused": (
        linked(dspy.LMServerError(status=500), httpx.ConnectError("x"), ConnectionRefusedError()),
        Kind.FAILURE,
    ),
    "no such host": (linked(dspy.LMTransportError(), socket.gaierror()), Kind.FAILURE),
    "TLS": (linked(dspy.LMTransportError(), ssl.SSLError()), Kind.FAILURE),
    "reset, raw": (httpx.ReadError("x"), Kind.FAILURE),
    "cut stream, raw": (
        linked(dspy.LMUnexpectedError(), httpx.RemoteProtocolError("x")),
        Kind.FAILURE,
    ),
    "a socket AnyIO calls broken": (
        linked(dspy.LMTransportError(), httpx.ReadError("x"), anyio.BrokenResourceError()),
        Kind.FAILURE,
    ),
    "stream without an end": (dspy.LMStreamAssemblyError(), Kind.FAILURE),
    "malformed chunk": (linked(dspy.LMUnexpectedError(), decode_error()), Kind.FAILURE),
    "error event in a stream": (dspy.LMProviderError(), Kind.FAILURE),
    "unreadable body": (linked(dspy.LMServerError(status=500), decode_error()), Kind.FAILURE),
    "unreadable body, native engine": (
        linked(dspy.LMProviderError(status=200), decode_error()),
        Kind.FAILURE,
    ),
    "unreadable body from Gemini": (
        linked(dspy.LMInvalidRequestError(status=422), decode_error()),
        Kind.FAILURE,
    ),
    "bytes that are no text, from Gemini": (
        linked(
            dspy.LMInvalidRequestError(status=422),
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ),
        Kind.FAILURE,
    ),
    "a 500 about a closed event loop of theirs": (
        linked(dspy.LMServerError(status=500), RuntimeError("Event loop is closed"), wire(500)),
        Kind.FAILURE,
    ),
    "200 that is an error": (named("APIError", status_code=200), Kind.FAILURE),
    "transport error without a cause": (dspy.LMTransportError(), Kind.FAILURE),
    "read timeout": (
        linked(dspy.LMTimeoutError(status=408), httpx.ReadTimeout("x")),
        Kind.TIMEOUT,
    ),
    "read timeout, native engine": (
        linked(dspy.LMTransportError(), named("ReadTimeout"), TimeoutError()),
        Kind.TIMEOUT,
    ),
    "the provider's own 408": (linked(dspy.LMTimeoutError(status=408), wire(408)), Kind.TIMEOUT),
    "the caller's timeout": (TimeoutError(), Kind.TIMEOUT),
    "a timeout in the middle of an answer": (
        linked(dspy.LMTimeoutError(), decode_error()),
        Kind.TIMEOUT,
    ),
    "a timeout that cancelled something": (
        linked(dspy.LMTransportError(), TimeoutError(), asyncio.CancelledError()),
        Kind.TIMEOUT,
    ),
    "our deadline": (errors.DeadlineExceededError("late"), Kind.TIMEOUT),
    "429": (linked(dspy.LMRateLimitError(status=429), wire(429)), Kind.THROTTLED),
    "429, native engine": (dspy.LMRateLimitError(), Kind.THROTTLED),
    "402": (linked(dspy.LMInvalidRequestError(status=402), wire(402)), Kind.BILLING),
    "DSPy billing error": (dspy.LMBillingError(), Kind.BILLING),
    "quota in a 429's code": (
        linked(dspy.LMRateLimitError(status=429, provider_code="insufficient_quota"), wire(429)),
        Kind.BILLING,
    ),
    "quota in a 429's body": (
        named("RateLimitError", status_code=429, body={"error": {"code": "insufficient_quota"}}),
        Kind.BILLING,
    ),
    "an account that was never paid for, in a 403": (
        linked(dspy.LMAuthError(status=403, provider_code="billing_not_active"), wire(403)),
        Kind.BILLING,
    ),
    "quota in a 400's text, which may be the prompt's": (
        linked(dspy.LMInvalidRequestError('{"code": "insufficient_quota"}', status=400), wire(400)),
        Kind.REQUEST,
    ),
    "401": (linked(dspy.LMAuthError(status=401), wire(401)), Kind.AUTH),
    "401, native engine": (dspy.LMAuthError(), Kind.AUTH),
    "403 that LiteLLM calls a bad request": (
        linked(named("BadRequestError", status_code=403), wire(403)),
        Kind.AUTH,
    ),
    "403 without more": (named("APIError", status_code=403), Kind.AUTH),
    "context window": (dspy.ContextWindowExceededError(status=400), Kind.CONTEXT),
    "context window of a 400": (
        linked(named("ContextWindowExceededError", status_code=400), wire(400)),
        Kind.CONTEXT,
    ),
    "content policy by class": (
        linked(dspy.LMInvalidRequestError(status=400), named("ContentPolicyViolationError")),
        Kind.POLICY,
    ),
    "content policy by code": (
        dspy.LMInvalidRequestError(status=400, provider_code="content_filter"),
        Kind.POLICY,
    ),
    "content policy by another code": (
        dspy.LMInvalidRequestError(status=400, provider_code="content_policy_violation"),
        Kind.POLICY,
    ),
    "400": (linked(dspy.LMInvalidRequestError(status=400), wire(400)), Kind.REQUEST),
    "404": (linked(dspy.LMUnsupportedModelError(status=404), wire(404)), Kind.REQUEST),
    "413 that LiteLLM calls 400": (
        linked(dspy.LMInvalidRequestError(status=400), wire(413)),
        Kind.REQUEST,
    ),
    "a real 422": (linked(dspy.LMInvalidRequestError(status=422), wire(422)), Kind.REQUEST),
    "our own tool call, misspelt": (
        linked(dspy.LMInvalidRequestError(status=400), decode_error()),
        Kind.REQUEST,
    ),
    "unsupported feature": (dspy.LMUnsupportedFeatureError("x"), Kind.REQUEST),
    "open circuit": (errors.CircuitOpenError("x", retry_after=3.0), Kind.REJECTED),
    "a nested client's own": (errors.AllTargetsFailedError("x"), Kind.REJECTED),
    "cancellation": (asyncio.CancelledError(), Kind.CANCELLED),
    "a cancelled future": (concurrent.futures.CancelledError(), Kind.CANCELLED),
    "Ctrl-C": (KeyboardInterrupt(), Kind.CANCELLED),
    "a generator closed": (GeneratorExit(), Kind.CANCELLED),
    "a consumer that left": (
        linked(dspy.LMUnexpectedError(), anyio.BrokenResourceError()),
        Kind.CANCELLED,
    ),
    "a consumer that closed": (anyio.ClosedResourceError(), Kind.CANCELLED),
    "TypeError": (TypeError("n must be an int"), Kind.LOCAL),
    "an engine's bug": (linked(dspy.LMUnexpectedError(), RuntimeError()), Kind.LOCAL),
    "a JSON error nobody wrapped": (decode_error(), Kind.LOCAL),
    "missing package": (ModuleNotFoundError("mcp"), Kind.LOCAL),
    "missing package that LiteLLM calls 500": (
        linked(dspy.LMTransportError(status=500), ModuleNotFoundError("mcp")),
        Kind.LOCAL,
    ),
    "missing OpenAI key that LiteLLM calls 500": (
        linked(
            dspy.LMServerError(status=500),
            named("InternalServerError", status_code=500),
            openai.OpenAIError("no key"),
        ),
        Kind.LOCAL,
    ),
    "an error of the OpenAI SDK about a request": (
        linked(
            dspy.LMServerError(status=500),
            openai.APIConnectionError(request=httpx.Request("POST", "http://provider/v1")),
        ),
        Kind.FAILURE,
    ),
    "somebody else's OpenAIError": (
        linked(dspy.LMServerError(status=500), named("OpenAIError")),
        Kind.FAILURE,
    ),
    "missing key, native engine": (dspy.LMNotConfiguredError(), Kind.LOCAL),
    "an address that is none": (
        linked(dspy.LMServerError(status=500), httpx.UnsupportedProtocol("x")),
        Kind.LOCAL,
    ),
    "LiteLLM's own budget": (
        linked(dspy.LMBillingError(), named("BudgetExceededError")),
        Kind.LOCAL,
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_every_ending_has_its_kind(case):
    """DSPy's classes first, then the status that came over the wire, then what lies beneath (5)."""
    error, kind = TABLE[case]
    assert classify(error).kind is kind


THEIRS = {
    # kind -> classes that mean it, wherever they lie in a chain, with or without a status
    Kind.LOCAL: "litellm.BudgetExceededError dspy.LMConfigurationError dspy.LMCollectionLimitError"
    " dspy.LMLockTimeoutError httpx.InvalidURL httpx.UnsupportedProtocol builtins.ImportError",
    Kind.CONTEXT: "litellm.ContextWindowExceededError dspy.ContextWindowExceededError"
    " dspy.lm15.ContextLengthError",
    Kind.POLICY: "litellm.ContentPolicyViolationError",
    Kind.BILLING: "dspy.LMBillingError dspy.lm15.BillingError"
    " litellm.exceptions.PaymentRequiredError",
    Kind.AUTH: "litellm.AuthenticationError openai.AuthenticationError"
    " openai.PermissionDeniedError dspy.LMAuthError dspy.lm15.AuthError",
    Kind.THROTTLED: "litellm.RateLimitError openai.RateLimitError dspy.LMRateLimitError"
    " dspy.lm15.RateLimitError",
    Kind.TIMEOUT: "litellm.Timeout openai.APITimeoutError dspy.LMTimeoutError"
    " dspy.lm15.TimeoutError builtins.TimeoutError httpx.PoolTimeout requests.Timeout",
    Kind.FAILURE: "httpx.ConnectError httpx.ProxyError httpx.RemoteProtocolError ssl.SSLError"
    " builtins.ConnectionResetError aiohttp.ClientConnectionError aiohttp.ClientPayloadError"
    " socket.gaierror dspy.LMStreamAssemblyError dspy.lm15.StreamAssemblyError"
    " openai.APIResponseValidationError",
    Kind.CANCELLED: "anyio.BrokenResourceError anyio.ClosedResourceError anyio.EndOfStream",
}


@pytest.mark.parametrize(
    ("path", "kind"), [(path, kind) for kind, paths in THEIRS.items() for path in paths.split()]
)
def test_errors_of_every_layer_are_known(path, kind):
    """By their class alone, as LiteLLM, the SDKs and the HTTP clients raise them (5)."""
    module, _, name = path.rpartition(".")
    found = getattr(pkgutil.resolve_name(module), name, None)
    if found is None:
        pytest.skip(f"this {module} has no {name}")
    error = linked(dspy.LMUnexpectedError(), found.__new__(found))
    handed_off = kind is Kind.LOCAL  # what is not known is otherwise
    assert classify(error, handed_off=handed_off or None).kind is kind


class NativeError(Exception):
    """The common class of what DSPy's native engine says about its connection."""


@pytest.mark.parametrize("what", ["Connect", "Read", "Write"])
def test_errors_of_the_native_engine_are_known(what):
    """It calls a timeout a kind of error of the same name (5)."""
    failure = named(f"{what}Error", NativeError)
    timeout = named(f"{what}Timeout", type(failure))
    assert classify(failure).kind is Kind.FAILURE
    assert classify(timeout).kind is Kind.TIMEOUT


FLAGS = {
    # an error of each kind, what the circuit hears, whether to retry, whether to go on
    Kind.FAILURE: (dspy.LMServerError(), Outcome.FAILURE, True, True),
    Kind.TIMEOUT: (dspy.LMTimeoutError(), Outcome.NEUTRAL, True, True),
    Kind.THROTTLED: (dspy.LMRateLimitError(), Outcome.NEUTRAL, True, True),
    Kind.BILLING: (dspy.LMBillingError(), Outcome.NEUTRAL, False, True),
    Kind.AUTH: (dspy.LMAuthError(), Outcome.NEUTRAL, False, True),
    Kind.CONTEXT: (dspy.ContextWindowExceededError(), Outcome.NEUTRAL, False, False),
    Kind.POLICY: (named("ContentPolicyViolationError"), Outcome.NEUTRAL, False, False),
    Kind.REQUEST: (dspy.LMInvalidRequestError(), Outcome.NEUTRAL, False, False),
    Kind.REJECTED: (errors.LimitExceededError(), Outcome.NEUTRAL, False, True),
    Kind.BROKEN: (
        linked(dspy.LMServerError(status=500), RuntimeError("Event loop is closed")),
        *(Outcome.NEUTRAL, False, True),
    ),
    Kind.CANCELLED: (asyncio.CancelledError(), Outcome.NEUTRAL, False, False),
    Kind.LOCAL: (TypeError(), Outcome.NEUTRAL, False, False),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_every_kind_follows_the_table(kind):
    """Circuit, retry and next target are those of the outcome table (5)."""
    error, *expected = FLAGS[kind]
    verdict = classify(error, broken=kind is Kind.BROKEN)
    assert [verdict.kind, verdict.outcome, verdict.retry, verdict.next_target] == [kind, *expected]
    assert verdict.special == (kind in (Kind.CONTEXT, Kind.POLICY))


@pytest.mark.parametrize(
    "code",
    [
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        "exceeded_current_quota_error",
    ],
)
def test_an_empty_account_is_known_by_its_code(code):
    """Whatever the status is that would otherwise decide (5)."""
    assert classify(dspy.LMRateLimitError(status=429, provider_code=code)).kind is Kind.BILLING


def test_words_are_those_of_the_documentation():
    """History, events and metrics name the kinds."""
    assert " ".join(Kind) == (
        "answer failure timeout throttled billing auth context policy request rejected broken"
        " cancelled local"
    )


def test_a_verdict_is_a_value():
    """Everybody who meets one error gets the same, and nobody can change it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        classify(KeyError()).retry = True


def test_the_table_is_complete():
    """Every kind but an answer can come of an error."""
    assert set(FLAGS) == set(Kind) - {Kind.ANSWER}


@pytest.mark.parametrize(
    ("seconds", "timeout", "outcome"),
    [
        (0.4, 0.5, Outcome.NEUTRAL),
        (0.5, 0.5, Outcome.FAILURE),
        (9.9, 600.0, Outcome.NEUTRAL),
        (10.0, 600.0, Outcome.FAILURE),
        (9.9, None, Outcome.NEUTRAL),
        (10.0, None, Outcome.FAILURE),
    ],
)
def test_a_timeout_is_a_failure_only_if_it_ran_long(seconds, timeout, outcome):
    """A failure from min(10 s, the client's own timeout), else the caller was impatient (5)."""
    verdict = classify(dspy.LMTimeoutError(), seconds=seconds, timeout=timeout)
    assert (verdict.kind, verdict.outcome) == (Kind.TIMEOUT, outcome)


def test_what_is_no_timeout_may_take_long():
    """A request that was refused after a minute is at fault all the same (5)."""
    assert classify(dspy.LMInvalidRequestError(), seconds=60.0).outcome is Outcome.NEUTRAL


def test_a_timeout_of_unknown_length_is_no_failure():
    """Nobody knows that it ran long (5)."""
    assert classify(dspy.LMTimeoutError(), timeout=0.5).outcome is Outcome.NEUTRAL


@pytest.mark.parametrize("status", [400, 401, 422, 500, None])
def test_what_was_not_handed_off_is_nobodys_fault_but_ours(status):
    """Whatever status LiteLLM makes up for it."""
    verdict = classify(named("InternalServerError", status_code=status), handed_off=False)
    assert (verdict.kind, verdict.outcome) == (Kind.LOCAL, Outcome.NEUTRAL)


def test_what_was_handed_off_and_broke_is_the_providers_fault():
    """A bare ValueError out of LiteLLM, say for an error event in a stream, is a failure (5)."""
    error = linked(dspy.LMUnexpectedError(), ValueError("overloaded"))
    assert classify(error, handed_off=True).kind is Kind.FAILURE
    assert classify(error, handed_off=None).kind is Kind.LOCAL


def test_an_answer_that_cannot_be_read_is_a_failure_once_it_was_asked_for():
    """Before that, it was a tool call of our own that LiteLLM could not read (5)."""
    error = linked(dspy.LMInvalidRequestError(status=400), decode_error())
    assert classify(error, handed_off=True).kind is Kind.FAILURE
    assert classify(error, handed_off=False).kind is Kind.LOCAL


@pytest.mark.parametrize("fault", [ValueError, KeyError, TypeError, AttributeError])
def test_an_answer_of_the_wrong_shape_is_a_failure(fault):
    """Gemini's 422 over such an error is a 200 that LiteLLM could not read (5)."""
    error = linked(named("BadRequestError", status_code=422), fault("no candidates"))
    assert classify(error, handed_off=True, answered=True).kind is Kind.FAILURE


@pytest.mark.parametrize("status", [400, 422, 500, None])
@pytest.mark.parametrize("fault", [ValueError, KeyError, TypeError, AttributeError])
def test_a_mishap_before_anything_came_back_is_ours(status, fault):
    """LiteLLM calls it a 500 as often as not."""
    error = linked(named("InternalServerError", status_code=status), fault("no JSON"))
    verdict = classify(error, handed_off=True, answered=False)
    assert (verdict.kind, verdict.outcome) == (Kind.LOCAL, Outcome.NEUTRAL)


@pytest.mark.parametrize(
    ("status", "fault", "handed_off"),
    [(422, ValueError, None), (400, ValueError, True), (422, RuntimeError, True)],
)
def test_not_every_wrong_request_is_an_answer_of_the_wrong_shape(status, fault, handed_off):
    """One that was refused is at fault itself (5)."""
    error = linked(named("BadRequestError", status_code=status), fault())
    assert classify(error, handed_off=handed_off).kind is Kind.REQUEST


def test_a_prompt_cannot_empty_the_account():
    """Text counts for billing only, and only under a status that can mean it (5)."""
    error = dspy.LMServerError("insufficient_quota", status=500)
    assert classify(error).kind is Kind.FAILURE


def test_a_credential_lock_is_waited_for():
    """A lock file of this machine is no provider's fault, and soon free: DSPy retries it too."""
    verdict = classify(dspy.LMLockTimeoutError("x"))
    assert (verdict.kind, verdict.outcome, verdict.retry) == (Kind.LOCAL, Outcome.NEUTRAL, True)


def test_causes_hang_on_original_exception_too():
    """MidStreamFallbackError keeps its cause in `original_exception` (5)."""
    error = named("MidStreamFallbackError", original_exception=wire(429))
    assert classify(error).kind is Kind.THROTTLED


def test_what_the_caller_was_handling_is_no_cause():
    """An adapter's parse error, or an earlier attempt's 429, says nothing about this attempt."""

    def attempt():
        try:
            int("inner")
        except ValueError:
            raise dspy.LMInvalidRequestError(status=400)  # noqa: B904

    try:
        raise wire(429, {"retry-after": "7"})
    except httpx.HTTPStatusError:
        with pytest.raises(dspy.LMInvalidRequestError) as caught:
            attempt()
        verdict = classify(caught.value)
    assert isinstance(caught.value.__context__.__context__, httpx.HTTPStatusError)
    assert (verdict.kind, verdict.retry_after) == (Kind.REQUEST, None)


def test_what_the_attempt_was_handling_is_a_cause():
    """A wrapper need not say `from`, as long as it is not a caller's (5)."""

    def attempt():
        try:
            raise wire(429, {"retry-after": "7"})
        except httpx.HTTPStatusError:
            raise dspy.LMUnexpectedError  # noqa: B904

    with pytest.raises(dspy.LMUnexpectedError) as caught:
        attempt()
    verdict = classify(caught.value)
    assert (verdict.kind, verdict.retry_after) == (Kind.THROTTLED, 7.0)


async def test_what_the_awaiting_coroutine_was_handling_is_no_cause():
    """The same across `await`."""

    async def attempt():
        await asyncio.sleep(0)
        raise dspy.LMInvalidRequestError(status=422)

    try:
        json.loads("{")
    except ValueError:
        with pytest.raises(dspy.LMInvalidRequestError) as caught:
            await attempt()
        verdict = classify(caught.value)
    assert isinstance(caught.value.__context__, ValueError)
    assert verdict.kind is Kind.REQUEST


@pytest.mark.parametrize(
    ("value", "status"),
    [
        *((code, code) for code in (100, 599)),
        ("503", 503),
        *((rubbish, None) for rubbish in (99, 600, "700", True, "4o4", 503.0, None)),
    ],
)
def test_only_http_statuses_count(value, status):
    """Errors call many things a status (5)."""
    assert Causes(named("X", status_code=value)).status == status


@pytest.mark.parametrize(
    "chain",
    [
        (named("APIError", response=named("MadeUp", status_code=500)), wire(503)),
        (named("HTTPStatusError"), wire(503)),
        (named("APIError", status_code=500), wire(503), wire(429)),
    ],
    ids=["a response LiteLLM made up", "none", "two"],
)
def test_what_came_over_the_wire_is_the_status(chain):
    """LiteLLM hangs a response of its own on its errors, with a status of its own (5)."""
    causes = Causes(linked(*chain))
    assert causes.wire_status == causes.status == 503


def test_rubbish_among_the_headers_is_left_out():
    """Whoever has put it there."""
    headers = {7: "7", "object": object(), "empty": (), "Retry-After": "7"}
    assert list(Causes(named("X", headers=headers)).headers()) == [{"retry-after": "7"}]


@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (named("X", code="one", body={"error": {"code": "two", "type": "three"}}), "one two three"),
        (named("X", body={"code": "one"}), "one"),
        (named("X", body={"error": {"code": 7, "type": "one"}}), "one"),
        (named("X", body="one"), ""),
        (dspy.LMServerError(provider_code="one"), "one"),
        (dspy.LMServerError(), ""),
        (linked(named("X", code="one"), named("X", code="two")), "one two"),
    ],
)
def test_codes_are_found_wherever_they_are(error, codes):
    """In attributes and bodies; DSPy's classes have a code of their own, which is none (5)."""
    assert list(Causes(error).codes()) == codes.split()


def test_headers_of_the_outermost_error_come_first():
    """And of one error, those that LiteLLM has kept."""
    error = linked(
        named("X", litellm_response_headers={"Retry-After": 7}, headers={"retry-after": "8"}),
        wire(429, {"retry-after": "9"}),
    )
    assert [found["retry-after"] for found in Causes(error).headers()] == ["7", "9"]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"RETRY-AFTER": " 0 "}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": email.utils.formatdate(NOW + 90, usegmt=True)}, 90.0),
        ({"x-ratelimit-reset-requests": "1s"}, 1.0),
        ({"x-ratelimit-reset-requests": " 1s "}, 1.0),
        ({"x-ratelimit-reset-requests": "1sec"}, None),
        ({"x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-reset-tokens": "2m59.56s"}, 179.56),
        ({"x-ratelimit-reset-tokens-minute": "11.38"}, 11.38),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, 1.0),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360.0,
        ),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360.0,
        ),
        ({"anthropic-ratelimit-input-tokens-reset": "2026-09-21T14:14:10Z"}, 50.0),
        ({"anthropic-ratelimit-requests-reset": "2026-09-21T14:14:10"}, 50.0),
        ({"retry-after": "nan", "x-ratelimit-reset-requests": "2s"}, 2.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "90000"}, 90_000.0),
        ({"retry-after": "2678400"}, 2_678_400.0),
        ({"retry-after": "2678401"}, None),
        ({"retry-after": "7".rjust(64, "0")}, 7.0),
        ({"retry-after": "7".rjust(65, "0")}, None),
        ({"x-ratelimit-reset-tokens": "1d12h"}, 129_600.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": email.utils.formatdate(NOW - 90, usegmt=True)}, None),
        ({"x-ratelimit-reset-requests": "1790000060"}, None),
        ({"x-ratelimit-limit-requests": "60"}, None),
        ({}, None),
    ],
)
def test_the_hint_is_read_wherever_the_provider_puts_it(headers, seconds):
    """Seconds, milliseconds, dates and reset times; nonsense is ignored."""
    read = retry_after(
        named("RateLimitError", litellm_response_headers=headers, status_code=429), wall=wall
    )
    assert read == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    "error",
    [
        dspy.LMRateLimitError(retry_after=7.0),
        linked(dspy.LMRateLimitError(), named("RateLimitError", retry_after=7)),
        linked(dspy.LMRateLimitError(), wire(429, {"Retry-After": "7"})),
        linked(dspy.LMRateLimitError(), named("X", headers={"Retry-After": "7"})),
        linked(
            dspy.LMRateLimitError(),
            named("X", litellm_response_headers=httpx.Headers({"retry-after": "7"})),
        ),
        named("X", original_exception=wire(429, {"retry-after": "7"})),
        named("X", status=429, rate_limit_headers={"x-ratelimit-reset-requests": ("7s", "9s")}),
    ],
)
def test_the_hint_is_found_anywhere_on_the_chain(error):
    """DSPy loses it on LiteLLM's route; LiteLLM keeps it in `litellm_response_headers`."""
    assert retry_after(error, wall=wall) == 7.0
    assert classify(error, wall=wall).retry_after == 7.0


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs tzset")
@pytest.mark.parametrize("date", ["2026-09-21T14:14:10", "Mon, 21 Sep 2026 14:14:10 -0000"])
def test_a_date_without_a_zone_is_in_utc(monkeypatch, date):
    """Wherever this machine is."""
    monkeypatch.setenv("TZ", "Etc/GMT-9")
    time.tzset()
    try:
        assert retry_after(wire(429, {"retry-after": date}), wall=wall) == 50.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_hint_is_a_number():
    """True is none, though Python counts with it."""
    assert retry_after(named("X", retry_after=True)) is None


def test_the_hint_is_not_clamped():
    """The caller learns what was asked for; how much of it is obeyed is the gate's business."""
    assert classify(dspy.LMRateLimitError(retry_after=86_000.0)).retry_after == 86_000.0


@pytest.mark.parametrize(("status", "seconds"), [(429, 3.0), (503, 3.0), (529, 3.0), (500, None)])
def test_reset_times_count_only_when_the_provider_is_busy(status, seconds):
    """They are sent with every answer, so after a 500 they mean nothing."""
    assert retry_after(wire(status, {"x-ratelimit-reset-tokens": "3s"}), wall=wall) == seconds


def test_a_rejection_keeps_its_own_time():
    """A nested client says itself when to come back (5)."""
    assert classify(errors.CircuitOpenError("x", retry_after=3.0)).retry_after == 3.0


class RubbishError(Exception):
    """An error whose every attribute explodes or lies."""

    headers = litellm_response_headers = 7
    body = {"error": ["x"]}  # noqa: RUF012
    retry_after = "soon"
    status = True
    status_code = "4o4"
    original_exception = "nobody"
    code = property(lambda self: 1 / 0)
    response = property(lambda self: 1 / 0)

    def __str__(self):
        raise RuntimeError


def test_a_broken_error_is_judged_all_the_same():
    """Nothing about an error makes `classify` raise."""
    assert classify(linked(RubbishError(), RubbishError())).kind is Kind.LOCAL
    assert retry_after(RubbishError()) is None
    refused = RubbishError()
    refused.status_code = 429
    assert classify(refused).kind is Kind.THROTTLED
    assert redacted(RubbishError()) == "RubbishError"


def test_a_chain_that_bites_its_tail_ends():
    """Errors may cause each other, and chains may be long."""
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert Causes(one).chain == [one, two]
    assert len(Causes(linked(*(ValueError() for _ in range(5000)))).chain) == 32


@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset-tokens"]),
        st.one_of(st.text(max_size=80), st.floats().map(str), st.datetimes().map(str)),
    )
)
def test_no_header_makes_it_raise(headers):
    """Whatever a provider sends, a hint is a number of seconds within a month, or None."""
    seconds = retry_after(named("X", headers=headers, status_code=429), wall=wall)
    assert seconds is None or 0 <= seconds <= 31 * 86_400


def test_no_prompt_gets_into_the_redacted_text():
    """Class, status and code only: messages may hold prompts and keys."""
    error = linked(
        dspy.LMServerError("You wrote: my secret", status=500, provider_code="server_error"),
        wire(500, text="my secret"),
    )
    assert redacted(error) == "LMServerError 500 server_error"
    assert redacted(dspy.LMRateLimitError("sk-1234", status=429)) == "LMRateLimitError 429"
    assert redacted(named("X", body={"error": {"code": "my secret prompt"}})) == "X"


@pytest.mark.parametrize(
    ("response", "empty"),
    [
        ([], True),
        ([""], False),
        (["text"], False),
        ({"choices": []}, True),
        ({"choices": [{}]}, False),
        (type("R", (), {"choices": []})(), True),
        (type("R", (), {"choices": [1]})(), False),
        (type("R", (), {"output": []})(), True),
        (type("R", (), {"outputs": []})(), True),
        (object(), False),
        (None, False),
    ],
)
def test_an_answer_without_choices_is_empty(response, empty):
    """Zero choices are a failure; an empty text is an answer (5)."""
    assert empty_answer(response) is empty


def test_judging_needs_no_litellm():
    """The judges read names and attributes, and import neither SDK nor LiteLLM."""
    for name in ("classify", "causes", "retry_after"):
        module = sys.modules[f"dspy_resilient.outcomes.{name}"]
        assert not {"litellm", "openai", "httpx", "asyncio", "anyio"} & set(vars(module))
