"""A retry budget that a client has in common with others on the same way to a provider.

Whether to retry is decided here and at once, by what the store has last said and what has been
done here since; what was done is reported with the next word to the store. When the store does not
answer, this is an ordinary budget, from where it stood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_resilient.limits import RetryBudget
from dspy_resilient.shared.link import Link
from dspy_resilient.shared.store import BudgetReport, BudgetView, Verb

if TYPE_CHECKING:
    from dspy_resilient.shared.link import Courier


class SharedBudget(Link[BudgetReport, BudgetView], RetryBudget):
    """A `RetryBudget` that all clients with the same key spend together.

    In an outage all of them together make the retries that one budget pays for, and those on which
    several decided at one moment, before they could hear of each other: within `VIEW_AGE` seconds.

    Args:
        courier: The way to the store.
        key: Where the state lies.
        tokens: As for `RetryBudget`; every client goes by its own.
    """

    def __init__(self, courier: Courier, key: str, tokens: int) -> None:
        self._courier = courier
        self._key = key
        self._spent = 0
        super().__init__(tokens)

    def renew(self) -> None:
        """Make the budget usable in a forked child; what is untold there, the parent tells."""
        super().renew()
        self._begin(self._courier)
        self._net = self._least = 0

    @property
    def level(self) -> int:
        """Tokens left, as far as is known here."""
        return max(0, self._most - max(self._least, self._spent + self._net))

    def take(self) -> bool:
        """Pay for one retry and return True, or return False and take nothing."""
        with self._lock:
            is_paid = self.level >= self._cost
            if is_paid:
                self._net += self._cost
                self._least += self._cost
        self._tell()
        return is_paid

    def refund(self, *, retried: bool = False) -> None:
        """Record a success; the one of a retry returns what that retry took."""
        if self.level >= self._most:
            return
        returned = self._cost if retried else self._refund
        with self._lock:
            self._net -= returned
            self._least = max(0, self._least - returned)
        if retried:
            self._tell()

    def wants_news(self) -> bool:
        """Never: whoever sends an attempt asks."""
        return False

    def _wake(self) -> None:
        """Nobody waits: whether to retry is decided with what is known."""

    def _tell(self) -> None:
        if self.is_old or (self._net and not self.alone):
            self.ask()

    # To the store and back; all but `_say` have the lock

    def _draft(self, now: float) -> BudgetReport:  # noqa: ARG002  # nothing here has a time
        report = BudgetReport(
            net=self._net, least=self._least, most=self._most, believed=self._spent
        )
        self._spent = max(self._least, self._spent + self._net)
        self._net = self._least = 0
        return report

    def _say(self, request: BudgetReport) -> Verb:
        return Verb("budget", (self._key, request))

    def _hear(
        self,
        now: float,  # noqa: ARG002  # nothing here has a time
        request: BudgetReport,  # noqa: ARG002  # it is in the answer
        reply: BudgetView,
    ) -> None:
        self._spent = reply.spent

    def _do_without(
        self,
        now: float,  # noqa: ARG002  # nothing here has a time
        request: BudgetReport | None,
    ) -> None:
        if request is not None:
            self._spent = request.believed
            self._least = max(self._least, self._net + request.least)
            self._net += request.net
