"""Numbers and words about a client, for people and for machines."""

from dspy_resilient.observe.stats import Stats, Tally

__all__ = ["Stats", "Tally"]
