"""Typical use, for a type checker: nothing here runs, and every type is the one a user gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, assert_type

from dspy.lm15 import Request, Response

from dspy_resilient import (
    AllTargetsFailedError,
    CachePolicy,
    CallRejectedError,
    CircuitBreaker,
    CircuitOpenError,
    CircuitPolicy,
    CircuitState,
    Clients,
    DeadlineExceededError,
    Health,
    HealthState,
    LimitPolicy,
    ResilienceError,
    ResilientLM,
    RetryPolicy,
)
from dspy_resilient.events import CircuitOpened, Event, Listener
from dspy_resilient.stats.stats import Stats


def build(on_event: Callable[[Event], object]) -> ResilientLM:
    """Every argument in its short and in its long form."""
    short = ResilientLM(
        "openai/gpt-4o-mini",
        temperature=0.7,
        max_tokens=1000,
        num_retries=3,
        cache=True,
        circuit=False,
        limits=8,
        fallbacks=["anthropic/claude-haiku-4-5"],
        api_key="...",
        timeout=30,
    )
    return ResilientLM(
        "openai/gpt-4o-mini",
        "chat",
        0.7,
        name="fast",
        cache=CachePolicy(max_entries=100, ttl=3600, disk=None, shared=False),
        circuit=CircuitPolicy(failure_threshold=3, mode="observe"),
        retry=RetryPolicy(max_attempts=2, base=0.5),
        limits=LimitPolicy(max_concurrent=16, rpm=600, tpm=90_000),
        fallbacks=[short, "openai/gpt-4o", {"model": "groq/llama"}],
        context_window_fallbacks=["gemini/gemini-2.5-pro"],
        policy_fallbacks=[short],
        max_wait=0,
        deadline=60,
        on_event=on_event,
    )


def wrong() -> None:
    """What the runtime refuses the type checker refuses too."""
    ResilientLM("m", max_wait="15")  # type: ignore[arg-type]  # a number
    ResilientLM("m", cache=5)  # type: ignore[arg-type]  # a bool or a policy
    ResilientLM("m", circuit=RetryPolicy())  # type: ignore[arg-type]  # another policy
    ResilientLM("m", limits="8")  # type: ignore[arg-type]  # an int or a policy
    ResilientLM("m", fallbacks=5)  # type: ignore[arg-type]  # a list
    CircuitPolicy(mode="off")  # type: ignore[arg-type]  # one of two
    CircuitPolicy(5)  # type: ignore[call-arg]  # by name only
    RetryPolicy().base = 1.0  # type: ignore[misc]  # frozen


def look(lm: ResilientLM) -> str:
    """What a client tells of itself."""
    assert_type(lm.name, str)
    assert_type(lm.max_wait, float)
    assert_type(lm.deadline, float | None)
    assert_type(lm.cache_policy, CachePolicy)
    assert_type(lm.circuits, dict[str, CircuitBreaker])
    assert_type(lm.circuit, CircuitBreaker | Any)  # no check for None where there is one
    lm.circuit.trip("maintenance")
    circuit: CircuitBreaker = lm.circuit
    assert_type(circuit.state, CircuitState)
    assert_type(circuit.last_error, str | None)
    circuit.force_open(seconds=60)
    circuit.reset()
    stats = lm.stats()
    assert_type(stats, Stats)
    assert_type(stats + stats, Stats)
    assert_type(stats - stats, Stats)
    assert_type(stats.recent, Stats | Any)
    assert_type(stats.latency.p95, float | None)
    assert_type(stats.hits, int)
    assert_type(stats.skipped, Mapping[str, int])
    assert_type(lm.explain(), str)
    return lm.explain()


def use(lm: ResilientLM, request: Request) -> None:
    """Calls, copies, and the end."""
    answers = lm("Capital of France?", temperature=1.0, cache=False, rollout_id=1)
    assert_type(answers, list[Any])
    assert_type(lm(request), Response)
    assert_type(lm(request=request, cache=False), Response)
    assert_type(lm.copy(temperature=1.0, max_wait=0), ResilientLM)
    lm.clear_cache()
    lm.reset()
    with lm as same:
        assert_type(same, ResilientLM)
    lm.close()


async def use_async(lm: ResilientLM, request: Request) -> None:
    """The same on an event loop."""
    assert_type(await lm.acall("Capital of France?"), list[Any])
    assert_type(await lm.acall(request), Response)
    async with lm as same:
        assert_type(same, ResilientLM)
    await lm.aclose()


def survive(lm: ResilientLM) -> float | None:
    """Errors carry what helps, with types."""
    try:
        lm("Capital of France?")
    except CircuitOpenError as error:
        assert_type(error.reason, str | None)
        assert_type(error.last_error, str | None)
    except CallRejectedError as error:
        assert_type(error.client, str | None)
        wait: float | None = error.retry_after
        return wait
    except DeadlineExceededError as error:
        assert_type(error.client, str | None)
    except AllTargetsFailedError as error:
        assert_type(error.errors, tuple[BaseException, ...])
    except ResilienceError as error:
        return None if error.client else 0.0
    return None


def listen(event: Event) -> None:
    """A listener tells the kinds of events apart by their class."""
    assert_type(event.client, str)
    assert_type(event.target, str | None)
    if isinstance(event, CircuitOpened):
        assert_type(event.seconds, float)
        assert_type(event.reason, str)


LISTENER: Listener = listen
PATIENT = replace(CircuitPolicy(), recovery_time=60.0)
assert_type(PATIENT, CircuitPolicy)


def shared() -> tuple[ResilientLM, ResilientLM]:
    """One circuit for two clients, on purpose."""
    circuit = CircuitBreaker(CircuitPolicy(), name="openai")
    return ResilientLM("openai/a", circuit=circuit), ResilientLM("openai/b", circuit=circuit)


class Mine(ResilientLM):
    """A subclass keeps its own type in copies."""


def keep(lm: Mine) -> Mine:
    """As the builder pattern wants it."""
    assert_type(lm.copy(), Mine)
    return lm.copy()


def named() -> None:
    """Named clients are a mapping to clients."""
    with Clients(grace=5) as clients:
        assert_type(clients.start("fast", "openai/gpt-4o-mini", limits=8), ResilientLM)
        assert_type(clients["fast"], ResilientLM)
        assert_type(clients.request("fast", "hello", timeout=5), list[Any])
        assert_type(clients.health(), dict[str, Health])
        assert_type(clients.health()["fast"].state, HealthState)


async def named_on_a_loop() -> None:
    """The same without blocking."""
    async with Clients() as clients:
        assert_type(clients, Clients)
        assert_type(await clients.arequest("fast", "hello"), list[Any])
        await clients.astop("fast", grace=0)
