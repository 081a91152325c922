"""What is measured about clients, for whichever system collects it; it counts nothing itself.

Clients that are copies of each other count once, and those of one name together. A `reset()` does
not touch these numbers: what collects them expects counters that never fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import dspy

from dspy_resilient.stats import Spending

if TYPE_CHECKING:
    from dspy_resilient.circuit import CircuitState
    from dspy_resilient.lm import ResilientLM
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.stats.stats import Stats


class Counter(NamedTuple):
    """One number of `Stats`: its name for collectors, its field, and what tells its parts apart."""

    name: str
    field: str
    labels: tuple[str, ...]
    meaning: str

    def samples(self, stats: Stats) -> list[tuple[dict[str, str], float]]:
        """Return the labels and value of the number, or of each of its parts."""
        if self.field in _SPENT:
            return self._spent(stats)
        found = getattr(stats, self.field)
        if not self.labels:
            return [({}, found)]
        if len(self.labels) == 1:
            return [({self.labels[0]: part}, count) for part, count in found.items()]
        return [
            (dict(zip(self.labels, (part, inner), strict=True)), count)
            for part, counts in found.items()
            for inner, count in counts.items()
        ]

    def _spent(self, stats: Stats) -> list[tuple[dict[str, str], float]]:
        return [
            ({"target": target}, getattr(spent, self.field))
            for target, spent in stats.spent_by_target.items()
            if self.field != "known_dollars" or spent.known_dollars or not spent.unpriced
        ]


_SPENT = set(Spending._fields)

COUNTERS = (
    Counter("calls", "calls", (), "Calls made by users."),
    Counter("hits", "hits", (), "Calls answered from the cache."),
    Counter("stale", "stale", (), "Hits that were past their ttl."),
    Counter("coalesced", "coalesced", (), "Calls answered by an identical one under way."),
    Counter("errors", "errors", (), "Calls that ended with an error."),
    Counter("attempts", "attempts", (), "Requests sent to providers."),
    Counter(
        "failures", "failed_by_target", ("target", "kind"), "Attempts that ended without an answer."
    ),
    Counter("retries", "retries", (), "Attempts repeated after a pause."),
    Counter("queued", "queued", (), "Times a call waited for its turn within its limits."),
    Counter("queue_seconds", "queue_seconds", (), "Seconds it waited there, all together."),
    Counter("rejected", "refused", ("reason",), "Times a circuit, gate or limit refused to send."),
    Counter("fallbacks", "fallbacks", (), "Times a call went on to the next target."),
    Counter("stored", "stored", (), "Answers kept in the cache."),
    Counter("skipped", "skipped", ("reason",), "Answers not kept in the cache."),
    Counter("evicted", "evicted", (), "Answers dropped from the cache."),
    Counter("disk_errors", "disk_errors", ("kind",), "Faults of the cache's disk."),
    Counter("events_dropped", "events_dropped", (), "Events that a slow listener missed."),
    Counter("prompt_tokens", "prompt_tokens", ("target",), "Tokens sent and billed."),
    Counter("completion_tokens", "completion_tokens", ("target",), "Tokens received and billed."),
    Counter("cached_tokens", "cached_tokens", ("target",), "Tokens sent that the provider had."),
    Counter("reasoning_tokens", "reasoning_tokens", ("target",), "Tokens spent on reasoning."),
    Counter(
        "dollars_spent", "known_dollars", ("target",), "Dollars billed, where prices are known."
    ),
    Counter("unpriced", "unpriced", ("target",), "Answers whose price is not known."),
    Counter(
        "unanswered", "unanswered", ("target",), "Requests that may be billed without an answer."
    ),
    Counter("tokens_saved", "tokens_saved", (), "Tokens that hits and coalesced calls saved."),
    Counter("dollars_saved", "cost_saved", (), "Dollars they saved, where prices are known."),
)


def runtimes(clients: Iterable[ResilientLM | Iterable[ResilientLM]]) -> list[ClientState]:
    """Return what the clients stand on, each once; a collection among them is looked through.

    Raises:
        TypeError: If one is neither a `ResilientLM` nor a collection of them.
    """
    return list(dict.fromkeys(_runtime(lm) for each in clients for lm in _each(each)))


def _each(clients: Any) -> Iterable[Any]:
    if isinstance(clients, Mapping):
        return clients.values()
    is_one = isinstance(clients, (dspy.BaseLM, str)) or not isinstance(clients, Iterable)
    return (clients,) if is_one else clients


def _runtime(client: Any) -> ClientState:
    try:
        runtime: ClientState = client._runtime  # noqa: SLF001  # what copies share
    except AttributeError:
        raise TypeError(
            "clients must be ResilientLMs or collections of them; got a " + type(client).__name__
        ) from None
    return runtime


def totals(found: Iterable[ClientState]) -> dict[str, Stats]:
    """Return the numbers by the name of the client."""
    numbers: dict[str, Stats] = {}
    for runtime in found:
        name, stats = runtime.name, runtime.totals()
        numbers[name] = numbers[name] + stats if name in numbers else stats
    return numbers


def circuit_states(found: Iterable[ClientState]) -> dict[tuple[str, str], CircuitState]:
    """Return the state of every circuit in use, by client and target.

    Where several have the same names, one that is not closed is shown.
    """
    states: dict[tuple[str, str], CircuitState] = {}
    for runtime in found:
        for target, circuit in runtime.circuits().items():
            if states.get((runtime.name, target), "closed") == "closed":
                states[runtime.name, target] = circuit.state
    return states


def in_flight(found: Iterable[ClientState]) -> dict[str, int]:
    """Return how many calls are under way, those that wait included, by client."""
    counts: dict[str, int] = {}
    for runtime in found:
        counts[runtime.name] = counts.get(runtime.name, 0) + len(runtime.in_flight)
    return counts


def pauses(found: Iterable[ClientState]) -> dict[tuple[str, str], float]:
    """Return for how long each throttle gate is still closed, by client and target; 0 if open."""
    waits: dict[tuple[str, str], float] = {}
    for runtime in found:
        for route in runtime.all_routes():
            name = (runtime.name, route.label)
            waits[name] = max(waits.get(name, 0.0), route.gate.wait_time())
    return waits
