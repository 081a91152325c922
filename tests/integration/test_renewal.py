"""HTTP clients in use: renewed, pruned and closed, and none under a call."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import litellm
import openai
import pytest

from dspy_resilient import ResilientLM, providers
from dspy_resilient.providers import make as making
from dspy_resilient.testing import Hold

KEY = "dummy-key-for-tests"


def held(lm):
    """Return what a client holds at present."""
    return list(lm._runtime.http_clients._held.values())


@pytest.fixture(params=["chat", "text", "responses"])
def lm(request, make):
    """A client that keeps no answers, of each kind of call."""
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
    (http,) = [each._http for each in held(lm)]
    lm._runtime.http_clients.renew()
    assert http.is_closed
    lm("?")
    assert provider.connections == 2


async def test_a_renewed_client_opens_a_new_connection_on_its_loop(lm, provider):
    """The same for async calls; the old one is closed on its own loop."""
    await lm.acall("?")
    (http,) = [each._http for each in held(lm)]
    await asyncio.to_thread(lm._runtime.http_clients.renew)
    await lm.acall("?")
    assert provider.connections == 2
    assert http.is_closed


def test_nothing_is_closed_under_a_call(lm, provider, ask):
    """A call that is under way when its client is renewed or closed gets its answer."""
    hold = Hold()
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, lm, "held")
        provider.wait_for(1)
        lm._runtime.http_clients.renew()
        ask(lm, "free")
        lm._runtime.http_clients.close()
        hold.release()
        assert "Paris" in str(call.result(30))
    assert provider.connections == 2


def test_the_last_call_closes_a_client_that_was_let_go_of(provider, make):
    """Not sooner, and not later either."""
    lm, hold = make(cache=False), Hold()
    lm("?")
    (http,) = [each._http for each in held(lm)]
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lm, "held")
        provider.wait_for(2)
        lm._runtime.http_clients.renew()
        assert not http.is_closed
        hold.release()
        call.result(30)
    assert http.is_closed


def test_renewing_leaves_other_clients_alone(provider, make):
    """Of the same configuration, too: they go on with what they have."""
    ours, same, other = make(cache=False), make(cache=False), make(cache=False, api_key="another")
    for each in (ours, same, other):
        each("?")
    assert provider.connections == 2
    ours._runtime.http_clients.renew()
    same("?")
    other("?")
    assert provider.connections == 2
    ours("?")
    assert provider.connections == 3


def test_a_hundred_clients_of_one_configuration_share_a_connection(provider, make):
    """And the one that `providers.client` returns."""
    lent = providers.client("openai", api_base=provider.api_base, api_key=KEY)
    lent.chat.completions.create(model="test", messages=[{"role": "user", "content": "?"}])
    for number in range(100):
        make(cache=False)(f"{number}?")
    assert provider.connections == 1


def test_racing_calls_make_one_client(provider, make, monkeypatch):
    """Of eight threads whose first call it is."""
    made, start = [], threading.Barrier(8)
    monkeypatch.setitem(
        making._KINDS,
        "openai",
        lambda *args, _make=making._KINDS["openai"]: made.append(1) or _make(*args),
    )

    def call(lm):
        start.wait()
        return lm("?")

    lm = make(cache=False)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, [lm] * 8)) == [["Paris"]] * 8
    assert made == [1]


def test_a_deadline_opens_no_connection(provider, make):
    """What is left of it is the request's own timeout, on the connection that there is."""
    lm = make(cache=False, deadline=20.0)
    for _ in range(3):
        assert lm("?") == ["Paris"]
    assert provider.connections == 1


@pytest.mark.parametrize("prefix", ["openai", "anthropic", "gemini"])
@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
def test_a_hung_thread_ends_with_the_deadline(provider, make, prefix, model_type):
    """Its request has a timeout, too, though the client has none."""
    if prefix != "openai" and model_type != "chat":
        pytest.skip("one provider shows it")
    hold = Hold()
    provider.always(hold)
    options = {"api_base": provider.base(prefix), "model_type": model_type, "deadline": 0.3}
    lm = make(f"{prefix}/test", cache=False, **options)
    with pytest.raises(Exception, match="deadline"):
        lm("?")
    for thread in threading.enumerate():
        if thread.name.startswith("attempt:"):
            thread.join(20)
            assert not thread.is_alive()
    hold.release()


def test_a_timeout_of_a_call_opens_no_connection(lm, provider):
    """Plain LiteLLM opens one for each."""
    for timeout in (11.0, 12.5, httpx.Timeout(13, connect=1)):
        lm("?", timeout=timeout)
    assert provider.connections == 1


def test_what_is_not_used_is_pruned(provider, make):
    """What is under way is not, and what a caller holds stays open."""
    lm, hold = make(cache=False), Hold()
    lent = providers.client("openai", api_base=provider.api_base, api_key="lent")
    lm("?")
    providers.prune(3600)
    (http,) = [each._http for each in held(lm)]
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lm, "held")
        provider.wait_for(2)
        providers.prune(0)
        assert held(lm) == []
        assert not http.is_closed
        hold.release()
        assert call.result(30) == ["Paris"]
    assert http.is_closed
    assert not lent.is_closed()
    assert lm("?") == ["Paris"]
    with pytest.raises(ValueError, match="unused_for"):
        providers.prune(-1)


def test_of_many_keys_the_least_recently_used_connections_go(provider, make):
    """A program with a key of its own for each user opens no more than so many."""
    lm = make(cache=False)
    for number in range(lm._runtime.http_clients._MOST + 3):
        lm("?", api_key=f"key-{number}")
    assert len(held(lm)) == lm._runtime.http_clients._MOST


def test_a_dropped_client_closes_its_connections(provider, make):
    """Without anybody's having to close it."""
    lm = ResilientLM("openai/test", api_base=provider.api_base, api_key=KEY, cache=False)
    lm("?")
    (http,) = [each._http for each in held(lm)]
    del lm
    gc.collect()
    assert http.is_closed


@pytest.mark.parametrize("keyword", ["client", "session"])
def test_what_the_user_brings_is_used_and_stays_open(provider, make, monkeypatch, keyword):
    """A client of the call's, or the session that LiteLLM is to send everything through."""
    with httpx.Client() as session:
        sent = []
        session.event_hooks["request"].append(sent.append)
        options = {}
        if keyword == "client":
            sdk = openai.OpenAI(api_key=KEY, base_url=provider.api_base, http_client=session)
            sdk.__class__ = type(
                "Lent", (openai.OpenAI,), {"__deepcopy__": lambda self, memo: self}
            )
            options["client"] = sdk
        else:
            monkeypatch.setattr(litellm, "client_session", session)
        lm = make(cache=False, **options)
        assert lm("?") == ["Paris"]
        assert len(sent) == 1
        lm.restart()
        assert lm("?") == ["Paris"]
        lm.close()
        assert len(sent) == 2
        assert not session.is_closed


def test_a_key_that_is_set_later_is_used(provider, make, monkeypatch):
    """LiteLLM looks for it with each request."""
    monkeypatch.setenv("OPENAI_API_KEY", "first")
    lm = make(cache=False, api_key=None)
    lm("?")
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    lm("?")
    assert [each.headers["authorization"] for each in provider.requests] == [
        "Bearer first",
        "Bearer second",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_closes_nothing_of_its_parents(provider, make):
    """Whatever it does with its copies of the clients."""
    lm = make(cache=False)
    lm("?")
    child = os.fork()
    if child == 0:
        lm.restart()
        lm.close()
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lm("?")
    assert provider.connections == 1
