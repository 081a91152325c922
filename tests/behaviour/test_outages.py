"""Several providers at once: who answers, who is left alone, and how long a caller waits."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import threading
import time

import dspy
import pytest

from dspy_resilient import (
    AllTargetsFailedError,
    CallRejectedError,
    CircuitPolicy,
    DeadlineExceededError,
    LimitExceededError,
    LimitPolicy,
    ResilientLM,
    RetryPolicy,
    ThrottledError,
)
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened, FellBack
from dspy_resilient.testing import Hang, Hold, Provider, Status, rate_limited

ONCE = RetryPolicy(max_attempts=1)
AT_ONCE = RetryPolicy(base=0.0)
FRAGILE = CircuitPolicy(failure_threshold=1, recovery_time=30.0, jitter=0.0)
SOON = CircuitPolicy(failure_threshold=1, recovery_time=0.3, jitter=0.0)


@pytest.fixture
def chain(provider):
    """Three providers ("Paris", "Lyon", "Nice") and a client that asks them in this order."""
    with Provider("Lyon") as second, Provider("Nice") as third:
        made = []

        def build(**options):
            base = {"api_key": "k", "num_retries": 0, "engine": "litellm"}
            fallbacks = [
                dspy.LM("openai/second", api_base=second.api_base, **base),
                dspy.LM("openai/third", api_base=third.api_base, **base),
            ]
            options = {"retry": ONCE, "fallbacks": fallbacks, **options}
            lm = ResilientLM("openai/first", api_base=provider.api_base, api_key="k", **options)
            made.append(lm)
            return lm

        build.providers = provider, second, third
        yield build
        for lm in made:
            lm.close()


def counts(chain):
    return [each.count for each in chain.providers]


def seconds_of(work):
    """Return what `work` returned or raised, and how long it took."""
    began = time.monotonic()
    try:
        result = work()
    except Exception as error:
        result = error
    return result, time.monotonic() - began


def leftovers(lm):
    """Return every place, waiter and flight that somebody still holds."""
    held = {"flights": len(lm._runtime.flights)}
    for route in lm._runtime.all_routes():
        parts = {"gate": route.gate, "circuit": route.circuit}
        for name, part in parts.items():
            if part is not None:
                held[name, route.label] = part._notifier.waiting
        if route.limiter is not None:
            held["limits", route.label] = route.limiter.in_use + route.limiter.queued
    return {name: count for name, count in held.items() if count}


# Outages, and the end of them.


@pytest.mark.parametrize("mode", ["refuse", "reset", "500", "hang"])
def test_the_outage_of_one_is_not_the_callers(chain, ask, mode):
    """Whatever an outage looks like, the next target answers."""
    first, _, third = chain.providers
    lm = chain(timeout=0.4 if mode == "hang" else 20)
    first.down(mode)
    assert ask(lm, "q") == ["Lyon"]
    assert lm.history[-1]["model"] == "openai/second"
    assert [each.target.split()[0] for each in lm.history[-1]["attempts"]] == [
        "openai/first",
        "openai/second",
    ]
    assert third.count == 0


def test_the_outage_of_two_neither(chain, ask):
    """The third is asked, and two circuits are open then; a later call goes straight to it."""
    first, second, _ = chain.providers
    lm = chain(circuit=FRAGILE)
    first.down("500")
    second.down("reset")
    assert ask(lm, "q") == ["Nice"]
    assert ask(lm, "another") == ["Nice"]
    assert counts(chain) == [1, 1, 2]
    assert [circuit.state for circuit in lm.circuits.values()] == ["open", "open", "closed"]


def test_the_outage_of_all_is_told_target_by_target(chain, ask):
    """One error per target, and every attempt with how it ended."""
    for each, mode in zip(chain.providers, ["500", "reset", "500"], strict=True):
        each.down(mode)
    lm = chain(retry=RetryPolicy(max_attempts=2, base=0.0), max_wait=0)
    with pytest.raises(AllTargetsFailedError) as caught:
        ask(lm, "q")
    assert counts(chain) == [2, 2, 2]
    assert len(caught.value.errors) == 3
    assert caught.value.__cause__ is caught.value.errors[-1]
    assert [each.outcome for each in caught.value.attempts] == ["failure"] * 6
    assert all(each.seconds > 0 for each in caught.value.attempts)


def test_the_primary_answers_again_once_it_has_recovered(chain, ask):
    """Nobody has to tell the client; events tell the story."""
    events = []
    lm = chain(circuit=SOON, cache=False, on_event=events.append)
    first, *_ = chain.providers
    first.down("500")
    assert ask(lm, "q") == ["Lyon"]
    first.up()
    time.sleep(0.35)
    assert ask(lm, "q") == ["Paris"]
    assert lm.circuit.state == "closed"
    story = [type(each) for each in events if each.target and "openai/first" in each.target]
    kinds = (CircuitOpened, CircuitHalfOpened, CircuitClosed)
    assert [kind for kind in story if kind in kinds] == list(kinds)
    assert sum(isinstance(each, FellBack) for each in events) == 1


def test_usage_and_cost_are_those_of_whoever_answered(chain, ask):
    """An honest bill."""
    first, *_ = chain.providers
    lm = chain()
    first.down("500")
    with dspy.track_usage() as usage:
        ask(lm, "q")
    assert list(usage.get_total_tokens()) == ["openai/second"]
    entry = lm.history[-1]
    assert entry["response_model"] == "second"
    assert entry["usage"]["total_tokens"] > 0


def test_the_price_is_that_of_the_model_that_answered(provider, make, plain, ask):
    """Not that of the one that was asked first."""
    cheap = plain("openai/gpt-4o-mini", cache=False)
    cheap("q")
    lm = make("openai/gpt-4o", fallbacks=["openai/gpt-4o-mini"], num_retries=0)
    provider.script(Status(500))
    ask(lm, "q")
    assert lm.history[-1]["cost"] == cheap.history[-1]["cost"] > 0


# All circuits open.


@pytest.fixture(params=["threads", "tasks", "both"])
def all_at_once(request):
    """Make 30 calls at once, and hand what became of each to `hear`: `all_at_once(lm, hear)`."""

    def on_threads(lm, hear, prompts):
        barrier = threading.Barrier(len(prompts))

        def body(prompt):
            barrier.wait()
            hear(seconds_of(lambda: lm(prompt))[0])

        threads = [threading.Thread(target=body, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    def on_a_loop(lm, hear, prompts):
        async def body(prompt):
            try:
                hear(await lm.acall(prompt))
            except dspy.LMError as error:
                hear(error)

        async def gather():
            await asyncio.wait_for(asyncio.gather(*map(body, prompts)), 20)

        asyncio.run(gather())

    def on_both(lm, hear, prompts):
        tasks = threading.Thread(target=on_a_loop, args=(lm, hear, prompts[::2]))
        tasks.start()
        on_threads(lm, hear, prompts[1::2])
        tasks.join(20)

    call = {"threads": on_threads, "tasks": on_a_loop, "both": on_both}[request.param]
    return lambda lm, hear: call(lm, hear, [f"q{number}" for number in range(30)])


# What a name brings along.


def test_a_name_of_the_same_provider_brings_the_connection_along(provider, make, ask):
    """Key, base and headers as one unit; settings as well."""
    lm = make(
        fallbacks=["openai/second"],
        num_retries=0,
        temperature=0.3,
        extra_headers={"X-Team": "ours"},
    )
    provider.script(Status(500))
    assert ask(lm, "q") == ["Paris"]
    first, second = provider.requests
    assert (first.body["model"], second.body["model"]) == ("test", "second")
    for name in ("authorization", "x-team"):
        assert first.headers[name] == second.headers[name]
    assert second.body["temperature"] == 0.3


def test_a_name_of_another_provider_brings_settings_only(provider, make, ask, monkeypatch):
    """No key, base or header of one provider ever reaches another."""
    with Provider("Lyon") as other:
        monkeypatch.setenv("GROQ_API_BASE", other.base("groq"))
        monkeypatch.setenv("GROQ_API_KEY", "groqs-own")
        lm = make(
            fallbacks=["groq/llama-3.1-8b-instant"],
            num_retries=0,
            temperature=0.3,
            extra_headers={"X-Team": "ours"},
        )
        provider.down("500")
        assert ask(lm, "q", api_key="for-openai-alone") == ["Lyon"]
        (request,) = other.requests
    assert request.headers["authorization"] == "Bearer groqs-own"
    assert "x-team" not in request.headers
    assert request.body["temperature"] == 0.3


# Throttling.


@pytest.mark.parametrize("hint", ["5", "3600", None])
def test_a_fallback_that_is_ready_answers_while_the_primary_wants_a_pause(chain, ask, hint):
    """The primary is well: it only asks for a pause, which nobody waits for."""
    lm = chain(cache=False)
    first, *_ = chain.providers
    lm._runtime.random = lambda: 1.0
    first.script(rate_limited(hint) if hint else Status(429))
    answer, seconds = seconds_of(lambda: ask(lm, "q"))
    assert answer == ["Lyon"]
    answer, later = seconds_of(lambda: ask(lm, "q"))
    if hint:
        assert answer == ["Lyon"]
        assert counts(chain) == [1, 2, 0]  # the second time the primary is not asked
    assert max(seconds, later) < 1
    assert lm.circuit.state == "closed"


def test_throttled_everywhere_says_when_to_come_back(chain, ask):
    """Within a second, with the hint as it came."""
    for each, hint in zip(chain.providers, ["3600", "1800", "7200"], strict=True):
        each.always(rate_limited(hint))
    lm = chain(deadline=30.0)
    for _ in range(2):
        error, seconds = seconds_of(lambda: ask(lm, "q"))
        assert isinstance(error, AllTargetsFailedError)
        assert error.retry_after == pytest.approx(1800, abs=5)
        assert seconds < 1
    assert all(isinstance(each, ThrottledError) for each in error.errors)
    assert counts(chain) == [1, 1, 1]


def test_who_queues_for_a_place_obeys_a_gate_that_closes_meanwhile(provider, make):
    """The gate is asked again after the queue."""
    lm = make(limits=1, cache=False)
    lm("warm")
    provider.clear()
    provider.script(rate_limited("0.6"))
    provider.latency = 0.05
    threads = [threading.Thread(target=lm, args=(f"q{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    first, *later = [request.at for request in provider.requests]
    assert len(later) == 5
    assert later[0] - first > 0.6
    assert leftovers(lm) == {}


# Limits.


def test_a_full_bulkhead_leads_on_and_is_refused_without_a_fallback(chain, ask):
    """No queue, no wait: the next target, or LimitExceededError."""
    first, *_ = chain.providers
    full = LimitPolicy(max_concurrent=1, max_queue=0)
    for options, expected in (({}, ["Lyon"]), ({"fallbacks": ()}, LimitExceededError)):
        lm = chain(limits=full, cache=False, **options)
        hold = Hold()
        first.clear()
        first.script(hold)
        holder = threading.Thread(target=lm, args=("held",))
        holder.start()
        first.wait_for(1)
        result, seconds = seconds_of(lambda client=lm: ask(client, "q"))
        hold.release()
        holder.join(20)
        assert result == expected or isinstance(result, expected)
        assert seconds < 1
        assert first.count == 1
        assert leftovers(lm) == {}


def test_one_place_makes_a_client_strictly_serial(provider, make):
    """max_concurrent=1, whoever calls: threads and two loops at once."""
    lm = make(limits=1, cache=False)
    lm("warm")
    provider.latency = 0.02
    provider.clear()

    async def tasks(name):
        await asyncio.gather(*(lm.acall(f"{name}{n}") for n in range(4)))

    threads = [threading.Thread(target=lm, args=(f"t{n}",)) for n in range(4)]
    threads += [threading.Thread(target=lambda n=n: asyncio.run(tasks(n))) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    at = [request.at for request in provider.requests]
    assert len(at) == 12
    assert min(b - a for a, b in itertools.pairwise(at)) >= 0.02
    assert leftovers(lm) == {}


def test_tokens_are_reserved_by_estimate_and_reconciled_with_usage(provider, make, ask):
    """A bad guess costs its caller nothing once the answer is there."""
    lm = make(limits=LimitPolicy(tpm=6000), max_tokens=400, cache=False, deadline=1.0)
    limiter = lm._runtime.routes.find(lm, {}).limiter
    for number in range(8):  # 500 tokens at once: one estimate fits, the second would wait
        ask(lm, f"q{number}")
    used = sum(entry["usage"]["total_tokens"] for entry in lm.history)
    assert 0 < used < 500
    assert leftovers(lm) == {}
    provider.latency = 0.3
    hold = Hold()
    provider.script(hold)
    holder = threading.Thread(target=lm.copy(deadline=20.0), args=("held",))
    holder.start()
    provider.wait_for(9)
    assert limiter.in_use == 1
    with pytest.raises(LimitExceededError) as caught:
        ask(lm, "too much for now")
    assert caught.value.retry_after > 1
    hold.release()
    holder.join(20)
    assert leftovers(lm) == {}


def test_an_adaptive_limit_follows_what_the_provider_says(provider, make, ask):
    """Halved on a 429, raised by one per limit-full of clean answers."""
    lm = make(limits=LimitPolicy(max_concurrent=4, adaptive=True), cache=False)
    limiter = lm._runtime.routes.find(lm, {}).limiter
    provider.script(rate_limited("0.05"))
    ask(lm, "q")
    assert limiter.limit == 2
    ask(lm, "q")
    assert limiter.limit == 3


# A deadline shorter than the wait.

WAITS = ["circuit", "gate", "backoff", "rate", "hint"]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with a fallback"])
def test_a_wait_that_would_overrun_the_deadline_is_not_begun(chain, ask, wait, alone):
    """Answered by the fallback, or refused, within a second, and told when to come back."""
    first, *_ = chain.providers
    options = {
        "circuit": {"circuit": FRAGILE},
        "rate": {"limits": LimitPolicy(rpm=2)},
        "backoff": {"retry": RetryPolicy(base=1e6, cap=1e6)},
    }.get(wait, {})
    if alone:
        options["fallbacks"] = ()
    lm = chain(deadline=5.0, max_wait=900, cache=False, **options)
    match wait:
        case "circuit":
            lm.circuit.trip()
        case "gate":
            first.script(rate_limited("30"))
            seconds_of(lambda: ask(lm, "earlier"))
        case "rate":
            ask(lm, "earlier")
        case "backoff":
            first.always(Status(500))
        case "hint":
            first.always(Status(503, retry_after="30"))
    before = first.count
    result, seconds = seconds_of(lambda: ask(lm, "q"))
    assert seconds < 1
    assert first.count - before == (wait in ("backoff", "hint"))
    if not alone:
        assert result == ["Lyon"]
    elif wait == "backoff":
        assert isinstance(result, dspy.LMServerError)
    else:
        assert isinstance(result, (CallRejectedError, dspy.LMServerError))
        assert result.retry_after == pytest.approx(30, abs=3)
    assert leftovers(lm) == {}


def test_a_hanging_primary_costs_its_timeout_and_the_fallback_gets_the_rest(chain, ask):
    """An attempt gets at most what is left of the deadline."""
    first, *_ = chain.providers
    first.always(Hang())
    lm = chain(deadline=20.0, timeout=0.3, cache=False)
    assert ask(lm, "q") == ["Lyon"]
    lm = chain(deadline=0.4, cache=False)
    error, seconds = seconds_of(lambda: ask(lm, "q"))
    assert isinstance(error, DeadlineExceededError)
    assert seconds < 3
    assert counts(chain) == [2, 1, 0]  # past the deadline nobody else is asked
    assert [each.outcome for each in error.attempts] == ["timeout"]


def test_a_deadline_covers_the_queue_for_a_place(chain, ask):
    """Whoever waits for a place gives up in time, and leaves no trace."""
    first, *_ = chain.providers
    lm = chain(limits=1, deadline=0.4, cache=False, fallbacks=())
    lm_patient = lm.copy(deadline=20.0)
    hold = Hold()
    first.script(hold)
    holder = threading.Thread(target=lm_patient, args=("held",))
    holder.start()
    first.wait_for(1)
    error, seconds = seconds_of(lambda: ask(lm, "q"))
    assert isinstance(error, DeadlineExceededError)
    assert seconds < 3
    hold.release()
    holder.join(20)
    assert first.count == 1
    assert leftovers(lm) == {}
    assert ask(lm_patient, "q") == ["Paris"]


# Whoever gives up leaves nothing behind.

STAGES = ["gate", "queue", "rate", "circuit", "backoff", "attempt", "flight"]


@pytest.fixture
def stalled(provider, make):
    """Build a client whose next call stalls at a stage: (client, what ends the stall)."""
    cleanups = []

    def build(stage):
        options = {
            "queue": {"limits": 1},
            "rate": {"limits": LimitPolicy(rpm=2)},
            "circuit": {"circuit": CircuitPolicy(recovery_time=5.0, jitter=0.0)},
            "backoff": {"retry": RetryPolicy(base=1e4, cap=1e4)},
        }.get(stage, {})
        lm = make(cache=stage == "flight", **options)
        hold = Hold()
        match stage:
            case "gate":
                lm._runtime.routes.find(lm, {}).gate.admit().throttled(5.0)
            case "queue" | "flight":
                provider.script(hold)
                prompt = "q" if stage == "flight" else "held"
                holder = threading.Thread(target=lm, args=(prompt,))
                holder.start()
                provider.wait_for(1)
                cleanups.append(lambda: (hold.release(), holder.join(20)))
            case "rate":
                lm("earlier")
            case "circuit":
                lm.circuit.trip()
            case "backoff":
                provider.script(Status(500))
            case "attempt":
                provider.script(hold)
                cleanups.append(hold.release)
        return lm, lambda: [cleanup() for cleanup in cleanups]

    yield build
    for cleanup in cleanups:
        cleanup()


def wait_until(claim):
    """Block until `claim()` holds; at most 10 s."""
    end = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_stalled(lm, provider, stage):
    route = lm._runtime.routes.find(lm, {})
    return {
        "gate": lambda: route.gate._notifier.waiting,
        "queue": lambda: route.limiter.queued,
        "rate": lambda: route.limiter.queued,
        "circuit": lambda: route.circuit._notifier.waiting,
        "backoff": lambda: lm.stats().retries,
        "attempt": lambda: provider.count,
        "flight": lambda: any(f.waiters for f in list(lm._runtime.flights._flights.values())),
    }[stage]()


@pytest.fixture
async def timers(monkeypatch):
    """The timers that this package sets on the running loop."""
    loop, ours = asyncio.get_running_loop(), []

    def noting(delay, callback, *args, call_later=loop.call_later, **options):
        timer = call_later(delay, callback, *args, **options)
        setter = sys._getframe(1).f_globals["__name__"]
        if setter.startswith("dspy_resilient") and "loop_close" not in setter:  # that is the loop's
            ours.append(timer)
        return timer

    monkeypatch.setattr(loop, "call_later", noting)
    return ours


@pytest.mark.parametrize("stage", STAGES)
async def test_a_task_cancelled_at_any_stage_leaves_nothing_behind(
    provider, stalled, timers, stage
):
    """Neutral, and everything given back at once, timers included."""
    lm, resume = stalled(stage)
    before = provider.count
    task = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(wait_until, lambda: is_stalled(lm, provider, stage))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bool(timers) == (stage not in ("attempt", "flight"))  # those wait for no time
    now = asyncio.get_running_loop().time()
    assert all(timer.cancelled() or timer.when() <= now for timer in timers)
    await asyncio.to_thread(resume)
    assert leftovers(lm) == {}
    assert provider.count - before == (stage in ("backoff", "attempt"))
    assert lm.circuit.failure_count == (stage == "backoff")


@pytest.mark.parametrize("stage", STAGES)
def test_a_thread_interrupted_at_any_stage_leaves_nothing_behind(provider, stalled, stage):
    """Ctrl-C is a cancellation like any other."""
    lm, resume = stalled(stage)

    def interrupt():
        wait_until(lambda: is_stalled(lm, provider, stage))
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        lm("q")
    resume()
    assert leftovers(lm) == {}
    assert lm.circuit.failure_count == (stage == "backoff")
