"""What an error says about the provider, and about what may be tried next.

`classify` is the one place that judges an error, once per attempt. It goes by the class names,
statuses, codes and attributes of the whole chain of causes, and judges LiteLLM's own exceptions and
DSPy's translations of them alike. No message counts, for it may echo a prompt, except that one may
lead to a fallback. This module decides nothing about waiting, counting or state.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from dspy_resilient.errors import DeadlineExceededError, ResilienceError
from dspy_resilient.outcomes.causes import Causes
from dspy_resilient.outcomes.outcome import Kind, Outcome, Verdict
from dspy_resilient.outcomes.retry_after import WallClock, hint_of, retry_after

__all__ = ["Kind", "Verdict", "classify", "empty_answer", "redacted", "retry_after"]


_AGAIN = frozenset({Kind.FAILURE, Kind.TIMEOUT, Kind.THROTTLED})
_ELSEWHERE = _AGAIN | {Kind.BILLING, Kind.AUTH, Kind.REJECTED, Kind.BROKEN}
_SPECIAL = frozenset({Kind.CONTEXT, Kind.POLICY})

# Which class names decide, most telling first. These are certain whatever the status:
_CERTAIN = (
    (Kind.LOCAL, {"BudgetExceededError"}),  # LiteLLM's own budget, set by the user
    (Kind.LOCAL, {"LMConfigurationError", "LMCollectionLimitError", "LMLockTimeoutError"}),
    # What the HTTP library, or what is below it, will not send:
    (Kind.LOCAL, {"InvalidURL", "InvalidUrlClientError", "LocalProtocolError"}),
    (Kind.LOCAL, {"NonHttpUrlClientError", "UnicodeEncodeError", "UnsupportedProtocol"}),
    (Kind.CONTEXT, {"ContextWindowExceededError", "ContextLengthError"}),
    (Kind.POLICY, {"ContentPolicyViolationError"}),
    (Kind.BILLING, {"LMBillingError", "BillingError", "PaymentRequiredError"}),
)
# These decide where no HTTP status has come over the wire:
_TELLING = (
    (Kind.AUTH, {"LMAuthError", "AuthError", "AuthenticationError", "PermissionDeniedError"}),
    (Kind.THROTTLED, {"LMRateLimitError", "RateLimitError"}),
    (Kind.TIMEOUT, {"TimeoutError", "TimeoutException", "Timeout", "APITimeoutError"}),
    (Kind.TIMEOUT, {"LMTimeoutError", "ReadTimeout", "WriteTimeout", "ConnectTimeout"}),
    (Kind.TIMEOUT, {"DeadlineExceededError"}),
    (Kind.FAILURE, {"NetworkError", "ConnectError", "ReadError", "WriteError", "ProxyError"}),
    (Kind.FAILURE, {"ConnectionError", "ClientConnectionError", "gaierror", "SSLError"}),
    (Kind.FAILURE, {"ProtocolError", "ClientPayloadError", "StreamAssemblyError"}),
    (Kind.FAILURE, {"LMStreamAssemblyError", "APIResponseValidationError"}),
    # AnyIO's words for a consumer that has left (beneath a transport error, for a socket):
    (Kind.CANCELLED, {"BrokenResourceError", "ClosedResourceError", "EndOfStream"}),
    (Kind.CANCELLED, {"CancelledError"}),
    (Kind.LOCAL, {"ImportError"}),
)
# And these where nothing else is known:
_VAGUE = (
    (Kind.REQUEST, {"LMInvalidRequestError", "LMUnsupportedFeatureError"}),
    (Kind.FAILURE, {"LMProviderError", "LMTransportError"}),
)
_UNREADABLE = {"JSONDecodeError", "UnicodeDecodeError"}

_POLICY_CODES = {
    "content_filter",
    "content_policy_violation",
    "data_inspection_failed",  # DashScope
    "DataInspectionFailed",
    "moderation_blocked",
}
_CODED = (
    400,
    403,
    429,
)  # statuses whose code may say that an account is empty; a 402 says so itself
_BILLING_CODES = {
    "1113",  # Zhipu
    "Arrearage",  # DashScope
    "billing_error",
    "billing_hard_limit_reached",
    "billing_not_active",
    "credit_balance_exhausted",
    "enforced_spend_limit_reached",  # Anthropic
    "exceeded_current_quota_error",  # Moonshot
    "insufficient_quota",
    "organization_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "project_spend_limit_exceeded",
}

# Anthropic's words for an empty account: a 400 without a code. They may be a prompt's, so a fallback
# is asked, which does no harm, and nothing else follows.
_OUT_OF_CREDIT = "credit balance is too low"

_LONG_ENOUGH = 10.0


def classify(
    error: BaseException,
    *,
    seconds: float = 0.0,
    timeout: float | None = None,
    handed_off: bool | None = None,
    answered: bool | None = None,
    broken: bool = False,
    wall: WallClock = time.time,  # noqa: TID251  # a Retry-After date is wall-clock time
) -> Verdict:
    """Judge how an attempt ended that raised `error`; never raises.

    Call it where the error was caught: what the callers up the stack were already handling is
    not taken for a cause.

    Args:
        error: What the attempt raised, in DSPy's or in LiteLLM's words.
        seconds: How long the attempt ran.
        timeout: The client's own timeout in seconds, or None. A timeout is the provider's failure
            if the attempt ran that long, or 10 s; else the caller was merely impatient.
        handed_off: Whether the request was handed to a provider; None if nobody knows. What was
            not is never a provider's fault, whatever status LiteLLM gives it.
        answered: Whether anything came back; None if that is not known.
        broken: Whether the HTTP client that it was sent through is closed by now, or its event
            loop is: then only an answer of the provider's is the provider's.
        wall: The wall clock that dates are compared with, in seconds since 1970.
    """
    if not isinstance(error, Exception):
        return _verdict(Kind.CANCELLED)
    if isinstance(error, ResilienceError) and not isinstance(error, DeadlineExceededError):
        return _verdict(Kind.REJECTED, hint=error.retry_after)
    causes = Causes(error)
    if broken and causes.wire_status is None:
        return _verdict(Kind.BROKEN)
    kind = Kind.LOCAL
    if handed_off is not False:
        kind = _kind(causes, handed_off=bool(handed_off), answered=answered)
    patience = min(_LONG_ENOUGH, timeout) if timeout is not None and timeout > 0 else _LONG_ENOUGH
    failed = kind is Kind.FAILURE or (kind is Kind.TIMEOUT and seconds >= patience)
    return _verdict(
        kind,
        Outcome.FAILURE if failed else Outcome.NEUTRAL,
        hint=hint_of(causes, wall),
        retry="LMLockTimeoutError" in causes.names,  # a lock file here, about to be released
        elsewhere=kind is Kind.REQUEST and causes.says(_OUT_OF_CREDIT),
    )


def _verdict(
    kind: Kind,
    outcome: Outcome = Outcome.NEUTRAL,
    *,
    hint: float | None = None,
    retry: bool = False,
    elsewhere: bool = False,
) -> Verdict:
    return Verdict(
        kind,
        outcome,
        retry=retry or kind in _AGAIN,
        next_target=elsewhere or kind in _ELSEWHERE,
        special=kind in _SPECIAL,
        retry_after=hint,
    )


def _kind(causes: Causes, *, handed_off: bool, answered: bool | None) -> Kind:
    kind = _named(_CERTAIN, causes)
    if kind is not None:
        return kind
    codes = set(causes.codes())
    if not _POLICY_CODES.isdisjoint(codes) or (causes.status == 403 and causes.is_flagged):  # noqa: PLR2004
        return Kind.POLICY
    if causes.status in _CODED and not _BILLING_CODES.isdisjoint(codes):
        return Kind.BILLING
    if causes.wire_status is not None:
        return _by_status(causes.wire_status)
    return _without_wire(causes, handed_off=handed_off, answered=answered)


def _without_wire(causes: Causes, *, handed_off: bool, answered: bool | None) -> Kind:
    if causes.sdk_refused:
        return Kind.LOCAL
    if causes.status == 504:  # noqa: PLR2004  # a gateway's timeout is a 5xx, not the client's
        return Kind.FAILURE
    kind = _named(_TELLING, causes)
    if kind is None and _is_unreadable_answer(causes, handed_off=handed_off):
        kind = Kind.FAILURE
    if kind is None and causes.mishap and answered is not None:
        kind = Kind.FAILURE if answered else Kind.LOCAL
    if kind is None and causes.status is not None:
        kind = _by_status(causes.status)
    if kind is None:
        kind = _named(_VAGUE, causes)
    return kind or (Kind.FAILURE if handed_off else Kind.LOCAL)


def _is_unreadable_answer(causes: Causes, *, handed_off: bool) -> bool:
    """Whether an answer came that is no JSON; of Gemini's, LiteLLM makes a 422."""
    if len(causes.chain) == 1 or _UNREADABLE.isdisjoint(causes.names):
        return False  # not taken for an answer
    return handed_off or causes.status != 400  # noqa: PLR2004  # our own tool call, misspelt


def _named(rules: Iterable[tuple[Kind, set[str]]], causes: Causes) -> Kind | None:
    return next((kind for kind, names in rules if not names.isdisjoint(causes.names)), None)


def _by_status(status: int) -> Kind:
    match status:
        case 401 | 403:
            return Kind.AUTH
        case 402:
            return Kind.BILLING
        case 408:
            return Kind.TIMEOUT
        case 429:
            return Kind.THROTTLED
        case _:
            return Kind.REQUEST if 400 <= status < 500 else Kind.FAILURE  # noqa: PLR2004


_CODE = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_.-]{1,64}")


def redacted(error: BaseException) -> str:
    """Return class, status and provider code of `error`, and nothing that a prompt could fill.

    Where no status was sent because the connection failed, that failure's class is named instead.
    """
    causes = Causes(error)
    if (fault := causes.connection_fault) is not None:
        return f"{type(error).__name__} {fault}"
    codes = (code for code in causes.codes() if _CODE.fullmatch(code))
    parts = (type(error).__name__, causes.status, next(codes, None))
    return " ".join(str(part) for part in parts if part is not None)


def empty_answer(response: Any) -> bool:
    """Whether `response` (outputs, or a provider's response) holds no choice at all.

    An empty text is a choice. What has no notion of choices is not empty.
    """
    if isinstance(response, (list, tuple)):
        return not response
    for name in ("choices", "outputs", "output"):
        if isinstance(response, Mapping):
            held = response.get(name)
        else:
            held = getattr(response, name, None)
        if isinstance(held, (list, tuple)):
            return not held
    return False
