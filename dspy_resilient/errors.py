"""Every error this package raises.

    dspy.LMError
    └─ ResilienceError
       ├─ CallRejectedError            we refused; nothing was sent
       │  ├─ CircuitOpenError          also a circuitbreaker.CircuitBreakerError
       │  ├─ ThrottledError            the provider asked us to wait longer than this call may
       │  ├─ LimitExceededError        bulkhead full or rate budget spent
       │  ├─ BudgetExceededError       the call does not fit a budget
       │  └─ ClientClosedError         close() was called
       ├─ DeadlineExceededError        the call's own deadline passed
       ├─ AllTargetsFailedError        the primary and every fallback failed or were rejected
       ├─ RestartLimitError            the client broke more often than supervision allows
       └─ BrokenStateError             our own limits or in-flight table are in a state they cannot be in

None is retryable for DSPy and none is a ValueError, so neither DSPy's retry loop nor an adapter
takes one for a bad answer. A provider's own error is not wrapped: it leaves as it came. Messages
name the client and what to do; they hold no key, no prompt and no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import circuitbreaker
from dspy import LMError

if TYPE_CHECKING:
    from collections.abc import Sequence


class ResilienceError(LMError):
    """Base of all errors raised by this package.

    Attributes:
        client: Name of the client (the `ResilientLM`) that raised it.
        retry_after: Seconds until trying again makes sense, or None if unknown.
        attempts: The attempts made by the call so far, oldest first.
    """

    default_code = "resilience"

    def __init__(self, message: str = "", *, client: str | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.client = client
        self.attempts: tuple[Any, ...] = ()


class CallRejectedError(ResilienceError):
    """We refused the call before anything was sent."""

    default_code = "rejected"


class CircuitOpenError(CallRejectedError, circuitbreaker.CircuitBreakerError):
    """The circuit is open: the provider failed lately and is left alone for now.

    Attributes:
        reason: Why the circuit opened, e.g. "failures", "billing", "auth", "manual".
        last_error: Redacted text of the failure that opened it, or None.
    """

    default_code = "circuit_open"

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        last_error: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        prefix = f"[{self.model}] " if self.model else ""
        self.args = (prefix + self.message,)  # the package's class has emptied them
        self.reason = reason
        self.last_error = last_error

    def __str__(self) -> str:
        return str(LMError.__str__(self))  # the package's class would ask its breaker


class ThrottledError(CallRejectedError):
    """The provider asked for a longer pause than this call may wait."""

    default_code = "throttled"


class LimitExceededError(CallRejectedError):
    """A limit of our own is used up: too many calls at once, or the rate budget is spent."""

    default_code = "limit_exceeded"


class BudgetExceededError(CallRejectedError):
    """The call does not fit a budget; see `Budget` and `LimitPolicy.max_dollars`.

    Attributes:
        unit: What there is too little of: "dollars", "tokens" or "requests".
        spent: How much of it has been spent.
        reserved: How much of it is reserved for requests under way.
        limit: How much of it there is in all.
        is_lent: Whether it is the budget of a fallback's own client: another target may do.
    """

    default_code = "budget_exceeded"

    def __init__(
        self,
        message: str = "",
        *,
        unit: str = "dollars",
        spent: float = 0.0,
        reserved: float = 0.0,
        limit: float = 0.0,
        is_lent: bool = False,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.unit = unit
        self.spent = spent
        self.reserved = reserved
        self.limit = limit
        self.is_lent = is_lent


class ClientClosedError(CallRejectedError):
    """The client was closed."""

    default_code = "client_closed"


class DeadlineExceededError(ResilienceError):
    """The call's deadline passed before an answer arrived."""

    default_code = "deadline_exceeded"


class AllTargetsFailedError(ResilienceError):
    """The primary and every fallback failed or were rejected.

    Attributes:
        errors: One error per target, in the order they were tried. The last is also `__cause__`.
    """

    default_code = "all_targets_failed"

    def __init__(
        self, message: str = "", *, errors: Sequence[BaseException] = (), **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.errors = tuple(errors)


class RestartLimitError(ResilienceError):
    """The client broke more often than supervision allows; `restart()` clears it."""

    default_code = "restart_limit"


class BrokenStateError(ResilienceError):
    """Our own limits or in-flight table are in a state they cannot be in, which is a fault of ours.

    It restarts the client, and the call is tried once more; a caller sees it only if that broke, too.
    """

    default_code = "broken_state"
