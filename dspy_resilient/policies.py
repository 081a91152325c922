"""The options of a client, as values.

Frozen, keyword-only, validated when built, equal when equal, and with a repr that can be pasted
back; `dataclasses.replace` varies one. Zero and None are answers, not absences. Times are float
seconds. This module decides nothing else.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

_LONGEST_SHOWN = 16  # a key is longer


def shown(value: object) -> str:
    """Return `value` as an error message may show it: only what is too short to be a secret."""
    is_short = isinstance(value, str) and len(value) <= _LONGEST_SHOWN
    if value is None or is_short or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def number(
    owner: str,
    name: str,
    value: object,
    *,
    low: float = 0.0,
    above: bool = False,
    high: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Raise TypeError or ValueError unless `value` is a number within the range.

    Args:
        owner: Who takes the argument, for the message.
        name: The argument's name.
        value: What was given.
        low: Smallest allowed value (exclusive if `above`).
        above: Whether `low` itself is refused.
        high: Largest allowed value.
        whole: Whether it must be an int.
        optional: Whether None is allowed.
    """
    if value is None and optional:
        return
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    most = high if whole else min(high, sys.float_info.max)  # else no clock could add it
    if is_number and low <= value <= most and value not in (low if above else None, math.inf):  # type: ignore[operator]  # it is a number
        return
    edge = "greater than" if above else "at least"
    allowed = f"{'a whole number' if whole else 'a number'} {edge} {low:g}"
    allowed += f" and at most {high:g}" if high != math.inf else ""
    allowed += ", or None" if optional else ""
    kind = ValueError if is_number else TypeError
    raise kind(f"{owner}: {name} must be {allowed}; got {shown(value)}")


def one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in allowed
    ):
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{owner}: {name} must be one of {choices}; got {shown(value)}")


def text(owner: str, name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a non-empty str or None; never show it."""
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"{owner}: {name} must be a non-empty str or None; got a {type(value).__name__}"
        )
    if value == "":
        raise ValueError(f"{owner}: {name} must be a non-empty str or None; got ''")


def function(owner: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is None or can be called and has then done its work."""
    if value is None:
        return
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise TypeError(f"{owner}: {name} must be a plain function or None; got {shown(value)}")


class _Policy:
    """State round trip shared by the policies: plain JSON in, plain JSON out."""

    def dump(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; callables are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses
        return {name: value for name, value in values.items() if not callable(value)}

    @classmethod
    def load(cls, state: dict[str, Any]) -> Self:
        """Rebuild a policy from `dump()`."""
        return cls(**state)


@dataclass(frozen=True, kw_only=True)
class CircuitPolicy(_Policy):
    """When a circuit opens, how often an open one is probed, and what else counts.

    It opens on a run of failures that chance does not explain: `failure_threshold` in a row, and
    more where failures were common before (one in seven and more). At a share of q failures, n in a
    row come by chance with a probability of q ** n; below `surprise` it is an outage. Then one probe goes per interval, and
    the first answer closes it. The rules of rate and slowness are off unless asked for.

    Attributes:
        failure_threshold: Failures in a row without which it does not open. At least 1; default 5.
        surprise: Probability below which a run of failures is not taken for chance. 0 to 1, 0 for
            no run ever, 1 for `failure_threshold` in any weather; default 0.0001. Whatever the
            share of failures was, 100 in a row are enough.
        recovery_time: Seconds from opening to the first probe; those who waited are let go over
            half of that once it closes. Above 0; default 1.
        backoff: Factor from one interval between probes to the next. At least 1; default 1.5. (In
            simulations of 228 kinds of bad weather, 1.5 and half of `recovery_time` cost no more
            answers and requests than plain retries in 227, and 2 and the whole in 222.)
        max_recovery_time: Interval in seconds to which `backoff` leads; where `recovery_time` is
            longer, every interval is that. Above 0; default 5.
        jitter: Share by which an interval varies at random. 0 to 0.99; default 0.2.
        failure_rate: Share of failures in the window that opens it too, if there are
            `failure_threshold` of them. 0 to 1, or None (default) for no such rule.
        window: Seconds over which the rates are taken. Above 0; default 60.
        min_calls: Verdicts needed in the window before a rate counts. At least 1; default 10.
        slow_call: Seconds from which a success counts as slow, or None (default) for never. A slow
            one does not close an open circuit.
        slow_rate: Share of slow calls in the window that opens it. Above 0, at most 1; default 0.8.
        mode: "enforce" (default), or "observe": count and report, but never refuse.
        listen: "own" (default) learns from this client's calls only; "provider" also from every
            other LiteLLM call of the process to the same provider and endpoint: of other clients,
            an Embedder, or `litellm.completion`. (Where nothing has imported LiteLLM yet, from the
            first call of any client on.)
    """

    failure_threshold: int = 5
    surprise: float = 1e-4
    recovery_time: float = 1.0
    backoff: float = 1.5
    max_recovery_time: float = 5.0
    jitter: float = 0.2
    failure_rate: float | None = None
    window: float = 60.0
    min_calls: int = 10
    slow_call: float | None = None
    slow_rate: float = 0.8
    mode: Literal["enforce", "observe"] = "enforce"
    listen: Literal["own", "provider"] = "own"

    def __post_init__(self) -> None:
        """Check every field."""
        me = "CircuitPolicy"
        for name in ("failure_threshold", "min_calls"):
            number(me, name, getattr(self, name), low=1, whole=True)
        for name in ("window", "recovery_time", "max_recovery_time"):
            number(me, name, getattr(self, name), above=True)
        number(me, "surprise", self.surprise, high=1.0)
        number(me, "failure_rate", self.failure_rate, high=1.0, optional=True)
        number(me, "slow_call", self.slow_call, above=True, optional=True)
        number(me, "slow_rate", self.slow_rate, above=True, high=1.0)
        number(me, "backoff", self.backoff, low=1.0)
        number(me, "jitter", self.jitter, high=0.99)
        one_of(me, "mode", self.mode, ("enforce", "observe"))
        one_of(me, "listen", self.listen, ("own", "provider"))

    @classmethod
    def fuse(
        cls,
        failures: int = 5,
        seconds: float = 10.0,
        recovery_time: float = 5.0,
        backoff: float = 2.0,
    ) -> Self:
        """Return the policy of a classic fuse: it counts failures, whatever succeeded meanwhile.

        Args:
            failures: Failures that blow it. At least 1.
            seconds: Stretch of time within which they must lie. Above 0.
            recovery_time: Seconds until the first probe. Above 0.
            backoff: Factor from one interval between probes to the next, at most a minute (or
                `recovery_time`, if that is longer). At least 1.
        """
        me = "CircuitPolicy.fuse"
        number(me, "failures", failures, low=1, whole=True)
        number(me, "seconds", seconds, above=True)
        number(me, "recovery_time", recovery_time, above=True)
        number(me, "backoff", backoff, low=1.0)
        return cls(
            failure_threshold=failures,
            surprise=0.0,
            recovery_time=recovery_time,
            backoff=backoff,
            max_recovery_time=60.0,
            jitter=0.0,
            failure_rate=0.0,
            window=seconds,
            min_calls=1,
        )


@dataclass(frozen=True, kw_only=True)
class CachePolicy(_Policy):
    """What is remembered, for how long, and how much of it.

    Attributes:
        max_entries: Answers kept in memory. At least 1; default 10,000.
        max_bytes: Bytes kept in memory, by estimate, or None (default) for no bound.
        ttl: Seconds an answer stays fresh, or None (default) for ever.
        stale_if_error: Seconds past `ttl` during which an expired answer may still be served while
            the circuit is open or the attempts failed. None (default): never.
        store_if: Called with the history entry of an answer that could be stored; its verdict
            replaces the built-in rule (complete and usable answers only). None (default).
        coalesce_max_age: Seconds behind which an identical call no longer waits for one that is
            under way, but sends its own. At least 0; default 60.
        disk: Where answers outlive the process: "auto" (default: where DSPy keeps its own disk
            cache, if that is on), a folder, or None for nowhere.
        disk_bytes: Bytes kept on disk. At least 1 MiB; default 1 GiB.
        tenant: Name that separates answers of different users; None (default) separates by a hash
            of the API key. A saved program holds it, a repr does not.
        shared: Whether processes that share a store (`ResilientLM(shared=...)`) find each other's
            answers there, behind memory and disk. Default False: none leaves this machine.
    """

    max_entries: int = 10_000
    max_bytes: int | None = None
    ttl: float | None = None
    stale_if_error: float | None = None
    store_if: Callable[[dict[str, Any]], bool] | None = None
    coalesce_max_age: float = 60.0
    disk: str | os.PathLike[str] | None = "auto"
    disk_bytes: int = 2**30
    tenant: str | None = field(default=None, repr=False)
    shared: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        me = "CachePolicy"
        number(me, "max_entries", self.max_entries, low=1, whole=True)
        number(me, "max_bytes", self.max_bytes, low=1, whole=True, optional=True)
        number(me, "ttl", self.ttl, above=True, optional=True)
        number(me, "stale_if_error", self.stale_if_error, above=True, optional=True)
        number(me, "coalesce_max_age", self.coalesce_max_age)
        number(me, "disk_bytes", self.disk_bytes, low=2**20, whole=True)
        function(me, "store_if", self.store_if)
        if isinstance(self.disk, os.PathLike):
            object.__setattr__(self, "disk", os.fspath(self.disk))
        text(me, "disk", self.disk)
        text(me, "tenant", self.tenant)
        one_of(me, "shared", self.shared, (True, False))
        if self.stale_if_error is not None and self.ttl is None:
            raise ValueError(
                f"{me}: stale_if_error={self.stale_if_error!r} needs a ttl; without one nothing expires"
            )

    @property
    def kept(self) -> float:
        """Seconds that an answer is of any use, or inf."""
        return math.inf if self.ttl is None else self.ttl + (self.stale_if_error or 0.0)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(_Policy):
    """How often a failed attempt is repeated, and how patiently.

    The pauses double: 1, 2, 4 … seconds, each varied at random so that callers do not go in step.

    Attributes:
        max_attempts: Attempts per target, the first included. At least 1; default 4.
        base: First pause in seconds. At least 0; default 1.
        cap: Longest pause in seconds. At least 0; default 30.
        jitter: Share by which a pause varies at random. 0 to 1; default 0.25.
    """

    max_attempts: int = 4
    base: float = 1.0
    cap: float = 30.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        """Check every field."""
        me = "RetryPolicy"
        number(me, "max_attempts", self.max_attempts, low=1, whole=True)
        number(me, "base", self.base)
        number(me, "cap", self.cap)
        number(me, "jitter", self.jitter, high=1.0)

    def pause(self, failures: int, draw: float) -> float:
        """Return the seconds to wait after so many earlier failures.

        Args:
            failures: Failed attempts before the one that has just failed.
            draw: A number from 0 to below 1.
        """
        seconds = min(self.cap, self.base * 2.0 ** min(failures, 1000))
        return seconds * (1 + self.jitter * (2 * draw - 1))


@dataclass(frozen=True, kw_only=True)
class LimitPolicy(_Policy):
    """How much is sent to one target at a time and per minute.

    Where clients share a store (`ResilientLM(shared=...)`), the rates are those of all of them
    together, as far as they use the same `api_key`; how much is sent at a time, each decides.

    Attributes:
        max_concurrent: Attempts under way at once, or None (default) for no limit. At least 1.
        max_queue: Calls that may wait for a place, or None (default) for no limit. At least 0.
        rpm: Attempts per minute, or None (default). Above 0.
        tpm: Tokens per minute, prompt and answer together, or None (default). Above 0.
        max_dollars: Dollars that this client's calls may cost together, fallbacks included, or None
            (default). Above 0. What does not fit raises BudgetExceededError; see `Budget`.
        per: How long that lasts: "client" (default) for the client's life, or a "day" or an "hour"
            of UTC. Where clients share a store, those of one name have one budget.
        adaptive: Whether the concurrency limit adapts: halved on a 429, lowered on slow answers,
            raised by one for each limit-full of clean ones. Default False.
    """

    max_concurrent: int | None = None
    max_queue: int | None = None
    rpm: float | None = None
    tpm: float | None = None
    max_dollars: float | None = None
    per: Literal["client", "day", "hour"] = "client"
    adaptive: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        me = "LimitPolicy"
        number(me, "max_concurrent", self.max_concurrent, low=1, whole=True, optional=True)
        number(me, "max_queue", self.max_queue, low=0, whole=True, optional=True)
        number(me, "rpm", self.rpm, above=True, optional=True)
        number(me, "tpm", self.tpm, above=True, optional=True)
        number(me, "max_dollars", self.max_dollars, above=True, optional=True)
        one_of(me, "per", self.per, ("client", "day", "hour"))
        one_of(me, "adaptive", self.adaptive, (True, False))
