"""Rates that a client has in common with others of the same credential.

A process takes from the store, ahead of sending, what those need who are next in its queue: that is
its credit. The store says when the rates will have paid for it, so nobody has to ask twice. Credit
that is not used (a call was cancelled, an estimate was too high) goes back within `VIEW_AGE`
seconds. When the store does not answer, these are ordinary rates of this process.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from dspy_resilient.limits import Rates
from dspy_resilient.limits.rate import BURST_SECONDS
from dspy_resilient.shared.link import VIEW_AGE, Link
from dspy_resilient.shared.store import RateReport, RateView, Verb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspy_resilient.shared.link import Courier

_AHEAD = 2 * VIEW_AGE
"""Seconds of a rate that a process takes at once, besides what the first in its queue needs.

More would let a process with a long queue keep those with a short one waiting; less would make a
distant store the limit.
"""


class _Share:
    """What this process has of one rate.

    Attributes:
        credit: What it has taken from the store and not sent yet; negative if it owes.
        need: What those need who are next.
        full_at: When the rate is full again, as the store has last said: its credit was taken last.
    """

    __slots__ = ("_burst", "_rate", "credit", "full_at", "need", "per_minute")

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._rate = per_minute / 60.0
        self._burst = self._rate * BURST_SECONDS
        self.full_at = -math.inf
        self.credit = self.need = 0.0

    def turn_at(self, amount: float, before: float) -> float:
        """Return from when `amount` of the credit may be sent, once `before` has been."""
        missing = self._burst - min(amount, self._burst)
        return self.full_at + (before - self.credit - missing) / self._rate

    @property
    def has_enough(self) -> bool:
        """Whether nothing more needs to be asked for at once."""
        return self.need >= self._rate * _AHEAD


class SharedRates(Link["dict[str, RateReport]", RateView], Rates):
    """`Rates` that all clients with the same key keep within together.

    Args:
        courier: The way to the store.
        key: Where the state lies.
        rpm: As for `Rates`. A client whose rate is smaller than others' keeps within its own by
            itself; all together keep within the largest.
        tpm: Likewise.
    """

    def __init__(self, courier: Courier, key: str, rpm: float | None, tpm: float | None) -> None:
        self._courier = courier
        self._key = key
        super().__init__(rpm, tpm)

    def renew(self) -> None:
        """Start without credit: what a forked child does."""
        super().renew()
        self._lock = threading.RLock()
        self._begin(self._courier)
        rates = {"requests": self._rpm, "tokens": self._tpm}
        self._shares = {name: _Share(rate) for name, rate in rates.items() if rate is not None}
        self._forgone: dict[str, RateReport] | None = None

    def ready_at(self, tokens: float) -> float:
        """Return when to look whether one request may go: soon, if the store has been asked."""
        with self._lock:
            if self.alone:
                return super().ready_at(tokens)
            amounts = {"requests": 1, "tokens": tokens}
            if all(share.credit >= amounts[name] for name, share in self._shares.items()):
                return max(self.turn_at(tokens, 0, 0), super().ready_at(tokens))
            left = self.patience_left() if self._is_asked else self.patience
            return max(super().ready_at(tokens), self._courier.clock() + left)

    def turn_at(self, tokens: float, requests_before: float, tokens_before: float) -> float:
        """Return from when one request may go behind others, as far as is known here."""
        with self._lock:
            if self.alone:
                return super().turn_at(tokens, requests_before, tokens_before)
            amounts = {"requests": (1, requests_before), "tokens": (tokens, tokens_before)}
            turns = (share.turn_at(*amounts[name]) for name, share in self._shares.items())
            return max(super().turn_at(tokens, requests_before, tokens_before), *turns)

    def take(self, requests: float, tokens: float, now: float) -> None:
        """Use credit, or get some back; what is sent counts here too, in case the store is lost."""
        amounts = {"requests": requests, "tokens": tokens}
        with self._lock:
            super().take(requests, tokens, now)
            for name, share in self._shares.items() if not self.alone else ():
                share.credit -= amounts[name]

    def foresee(self, tokens: Iterable[float]) -> None:
        """Note what those need who are next, but not what only a later trip has to fetch."""
        with self._lock:
            shares = self._shares
            for share in shares.values():
                share.need = 0.0
            for each in tokens:
                amounts = {"requests": 1, "tokens": each}
                for name, share in shares.items():
                    share.need += amounts[name]
                if any(share.has_enough for share in shares.values()):
                    break

    def fetch(self) -> None:
        """Ask for the credit that is missing, or go on without the store if that takes too long."""
        with self._lock:
            lacks = any(share.need > share.credit for share in self._shares.values())
            hangs = lacks and self._is_asked and not self.alone and self.patience_left() == 0
            asks = lacks and (self.is_old if self.alone else self._next is None)
        if hangs:
            self.go_alone()
        elif asks:
            self.ask()
        if self.wants_news():
            with suppress(RuntimeError):  # no thread can be started: see `ask`
                self._courier.watch(self)

    @property
    def _is_asked(self) -> bool:
        return self._next is not None or self._under_way is not None

    def wants_news(self) -> bool:
        """Whether there is credit to give back, or a debt that the store has not heard of."""
        return any(share.credit != share.need for share in self._shares.values())

    # To the store and back; all but `_say` and `_wake` have the lock

    def _draft(self, now: float) -> dict[str, RateReport]:
        own = {"requests": self._requests, "tokens": self._tokens}
        reports = {}
        for name, share in self._shares.items():
            bucket = own[name]
            full_at = share.full_at if bucket is None else max(share.full_at, bucket.full_at())
            believed = max(0.0, full_at - now)
            reports[name] = RateReport(share.per_minute, share.need - share.credit, believed)
        return reports

    def _say(self, request: dict[str, RateReport]) -> Verb:
        return Verb("rate", (self._key, request))

    def _hear(self, now: float, request: dict[str, RateReport], reply: RateView) -> None:
        for name, share in self._shares.items():
            if request is not self._forgone:
                share.credit += request[name].amount
            share.full_at = now + reply.full_in[name]

    def _do_without(
        self,
        now: float,  # noqa: ARG002  # the rates of this process have counted all along
        request: dict[str, RateReport] | None,
    ) -> None:
        self._forgone = request  # an answer after all finds sent what it was for
        for share in self._shares.values():
            share.credit = 0.0

    def _wake(self) -> None:
        self.wake()
