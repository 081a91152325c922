"""The routes to a provider, each with the circuit, gate and limits that guard it.

An endpoint has the circuit. A route is an endpoint asked with one credential: it has
the throttle gate, the limits, and a circuit of its own for refused credentials, so that one tenant's
key or quota never stops another. This module decides nothing about order, retries or waiting.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import cachetools

from dspy_resilient import providers
from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.circuit import CircuitState
from dspy_resilient.outcomes import Kind, Outcome, classify, redacted
from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.stats.latency import RecentTimes, duration
from dspy_resilient.targets.supervisor import Supervisor

if TYPE_CHECKING:
    from dspy_resilient.circuit import CircuitBreaker, Permit
    from dspy_resilient.errors import CircuitOpenError
    from dspy_resilient.outcomes import Verdict
    from dspy_resilient.providers.endpoint import Endpoint, Place
    from dspy_resilient.shared.circuit import SharedCircuit
    from dspy_resilient.shared.link import Link
    from dspy_resilient.targets.protocols import Client

_AUTH_FAILURES = 3
_SLOW = 3.0  # times the recent p95, from which an attempt is no longer merely slow
_LEAST_PATIENCE = 1.0
_UNKNOWN = 2.0  # seconds that pass for slow where nothing was answered yet


class Admission:
    """Leave to send one attempt: the permit of the circuit, and that of the credential's own."""

    __slots__ = ("_access", "_permit", "_route")

    def __init__(self, route: Route, permit: Permit | None, access: Permit | None) -> None:
        self._route = route
        self._permit = permit
        self._access = access

    @property
    def probe(self) -> bool:
        """Whether the attempt is a probe of a half-open circuit."""
        return (self._permit is not None and self._permit.probe) or (
            self._access is not None and self._access.probe
        )

    def answered(self) -> None:
        """Report an answer."""
        if self._permit is not None:
            self._permit.success()
        if self._access is not None:
            self._access.success()

    def withdraw(self) -> None:
        """Report that nothing was sent."""
        for permit in (self._permit, self._access):
            if permit is not None:
                permit.neutral()

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        """Report what `verdict` says, each circuit hearing only what concerns it."""
        if verdict.kind in (Kind.AUTH, Kind.BILLING):
            self._route.refuse_credential(self._access, verdict.kind, error)
        elif self._access is not None:
            self._access.neutral()
        if self._permit is None:
            return
        if verdict.outcome == Outcome.FAILURE and verdict.kind not in (Kind.AUTH, Kind.BILLING):
            self._permit.failure(redacted(error), retry_after=verdict.retry_after)
        else:
            self._permit.neutral()


class Route:
    """One way to a provider: a circuit per endpoint, and gate, limits and access per credential.

    Attributes:
        answered_from: The clock's reading when the youngest attempt began that was answered.
        failed_from: The same of the youngest that failed.
    """

    def __init__(
        self,
        client: Client,
        place: Place,
        circuit: CircuitBreaker | None,
    ) -> None:
        self.label = label = place.endpoint.label
        self.service = providers.Service(place.endpoint.model, place.provider, place.endpoint.url)
        key = (place.credential or "none")[:6]  # of its HMAC
        self.access_label = f"{label} (key {key})"
        self.circuit = circuit
        self.access: CircuitBreaker | None = None
        self.shared = cast("SharedCircuit", circuit) if client.shared_state is not None else None
        self.gate = gate = client.new_gate(label, place)
        shares = client.shared_state is not None
        self.links = cast("tuple[Link[Any, Any], ...]", (gate,) if shares else ())
        self._new_limiter = partial(client.new_limiter, label, place)
        self.limiter = self._new_limiter()
        self.answered_from = self.failed_from = -math.inf
        self._times = RecentTimes()
        self._client = client
        if circuit is not None and circuit.policy.listen == "provider":
            providers.subscribe(self.service, _hear, circuit)

    def circuits(self) -> dict[str, CircuitBreaker]:
        """Return the circuits there are on this route, by label."""
        labelled = ((self.label, self.circuit), (self.access_label, self.access))
        return {label: circuit for label, circuit in labelled if circuit is not None}

    @property
    def state(self) -> CircuitState | None:
        """State of the circuit that decides whether calls are let through; None without one."""
        return self.blocker().state if self._is_guarded else None

    def look_ahead(self) -> None:
        """Have the store asked now what it would be asked soon, while there is a wait anyway."""
        for link in (*self.links, self.shared):
            if link is not None:
                link.question()

    def is_slow(self, seconds: float) -> bool:
        """Whether an answer that took `seconds` counts as slow."""
        slow_call = self.circuit.policy.slow_call if self.circuit is not None else None
        return slow_call is not None and seconds >= slow_call

    def admit(self) -> Admission | None:
        """Return leave to send one attempt, or None if a circuit refuses."""
        permit = access = None
        if self.access is not None and self.access.wait_time() > 0:
            return None  # before the other circuit gives its probe away
        if self.circuit is not None:
            permit = self.circuit.try_admit()
            if permit is None:
                return None
        if self.access is not None:
            access = self.access.try_admit()
            if access is None:
                if permit is not None:
                    permit.neutral()
                return None
        return Admission(self, permit, access)

    def note_answer(self, began: float, seconds: float) -> None:
        """Note an answer to an attempt that began then and took so long."""
        self.answered_from = max(self.answered_from, began)
        self._times.record(seconds)

    def note_failure(self, began: float) -> None:
        """Note that an attempt that began then has failed."""
        self.failed_from = max(self.failed_from, began)

    def patience_with_a_straggler(self) -> float:
        """Return the seconds after which an identical call sends a request of its own."""
        p95 = self._times.p95()
        return math.inf if p95 is None else max(_LEAST_PATIENCE, _SLOW * p95)

    def patience(self, timeout: float | None) -> float:
        """Return the seconds after which an attempt that ran out of time is the provider's failure.

        Args:
            timeout: The attempt's own timeout, if it has one.
        """
        p95 = self._times.p95()
        slow = _UNKNOWN if p95 is None else _SLOW * p95
        return min(slow, math.inf if timeout is None else timeout)

    def has_room(self) -> bool:
        """Whether the limits would let an attempt in now."""
        return self.limiter is None or self.limiter.has_room()

    def is_shut_out(self) -> bool:
        """Whether the credential is refused, or a circuit is open until a person closes it."""
        refused = self.access is not None and self.access.wait_time() > 0
        return refused or math.isinf(self.wait_time())

    def blocker(self) -> CircuitBreaker:
        """Return the circuit that refuses longest (the endpoint's own if none does)."""
        if self.access is None:
            assert self.circuit is not None  # a route without circuits never refuses
            return self.circuit
        circuits = [c for c in (self.circuit, self.access) if c is not None]
        return max(circuits, key=lambda circuit: circuit.wait_time())

    def wait_time(self) -> float:
        """Return the seconds until `admit` may succeed; see `CircuitBreaker.wait_time`."""
        if not self._is_guarded:
            return 0.0
        return self.blocker().wait_time()

    def rejection(self) -> CircuitOpenError:
        """Return a fresh error that says why this route is closed, and until when."""
        return self.blocker().rejection()

    def reset(self) -> None:
        """Close the circuits and open the gate."""
        if self.circuit is not None:
            self.circuit.reset()
        if self.access is not None:
            self.access.reset()
        self.gate.reset()

    def restart(self) -> None:
        """Replace the limits by clean ones; who waits goes on waiting in them. Circuit and gate stay."""
        before, self.limiter = self.limiter, self._new_limiter()
        if before is not None:
            with suppress(Exception):  # it may be what is broken
                before.disband()

    def explain(self) -> str:
        """Return what state this route is in, why, since when, and until when."""
        says = [
            f"its circuit has been {self.blocker().explain()}" if self._is_guarded else "no circuit"
        ]
        pause = self.gate.wait_time()
        if pause == math.inf:
            says.append("let in step by step after a 429")
        elif pause > 0:
            says.append(f"throttled for {duration(pause)} more")
        if self.limiter is not None and self.limiter.queued:
            says.append(f"{self.limiter.in_use} requests under way, {self.limiter.queued} queue")
        return f"{self.label}: {'; '.join(says)}."

    @property
    def _is_guarded(self) -> bool:
        return self.circuit is not None or self.access is not None

    def refuse_credential(self, permit: Permit | None, kind: Kind, error: BaseException) -> None:
        """Open the way for this credential alone: at once on billing, after 3 on auth."""
        if self.circuit is None:
            return
        if self.access is None:
            self.access = self._client.new_circuit(
                self.access_label, failure_threshold=_AUTH_FAILURES
            )
        if permit is None and self.access.state is CircuitState.CLOSED:
            permit = self.access.try_admit()  # the attempt is older than the circuit
        if permit is not None:
            permit.failure(redacted(error), reason=str(kind))


def _hear(circuit: CircuitBreaker, event: providers.CallbackEvent, succeeded: bool) -> None:
    """Let a circuit know how a call went that does not report to it."""
    permit = circuit.overhear(event.seconds or 0.0)
    if succeeded:
        permit.success()
    elif (error := event.error) is not None:
        verdict = classify(error, seconds=event.seconds, **event.facts_of(error))
        if verdict.outcome == Outcome.FAILURE:
            permit.failure(redacted(error), retry_after=verdict.retry_after)


class Routes:
    """The routes of one client, made when first used; the least recently used go.

    Attributes:
        client: Whose they are.
        supervisor: Counts what breaks on the way along any of them.
    """

    _MOST = 512

    def __init__(self, client: Client, shared: CircuitBreaker | None = None) -> None:
        self.supervisor = Supervisor(clock=client.clock, client=client.name)
        self.client = client
        self._shared = shared
        self.renew()
        renew_after_fork(self)
        self._routes: cachetools.LRUCache[Place, Route] = cachetools.LRUCache(self._MOST)
        self._endpoints: cachetools.LRUCache[Endpoint, CircuitBreaker | None]
        self._endpoints = cachetools.LRUCache(self._MOST)

    def renew(self) -> None:
        """Make the lock anew in a forked child."""
        self._lock = threading.Lock()

    def find(self, lm: Any, kwargs: dict[str, Any]) -> Route:
        """Return the route of a call with `kwargs` on `lm`."""
        place = resolve(lm.model, lm.model_type, {**lm.kwargs, **kwargs})
        with self._lock:
            route = self._routes.get(place)
            if route is None:
                route = self._routes[place] = self._make(place)
            return route

    def _make(self, place: Place) -> Route:
        endpoint = place.endpoint
        if endpoint not in self._endpoints:
            circuit = self._shared
            if circuit is None and self.client.circuit_policy is not None:
                circuit = self.client.new_circuit(endpoint.label, endpoint)
            self._endpoints[endpoint] = circuit
        return Route(self.client, place, self._endpoints[endpoint])

    def all(self) -> list[Route]:
        """Return the routes in use."""
        with self._lock:
            return list(self._routes.values())

    def reset(self) -> None:
        """Bring every route back to its first state; the circuits stay the same objects."""
        for route in self.all():
            route.reset()

    def restart(self) -> None:
        """Give every route clean limits."""
        for route in self.all():
            route.restart()
