"""The cache and identical calls at once, over HTTP: who is answered with what, and what is sent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import pytest

from dspy_resilient import CachePolicy, CircuitPolicy, ResilientLM, RetryPolicy
from dspy_resilient.testing import Filtered, Hang, Hold, Provider, Status

MANY = 32
PATIENCE = 30


def on_threads(lm, count):
    def one(_):
        try:
            return lm("q")
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def on_a_loop(lm, count):
    async def gather():
        calls = (lm.acall("q") for _ in range(count))
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(gather())


def on_both(lm, count):
    shares = (on_threads, count // 2), (on_a_loop, count // 4), (on_a_loop, count - 3 * count // 4)
    with ThreadPoolExecutor(3) as pool:
        parts = pool.map(lambda share: share[0](lm, share[1]), shares)
        return [result for part in parts for result in part]


@pytest.fixture(params=[on_threads, on_a_loop, on_both])
def crowd(request):
    """Make many identical calls at once: on threads, on one loop, on threads and two loops."""
    return request.param


def until(ready):
    end = time.monotonic() + PATIENCE
    while not ready() and time.monotonic() < end:
        time.sleep(0.01)


def release_when(ready, hold):
    """Let the held request go as soon as `ready()`, and not before everybody has come."""

    def watch():
        until(ready)
        hold.release()

    threading.Thread(target=watch, daemon=True).start()


def waiting(lm):
    """Return how many follow somebody's flight."""
    return sum(len(flight.waiters) for flight in lm._runtime.flights._flights.values())


# Identical calls at once


def test_identical_calls_are_one_request(provider, make, crowd):
    """32 calls, one request, 32 answers, and the numbers of it."""
    lm, hold = make(), Hold()
    provider.script(hold)
    release_when(lambda: waiting(lm) == MANY - 1, hold)
    assert crowd(lm, MANY) == [["Paris"]] * MANY
    assert provider.count == 1
    stats = lm.stats()
    assert (stats.calls, stats.coalesced, stats.attempts, stats.stored) == (MANY, MANY - 1, 1, 1)
    assert stats.tokens_saved == (MANY - 1) * lm.history[0]["usage"]["total_tokens"] > 0


def test_providers_error_is_everybodys(provider, make, crowd):
    """32 calls, one request, 32 errors in one call's time, each its own."""
    lm, hold = make(num_retries=0), Hold(then=Status(500))
    provider.script(hold)
    release_when(lambda: waiting(lm) == MANY - 1, hold)
    results = crowd(lm, MANY)
    assert [type(result) for result in results] == [dspy.LMServerError] * MANY
    assert len(set(map(id, results))) == MANY
    assert provider.count == 1


async def test_cancelled_leader_costs_one_request(provider, make):
    """Of 32 one is cancelled: two requests and 31 answers, on threads and on a loop."""
    lm = make()
    provider.script(Hang())
    leader = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(provider.wait_for, 1)
    with ThreadPoolExecutor(15) as pool:
        threads = [pool.submit(lm, "q") for _ in range(15)]
        tasks = [asyncio.create_task(lm.acall("q")) for _ in range(16)]
        await asyncio.to_thread(until, lambda: waiting(lm) == MANY - 1)
        leader.cancel()
        results = await asyncio.gather(*tasks, *map(asyncio.wrap_future, threads))
    assert results == [["Paris"]] * (MANY - 1)
    assert provider.count == 2


def test_loop_that_ends_takes_nobody_along(provider, make):
    """When the leader's loop is shut down, one of those who wait elsewhere sends."""
    lm = make()
    provider.script(Hang())
    with ThreadPoolExecutor(4) as pool:

        async def lead_and_end():
            leader = asyncio.create_task(lm.acall("q"))
            await asyncio.to_thread(provider.wait_for, 1)
            answers = [pool.submit(lm, "q") for _ in range(4)]
            await asyncio.to_thread(until, lambda: waiting(lm) == 4)
            assert not leader.done()
            return answers  # and asyncio.run cancels what is left, and closes the loop

        answers = asyncio.run(lead_and_end())
        assert [answer.result(PATIENCE) for answer in answers] == [["Paris"]] * 4
    assert provider.count == 2


@pytest.mark.parametrize("old", [False, True])
def test_straggler_that_dspy_submits_again(provider, make, old):
    """It waits for the first attempt, unless that is too old; then the first answer serves."""
    lm = make(cache=CachePolicy(coalesce_max_age=0.05 if old else 60.0))
    provider.answer = "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    hold = Hold()
    provider.script(hold)
    if not old:
        release_when(lambda: waiting(lm) == 1, hold)
    program = dspy.Predict("question -> answer")
    run = dspy.Parallel(num_threads=3, timeout=0.2, disable_progress_bar=True)
    with dspy.context(lm=lm):
        results = run([(program, {"question": "one"})])
        assert [each.answer for each in results] == ["Paris"]
        assert provider.count == (2 if old else 1)
        hold.release()
        assert program(question="one").answer == "Paris"
    assert provider.count == (2 if old else 1)


# Whose answer it is


def test_two_endpoints_never_answer_for_each_other(provider, make, plain, ask):
    """DSPy's own cache gives B what A has answered; this one asks B."""
    with Provider("Lyon") as other:
        ask(plain(), "q")
        assert ask(plain(api_base=other.api_base), "q") == ["Paris"]
        ask(make(), "q")
        assert ask(make(api_base=other.api_base), "q") == ["Lyon"]
        shared = make()
        ask(shared, "q2")
        assert ask(shared, "q2", api_base=other.api_base) == ["Lyon"]


def test_numbers_of_the_cache(provider, make, ask):
    """Hits, misses, stale, skipped by reason, evicted, tokens and dollars saved."""
    policy = CachePolicy(max_entries=1, ttl=1.0, stale_if_error=60.0, disk=None)
    lm = make("openai/gpt-4o-mini", cache=policy, num_retries=0)
    ask(lm, "q")
    ask(lm, "q")
    provider.script(Filtered())
    ask(lm, "filtered")
    time.sleep(1.0)
    provider.script(Status(500))
    ask(lm, "q")
    ask(lm, "more")
    stats = lm.stats()
    assert (stats.hits, stats.misses, stats.stale, stats.evicted) == (1, 4, 1, 1)
    assert stats.skipped == {"filtered": 1}
    first = lm.history[0]
    assert stats.tokens_saved == 2 * first["usage"]["total_tokens"]
    assert stats.cost_saved == pytest.approx(2 * first["cost"])
    assert first["cost"] > 0


# The disk


@pytest.fixture
def touched(monkeypatch):
    """Threads on which answers were read from disk and written to it."""
    seen = {"read": set(), "write": set()}
    read, replace = os.open, Path.replace

    def spy_read(path, *args, **kwargs):
        if str(path).endswith(".json"):
            seen["read"].add(threading.get_ident())
        return read(path, *args, **kwargs)

    def spy_replace(path, *args):
        seen["write"].add(threading.get_ident())
        return replace(path, *args)

    monkeypatch.setattr(os, "open", spy_read)
    monkeypatch.setattr(Path, "replace", spy_replace)
    return seen


async def test_event_loop_never_waits_for_the_disk(make, tmp_path, touched):
    """Reads and writes of an async call happen on another thread."""
    assert await make(cache=CachePolicy(disk=tmp_path)).acall("q") == ["Paris"]
    again = make(cache=CachePolicy(disk=tmp_path))
    assert await again.acall("q") == ["Paris"]
    assert again.stats().attempts == 0
    assert touched["read"]
    assert touched["write"]
    assert threading.get_ident() not in touched["read"] | touched["write"]


def test_sync_call_touches_the_disk_itself(make, tmp_path, touched):
    """Without an event loop no thread is started for it."""
    make(cache=CachePolicy(disk=tmp_path))("q")
    assert make(cache=CachePolicy(disk=tmp_path))("q") == ["Paris"]
    assert touched == {"read": {threading.get_ident()}, "write": {threading.get_ident()}}


async def test_hanging_disk_holds_up_one_call_and_no_task(make, tmp_path, monkeypatch):
    """The loop goes on, and the call can be cancelled; its answer is in memory."""
    lm, hangs = make(cache=CachePolicy(disk=tmp_path)), threading.Event()
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda *args: replace(*args) if hangs.wait(PATIENCE) else None
    )
    call = asyncio.create_task(lm.acall("q"))
    await asyncio.to_thread(until, lambda: lm.stats().stored)
    assert await lm.acall("q") == ["Paris"]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    hangs.set()
    assert await lm.acall("q") == ["Paris"]
    assert lm.stats().attempts == 1


async def test_disk_that_hangs_is_a_miss(provider, make, tmp_path, monkeypatch):
    """An async call does not wait for ever for what may be on disk."""
    monkeypatch.setattr("dspy_resilient.pipeline.drivers._PATIENCE_WITH_A_DISK", 0.2)
    lm, hangs, read = make(cache=CachePolicy(disk=tmp_path)), threading.Event(), os.open

    def hang(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            hangs.wait(PATIENCE)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", hang)
    async with asyncio.timeout(PATIENCE / 2):
        assert await lm.acall("q") == ["Paris"]
        assert await lm.acall("q") == ["Paris"]
    assert provider.count == 1
    hangs.set()


async def test_disk_that_hangs_holds_up_nobody_else(make, tmp_path, monkeypatch):
    """Another client's answers are read and written meanwhile."""
    stuck = make(cache=CachePolicy(disk=tmp_path / "stuck"))
    hangs, read = threading.Event(), os.open

    def hang(path, *args, **kwargs):
        if "stuck" in str(path):
            hangs.wait(PATIENCE)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", hang)
    waits = asyncio.create_task(stuck.acall("q"))
    await asyncio.sleep(0)
    for expected in (1, 0):
        other = make(cache=CachePolicy(disk=tmp_path / "other"))
        assert await other.acall("q") == ["Paris"]
        assert other.stats().attempts == expected
    assert not waits.done()
    hangs.set()
    assert await waits == ["Paris"]


async def test_crowd_of_tasks_has_its_disk_hits(make, tmp_path):
    """A hundred different answers at once come from disk, each to the one who asked."""
    questions = [f"question {number}" for number in range(100)]
    for _ in range(2):
        lm = make(cache=CachePolicy(disk=tmp_path))
        answers = await asyncio.gather(*map(lm.acall, questions))
        assert answers == [["Paris"]] * 100
    assert (lm.stats().attempts, lm.stats().hits) == (0, 100)


def test_callers_on_the_loops_own_threads_are_no_deadlock(make, tmp_path):
    """A loop whose pool is full of callers who wait for its calls still finds answers."""
    make(cache=CachePolicy(disk=tmp_path))("q")
    lm = make(cache=CachePolicy(disk=tmp_path))

    async def crowded():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))

        def call_back():
            return asyncio.run_coroutine_threadsafe(lm.acall("q"), loop).result(PATIENCE)

        return await asyncio.gather(*(asyncio.to_thread(call_back) for _ in range(6)))

    assert asyncio.run(crowded()) == [["Paris"]] * 6
    assert lm.stats().attempts == 0


SCRIPT = """
import sys
from dspy_resilient import CachePolicy, ResilientLM
lm = ResilientLM("openai/test", api_base=sys.argv[1], api_key="k",
                 cache=CachePolicy(disk=sys.argv[2]))
print(lm("q"), lm.stats().attempts)
"""


def test_script_that_runs_again_sends_nothing(provider, tmp_path):
    """What one process has paid for, the next one has."""
    command = [sys.executable, "-c", SCRIPT, provider.api_base, str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert first.stdout.strip() == "['Paris'] 1"
    lm = ResilientLM(
        "openai/test",
        api_base=provider.api_base,
        api_key="k",
        cache=CachePolicy(disk=tmp_path),
    )
    assert lm("q") == ["Paris"]
    assert asyncio.run(lm.acall("q")) == ["Paris"]
    assert provider.count == 1
    lm.close()


def _file_in_its_way(folder):
    folder.write_text("not a folder")


def _gone(folder):
    import shutil

    shutil.rmtree(folder)


def _rubbish(folder):
    for entry in folder.glob("*/*.json"):
        entry.write_bytes(b"\xff" * 100)


def _halves(folder):
    for entry in folder.glob("*/*.json"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])


@pytest.mark.parametrize("break_it", [_file_in_its_way, _gone, _rubbish, _halves])
def test_broken_disk_fails_no_call(provider, make, ask, tmp_path, break_it, caplog):
    """Whatever becomes of the folder, the answer comes, from the provider if need be."""
    folder = tmp_path / "answers"
    if break_it is not _file_in_its_way:
        ask(make(cache=CachePolicy(disk=folder)), "q")
    break_it(folder)
    provider.clear()
    lm = make(cache=CachePolicy(disk=folder))
    assert ask(lm, "q") == ["Paris"]
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 1
    assert sum("disk_cache_failed" in record.message for record in caplog.records) <= 1


def test_answer_is_served_while_the_circuit_is_open_and_from_disk(provider, make, ask, tmp_path):
    """A restart in an outage keeps every answer that was paid for."""
    ask(make(cache=CachePolicy(disk=tmp_path)), "q")
    provider.down("500")
    lm = make(
        cache=CachePolicy(disk=tmp_path),
        circuit=CircuitPolicy(failure_threshold=1),
        retry=RetryPolicy(base=0.0, max_attempts=1),
        max_wait=0,
    )
    with pytest.raises(dspy.LMServerError):
        ask(lm, "other")
    assert lm.circuit.state == "open"
    assert ask(lm, "q") == ["Paris"]
