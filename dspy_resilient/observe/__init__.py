"""Clients seen from outside: OpenTelemetry, Prometheus, and the numbers behind both."""

from dspy_resilient.stats import LastMinute, Latency, Stats, Tally

__all__ = ["LastMinute", "Latency", "Stats", "Tally"]
