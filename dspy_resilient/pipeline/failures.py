"""What an error leads to: another attempt after a pause, another target, an old answer, or itself.

Judgements only; `call.py` acts on them. What an error says about the provider was decided before,
in `circuit.outcome`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_resilient.errors import (
    AllTargetsFailedError,
    BudgetExceededError,
    CallRejectedError,
    CircuitOpenError,
    RestartLimitError,
    ThrottledError,
)
from dspy_resilient.events import RetryScheduled
from dspy_resilient.outcomes import Kind, Outcome, Verdict
from dspy_resilient.pipeline.admission import rejected

if TYPE_CHECKING:
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call, Turn
    from dspy_resilient.targets.route import Route

_EXCUSES = (CircuitOpenError, ThrottledError, RestartLimitError, AllTargetsFailedError)


class AnswerFilteredError(Exception):
    """A content filter held the answer back (`Call.filtered`), and somebody else may do better."""

    verdict = Verdict(Kind.POLICY, Outcome.SUCCESS, retry=False, next_target=False, special=True)


def excuses_stale(error: Exception) -> bool:
    verdict = getattr(error, "verdict", None)
    return isinstance(error, _EXCUSES) or (
        verdict is not None
        and verdict.next_target
        and verdict.kind in (Kind.FAILURE, Kind.TIMEOUT, Kind.THROTTLED, Kind.BROKEN)
    )


def is_the_providers(error: BaseException) -> bool:
    """Whether everybody who asks the same would get `error` too: the provider's own verdict."""
    if isinstance(error, AllTargetsFailedError):
        return all(is_the_providers(each) for each in error.errors)
    verdict = getattr(error, "verdict", None)
    return verdict is not None and verdict.kind not in (
        Kind.TIMEOUT,
        Kind.CANCELLED,
        Kind.REJECTED,
        Kind.BROKEN,
        Kind.LOCAL,
    )


def is_our_circuits(error: Exception) -> bool:
    """Whether a circuit of ours refused, and may not for long.

    What a client within an attempt says comes with a verdict; and a refused credential is nothing
    to wait for.
    """
    return (
        isinstance(error, CircuitOpenError)
        and error.reason not in (Kind.AUTH, Kind.BILLING)
        and not hasattr(error, "verdict")
    )


def special_kind(error: Exception) -> Kind | None:
    """Return which of the lists kept for one kind of error may do better, if any."""
    verdict = getattr(error, "verdict", None)
    return verdict.kind if verdict is not None and verdict.special else None


def leads_on(error: Exception, kept_for: Kind | None) -> bool:
    """Whether the next target may do better; those kept for one kind of error go on at it too."""
    if isinstance(error, BudgetExceededError):
        return error.is_lent
    if isinstance(error, (CallRejectedError, RestartLimitError)):
        return True
    verdict = getattr(error, "verdict", None)
    return verdict is not None and (
        verdict.next_target or (kept_for is not None and special_kind(error) is kept_for)
    )


def nobody_answered(client: ClientState, turns: list[Turn]) -> Exception:
    errors = [turn.error for turn in turns if turn.error is not None]
    if len(turns) == 1:
        return errors[0]
    waits = [wait for error in errors if (wait := getattr(error, "retry_after", None)) is not None]
    tried = ", ".join(f"{t.target.label}: {type(t.error).__name__}" for t in turns)
    failure = AllTargetsFailedError(
        f"client {client.name!r}: no target answered ({tried})",
        client=client.name,
        errors=errors,
        retry_after=min(waits, default=None),
    )
    failure.__cause__ = errors[-1]
    return failure


def own_pause(
    call: Call, client: ClientState, turn: Turn, attempt: Attempt, failure: Exception
) -> float:
    """Return the seconds to wait after a 429 before this call asks again.

    Raises:
        Exception: The 429, if the call may not ask again, or not in time.
    """
    hint = getattr(failure, "retry_after", None)
    turn.throttled += 1
    left = call.left(client.clock())
    pause = 0.0 if attempt.paused else client.random() * min(2.0 ** (turn.throttled - 1), 30.0)
    if hint is not None and not attempt.paused:
        pause = float(hint)
    if call.max_attempts == 1 or call.held >= call.max_wait or max(pause, attempt.paused) >= left:
        if (told := attempt.route.gate.hint) is not None:
            failure.retry_after = told  # type: ignore[attr-defined]  # DSPy's field
        raise failure
    return min(pause, call.max_wait - call.held)


def pause(call: Call, client: ClientState, turn: Turn, route: Route, failure: Exception) -> float:
    """Return the seconds to wait before the next attempt, or raise if there is to be none."""
    if turn.used >= call.max_attempts:
        raise failure
    if route.wait_time() > 0:
        raise rejected(client, route, route.rejection()) from failure
    wait = client.backoff(max(turn.used - 1, 0))
    if wait >= call.left(client.clock()):
        raise failure
    client.tally.add("retries")
    client.emit(
        RetryScheduled,
        turn.target.label,
        seconds=wait,
        attempt=turn.used + 1,
        error=type(failure).__name__,
    )
    return wait
