"""A circuit alone, beside other packages': one call of an empty function, let through or refused.

    python tests/benchmarks/breakers.py

Each is used as its documentation shows, on one thread, taking turns; medians. A refusal includes
raising and catching the package's error.
"""

from __future__ import annotations

import statistics
import time

import circuitbreaker
import interlock
import purgatory
import pybreaker

from dspy_resilient import CircuitBreaker, CircuitPolicy

ROUNDS, TIMES = 41, 2000


def answer():
    pass


def with_pybreaker():
    breaker = pybreaker.CircuitBreaker()
    return lambda: breaker.call(answer), breaker.open


def with_purgatory():
    factory = purgatory.SyncCircuitBreakerFactory(default_ttl=300)
    breaker = factory.get_breaker("a")
    call = factory("a")(answer)

    def trip():
        for _ in range(5):
            try:
                with breaker:
                    raise ConnectionError
            except ConnectionError:
                pass

    return call, trip


def with_interlock():
    breaker = interlock.CircuitBreaker(name="a")
    return lambda: breaker.call_sync(answer), breaker.force_open


def with_circuitbreaker():
    breaker = circuitbreaker.CircuitBreaker(recovery_timeout=300)
    call = breaker.decorate(answer)

    def fail():
        raise ConnectionError

    def trip():
        broken = breaker.decorate(fail)
        for _ in range(5):
            try:
                broken()
            except ConnectionError:
                pass

    return call, trip


def with_ours():
    breaker = CircuitBreaker(CircuitPolicy(recovery_time=200))
    return breaker.decorate(answer), breaker.trip


def with_our_permits():
    breaker = CircuitBreaker(CircuitPolicy(recovery_time=200))

    def call():
        permit = breaker.try_admit()
        if permit is not None:
            permit.success()

    return call, breaker.trip


CANDIDATES = {
    "circuitbreaker": with_circuitbreaker,
    "pybreaker": with_pybreaker,
    "purgatory": with_purgatory,
    "interlock-cb": with_interlock,
    "ours, decorated": with_ours,
    "ours, permits (as calls use it)": with_our_permits,
}


def nanoseconds(call):
    begun = time.perf_counter()
    for _ in range(TIMES):
        try:
            call()
        except Exception:
            pass
    return (time.perf_counter() - begun) / TIMES * 1e9


def peers():
    """Return the nanoseconds of a call let through and of one refused, by package."""
    built = {name: build() for name, build in CANDIDATES.items()}
    closed = _medians(built)
    for name, (call, trip) in built.items():
        trip()
        if "permits" not in name:
            _must_refuse(name, call)
    opened = _medians(built)
    return {name: {"closed": closed[name], "open": opened[name]} for name in built}


def _medians(built):
    taken = {name: [] for name in built}
    for _ in range(ROUNDS):
        for name, (call, _) in built.items():
            taken[name].append(nanoseconds(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def _must_refuse(name, call):
    try:
        call()
    except Exception:
        return
    raise AssertionError(f"{name} let a call through when it should have been open")


if __name__ == "__main__":
    for name, row in peers().items():
        print(f"{name:34} closed {row['closed']:8,.0f} ns   open {row['open']:8,.0f} ns")
