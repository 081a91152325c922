"""What one call does, over HTTP, through both drivers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import dspy
import pytest

from dspy_resilient import (
    AllTargetsFailedError,
    CachePolicy,
    CircuitOpenError,
    CircuitPolicy,
    ClientClosedError,
    DeadlineExceededError,
    ResilientLM,
    RetryPolicy,
    ThrottledError,
)
from dspy_resilient.events import FlightJoined
from dspy_resilient.pipeline import in_flight
from dspy_resilient.testing import Hang, Hold, Provider, Status, rate_limited

AT_ONCE = RetryPolicy(base=0.0)
FRAGILE = CircuitPolicy(failure_threshold=2, recovery_time=30.0, max_recovery_time=30.0)


def run_together(count, work):
    """Start `count` threads at one barrier; return what each returned or raised."""
    barrier, results = threading.Barrier(count), [None] * count

    def body(number):
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=body, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_an_answer_comes_from_the_provider_once_and_then_from_the_cache(provider, make, ask):
    """The cache is asked first; sync and async share an entry."""
    lm = make()
    assert ask(lm, "Capital of France?") == ["Paris"]
    assert lm("Capital of France?") == ["Paris"]
    assert asyncio.run(lm.acall("Capital of France?")) == ["Paris"]
    assert provider.count == 1
    assert lm.stats().hits == 2


def test_a_hit_looks_like_dspys(provider, make, ask):
    """A hit has a history entry with empty usage, the old cost and cache_hit."""
    lm = make()
    ask(lm, "q", temperature=0.5)
    ask(lm, "q", temperature=0.5)
    first, second = lm.history
    assert second["usage"] == {}
    assert second["cost"] == first["cost"]
    assert second["cache_hit"] is True
    assert second["response"].cache_hit is True
    assert second["outputs"] == first["outputs"] == ["Paris"]
    assert second["kwargs"] == first["kwargs"] == {"temperature": 0.5}
    assert second["prompt"] == "q"
    assert second["uuid"] != first["uuid"]
    assert set(first) - set(second) == set()


def test_a_hit_is_served_while_the_circuit_is_open(provider, make, ask):
    """The cache never asks the circuit."""
    lm = make(max_wait=0)
    ask(lm, "known")
    lm.circuit.force_open()
    assert ask(lm, "known") == ["Paris"]
    with pytest.raises(CircuitOpenError):
        ask(lm, "unknown")


def test_outputs_of_a_hit_are_fresh(provider, make, ask):
    """A caller may change what it got."""
    lm = make()
    ask(lm, "q").append("mine")
    assert ask(lm, "q") == ["Paris"]


def test_a_failed_attempt_is_repeated_until_it_is_answered(provider, make, ask):
    """num_retries=3 means four attempts."""
    lm = make(retry=AT_ONCE)
    provider.script(Status(500), Status(503), Status(502))
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 4
    assert [each.outcome for each in lm.history[-1]["attempts"]] == ["failure"] * 3 + ["answer"]


def test_attempts_used_up_raise_the_providers_own_error(provider, make, ask):
    """A provider's error leaves unchanged, with the attempts attached."""
    lm = make(retry=RetryPolicy(base=0.0, max_attempts=2), max_wait=0)
    provider.always(Status(500))
    with pytest.raises(dspy.LMServerError) as caught:
        ask(lm, "q")
    assert provider.count == 2
    assert [each.outcome for each in caught.value.attempts] == ["failure", "failure"]


@pytest.mark.parametrize("retries", [0, 2])
def test_num_retries_means_what_it_says_wherever_it_is_given(provider, make, ask, retries):
    """As attribute, constructor argument and per-call argument."""
    provider.always(Status(500))
    quick = RetryPolicy(base=0.0, max_attempts=retries + 1)
    for lm, options in [
        (make(retry=quick, max_wait=0), {}),
        (make(retry=AT_ONCE, max_wait=0), {"num_retries": retries}),
        (make(retry=AT_ONCE, max_wait=0).copy(num_retries=retries), {}),
    ]:
        provider.clear()
        with pytest.raises(dspy.LMServerError):
            ask(lm, "q", **options)
        assert provider.count == retries + 1


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_the_caller_got_wrong_is_neither_repeated_nor_held_against_the_provider(
    provider, make, ask, status
):
    """4xx are neutral and not retried (section 5)."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1))
    provider.always(Status(status))
    with pytest.raises(dspy.LMError):
        ask(lm, "q")
    assert provider.count == 1
    assert lm.circuit.state == "closed"


def test_the_circuit_opens_and_later_calls_send_nothing(provider, make, ask):
    """After failure_threshold failures nothing is sent."""
    lm = make(circuit=FRAGILE, max_wait=0, num_retries=0)
    provider.always(Status(500))
    for _ in range(2):
        with pytest.raises(dspy.LMServerError):
            ask(lm, "q")
    with pytest.raises(CircuitOpenError) as caught:
        ask(lm, "q")
    assert provider.count == 2
    assert 20 < caught.value.retry_after <= 36
    assert caught.value.client == "openai/test"
    assert caught.value.reason == "failures"


def test_a_call_waits_for_an_open_circuit_while_its_patience_lasts(provider, make, ask):
    """A blip is ridden out."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1, recovery_time=0.2), retry=AT_ONCE)
    provider.script(Status(500))
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 2
    assert lm.circuit.state == "closed"


@pytest.mark.parametrize("max_wait", [0, 1.5])
def test_a_call_is_refused_when_max_wait_is_over_and_not_before(provider, make, ask, max_wait):
    """However long the circuit is going to be open: a batch that fails fast burns its data."""
    lm = make(circuit=FRAGILE, max_wait=max_wait, num_retries=0)
    provider.always(Status(500))
    for _ in range(2):
        with pytest.raises(dspy.LMServerError):
            ask(lm, "q")
    begun = time.monotonic()
    with pytest.raises(CircuitOpenError):
        ask(lm, "q")
    assert max_wait <= time.monotonic() - begun < 2 * max_wait + 2


def test_failing_as_the_probe_uses_up_no_attempt_while_patience_lasts(provider, make, ask):
    """With max_wait left, a call outlives more failed probes than it has attempts."""
    circuit = CircuitPolicy(failure_threshold=1, recovery_time=0.05, backoff=1.0)
    lm = make(circuit=circuit, retry=RetryPolicy(base=0.0, max_attempts=2), max_wait=10)
    provider.script(*[Status(500)] * 5)
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 6


def test_a_refused_connection_is_a_failure_like_any_other(provider, make, ask):
    """LiteLLM shows it as a 500; it counts all the same (section 5)."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1), num_retries=0, max_wait=0)
    provider.down("refuse")
    with pytest.raises(dspy.LMError):
        ask(lm, "q")
    assert lm.circuit.state == "open"


def test_a_429_closes_the_gate_and_the_call_goes_on_after_the_pause(provider, make, ask):
    """429 is neutral, waits as asked, and uses up no attempt."""
    lm = make(num_retries=1, circuit=CircuitPolicy(failure_threshold=1))
    provider.script(rate_limited("0.2"), rate_limited("0.2"))
    begun = time.monotonic()
    assert ask(lm, "q") == ["Paris"]
    assert time.monotonic() - begun >= 0.4
    assert provider.count == 3
    assert lm.circuit.state == "closed"


def test_a_pause_that_does_not_fit_raises_the_429_and_says_when_to_come_back(provider, make, ask):
    """The call that got it raises it with retry_after; later ones are refused unsent."""
    lm = make(deadline=10.0)
    provider.always(rate_limited("3600"))
    begun = time.monotonic()
    with pytest.raises(dspy.LMRateLimitError) as caught:
        ask(lm, "q")
    assert caught.value.retry_after == pytest.approx(3600, abs=5)
    with pytest.raises(ThrottledError) as later:
        ask(lm, "other")
    assert later.value.retry_after == pytest.approx(3600, abs=5)
    assert provider.count == 1
    assert time.monotonic() - begun < 3


def test_a_fallback_answers_when_the_primary_cannot(provider, make, ask):
    """Fallbacks are asked in order; history names who answered."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/backup", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=[backup], num_retries=0)
        provider.down("500")
        assert ask(lm, "q") == ["Lyon"]
        assert lm.history[-1]["model"] == "openai/backup"
        assert second.requests[-1].headers["authorization"] == "Bearer k"
        assert ask(lm, "q") == ["Lyon"]  # kept under the fallback's key, not the primary's
        assert (provider.count, second.count) == (2, 1)
        provider.up()
        assert ask(lm, "q") == ["Paris"]


def test_an_open_circuit_is_skipped_without_a_call_when_there_is_a_fallback(provider, make, ask):
    """A rejection goes straight to the next target."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/backup", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=[backup], circuit=FRAGILE)
        lm.circuit.force_open()
        begun = time.monotonic()
        assert ask(lm, "q") == ["Lyon"]
        assert time.monotonic() - begun < 3
        assert provider.count == 0


def test_all_targets_failing_says_what_each_of_them_did(provider, make, ask):
    """AllTargetsFailedError has one error per target; the last is its cause."""
    with Provider() as second:
        backup = dspy.LM("openai/backup", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=[backup], num_retries=0)
        provider.down("500")
        second.down("reset")
        with pytest.raises(AllTargetsFailedError) as caught:
            ask(lm, "q")
    assert len(caught.value.errors) == 2
    assert caught.value.__cause__ is caught.value.errors[-1]


def test_a_bad_request_ends_the_call_whatever_fallbacks_there_are(provider, make, ask):
    """A neutral error leaves unchanged."""
    with Provider() as second:
        backup = dspy.LM("openai/backup", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=[backup])
        provider.always(Status(400))
        with pytest.raises(dspy.LMInvalidRequestError):
            ask(lm, "q")
        assert second.count == 0


def test_the_deadline_holds_while_an_attempt_hangs(provider, make, ask):
    """A hanging provider cannot hold a call beyond its deadline."""
    lm = make(deadline=0.5)
    provider.always(Hang())
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        ask(lm, "q")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("seconds", [1e10, 1e300])
def test_a_deadline_may_be_longer_than_any_wait(make, ask, seconds):
    """Python's own waits end at some hundred years; a deadline does not."""
    assert ask(make(deadline=seconds, limits=1), "q") == ["Paris"]


def test_no_number_of_failures_breaks_the_backoff(make):
    """The wait is bounded by `cap` however many there were."""
    lm = make(retry=RetryPolicy(cap=5.0))
    assert 0 <= lm._runtime.backoff(100_000) <= 5 * 1.25


def test_an_answer_that_comes_too_late_is_there_for_the_next_call(provider, make):
    """A late answer still lands in the cache."""
    lm = make(deadline=0.3)
    hold = Hold()
    provider.script(hold)
    with pytest.raises(DeadlineExceededError):
        lm("q")
    hold.release()
    for _ in range(100):
        if lm.stats().stored:
            break
        time.sleep(0.02)
    assert lm("q") == ["Paris"]
    assert provider.count == 1


def test_identical_calls_at_once_send_one_request(provider, make):
    """Single-flight over threads."""
    lm = make()
    hold = Hold()
    provider.script(hold)
    threading.Timer(0.3, hold.release).start()
    assert run_together(16, lambda _: lm("q")) == [["Paris"]] * 16
    assert provider.count == 1
    assert lm.stats().coalesced + lm.stats().hits == 15


async def test_identical_tasks_at_once_send_one_request(provider, make):
    """Single-flight over the tasks of one loop."""
    lm = make()
    assert await asyncio.gather(*(lm.acall("q") for _ in range(16))) == [["Paris"]] * 16
    assert provider.count == 1


def test_a_failing_leader_fails_its_followers_at_once(provider, make):
    """32 identical calls, one request, 32 errors in one call's time."""
    lm = make(num_retries=0)
    hold = Hold(then=Status(400))
    provider.script(hold)
    threading.Timer(0.3, hold.release).start()
    results = run_together(16, lambda _: lm("q"))
    assert all(isinstance(each, dspy.LMInvalidRequestError) for each in results)
    assert provider.count == 1


async def test_a_cancelled_leader_promotes_a_follower(provider, make):
    """The rest get their answer with a second request."""
    joined = threading.Semaphore(0)
    lm = make(on_event=lambda event: isinstance(event, FlightJoined) and joined.release())
    provider.script(Hang())
    leader = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(provider.wait_for, 1)
    followers = [asyncio.create_task(lm.acall("q")) for _ in range(7)]
    for _ in followers:
        await asyncio.to_thread(joined.acquire)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert await asyncio.gather(*followers) == [["Paris"]] * 7
    assert provider.count == 2


async def test_a_cancelled_call_leaves_nothing_behind(provider, make):
    """Cancellation is neutral and gives everything back."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1), limits=1, cache=False)
    provider.script(Hang())
    task = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(provider.wait_for, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lm.circuit.state == "closed"
    assert await lm.acall("q") == ["Paris"]


async def test_a_sync_call_on_a_running_loop_never_waits_for_a_task_of_that_loop(provider, make):
    """No deadlock, whatever the mix."""
    lm = make()
    hold = Hold()
    provider.script(hold)
    task = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(provider.wait_for, 1)
    assert lm("q") == ["Paris"]
    hold.release()
    assert await task == ["Paris"]


def test_a_closed_client_refuses(make, ask):
    """close() is final and idempotent."""
    lm = make()
    lm.close()
    lm.close()
    with pytest.raises(ClientClosedError):
        ask(lm, "q")


def test_a_second_client_is_not_touched_by_the_first(provider, make, ask):
    """Nothing is shared unless somebody shared it (section 1)."""
    one, two = make(max_wait=0), make(max_wait=0)
    one.circuit.force_open()
    ask(two, "q")
    with pytest.raises(CircuitOpenError):
        ask(one, "q")
    assert provider.count == 1


def test_zero_choices_are_a_failure(provider, make, ask):
    """A 200 without a choice is retried like a 5xx (section 5)."""
    from dspy_resilient.testing import NoChoices

    lm = make(retry=AT_ONCE)
    provider.script(NoChoices())
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 2


def test_what_a_truncated_answer_was_is_not_remembered(provider, make, ask):
    """Only complete answers are stored."""
    from dspy_resilient.testing import Truncated

    lm = make()
    provider.script(Truncated())
    ask(lm, "q")
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 2
    assert lm.stats().skipped == {"truncated": 1}


def test_an_answer_the_adapter_cannot_parse_is_forgotten(provider, make):
    """A parse failure evicts; the second try asks again."""
    lm = make()
    provider.answer = "no field markers here"
    predict = dspy.Predict("question -> number: int")
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()), pytest.raises(dspy.AdapterParseError):
        predict(question="q")
    sent = provider.count
    provider.answer = '{"number": 7}'
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert predict(question="q").number == 7
    assert provider.count > sent


def test_cache_can_be_switched_off_per_client_per_call_and_by_attribute(provider, make, ask):
    """cache=False asks the provider each time; the attribute is read per call."""
    lm = make(cache=False)
    ask(lm, "q"), ask(lm, "q")
    assert provider.count == 2
    lm.cache = True
    ask(lm, "q"), ask(lm, "q")
    assert provider.count == 3
    ask(lm, "q", cache=False)
    assert provider.count == 4


def test_rollout_and_settings_separate_answers_and_timeouts_do_not(provider, make, ask):
    """What changes the answer is in the key; what does not is left out."""
    lm = make(cache=CachePolicy())
    ask(lm, "q", temperature=1.0)
    ask(lm, "q", temperature=1.0, rollout_id=1)
    ask(lm, "q", temperature=1.0, n=2)
    assert provider.count == 3
    ask(lm, "q", temperature=1.0, timeout=9)
    ask(lm, "q", temperature=1.0, metadata={"trace": "x"})
    assert provider.count == 3
    assert "rollout_id" not in provider.requests[1].body


def test_endpoints_and_keys_separate_answers(provider, make, ask):
    """Two endpoints or two tenants never share an answer."""
    with Provider("Lyon") as other:
        lm = make()
        assert ask(lm, "q") == ["Paris"]
        assert ask(lm, "q", api_base=other.api_base) == ["Lyon"]
        ask(lm, "q", api_key="another")
    assert provider.count == 2


def test_one_attempt_is_one_request(provider, make, ask):
    """Neither DSPy nor LiteLLM nor the SDK retries beneath us."""
    for kind in ("chat", "text", "responses"):
        provider.clear()
        lm = make(model_type=kind, num_retries=0)
        provider.always(Status(500))
        with pytest.raises(dspy.LMError):
            ask(lm, "q")
        assert provider.count == 1, kind


def test_nothing_of_ours_goes_over_the_wire(provider, make, plain, ask):
    """The body and headers equal those of dspy.LM."""
    ask(plain(cache=False, seed=3), "q", temperature=0.2)
    ask(make(seed=3), "q", temperature=0.2)
    theirs, ours = provider.requests
    assert ours.body == theirs.body
    assert ours.headers.keys() == theirs.headers.keys()


def test_resilient_lm_is_a_dspy_lm(make):
    """isinstance, attributes and positional arguments."""
    lm = ResilientLM("openai/x", "chat", 0.3, 100)
    assert isinstance(lm, dspy.LM)
    assert lm.kwargs["temperature"] == 0.3
    assert lm.kwargs["max_tokens"] == 100
    assert lm.num_retries == 3
    assert lm.engine == "litellm"


def test_an_attempt_that_has_ended_keeps_nobody_from_waiting(make, monkeypatch):
    """Ctrl-C may strike before the mark of an attempt is taken back; it means nothing then."""
    marks = []

    def note(event):
        marks.append(in_flight.sending.get())

    def under_an_old_mark():
        in_flight.sending.set(mark)
        return in_flight.is_sending()

    def update_history(self, entry):
        if self.model == lm.model:
            note(entry)

    lm = make("openai/marked", on_event=note, cache=False)
    monkeypatch.setattr(dspy.LM, "update_history", update_history)
    lm("q")
    (mark,) = {each for each in marks if each is not None}
    assert contextvars.copy_context().run(under_an_old_mark) is False
    mark.ended = False
    assert contextvars.copy_context().run(under_an_old_mark) is True
