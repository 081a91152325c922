"""Drills over real HTTP: what a provider goes through, and how many requests reach it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from importlib.metadata import version
from types import SimpleNamespace

import dspy
import pytest

from dspy_resilient import (
    CircuitBreaker,
    CircuitOpenError,
    CircuitPolicy,
    DeadlineExceededError,
    RetryPolicy,
    ThrottledError,
)
from dspy_resilient.events import CircuitClosed, CircuitOpened
from dspy_resilient.testing import (
    CutStream,
    Hang,
    Provider,
    StallStream,
    Status,
    quota_exceeded,
    rate_limited,
)

AT_ONCE = RetryPolicy(base=0.0)
BRIEF = CircuitPolicy(failure_threshold=3, recovery_time=0.3, jitter=0.0)
LASTING = CircuitPolicy(failure_threshold=3, recovery_time=30.0, jitter=0.0)
QUESTIONS = [f"question {number}" for number in range(12)]


@pytest.fixture(params=["threads", "tasks", "both"])
def ask_all(request):
    """Put many questions at once, on threads, on one loop, or half on each: `ask_all(lm, questions)`."""

    def on_threads(lm, questions, **options):
        def one(question):
            try:
                return lm(question, **options)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(one, questions))

    def on_a_loop(lm, questions, **options):
        async def gather():
            calls = (lm.acall(question, **options) for question in questions)
            return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(gather())

    def on_both(lm, questions, **options):
        half = len(questions) // 2
        with ThreadPoolExecutor(1) as pool:
            tasks = pool.submit(on_a_loop, lm, questions[half:], **options)
            return on_threads(lm, questions[:half], **options) + tasks.result()

    return {"threads": on_threads, "tasks": on_a_loop, "both": on_both}[request.param]


def outcomes(results):
    """Return the sorted class names of errors, and "Paris" for answers."""
    return sorted({type(r).__name__ if isinstance(r, Exception) else r[0] for r in results})


# Outages


@pytest.mark.parametrize("mode", ["500", "reset", "hang"])
def test_outage_and_recovery(provider, make, ask, mode):
    """Three requests find out, one probe per interval looks, the first answer closes it."""
    lm = make(circuit=LASTING, num_retries=0, max_wait=0, timeout=0.3 if mode == "hang" else 30)
    provider.down(mode)
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMError):
            ask(lm, question)
    for question in QUESTIONS:
        with pytest.raises(CircuitOpenError) as refused:
            ask(lm, question)
    assert 0 < refused.value.retry_after <= 30
    assert provider.count == 3
    lm.circuit.force_half_open()  # instead of waiting
    with pytest.raises(dspy.LMError):
        ask(lm, "probe")
    with pytest.raises(CircuitOpenError) as refused:
        ask(lm, "too early")
    assert 10 < refused.value.retry_after <= 30
    assert provider.count == 4
    provider.up()
    lm.circuit.force_half_open()
    assert [ask(lm, question, timeout=30) for question in QUESTIONS] == [["Paris"]] * 12
    assert provider.count == 16
    assert lm.circuit.state == "closed"


def test_refused_connections_are_an_outage_too(provider, make, ask_all):
    """Nothing listens: twelve calls at once fail or are refused, and recover together."""
    patient = CircuitPolicy(failure_threshold=3, recovery_time=2.0, jitter=0.0)
    lm = make(circuit=patient, num_retries=0, max_wait=0)
    provider.down("refuse")
    assert set(outcomes(ask_all(lm, QUESTIONS))) <= {"CircuitOpenError", "LMServerError"}
    assert lm.circuit.state == "open"
    provider.up()
    lm.circuit.force_half_open()
    lm.max_wait = 10
    assert outcomes(ask_all(lm, QUESTIONS)) == ["Paris"]
    assert provider.count == 12


def test_a_dead_provider_is_sent_next_to_nothing(provider, make):
    """1000 calls on 50 threads that wait for nothing: at most 2 % of the 4000 of `dspy.LM`."""
    lm = make(max_wait=0, cache=False)
    provider.down("500")

    def one(number):
        with contextlib.suppress(dspy.LMError):
            lm(f"question {number}")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(one, range(1000)))
    assert lm.stats().calls == 1000
    assert provider.count <= 80


def test_crowd_rides_out_an_outage(provider, make, ask_all):
    """All of a crowd wait for the verdict of single probes, and are answered."""
    lm = make(circuit=BRIEF, retry=AT_ONCE, max_wait=20)
    provider.script(*[Status(503)] * 5)
    assert outcomes(ask_all(lm, QUESTIONS)) == ["Paris"]
    assert provider.count == 12 + 5


@pytest.mark.parametrize("engine", ["litellm", "auto", "lm15"])
def test_each_failure_of_a_crowd_counts_once(provider, make, ask_all, engine):
    """Reported by LiteLLM, by the caller, or by both: one failed request is one failure."""
    policy = CircuitPolicy(failure_threshold=100)
    lm = make(engine=engine, circuit=policy, num_retries=0)
    provider.down("500")
    assert outcomes(ask_all(lm, QUESTIONS)) == ["LMServerError"]
    assert lm.circuit.failure_count == lm.stats().failures == provider.count == 12


def test_flapping_provider_answers_every_call(provider, make, ask):
    """Two good answers, two failures, and so on: retries are enough, and are all it gets."""
    lm = make(circuit=BRIEF, retry=AT_ONCE)
    provider.script(*itertools.islice(itertools.cycle([None, None, Status(500), Status(502)]), 20))
    assert [ask(lm, question) for question in QUESTIONS] == [["Paris"]] * 12
    assert provider.count == 12 + 10
    assert lm.circuit.state == "closed"


def test_slow_provider_is_left_alone(provider, make, ask):
    """Answers that take too long open the circuit, if that was asked for."""
    slow = CircuitPolicy(slow_call=0.3, slow_rate=0.8, min_calls=4, recovery_time=30.0)
    lm = make(circuit=slow, max_wait=0)
    provider.latency = 0.35
    for question in QUESTIONS[:4]:
        ask(lm, question)
    with pytest.raises(CircuitOpenError) as refused:
        ask(lm, "more")
    assert refused.value.reason == "slow"
    assert provider.count == 4
    provider.latency = 0.0
    lm.circuit.force_half_open()
    assert [ask(lm, question) for question in QUESTIONS[4:]] == [["Paris"]] * 8
    assert lm.circuit.state == "closed"


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "55"}, {"retry-after-ms": "55000"}], ids=["seconds", "ms"]
)
def test_outage_lasts_as_long_as_the_provider_says(provider, make, ask, headers):
    """Its Retry-After, which DSPy does not pass on, is the least open time."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1, jitter=0.0), num_retries=0, max_wait=0)
    provider.script(Status(503, headers=headers))
    with pytest.raises(dspy.LMServerError):
        ask(lm, "q")
    with pytest.raises(ThrottledError) as refused:
        ask(lm, "more")
    assert 35 < refused.value.retry_after <= 55
    assert 35 < lm.circuit.open_remaining <= 55
    assert provider.count == 1


def test_impatience_is_not_held_against_the_provider(provider, make, ask):
    """A timeout that has run out says something about it; a deadline before that does not."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1), num_retries=0, timeout=30, cache=False)
    provider.always(Hang())
    with pytest.raises(DeadlineExceededError):
        ask(lm.copy(deadline=0.2), "q")
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)
    with pytest.raises(dspy.LMTimeoutError):
        ask(lm, "q", timeout=0.2)
    assert lm.circuit.state == "open"
    assert provider.count == 2


async def test_impatience_of_a_task_is_not_held_against_the_provider(provider, make):
    """Nor is that of somebody who no longer waits for the call."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1), num_retries=0)
    provider.always(Hang())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lm.acall("q"), 0.3)
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)


# By hand


def test_forced_open_circuit_is_not_waited_for(provider, make, ask):
    """Nobody can tell how long a person's hand will take, so patience is for circuits that reopen."""
    lm = make(max_wait=900)
    lm.circuit.force_open("maintenance")
    begun = time.monotonic()
    with pytest.raises(CircuitOpenError) as refused:
        ask(lm, "q")
    assert time.monotonic() - begun < 10
    assert (refused.value.reason, refused.value.retry_after) == ("maintenance", None)
    assert provider.count == 0
    lm.circuit.auto()
    assert [ask(lm, question) for question in QUESTIONS[:2]] == [["Paris"]] * 2
    assert lm.circuit.state == "closed"


def test_forced_closed_circuit_lets_an_outage_through(provider, make, ask):
    """Whatever comes back, until it is left to itself again."""
    lm = make(circuit=dataclasses.replace(LASTING, surprise=1.0), num_retries=0, max_wait=0)
    lm.circuit.force_closed()
    provider.down("500")
    for question in QUESTIONS:
        with pytest.raises(dspy.LMServerError):
            ask(lm, question)
    assert provider.count == 12
    lm.circuit.auto()
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMServerError):
            ask(lm, question)
    with pytest.raises(CircuitOpenError):
        ask(lm, "more")


def test_observed_circuit_shows_an_outage_and_blocks_nobody(provider, make, ask):
    """What it would have done can be read before it is let do it."""
    lm = make(circuit=dataclasses.replace(LASTING, mode="observe"), num_retries=0)
    provider.down("500")
    for question in QUESTIONS[:5]:
        with pytest.raises(dspy.LMServerError):
            ask(lm, question)
    provider.up()
    assert ask(lm, "more") == ["Paris"]
    assert provider.count == 6
    assert (lm.circuit.state, lm.circuit.rejected, lm.stats().rejected) == ("open", 3, 0)


# Rate limits


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        (rate_limited("0.3"), 0.3),
        (Status(429, headers={"retry-after-ms": "300"}), 0.3),
        (Status(429, headers={"x-ratelimit-reset-requests": "300ms"}), 0.3),
        (lambda: rate_limited(formatdate(time.time() + 1, usegmt=True)), 0.0),  # noqa: TID251
        (rate_limited(), 0.1),
        (rate_limited("soon"), 0.1),
        (rate_limited("-5"), 0.1),
        (rate_limited("nan"), 0.1),
    ],
    ids=["seconds", "milliseconds", "reset", "date", "none", "nonsense", "negative", "nan"],
)
def test_429_is_waited_out(provider, make, ask, fault, least):
    """One request earns the 429, one the answer; nothing opens."""
    lm = make(num_retries=1, circuit=CircuitPolicy(failure_threshold=1))
    provider.script(fault() if callable(fault) else fault)
    begun = time.monotonic()
    assert ask(lm, "q") == ["Paris"]
    assert least <= time.monotonic() - begun < 10
    assert provider.count == 2
    assert lm.circuit.state == "closed"


def test_pause_of_an_hour_is_told_at_once(provider, make, ask_all):
    """Of a crowd that will not wait only those under way get the 429; all learn how long."""
    lm = make(max_wait=0)
    provider.always(rate_limited("3600"))
    begun = time.monotonic()
    results = ask_all(lm, QUESTIONS)
    sent = provider.count
    results += ask_all(lm, QUESTIONS)
    assert time.monotonic() - begun < 15
    assert provider.count == sent <= 12
    assert set(outcomes(results)) == {"LMRateLimitError", "ThrottledError"}
    assert all(3500 < error.retry_after <= 3600 for error in results)


class Limited(Provider):
    """Answers `most` requests in `seconds`, and tells the others when to come back."""

    def __init__(self, most, seconds, clock=time.monotonic):
        super().__init__("Paris")
        self._taken, self._most, self._seconds, self._now = [], most, seconds, clock

    def _next_fault(self):
        now = self._now()
        self._taken = [when for when in self._taken if when > now - self._seconds]
        if len(self._taken) < self._most:
            self._taken.append(now)
            return None
        return rate_limited(f"{self._taken[0] + self._seconds - now:.3f}")


CROWD = [f"question {number}" for number in range(400)]
LITELLM = tuple(map(int, version("litellm").split(".")[:2]))
PLAIN = CROWD[: int(os.environ.get("DRILL_PLAIN", "120"))]  # all, by hand: 400


def test_crowd_shares_a_rate_limit():
    """400 calls on 32 threads, 60 in a time: all answered, and few requests wasted."""
    from dspy_resilient import ResilientLM

    with Limited(60, 0.5) as provider:
        lm = ResilientLM("openai/test", api_base=provider.api_base, api_key="k")
        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(lm, CROWD))
        lm.close()
    assert results == [["Paris"]] * 400
    assert provider.count - 400 < 200


class SleepersTime:
    """The time of `callers` threads: it passes when all of them sleep, until the first wakes."""

    def __init__(self, callers):
        self._now, self._awake, self._due = 0.0, callers, []
        self._turn = threading.Condition()

    def __call__(self):
        return self._now

    def sleep(self, seconds):
        with self._turn:
            due = self._now + seconds
            heapq.heappush(self._due, due)
            self._rest()
            assert self._turn.wait_for(lambda: due <= self._now, 30)

    def leave(self):
        with self._turn:
            self._rest()

    def _rest(self):
        self._awake -= 1
        if self._awake == 0 and self._due:
            self._now = self._due[0]
            while self._due and self._due[0] <= self._now:
                heapq.heappop(self._due)
                self._awake += 1
            self._turn.notify_all()


def test_plain_lm_wastes_requests_of_the_same_crowd(monkeypatch):
    """Beside the test above: with `dspy.LM` each caller finds out for itself, in each minute.

    Its minutes are not scaled but jumped over, so that its patience and the limit stay in
    proportion however slow this machine is. For 400 calls it sends 592 requests. Where LiteLLM
    loses the Retry-After (before 1.110) it tries after 1, 2 and 4 s and gives up: of 400 calls
    it then answers 120, with 1336 requests.
    """
    clock, results, todo = SleepersTime(32), [], iter(PLAIN)
    monkeypatch.setattr("dspy.clients.execution.time", SimpleNamespace(sleep=clock.sleep))

    def work():
        for question in todo:
            try:
                results.append(lm(question))
            except dspy.LMRateLimitError as error:
                results.append(error)
        clock.leave()

    with Limited(60, 60.0, clock) as provider:
        lm = dspy.LM(
            "openai/test", engine="litellm", api_base=provider.api_base, api_key="k", cache=False
        )
        with ThreadPoolExecutor(32) as pool:
            for done in [pool.submit(work) for _ in range(32)]:
                done.result()
    answered, calls = results.count(["Paris"]), len(PLAIN)
    assert len(results) == calls
    wasted = provider.count - answered
    if LITELLM >= (1, 110):
        assert answered == calls
        assert wasted >= 32 * (calls // 60 - 1)
    else:
        assert answered <= calls / 2
        assert wasted >= 4 * (calls - answered)


# Accounts


def test_revoked_key_is_tried_three_times(provider, make, ask):
    """Then nothing more is sent with it, and other keys are none the worse."""
    lm = make(max_wait=0)
    provider.always(Status(401))
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMAuthError):
            ask(lm, question)
    with pytest.raises(CircuitOpenError) as refused:
        ask(lm, "more")
    assert refused.value.reason == "auth"
    assert provider.count == 3
    provider.always(None)
    assert ask(lm, "more", api_key="another key") == ["Paris"]
    assert lm.circuit.state == "closed"


@pytest.mark.parametrize("code", [402, 429, 400])
def test_empty_account_is_found_out_once(provider, make, ask, code):
    """One request, whatever status the provider says it with; other keys go on."""
    lm = make(max_wait=0)
    provider.always(quota_exceeded(code))
    with pytest.raises(dspy.LMError):
        ask(lm, "q")
    with pytest.raises(CircuitOpenError) as refused:
        ask(lm, "more")
    assert refused.value.reason == "billing"
    assert provider.count == 1
    provider.always(None)
    assert ask(lm, "more", api_key="another key") == ["Paris"]
    assert provider.count == 2


# Whose circuit it is


def test_pause_asked_of_one_key_is_not_asked_of_another(provider, make, ask):
    """One tenant's quota never stops another."""
    lm = make(max_wait=0)
    provider.script(rate_limited("3600"))
    with pytest.raises(dspy.LMRateLimitError):
        ask(lm, "q", api_key="one")
    assert ask(lm, "q", api_key="another") == ["Paris"]
    with pytest.raises(ThrottledError):
        ask(lm, "more", api_key="one")
    assert provider.count == 2


def test_outage_met_with_one_key_is_an_outage_for_all(provider, make, ask):
    """The endpoint is down, whoever asks."""
    lm = make(circuit=LASTING, num_retries=0, max_wait=0)
    provider.down("500")
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMServerError):
            ask(lm, question, api_key=question)
    with pytest.raises(CircuitOpenError):
        ask(lm, "more")
    assert provider.count == 3


@pytest.mark.parametrize("other", [{"model": "openai/other"}, {"model_type": "text"}], ids=str)
def test_another_model_or_kind_of_call_has_a_circuit_of_its_own(provider, make, ask, other):
    """What one model cannot do, another of the same provider may."""
    lm = make(circuit=LASTING, num_retries=0, max_wait=0)
    copy = lm.copy(**other)
    provider.down("500")
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMServerError):
            ask(copy, question)
    with pytest.raises(CircuitOpenError):
        ask(copy, "more")
    provider.up()
    assert ask(lm, "more") == ["Paris"]


def test_endpoint_of_one_call_has_a_circuit_of_its_own(provider, make, ask):
    """What happens at another endpoint says nothing about the client's own."""
    with Provider() as other:
        other.down("500")
        lm = make(circuit=LASTING, num_retries=0, max_wait=0)
        for question in QUESTIONS[:3]:
            with pytest.raises(dspy.LMServerError):
                ask(lm, question, api_base=other.api_base)
        with pytest.raises(CircuitOpenError):
            ask(lm, "more", api_base=other.api_base)
        assert ask(lm, "more") == ["Paris"]
        assert (provider.count, other.count) == (1, 3)
        assert sorted(circuit.state for circuit in lm.circuits.values()) == ["closed", "open"]


def test_clients_may_share_a_circuit_on_purpose(provider, make, ask):
    """One `CircuitBreaker` object given to two clients is one circuit, and both tell of it."""
    shared = CircuitBreaker(LASTING)
    heard = {"one": [], "two": []}
    one, two = (
        make(name=name, circuit=shared, num_retries=0, max_wait=0, on_event=events.append)
        for name, events in heard.items()
    )
    provider.down("500")
    for question in QUESTIONS[:3]:
        with pytest.raises(dspy.LMServerError):
            ask(one, question)
    with pytest.raises(CircuitOpenError):
        ask(two, "more")
    assert provider.count == 3
    shared.reset()
    for name, events in heard.items():
        changes = [each for each in events if isinstance(each, (CircuitOpened, CircuitClosed))]
        assert [type(each) for each in changes] == [CircuitOpened, CircuitClosed]
        assert {each.client for each in changes} == {name}


def test_credentials_of_calls_are_kept_in_bounds(make):
    """A server with a key per user keeps the state of those seen last."""
    lm = make()
    routes = lm._runtime.routes
    first = routes.find(lm, {"api_key": "user 0"})
    for number in range(600):
        routes.find(lm, {"api_key": f"user {number}"})
    assert len(routes.all()) == 512
    assert routes.find(lm, {"api_key": "user 599"}) in routes.all()
    assert first not in routes.all()
    assert len(lm.circuits) == 1  # the endpoint's own, which all of them share


# In the middle of an answer


@pytest.mark.parametrize("how", ["close", "reset"])
def test_cut_answer_is_asked_for_again(provider, make, ask, how):
    """Half a body is a failure of the provider, and nobody sees it."""
    lm = make(retry=AT_ONCE, circuit=CircuitPolicy(failure_threshold=2, recovery_time=0.1))
    provider.answer = "Paris is the capital of France"
    provider.script(CutStream(how=how), CutStream(how=how))
    assert ask(lm, "q") == ["Paris is the capital of France"]
    assert provider.count == 3
    assert lm.circuit.reason == "failures"


def test_stalled_answer_is_asked_for_again(provider, make, ask):
    """A body that stops half-way runs into the client's timeout, and counts."""
    lm = make(retry=AT_ONCE, timeout=0.3, circuit=CircuitPolicy(failure_threshold=1))
    provider.script(StallStream())
    lm.max_wait = 0
    with pytest.raises((dspy.LMTimeoutError, CircuitOpenError)):
        ask(lm, "q")
    assert provider.count == 1
    assert lm.circuit.state == "open"
