"""What a request will use, learned from those before it. It reserves nothing and knows no limit."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.budgets.ledger import Amount
from dspy_resilient.stats import Spending

if TYPE_CHECKING:
    from dspy_resilient.providers.prices import Price

_TYPICAL_ANSWER = 256
_NEWEST = 0.05
"""Weight of the newest answer, once there have been twenty."""


class Meter:
    """Estimates requests to one target: what is typical, not the most that a request could use.

    Before the first answer that is a guess: the tokens of the prompt by its length, and at most
    256 for the answer. From then on both follow the provider's own counts.
    """

    def __init__(self) -> None:
        self._answers = 0
        self._per_guess = 1.0
        self._answer = math.nan
        self._per_dollar = 1.0
        self._per_token: float | None = None
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Make the lock anew in a forked child."""
        self._lock = threading.Lock()

    def estimate(self, prompt: int, most: int | None, price: Price | None) -> Amount:
        """Return what one request will use; nan dollars if its price is not known.

        Args:
            prompt: Tokens of the prompt, by its length.
            most: The most tokens the answer may have, or None.
            price: What the model costs, or None.
        """
        with self._lock:
            sent = max(1, prompt) * self._per_guess
            answer = self._answer if self._answers else _TYPICAL_ANSWER
            received = answer if most is None else min(answer, most)
            dollars = _cost(sent, received, price)
            if math.isnan(dollars) and self._per_token is not None:
                dollars = self._per_token * (sent + received)
            return Amount(dollars * self._per_dollar, sent + received, 1.0)

    def learn(self, prompt: int, spent: Spending, price: Price | None) -> None:
        """Take in what a request used whose prompt was guessed at `prompt` tokens."""
        if not spent.tokens:
            return
        with self._lock:
            self._answers += 1
            self._per_guess = self._moved(self._per_guess, spent.prompt_tokens / max(1, prompt))
            self._answer = self._moved(self._answer, spent.completion_tokens)
            if spent.dollars is None:
                return
            by_price = _cost(spent.prompt_tokens, spent.completion_tokens, price)
            if by_price > 0:
                self._per_dollar = self._moved(self._per_dollar, spent.dollars / by_price)
            else:
                self._per_token = spent.dollars / spent.tokens

    def _moved(self, mean: float, newest: float) -> float:
        """Return the moving mean with one more value; requires the lock."""
        weight = max(1 / self._answers, _NEWEST)
        return newest if weight == 1 else mean + weight * (newest - mean)


def _cost(sent: float, received: float, price: Price | None) -> float:
    return math.nan if price is None else sent * price.sent + received * price.received
