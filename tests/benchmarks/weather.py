"""Calls in every weather: `ResilientLM` with its defaults beside plain `dspy.LM`, on the same dice.

    python tests/benchmarks/weather.py [-v] [--seeds 2] [--callers 32] [--model quick] [--weather 429]

Whole calls in virtual time, through the real pipeline: circuit, throttle gate, retries and waits
are those of a user; only the sending and the clock are simulated. Callers work in a closed loop:
each makes its next call when the last has ended.

Each row is a cell: percent of the calls that were lost, requests for an answer, seconds until all
calls had ended, and the 95th percentile of the time to an answer, `dspy.LM` -> `ResilientLM`. Those
in which `ResilientLM` loses more calls or sends more requests for an answer are marked and listed
at the end; `-v` shows all. Where no request is answered, requests per minute are compared.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from virtual_time import Drill, Fault, down, server_error, throttled, timed_out

if TYPE_CHECKING:
    from collections.abc import Callable

CREWS = {1: 60, 4: 40, 32: 30, 128: 12}
"""Callers, and the calls that each makes."""

MODELS = {
    "quick": ((0.2, 1.0), None),
    "slow": ((3.0, 8.0), None),
    "slow, fails fast": ((3.0, 8.0), 0.1),
}
"""How long an answer takes, and a failure, if not as long."""

ALWAYS = (0.0, math.inf)
TIMEOUT = 30.0
"""Seconds after which a request that hangs ends, on either side."""

TOLERANCE_LOST, TOLERANCE_SENT = (0.4, 0.15), (0.02, 0.15)
"""What counts as luck: absolute and relative."""

FLAPPING = 2.0
"""Percent more that may be lost where the provider flaps in step with waits of 1, 2 and 4 s."""


def failing(share, begin=0.0, end=math.inf):
    """A share of the requests fails."""
    return down(server_error, (begin, end), share=share)


def flapping(seconds):
    """Down for so long, up for as long, and so on."""
    return lambda now, dice: server_error() if int(now // seconds) % 2 else None


def throttling(share, hint=None, begin=0.0, end=math.inf):
    """A share of the requests gets a 429."""

    def fails(now, dice):
        hit = begin <= now < end and dice.random() < share
        return Fault(throttled(hint), 0.05) if hit else None

    return fails


def hanging(share, begin=0.0, end=math.inf):
    """A share of the requests is never answered."""

    def fails(now, dice):
        hit = begin <= now < end and dice.random() < share
        return Fault(timed_out(), TIMEOUT) if hit else None

    return fails


def slow_failing(share):
    """A share of the requests fails after half a minute."""

    def fails(now, dice):
        return Fault(server_error(), 30.0) if dice.random() < share else None

    return fails


def rate_limited(per_minute, *, hinted):
    """So many requests in any minute; a refusal says when the next will pass, or does not."""
    taken: list[float] = []

    def fails(now, dice):
        while taken and taken[0] <= now - 60:
            taken.pop(0)
        if len(taken) < per_minute:
            taken.append(now)
            return None
        return Fault(throttled(taken[0] + 60 - now if hinted else None), 0.05)

    return fails


WEATHERS: dict[str, Callable[[], Callable]] = {
    **{f"{share} % fail": lambda share=share: failing(share / 100) for share in range(0, 101, 10)},
    **{
        f"gone {seconds:g} s": lambda seconds=seconds: failing(1, 3, 3 + seconds)
        for seconds in (0.6, 2, 4, 8, 14, 20, 40, 59, 60, 120)
    },
    "90 % fail for 60 s": lambda: failing(0.9, 3, 63),
    "flaps, 3 s": lambda: flapping(3),
    "flaps, 10 s": lambda: flapping(10),
    "5 % 429": lambda: throttling(0.05),
    "20 % 429": lambda: throttling(0.2),
    "50 % 429": lambda: throttling(0.5),
    "20 % 429, hint 2 s": lambda: throttling(0.2, 2.0),
    "20 % 429, hint 20 s": lambda: throttling(0.2, 20.0),
    "429 for 20 s": lambda: throttling(1.0, None, 3, 23),
    "429 for 20 s, hinted": lambda: throttling(1.0, 20.0, 3, 23),
    "429 for ever": lambda: throttling(1.0),
    "60 a minute": lambda: rate_limited(60, hinted=False),
    "60 a minute, hinted": lambda: rate_limited(60, hinted=True),
    "20 % fail slowly": lambda: slow_failing(0.2),
    "10 % hang": lambda: hanging(0.1),
    "hangs for 60 s": lambda: hanging(1.0, 3, 63),
}


class Side(NamedTuple):
    """What became of the calls of one side."""

    lost: float
    sent: float
    seconds: float
    p95: float
    answered: int
    requests: int

    @property
    def per_minute(self) -> float:
        return 60 * self.requests / self.seconds


class Cell(NamedTuple):
    """One weather, one model, so many callers: both sides."""

    callers: int
    model: str
    weather: str
    plain: Side
    ours: Side

    @property
    def is_worse(self) -> bool:
        """Whether we lose more calls, or send more requests for an answer, than luck explains."""
        plain, ours = self.plain, self.ours
        extra = FLAPPING if self.weather.startswith("flaps") else 0.0
        loses = _exceeds(ours.lost, plain.lost + extra, TOLERANCE_LOST)
        if plain.answered and ours.answered:
            return loses or _exceeds(ours.sent, plain.sent, TOLERANCE_SENT)
        return loses or (not ours.answered and ours.per_minute > plain.per_minute)

    def __str__(self) -> str:
        pairs = zip(self.plain[:4], self.ours[:4], strict=True)
        numbers = " | ".join(f"{one:7.2f} {other:7.2f}" for one, other in pairs)
        mark = "**" if self.is_worse else "  "
        return f"{mark} {self.callers:4} {self.model:16} {self.weather:22} {numbers}"


def _exceeds(mine: float, theirs: float, tolerance: tuple[float, float]) -> bool:
    absolute, relative = tolerance
    return mine > theirs + max(absolute, relative * theirs)


def side(weather, callers, model, seeds, **options) -> Side:
    latency, quick_failure = MODELS[model]
    lost = sent = answered = 0
    seconds, times = 0.0, []
    for seed in range(seeds):
        fails = weather()

        def fault(now, dice, fails=fails):
            found = fails(now, dice)
            is_plain = found is not None and not isinstance(found, Fault)
            return Fault(found, quick_failure) if is_plain else found

        drill = Drill(fault, latency=latency, seed=seed, **options).run(callers, CREWS[callers])
        lost, sent, answered = lost + drill.failed, sent + drill.sent, answered + drill.answered
        seconds += drill.seconds
        times += drill.times
    times.sort()
    p95 = times[int(0.95 * len(times))] if times else math.nan
    total = lost + answered
    return Side(100 * lost / total, sent / max(1, answered), seconds / seeds, p95, answered, sent)


def cell(callers: int, model: str, weather: str, seeds: int = 1) -> Cell:
    make = WEATHERS[weather]
    plain = side(make, callers, model, seeds, plain=True)
    return Cell(callers, model, weather, plain, side(make, callers, model, seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-v", action="store_true", help="show every cell")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell (default: 1)")
    parser.add_argument("--callers", type=int, choices=CREWS, help="only with so many callers")
    parser.add_argument("--model", choices=MODELS, help="only with this model")
    parser.add_argument("--weather", default="", help="only weathers whose name holds this")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    worse, count = [], 0
    print("   callers, model, weather: lost % | requests per answer | seconds | p95")
    for callers in CREWS:
        for model in MODELS:
            for weather in WEATHERS:
                is_asked = given.callers in (None, callers) and given.model in (None, model)
                if not is_asked or given.weather not in weather:
                    continue
                found = cell(callers, model, weather, given.seeds)
                count += 1
                if found.is_worse:
                    worse.append(found)
                if given.v or found.is_worse:
                    print(found, flush=True)
    print(f"{count - len(worse)} of {count} cells never worse")
    return len(worse)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
