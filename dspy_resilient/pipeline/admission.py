"""What has to be passed before an attempt may be sent: gate, limits, circuit, in this order.

Only the limits are waited for here; where the gate or a circuit refuses, the call waits without
holding anything (`waiting.py`). Nothing is sent here, and what comes of a refusal is decided in
`call.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_resilient.budgets import BudgetStop
from dspy_resilient.errors import BudgetExceededError, LimitExceededError
from dspy_resilient.events import CallQueued
from dspy_resilient.pipeline.failures import check_deadline, rejected
from dspy_resilient.pipeline.spending import reserve
from dspy_resilient.pipeline.state import Wait
from dspy_resilient.pipeline.waiting import check_may_wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.limits import GatePermit, Limiter, Slot
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.spending import Funds
    from dspy_resilient.pipeline.state import Call, Steps, Turn
    from dspy_resilient.targets.route import Admission, Route
    from dspy_resilient.targets.target import Target


def clear_the_way(
    call: Call, client: ClientState, turn: Turn, is_needed: Callable[[], bool]
) -> Steps[Attempt | None]:
    """Return an attempt that may be sent now, or None if the target does not take it at present.

    Args:
        call: The call.
        client: The client.
        turn: The target that is to be asked.
        is_needed: Whether no other target is ready, so that a queue is worth waiting in.
    """
    check_deadline(call, client)  # a wait may have taken longer than it was to
    client.in_flight.check()
    route = turn.route
    refusal = turn.target.refusal()
    if refusal is not None:
        raise rejected(client, route, refusal)
    gate_permit = route.gate.admit()
    if gate_permit is None:
        return None
    slot: Slot | None = None
    admission: Admission | None = None
    funds: Funds | None = None
    try:
        if route.limiter is not None:
            slot = yield from _take_slot(call, client, turn, is_needed)
            turn.is_crowded = slot is None
        if not turn.is_crowded:
            funds = yield from _fund(call, client, turn.target)
        if gate_permit.is_current and not turn.is_crowded:
            admission = yield from _admit(call, client, route)
            if admission is not None and gate_permit.is_current:
                gate_permit.sent()
                return client.attempt(turn, call, admission, gate_permit, slot, funds)
    except BaseException as error:
        _release(gate_permit, slot, admission, funds)
        if isinstance(error, (BudgetExceededError, BudgetStop)):
            rejected(client, route, error.error if isinstance(error, BudgetStop) else error)
        raise
    _release(gate_permit, slot, admission, funds)
    return None


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


def _take_slot(
    call: Call, client: ClientState, turn: Turn, is_needed: Callable[[], bool]
) -> Steps[Slot | None]:
    """Queue for a place among the target's concurrent attempts and for its rate budget.

    Returns None where there is none at once and another target is ready.
    """
    slot: Slot | None = None
    route = turn.route
    try:
        while (limiter := route.limiter) is not None:
            tokens = 0 if limiter.policy.tpm is None else turn.target.estimate(call)
            slot = limiter.enter(tokens, call.left(client.clock()))
            if not slot.granted and limiter.patience > 0:
                yield from _ask_others(call, client, route, limiter, slot)
            if not slot.granted:
                if not is_needed():
                    slot.release(sent=False)
                    return None
                check_may_wait(call, client, route)
                yield from _queue(call, client, route, limiter, slot)
            if slot.granted:
                break
            slot.release(sent=False)  # the client was restarted: queue anew
    except BaseException as error:
        if slot is not None:
            slot.release(sent=False)
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
    gate_permit: GatePermit, slot: Slot | None, admission: Admission | None, funds: Funds | None
) -> None:
    if funds is not None:
        funds.release()
    if slot is not None:
        slot.release(sent=False)
    gate_permit.release()
    if admission is not None:
        admission.withdraw()
