"""The words for how a request ended, and for what follows from it.

This module owns the names only. `classify.py` decides which of them an error deserves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What a finished call says about the provider.

    A neutral one says nothing: it counts nowhere and resets nothing.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


class Kind(StrEnum):
    """How an attempt ended.

    ANSWER: with an answer, be it truncated, filtered or unparsable.
    FAILURE: the provider or the way to it failed: 5xx, no connection, a cut stream, a rubbish body.
    TIMEOUT: the client's, the caller's or our own time was over.
    THROTTLED: a 429; the provider asks for a pause.
    BILLING: the account behind the credential is empty or blocked.
    AUTH: the credential was refused.
    CONTEXT: the prompt is too long for this model.
    POLICY: a content filter refused the prompt.
    REQUEST: the request is at fault, and would be so again.
    REJECTED: we refused; this target was not asked.
    BROKEN: the means of sending are closed or gone: an HTTP client, an event loop.
    CANCELLED: nobody waits for the answer any more.
    LOCAL: the fault lies in this process.
    """

    ANSWER = "answer"
    FAILURE = "failure"
    TIMEOUT = "timeout"
    THROTTLED = "throttled"
    BILLING = "billing"
    AUTH = "auth"
    CONTEXT = "context"
    POLICY = "policy"
    REQUEST = "request"
    REJECTED = "rejected"
    BROKEN = "broken"
    CANCELLED = "cancelled"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from how an attempt ended.

    Attributes:
        kind: How it ended.
        outcome: What the circuit of the target hears. AUTH and BILLING are neutral to it: they
            concern the credential, whose own circuit is opened by `kind`.
        retry: Whether the same target may be asked again.
        next_target: Whether a fallback may be asked.
        special: Whether a fallback kept for this `kind` alone may be asked.
        retry_after: Seconds the provider asked for, unclamped, or None.
    """

    kind: Kind
    outcome: Outcome
    retry: bool
    next_target: bool
    special: bool
    retry_after: float | None = None
