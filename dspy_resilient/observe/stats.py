"""What a client has done so far, counted.

`Tally` counts while calls run; `Stats` is the frozen snapshot a user gets.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dspy_resilient.fork import renew_after_fork


class Tally:
    """Named counters behind one short lock."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)
        self._counts: Counter[str] = Counter()

    def renew(self) -> None:
        """Make the lock anew in a forked child."""
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to one counter."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]  # a sum of prices is no int

    def counts(self) -> dict[str, Any]:
        """Return a copy of all counters."""
        with self._lock:
            return dict(self._counts)

    def clear(self) -> None:
        """Set every counter back to zero."""
        with self._lock:
            self._counts.clear()


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A client's totals since it was made or reset.

    Attributes:
        client: Name of the client.
        calls: Calls made by users.
        hits: Calls answered from the cache.
        stale: Hits that were past their ttl.
        coalesced: Calls answered by an identical one that was under way.
        attempts: Requests sent to providers.
        failures: Attempts that ended without an answer.
        retries: Attempts repeated after a pause.
        rejected: Times a circuit, gate or limit refused to send.
        fallbacks: Times a call went on to the next target.
        errors: Calls that ended with an error.
        stored: Answers kept in the cache.
        skipped: Answers not kept, by reason.
        evicted: Answers dropped from the cache.
        tokens_saved: Tokens that hits and coalesced calls did not use.
        cost_saved: Dollars that they did not cost, as far as prices are known.
    """

    client: str
    calls: int = 0
    hits: int = 0
    stale: int = 0
    coalesced: int = 0
    attempts: int = 0
    failures: int = 0
    retries: int = 0
    rejected: int = 0
    fallbacks: int = 0
    errors: int = 0
    stored: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    evicted: int = 0
    tokens_saved: int = 0
    cost_saved: float = 0.0
