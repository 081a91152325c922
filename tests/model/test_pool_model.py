"""Provider clients against two naive models: the pool's, and LiteLLM's under our leases."""

from __future__ import annotations

import asyncio
import contextvars
import itertools

import httpx
import litellm
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from dspy_resilient import providers
from dspy_resilient.providers import Connections, cached
from dspy_resilient.providers.pool import Pool

KEYS = st.sampled_from("abc")


class Client:
    """What an SDK's client is to us: something that sends through an HTTP client."""

    def __init__(self, is_async=False):
        self._client = (httpx.AsyncClient if is_async else httpx.Client)(verify=False)


class PoolModel(RuleBasedStateMachine):
    """Get, hold, let go, close, and end a loop, in any order."""

    def __init__(self):
        super().__init__()
        self.pool = Pool()
        self.loops = {
            "sync": None,
            "one": asyncio.new_event_loop(),
            "two": asyncio.new_event_loop(),
        }
        self.held = {}  # (loop, key) -> the client that has holders
        self.let_go = []  # HTTP clients that nobody holds

    @rule(where=st.sampled_from(["sync", "one", "two"]), key=KEYS)
    def get(self, where, key):
        loop = self.loops[where]
        client = self.pool.get(loop, key, lambda: Client(is_async=loop is not None))
        assert not client._client.is_closed
        before = self.held.get((where, key))
        if before is not None and not before._client.is_closed:
            assert client is before
        assert client not in [c for place, c in self.held.items() if place != (where, key)]
        self.held[where, key] = client

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def stop_holding(self, data):
        place = data.draw(st.sampled_from(sorted(self.held)))
        self.let_go.append(self.held.pop(place)._client)
        self.turn()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data):
        where, key = data.draw(st.sampled_from(sorted(self.held)))
        http = self.held[where, key]._client
        loop = self.loops[where]
        http.close() if loop is None else loop.run_until_complete(http.aclose())

    @rule(where=st.sampled_from(["one", "two"]))
    def end_loop(self, where):
        loop = self.loops[where]
        self.let_go += [c._client for (place, _), c in self.held.items() if place == where]
        self.held = {place: c for place, c in self.held.items() if place[0] != where}
        self.turn()
        loop.close()
        self.loops[where] = asyncio.new_event_loop()

    @invariant()
    def what_nobody_holds_is_closed(self):
        assert all(http.is_closed for http in self.let_go)

    def turn(self):
        """Let the loops do what they have been asked to."""
        for loop in self.loops.values():
            if loop is not None:
                loop.run_until_complete(asyncio.sleep(0))
                loop.run_until_complete(asyncio.sleep(0))

    def teardown(self):
        self.held.clear()
        self.turn()
        for loop in self.loops.values():
            if loop is not None:
                loop.close()


class LeaseModel(RuleBasedStateMachine):
    """Attempts of two clients, and others, look up LiteLLM's clients while these are renewed.

    Whoever sends a request holds the client, as an SDK's own call does.
    """

    numbers = itertools.count()

    def __init__(self):
        super().__init__()
        providers.load()
        self.cache = litellm.in_memory_llm_clients_cache
        self.prefix = f"model {next(self.numbers)} "
        self.owners = (Connections(), Connections())
        self.known = (set(), set())  # HTTP clients that the attempts of each owner have used
        self.attempts = []  # (use, its context, its owner's number, clients it holds)
        self.elsewhere = []  # clients that requests of others hold
        self.retired = set()
        self.made = set()

    def look_up(self, key):
        """Do as LiteLLM does: take the client from the cache, or make it."""
        key = self.prefix + key
        client = self.cache.get_cache(key)
        if client is None:
            client = Client()
            self.made.add(client._client)
            self.cache.set_cache(key, client, litellm_owned_client=True, ttl=3600)
        assert not client._client.is_closed
        assert client._client not in self.retired
        return client

    @rule(owner=st.sampled_from([0, 1]))
    def begin(self, owner):
        context = contextvars.copy_context()
        self.attempts.append((context.run(self.owners[owner].use), context, owner, []))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), key=KEYS)
    def look_up_in_an_attempt(self, data, key):
        at = data.draw(st.integers(0, len(self.attempts) - 1))
        _, context, owner, clients = self.attempts[at]
        clients.append(context.run(self.look_up, key))
        self.known[owner].add(clients[-1]._client)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def end(self, data):
        at = data.draw(st.integers(0, len(self.attempts) - 1))
        use, context, _, _ = self.attempts.pop(at)
        context.run(use.end)

    @rule(key=KEYS)
    def begin_elsewhere(self, key):
        self.elsewhere.append(self.look_up(key))

    @precondition(lambda self: self.elsewhere)
    @rule()
    def end_elsewhere(self):
        self.elsewhere.pop()

    @rule(owner=st.sampled_from([0, 1]))
    def renew(self, owner):
        self.owners[owner].renew()
        self.retired |= self.known[owner]
        self.known[owner].clear()

    @rule(key=KEYS)
    def expire(self, key):
        cached.forget(self.prefix + key)

    @invariant()
    def nothing_is_closed_under_a_request(self):
        held = [client for *_, clients in self.attempts for client in clients]
        assert not any(client._client.is_closed for client in [*held, *self.elsewhere])

    @invariant()
    def what_litellm_hands_out_is_open_and_not_retired(self):
        handed_out = self.cached()
        assert not any(http.is_closed for http in handed_out)
        assert not handed_out & self.retired

    @invariant()
    def all_others_are_closed(self):
        held = {client._client for *_, clients in self.attempts for client in clients}
        held |= {client._client for client in self.elsewhere}
        assert all(http.is_closed for http in self.made - held - self.cached())

    def cached(self):
        entries = cached.entries()
        return {client._client for key, client in entries if key.startswith(self.prefix)}

    def teardown(self):
        for use, context, *_ in self.attempts:
            context.run(use.end)
        for key, _ in cached.entries():
            if key.startswith(self.prefix):
                cached.forget(key)


TestPool = PoolModel.TestCase
TestLeases = LeaseModel.TestCase
