"""HTTP clients of the pool against a naive model: who holds which, and what is closed."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from dspy_resilient import providers
from dspy_resilient.providers.pool import HttpClients, Pool, pool

KEYS = st.sampled_from("abc")


class Client:
    """What an SDK's client is to us: something that sends through an HTTP client."""

    def __init__(self, is_async=False):
        self._client = (httpx.AsyncClient if is_async else httpx.Client)(verify=False)


class PoolModel(RuleBasedStateMachine):
    """Get, hold, let go, retire, close, fail to make, and end a loop, in any order."""

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
        assert not client.is_broken
        before = self.held.get((where, key))
        if before is not None and not before.is_broken:
            assert client is before
        assert client not in [c for place, c in self.held.items() if place != (where, key)]
        self.held[where, key] = client

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def stop_holding(self, data):
        place = data.draw(st.sampled_from(sorted(self.held)))
        self.let_go.append(self.held.pop(place)._http)
        self.turn()

    @rule(where=st.sampled_from(["sync", "one", "two"]), key=KEYS)
    def fail_to_make(self, where, key):
        """What is not made is kept nowhere: the next caller tries again."""
        before = self.held.get((where, key))
        with contextlib.suppress(ZeroDivisionError):
            assert self.pool.get(self.loops[where], key, lambda: 1 / 0) is before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retire(self, data):
        """Who has a retired client goes on using it; the next caller gets another."""
        place = data.draw(st.sampled_from(sorted(self.held)))
        client = self.held[place]
        self.pool.retire([client])
        assert client._http.is_closed is client.is_broken
        loop = self.loops[place[0]]
        new = self.pool.get(loop, place[1], lambda: Client(is_async=loop is not None))
        assert new is not client
        self.let_go.append(client._http)
        self.held[place] = new
        del client
        self.turn()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data):
        where, key = data.draw(st.sampled_from(sorted(self.held)))
        http = self.held[where, key]._http
        loop = self.loops[where]
        http.close() if loop is None else loop.run_until_complete(http.aclose())

    @rule(where=st.sampled_from(["one", "two"]))
    def end_loop(self, where):
        loop = self.loops[where]
        self.let_go += [c._http for (place, _), c in self.held.items() if place == where]
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


class HolderModel(RuleBasedStateMachine):
    """Two clients of ours and their calls: find, begin, end, renew, prune, and end the loop.

    Their configurations are the same, so that they share connections as long as nobody renews them.
    """

    def __init__(self):
        super().__init__()
        providers.load()
        self.loop = asyncio.new_event_loop()
        self.holders = (HttpClients(), HttpClients())
        self.calls = []  # what each call under way sends through
        self.made = {}  # HTTP clients, and whether they are a loop's

    @rule(owner=st.sampled_from([0, 1]), key=KEYS, is_async=st.booleans())
    def begin(self, owner, key, is_async):
        keywords = {"api_key": key, "api_base": "http://127.0.0.1:1/v1"}
        loop = self.loop if is_async else None

        async def find():
            return self.holders[owner].find(loop, "openai/m", "chat", keywords, keywords)

        if is_async:
            client = self.loop.run_until_complete(find())
        else:
            client = self.holders[owner].find(None, "openai/m", "chat", keywords, keywords)
        assert not client.is_broken
        assert client.is_of(loop)
        self.made[client._http] = is_async
        self.calls.append(client)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def end(self, data):
        self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        self.turn()

    @rule(owner=st.sampled_from([0, 1]))
    def renew(self, owner):
        before = list(self.holders[owner]._held.values())
        self.holders[owner].renew()
        assert not [each for each in before if each in pool._clients.values()]
        del before
        self.turn()

    @rule()
    def prune(self):
        for each in self.holders:
            each.let_go(lambda client: client.used_at <= 1e18)
        self.turn()

    @rule()
    def end_loop(self):
        self.calls = [each for each in self.calls if not each.is_of(self.loop)]
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.loop = asyncio.new_event_loop()

    @invariant()
    def nothing_is_closed_under_a_call(self):
        assert not any(each.is_broken for each in self.calls)

    @invariant()
    def what_has_no_holder_is_closed(self):
        held = {each._http for holder in self.holders for each in holder._held.values()}
        held |= {each._http for each in self.calls}
        assert all(http.is_closed for http in self.made if http not in held)

    def turn(self):
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def teardown(self):
        self.calls.clear()
        for each in self.holders:
            each.close()
        self.turn()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


TestPool = PoolModel.TestCase
TestHolders = HolderModel.TestCase
