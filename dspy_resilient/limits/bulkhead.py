"""How many attempts may be under way at once. It counts and learns; it does not queue or lock."""

from __future__ import annotations

import math

FIRST_LIMIT = 16
HIGHEST_LIMIT = 256
ON_THROTTLED = 0.5
ON_SLOW = 0.8


class Bulkhead:
    """Places for attempts under way, with a fixed or an adaptive limit. Requires external locking.

    The adaptive limit follows additive increase, multiplicative decrease (Chiu and Jain, 1989):
    halved on a 429, lowered by a fifth on a slow answer, raised by one for each limit-full of
    clean successes, never below 1 nor above its ceiling. As in TCP (RFC 6582), it is cut at most
    once per round: an attempt that began before the last cut says nothing about the new limit, so
    32 attempts refused together halve it once.

    Attributes:
        in_use: Attempts under way.
        limit: How many may be; `math.inf` for any number.
        round: Number of cuts so far.
    """

    __slots__ = ("_adaptive", "_ceiling", "_clean", "in_use", "limit", "round")

    def __init__(self, max_concurrent: int | None, *, adaptive: bool) -> None:
        """Start empty; an adaptive limit starts at `max_concurrent`, or else at 16 (256 at most)."""
        first, ceiling = (FIRST_LIMIT, HIGHEST_LIMIT) if adaptive else (math.inf, math.inf)
        self._adaptive = adaptive
        self._ceiling = ceiling if max_concurrent is None else max_concurrent
        self._clean = 0
        self.limit: float = first if max_concurrent is None else max_concurrent
        self.in_use = 0
        self.round = 0

    @property
    def has_room(self) -> bool:
        """Whether one more attempt may begin."""
        return self.in_use < self.limit

    def learn(self, begun: int, *, throttled: bool, slow: bool, ok: bool) -> None:
        """Adapt the limit to how an attempt ended that began in round `begun`."""
        if not self._adaptive or begun != self.round:
            return
        if throttled:
            self._cut(ON_THROTTLED)
        elif slow:
            self._cut(ON_SLOW)
        elif ok:
            self._clean += 1
            if self._clean >= self.limit:
                self._clean = 0
                self.limit = min(self.limit + 1, self._ceiling)

    def _cut(self, factor: float) -> None:
        self.limit = max(1, math.floor(self.limit * factor))
        self._clean = 0
        self.round += 1
