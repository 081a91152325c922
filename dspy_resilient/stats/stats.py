"""What a client has done so far, counted.

`Tally` counts while calls run; `Stats` is the frozen snapshot a user gets. How it looks is decided
in `display.py`.
"""

from __future__ import annotations

import math
import operator
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.stats.latency import Latency, Stopwatch
from dspy_resilient.stats.spending import NOTHING, Spending

_LATENCY = ("count", "total", "mean", "p50", "p95", "p99")


class Tally:
    """Named counters, and how long answers took, behind one short lock."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)
        self._counts: Counter[str] = Counter()
        self._spent: dict[str, Spending] = {}
        self._watch = Stopwatch()

    def renew(self) -> None:
        """Make the lock anew in a forked child."""
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to one counter."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]  # a sum of prices is no int

    def save(self, tokens: int, dollars: float) -> None:
        """Count what a hit has saved."""
        with self._lock:
            self._counts["tokens_saved"] += tokens
            self._counts["cost_saved"] += dollars  # type: ignore[assignment]  # as in `add`

    def time(self, seconds: float) -> None:
        """Count an answer that took `seconds`."""
        with self._lock:
            self._watch.record(seconds)

    def spend(self, target: str, spending: Spending) -> None:
        """Count what a request to `target` cost."""
        with self._lock:
            self._spent[target] = self._spent.get(target, NOTHING) + spending

    def totals(self) -> dict[str, Any]:
        """Return all counters by the names of `Stats`: "skipped:empty" is part of "skipped"."""
        with self._lock:
            counts, latency = dict(self._counts), self._watch.latency()
            spent = dict(self._spent)
        totals: dict[str, Any] = {"latency": latency, "spent_by_target": spent}
        for name, count in counts.items():
            whole, _, part = name.partition(":")
            if part:
                totals.setdefault(whole, {})[part] = count
            else:
                totals[whole] = count
        return totals


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A client's numbers since it was made or reset.

    `print` shows them as a table, a notebook as one in HTML. Those of several clients can be added
    (also by `sum`), and those of an earlier moment subtracted, which leaves what came since.

    They add up: once nothing is under way, `calls` is `hits + stale + coalesced + errors +
    latency.count`, and `attempts` is `latency.count + failures` and those whose callers went away.

    Attributes:
        client: Name of the client, or of several.
        seconds: Time that the numbers cover.
        calls: Calls made by users.
        hits: Calls answered from the cache.
        misses: Look-ups for which the cache had no answer.
        stale: Hits that were past their ttl.
        coalesced: Calls answered by an identical one that was under way.
        errors: Calls that ended with an error.
        attempts: Requests sent to providers.
        failures: Attempts that ended without an answer.
        failed_by_target: The same by target and kind.
        retries: Attempts repeated after a pause.
        queued: Times a call waited for its turn within its limits.
        queue_seconds: How long it waited there, all those times together.
        rejected: Times a circuit, gate, limit or supervision refused to send.
        refused: The same by what refused.
        restarts: Times the client was restarted to a clean state.
        fallbacks: Times a call went on to the next target.
        stored: Answers kept in the cache.
        skipped: Answers not kept, by reason.
        evicted: Answers dropped from the cache.
        disk_errors: Faults of the cache's disk, by kind, e.g. "write: ENOSPC".
        events_dropped: Events that a slow listener will not hear.
        tokens_saved: Tokens that hits and coalesced calls did not use.
        cost_saved: Dollars that they did not cost, as far as prices are known.
        spent_by_target: What was billed, by target: failed attempts, retries and fallbacks too, as
            far as the provider bills them. A hit costs nothing.
        latency: How long the answers of providers took that came in time, from request to end.
        recent: The numbers of the last minute; None within these.
    """

    client: str
    seconds: float = field(default=0.0, compare=False)
    calls: int = 0
    hits: int = 0
    misses: int = 0
    stale: int = 0
    coalesced: int = 0
    errors: int = 0
    attempts: int = 0
    failures: int = 0
    failed_by_target: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    retries: int = 0
    queued: int = 0
    queue_seconds: float = 0.0
    rejected: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    restarts: int = 0
    fallbacks: int = 0
    stored: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    evicted: int = 0
    disk_errors: Mapping[str, int] = field(default_factory=dict)
    events_dropped: int = 0
    tokens_saved: int = 0
    cost_saved: float = 0.0
    spent_by_target: Mapping[str, Spending] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)
    recent: Stats | Any = field(default=None, compare=False, repr=False)  # Any: `stats()` sets it

    @property
    def failed(self) -> Mapping[str, int]:
        """Attempts that ended without an answer, by kind of failure."""
        kinds: Counter[str] = Counter()
        for failed in self.failed_by_target.values():
            kinds.update(failed)
        return dict(kinds)

    @property
    def spent(self) -> Spending:
        """What was billed: tokens and dollars of all targets together."""
        return sum(self.spent_by_target.values(), NOTHING)

    @property
    def calls_per_second(self) -> float:
        """Calls per second, on average; 0.0 without any time."""
        return self.calls / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the calls for which nothing had to be sent; 0.0 without a call."""
        return (self.hits + self.coalesced) / self.calls if self.calls else 0.0

    @property
    def failure_rate(self) -> float:
        """Share of the attempts that failed; 0.0 without an attempt."""
        return self.failures / self.attempts if self.attempts else 0.0

    def __add__(self, other: Stats) -> Stats:
        """Return the numbers of both clients together."""
        if not isinstance(other, Stats):
            return NotImplemented
        recent = None
        if self.recent is not None and other.recent is not None:
            recent = self.recent + other.recent
        return self._combine(
            operator.add,
            other,
            client=f"{self.client}, {other.client}",
            seconds=max(self.seconds, other.seconds),
            recent=recent,
        )

    def __radd__(self, nothing: int) -> Stats:
        """Return these numbers: `sum` begins with 0."""
        return self if nothing == 0 else NotImplemented

    def __sub__(self, earlier: Stats) -> Stats:
        """Return what has been counted since `earlier`, a snapshot of the same client."""
        if not isinstance(earlier, Stats):
            return NotImplemented
        seconds = self.seconds - earlier.seconds
        return self._combine(operator.sub, earlier, client=self.client, seconds=seconds)

    def _combine(self, operation: Callable[[Any, Any], Any], other: Stats, **own: Any) -> Stats:
        for each in fields(self):
            if each.name not in own and each.name != "recent":
                one, two = getattr(self, each.name), getattr(other, each.name)
                own[each.name] = _merged(operation, one, two)
        return Stats(**own)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers ready for JSON and for a row of a table; `latency` as its quantiles."""
        numbers = {each.name: getattr(self, each.name) for each in fields(self)}
        numbers |= {name: dict(n) for name, n in numbers.items() if isinstance(n, Mapping)}
        numbers["failed"] = self.failed
        numbers["latency"] = {name: getattr(self.latency, name) for name in _LATENCY}
        numbers["spent"] = self.spent.to_dict()
        spent = {target: each.to_dict() for target, each in self.spent_by_target.items()}
        numbers["spent_by_target"] = spent
        numbers["recent"] = None if self.recent is None else self.recent.to_dict()
        return numbers

    def __str__(self) -> str:
        """Return the numbers as an aligned table."""
        from dspy_resilient.stats.display import stats_text  # noqa: PLC0415  # only when asked

        return stats_text(self)

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import stats_html  # noqa: PLC0415  # only when asked

        return stats_html(self)


def _merged(operation: Callable[[Any, Any], Any], one: Any, two: Any) -> Any:
    """Return what `operation` makes of two numbers, or of the parts of each, at any depth."""
    if not isinstance(one, Mapping):
        return operation(one, two)
    nothing = type(next(iter({**one, **two}.values()), 0))()
    names = {**one, **two}
    merged = {
        name: _merged(operation, one.get(name, nothing), two.get(name, nothing)) for name in names
    }
    return {name: count for name, count in merged.items() if count}


class LastMinute:
    """Totals of every few seconds of the last minute; what is recent is the difference to now.

    Whoever counts asks first whether a mark is `due`, so that nothing is ever counted long after
    the last mark, and a client that rests costs nothing.
    """

    SECONDS = 60.0
    STEP = 5.0

    def __init__(self) -> None:
        self._marks: deque[Stats] = deque(maxlen=int(self.SECONDS / self.STEP) + 1)
        self.due = -math.inf

    def mark(self, now: float, totals: Callable[[], Stats]) -> None:
        """Remember the totals, and say when to do so again on the clock that reads `now`."""
        self.due = now + self.STEP
        self._marks.append(totals())

    def since(self, totals: Stats) -> Stats:
        """Return what has been counted in the last minute."""
        for earlier in list(self._marks):
            if totals.seconds - earlier.seconds <= self.SECONDS:
                return totals - earlier
        return Stats(client=totals.client, seconds=self.SECONDS)
