"""What has to be passed before an attempt may be sent: gate, limits, circuit, in this order.

What waits comes first, so that no permit waits. Nothing is sent here, and what comes of a
refusal is decided in `call.py`.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dspy_resilient.budgets import BudgetStop
from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    LimitExceededError,
    ResilienceError,
    ThrottledError,
)
from dspy_resilient.events import CallQueued, CallRejected
from dspy_resilient.pipeline.spending import reserve
from dspy_resilient.pipeline.state import Wait

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dspy_resilient.limits import GatePermit, Limiter, Slot, ThrottleGate
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.spending import Funds
    from dspy_resilient.pipeline.state import Call, Steps, Turn
    from dspy_resilient.targets.route import Admission, Route
    from dspy_resilient.targets.target import Target

R = TypeVar("R", bound=ResilienceError)


def clear_the_way(call: Call, client: ClientState, turn: Turn, route: Route) -> Steps[Attempt]:
    """Gate, then limits, then circuit: what waits comes first, so that no permit waits."""
    target = turn.target
    check_deadline(call, client)  # a wait may have taken longer than it was to
    client.in_flight.check()
    refusal = target.refusal()
    if refusal is not None:
        raise rejected(client, route, refusal)
    while True:
        gate_permit = yield from _pass_gate(call, client, route)
        slot = yield from _take_slot(call, client, target, route, gate_permit)
        admission: Admission | None = None
        funds: Funds | None = None
        try:
            funds = yield from _fund(call, client, target)
            if gate_permit.is_current:
                admission = yield from _admit(call, client, route)
                if admission is not None and gate_permit.is_current:
                    return client.attempt(target, call, route, admission, gate_permit, slot, funds)
        except BaseException as error:
            _release(gate_permit, slot, admission, funds)
            if isinstance(error, (BudgetExceededError, BudgetStop)):
                rejected(client, route, error.error if isinstance(error, BudgetStop) else error)
            raise
        _release(gate_permit, slot, admission, funds)
        if gate_permit.is_current:  # else the gate has closed meanwhile
            raise rejected(client, route, route.rejection())


def _fund(call: Call, client: ClientState, target: Target) -> Steps[Funds | None]:
    """Reserve what the request will cost; wait while that depends on requests under way."""
    while isinstance(found := reserve(call, client, target), Wait):
        yield Wait(found.future, min(found.seconds, call.left(client.clock())))
        check_deadline(call, client)
    return found


def _admit(call: Call, client: ClientState, route: Route) -> Steps[Admission | None]:
    """Ask the circuit; a shared one may have to ask the store first, for no other is waited."""
    for link in route.links:
        link.question()
    if route.shared is None:
        return route.admit()
    with route.shared.consulting() as news:
        if news is not None:
            patience = min(route.shared.patience_left(), call.left(client.clock()))
            if not (yield Wait(news, patience)):
                check_deadline(call, client)
                route.shared.go_alone()
        return route.admit()


def _pass_gate(call: Call, client: ClientState, route: Route) -> Steps[GatePermit]:
    """Wait until the provider's last 429 is over, as long as `max_wait` lasts."""
    gate = route.gate
    while (gate_permit := gate.admit()) is None:
        wait, now = gate.wait_time(), client.clock()
        if call.held >= call.max_wait or wait >= call.left(now):
            pause = gate.hint or wait
            error = ThrottledError(
                f"client {client.name!r}: {route.label} asked for a pause of {pause:.1f} s, "
                "which is longer than this call may wait",
                client=client.name,
                retry_after=pause,
            )
            raise rejected(client, route, error)
        yield from hold(call, client, gate, route.label)
        check_deadline(call, client)
    return gate_permit


def hold(call: Call, client: ClientState, queue: ThrottleGate, target: str) -> Steps[None]:
    """Wait in line for no longer than `max_wait` allows, all in all, and count it."""
    began = client.clock()
    yield from _line_up(client, queue, target, min(call.max_wait - call.held, call.left(began)))
    call.held += client.clock() - began


def _take_slot(
    call: Call, client: ClientState, target: Target, route: Route, gate_permit: GatePermit
) -> Steps[Slot | None]:
    """Queue for a place among the target's concurrent attempts and for its rate budget."""
    slot: Slot | None = None
    try:
        while (limiter := route.limiter) is not None:
            tokens = 0 if limiter.policy.tpm is None else target.estimate(call)
            slot = limiter.enter(tokens, call.left(client.clock()))
            if not slot.granted and limiter.patience > 0:
                yield from _ask_others(call, client, route, limiter, slot)
            if not slot.granted:
                yield from _queue(call, client, route, limiter, slot)
            if slot.granted:
                break
            slot.release(sent=False)  # the client was restarted: queue anew
    except BaseException as error:
        _release(gate_permit, slot)
        if isinstance(error, LimitExceededError):
            raise rejected(client, route, error) from None
        raise
    return slot


def _ask_others(
    call: Call, client: ClientState, route: Route, limiter: Limiter, slot: Slot
) -> Steps[None]:
    """Wait to hear whether others who use the same rates leave any: that is no queue yet."""
    route.look_ahead()
    wait = min(slot.wait_time(), limiter.patience, call.left(client.clock()))
    yield Wait(slot.future, wait)
    slot.poll()
    check_deadline(call, client)


def _queue(
    call: Call, client: ClientState, route: Route, limiter: Limiter, slot: Slot
) -> Steps[None]:
    """Wait for the turn of `slot`, or for a restart of the client; say so if it takes long."""
    since = client.clock()
    client.tally.add("queued")
    if client.is_heard:
        ahead = max(0, limiter.queued - 1)
        client.emit(CallQueued, route.label, ahead=ahead, in_use=limiter.in_use)
    try:
        while not slot.granted and limiter is route.limiter:
            now, wait = client.clock(), slot.wait_time()
            silence = client.long_wait - (now - since)
            if silence > 0:
                wait = min(wait, silence)
            elif limiter.is_news():
                client.announce_wait("limits", route.label, wait)
            yield Wait(slot.future, min(wait, call.left(now)))
            slot.poll()
            check_deadline(call, client)
    finally:
        client.tally.add("queue_seconds", client.clock() - since)


def _release(
    gate_permit: GatePermit,
    slot: Slot | None,
    admission: Admission | None = None,
    funds: Funds | None = None,
) -> None:
    if funds is not None:
        funds.release()
    if slot is not None:
        slot.release(sent=False)
    gate_permit.release()
    if admission is not None:
        admission.withdraw()


def outwait(call: Call, client: ClientState, blocked: list[Route]) -> Steps[bool]:
    """Wait until the first of the open circuits may be asked again; False if it takes too long.

    One that was forced open without end is not waited for: only somebody's hand can close it.
    """
    blocked = [route for route in blocked if math.isfinite(route.blocker().recheck_time())]
    if not blocked:
        return False
    route = blocked[0] if len(blocked) == 1 else min(blocked, key=lambda each: each.wait_time())
    now, circuit = client.clock(), route.blocker()
    if not call.has_patience(now, circuit.wait_time()):
        return False
    assert call.patience is not None  # has_patience has set it
    most = min(call.patience - now, call.left(now))
    yield from _line_up(client, circuit, route.label, most)
    return True


def _line_up(
    client: ClientState, queue: CircuitBreaker | ThrottleGate, target: str, most: float
) -> Steps[None]:
    """Wait until it makes sense to ask again, at most `most` seconds; say so if it takes long."""
    with _enlisted(queue) as waiter:
        wait = min(queue.recheck_time(), most)
        if wait > client.long_wait and math.isinf(queue.wait_time()):
            yield Wait(waiter, client.long_wait)  # those who were let in may report any moment
            wait -= client.long_wait
        if wait > client.long_wait and not waiter.done() and queue.is_news(client.clock() + wait):
            reason = "circuit" if isinstance(queue, CircuitBreaker) else "throttled"
            client.announce_wait(reason, target, wait)
        if seconds := (yield Wait(waiter, wait)):  # those who wait do not go all at once
            yield Wait(None, min(seconds, most))


@contextmanager
def _enlisted(queue: CircuitBreaker | ThrottleGate) -> Iterator[Future[float]]:
    waiter = queue.enlist()
    try:
        yield waiter
    finally:
        queue.leave(waiter)


def rejected(client: ClientState, target: Route, error: R) -> R:
    client.tally.add(f"refused:{error.default_code}")
    if client.is_heard:
        client.emit(
            CallRejected, target.label, reason=error.default_code, retry_after=error.retry_after
        )
    return error


def check_deadline(call: Call, client: ClientState) -> None:
    if call.left(client.clock()) <= 0:
        raise deadline_passed(call, client)


def deadline_passed(call: Call, client: ClientState) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"client {client.name!r}: no answer within the deadline of {call.budget:g} s",
        client=client.name,
    )
