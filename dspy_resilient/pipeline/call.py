"""One call, top to bottom.

    cache -> single-flight -> for each target: retry( gate -> limits -> circuit -> send ) -> store

`complete` is that line as a generator. It decides and never waits: whatever takes time is yielded
as a step (`Wait`, `Prepare`, `Disk`, or an attempt to send) and performed by one of the two drivers
in `drive.py`, which hand the result, or throw the error, back in. Errors, cancellation and Ctrl-C
arrive at the `yield` that was under way. No lock and no context token is held across a `yield`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from dspy_resilient.cache import Failed, Landed, Waiter, usable
from dspy_resilient.errors import BrokenStateError, RestartLimitError
from dspy_resilient.events import AttemptFailed, CacheHit, FellBack, FlightJoined
from dspy_resilient.outcomes import Kind, redacted
from dspy_resilient.pipeline.admission import clear_the_way
from dspy_resilient.pipeline.failures import (
    AnswerFilteredError,
    consider,
    deadline_passed,
    excuses_stale,
    is_the_providers,
    leads_on,
    refusal,
    special_kind,
)
from dspy_resilient.pipeline.state import AttemptSummary, Disk, Prepare, Served, Turn, Wait
from dspy_resilient.pipeline.waiting import is_needed, next_turn

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dspy_resilient.cache import Answer, Lead
    from dspy_resilient.cache.response_cache import RemoteTier
    from dspy_resilient.outcomes import Verdict
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call, Steps
    from dspy_resilient.targets.route import Routes
    from dspy_resilient.targets.target import Target


def complete(call: Call, client: ClientState) -> Steps[Served]:
    """Answer `call`: from the cache, from an identical call under way, or from a target."""
    client.check_open()
    call.deadline = client.clock() + call.budget
    hit = client.cache.recall(call.key) if call.key is not None else None
    if hit is None:
        call.detach()  # before anything is waited for
    if call.key is not None:
        hit = hit or (yield from load(call, client, call.key))
        if hit is not None:
            _announce_hit(client, hit)
            return Served(hit, hit=True)
    if not client.ready() and any(target.needs_litellm for target in call.every_target()):
        before = client.clock()
        yield Prepare()
        call.deadline += client.clock() - before
    try:
        served = yield from _supervise(call, client)
    except Exception as error:
        if call.key is not None and excuses_stale(error):
            stale = yield Disk(client.worker, partial(client.cache.get_stale, call.key))
            if stale is not None:
                _announce_hit(client, stale, stale=True)
                return Served(stale, hit=True, stale=True)
        with suppress(AttributeError):
            error.attempts = tuple(call.attempts)  # type: ignore[attr-defined]  # ours to attach
        raise
    if served.answer.key and not served.hit:
        yield from save(client, served.answer)  # those who waited have it by now
    return served


def _supervise(call: Call, client: ClientState) -> Steps[Served]:
    """Answer the call; once more if our own state breaks under it and nothing was emitted."""
    seen = client.routes.supervisor.generation
    try:
        return (yield from _answer(call, client))
    except BrokenStateError as error:
        _mend(client, client.routes, seen, error)
        if call.sent is not None and call.sent.emitted:
            raise
    return (yield from _answer(call, client))


def _mend(
    client: ClientState, routes: Routes, seen: int, error: Exception, target: str | None = None
) -> None:
    """Restart the client because of `error`, unless it happens too often."""
    try:
        client.mend(routes, seen, error, target)
    except RestartLimitError as limit:
        raise limit from error


def _answer(call: Call, client: ClientState) -> Steps[Served]:
    if call.key is None or call.streams:
        return (yield from _ask_all(call, client, None))
    return (yield from _share(call, client, call.key))


def _announce_hit(client: ClientState, hit: Answer, *, stale: bool = False) -> None:
    if client.is_heard:
        now = client.clock()
        client.emit(CacheHit, hit.target or None, age=now - hit.stored_at, stale=stale)


def _share(call: Call, client: ClientState, key: str) -> Steps[Served]:
    """Lead the flight of this key, or follow its leader."""
    place = client.flights.join(key)
    try:
        if isinstance(place, Waiter):
            if not call.may_wait:
                place.leave()
                return (yield from _ask_all(call, client, None))
            news = yield from _follow(call, client, place)
            if isinstance(news, Served):
                return news
            place = news
        answer = client.cache.peek(key)  # it may have landed between the look-up and the join
        if answer is not None:
            _announce_hit(client, answer)
            served = Served(answer, hit=True)
        else:
            served = yield from _ask_all(call, client, place)
        place.land(served.answer)
    except BaseException as error:
        if isinstance(place, Waiter):
            place.leave()
        elif is_the_providers(error):
            place.fail(error)
        else:
            place.abandon(call.held, call.held_until)
        raise
    return served


def _follow(call: Call, client: ClientState, place: Waiter) -> Steps[Served | Lead]:
    """Wait for the leader's answer, or for the lead itself; send an own request past a straggler."""
    client.emit(FlightJoined)
    joined = client.clock()
    news: Landed | Failed | Lead | None = None
    while news is None:
        patience = call.targets[0].route(call).patience_with_a_straggler()
        left = call.left(client.clock())
        news = yield Wait(place.future, min(left, place.straggles_in(patience)))
        if news is None:
            if call.left(client.clock()) <= 0:
                raise deadline_passed(call, client)
            news = place.overtake(patience)
    if isinstance(news, Failed):
        raise news.error
    if isinstance(news, Landed):
        client.tally.add("coalesced")
        return Served(news.answer, hit=True)
    call.held = min(news.held, client.clock() - joined)  # it was held up behind the leader
    call.held_until = news.held_until
    return news


def _ask_all(call: Call, client: ClientState, lead: Lead | None) -> Steps[Served]:
    """Ask the targets; about a prompt too long, or refused, those kept for that.

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
        kind = special_kind(errors[-1])
        targets = lists.pop(kind, ()) if kind is not None else ()
    if call.filtered is not None:
        return Served(call.filtered, hit=False)
    for later in errors[1:]:
        errors[0].add_note(f"nor did the fallbacks kept for this answer: {redacted(later)}")
    raise errors[0]


def _ask_targets(
    call: Call,
    client: ClientState,
    lead: Lead | None,
    targets: tuple[Target, ...],
    before: list[Exception],
) -> Steps[Served]:
    """Ask the target that is ready, one attempt after the other; wait while none is.

    `before` holds the errors that led to these targets, if they are not the first.
    """
    turns = [Turn(target, call) for target in targets]
    kept_for = special_kind(before[-1]) if before else None
    turn = turns[0]
    while True:
        if (before or turn is not turns[0]) and not turn.announced:
            hit = yield from _hand_over(call, client, turn, turns, before)
            if hit is not None:
                return Served(hit, hit=True)
        try:
            served = yield from _ask(call, client, turn, turns, lead)
        except Exception as failure:
            if not leads_on(failure, kept_for) or _is_over(call, client):
                raise
            turn.error = failure
            turn.final = True
        else:
            if served is not None:
                return served
        turn = yield from next_turn(call, client, turns)


def _is_over(call: Call, client: ClientState) -> bool:
    """Whether nothing may be sent for this call any more, to whatever target."""
    return call.left(client.clock()) <= 0 or client.in_flight.ended


def _hand_over(
    call: Call, client: ClientState, turn: Turn, turns: list[Turn], before: list[Exception]
) -> Steps[Answer | None]:
    """Tell that the call goes on to a fallback, and return what is cached for it, if anything."""
    turn.announced = True
    for each in turns[: turns.index(turn)]:
        if each.error is None:
            each.error = refusal(client, each)
    errors = [each.error for each in turns if each.error is not None] or before
    client.tally.add("fallbacks")
    client.emit(FellBack, turn.route.label, error=type(errors[-1]).__name__)
    if turn.key is None:
        return None
    hit = client.cache.recall(turn.key) or (yield from load(call, client, turn.key))
    if hit is not None:
        _announce_hit(client, hit)
    return hit


def _ask(
    call: Call, client: ClientState, turn: Turn, turns: list[Turn], lead: Lead | None
) -> Steps[Served | None]:
    """Send an attempt, and a second one at once after the first failure, if others are ready.

    Returns None if the target did not answer and may be asked again later.
    """
    is_alone = partial(is_needed, client, turns, turn)
    while True:
        seen = turn.target.routes.supervisor.generation
        call.sent = attempt = yield from clear_the_way(call, client, turn, is_alone)
        if attempt is None:
            return None
        try:
            if lead is not None:
                lead.sent()
            answer: Answer = yield attempt
            attempt.succeed()
        except BaseException as error:
            verdict = attempt.settle(error)
            if not isinstance(error, Exception):
                raise
            failure = error
        else:
            return _take(call, client, attempt, answer)
        _note_failure(call, client, attempt, verdict, failure)
        if lead is not None and (landed := lead.returned()) is not None:
            client.tally.add("coalesced")
            return Served(landed, hit=True)
        if verdict.kind is Kind.BROKEN:
            _mend_target(client, turn, attempt, seen, failure)
        elif consider(call, client, turn, attempt, verdict, failure, is_alone()):
            yield Wait(None, turn.resume_at - client.clock())
        else:
            return None


def _mend_target(
    client: ClientState, turn: Turn, attempt: Attempt, seen: int, failure: Exception
) -> None:
    """Restart the client, so that the attempt can be repeated; raise if that was done already."""
    _mend(client, turn.target.routes, seen, failure, turn.route.label)
    if attempt.emitted or turn.mended:
        raise failure
    turn.mended = True


def _take(call: Call, client: ClientState, attempt: Attempt, answer: Answer) -> Served:
    """Keep an answer and serve it, unless a filter held it back and somebody may do better."""
    client.tally.time(attempt.seconds)
    call.attempts.append(AttemptSummary(attempt.label, "answer", attempt.seconds))
    client.store(attempt.key, answer, attempt.flaw)
    if Kind.POLICY in call.special and not attempt.emitted and usable(answer) == "filtered":
        call.filtered = answer
        raise AnswerFilteredError
    return Served(answer, hit=False)


def _note_failure(
    call: Call, client: ClientState, attempt: Attempt, verdict: Verdict, error: Exception
) -> None:
    client.tally.add(f"failed:{verdict.kind}:{attempt.label}")
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


def load(call: Call, client: ClientState, key: str) -> Steps[Answer | None]:
    """Return the answer that is not in memory but on disk, or with others who share, or None."""
    cache = client.cache
    answer: Answer | None = None
    if cache.has_disk:
        left = call.left(client.clock())
        answer = yield Disk(client.worker, partial(cache.load, key), left)
    if answer is None and cache.others is not None:
        seen = cache.evictions
        found = yield from _hear(cache.others, cache.others.load(key))
        answer = cache.load_shared(found, seen)
    return answer


def save(client: ClientState, answer: Answer) -> Steps[None]:
    """Write a new answer to disk, and let others have it, where there is either."""
    cache = client.cache
    if cache.has_disk:
        yield Disk(client.worker, partial(cache.save, answer))
    if cache.others is not None:
        cache.others.store(answer)  # no caller waits for it


def _hear(others: RemoteTier, news: Future[Answer | None] | None) -> Steps[Answer | None]:
    """Wait for what the shared store has to say, for as long as anybody waits for it."""
    if news is None:
        return None
    answer: Answer | None = yield Wait(news, others.patience_left())
    if not news.done():
        others.go_alone()
    return answer
