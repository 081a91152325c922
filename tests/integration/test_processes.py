"""Several processes work from one parent's client, however they are started.

`PROCESSES` sets how many are spawned: each of them imports DSPy and LiteLLM, which takes seconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dspy_resilient import Clients, LimitPolicy
from dspy_resilient.testing import Hold, Provider

SPAWNED = int(os.environ.get("PROCESSES", "2"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.timeout(180),
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_work_from_a_pickled_client(make, provider, method):
    """Each has a client of the same policies, and its key from the environment."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"needs {method}")
    provider.answer = lambda body: body["messages"][-1]["content"].upper()
    lm = make(limits=LimitPolicy(max_concurrent=2))
    assert lm("the parent's") == ["THE PARENT'S"]
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["dspy_resilient", "litellm"])
    asked = [f"question {number}" for number in range(16)]
    with context.Pool(4 if method == "fork" else SPAWNED) as pool:
        answers = pool.map(lm, asked, chunksize=4)
    assert answers == [[each.upper()] for each in asked]
    keys = {each.headers["authorization"] for each in provider.requests[1:]}
    assert keys == {f"Bearer {os.environ['OPENAI_API_KEY']}"}
    assert lm.stats().attempts == 1
    assert lm("and again the parent's") == ["AND AGAIN THE PARENT'S"]


def in_child(work):
    """Run `work` in a forked child; return a function that waits and tells whether it succeeded."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_fork
def test_four_forked_children_use_the_client_while_its_parent_is_busy(make):
    """Whatever the parent has under way, holds and waits for does not exist there."""
    hold = Hold()
    with Provider("Paris", faults=[hold]) as provider, ThreadPoolExecutor(4) as pool:
        lm = make(api_base=provider.api_base, limits=1)
        calls = [pool.submit(lm, "same") for _ in range(2)]  # one leads, one follows
        provider.wait_for(1)
        calls += [pool.submit(lm, f"queued {number}") for number in range(2)]
        while lm.health().queued < 2:
            threading.Event().wait(0.001)

        def work():
            assert lm.health().in_flight == lm.health().queued == 0
            assert lm("same") == ["Paris"]
            assert asyncio.run(lm.acall("other")) == ["Paris"]
            lm.restart()
            return lm("a third") == ["Paris"]

        succeeded = [in_child(work) for _ in range(4)]
        assert all(each() for each in succeeded)
        hold.release()
        assert [each.result(20) for each in calls] == [["Paris"]] * 4
    assert lm.health().in_flight == 0
    assert lm.stats().restarts == 0


@needs_fork
def test_named_clients_work_in_a_forked_child(provider):
    """It closes its own, and the parent's go on."""
    with Clients(grace=1) as clients:
        options = {"api_base": provider.api_base, "api_key": "k", "cache": False}
        clients.start("fast", "openai/test", **options)
        assert clients.request("fast", "hello") == ["Paris"]

        def work():
            clients.start("other", "openai/test", **options)
            answers = [clients.request(name, "hello") for name in clients]
            clients.close()
            return answers == [["Paris"]] * 2

        assert in_child(work)()
        assert list(clients) == ["fast"]
        assert clients.request("fast", "hello") == ["Paris"]
