"""Prometheus metrics of clients, read when Prometheus asks; a call costs nothing more.

    from prometheus_client import REGISTRY, start_http_server
    from dspy_resilient.observe.prometheus import ClientCollector

    REGISTRY.register(ClientCollector(lm))
    start_http_server(9000)

Needs the extra `prometheus`. This module counts nothing: it words what `stats()` and the circuits
say. All names begin with `dspy_resilient_`:

    calls_total, hits_total, stale_total, coalesced_total, errors_total            client
    attempts_total, retries_total, fallbacks_total, stored_total, evicted_total    client
    failures_total                                                                 client, kind
    rejected_total, skipped_total                                                  client, reason
    tokens_saved_total, dollars_saved_total                                        client
    answer_seconds (histogram)                                                     client
    circuit_state (1 for the state it is in, 0 for the others)                     client, target, state
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import dspy
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dspy_resilient.circuit import CircuitState
    from dspy_resilient.lm import ResilientLM
    from dspy_resilient.observe.stats import Stats

_COUNTERS = {
    "calls": "Calls made by users.",
    "hits": "Calls answered from the cache.",
    "stale": "Hits that were past their ttl.",
    "coalesced": "Calls answered by an identical one that was under way.",
    "errors": "Calls that ended with an error.",
    "attempts": "Requests sent to providers.",
    "retries": "Attempts repeated after a pause.",
    "fallbacks": "Times a call went on to the next target.",
    "stored": "Answers kept in the cache.",
    "evicted": "Answers dropped from the cache.",
    "tokens_saved": "Tokens that hits and coalesced calls did not use.",
}
_PARTS = {
    "failures": ("failed", "kind", "Attempts that ended without an answer."),
    "rejected": ("refused", "reason", "Times a circuit, gate or limit refused to send."),
    "skipped": ("skipped", "reason", "Answers not kept in the cache."),
}


class ClientCollector(Collector):
    """A Prometheus collector over clients.

    Copies of a client are that client, and clients of one name are shown together. After a
    `reset()` the counters begin anew, as after a restart. Not for the multiprocess mode of
    `prometheus_client`, which knows no collectors.

    Args:
        *clients: Each a `ResilientLM`, or a collection of them (such as `Clients`) that is looked
            through at every scrape. They are kept alive.
    """

    def __init__(self, *clients: ResilientLM | Iterable[ResilientLM]) -> None:
        self._clients = clients

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        clients = self._distinct()
        numbers: dict[str, Stats] = {}
        for client in clients:
            name, stats = client.name, client.stats()
            numbers[name] = numbers[name] + stats if name in numbers else stats
        yield from _counters(numbers)
        yield from _parts(numbers)
        yield _saved(numbers)
        yield _latency(numbers)
        yield _circuits(clients)

    def _distinct(self) -> list[ResilientLM]:
        """Return the clients, one of each that are copies of each other."""
        groups = ((each,) if isinstance(each, dspy.LM) else each for each in self._clients)
        clients = itertools.chain.from_iterable(groups)
        return list({id(client._runtime): client for client in clients}.values())  # noqa: SLF001  # what copies share


def _counters(numbers: dict[str, Stats]) -> Iterator[Metric]:
    for field, meaning in _COUNTERS.items():
        family = CounterMetricFamily(f"dspy_resilient_{field}", meaning, labels=["client"])
        for name, stats in numbers.items():
            family.add_metric([name], getattr(stats, field))
        yield family


def _parts(numbers: dict[str, Stats]) -> Iterator[Metric]:
    for whole, (field, label, meaning) in _PARTS.items():
        family = CounterMetricFamily(f"dspy_resilient_{whole}", meaning, labels=["client", label])
        for name, stats in numbers.items():
            for part, count in getattr(stats, field).items():
                family.add_metric([name, part], count)
        yield family


def _saved(numbers: dict[str, Stats]) -> Metric:
    meaning = "Dollars that hits and coalesced calls did not cost, as far as prices are known."
    family = CounterMetricFamily("dspy_resilient_dollars_saved", meaning, labels=["client"])
    for name, stats in numbers.items():
        family.add_metric([name], stats.cost_saved)
    return family


def _latency(numbers: dict[str, Stats]) -> Metric:
    meaning = "How long the answers of providers took, from request to end."
    family = HistogramMetricFamily("dspy_resilient_answer_seconds", meaning, labels=["client"])
    for name, stats in numbers.items():
        buckets = [(str(most), float(n)) for most, n in stats.latency.up_to()]
        buckets.append(("+Inf", float(stats.latency.count)))
        family.add_metric([name], buckets, stats.latency.total)
    return family


def _circuits(clients: list[ResilientLM]) -> Metric:
    meaning = "1 for the state that the circuit is in, 0 for the others."
    labels = ["client", "target", "state"]
    family = GaugeMetricFamily("dspy_resilient_circuit_state", meaning, labels=labels)
    states: dict[tuple[str, str], CircuitState] = {}
    for client in clients:
        for target, circuit in client.circuits.items():
            if states.get((client.name, target), "closed") == "closed":
                states[client.name, target] = circuit.state  # of one name, show the one in trouble
    for (name, target), found in states.items():
        for state in type(found):
            family.add_metric([name, target, str(state)], float(state == found))
    return family
