"""How much may be sent per minute. It keeps one number and does not queue, wait or lock."""

from __future__ import annotations

import math

BURST_SECONDS = 5.0
"""What a full bucket holds, in seconds of the rate.

Providers may enforce a rate per minute over much shorter periods (OpenAI documents seconds), so a
bucket that held a whole minute would earn 429s at every start. Five seconds let a program's first
handful of calls through together and exceed the rate over any minute by a twelfth at most.
"""


class TokenBucket:
    """A token bucket that fills evenly and may be in debt. Requires external locking.

    It holds `BURST_SECONDS` worth of its rate and starts full. More than it can ever hold may be
    taken once it is full; the rest is debt, paid off before anybody else takes. So in any span of
    T seconds that ends with a taking, what is taken less what is given back is at most `rate * T`
    plus one burst, or plus the largest amount if that is more than a burst.

    The one number kept is the time at which the bucket is full again: the virtual scheduling
    form of the generic cell rate algorithm (ITU-T I.371), which needs no refilling and says
    exactly when an amount is ready.
    """

    __slots__ = ("_burst", "_full_at", "_rate")

    def __init__(self, per_minute: float) -> None:
        """Start full, with a rate in units per minute; must be above 0."""
        self._rate = per_minute / 60.0
        self._burst = self._rate * BURST_SECONDS
        self._full_at = -math.inf

    def ready_at(self, amount: float, behind: float = 0) -> float:
        """Return the clock's reading from which `amount` may be taken.

        With `behind`, once that much more has been taken before: a lower bound, since a bucket
        that is full in the meantime gains nothing.
        """
        missing = self._burst - min(amount, self._burst)
        return self._full_at + (behind - missing) / self._rate

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, into debt if need be; a negative amount is given back.

        What does not fit into a full bucket is lost.
        """
        self._full_at = max(self._full_at, now) + amount / self._rate
