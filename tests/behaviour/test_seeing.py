"""What a client tells about itself while and after calls are made."""

from __future__ import annotations

import asyncio
import copy
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_resilient import (
    CachePolicy,
    CircuitOpenError,
    CircuitPolicy,
    Clients,
    LimitPolicy,
    RetryPolicy,
)
from dspy_resilient.events import CallQueued, WaitStarted
from dspy_resilient.testing import Clock, Hold, Status, Truncated, rate_limited

QUICK = RetryPolicy(base=0.0)


def test_stats_count_what_happened(make, provider, ask):
    """Calls, hits, attempts, failures by kind, retries, what was kept and what was not."""
    lm = make(retry=QUICK)
    provider.script(None, Status(500), rate_limited("0.1"), None, Truncated())
    for prompt in ("a", "a", "b", "c"):
        ask(lm, prompt)
    stats = lm.stats()
    assert (stats.calls, stats.hits, stats.attempts, stats.retries) == (4, 1, 5, 2)
    assert (stats.failures, stats.failed) == (2, {"failure": 1, "throttled": 1})
    assert (stats.stored, stats.skipped) == (2, {"truncated": 1})
    assert stats.latency.count == 3
    assert stats.tokens_saved > 0
    assert stats.recent == stats


def test_stats_count_what_was_refused(make, ask):
    """A refused call is no failure: nothing was sent."""
    lm = make(max_wait=0)
    lm.circuit.force_open()
    with pytest.raises(CircuitOpenError):
        ask(lm, "a")
    stats = lm.stats()
    assert (stats.rejected, stats.refused) == (1, {"circuit_open": 1})
    assert (stats.attempts, stats.failures, stats.errors) == (0, 0, 1)


def test_latency_is_that_of_the_answers(make, provider, ask):
    """Neither failures nor pauses between attempts are in it."""
    lm = make(retry=RetryPolicy(base=0.2))
    provider.script(Status(500), None)
    ask(lm, "a")
    assert lm.stats().latency.count == 1
    assert lm.stats().latency.total == pytest.approx(lm.history[-1]["attempts"][-1].seconds)


def test_reset_counts_from_zero(make, ask):
    """Every number, those of the cache too; what is cached stays."""
    lm = make()
    ask(lm, "a")
    ask(lm, "a")
    lm.reset()
    stats = lm.stats()
    assert stats == type(stats)(client=lm.name)
    assert stats.recent.calls == 0
    ask(lm, "a")
    assert (lm.stats().calls, lm.stats().hits, lm.stats().stored) == (1, 1, 0)


def test_a_difference_of_snapshots_is_what_one_run_cost(make, ask):
    """Stats before and after can be subtracted."""
    lm = make()
    ask(lm, "a")
    before = lm.stats()
    ask(lm, "b")
    assert (lm.stats() - before).attempts == 1


def test_recent_numbers_follow_the_clients_clock(make):
    """What is older than a minute is in the totals only."""
    lm = make()
    clock = lm._runtime.clock = Clock(lm._runtime.clock())
    for minute in range(3):
        for number in range(4):
            lm(f"{minute} {number}")
            clock.advance(1)
        clock.advance(86)
    lm("last")
    stats = lm.stats()
    assert (stats.calls, stats.recent.calls) == (13, 1)


def test_copies_show_the_same_numbers(make):
    """A rollout is the same client."""
    lm = make()
    copy.deepcopy(lm)("a")
    lm.copy(temperature=0.5)("a")
    assert lm.stats().calls == 2


def test_a_client_explains_itself(make, provider, ask):
    """State, reason, since when and until when, a line for each target."""
    lm = make(
        name="fast",
        max_wait=0,
        retry=RetryPolicy(max_attempts=1),
        circuit=CircuitPolicy(failure_threshold=1, recovery_time=30, jitter=0),
        fallbacks=["openai/other"],
    )
    provider.script(Status(503))
    ask(lm, "a")
    first, second = lm.explain().splitlines()
    assert first.startswith("fast: openai/test at http")
    assert re.search(
        r"open for [0-2]\.\d s \(failures\), for (28|29|30) s more; last error: ", first
    )
    assert second.startswith("fast: openai/other at http")
    assert "closed for" in second


def test_a_throttled_client_says_so(make, provider):
    """Until when the provider wants a pause."""
    lm = make(deadline=5.0)
    provider.script(rate_limited("30"))
    with pytest.raises(dspy.LMRateLimitError):
        lm("a")
    assert re.search("throttled for (28|29|30) s more", lm.explain())


def test_a_queue_is_explained(make, provider):
    """A client that seems slow may be waiting for its own limit."""
    lm, gate = make(limits=1), Hold()
    provider.always(gate)
    callers = [threading.Thread(target=lm, args=(str(number),)) for number in range(2)]
    for caller in callers:
        caller.start()
    provider.wait_for(1)
    while "1 requests under way, 1 queue" not in lm.explain():
        assert callers[0].is_alive()
    gate.release()
    for caller in callers:
        caller.join()


def test_a_client_has_a_view_for_notebooks(make, provider, ask):
    """Circuits of all targets with their states, and the numbers; no secret, no address to load."""
    lm = make(name="<fast>", fallbacks=["openai/other"], api_key="sk-not-to-be-shown-0123456789")
    ask(lm, "a prompt that is nobody's business")
    html = lm._repr_html_()
    assert "&lt;fast&gt;" in html
    assert html.count(">closed<") == 2
    assert "openai/other" in html
    assert "requests sent" in html
    assert "sk-not" not in html
    assert "nobody" not in html
    assert "src=" not in html


def test_named_clients_have_a_view_too(provider):
    """A line for each, with its health and numbers; one that was closed is not shown as well."""
    with Clients() as clients:
        endpoint = {"api_base": provider.api_base, "api_key": "sk-not-to-be-shown-0123456789"}
        clients.start("<fast>", "openai/test", **endpoint)("a")
        clients.start("slow", "openai/other", **endpoint).circuit.force_open()
        clients.start("gone", "openai/third", **endpoint).close()
        html = clients._repr_html_()
    assert "&lt;fast&gt;" in html
    for state, colour in (("ready", "#1a7f37"), ("open", "#c62828"), ("closed", "#616161")):
        assert re.search(f"background:{colour}[^>]*>{state}<", html), state
    assert "sk-not" not in html
    assert "http" not in html


def test_reading_the_numbers_disturbs_nothing(make, provider):
    """Looking while many threads call neither blocks nor loses anything."""
    lm = make(cache=CachePolicy(disk=None))
    over = threading.Event()

    def look():
        while not over.is_set():
            str(lm.stats())
            lm._repr_html_()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        callers = [
            threading.Thread(target=lambda n=n: [lm(f"{n} {i}") for i in range(5)])
            for n in range(6)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        over.set()
        watcher.join()
    assert lm.stats().calls == lm.stats().attempts == lm.stats().latency.count == 30


def test_a_cancelled_call_is_no_answer(make, provider):
    """It counts as a call and an attempt, and as nothing else."""
    lm = make()
    provider.always(Hold())

    async def cancel():
        task = asyncio.create_task(lm.acall("a"))
        await asyncio.to_thread(provider.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    stats = lm.stats()
    assert (stats.calls, stats.attempts, stats.failures, stats.latency.count) == (1, 1, 0, 0)


def test_log_lines_stay_lines(make, caplog):
    """A name with a line break in it makes one line all the same."""
    caplog.set_level(logging.DEBUG, logger="dspy_resilient")
    make(name="two\nlines").circuit.force_open()
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert record.facts["client"] == "two\nlines"


async def blocked(lm, count, release):
    """Let `count` callers of both kinds wait for something, then release them."""
    tasks = [asyncio.create_task(lm.acall(f"async {number}")) for number in range(count)]
    threads = [asyncio.to_thread(lm, f"sync {number}") for number in range(count)]
    waiting = asyncio.gather(*tasks, *threads)
    await asyncio.to_thread(lm.told.wait, 20)
    await asyncio.sleep(0.1)  # for the others, who should be silent
    release()
    assert await waiting == [["Paris"]] * (2 * count)


def test_a_call_that_ends_in_an_error_is_a_warning_and_a_refused_one_is_not(
    make, provider, ask, caplog
):
    """An outage with `max_wait=0` refuses thousands of calls; the circuit's own line is enough."""
    caplog.set_level(logging.INFO, logger="dspy_resilient")
    lm = make(max_wait=0, num_retries=0)
    provider.script(Status(500))
    with pytest.raises(dspy.LMServerError):
        ask(lm, "the secret prompt")
    lm.circuit.force_open()
    with pytest.raises(CircuitOpenError):
        ask(lm, "the secret prompt")
    lines = [record for record in caplog.records if record.event.endswith("call_failed")]
    assert [record.levelname for record in lines] == ["WARNING", "INFO"]
    assert "error=LMServerError status=500 attempts=1" in lines[0].getMessage()
    assert not any("secret" in record.getMessage() for record in lines)


@pytest.fixture
def watched(make, caplog):
    """Build a client whose events are kept in `heard`."""
    caplog.set_level(logging.WARNING, logger="dspy_resilient")

    def build(**options):
        heard, told = [], threading.Event()

        def listen(event):
            heard.append(event)
            if isinstance(event, WaitStarted):
                told.set()

        lm = make(max_wait=900, on_event=listen, **options)
        lm.heard, lm.told = heard, told
        return lm

    return build


def waits(lm):
    return [event for event in lm.heard if isinstance(event, WaitStarted)]


def test_a_long_wait_for_a_circuit_is_announced_once(watched, caplog):
    """With the time when it ends, however many calls wait."""
    lm = watched()
    lm.circuit.force_open("maintenance", seconds=60)
    asyncio.run(blocked(lm, 4, lm.circuit.reset))
    (wait,) = waits(lm)
    assert (wait.reason, wait.target) == ("circuit", lm._primary.label)
    assert 50 < wait.seconds <= 60
    assert re.fullmatch(r"\d\d:\d\d:\d\d", wait.ends)
    (line,) = [r.getMessage() for r in caplog.records if r.event.endswith("wait_started")]
    assert wait.ends in line
    lm.heard.clear()
    lm.told.clear()
    lm.clear_cache()
    lm.circuit.force_open("again", seconds=90)
    asyncio.run(blocked(lm, 1, lm.circuit.reset))
    assert len(waits(lm)) == 1


def test_a_long_pause_after_a_429_is_announced_once(watched, provider):
    """It says how long the provider wants it to be."""
    lm = watched()
    lm._runtime.routes.find(lm, {}).gate.admit().throttled(40.0)
    asyncio.run(blocked(lm, 3, lm.reset))
    (wait,) = waits(lm)
    assert wait.reason == "throttled"
    assert 30 < wait.seconds <= 40
    assert provider.count == 6


def test_a_call_that_pauses_alone_after_its_429_announces_that(watched, provider):
    """Others are answered meanwhile, so that the gate stays open."""
    lm, gate = watched(cache=False), Hold(then=rate_limited("1"))
    lm._runtime.long_wait = 0.2

    async def scene():
        provider.script(gate)
        throttled = asyncio.create_task(lm.acall("throttled"))
        await asyncio.to_thread(provider.wait_for, 1)
        others = [asyncio.create_task(lm.acall("answered")) for _ in range(2)]
        await asyncio.gather(*others)
        gate.release()
        assert await throttled == ["Paris"]

    asyncio.run(scene())
    (wait,) = waits(lm)
    assert wait.reason == "throttled"
    assert 0.2 < wait.seconds <= 1


def test_a_short_wait_is_not_announced(watched):
    """A blip is ridden out in silence."""
    lm = watched()
    lm.circuit.force_open("blip", seconds=0.3)
    assert lm("a") == ["Paris"]
    assert not waits(lm)


def test_waiting_for_a_probe_that_hangs_is_announced(watched, provider):
    """When nobody can tell how long it takes, after a few seconds of it."""
    lm, gate = watched(cache=False), Hold()
    lm._runtime.long_wait = 0.2
    provider.script(gate)
    lm.circuit.force_half_open()
    asyncio.run(blocked(lm, 2, gate.release))
    (wait,) = waits(lm)
    assert wait.reason == "circuit"
    assert wait.seconds <= 60


def test_a_turn_within_the_limits_is_awaited_in_the_open(make, provider, ask):
    """Who queues says so, and how long all of them have."""
    heard, gate = [], Hold()
    lm = make(cache=False, limits=1, on_event=heard.append)
    provider.script(gate)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, lm, "a")]
        provider.wait_for(1)
        for number in range(2):
            calls.append(pool.submit(ask, lm, "b"))
            wait_until(lambda: len(queued(heard)) > number)  # noqa: B023  # called here
        time.sleep(0.1)
        gate.release()
        assert [each.result(20) for each in calls] == [["Paris"]] * 3
    label = lm._primary.label
    assert [(e.target, e.ahead, e.in_use) for e in queued(heard)] == [(label, 0, 1), (label, 1, 1)]
    stats = lm.stats()
    assert stats.queued == 2
    assert 0.2 <= stats.queue_seconds < 2 * stats.seconds
    assert "waited within the limits" in str(stats)


def queued(heard):
    return [event for event in heard if isinstance(event, CallQueued)]


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_call_that_need_not_queue_does_not_say_so(make, ask):
    """There is nothing to see."""
    heard = []
    lm = make(limits=1, on_event=heard.append)
    ask(lm, "a")
    assert not queued(heard)
    assert (lm.stats().queued, lm.stats().queue_seconds) == (0, 0)


def test_a_long_wait_for_the_limits_is_announced_once(watched, provider):
    """However many queue, and again once the queue has been empty."""
    lm = watched(cache=False, limits=1)
    lm._runtime.long_wait = 0.2
    for _ in range(2):
        gate = Hold()
        provider.script(gate)
        asyncio.run(blocked(lm, 2, gate.release))
        (wait,) = waits(lm)
        assert (wait.reason, wait.target) == ("limits", lm._primary.label)
        assert (wait.seconds, wait.ends) == (None, None)  # the provider's doing
        lm.heard.clear()
        lm.told.clear()


def test_a_long_wait_for_a_rate_is_announced_with_its_end(watched, caplog):
    """Which the rate alone decides."""
    lm = watched(cache=False, limits=LimitPolicy(rpm=30))
    lm._runtime.long_wait = 0.2
    for each in "abc":
        lm(each)
    (wait,) = waits(lm)
    assert 0 < wait.seconds < 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d", wait.ends)
    assert any(wait.ends in record.getMessage() for record in caplog.records)


def test_faults_of_the_disk_are_seen_with_their_kind(provider, make, ask, tmp_path):
    """A cache that silently lives in memory only would re-bill a run after each restart."""
    (tmp_path / "file").write_text("no folder")
    lm = make(cache=CachePolicy(disk=tmp_path / "file"))
    assert ask(lm, "q") == ["Paris"]
    assert lm.stats().disk_errors.keys() <= {"read: ENOTDIR", "write: ENOTDIR", "write: EEXIST"}
    assert lm.stats().disk_errors.keys() & {"write: ENOTDIR", "write: EEXIST"}
    assert lm.health().disk_errors == sum(lm.stats().disk_errors.values())
    assert "its disk fails" in lm.explain()
    assert "fault of the disk: write" in str(lm.stats())


def test_events_that_a_slow_listener_missed_are_counted(provider, make, ask, monkeypatch):
    """What was dropped can be seen."""
    monkeypatch.setattr("dspy_resilient._support.deliverer.MOST_QUEUED", 2)
    entered, go_on = threading.Event(), threading.Event()

    def listen(event):
        entered.set()
        assert go_on.wait(20)

    lm = make(on_event=listen)
    slow = threading.Thread(target=lambda: ask(lm, "q"))
    slow.start()
    assert entered.wait(20)
    for number in range(5):
        other = threading.Thread(target=lambda n=number: ask(lm, f"{n}"))
        other.start()
        other.join(20)
        assert not other.is_alive()
    assert lm.stats().events_dropped > 0
    go_on.set()
    slow.join(20)
