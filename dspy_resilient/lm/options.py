"""What a user may pass to `ResilientLM` beyond `dspy.LM`'s arguments, checked and in long form."""

from __future__ import annotations

from typing import Any

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.pipeline.options import Options
from dspy_resilient.policies import (
    CachePolicy,
    CircuitPolicy,
    LimitPolicy,
    RetryPolicy,
    function,
    number,
    shown,
    text,
)
from dspy_resilient.targets.keywords import OF_THE_CLIENT, refuse_misspelt


class _DefaultRetries(int):
    """A default that can be told from the same number given by a user."""


class _DefaultEngine(str):
    """A default that can be told from the same name given by a user."""

    __slots__ = ()


UNSET: Any = _DefaultRetries(3)
DEFAULT_ENGINE: Any = _DefaultEngine("litellm")
_ME = "ResilientLM"


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
    shared: Any,
) -> Options:
    """Return the options in long form.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range, or two contradict each other.
    """
    text(_ME, "name", name)
    function(_ME, "on_event", on_event)
    if shared is not None and isinstance(circuit, CircuitBreaker):
        raise ValueError(
            f"{_ME}: circuit=a CircuitBreaker and shared contradict each other; give a CircuitPolicy"
        )
    cache = _policy("cache", cache, CachePolicy) or CachePolicy()
    if cache.shared and shared is None:
        raise ValueError(
            f"{_ME}: CachePolicy(shared=True) needs a store; give shared= its address, or a Store"
        )
    return Options(
        name=name or model,
        cache=cache,
        circuit=_policy("circuit", circuit, CircuitPolicy, CircuitBreaker),
        retry=_retry(retry, num_retries),
        limits=_limits(limits),
        on_event=on_event,
        shared=shared,
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
        raise TypeError(f"{_ME}: cache must be True, False or None here; got {shown(cache)}")


def refuse_to_copy(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for what a copy cannot have for itself."""
    if owned := sorted(OF_THE_CLIENT & kwargs.keys()):
        raise TypeError(
            f"{_ME}.copy: {', '.join(owned)} belongs to the client that all copies share; build a "
            "new ResilientLM instead"
        )
    refuse_misspelt(kwargs)


def check_attribute(name: str, value: Any) -> None:
    """Raise TypeError or ValueError for an attribute that a client cannot have, or not like that."""
    if name in ("max_wait", "deadline", "num_retries", "cache"):
        check_call_options(**{name: value})
    elif name in OF_THE_CLIENT:
        raise AttributeError(
            f"{_ME}: {name} is said at construction, for the client and all its copies; build a new "
            "ResilientLM instead"
        )
    else:
        refuse_misspelt((name,))


def _policy(name: str, value: Any, *kinds: type[Any]) -> Any:
    if value is True:
        return kinds[0]()
    if value is False:
        return None
    if not isinstance(value, kinds):
        allowed = " or a ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{_ME}: {name} must be True, False or a {allowed}; got {shown(value)}")
    return value


def _limits(value: Any) -> LimitPolicy | None:
    if value is None or isinstance(value, LimitPolicy):
        return value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < 1:
        kind = ValueError if is_whole else TypeError
        raise kind(
            f"{_ME}: limits must be a LimitPolicy, a whole number at least 1, or None; got "
            f"{shown(value)}"
        )
    return LimitPolicy(max_concurrent=value)


def _retry(retry: Any, num_retries: Any) -> RetryPolicy:
    """Return the policy; DSPy's `num_retries` must say the same if both are given."""
    if num_retries is not UNSET:
        number(_ME, "num_retries", num_retries, whole=True)
    if retry is None:
        return RetryPolicy() if num_retries is UNSET else RetryPolicy(max_attempts=num_retries + 1)
    if not isinstance(retry, RetryPolicy):
        raise TypeError(f"{_ME}: retry must be a RetryPolicy or None; got {shown(retry)}")
    if num_retries is not UNSET and num_retries + 1 != retry.max_attempts:
        raise ValueError(
            f"{_ME}: num_retries={num_retries} and retry.max_attempts={retry.max_attempts} "
            "contradict each other; give one of them"
        )
    return retry
