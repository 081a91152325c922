"""Providers and disks that hang: who waits, for how long, and who is answered meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import dspy
import httpx
import pytest

from dspy_resilient import CachePolicy, DeadlineExceededError
from dspy_resilient.cache.disk import DiskCache
from dspy_resilient.testing import Hang, Status, rate_limited


def at_once(lm, prompts, **options):
    """Make a call for each prompt on a thread of its own; return answers or errors, and seconds."""
    found = [None] * len(prompts)

    def call(number):
        begun = time.monotonic()
        try:
            came = lm(prompts[number], **options)
        except Exception as error:  # what is looked at
            came = error
        found[number] = (came, time.monotonic() - begun)

    threads = [threading.Thread(target=call, args=(each,)) for each in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_two_hung_sockets_leave_a_sync_client_usable(provider, make):
    """They held both places; the next calls are answered."""
    lm = make(limits=2, deadline=3)
    provider.script(Hang(), Hang())
    for came, _ in at_once(lm, ["a", "b"]):
        assert isinstance(came, DeadlineExceededError)
    assert [came for came, _ in at_once(lm, ["c", "d", "e"])] == [["Paris"]] * 3


def test_hangs_that_outlive_short_deadlines_open_the_circuit(provider, make, ask):
    """In the end, once the provider is known to answer faster."""
    lm = make(deadline=1.5, timeout=1, cache=False, max_wait=0, num_retries=0)
    assert ask(lm, "q") == ["Paris"]
    provider.always(Hang())
    for number in range(8):
        if lm.circuit.state != "closed":
            break
        with pytest.raises(dspy.LMError):
            ask(lm, f"q {number}")
    assert lm.circuit.state != "closed"


def test_identical_calls_at_a_hanging_provider_end_together(provider, make):
    """Each with its own deadline, counted from when it was made."""
    lm = make(deadline=2)
    provider.always(Hang())
    found = at_once(lm, ["the same"] * 6)
    assert all(isinstance(came, DeadlineExceededError) for came, _ in found)
    assert max(seconds for _, seconds in found) < 2 * 2


def test_identical_calls_at_a_failing_provider_end_together(provider, make):
    """With one caller's attempts, not six callers' one after the other."""
    lm = make(max_wait=0, num_retries=1)
    provider.always(Status(503))
    found = at_once(lm, ["the same"] * 6)
    assert all(isinstance(came, dspy.LMError) for came, _ in found)
    assert provider.count == 2


def test_a_second_caller_passes_a_straggler(provider, make, ask):
    """The first request hangs; an identical call sends its own after three times the usual time."""
    lm = make()
    assert ask(lm, "before") == ["Paris"]
    provider.script(Hang())
    first = threading.Thread(target=lambda: lm("the same"))
    first.start()
    provider.wait_for(2)
    begun = time.monotonic()
    assert ask(lm, "the same") == ["Paris"]
    assert time.monotonic() - begun < 8
    assert provider.count == 3


def test_what_dspy_parallel_sends_again_is_answered(provider, make):
    """`timeout=` of `dspy.Parallel` re-submits a straggler, whose first request hangs."""
    provider.answer = "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=make()):
        program(question="before")
        provider.script(Hang())
        parallel = dspy.Parallel(
            num_threads=2, timeout=1, straggler_limit=3, disable_progress_bar=True
        )
        begun = time.monotonic()
        found = parallel([(program, {"question": "the same"})])
    assert [each.answer for each in found] == ["Paris"]
    assert time.monotonic() - begun < 15


FROZEN = """
import asyncio, sys, dspy
from dspy_resilient import ResilientLM
from dspy_resilient.testing import Provider, dspy_answers

def look_up(question: str) -> str:
    return dspy.Predict("question -> answer")(question="inner " + question).answer

def step(text):
    return {"next_tool_name": "look_up", "next_tool_args": {"question": text}}

async def main(lm):
    agent = dspy.ReAct("question -> answer", tools=[look_up], max_iters=2)
    with dspy.context(lm=lm):
        calls = [agent.acall(question=f"q {n}") for n in range(4)]
        return await asyncio.gather(*calls, return_exceptions=True)

with Provider(dspy_answers(step), latency=0.05) as provider:
    lm = ResilientLM("openai/m", api_base=provider.api_base, api_key="k", limits=2, cache=False)
    print("ended", len(asyncio.run(main(lm))))
"""


def test_agents_whose_tools_ask_the_same_client_do_not_freeze():
    """A sync tool blocks the loop that the places' holders need: it must not wait for one."""
    run = subprocess.run(
        [sys.executable, "-c", FROZEN], capture_output=True, text=True, timeout=90, check=False
    )
    assert "ended 4" in run.stdout, run.stderr[-2000:]


def test_without_retries_a_429_is_raised_at_once(provider, make, ask):
    """Exactly one request, whatever pause the provider asks for."""
    lm = make(num_retries=0)
    provider.always(rate_limited(retry_after=30))
    begun = time.monotonic()
    with pytest.raises(dspy.LMRateLimitError):
        ask(lm, "q")
    assert time.monotonic() - begun < 10
    assert provider.count == 1


@pytest.mark.parametrize(
    "timeout", [httpx.Timeout(0.5), "0.5", 0.5], ids=["httpx", "text", "number"]
)
def test_a_timeout_for_one_call_counts_however_it_is_written(provider, make, ask, timeout):
    """The attempt ends, and counts as a failure of the provider's once it took that long."""
    lm = make(num_retries=0, max_wait=0)
    provider.always(Hang())
    begun = time.monotonic()
    with pytest.raises(dspy.LMError) as caught:
        ask(lm, "q", timeout=timeout)
    assert time.monotonic() - begun < 10
    assert [each.outcome for each in caught.value.attempts] == ["timeout"]
    assert lm.circuit.failure_count == 1


def test_a_deadline_covers_a_disk_that_hangs(provider, make, ask, tmp_path, monkeypatch):
    """The look-up is left behind with its thread."""
    free = threading.Event()
    monkeypatch.setattr(DiskCache, "load", lambda *_: free.wait(30) and None)
    lm = make(cache=CachePolicy(disk=tmp_path), deadline=1)
    begun = time.monotonic()
    try:
        with pytest.raises(DeadlineExceededError):
            ask(lm, "q")
        assert time.monotonic() - begun < 10
    finally:
        free.set()
    assert provider.count == 0
