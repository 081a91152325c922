"""Numbers and words about a client, for people and for machines."""

from dspy_resilient.observe.latency import Latency
from dspy_resilient.observe.stats import LastMinute, Stats, Tally

__all__ = ["LastMinute", "Latency", "Stats", "Tally"]
