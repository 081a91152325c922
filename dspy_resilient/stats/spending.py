"""What requests have cost: tokens and dollars, as the provider counted them.

This module reads DSPy's history entries and adds up. It knows no price: a cost that DSPy and
LiteLLM do not know is unknown here too, and never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
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
    def of(cls, entry: Mapping[str, Any], price: Callable[[Spending], float | None]) -> Self:
        """Return what the answer cost of which DSPy has written `entry` into its history.

        Args:
            entry: The history entry.
            price: Asked for the cost of the tokens where the entry names none.
        """
        usage = entry.get("usage") or {}
        prompt = _first(usage, "prompt_tokens", "input_tokens")
        completion = _first(usage, "completion_tokens", "output_tokens")
        sent = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        received = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
        tokens = {
            "prompt_tokens": prompt or 0,
            "completion_tokens": completion or 0,
            "cached_tokens": _part(sent, "cached_tokens")
            or _first(usage, "cache_read_input_tokens", "cache_read_tokens")
            or 0,
            "reasoning_tokens": _part(received, "reasoning_tokens")
            or _first(usage, "reasoning_tokens")
            or 0,
        }
        cost = entry.get("cost")
        if not isinstance(cost, (int, float)):
            cost = None if prompt is None else price(Spending(**tokens))
        if cost is None:
            return cls(requests=1, unpriced=1, **tokens)
        return cls(requests=1, known_dollars=cost, **tokens)

    @property
    def dollars(self) -> float | None:
        """What the answers cost, or None if the price of any is not known."""
        return None if self.unpriced else self.known_dollars

    @property
    def tokens(self) -> int:
        """Tokens sent and received."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Spending) -> Spending:
        """Return both together."""
        return self._with(other, 1)

    def __radd__(self, nothing: int) -> Spending:
        """Return this: `sum` begins with 0."""
        return self if nothing == 0 else NotImplemented

    def __sub__(self, earlier: Spending) -> Spending:
        """Return what has come since `earlier`."""
        return self._with(earlier, -1)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self != NOTHING

    def _with(self, other: Spending, sign: int) -> Spending:
        return Spending(
            requests=self.requests + sign * other.requests,
            prompt_tokens=self.prompt_tokens + sign * other.prompt_tokens,
            completion_tokens=self.completion_tokens + sign * other.completion_tokens,
            cached_tokens=self.cached_tokens + sign * other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + sign * other.reasoning_tokens,
            known_dollars=self.known_dollars + sign * other.known_dollars,
            unpriced=self.unpriced + sign * other.unpriced,
            unanswered=self.unanswered + sign * other.unanswered,
        )


NOTHING = Spending()
NOT_BILLED = Spending(requests=1)
UNANSWERED = Spending(requests=1, unanswered=1)


def _first(usage: Mapping[str, Any], *names: str) -> int | None:
    return next((usage[name] for name in names if _is_count(usage.get(name))), None)


def _part(details: Any, name: str) -> int | None:
    found = details.get(name) if isinstance(details, Mapping) else getattr(details, name, None)
    return found if _is_count(found) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
