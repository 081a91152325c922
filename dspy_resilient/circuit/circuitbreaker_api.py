"""The side of the circuit that the `circuitbreaker` package knows.

Its arguments, its decorator and `with` forms, its monitor. This module asks for permits and reports
through them; the state is kept by `breaker.py`.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from concurrent.futures import CancelledError
from contextlib import aclosing
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import circuitbreaker

from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.errors import CallRejectedError
from dspy_resilient.policies import CircuitPolicy, number

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from types import TracebackType

    from dspy_resilient.circuit.permit import Permit
    from dspy_resilient.errors import CircuitOpenError

_OURS = (CallRejectedError, circuitbreaker.CircuitBreakerError, CancelledError)
"""Exceptions that say nothing about the provider: it was not asked, or not waited for."""

_entered: ContextVar[tuple[Permit, ...]] = ContextVar("dspy_resilient_entered", default=())
"""Permits of the `with breaker:` blocks that this thread or task is in."""


def package_policy(owner: Any, failure_threshold: Any, recovery_timeout: Any) -> CircuitPolicy:
    """Return the policy that behaves like the package's numbers; None means `owner`'s default."""
    if failure_threshold is None:
        failure_threshold = owner.FAILURE_THRESHOLD
    if recovery_timeout is None:
        recovery_timeout = owner.RECOVERY_TIMEOUT
    number("CircuitBreaker", "failure_threshold", failure_threshold, low=1, whole=True)
    number("CircuitBreaker", "recovery_timeout", recovery_timeout, above=True)
    return CircuitPolicy(
        failure_threshold=failure_threshold,
        surprise=1.0,
        recovery_time=recovery_timeout,
        backoff=1.0,
        jitter=0.0,
    )


class _Decorator(circuitbreaker.CircuitBreaker):
    """Decorates as the package does, and leaves it to `circuit` which calls are refused."""

    opened = False

    def __init__(self, circuit: Wrapping) -> None:
        self._name = circuit.name
        self.call = circuit.call
        self.call_async = circuit.call_async
        self.call_generator = circuit.call_generator
        self.call_async_generator = circuit.call_async_generator


class Wrapping(circuitbreaker.CircuitBreaker):
    """A `circuitbreaker.CircuitBreaker` that asks before each call and reports after it.

    It decorates functions, coroutine functions, generators and async generators, and guards
    `with` and `async with` blocks. An exception is a failure if it is an `Exception` that
    `expected_exception` covers. Anything else is neutral: other exceptions, our own refusals,
    cancellation, Ctrl-C, a consumer that stops iterating. A generator's call lasts from its first
    item to its end.

    The package decorates; asking and reporting are ours, for its own `with self` could neither hand a
    call that is refused at the last moment to the fallback, nor carry a permit from one context to
    another, as generators need.

    The package's form (no policy: `failure_threshold`, `recovery_timeout`, `expected_exception`,
    `name`, `fallback_function`, each None for the class attribute) behaves as the package
    documents: fixed recovery time, one success closes. It differs where the package errs:

    - half-open lets one call through at a time, not all of them;
    - a cancelled call, or an exception that is not expected, is neutral, not a success;
    - a result from before the circuit opened neither closes it nor keeps it open longer;
    - 0 is refused with a ValueError, not replaced by the default;
    - `with breaker:` and `call()` ask, and so may raise `CircuitOpenError`;
    - an abandoned generator is neutral; `send` and `throw` reach a generator;
    - a name is made unique ("name-2"), so that no breaker hides another in the monitor, which holds
      a weak proxy (equal to the breaker, not identical) until the breaker is gone;
    - `last_failure` is a redacted text, and `open_remaining` is exact and 0.0 unless open.

    A `with breaker:` block must be left by the thread or task that entered it, innermost first.
    Where that is not sure (a block around a `yield`), use the decorator, or `breaker.admit()`.
    """

    _entries: dict[str, Any] = circuitbreaker.CircuitBreakerMonitor.circuit_breakers

    @abstractmethod
    def try_admit(self) -> Permit | None:
        """Return leave to make one call, or None."""

    @abstractmethod
    def admit(self) -> Permit:
        """Return leave to make one call, or raise."""

    @abstractmethod
    def rejection(self) -> CircuitOpenError:
        """Return the error for a refused call."""

    @property
    @abstractmethod
    def state(self) -> CircuitState:
        """What a call would find now."""

    @property
    @abstractmethod
    def last_error(self) -> str | None:
        """Redacted text of the last failure."""

    @property
    @abstractmethod
    def open_remaining(self) -> float:
        """Seconds it still refuses every call."""

    def __enter__(self) -> Permit:
        """Ask for leave, and return the permit; what the block does not report, its end does."""
        permit = self.admit()
        _entered.set((*_entered.get(), permit))
        return permit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Report how the block ended."""
        entered = _entered.get()
        for place in reversed(range(len(entered))):
            if entered[place].circuit is self:
                _entered.set(entered[:place] + entered[place + 1 :])
                if error is None:
                    entered[place].success()
                else:
                    self.settle(entered[place], error)
                return

    async def __aenter__(self) -> Permit:
        """Do what `__enter__` does."""
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `__exit__` does."""
        self.__exit__(kind, error, traceback)

    def settle(self, permit: Permit, error: BaseException) -> None:
        """Report through `permit` what `error` says about the provider."""
        try:
            if (
                isinstance(error, Exception)
                and not isinstance(error, _OURS)
                and self.is_failure(type(error), error)
            ):
                permit.failure(error, retry_after=getattr(error, "retry_after", None))
        finally:
            permit.neutral()  # unless reported: the error is not expected, or the predicate raised

    def decorate(self, function: Callable[..., Any]) -> Any:
        """Return `function` guarded by this circuit; it names a circuit that has no name."""
        if self.name is None:
            self._enter_monitor(getattr(function, "__qualname__", type(function).__qualname__))
        guarded = _Decorator(self).decorate(function)
        self._entries[str(self.name)] = (
            self._entry
        )  # where the package has registered the decorator
        return guarded

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func` under this circuit; if refused, call the fallback or raise."""
        permit = self.try_admit()
        if permit is None:
            return self._instead()(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self.settle(permit, error)
            raise
        permit.success()
        return result

    async def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what `call` does for a coroutine function."""
        permit = self.try_admit()
        if permit is None:
            return await self._instead()(*args, **kwargs)
        try:
            result = await func(*args, **kwargs)
        except BaseException as error:
            self.settle(permit, error)
            raise
        permit.success()
        return result

    def call_generator(
        self, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Generator[Any, Any, Any]:
        """Do what `call` does for a generator function, from the first item to the end."""
        permit = self.try_admit()
        if permit is None:
            return (yield from self._instead()(*args, **kwargs))
        try:
            result = yield from func(*args, **kwargs)
        except BaseException as error:
            self.settle(permit, error)
            raise
        permit.success()
        return result

    async def call_async_generator(
        self, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        """Do what `call` does for an async generator function, from the first item to the end."""
        permit = self.try_admit()
        if permit is None:
            async for item in self._instead()(*args, **kwargs):
                yield item
            return
        try:
            async with aclosing(func(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except BaseException as error:
            self.settle(permit, error)
            raise
        permit.success()

    def _instead(self) -> Callable[..., Any]:
        if self.fallback_function is None:
            raise self.rejection()
        fallback: Callable[..., Any] = self.fallback_function
        return fallback

    @property
    def opened(self) -> bool:
        """Whether every call is refused."""
        return self.state in (CircuitState.OPEN, CircuitState.FORCED_OPEN)

    @property
    def closed(self) -> bool:
        """Whether every call is let through."""
        return self.state in (CircuitState.CLOSED, CircuitState.FORCED_CLOSED)

    @property
    def last_failure(self) -> str | None:
        """The same as `last_error`: a redacted text, where the package has the exception."""
        return self.last_error

    @property
    def open_until(self) -> datetime:
        """Wall-clock time until which every call is refused, for people; the last one if for ever."""
        try:
            until: datetime = super().open_until
        except OverflowError:
            return datetime.max.replace(tzinfo=UTC)
        return until

    def _enter_monitor(self, name: str) -> None:
        """Take `name`, or the first free variation of it, and be found under it while alive."""
        entries = self._entries
        for unique in chain([name], (f"{name}-{n}" for n in count(2))):

            def remove(dead: Any, unique: str = unique) -> None:
                if entries.get(unique) is dead:
                    del entries[unique]

            entry = weakref.proxy(self, remove)
            if entries.setdefault(unique, entry) is entry:
                self._name, self._entry = unique, entry
                return
