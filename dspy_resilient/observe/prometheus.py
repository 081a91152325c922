"""Prometheus metrics of clients, read when Prometheus asks; a call costs nothing more.

    from prometheus_client import REGISTRY, start_http_server
    from dspy_resilient.observe.prometheus import ClientCollector

    REGISTRY.register(ClientCollector(lm))
    start_http_server(9000)

Needs the extra `prometheus`. This module words for Prometheus what `metrics.py` finds. All names
begin with `dspy_resilient_`:

    calls_total, hits_total, stale_total, coalesced_total, errors_total            client
    attempts_total, retries_total, fallbacks_total, stored_total, evicted_total    client
    queued_total, queue_seconds_total                                              client
    failures_total                                                                 client, target, kind
    rejected_total, skipped_total                                                  client, reason
    prompt_tokens_total, completion_tokens_total, cached_tokens_total              client, target
    reasoning_tokens_total, dollars_spent_total, unpriced_total, unanswered_total  client, target
    tokens_saved_total, dollars_saved_total                                        client
    answer_seconds (histogram)                                                     client
    in_flight (calls under way, those that wait included)                          client
    throttled_seconds (for how long the throttle gate is still closed)             client, target
    circuit_state (1 for the state it is in, 0 for the others)                     client, target, state
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dspy_resilient.observe.metrics import (
    COUNTERS,
    circuit_states,
    in_flight,
    pauses,
    runtimes,
    totals,
)

if TYPE_CHECKING:
    from dspy_resilient.lm import ResilientLM
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.stats.stats import Stats


class ClientCollector(Collector):
    """A Prometheus collector over clients.

    One for all clients: a registry refuses a second one. Copies of a client are that client, and
    clients of one name are shown together. Not for the multiprocess mode of `prometheus_client`, which knows no collectors.

    Args:
        *clients: Each a `ResilientLM`, or a collection of them (such as `Clients`) that is looked
            through at every scrape. They are kept alive.

    Raises:
        TypeError: If one is neither.
    """

    def __init__(self, *clients: ResilientLM | Iterable[ResilientLM]) -> None:
        runtimes(clients)  # a wrong one should fail here, not at the first scrape
        self._clients = clients

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        found = runtimes(self._clients)
        numbers = totals(found)
        yield from _counters(numbers)
        yield _latency(numbers)
        yield _circuits(found)
        yield _in_flight(found)
        yield _gates(found)


def _counters(numbers: dict[str, Stats]) -> Iterator[Metric]:
    for counter in COUNTERS:
        labels = ["client", *counter.labels]
        family = CounterMetricFamily(
            f"dspy_resilient_{counter.name}", counter.meaning, labels=labels
        )
        for name, stats in numbers.items():
            for part, value in counter.samples(stats):
                family.add_metric([name, *part.values()], value)
        yield family


def _latency(numbers: dict[str, Stats]) -> Metric:
    meaning = "How long the answers of providers took, from request to end."
    family = HistogramMetricFamily("dspy_resilient_answer_seconds", meaning, labels=["client"])
    for name, stats in numbers.items():
        buckets = [(str(most), float(count)) for most, count in stats.latency.up_to()]
        buckets.append(("+Inf", float(stats.latency.count)))
        family.add_metric([name], buckets, stats.latency.total)
    return family


def _circuits(found: list[ClientState]) -> Metric:
    meaning = "1 for the state that the circuit is in, 0 for the others."
    labels = ["client", "target", "state"]
    family = GaugeMetricFamily("dspy_resilient_circuit_state", meaning, labels=labels)
    for (name, target), current in circuit_states(found).items():
        for state in type(current):
            family.add_metric([name, target, str(state)], float(state == current))
    return family


def _in_flight(found: list[ClientState]) -> Metric:
    meaning = "Calls under way, those that wait included."
    family = GaugeMetricFamily("dspy_resilient_in_flight", meaning, labels=["client"])
    for name, count in in_flight(found).items():
        family.add_metric([name], float(count))
    return family


def _gates(found: list[ClientState]) -> Metric:
    meaning = "Seconds for which the throttle gate is still closed."
    labels = ["client", "target"]
    family = GaugeMetricFamily("dspy_resilient_throttled_seconds", meaning, labels=labels)
    for (name, target), seconds in pauses(found).items():
        family.add_metric([name, target], seconds)
    return family
