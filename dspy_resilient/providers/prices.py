"""What a token of a model costs, by the price table that LiteLLM has loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dspy_resilient.stats import Spending


class Price(NamedTuple):
    """Dollars per token.

    Attributes:
        sent: For a token of the prompt.
        received: For a token of the answer.
        cached: For a token of the prompt that the provider had in its cache.
    """

    sent: float
    received: float
    cached: float

    def cost(self, tokens: Spending) -> float:
        """Return what these tokens cost."""
        fresh = tokens.prompt_tokens - tokens.cached_tokens
        return (
            fresh * self.sent
            + tokens.cached_tokens * self.cached
            + tokens.completion_tokens * self.received
        )


def price_of(model: str) -> Price | None:
    """Return what `model` costs, or None if LiteLLM is not loaded or does not know it."""
    litellm: Any = sys.modules.get("litellm")
    table = getattr(litellm, "model_cost", None) or {}
    provider, _, name = model.partition("/")
    entry = table.get(model)
    if entry is None:
        entry = table.get(name) or {}
        if not str(entry.get("litellm_provider", "")).startswith(provider):
            return None
    sent, received = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
    if not isinstance(sent, (int, float)) or not isinstance(received, (int, float)):
        return None
    cached = entry.get("cache_read_input_token_cost")
    return Price(sent, received, cached if isinstance(cached, (int, float)) else sent)
