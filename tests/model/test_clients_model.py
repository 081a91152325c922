"""A naive model beside `Clients`: whatever is started, replaced, stopped, broken and closed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dspy_resilient import ClientClosedError, Clients, HealthState
from dspy_resilient.testing import Hold, Provider

NAMES = st.sampled_from(["a", "b", "c"])
CONFIGURATIONS = st.sampled_from([0.1, 0.5, 0.9])


class ClientsModel(RuleBasedStateMachine):
    """Each name has at most one open client, of one configuration; calls belong to their client."""

    calls = Bundle("calls")

    def __init__(self):
        super().__init__()
        self.provider = Provider("Paris").start()
        self.pool = ThreadPoolExecutor(32)
        self.clients = Clients(grace=0)
        self.closed = False
        self.running = {}  # name: (configuration, client)
        self.usable = {}  # client: whether it takes calls
        self.restarts = {}
        self.ended = set()  # clients whose calls under way were ended
        self.holds = []

    def teardown(self):
        for hold in self.holds:
            hold.release()
        self.clients.close()
        self.pool.shutdown()
        self.provider.stop()

    def end(self, lm):
        """Note that a client takes no more calls, and that those under way were ended."""
        self.usable[lm] = False
        self.ended.add(lm)

    @rule(name=NAMES, temperature=CONFIGURATIONS, replace=st.booleans())
    def start(self, name, temperature, replace):
        def start():
            return self.clients.start(
                name,
                "openai/test",
                replace=replace,
                temperature=temperature,
                cache=False,
                api_base=self.provider.api_base,
                api_key="k",
            )

        if self.closed:
            with pytest.raises(ClientClosedError):
                start()
            return
        configuration, before = self.running.get(name, (None, None))
        is_open = before is not None and self.usable[before]
        if is_open and configuration != temperature and not replace:
            with pytest.raises(ValueError, match="with another temperature"):
                start()
            return
        lm = start()
        if is_open and configuration == temperature:
            assert lm is before
            return
        assert lm not in self.usable
        if before is not None:
            self.usable[before] = False
        self.running[name] = temperature, lm
        self.usable[lm], self.restarts[lm] = True, 0

    @rule(name=NAMES)
    def stop(self, name):
        if name not in self.running:
            with pytest.raises(KeyError):
                self.clients.stop(name)
            return
        self.clients.stop(name)
        self.end(self.running.pop(name)[1])

    @rule(name=NAMES)
    def close_one_by_hand(self, name):
        if name in self.running:
            lm = self.running[name][1]
            lm.close()
            self.usable[lm] = False

    @rule(name=NAMES)
    def restart(self, name):
        if name not in self.running:
            with pytest.raises(KeyError):
                self.clients.restart(name)
        elif not self.usable[self.running[name][1]]:
            with pytest.raises(ClientClosedError):
                self.clients.restart(name)
        else:
            self.clients.restart(name)
            self.restarts[self.running[name][1]] += 1

    @rule(name=NAMES)
    def request(self, name):
        if name not in self.running:
            with pytest.raises(KeyError):
                self.clients.request(name, "?")
        elif not self.usable[self.running[name][1]]:
            with pytest.raises(ClientClosedError):
                self.clients.request(name, "?")
        else:
            assert self.clients.request(name, "?") == ["Paris"]

    @rule(target=calls, name=NAMES)
    def begin(self, name):
        """Begin a call that the provider holds."""
        if name not in self.running or not self.usable[self.running[name][1]]:
            return None
        lm, hold, count = self.running[name][1], Hold(), self.provider.count
        self.holds.append(hold)
        self.provider.script(hold)
        call = self.pool.submit(lm, f"{len(self.holds)}")
        self.provider.wait_for(count + 1)
        return lm, hold, call

    @rule(begun=consumes(calls))
    def finish(self, begun):
        """Let the provider answer: the call has its answer, unless it was ended meanwhile."""
        if begun is None:
            return
        lm, hold, call = begun
        hold.release()
        if lm in self.ended:
            with pytest.raises(ClientClosedError):
                call.result(20)
        else:
            assert call.result(20) == ["Paris"]

    @rule(sure=st.integers(0, 9))
    def close(self, sure):
        """Close all, which is rare."""
        if sure:
            return
        self.clients.close()
        self.closed = True
        for _, lm in self.running.values():
            self.end(lm)
        self.running.clear()

    @invariant()
    def the_mapping_is_that_of_the_model(self):
        assert dict(self.clients) == {name: lm for name, (_, lm) in self.running.items()}

    @invariant()
    def who_takes_calls_is_as_in_the_model(self):
        for lm, usable in self.usable.items():
            assert (lm.health().state is not HealthState.CLOSED) == usable

    @invariant()
    def health_is_that_of_the_model(self):
        health = self.clients.health()
        assert list(health) == list(self.running)
        for name, (_, lm) in self.running.items():
            state = HealthState.READY if self.usable[lm] else HealthState.CLOSED
            assert (health[name].state, health[name].restarts) == (state, self.restarts[lm])


TestClientsModel = ClientsModel.TestCase
TestClientsModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
