"""One call, top to bottom.

    cache -> single-flight -> for each target: retry( gate -> limits -> circuit -> send ) -> store

`complete` is that line as a generator. It decides and never waits: whatever takes time is yielded
as a step (`Wait`, `Prepare`, `Disk`, or an attempt to send) and performed by one of the two drivers
in `drive.py`, which hand the result, or throw the error, back in. Errors, cancellation and Ctrl-C
arrive at the `yield` that was under way. No lock and no context token is held across a `yield`.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from dspy_resilient.cache import Failed, Landed, Waiter, usable
from dspy_resilient.circuit import Kind, Outcome, Verdict, redacted
from dspy_resilient.errors import (
    AllTargetsFailedError,
    CallRejectedError,
    CircuitOpenError,
    DeadlineExceededError,
    LimitExceededError,
    ResilienceError,
    RestartLimitError,
    ThrottledError,
)
from dspy_resilient.events import (
    AttemptFailed,
    CacheHit,
    CallRejected,
    FellBack,
    FlightJoined,
    RetryScheduled,
)
from dspy_resilient.supervision import broke_state

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from dspy_resilient.attempt import Attempt
    from dspy_resilient.cache import Answer, Lead
    from dspy_resilient.circuit import CircuitBreaker, GatePass, ThrottleGate
    from dspy_resilient.limits import Slot
    from dspy_resilient.route import Route, Routes
    from dspy_resilient.runtime import Runtime
    from dspy_resilient.target import Target

T = TypeVar("T")
R = TypeVar("R", bound=ResilienceError)
_EXCUSES = (CircuitOpenError, ThrottledError, RestartLimitError, AllTargetsFailedError)


@dataclass(frozen=True, slots=True)
class Wait:
    """Step: wait for `future`, at most `seconds`; its result is handed back, or None after that."""

    future: Future[Any] | None
    seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Prepare:
    """Step: do what the first attempt of a process needs (import LiteLLM), off every clock."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Step: do `work`, which reads or writes a file; its result is handed back."""

    work: Callable[[], Any]


if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Wait | Prepare | Disk | Attempt, Any, T]


class AttemptSummary(NamedTuple):
    """One request of a call: where it went, how it ended, and how long it took."""

    target: str
    outcome: str
    seconds: float


class Served(NamedTuple):
    """An answer and where it came from; a hit was paid for by somebody else."""

    answer: Answer
    hit: bool
    stale: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """What a user asked for, and how far it has got.

    Attributes:
        method: Name of DSPy's public call method.
        args: Its positional arguments.
        kwargs: Its keywords, less our own.
        own: Our own among its keywords (`cache`, `num_retries`), where given.
        key: Cache key under the primary, or None if the call is not to be cached.
        targets: The primary and its fallbacks, in order.
        special: Who else may be asked about a prompt that is too long, or refused.
        streams: Whether chunks go to a consumer while the call runs.
        may_wait: Whether the caller can wait for an identical call without risk of deadlock.
        max_attempts: Attempts per target.
        max_wait: Seconds to wait for an open circuit.
        budget: Seconds for the whole call (the deadline), or inf.
    """

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: dict[str, Any]
    key: str | None
    targets: tuple[Target, ...]
    special: Mapping[Kind, tuple[Target, ...]]
    streams: bool
    may_wait: bool
    max_attempts: int
    max_wait: float
    budget: float
    deadline: float = math.inf
    patience: float | None = None
    filtered: Answer | None = None
    sent: Attempt | None = None
    attempts: list[AttemptSummary] = field(default_factory=list)

    def recorded(self) -> dict[str, Any]:
        """Return the keywords as DSPy's history shows them."""
        return {
            name: value
            for name, value in (self.own | self.kwargs).items()
            if not name.startswith("api_") and name not in ("prompt", "messages", "request")
        }

    def every_target(self) -> Iterator[Target]:
        """Yield whoever may be asked in the end."""
        yield from self.targets
        for targets in self.special.values():
            yield from targets

    def left(self, now: float) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - now

    def has_patience(self, now: float, wait: float) -> bool:
        """Whether waiting `wait` seconds for a circuit fits `max_wait` and the deadline (R27).

        The patience starts with the first circuit that this call finds open. An unknown wait
        (inf: somebody else's probe is under way) fits as long as any patience is left.
        """
        if self.patience is None:
            self.patience = now + self.max_wait
        end = min(self.patience, self.deadline)
        return now < end if math.isinf(wait) else now + wait <= end


@dataclass(slots=True, eq=False, repr=False)
class _Turn:
    """One target's share of a call.

    Attributes:
        target: Who is asked.
        used: Attempts that count.
        retried: Whether one of them was a retry.
        error: How it ended the last time, if it did.
        final: Whether it is not to be asked again.
        mended: Whether its client was restarted for this call.
        early: Whether its next attempt may be a probe before the time.
    """

    target: Target
    used: int = 0
    retried: bool = False
    error: Exception | None = None
    final: bool = False
    mended: bool = False
    early: bool = False


def complete(call: Call, client: Runtime) -> Steps[Served]:
    """Answer `call`: from the cache, from an identical call under way, or from a target."""
    client.check_open()
    if call.key is not None:
        hit = client.cache.recall(call.key) or (yield from _load(client, call.key))
        if hit is not None:
            _announce_hit(client, hit)
            return Served(hit, hit=True)
    if not client.ready() and any(target.needs_litellm for target in call.every_target()):
        yield Prepare()
    call.deadline = client.clock() + call.budget
    try:
        served = yield from _supervise(call, client)
    except Exception as error:
        if call.key is not None and _excuses_stale(error):
            stale = yield Disk(partial(client.cache.get_stale, call.key))
            if stale is not None:
                _announce_hit(client, stale, stale=True)
                return Served(stale, hit=True, stale=True)
        with suppress(AttributeError):
            error.attempts = tuple(call.attempts)  # type: ignore[attr-defined]  # ours to attach
        raise
    if served.answer.key and not served.hit and client.cache.has_disk:
        yield Disk(partial(client.cache.save, served.answer))  # those who waited have it by now
    return served


def _load(client: Runtime, key: str) -> Steps[Answer | None]:
    """Return the answer that is not in memory but on disk, or None."""
    if not client.cache.has_disk:
        return None
    answer: Answer | None = yield Disk(partial(client.cache.load, key))
    return answer


def _supervise(call: Call, client: Runtime) -> Steps[Served]:
    """Answer the call; once more if our own state breaks under it and nothing was emitted (R60)."""
    seen = client.routes.supervisor.generation
    try:
        return (yield from _answer(call, client))
    except Exception as error:
        if not broke_state(error):
            raise
        _mend(client, client.routes, seen, error)
        if call.sent is not None and call.sent.emitted:
            raise
    return (yield from _answer(call, client))


def _mend(
    client: Runtime, routes: Routes, seen: int, error: Exception, target: str | None = None
) -> None:
    """Restart the client because of `error`, unless it happens too often."""
    try:
        client.mend(routes, seen, error, target)
    except RestartLimitError as limit:
        raise limit from error


def _answer(call: Call, client: Runtime) -> Steps[Served]:
    if call.key is None or call.streams:
        return (yield from _ask_all(call, client, None))
    return (yield from _share(call, client, call.key))


def _announce_hit(client: Runtime, hit: Answer, *, stale: bool = False) -> None:
    if client.is_heard:
        now = client.clock()
        client.emit(CacheHit, hit.target or None, age=now - hit.stored_at, stale=stale)


def _excuses_stale(error: Exception) -> bool:
    verdict = getattr(error, "verdict", None)
    return isinstance(error, _EXCUSES) or (
        verdict is not None
        and verdict.next_target
        and verdict.kind in (Kind.FAILURE, Kind.TIMEOUT, Kind.THROTTLED, Kind.BROKEN)
    )


def _share(call: Call, client: Runtime, key: str) -> Steps[Served]:
    """Lead the flight of this key, or follow whoever does (R44)."""
    place = client.flights.join(key)
    while isinstance(place, Waiter):
        if not call.may_wait:
            place.leave()
            return (yield from _ask_all(call, client, None))
        client.emit(FlightJoined)
        try:
            news = yield Wait(place.future, call.left(client.clock()))
        except BaseException:
            place.leave()
            raise
        if news is None:
            place.leave()
            raise _deadline_passed(call, client)
        if isinstance(news, Failed):
            raise news.error
        if isinstance(news, Landed):
            client.tally.add("coalesced")
            return Served(news.answer, hit=True)
        place = news
    lead = place
    try:
        answer = client.cache.peek(key)  # it may have landed between the look-up and the join
        if answer is not None:
            served = Served(answer, hit=True)
        else:
            served = yield from _ask_all(call, client, lead)
        lead.land(served.answer)
    except BaseException as error:
        if _is_the_providers(error):
            lead.fail(error)
        else:
            lead.abandon()
        raise
    return served


def _is_the_providers(error: BaseException) -> bool:
    """Whether everybody who asks the same would get `error` too: the provider's own verdict."""
    if isinstance(error, AllTargetsFailedError):
        return all(_is_the_providers(each) for each in error.errors)
    verdict = getattr(error, "verdict", None)
    return verdict is not None and verdict.kind not in (
        Kind.TIMEOUT,
        Kind.CANCELLED,
        Kind.REJECTED,
        Kind.BROKEN,
        Kind.LOCAL,
    )


class AnswerFilteredError(Exception):
    """A content filter held the answer back (`Call.filtered`), and somebody else may do better."""

    verdict = Verdict(Kind.POLICY, Outcome.SUCCESS, retry=False, next_target=False, special=True)


def _ask_all(call: Call, client: Runtime, lead: Lead | None) -> Steps[Served]:
    """Ask the targets; about a prompt too long, or refused, those kept for that (R52).

    The error that leads to such a list stays what it was if nobody in the list answers.
    """
    targets: tuple[Target, ...] = call.targets
    errors: list[Exception] = []
    lists = dict(call.special)  # each is asked once
    while targets:
        try:
            return (yield from _ask_targets(call, client, lead, targets, errors))
        except Exception as error:  # noqa: BLE001  # raised below, unless somebody does better
            errors.append(error)
        kind = _special_kind(errors[-1])
        targets = lists.pop(kind, ()) if kind is not None else ()
    if call.filtered is not None:
        return Served(call.filtered, hit=False)
    for later in errors[1:]:
        errors[0].add_note(f"nor did the fallbacks kept for this answer: {redacted(later)}")
    raise errors[0]


def _special_kind(error: Exception) -> Kind | None:
    """Return which of the lists kept for one kind of error may do better, if any."""
    verdict = getattr(error, "verdict", None)
    return verdict.kind if verdict is not None and verdict.special else None


def _ask_targets(
    call: Call,
    client: Runtime,
    lead: Lead | None,
    targets: tuple[Target, ...],
    before: list[Exception],
) -> Steps[Served]:
    """Ask one target after the other; wait for a circuit when none is left to ask (R27).

    `before` holds the errors that led to these targets, if they are not the first.
    """
    turns = [_Turn(target) for target in targets]
    error = before[-1] if before else None
    kept_for = None if error is None else _special_kind(error)
    asked = turns
    while True:
        for turn in asked:
            if turn.final:
                continue
            if error is not None and (before or turn is not turns[0]):
                _announce_fallback(client, turn, error)
                key = turn.target.key(call)
                hit = key and (client.cache.recall(key) or (yield from _load(client, key)))
                if hit:
                    _announce_hit(client, hit)
                    return Served(hit, hit=True)
            try:
                return (yield from _ask(call, client, turn, lead))
            except Exception as failure:
                if not _leads_on(failure, kept_for) or _is_over(call, client):
                    raise
                turn.error = error = failure
                turn.final = not isinstance(failure, CircuitOpenError)
        if (early := _early_probe(call, client, turns)) is not None:
            asked = [early]
            continue
        asked = turns
        blocked = [turn.target.route(call) for turn in turns if not turn.final]
        if not blocked or not (yield from _outwait(call, client, blocked)):
            raise _nobody_answered(client, turns)


def _is_over(call: Call, client: Runtime) -> bool:
    """Whether nothing may be sent for this call any more, to whatever target."""
    return call.left(client.clock()) <= 0 or client.under_way.ended


def _leads_on(error: Exception, kept_for: Kind | None) -> bool:
    """Whether the next target may do better; those kept for one kind of error go on at it too."""
    if isinstance(error, (CallRejectedError, RestartLimitError)):
        return True
    verdict = getattr(error, "verdict", None)
    return verdict is not None and (
        verdict.next_target or (kept_for is not None and _special_kind(error) is kept_for)
    )


def _announce_fallback(client: Runtime, turn: _Turn, before: Exception) -> None:
    client.tally.add("fallbacks")
    client.emit(FellBack, turn.target.label, error=type(before).__name__)


def _nobody_answered(client: Runtime, turns: list[_Turn]) -> Exception:
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


def _early_probe(call: Call, client: Runtime, turns: list[_Turn]) -> _Turn | None:
    """Return whom to ask although nobody is to be asked: now and then, the first to reopen (R52)."""
    refused = all(isinstance(turn.error, CallRejectedError) for turn in turns)
    blocked = [turn for turn in turns if not turn.final]
    if len(turns) == 1 or not refused or not blocked:
        return None
    soonest = min(blocked, key=lambda turn: turn.target.route(call).wait_time())
    soonest.early = client.early_probes.take(soonest.target.route(call).blocker())
    return soonest if soonest.early else None


def _outwait(call: Call, client: Runtime, blocked: list[Route]) -> Steps[bool]:
    """Wait until the first of the open circuits may be asked again; False if it takes too long."""
    route = blocked[0] if len(blocked) == 1 else min(blocked, key=lambda each: each.wait_time())
    now, circuit = client.clock(), route.blocker()
    if not call.has_patience(now, circuit.wait_time()):
        return False
    assert call.patience is not None  # has_patience has set it
    most = min(call.patience - now, call.left(now))
    yield from _line_up(client, circuit, route.label, most)
    return True


def _line_up(
    client: Runtime, queue: CircuitBreaker | ThrottleGate, target: str, most: float
) -> Steps[None]:
    """Wait until it makes sense to ask again, at most `most` seconds; say so if it takes long."""
    with _enlisted(queue) as waiter:
        wait = min(queue.recheck_time(), most)
        if wait > client.long_wait and math.isinf(queue.wait_time()):
            yield Wait(waiter, client.long_wait)  # those who were let in may report any moment
            wait -= client.long_wait
        if wait > client.long_wait and not waiter.done():
            client.announce_wait(queue, target, wait)
        yield Wait(waiter, wait)


@contextmanager
def _enlisted(queue: CircuitBreaker | ThrottleGate) -> Iterator[Future[None]]:
    waiter = queue.enlist()
    try:
        yield waiter
    finally:
        queue.leave(waiter)


def _ask(call: Call, client: Runtime, turn: _Turn, lead: Lead | None) -> Steps[Served]:
    """Ask one target until it answers, refuses, or has used up its attempts."""
    target = turn.target
    route = target.route(call)
    while True:
        seen = target.routes.supervisor.generation
        call.sent = attempt = yield from _clear_the_way(call, client, turn, route)
        if lead is not None:
            lead.sent()
        try:
            answer: Answer = yield attempt
        except BaseException as error:
            verdict = attempt.settle(error)
            if not isinstance(error, Exception):
                raise
            failure = error
        else:
            route.budget.refund(retried=turn.retried)
            return _take(call, client, attempt, answer)
        _note_failure(call, client, attempt, verdict, failure)
        if lead is not None and (landed := lead.landed) is not None:
            return Served(landed, hit=True)
        yield from _make_ready(call, client, turn, attempt, seen, verdict, failure)


def _make_ready(
    call: Call,
    client: Runtime,
    turn: _Turn,
    attempt: Attempt,
    seen: int,
    verdict: Verdict,
    failure: Exception,
) -> Steps[None]:
    """Do what has to be done before the next attempt on this target; raise if there is none."""
    route = attempt.route
    if verdict.kind is Kind.BROKEN:
        _mend(client, turn.target.routes, seen, failure, route.label)
        if attempt.emitted or turn.mended:
            raise failure
        turn.mended = True
    elif not verdict.retry:
        raise failure
    elif verdict.kind is Kind.THROTTLED:
        _check_throttle(call, client, route, failure)
    else:
        if not (attempt.probe and call.has_patience(client.clock(), 0.0)):
            turn.used += 1
        yield Wait(None, _pause(call, client, turn, route, failure))


def _take(call: Call, client: Runtime, attempt: Attempt, answer: Answer) -> Served:
    """Keep an answer and serve it, unless a filter held it back and somebody may do better."""
    attempt.succeed()
    call.attempts.append(AttemptSummary(attempt.label, "answer", attempt.seconds))
    client.store(attempt.target.key(call), answer, whole=attempt.whole)
    if Kind.POLICY in call.special and not attempt.emitted and usable(answer) == "filtered":
        call.filtered = answer
        raise AnswerFilteredError
    return Served(answer, hit=False)


def _clear_the_way(call: Call, client: Runtime, turn: _Turn, route: Route) -> Steps[Attempt]:
    """Gate, then limits, then circuit: what waits comes first, so that no permit waits (R11)."""
    target = turn.target
    client.under_way.check()
    refusal = target.routes.supervisor.refusal()
    if refusal is not None:
        raise _rejected(client, route, refusal)
    lease = target.timeout(call) or 0.0
    while True:
        passage = yield from _pass_gate(call, client, route, lease)
        slot = yield from _take_slot(call, client, target, route, passage)
        if passage.is_current:
            break
        _release(passage, slot)  # the gate has closed during the queue
    admission = route.admit(lease, early=turn.early)
    turn.early = False
    if admission is None:
        _release(passage, slot)
        raise _rejected(client, route, route.rejection())
    return target.attempt(call, route, admission, passage, slot)


def _note_failure(
    call: Call, client: Runtime, attempt: Attempt, verdict: Verdict, error: Exception
) -> None:
    client.tally.add(f"failed:{verdict.kind}")
    call.attempts.append(AttemptSummary(attempt.label, verdict.kind, attempt.seconds))
    with suppress(AttributeError):
        error.verdict = verdict  # type: ignore[attr-defined]  # ours to attach
        if verdict.retry_after is not None and getattr(error, "retry_after", None) is None:
            error.retry_after = verdict.retry_after  # type: ignore[attr-defined]  # DSPy's field
    if client.is_heard:
        client.emit(
            AttemptFailed,
            attempt.label,
            seconds=attempt.seconds,
            outcome=verdict.kind,
            error=type(error).__name__,
        )


def _check_throttle(call: Call, client: Runtime, route: Route, failure: Exception) -> None:
    """Raise the 429 that was just received if the pause it asks for does not fit this call."""
    gate = route.gate
    wait = gate.wait_time()
    now = client.clock()
    if _is_hopeless(client, gate) or (math.isfinite(wait) and wait > call.left(now)):
        if gate.hint is not None:
            failure.retry_after = gate.hint  # type: ignore[attr-defined]  # DSPy's field
        raise failure


def _is_hopeless(client: Runtime, gate: ThrottleGate) -> bool:
    """Whether the pause asked for, or the time without a single answer, is beyond patience (R28)."""
    most = client.retry.max_retry_after
    return (gate.hint or 0.0) > most or gate.unbroken > most


def _pause(call: Call, client: Runtime, turn: _Turn, route: Route, failure: Exception) -> float:
    """Return the seconds to wait before the next attempt, or raise if there is to be none."""
    if turn.used >= call.max_attempts:
        raise failure
    if route.wait_time() > 0:
        raise _rejected(client, route, route.rejection()) from failure
    hint = getattr(failure, "retry_after", None)  # the gate sees to it, unless it is too long
    if hint is not None and hint > client.retry.max_retry_after:
        raise failure
    wait = client.backoff(max(turn.used - 1, 0))
    if wait >= call.left(client.clock()) or not route.budget.take():
        raise failure
    turn.retried = True
    client.tally.add("retries")
    client.emit(
        RetryScheduled,
        turn.target.label,
        seconds=wait,
        attempt=turn.used + 1,
        error=type(failure).__name__,
    )
    return wait


def _pass_gate(call: Call, client: Runtime, route: Route, lease: float) -> Steps[GatePass]:
    """Wait until the provider's last 429 is over (R28)."""
    gate = route.gate
    while (passage := gate.admit(lease)) is None:
        wait, now = gate.wait_time(), client.clock()
        if _is_hopeless(client, gate) or (math.isfinite(wait) and wait >= call.left(now)):
            hint = gate.hint
            error = ThrottledError(
                f"client {client.name!r}: {route.label} asked for a pause"
                + (f" of {hint:.1f} s" if hint is not None else "")
                + ", which is longer than this call may wait",
                client=client.name,
                retry_after=hint,
            )
            raise _rejected(client, route, error)
        yield from _line_up(client, gate, route.label, call.left(now))
        _check_deadline(call, client)
    return passage


def _take_slot(
    call: Call, client: Runtime, target: Target, route: Route, passage: GatePass
) -> Steps[Slot | None]:
    """Queue for a place among the target's concurrent attempts and for its rate budget (R53)."""
    slot: Slot | None = None
    try:
        while (limiter := route.limiter) is not None:
            slot = limiter.enter(target.estimate(call), call.left(client.clock()))
            while not slot.granted and limiter is route.limiter:
                yield Wait(slot.future, min(slot.wait_time(), call.left(client.clock())))
                slot.poll()
                _check_deadline(call, client)
            if slot.granted:
                break
            slot.leave(sent=False)  # the client was restarted: queue anew
    except BaseException as error:
        _release(passage, slot)
        if isinstance(error, LimitExceededError):
            raise _rejected(client, route, error) from None
        raise
    return slot


def _release(passage: GatePass, slot: Slot | None) -> None:
    passage.release()
    if slot is not None:
        slot.leave(sent=False)


def _rejected(client: Runtime, target: Route, error: R) -> R:
    client.tally.add(f"refused:{error.default_code}")
    if client.is_heard:
        client.emit(
            CallRejected, target.label, reason=error.default_code, retry_after=error.retry_after
        )
    return error


def _check_deadline(call: Call, client: Runtime) -> None:
    if call.left(client.clock()) <= 0:
        raise _deadline_passed(call, client)


def _deadline_passed(call: Call, client: Runtime) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"client {client.name!r}: no answer within the deadline of {call.budget:g} s",
        client=client.name,
    )
