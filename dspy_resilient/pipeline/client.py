"""What the copies of one `ResilientLM` share: cache, flights, routes, events and numbers.

A rollout, a `copy()` and a `deepcopy()` are the same client and so share one `ClientState`; a new
`ResilientLM` has one of its own and shares nothing. Pickling keeps the policies only: what comes
back is an empty one.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from dspy_resilient import providers
from dspy_resilient._support.worker import Worker
from dspy_resilient.budgets import Ledger, Meter, unlimited_but
from dspy_resilient.cache import Flights, ResponseCache, usable
from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.errors import ClientClosedError
from dspy_resilient.events import ClientRestarted, Event, Hub, WaitStarted, logger, printable
from dspy_resilient.limits import Limiter, ThrottleGate
from dspy_resilient.pipeline.attempt import Attempt
from dspy_resilient.pipeline.in_flight import InFlight
from dspy_resilient.stats import LastMinute, Stats, Tally
from dspy_resilient.stats.latency import duration
from dspy_resilient.targets.route import Routes

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from dspy_resilient.cache import Answer
    from dspy_resilient.limits import GatePermit, Slot
    from dspy_resilient.pipeline.options import Options
    from dspy_resilient.pipeline.spending import Funds
    from dspy_resilient.pipeline.state import Call, Turn
    from dspy_resilient.providers.endpoint import Endpoint, Place
    from dspy_resilient.shared import SharedState
    from dspy_resilient.targets.route import Admission, Route


_PERIODS = {"client": math.inf, "day": 86_400.0, "hour": 3_600.0}


class Tracer(Protocol):
    """Whoever follows calls while they happen, on the thread or task on which they do."""

    def call(self, call: Call) -> AbstractContextManager[None]:
        """Return what surrounds one call."""
        ...

    def attempt(self, attempt: Attempt) -> AbstractContextManager[None]:
        """Return what surrounds one request."""
        ...

    def note(self, event: Event) -> None:
        """Hear of an event within the call that met it; must not raise."""
        ...


class ClientState:
    """The shared part of a client; safe for threads and event loops."""

    def __init__(
        self,
        options: Options,
        *,
        folder: Callable[[], str | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.name = options.name
        self.retry = options.retry
        self.limits = options.limits
        self.tenant = options.cache.tenant
        self.clock = clock
        self.random = random.random
        self.closed = False
        self.long_wait = 3.0
        self.warned = False
        self.lost: set[str] = set()
        self.hub = Hub(options.on_event)
        self.trace(None)
        self.tally = Tally()
        self._meters: dict[str, Meter] = {}
        self._made_at = clock()
        self._minute = LastMinute()
        self._zero: Stats | None = None
        self.http_clients = providers.HttpClients()
        self.in_flight = InFlight(options.name)
        self.flights = self._new_flights()
        self.worker = Worker("disk")
        self.shared_state = self._join_fleet()
        self.ledger = self._new_ledger()
        self.cache = self._new_cache(folder)
        shared = options.circuit if isinstance(options.circuit, CircuitBreaker) else None
        self.circuit_policy = shared.policy if shared is not None else options.circuit
        if shared is not None:
            shared.add_listener(self.hear_circuit)
        self.routes = Routes(self, shared)
        self.fallback_routes = Routes(self)

    def _join_fleet(self) -> SharedState | None:
        if self.options.store is None:
            return None
        from dspy_resilient.shared import SharedState  # noqa: PLC0415  # only for those who share

        return SharedState(self.options.store, self.name, clock=self.clock, emit=self.emit)

    def _new_ledger(self) -> Ledger | None:
        """Return the books of `LimitPolicy.max_dollars`, shared where anything is."""
        policy = self.limits
        if policy is None or policy.max_dollars is None:
            return None
        limit, seconds = unlimited_but(policy.max_dollars), _PERIODS[policy.per]
        if self.shared_state is None:
            return Ledger(limit, seconds=seconds)
        return self.shared_state.client_ledger(limit, seconds)

    def _new_cache(self, folder: Callable[[], str | None] | None) -> ResponseCache:
        policy = self.options.cache
        others = (
            self.shared_state.answers(policy.kept)
            if self.shared_state is not None and policy.shared
            else None
        )
        return ResponseCache(policy, clock=self.clock, folder=folder, others=others)

    def ready(self) -> bool:
        """Whether the next attempt can be sent at once."""
        return providers.loaded()

    def new_circuit(
        self, label: str, endpoint: Endpoint | None = None, **changes: Any
    ) -> CircuitBreaker:
        """Return a circuit of this client's policy for the place called `label`.

        Args:
            label: For people.
            endpoint: Where, if the circuit is to be shared where anything is.
            **changes: To the policy.
        """
        given = self.circuit_policy
        assert given is not None  # or nobody asks
        policy = dataclasses.replace(given, **changes)
        facts: dict[str, Any] = {
            "name": f"{self.name}: {label}",
            "target": label,
            "clock": self.clock,
            "random": self.random,
            "listener": self.hub,
            "client": self.name,
        }
        if self.shared_state is None or endpoint is None:
            return CircuitBreaker(policy, **facts)
        return self.shared_state.circuit(endpoint, policy, **facts)

    def hear_circuit(self, event: Event) -> None:
        """Tell of a change of the circuit that the user gave to this client, among others."""
        self.hub(dataclasses.replace(event, client=self.name))

    def new_gate(self, label: str, place: Place) -> ThrottleGate:
        """Return an open throttle gate for one credential at `place`, shared where anything is."""
        facts: dict[str, Any] = {
            "clock": self.clock,
            "random": self.random,
            "listener": self.hub,
            "client": self.name,
            "target": label,
        }
        if self.shared_state is None:
            return ThrottleGate(**facts)
        return self.shared_state.gate(place.endpoint, place.credential or "", **facts)

    def attempt(
        self,
        turn: Turn,
        call: Call,
        admission: Admission,
        gate_permit: GatePermit,
        slot: Slot | None,
        funds: Funds | None,
    ) -> Attempt:
        """Return one attempt, ready to be sent."""
        return Attempt(self, turn, call, admission, gate_permit, slot, funds)

    def meter(self, target: str) -> Meter:
        """Return what estimates requests to the target of this label."""
        return self._meters.setdefault(target, Meter())

    def begin(self, what: str) -> float:
        """Count a call or an attempt that begins, and return the clock's reading."""
        now = self.clock()
        if now >= self._minute.due:
            self._minute.mark(now, self.totals)
        self.tally.add(what)
        return now

    def announce_wait(self, reason: str, target: str, seconds: float) -> None:
        """Say that calls are held up, and until when unless `seconds` is inf."""
        known, ends = None, None
        if math.isfinite(seconds):
            known = seconds
            ends = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))  # noqa: TID251  # people read it
        self.emit(WaitStarted, target, reason=reason, seconds=known, ends=ends)

    def new_limiter(self, label: str, place: Place) -> Limiter | None:
        """Return an empty limiter, or None without limits; its rates are shared where anything is."""
        policy = self.limits
        if policy is None:
            return None
        has_rates = policy.rpm is not None or policy.tpm is not None
        rates = None
        if self.shared_state is not None and has_rates:
            rates = self.shared_state.rates(place.endpoint, place.credential or "", policy)
        return Limiter(policy, clock=self.clock, client=self.name, target=label, rates=rates)

    def _new_flights(self) -> Flights:
        return Flights(clock=self.clock, max_age=self.options.cache.coalesce_max_age)

    def emit(self, kind: type[Event], target: str | None = None, **facts: Any) -> None:
        """Tell the listener and the log that something happened."""
        wanted = self.hub.wants(kind)
        if wanted or self.tracer is not None:
            event = kind(client=self.name, at=self.clock(), target=target, **facts)
            if self.tracer is not None:
                self.tracer.note(event)
            if wanted:
                self.hub(event)

    def backoff(self, failures: int) -> float:
        """Return the pause after the given number of earlier failures."""
        return self.retry.pause(failures, self.random())

    def store(self, key: str | None, answer: Answer, flaw: str | None = None) -> None:
        """Keep `answer` in memory if it may be stored; `flaw` is what the attempt knows of it."""
        if key is None:
            return
        store_if = self.options.cache.store_if
        if store_if is None:
            reason = flaw or usable(answer)
        else:
            reason = None if self._ask(store_if, answer) else "store_if"
        if reason is None:
            self.cache.store(key, answer)
        else:
            self.tally.add(f"skipped:{reason}")

    def _ask(self, store_if: Callable[[dict[str, Any]], bool], answer: Answer) -> bool:
        try:
            return bool(store_if(answer.record or {"outputs": answer.outputs}))
        except Exception:  # noqa: BLE001  # a user's rule must not fail the call
            logger.exception("dspy_resilient.store_if_failed", extra={"client": self.name})
            return False

    def all_routes(self) -> list[Route]:
        """Return every route that has been used."""
        return [*self.routes.all(), *self.fallback_routes.all()]

    def circuits(self) -> dict[str, CircuitBreaker]:
        """Return the circuits that have been used, by label."""
        circuits: dict[str, CircuitBreaker] = {}
        for route in self.all_routes():
            circuits |= route.circuits()
        return circuits

    def trace(self, tracer: Tracer | None) -> None:
        """Have every call, attempt and event told to `tracer`, as it happens; None ends it."""
        self.tracer = tracer
        self.is_heard = tracer is not None or self.hub.listener is not None

    def reset(self) -> None:
        """Close every circuit, open every gate, and count from zero."""
        self.routes.reset()
        self.fallback_routes.reset()
        self._minute = LastMinute()
        self._zero = self.totals()

    def check_open(self) -> None:
        """Raise ClientClosedError if the client was closed."""
        if self.closed:
            raise ClientClosedError(f"client {self.name!r} is closed", client=self.name)

    def restart(self) -> None:
        """Start over with new connections, clean limits and in-flight table, and no break on record."""
        self.http_clients.renew()
        self._start_over(None)
        self.routes.supervisor.forgive()
        self.fallback_routes.supervisor.forgive()

    def mend(self, routes: Routes, seen: int, error: Exception, target: str | None = None) -> None:
        """Restart after a break on one of `routes`, unless that has been done since `seen`.

        Raises:
            RestartLimitError: That would be too often.
        """
        if (
            seen == routes.supervisor.generation
        ):  # before the next try of anybody who finds it broken
            self.http_clients.renew()
        with routes.supervisor.restart(seen) as is_due:
            if is_due:
                self._start_over(target, error=type(error).__name__)

    def _start_over(self, target: str | None, **facts: Any) -> None:
        before, self.flights = self.flights, self._new_flights()
        with suppress(Exception):  # it may be what is broken
            before.disband()
        self.routes.restart()
        self.fallback_routes.restart()
        self.tally.add("restarts")
        self.emit(ClientRestarted, target, **facts)

    def close(self) -> None:
        """Refuse further calls, release the cache, and close the connections that nobody uses."""
        self.closed = True
        self.cache.close()
        if self.shared_state is not None:
            self.shared_state.close()
        self.http_clients.close()

    def totals(self) -> Stats:
        """Return everything counted since the client was made."""
        counts, cache = self.tally.totals(), self.cache.numbers()
        skipped = {**counts.pop("skipped", {}), **cache.skipped}
        failed, refused = counts.pop("failed", {}), counts.get("refused", {})
        by_target: dict[str, dict[str, int]] = {}
        for name, count in failed.items():
            kind, _, target = name.partition(":")
            by_target.setdefault(target, {})[kind] = count
        return Stats(
            client=self.name,
            seconds=self.clock() - self._made_at,
            hits=cache.hits,
            misses=cache.misses,
            stale=cache.stale,
            stored=cache.stored,
            evicted=cache.evicted,
            disk_errors=cache.disk_errors,
            events_dropped=self.hub.dropped,
            skipped=skipped,
            failures=sum(failed.values()),
            failed_by_target=by_target,
            rejected=sum(refused.values()),
            **counts,
        )

    def stats(self) -> Stats:
        """Return the numbers since the client was made or reset, those of the last minute too."""
        totals = self.totals()
        recent = self._minute.since(totals)
        return dataclasses.replace(totals - self._zero if self._zero else totals, recent=recent)

    def explain(self, routes: list[Route]) -> str:
        """Return a line about each of the given routes."""
        lines = [route.explain() for route in routes]
        if wait := self.routes.supervisor.wait_time():
            lines.append(f"broke too often and is left alone for {duration(wait)}; see restart().")
        if self.options.shared is not None and self.shared_state is None:
            lines.append("shares nothing, since its store was not saved; see copy(shared=...).")
        if faults := self.cache.numbers().disk_errors:
            kinds = ", ".join(f"{kind} ({count:,})" for kind, count in faults.items())
            lines.append(f"its disk fails, so answers may be kept in memory only: {kinds}.")
        return "\n".join(printable(f"{self.name}: {line}") for line in lines)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClientState:
        """Return this very object: a copy of a client is the same client."""
        return self
