"""Which recovery times are best? Replays outages against real circuits on an injected clock.

    python tests/benchmarks/circuit_replay.py

A history is half an hour of health, an outage of minutes to hours, and half an hour of health, with
a call every so often, each known to fail or not. Every circuit sees the same calls; the ones it
refuses are lost to it, as in life. Three figures, over all histories:

    spared    share of the failing calls that were refused (more is better)
    refused   share of the good calls that were refused (less is better)
    late      seconds from the end of the outage to the first good answer: mean and worst

`circuitbreaker` opens on 5 failures in a row, for a fixed time, and closes on one success.

Of an outage in which 30 % of the calls fail at random, the next call cannot be told: whoever spares
one failing call there refuses two good ones. That is why no setting is best in all: along the
frontier one figure is traded for another. The default lies where it is ahead of 300 s in all three,
and the table varies one field at a time from there. What it means for calls that wait for an open circuit is
tried in `circuit_waiting.py`.
"""

from __future__ import annotations

import dataclasses
import random
from contextlib import suppress
from itertools import product
from statistics import fmean

import circuitbreaker

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.policies import CircuitPolicy

HEALTH = 1800.0
NOISE = 0.005
FAILING = (0.3, 0.7, 1.0)
MINUTES = (2, 10, 60, 180)
GAPS = (1.0, 5.0, 20.0, 60.0)

VARIED = {
    "failure_threshold": (4, 5, 6),
    "failure_rate": (0.3, 0.35, 0.4, 0.5),
    "window": (10.0, 20.0, 30.0, 60.0),
    "recovery_time": (1.0, 3.0, 5.0, 15.0),
    "backoff": (2.0, 3.0, 4.0),
    "max_recovery_time": (120.0, 180.0, 240.0, 300.0),
    "successes_to_close": (1, 2, 3),
}


@dataclasses.dataclass
class History:
    calls: list[tuple[float, bool]]
    ends: float


@dataclasses.dataclass
class Figures:
    spared: float
    refused: float
    late: float
    worst: float

    def beats(self, other: Figures) -> bool:
        return (
            self.spared >= other.spared
            and self.refused <= other.refused
            and self.late <= other.late
        )

    def __str__(self) -> str:
        return (
            f"{100 * self.spared:7.2f} % {100 * self.refused:7.2f} % "
            f"{self.late:7.1f} s {self.worst:7.0f} s"
        )


class Ours:
    def __init__(self, policy: CircuitPolicy) -> None:
        self.now = 0.0
        self.breaker = CircuitBreaker(
            policy, clock=lambda: self.now, random=random.Random(1).random
        )

    def call(self, fails: bool) -> bool:
        permit = self.breaker.try_admit()
        if permit is None:
            return False
        if fails:
            permit.failure()
        else:
            permit.success()
        return True


class Stock:
    def __init__(self, recovery: float) -> None:
        self.now = 0.0
        circuitbreaker.monotonic = lambda: self.now
        self.breaker = circuitbreaker.CircuitBreaker(5, recovery)

    def call(self, fails: bool) -> bool:
        if self.breaker.opened:
            return False
        with suppress(ConnectionError), self.breaker:
            if fails:
                raise ConnectionError
        return True


def histories(seeds: int = 8) -> list[History]:
    made = []
    for seed, failing, minutes, gap in product(range(seeds), FAILING, MINUTES, GAPS):
        rng = random.Random(f"{seed} {failing} {minutes} {gap}")
        begins = HEALTH
        ends = begins + 60 * minutes * rng.uniform(0.7, 1.4)
        now, calls = 0.0, []
        while now < ends + HEALTH:
            now += rng.uniform(0.5, 1.5) * gap
            calls.append((now, rng.random() < (failing if begins <= now < ends else NOISE)))
        made.append(History(calls, ends))
    return made


def replay(make, past: list[History]) -> Figures:
    bad = bad_refused = good = good_refused = 0
    delays = []
    for history in past:
        circuit, noticed = make(), None
        for now, fails in history.calls:
            circuit.now = now
            taken = circuit.call(fails)
            if fails:
                bad += 1
                bad_refused += not taken
            else:
                good += 1
                good_refused += not taken
            if noticed is None and now >= history.ends and taken and not fails:
                noticed = now - history.ends
        delays.append(HEALTH if noticed is None else noticed)
    return Figures(
        bad_refused / max(bad, 1), good_refused / max(good, 1), fmean(delays), max(delays)
    )


def main() -> None:
    past = histories()
    print(f"{len(past)} histories, {sum(len(h.calls) for h in past):,} calls\n")
    print(f"{'':44}{'spared':>9} {'refused':>9} {'late':>9} {'worst':>9}")
    stock = {recovery: replay(lambda: Stock(recovery), past) for recovery in (30.0, 60.0, 300.0)}  # noqa: B023
    for recovery, figures in stock.items():
        print(f"{f'circuitbreaker, recovery {recovery:g} s':44}{figures}")
    print(f"{'the default':44}{replay(lambda: Ours(CircuitPolicy()), past)}\n")
    for name, values in VARIED.items():
        for value in values:
            policy = dataclasses.replace(CircuitPolicy(), **{name: value})
            figures = replay(lambda: Ours(policy), past)  # noqa: B023
            mark = "  beats 300 s" if figures.beats(stock[300.0]) else ""
            is_default = " (default)" if policy == CircuitPolicy() else ""
            print(f"{f'{name}={value:g}{is_default}':44}{figures}{mark}")


if __name__ == "__main__":
    main()
