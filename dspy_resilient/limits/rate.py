"""How much may be sent per minute. It keeps a number for each rate and does not queue or wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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

    def full_at(self) -> float:
        """Return the clock's reading from which the bucket is full."""
        return self._full_at


class Rates:
    """The rates of one limit: requests and tokens, each if it is limited. Requires external locking.

    A limiter asks these, and is asked by those that know of others who use the same rates.

    Attributes:
        patience: Seconds to wait for others to say what they leave, if there are others.
        wake: Called, with no lock held, when more may be taken than was known.
    """

    patience = 0.0
    wake: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, rpm: float | None, tpm: float | None) -> None:
        """Start full.

        Args:
            rpm: Requests per minute, or None for any number.
            tpm: Tokens per minute, or None for any number.
        """
        self._rpm = rpm
        self._tpm = tpm
        self.renew()

    def renew(self) -> None:
        """Start full: what a forked child does."""
        self._requests = None if self._rpm is None else TokenBucket(self._rpm)
        self._tokens = None if self._tpm is None else TokenBucket(self._tpm)

    def ready_at(self, tokens: float) -> float:
        """Return the clock's reading at which to look whether one request may go, or it may."""
        ready = -math.inf if self._requests is None else self._requests.ready_at(1)
        return ready if self._tokens is None else max(ready, self._tokens.ready_at(tokens))

    def turn_at(self, tokens: float, requests_before: float, tokens_before: float) -> float:
        """Return from when one request may go behind others, as far as is known: a lower bound."""
        turn = -math.inf
        if self._requests is not None:
            turn = self._requests.ready_at(1, behind=requests_before)
        if self._tokens is not None:
            turn = max(turn, self._tokens.ready_at(tokens, behind=tokens_before))
        return turn

    def take(self, requests: float, tokens: float, now: float) -> None:
        """Take from both, or give back what is negative."""
        if self._requests is not None:
            self._requests.take(requests, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def foresee(self, tokens: Iterable[float]) -> None:
        """Hear what those will take who are next and wait for nothing else, one request each."""

    def fetch(self) -> None:
        """Do what has come of that and may take longer; needs no lock, and blocks for none."""
