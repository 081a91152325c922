"""Provider clients in use: who uses which, that they can be renewed, and none closed under a call."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import litellm
import openai
import pytest

from dspy_resilient.providers import Connections, cached
from dspy_resilient.providers import http_close as closing
from dspy_resilient.testing import Hold

KEY = "dummy-key-for-tests"


def clients(base):
    """Return the OpenAI clients that LiteLLM keeps for `base`."""
    kept = [
        each
        for _, each in cached.entries()
        if isinstance(each, (openai.OpenAI, openai.AsyncOpenAI))
    ]
    return [each for each in kept if str(each.base_url).startswith(base)]


def eventually(claim, seconds=10.0):
    """Wait until `claim()` is true."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(params=["chat", "text"])
def lm(request, make):
    """A client that keeps no answers, of each kind of call that goes through the OpenAI SDK."""
    return make(cache=False, model_type=request.param)


def test_calls_in_a_row_share_a_connection(lm, provider):
    """Text completions too, for which plain LiteLLM opens one each."""
    for _ in range(5):
        lm("?")
    assert provider.connections == 1

    async def calls():
        for _ in range(5):
            await lm.acall("?")

    asyncio.run(calls())
    assert provider.connections == 2


def test_a_renewed_client_opens_a_new_connection(lm, provider):
    """And closes the old one."""
    lm("?")
    (before,) = clients(provider.url)
    lm._runtime.connections.renew()
    assert before.is_closed()
    assert clients(provider.url) == []
    assert lm("?") == ["Paris"]
    assert provider.connections == 2


async def test_a_renewed_client_opens_a_new_connection_on_its_loop(lm, provider):
    """The same for async calls; the old one is closed on its own loop."""
    await lm.acall("?")
    (before,) = clients(provider.url)
    await asyncio.to_thread(lm._runtime.connections.renew)
    assert await lm.acall("?") == ["Paris"]
    assert provider.connections == 2
    assert before.is_closed()


def test_nothing_is_closed_under_a_call(lm, provider, ask):
    """A call that is under way when its client is renewed gets its answer."""
    hold = Hold()
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, lm, "held")
        provider.wait_for(1)
        lm._runtime.connections.renew()
        assert ask(lm, "free") == ["Paris"]
        hold.release()
        assert call.result(30) == ["Paris"]
    assert provider.connections == 2


def test_the_last_user_closes_a_retired_client(provider, make):
    """Not sooner, and not later either."""
    lm, hold = make(cache=False), Hold()
    lm("?")
    (client,) = clients(provider.url)
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lm, "held")
        provider.wait_for(2)
        lm._runtime.connections.renew()
        assert not client.is_closed()
        hold.release()
        call.result(30)
    assert client.is_closed()


def test_renewing_leaves_other_clients_alone(provider, make):
    """Another configuration's connections stay open."""
    ours, other = make(cache=False), make(cache=False, api_key="another-key")
    ours("?")
    other("?")
    ours._runtime.connections.renew()
    other("?")
    assert provider.connections == 2


def test_a_client_that_somebody_else_uses_is_left_to_them(provider, make):
    """A raw LiteLLM call may hold it without our knowing."""
    lm = make(cache=False, timeout=30)
    messages = [{"role": "user", "content": "?"}]
    settings = {"api_base": provider.api_base, "api_key": KEY, "timeout": 30, "max_retries": 0}
    lm("?")
    litellm.completion("openai/test", messages, num_retries=0, **settings)
    (client,) = clients(provider.url)
    lm._runtime.connections.renew()
    assert not client.is_closed()
    assert clients(provider.url) == []


def test_what_an_attempt_has_started_is_somebody_else_once_that_is_over(provider, make):
    """A task or a timer goes on in the attempt's context."""
    lm, contexts = make(cache=False, timeout=30), []
    messages = [{"role": "user", "content": "?"}]
    settings = {"api_base": provider.api_base, "api_key": KEY, "timeout": 30, "max_retries": 0}
    use = lm._runtime.connections.use()
    contexts.append(contextvars.copy_context())
    use.end()
    lm("?")
    contexts[0].run(litellm.completion, "openai/test", messages, num_retries=0, **settings)
    (client,) = clients(provider.url)
    lm._runtime.connections.renew()
    assert not client.is_closed()


def test_a_use_that_nobody_could_end_counts_no_more(provider, make):
    """Ctrl-C may strike before it ends, and leaves it in the thread's context."""
    lm = make(cache=False, timeout=30)
    messages = [{"role": "user", "content": "?"}]
    settings = {"api_base": provider.api_base, "api_key": KEY, "timeout": 30, "max_retries": 0}

    def interrupted():
        use = lm._runtime.connections.use()
        litellm.completion("openai/test", messages, num_retries=0, **settings)
        del use
        (client,) = clients(provider.url)
        lm._runtime.connections.renew()
        assert client.is_closed()
        litellm.completion("openai/test", messages, num_retries=0, **settings)
        (client,) = clients(provider.url)
        lm("?")
        lm._runtime.connections.renew()
        assert not client.is_closed()

    contextvars.copy_context().run(interrupted)


def test_what_litellm_drops_is_closed(provider, make):
    """An expired client goes with its last user, not under it."""
    lm, hold = make(cache=False), Hold()
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lm, "held")
        provider.wait_for(1)
        (client,) = clients(provider.url)
        http = closing.http_client_of(client)
        del client
        for key, each in cached.entries():
            if closing.http_client_of(each) is http:
                del each
                cached.forget(key)
        gc.collect()
        assert not http.is_closed
        hold.release()
        assert call.result(30) == ["Paris"]
    eventually(lambda: gc.collect() and http.is_closed)


def test_racing_threads_leave_nothing_to_the_collector(provider, make):
    """Each makes a client, one is kept, and the others are closed without a warning."""
    start = threading.Barrier(8)

    def call(lm):
        start.wait()
        return lm("?")

    lm = make(cache=False)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, [lm] * 8)) == [["Paris"]] * 8
    gc.collect()
    assert len(clients(provider.url)) == 1


def test_a_use_that_has_ended_counts_no_more():
    """Nor does one that ends twice."""
    connections = Connections()
    use = connections.use()
    use.end()
    use.end()
    connections.renew()
