"""Whose turn it is, and how long a call waits where every target is in trouble.

A target that is ready is never waited for behind one that is not. Where none is, the call is held
for the one that may be asked first, for `max_wait` seconds all in all, and holds nothing itself
meanwhile. What is waited for is yielded as a step.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspy_resilient.errors import LimitExceededError
from dspy_resilient.pipeline.failures import (
    check_deadline,
    is_throttled,
    nobody_answered,
    refusal,
    rejected,
)
from dspy_resilient.pipeline.in_flight import has_calls_on
from dspy_resilient.pipeline.state import Wait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from dspy_resilient.circuit import CircuitBreaker
    from dspy_resilient.limits import ThrottleGate
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call, Steps, Turn
    from dspy_resilient.targets.route import Route

_LAST_PROBE = 0.25
"""Share of `max_wait` for which a call waits, after that is over, for the end of one more probe.

Without it an outage that ends between two probes, just before `max_wait` is over, would cost
answers. A probe that began later than that and failed ends the wait at once.
"""

_ROUNDING = 1e-4  # seconds, by which a clock surely goes on


def next_turn(call: Call, client: ClientState, turns: list[Turn]) -> Steps[Turn]:
    """Return the target to ask now: the first that is ready, else the first that will be.

    Raises:
        ResilienceError: The call may be held up no longer, or every target has had its last say.
    """
    while True:
        check_deadline(call, client)
        client.in_flight.check()
        now = client.clock()
        _drop_those_shut_out(client, turns)
        left = [turn for turn in turns if not turn.final]
        if not left:
            raise nobody_answered(client, turns)
        turn = min(left, key=lambda each: (max(0.0, each.wait_time(now)), each.is_crowded))
        if turn.wait_time(now) <= 0:
            return turn
        if turn.resume_at > now:
            yield from _sit_out(call, client, turn, now)
        else:
            most = _patience_left(call, turn.route, now)
            if most <= 0 and _has_attempts_left(call, turn):
                turn.throttled += 1
                most = math.inf
            if most <= 0 or _is_in_vain(call, turn, now):
                for each in left:
                    each.error = refusal(client, each)
                raise nobody_answered(client, turns)
            yield from _hold(call, client, turn, now, most)


def is_needed(client: ClientState, turns: list[Turn], turn: Turn) -> bool:
    """Whether no other target would take the call at once."""
    if len(turns) == 1:
        return True
    now = client.clock()
    return not any(other is not turn and other.is_ready(now) for other in turns)


def check_may_wait(call: Call, client: ClientState, route: Route) -> None:
    """Refuse a call that would wait on a thread whose event loop others of ours need.

    Raises:
        LimitExceededError: It would; with the advice to use `acall`.
    """
    if _may_wait(call):
        return
    raise rejected(
        client,
        route,
        LimitExceededError(
            f"client {client.name!r}: {route.label} has no room, and a sync call on a thread whose "
            "event loop is running (or within another call) must not wait for it: use acall",
            client=client.name,
        ),
    )


def _may_wait(call: Call) -> bool:
    return call.may_wait or (call.loop is not None and not has_calls_on(call.loop))


def _drop_those_shut_out(client: ClientState, turns: list[Turn]) -> None:
    """Give up targets that waiting does not help: a refused credential, a circuit open for good."""
    for turn in turns:
        if not turn.final and turn.route.is_shut_out():
            turn.error = refusal(client, turn)
            turn.final = True


def _has_attempts_left(call: Call, turn: Turn) -> bool:
    """Whether a call that only pauses after 429s hold up waits for the end of one more of them.

    As plain `dspy.LM` would, once for each attempt it has left; not for a pause that is longer than
    any call would wait.
    """
    left = call.max_attempts - turn.throttled - turn.used
    wait = turn.route.gate.wait_time()
    return left > 0 and turn.route.wait_time() <= 0 and 0 < wait <= call.max_wait


def _is_in_vain(call: Call, turn: Turn, now: float) -> bool:
    """Whether the wait cannot end before the deadline, or must not be begun on this thread."""
    return turn.wait_time(now) >= call.left(now) or not _may_wait(call)


def _patience_left(call: Call, route: Route, now: float) -> float:
    """Return the seconds for which the call may still be held up at `route`."""
    left = call.max_wait - call.held
    if left > _ROUNDING:
        return left
    if call.held_until is None:
        call.held_until = now
    if route.gate.wait_time() > 0 or route.failed_from >= call.held_until:
        return 0.0
    return call.held_until + _LAST_PROBE * call.max_wait - now


def _sit_out(call: Call, client: ClientState, turn: Turn, now: float) -> Steps[None]:
    """Wait for the end of the call's own pause; say so if it is a long one after a 429."""
    wait, route = min(max(turn.resume_at - now, _ROUNDING), call.left(now)), turn.route
    if wait > client.long_wait and is_throttled(turn.error) and route.gate.is_news(now + wait):
        client.announce_wait("throttled", route.label, wait)
    yield Wait(None, wait)
    if turn.is_held:
        call.held += client.clock() - now


def _hold(call: Call, client: ClientState, turn: Turn, now: float, most: float) -> Steps[None]:
    """Wait in line at the gate or the circuit that is in the way; say so if it takes long."""
    route = turn.route
    queue: CircuitBreaker | ThrottleGate = route.gate
    reason = "throttled"
    if route.wait_time() >= route.gate.wait_time():
        queue, reason = route.blocker(), "circuit"
    most = min(most, call.left(now))
    with _enlisted(queue) as waiter:
        wait = min(max(queue.recheck_time(), _ROUNDING), most)
        first = min(queue.wait_time(), wait)  # of those in line, for whom it is announced
        if first > client.long_wait and queue.is_news(now + first):
            client.announce_wait(reason, route.label, first)
        spread: float | None = yield Wait(waiter, wait)
    if spread:
        yield Wait(None, min(spread, call.left(client.clock())))
    call.held += client.clock() - now


@contextmanager
def _enlisted(queue: CircuitBreaker | ThrottleGate) -> Iterator[Future[float]]:
    waiter = queue.enlist()
    try:
        yield waiter
    finally:
        queue.leave(waiter)
