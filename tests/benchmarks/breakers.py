"""A circuit alone, beside other packages': one call of an empty function, let through or refused.

    python tests/benchmarks/breakers.py

Each is used as its documentation shows, by one thread and by eight at once on one breaker, taking
turns; medians. Of eight threads the time of all is divided by the calls of all. A refusal includes
raising and catching the package's error. The ratios are to the package named first.
"""

from __future__ import annotations

import statistics
import threading
import time

import circuitbreaker
import interlock
import purgatory
import pybreaker

from dspy_resilient import CircuitBreaker, CircuitPolicy

ROUNDS, TIMES = 41, 2000
CROWD = 8
CROWD_ROUNDS, CROWD_TIMES = 15, 4000  # so many that the threads cut into each other's calls


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
    begun, ended = _repeat(call, TIMES)
    return (ended - begun) / TIMES * 1e9


def nanoseconds_of_a_crowd(call):
    together, spans = threading.Barrier(CROWD), []

    def work():
        together.wait()
        spans.append(_repeat(call, CROWD_TIMES))

    threads = [threading.Thread(target=work) for _ in range(CROWD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun, ended = zip(*spans, strict=True)
    return (max(ended) - min(begun)) / (CROWD * CROWD_TIMES) * 1e9


def _repeat(call, times):
    begun = time.perf_counter()
    for _ in range(times):
        try:
            call()
        except Exception:
            pass
    return begun, time.perf_counter()


def peers():
    """Return the nanoseconds of a call let through, of one among eight threads, and of one refused.

    By package, each with its ratio to the first package's.
    """
    built = {name: build() for name, build in CANDIDATES.items()}
    columns = {
        "closed": _medians(built, nanoseconds, ROUNDS),
        "closed, 8 threads": _medians(built, nanoseconds_of_a_crowd, CROWD_ROUNDS),
    }
    for name, (call, trip) in built.items():
        trip()
        if "permits" not in name:
            _must_refuse(name, call)
    columns["open"] = _medians(built, nanoseconds, ROUNDS)
    return {name: _row(columns, name) for name in built}


def _row(columns, name):
    row = {}
    for column, times in columns.items():
        row[column] = times[name]
        row[f"{column}, ratio"] = times[name] / next(iter(times.values()))
    return row


def _medians(built, measure, rounds):
    taken = {name: [] for name in built}
    for _ in range(rounds):
        for name, (call, _) in built.items():
            taken[name].append(measure(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def _must_refuse(name, call):
    try:
        call()
    except Exception:
        return
    raise AssertionError(f"{name} let a call through when it should have been open")


def cells(row):
    """Yield the figures of a row for people: nanoseconds, and the ratio to the first package's."""
    for column in ("closed", "closed, 8 threads", "open"):
        yield f"{row[column]:,.0f} ns ({row[f'{column}, ratio']:.2f})"


if __name__ == "__main__":
    print(f"{'':34}{'closed':>18}{'by 8 threads':>18}{'open':>18}")
    for name, row in peers().items():
        print(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells(row)))
