"""What a circuit costs: admission and report, and a rejection, beside stock `circuitbreaker`.

    python tests/benchmarks/circuit.py

Every figure is nanoseconds per operation: the median of many short rounds, the candidates taking
turns within each round, so that a busy machine slows all of them alike. The ratios are what counts.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress

import circuitbreaker

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.limits import ThrottleGate
from dspy_resilient.policies import CircuitPolicy

ROUNDS = 41
CALLS = 4000


def answer() -> None:
    pass


def permit_and_report(breaker: CircuitBreaker):
    def work(times: int) -> None:
        for _ in range(times):
            breaker.try_admit().success()

    return work


def decorated(breaker: circuitbreaker.CircuitBreaker):
    call = breaker.decorate(lambda: None)

    def work(times: int) -> None:
        for _ in range(times):
            call()

    return work


def refused(breaker: CircuitBreaker):
    def work(times: int) -> None:
        for _ in range(times):
            breaker.try_admit()

    return work


def refused_with_error(breaker: circuitbreaker.CircuitBreaker):
    call = breaker.decorate(lambda: None)

    def work(times: int) -> None:
        for _ in range(times):
            try:  # `suppress` would cost as much as what is measured
                call()
            except circuitbreaker.CircuitBreakerError:
                pass

    return work


def through_gate(gate: ThrottleGate):
    def work(times: int) -> None:
        for _ in range(times):
            gate.admit().answered()

    return work


def bare(times: int) -> None:
    for _ in range(times):
        answer()


def seconds(work, threads: int) -> float:
    if threads == 1:
        start = time.perf_counter()
        work(CALLS)
        return time.perf_counter() - start
    ready = threading.Barrier(threads + 1)

    def run() -> None:
        ready.wait()
        work(CALLS // threads)

    crew = [threading.Thread(target=run) for _ in range(threads)]
    for thread in crew:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in crew:
        thread.join()
    return time.perf_counter() - start


def compare(title: str, candidates: dict, threads: int = 1) -> None:
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, work in candidates.items():
            taken[name].append(seconds(work, threads) / CALLS * 1e9)
    print(f"\n{title}")
    base = None
    for name, values in taken.items():
        median = statistics.median(values)
        base = base or median
        print(f"  {name:44}{median:9.0f} ns   {median / base:5.2f}x")


def opened(breaker):
    def fail() -> None:
        raise ConnectionError

    call = breaker.decorate(fail)
    for _ in range(5):
        with suppress(ConnectionError):
            call()
    return breaker


def main() -> None:
    stock, ours = circuitbreaker.CircuitBreaker(), CircuitBreaker(CircuitPolicy())
    passing = {
        "circuitbreaker, decorated": decorated(stock),
        "ours, decorated": decorated(ours),
        "ours, permit and report": permit_and_report(ours),
        "ours, gate pass and report": through_gate(ThrottleGate()),
        "an empty function": bare,
    }
    compare("closed, one thread", passing)
    compare("closed, 8 threads", passing, threads=8)
    policy = CircuitPolicy(recovery_time=240.0)
    refusing = {
        "circuitbreaker, decorated, error raised": refused_with_error(
            opened(circuitbreaker.CircuitBreaker(recovery_timeout=300))
        ),
        "ours, decorated, error raised": refused_with_error(opened(CircuitBreaker(policy))),
        "ours, try_admit": refused(opened(CircuitBreaker(policy))),
    }
    compare("open, one thread", refusing)
    compare("open, 8 threads", refusing, threads=8)


if __name__ == "__main__":
    main()
