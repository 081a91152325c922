"""Numbers about a client, and how people read them."""

from dspy_resilient.stats.latency import Latency
from dspy_resilient.stats.spending import Spending
from dspy_resilient.stats.stats import LastMinute, Stats, Tally

__all__ = ["LastMinute", "Latency", "Spending", "Stats", "Tally"]
