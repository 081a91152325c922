"""Pooled clients: one per configuration, loop and kind, closed when nobody holds it any more."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import litellm
import openai
import pytest

from dspy_resilient.providers import HttpClients, async_client, client
from dspy_resilient.providers import http_close as closing
from dspy_resilient.testing import Hold

BASE = "http://127.0.0.1:1/v1"
QUESTION = [{"role": "user", "content": "?"}]


def pooled(**changes):
    """Return the client of a configuration that differs from the usual one by `changes`."""
    return client(
        changes.pop("provider", "openai"), **{"api_key": "key", "api_base": BASE, **changes}
    )


def test_the_same_configuration_gives_the_same_client():
    """The order and case of headers do not matter, nor which of two equal timeouts it is."""
    one = pooled(headers={"X-One": "1", "x-two": "2"}, timeout=httpx.Timeout(30, connect=5))
    assert one is pooled(headers={"X-Two": "2", "x-one": "1"}, timeout=httpx.Timeout(30, connect=5))


DIFFERENCES = [
    {"provider": "groq"},
    {"api_key": "another"},
    {"api_base": "http://127.0.0.1:2/v1"},
    {"timeout": 30},
    {"timeout": 30.0},
    {"timeout": httpx.Timeout(30)},
    {"timeout": httpx.Timeout(30, connect=5)},
    {"headers": {"X": "1"}},
    {"headers": {"X": "2"}},
    {"headers": {"Y": "1"}},
    {"organization": "o"},
    {"project": "o"},
]


def test_any_difference_gives_another_client():
    """30 and 30.0 differ, too."""
    clients = [pooled(), *(pooled(**changes) for changes in DIFFERENCES)]
    assert len({id(each) for each in clients}) == len(clients)


@pytest.mark.parametrize("provider", ["openai", "groq", "cerebras", "hosted_vllm", "together_ai"])
def test_whoever_speaks_openais_language_gets_its_sdk(provider):
    """With key and address, and without retries."""
    made = pooled(provider=provider)
    assert isinstance(made, openai.OpenAI)
    assert (made.api_key, str(made.base_url), made.max_retries) == ("key", f"{BASE}/", 0)


def test_azure_gets_its_own():
    """Azure's addresses are made in another way."""
    made = pooled(provider="azure", api_version="2024-10-21")
    assert isinstance(made, openai.AzureOpenAI)


@pytest.mark.parametrize("provider", ["anthropic", "gemini", "ollama"])
def test_others_get_what_litellm_sends_through(provider):
    """LiteLLM's own handler, with the headers that are wanted."""
    made = pooled(provider=provider, headers={"X": "1"}, timeout=7)
    assert isinstance(made, litellm.llms.custom_httpx.http_handler.HTTPHandler)
    assert made.client.headers["x"] == "1"
    assert made.client.timeout == httpx.Timeout(7)


def test_key_and_address_come_from_where_litellm_finds_them(monkeypatch):
    """The environment, for one; who changes it gets another client."""
    monkeypatch.setenv("GROQ_API_KEY", "from-env")
    first = client("groq")
    assert (first.api_key, str(first.base_url)) == ("from-env", "https://api.groq.com/openai/v1/")
    assert client("groq", api_key="from-env") is first
    monkeypatch.setenv("GROQ_API_KEY", "changed")
    assert client("groq") is not first


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"provider": "nonsense"}, "provider must be one that LiteLLM knows; got 'nonsense'"),
        ({"provider": "openrouter", "api_base": None}, "api_base is missing for 'openrouter'"),
        ({"provider": "cerebras", "api_key": None}, "api_key is missing for 'cerebras'"),
        ({"provider": "anthropic", "organization": "o"}, "organization means nothing to"),
        ({"provider": "azure"}, "azure needs it"),
        ({"api_version": "2024-10-21"}, "api_version belongs to azure"),
        ({"timeout": object()}, "timeout cannot be compared by value; got object"),
        ({"retries": 3}, "takes no 'retries'; it takes api_key, api_base"),
    ],
)
def test_bad_configurations_are_refused(monkeypatch, wrong, error):
    """By name of the setting; a key never goes to an address that nobody chose."""
    monkeypatch.delenv("CEREBRAS_API_KEY", raising=False)
    with pytest.raises((TypeError, ValueError), match=error) as caught:
        pooled(**{"api_key": "my-secret", **wrong})
    assert "my-secret" not in str(caught.value)


def test_nobody_holding_a_client_closes_it():
    """The pool itself holds none."""
    made = pooled()
    http, gone = closing.http_client_of(made), weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
    assert http.is_closed


def test_a_request_under_way_holds_its_client(provider):
    """Nothing is closed under it, though its caller has let go."""
    hold = Hold()
    provider.script(hold)
    with ThreadPoolExecutor(1) as threads:
        settings = {"api_base": provider.api_base, "api_key": "key"}
        ask = client("openai", **settings).chat.completions.create
        answer = threads.submit(ask, model="test", messages=QUESTION)
        del ask
        provider.wait_for(1)
        gc.collect()
        hold.release()
        assert answer.result(30).choices[0].message.content == "Paris"


def test_a_call_that_outlives_its_client_leaves_no_connection(provider):
    """One that was let in before the end, and connects only after it, holds its connection alone."""
    keywords = {"api_base": provider.api_base, "api_key": "key"}
    holder = HttpClients()
    found = holder.find(None, "openai/m", "chat", keywords, keywords)
    assert holder.held() == [found]
    holder.close()
    found = holder.find(None, "openai/m", "chat", keywords, keywords)
    found.client.chat.completions.create(model="m", messages=QUESTION)
    assert holder.held() == []
    http = weakref.ref(closing.http_client_of(found.client))
    del found
    gc.collect()
    assert http() is None or http().is_closed


def test_a_closed_client_is_replaced():
    """By whomever it was closed."""
    first = pooled()
    first.close()
    second = pooled()
    assert second is not first
    assert not second.is_closed()


def test_racing_threads_get_one_client():
    """And what the slower ones have made is closed."""
    start = threading.Barrier(16)

    def get(_):
        start.wait()
        return pooled(api_key="raced")

    with ThreadPoolExecutor(16) as threads:
        assert len({id(each) for each in list(threads.map(get, range(16)))}) == 1
    gc.collect()


def test_each_loop_has_its_own_async_client(provider):
    """Closed when the loop ends, also for who goes on holding it."""

    async def get():
        settings = {"api_base": provider.api_base, "api_key": "key"}
        made = async_client("openai", **settings)
        assert made is async_client("openai", **settings)
        await made.chat.completions.create(model="test", messages=QUESTION)
        return made

    first, second = asyncio.run(get()), asyncio.run(get())
    assert first is not second
    assert first.is_closed()
    assert second.is_closed()
    with pytest.raises(RuntimeError, match="no running event loop"):
        async_client("openai", api_key="key")


async def test_nobody_holding_an_async_client_closes_it(provider):
    """On its loop, wherever the collector happens to run."""
    made = async_client("openai", api_base=provider.api_base, api_key="key")
    await made.chat.completions.create(model="test", messages=QUESTION)
    http = closing.http_client_of(made)
    del made
    await asyncio.to_thread(gc.collect)
    for _ in range(100):
        if http.is_closed:
            break
        await asyncio.sleep(0.01)
    assert http.is_closed


def test_litellm_sends_through_a_pooled_client(provider):
    """Whatever the timeout: plain LiteLLM opens a connection for each."""
    lent = client("openai", api_base=provider.api_base, api_key="key")
    for timeout in (11.5, 12.5, 13.5):
        answer = litellm.completion(
            "openai/test", QUESTION, client=lent, timeout=timeout, num_retries=0
        )
        assert answer.choices[0].message.content == "Paris"
    assert provider.connections == 1


def test_a_session_of_the_users_stays_open(monkeypatch):
    """What LiteLLM was told to send everything through is not ours to close."""
    with httpx.Client() as session:
        monkeypatch.setattr(litellm, "client_session", session)
        pooled(api_key="through-a-session")
        gc.collect()
        assert not session.is_closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_clients_of_its_own(provider):
    """And letting go of the parent's closes nothing of the parent's."""
    settings = {"api_base": provider.api_base, "api_key": "key"}
    ours = client("openai", **settings)
    ours.chat.completions.create(model="test", messages=QUESTION)
    child = os.fork()
    if child == 0:
        theirs = client("openai", **settings)
        is_new, http = theirs is not ours, closing.http_client_of(ours)
        del ours
        gc.collect()
        os._exit(0 if is_new and not http.is_closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client("openai", **settings) is ours
    ours.chat.completions.create(model="test", messages=QUESTION)
    assert provider.connections == 1


@pytest.mark.timeout(100)
def test_clients_still_held_are_closed_at_exit():
    """Without a warning, sync and async."""
    script = """if True:
        import asyncio
        from dspy_resilient.providers import async_client, client
        from dspy_resilient.testing import Provider
        kept = []
        with Provider("Paris") as provider:
            settings = {"api_base": provider.api_base, "api_key": "key"}
            asked = {"model": "x", "messages": []}
            kept.append(client("openai", **settings))
            kept[0].chat.completions.create(**asked)
            loop = asyncio.new_event_loop()
            async def ask():
                kept.append(async_client("openai", **settings))
                await kept[1].chat.completions.create(**asked)
            loop.run_until_complete(ask())
            loop.close()
        print("done")
    """
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
