"""How long answers took, in buckets: cheap to record, exact to add up and to take apart.

Eight buckets to every doubling, from a millisecond to half an hour, so that a quantile is off by
at most a twentieth of itself, however many answers there were. This module reads no clock.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_STEPS = 8
_OCTAVES = (-10, 11)
_LOWEST = _OCTAVES[0] * _STEPS
_COUNT = (_OCTAVES[1] - _OCTAVES[0]) * _STEPS
_NONE = (0,) * _COUNT


class Stopwatch:
    """Counts durations by bucket. Not safe for threads: its owner has the lock."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self.clear()

    def record(self, seconds: float) -> None:
        """Count one duration; what is beyond the last bucket counts in it."""
        self._total += seconds
        bucket = math.ceil(math.log2(seconds) * _STEPS) - 1 - _LOWEST if seconds > 0 else 0
        self._counts[min(max(bucket, 0), _COUNT - 1)] += 1

    def clear(self) -> None:
        """Forget all durations."""
        self._counts = [0] * _COUNT
        self._total = 0.0

    def latency(self) -> Latency:
        """Return the durations so far."""
        return Latency(tuple(self._counts), self._total)


class RecentTimes:
    """How long the last 100 answers took; safe for threads."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=100)

    def record(self, seconds: float) -> None:
        """Note one."""
        self._seconds.append(seconds)

    def p95(self) -> float | None:
        """Return the time within which 95 % of them came, or None without one."""
        seconds = sorted(self._seconds)
        return seconds[int(0.95 * len(seconds))] if seconds else None


@dataclass(frozen=True, repr=False, slots=True)
class Latency:
    """How long answers took: their number, mean and quantiles, in seconds.

    Two of them can be added (another client's answers) and subtracted (the answers since).

    Example:
        >>> watch = Stopwatch()
        >>> for seconds in (0.2, 0.3, 0.4, 5.0):
        ...     watch.record(seconds)
        >>> watch.latency()
        Latency(count=4, p50=0.31, p95=5.0, p99=5.0)

    Attributes:
        buckets: Answers in each bucket; see `up_to` for what is in them.
        total: Seconds of all answers together.
    """

    buckets: tuple[int, ...] = _NONE
    total: float = 0.0

    @property
    def count(self) -> int:
        """Number of answers."""
        return sum(self.buckets)

    @property
    def mean(self) -> float | None:
        """Mean time of an answer, or None without one."""
        return self.total / self.count if self.count else None

    @property
    def p50(self) -> float | None:
        """Time within which half of the answers came."""
        return self.quantile(0.5)

    @property
    def p95(self) -> float | None:
        """Time within which 95 % of the answers came."""
        return self.quantile(0.95)

    @property
    def p99(self) -> float | None:
        """Time within which 99 % of the answers came."""
        return self.quantile(0.99)

    def quantile(self, share: float) -> float | None:
        """Return the time within which this share of the answers came, or None without one.

        Raises:
            ValueError: If `share` is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"Latency.quantile: share must be from 0 to 1; got {share!r}")
        rank = max(1, math.ceil(share * self.count))
        for bucket, so_far in enumerate(itertools.accumulate(self.buckets)):
            if so_far >= rank:
                return float(2.0 ** ((bucket + 0.5 + _LOWEST) / _STEPS))
        return None

    def up_to(self) -> Iterator[tuple[float, int]]:
        """Yield, for each power of two seconds, how many answers took at most that long."""
        so_far = list(itertools.accumulate(self.buckets))
        for octave in range(_OCTAVES[0] + 1, _OCTAVES[1] + 1):
            yield 2.0**octave, so_far[(octave - _OCTAVES[0]) * _STEPS - 1]

    def __add__(self, other: Latency) -> Latency:
        """Return the answers of both."""
        return Latency(_pairwise(operator.add, self, other), self.total + other.total)

    def __sub__(self, earlier: Latency) -> Latency:
        """Return the answers that came since `earlier`."""
        return Latency(_pairwise(operator.sub, self, earlier), self.total - earlier.total)

    def __repr__(self) -> str:
        """Show number and quantiles."""
        if not self.count:
            return "Latency(count=0)"
        shown = (f"{name}={getattr(self, name):#.2g}" for name in ("p50", "p95", "p99"))
        return f"Latency(count={self.count}, {', '.join(shown)})"


def _pairwise(operation: object, one: Latency, two: Latency) -> tuple[int, ...]:
    pairs: Iterable[int] = map(operation, one.buckets, two.buckets)  # type: ignore[call-overload]  # of two ints
    return tuple(pairs)


def duration(seconds: float) -> str:
    """Return seconds as a person says them: "4.5 s", "45 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (left, "s"))
    return " ".join([f"{number} {unit}" for number, unit in parts if number][:2])
