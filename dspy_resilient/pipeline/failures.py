"""What an error leads to: another attempt after a pause, another target, an old answer, or itself.

Judgements only; `call.py` acts on them. What an error says about the provider was decided before,
in `outcomes.classify`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from dspy_resilient.errors import (
    AllTargetsFailedError,
    BudgetExceededError,
    CallRejectedError,
    CircuitOpenError,
    DeadlineExceededError,
    LimitExceededError,
    ResilienceError,
    RestartLimitError,
    ThrottledError,
)
from dspy_resilient.events import CallRejected, RetryScheduled
from dspy_resilient.outcomes import Kind, Outcome, Verdict, redacted

if TYPE_CHECKING:
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call, Turn
    from dspy_resilient.targets.route import Route

R = TypeVar("R", bound=ResilienceError)

_LEAST_PAUSE, _LONGEST_PAUSE = 0.75, 5.0
"""Seconds between the attempts of a call that goes on because the trouble is the provider's."""

_LONGEST_STEP = 30.0
_QUICK = 0.25


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


def is_throttled(error: Exception | None) -> bool:
    verdict = getattr(error, "verdict", None)
    return verdict is not None and verdict.kind is Kind.THROTTLED


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
    """Return the error of a call that no target has answered: of one target, its own."""
    errors = [turn.error for turn in turns if turn.error is not None]
    if len(turns) == 1:
        return errors[0]
    waits = [wait for error in errors if (wait := getattr(error, "retry_after", None)) is not None]
    tried = "; ".join(_story(turn) for turn in turns)
    failure = AllTargetsFailedError(
        f"client {client.name!r}: no target answered ({tried})",
        client=client.name,
        errors=errors,
        retry_after=min(waits, default=None),
    )
    failure.__cause__ = errors[-1]
    return failure


def _story(turn: Turn) -> str:
    """Return what became of one target: how often it was asked, how long that took, and the cause."""
    error = turn.error
    cause = "not asked" if error is None else redacted(error)
    if isinstance(error, CircuitOpenError) and error.last_error:
        cause += f", last {error.last_error}"
    summaries = [each for each in turn.call.attempts if each.target == turn.route.label]
    if summaries:
        seconds = sum(each.seconds for each in summaries)
        cause += f" after {len(summaries)} attempts of {seconds:.1f} s"
    return f"{turn.route.label}: {cause}"


def refusal(client: ClientState, turn: Turn) -> Exception:
    """Return why a target that is in trouble is waited for no longer."""
    route, before = turn.route, turn.error
    pause = route.gate.wait_time()
    if pause > route.wait_time():
        if turn.throttled and before is not None:
            return told_to_wait(before, route)
        pause = route.gate.hint or pause
        error: CallRejectedError = ThrottledError(
            f"client {client.name!r}: {route.label} asked for a pause of {pause:.1f} s, "
            "which is longer than this call may wait",
            client=client.name,
            retry_after=pause,
        )
    elif route.wait_time() > 0:
        error = route.rejection()
    elif before is not None:
        return before
    else:
        error = LimitExceededError(
            f"client {client.name!r}: {route.label} has no room", client=client.name
        )
    if before is not None and before is not error:
        error.__cause__ = before
    return rejected(client, route, error)


def told_to_wait(failure: Exception, route: Route) -> Exception:
    """Return a 429 that says for how long the provider asked for a pause, as far as is known."""
    if (hint := route.gate.hint) is not None:
        failure.retry_after = hint  # type: ignore[attr-defined]  # DSPy's field
    return failure


def consider(
    call: Call,
    client: ClientState,
    turn: Turn,
    attempt: Attempt,
    verdict: Verdict,
    failure: Exception,
    is_alone: bool,
) -> bool:
    """Decide when this call may ask the target again; return whether to do so before any other.

    Args:
        call: The call.
        client: The client.
        turn: The target.
        attempt: The attempt that failed.
        verdict: The verdict on it.
        failure: What it raised.
        is_alone: Whether no other target is ready.

    Raises:
        Exception: `failure`, if the target is not to be asked again.
    """
    now = client.clock()
    turn.failures += 1
    turn.error = failure
    if turn.failed_at is None:
        turn.failed_at = now
    if not verdict.retry or call.max_attempts == 1:
        raise told_to_wait(failure, turn.route)
    if verdict.kind is Kind.THROTTLED:
        pause, turn.is_held = _pause_asked(call, client, turn, attempt, failure), True
    else:
        pause, turn.is_held = _pause_after(call, client, turn, attempt, failure)
    if pause >= call.left(now):
        raise told_to_wait(failure, turn.route)
    is_quick = not is_alone and turn.failures == 1 and verdict.kind is Kind.FAILURE
    if is_quick:
        pause = min(pause, _QUICK)
    turn.resume_at = now + pause
    if is_alone or is_quick:
        client.tally.add("retries")
        client.emit(
            RetryScheduled,
            turn.route.label,
            seconds=max(pause, attempt.paused),
            attempt=turn.failures + 1,
            error=type(failure).__name__,
        )
    return is_quick


def _pause_asked(
    call: Call, client: ClientState, turn: Turn, attempt: Attempt, failure: Exception
) -> float:
    """Return the seconds after a 429 for which this call asks no more; the gate keeps its own.

    Where the gate has stayed open, others are answered: the pause is this call's alone.
    """
    turn.throttled += 1
    left = call.max_wait - call.held
    is_last = turn.throttled >= call.max_attempts or call.max_wait == 0
    if (left <= 0 and is_last) or attempt.paused >= call.left(client.clock()):
        raise told_to_wait(failure, turn.route)
    if attempt.paused:
        return 0.0
    step = client.random() * min(2.0 ** min(turn.throttled - 1, 10), _LONGEST_STEP)
    hint = getattr(failure, "retry_after", None)
    return max(min(float(hint), left), step) if hint is not None else step


def _pause_after(
    call: Call, client: ClientState, turn: Turn, attempt: Attempt, failure: Exception
) -> tuple[float, bool]:
    """Return the seconds to wait after a failure, and whether that is being held up.

    A call has used up its attempts only if the target has answered an attempt that began after the
    call's own first failure: then the fault may be its own. Else it goes on while it may be held up,
    which the attempts that do not count are part of.
    """
    may_wait = call.held < call.max_wait
    is_free = attempt.probe and may_wait
    if not is_free:
        turn.used += 1
    if turn.used < call.max_attempts and not is_free:
        return client.backoff(turn.used - 1), False
    assert turn.failed_at is not None
    is_used_up = turn.used >= call.max_attempts and turn.route.answered_from > turn.failed_at
    if not may_wait or is_used_up:
        raise failure
    call.held += attempt.seconds
    pause = max(client.backoff(turn.failures - 1), _LEAST_PAUSE)
    return min(pause, _LONGEST_PAUSE, max(call.max_wait - call.held, 0.0)), True


def rejected(client: ClientState, route: Route, error: R) -> R:
    """Count a refusal of ours and tell it."""
    client.tally.add(f"refused:{error.default_code}")
    if client.is_heard:
        client.emit(
            CallRejected, route.label, reason=error.default_code, retry_after=error.retry_after
        )
    return error


def check_deadline(call: Call, client: ClientState) -> None:
    """Raise DeadlineExceededError if the deadline is over."""
    if call.left(client.clock()) <= 0:
        raise deadline_passed(call, client)


def deadline_passed(call: Call, client: ClientState) -> DeadlineExceededError:
    """Return the error of a call whose deadline is over."""
    return DeadlineExceededError(
        f"client {client.name!r}: no answer within the deadline of {call.budget:g} s",
        client=client.name,
    )
