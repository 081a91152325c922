"""A circuit that a client has in common with others.

While the store answers, it decides: this process reports how calls ended, takes over what has come
of it, and sends a probe only with a place that the store has given it. When the store does not
answer, this is an ordinary circuit again, from where it stood. Transitions and rules are the
machine's, here and there.
"""

from __future__ import annotations

import math
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from dspy_resilient._support.redact import describe
from dspy_resilient.circuit import CircuitBreaker, CircuitState, Permit
from dspy_resilient.outcomes import Outcome
from dspy_resilient.shared.link import VIEW_AGE, Link
from dspy_resilient.shared.store import CircuitReport, CircuitVerdict, CircuitView, Verb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.link import Courier

_CLOSED, _HALF_OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN
_SUCCESS, _FAILURE, _NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL


class _Ticket(NamedTuple):
    """The store's leave to send a probe, which nobody here has used yet."""

    name: str
    until: float


def _tells_of_failure(verdicts: Sequence[CircuitVerdict]) -> bool:
    return any(each.outcome is _FAILURE for each in verdicts)


class SharedCircuit(Link[CircuitReport, CircuitView], CircuitBreaker):
    """A `CircuitBreaker` whose state is that of all clients with the same key.

    What is done by hand reaches the others within `VIEW_AGE` seconds too. Used outside of a call
    (as a decorator, or on its own) it goes by what this process has last heard.

    Args:
        courier: The way to the store.
        key: Where the state lies.
        policy: When it opens; every client goes by its own.
        **facts: As for `CircuitBreaker`.
    """

    def __init__(self, courier: Courier, key: str, policy: CircuitPolicy, **facts: Any) -> None:
        super().__init__(policy, **facts)
        self._key = key
        self._begin(courier)
        self._forget_calls()
        self._stamp = 0
        self._stamped = self._drafted = self._machine.generation

    def _forget_calls(self) -> None:
        self._askers = 0
        self._lease = 0.0
        self._wishes = self._early = False
        self._outbox: list[CircuitVerdict] = []
        self._ticket: _Ticket | None = None
        self._tokens: dict[Permit, str] = {}

    def renew(self) -> None:
        """Make the circuit usable in a forked child, where its callers do not exist."""
        super().renew()
        self._begin(self._courier)
        self._forget_calls()

    # Asking

    @contextmanager
    def consulting(self, lease: float, *, early: bool = False) -> Iterator[Future[bool] | None]:
        """Give what to wait for, if anything, before `try_admit` is called inside the block.

        Args:
            lease: See `try_admit`.
            early: See `try_admit`.
        """
        with self._lock:
            self._askers += 1
        try:
            yield self._question(lease, early=early)
        finally:
            with self._lock:
                self._askers -= 1
                unused = self._return_ticket()
            if unused:
                self.ask()

    def _question(self, lease: float, *, early: bool) -> Future[bool] | None:
        with self._lock:
            machine, now = self._machine, self._clock()
            if self.alone:
                needs, worth = False, self.is_old
            elif machine.passes:
                if self._under_way is not None and _tells_of_failure(self._under_way.verdicts):
                    return self._arrives  # this verdict may be the one that opens it
                age = now - self._heard_at
                trouble = machine.failures > 0 or _tells_of_failure(self._outbox)
                needs = age >= VIEW_AGE or trouble
                worth = needs or age >= VIEW_AGE / 2
            elif self._ticket is not None or not self._may_probe(now, early=early):
                needs, worth = False, self.is_old
            else:
                needs = worth = self._wishes = True
                self._early = self._early or early
                self._lease = max(self._lease, self.policy.probe_lease, lease)
        future = self.ask() if worth else None
        return future if needs else None

    def _may_probe(self, now: float, *, early: bool) -> bool:
        machine = self._machine
        return machine.wait(now) == 0 or (early and machine.early_wait(now) == 0)

    def try_admit(self, lease: float = 0.0, *, early: bool = False) -> Permit | None:
        """Return leave to make one call, or None; see `CircuitBreaker.try_admit`."""
        machine = self._machine
        generation = machine.generation
        if machine.state is _CLOSED:
            return Permit(self, generation, self._clock())
        with self._lock:
            goes_by_store = self._askers > 0 and not self.alone and not machine.passes
            if goes_by_store:
                ticket, self._ticket = self._ticket, None
                if ticket is not None:
                    permit = Permit(self, machine.generation, self._clock(), probe=True)
                    self._tokens[permit] = ticket.name
                    self._leases.give_back(ticket.name)
                    self._leases.take(permit, ticket.until)
                    return permit
                if self.policy.mode != "observe":
                    self._rejected += 1
                    return None
        return super().try_admit(lease, early=early)

    def enlist(self) -> Future[None]:
        """Wait as at any circuit; meanwhile the store is asked for news."""
        waiter = super().enlist()
        self._courier.watch(self)
        return waiter

    def wants_news(self) -> bool:
        """Whether somebody waits."""
        return self._notifier.waiting > 0

    def _wake(self) -> None:
        self._notifier.send()

    # Reporting

    def record(
        self,
        permit: Permit,
        outcome: Outcome,
        error: BaseException | str | None = None,
        *,
        retry_after: float | None = None,
        reason: str = "failures",
    ) -> None:
        """Take the report of `permit`; called by its own methods."""
        if self.alone:
            super().record(permit, outcome, error, retry_after=retry_after, reason=reason)
            return
        text = None if error is None else describe(error)
        with self._lock:
            token = self._tokens.pop(permit, None)
            if permit.reported:
                return
            permit.reported = True
            if permit.generation != self._machine.generation:
                return
            if permit.probe:
                self._leases.give_back(permit)
            if outcome is _SUCCESS and token is None:
                self._count_success(permit)
                return
            if outcome is _NEUTRAL and token is None:
                return
            slow = outcome is _SUCCESS and self._is_slow(permit)
            self._outbox.append(
                CircuitVerdict(outcome, 1, int(slow), reason, text, retry_after, token)
            )
        self.ask()

    def _count_success(self, permit: Permit) -> None:
        slow, outbox = int(self._is_slow(permit)), self._outbox
        if outbox and outbox[-1].outcome is _SUCCESS and outbox[-1].probe is None:
            last = outbox.pop()
            outbox.append(CircuitVerdict(_SUCCESS, last.number + 1, last.slow + slow))
        else:
            outbox.append(CircuitVerdict(_SUCCESS, 1, slow))

    def _is_slow(self, permit: Permit) -> bool:
        limit = self.policy.slow_call
        return limit is not None and self._clock() - permit.started_at >= limit

    def _return_ticket(self) -> bool:
        """Have a place that nobody here will use given back; has the lock."""
        ticket = self._ticket
        if ticket is None or self._askers:
            return False
        self._ticket = None
        self._leases.give_back(ticket.name)
        self._outbox.append(CircuitVerdict(_NEUTRAL, probe=ticket.name))
        return True

    # Control by hand

    def trip(self, *args: Any, **kwargs: Any) -> None:
        """Open for everybody; see `CircuitBreaker.trip`."""
        super().trip(*args, **kwargs)
        self.ask()

    def force_open(self, reason: str = "manual", seconds: float | None = None) -> None:
        """Refuse everybody's calls; see `CircuitBreaker.force_open`."""
        super().force_open(reason, seconds)
        self.ask()

    def force_half_open(self) -> None:
        """Let probes through now, whoever sends them."""
        super().force_half_open()
        self.ask()

    def force_closed(self) -> None:
        """Let everybody's calls through until `auto()` or `reset()`."""
        super().force_closed()
        self.ask()

    def auto(self) -> None:
        """End for everybody what was forced."""
        super().auto()
        self.ask()

    def reset(self) -> None:
        """Close for everybody, and forget every failure and opening."""
        super().reset()
        self.ask()

    # To the store and back; all but `_say` have the lock

    def _draft(self, now: float) -> CircuitReport:
        machine = self._machine
        verdicts, self._outbox = tuple(self._outbox), []
        wishes, early, self._wishes, self._early = self._wishes, self._early, False, False
        self._drafted = machine.generation
        return CircuitReport(
            generation=self._stamp if machine.generation == self._stamped else None,
            state=machine.state,
            age=now - machine.since,
            remaining=max(0.0, machine.open_until - now) if machine.refuses else 0.0,
            failures=machine.failures,
            openings=machine.openings,
            reason=machine.reason,
            error=machine.last_error,
            verdicts=verdicts,
            probe=uuid.uuid4().hex if wishes else None,
            early=early,
            lease=self._lease,
            draw=self._random(),
        )

    def _say(self, request: CircuitReport) -> Verb:
        return Verb("circuit", (self._key, self.policy, request))

    def _hear(self, now: float, request: CircuitReport, reply: CircuitView) -> None:
        machine = self._machine
        if machine.generation != self._drafted:  # by hand, meanwhile: the newest change counts
            self.ask()
            return
        is_ours = reply.accepted and reply.state == machine.state
        if reply.generation == self._stamp or is_ours:
            machine.follow(reply)
        else:
            machine.adopt(now, reply)
            self._outbox = [each for each in self._outbox if each.outcome is _NEUTRAL]
            self._tokens.clear()
            self._ticket = None
        self._stamp, self._stamped = reply.generation, machine.generation
        self._lease = 0.0
        self._mirror(now, reply.places)
        if reply.granted and request.probe is not None:
            self._ticket = _Ticket(request.probe, now + reply.places.get(request.probe, 0.0))
            if self._return_ticket():
                self.ask()
        if machine.state is _HALF_OPEN:
            self._notifier.call(self.policy.probes - self._leases.taken(now))

    def _mirror(self, now: float, places: dict[str, float]) -> None:
        """Note who holds a place, here and elsewhere."""
        ours = {token: permit for permit, token in self._tokens.items()}
        self._tokens = {permit: token for token, permit in ours.items() if token in places}
        self._leases.clear()
        for name, left in places.items():
            self._leases.take(ours.get(name, name), now + left)

    def _do_without(self, now: float, request: CircuitReport | None) -> None:
        machine = self._machine
        unheard = (*(request.verdicts if request is not None else ()), *self._outbox)
        generation = machine.generation
        for each in unheard:
            if generation != machine.generation:
                break
            if each.outcome is _FAILURE:
                machine.fail(now, each.reason or "", each.error, each.retry_after)
            elif each.outcome is _SUCCESS:
                for i in range(each.number):
                    machine.succeed(now, math.inf if i >= each.number - each.slow else 0.0)
        tokens = [each.probe for each in unheard if each.probe is not None]
        if self._ticket is not None:
            tokens.append(self._ticket.name)
            self._ticket = None
        self._outbox = [CircuitVerdict(_NEUTRAL, probe=token) for token in tokens]
        for holder in list(self._leases.leases(now)):
            if isinstance(holder, str):  # somebody else's, of whom nothing will be heard
                self._leases.give_back(holder)
        self._notifier.call()
