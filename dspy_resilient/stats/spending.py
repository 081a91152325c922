"""What requests have cost: tokens and dollars, as the provider counted them.

This module reads DSPy's history entries and adds up. It knows no price: a cost that DSPy and
LiteLLM do not know is unknown here too, and never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import add, sub
from typing import Any, NamedTuple


class Spending(NamedTuple):
    """What was billed for some requests; can be added and subtracted.

    Attributes:
        requests: Requests sent, those that failed included.
        prompt_tokens: Tokens sent, those that the provider had in its cache included.
        completion_tokens: Tokens received, those spent on reasoning included.
        cached_tokens: Tokens sent that the provider had in its cache.
        reasoning_tokens: Tokens received that were spent on reasoning.
        known_dollars: What the requests cost whose price is known.
        unpriced: Answers whose price is not known.
        unanswered: Requests that ended without an answer after they were sent (a timeout, a cut
            stream, a cancelled call): what the provider bills for them, only the provider knows.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    known_dollars: float = 0.0
    unpriced: int = 0
    unanswered: int = 0

    @classmethod
    def of(cls, entry: Mapping[str, Any], price: Callable[[Spending], float | None]) -> Spending:
        """Return what the answer cost of which DSPy has written `entry` into its history.

        Args:
            entry: The history entry.
            price: Asked for the cost of the tokens where the entry names none.
        """
        usage = entry.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        sent, received = (
            usage.get("prompt_tokens_details"),
            usage.get("completion_tokens_details"),
        )
        if prompt is None:  # the words of the Responses API
            prompt, completion = usage.get("input_tokens"), usage.get("output_tokens")
            sent, received = usage.get("input_tokens_details"), usage.get("output_tokens_details")
        cached = _part(sent, "cached_tokens") or usage.get("cache_read_input_tokens")
        tokens = (
            _count(prompt),
            _count(completion),
            _count(cached),
            _count(_part(received, "reasoning_tokens")),
        )
        cost = entry.get("cost")
        if not isinstance(cost, (int, float)):
            cost = None if prompt is None else price(cls(1, *tokens))
        return cls(1, *tokens, 0.0, 1) if cost is None else cls(1, *tokens, cost)

    @property
    def dollars(self) -> float | None:
        """What the answers cost, or None if the price of any is not known."""
        return None if self.unpriced else self.known_dollars

    @property
    def tokens(self) -> int:
        """Tokens sent and received."""
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers ready for JSON, with `dollars` as None where a price is not known."""
        return self._asdict() | {"dollars": self.dollars}

    def __add__(self, other: Spending) -> Spending:  # type: ignore[override]  # no longer tuple
        """Return both together."""
        return Spending(*map(add, self, other))

    def __radd__(self, nothing: int) -> Spending:
        """Return this: `sum` begins with 0."""
        return self if nothing == 0 else NotImplemented

    def __sub__(self, earlier: Spending) -> Spending:
        """Return what has come since `earlier`."""
        return Spending(*map(sub, self, earlier))

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return any(self)


NOTHING = Spending()
NOT_BILLED = Spending(requests=1)
UNANSWERED = Spending(requests=1, unanswered=1)


def _part(details: Any, name: str) -> Any:
    return details.get(name) if isinstance(details, Mapping) else getattr(details, name, None)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
