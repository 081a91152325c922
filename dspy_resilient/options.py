"""What a user may pass to `ResilientLM` beyond `dspy.LM`'s arguments, checked and in long form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.policies import (
    CachePolicy,
    CircuitPolicy,
    LimitPolicy,
    RetryPolicy,
    number,
    text,
)

if TYPE_CHECKING:
    from dspy_resilient.events import Listener

UNSET: Any = object()
_ME = "ResilientLM"
_NOT_YET = ("shared", "context_window_fallbacks", "policy_fallbacks")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything the shared part of a client is built from.

    Attributes:
        name: Name of the client.
        cache: What is remembered.
        circuit: When circuits open; None for no circuit; or a circuit shared on purpose.
        retry: How failed attempts are repeated.
        limits: How much is sent at a time, or None for no limit.
        on_event: The user's listener, or None.
    """

    name: str
    cache: CachePolicy
    circuit: CircuitPolicy | CircuitBreaker | None
    retry: RetryPolicy
    limits: LimitPolicy | None = None
    on_event: Listener | None = None


def build_options(
    *,
    model: str,
    name: Any,
    cache: Any,
    circuit: Any,
    retry: Any,
    num_retries: Any,
    limits: Any,
    on_event: Any,
) -> Options:
    """Return the options in long form.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range, or two contradict each other.
    """
    text(_ME, "name", name)
    if on_event is not None and not callable(on_event):
        raise TypeError(f"{_ME}: on_event must be callable or None; got {on_event!r}")
    return Options(
        name=name or model,
        cache=_policy("cache", cache, CachePolicy) or CachePolicy(),
        circuit=circuit
        if isinstance(circuit, CircuitBreaker)
        else _policy("circuit", circuit, CircuitPolicy),
        retry=_retry(retry, num_retries),
        limits=_limits(limits),
        on_event=on_event,
    )


def check_call_options(
    *, max_wait: Any = 0.0, deadline: Any = None, num_retries: Any = UNSET, cache: Any = None
) -> None:
    """Raise TypeError or ValueError for what an instance, a copy or a call may set for itself."""
    number(_ME, "max_wait", max_wait)
    number(_ME, "deadline", deadline, above=True, optional=True)
    if num_retries is not UNSET:
        number(_ME, "num_retries", num_retries, whole=True)
    if cache is not None and not isinstance(cache, bool):
        raise TypeError(f"{_ME}: cache must be True, False or None here; got {cache!r}")


def refuse_missing(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument of ours that does nothing yet, rather than ignore it."""
    for name in _NOT_YET:
        if name in kwargs:
            raise TypeError(f"{_ME}: {name} is not available yet")


def _policy(name: str, value: Any, kind: type[Any]) -> Any:
    if value is True:
        return kind()
    if value is False:
        return None
    if not isinstance(value, kind):
        raise TypeError(f"{_ME}: {name} must be True, False or a {kind.__name__}; got {value!r}")
    return value


def _limits(value: Any) -> LimitPolicy | None:
    if value is None or isinstance(value, LimitPolicy):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_ME}: limits must be a LimitPolicy, an int or None; got {value!r}")
    return LimitPolicy(max_concurrent=value)


def _retry(retry: Any, num_retries: Any) -> RetryPolicy:
    """Return the policy; DSPy's `num_retries` must say the same if both are given."""
    if num_retries is not UNSET:
        number(_ME, "num_retries", num_retries, whole=True)
    if retry is None:
        return RetryPolicy() if num_retries is UNSET else RetryPolicy(max_attempts=num_retries + 1)
    if not isinstance(retry, RetryPolicy):
        raise TypeError(f"{_ME}: retry must be a RetryPolicy or None; got {retry!r}")
    if num_retries is not UNSET and num_retries + 1 != retry.max_attempts:
        raise ValueError(
            f"{_ME}: num_retries={num_retries} and retry.max_attempts={retry.max_attempts} "
            "contradict each other; give one of them"
        )
    return retry
