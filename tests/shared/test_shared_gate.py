"""Clients in several places, and one pause after a 429 between them."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress

import dspy
import pytest

from dspy_resilient import ThrottledError
from dspy_resilient.events import StoreLost, Throttled
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.store import ThrottleReport
from dspy_resilient.testing import rate_limited

ONCE = {"num_retries": 0, "max_wait": 0, "cache": False, "name": "fast"}
VIEW_AGE = 0.25  # the stated time


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def gate_of(lm, **kwargs):
    return lm._runtime.routes.find(lm, kwargs).gate


def catch_up(lm, **kwargs):
    """Have `lm` hear what the store says, as it does in the background of its calls."""
    assert gate_of(lm, **kwargs).ask().result(20)


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


def throttle(provider, lm, ask, seconds, **kwargs):
    """Have `lm` meet a 429 and wait until the store has heard of it."""
    provider.script(rate_limited(seconds))
    with pytest.raises(dspy.LMRateLimitError):
        ask(lm, "q", **kwargs)
    until(lambda: gate_of(lm, **kwargs)._stamp)


@pytest.mark.parametrize("circuit", [True, False])
def test_a_429_here_holds_up_calls_there(provider, make, shared, patient, ask, circuit):
    """Nobody with the credential is sent before the pause is over; errors have all of it."""
    here, there = (make(shared=shared, circuit=circuit, **ONCE) for _ in range(2))
    throttle(provider, here, ask, 300)
    count = provider.count
    catch_up(there)
    with pytest.raises(ThrottledError) as caught:
        ask(there, "q")
    assert caught.value.retry_after == pytest.approx(300, abs=30)
    assert provider.count == count


def test_calls_there_go_on_when_the_pause_is_over(provider, make, shared, patient, ask):
    """It is a pause, not an error, for whoever has the time."""
    options = {**ONCE, "num_retries": 1, "max_wait": 30}
    here, there = (make(shared=shared, **options) for _ in range(2))
    provider.script(rate_limited(1.5))
    begun = time.monotonic()
    caller = threading.Thread(target=here, args=("q",))
    caller.start()
    until(lambda: gate_of(here)._stamp)
    catch_up(there)
    assert ask(there, "q") == ["Paris"]
    assert time.monotonic() - begun >= 1.5
    caller.join()


def test_a_client_that_is_busy_hears_of_it_within_the_stated_time(
    provider, make, shared, patient, ask
):
    """One that has just called, and knows of no 429, asks in the background of its next call."""
    told = []
    here = make(shared=shared, **ONCE)
    there = make(shared=shared, on_event=told.append, **ONCE)
    ask(there, "q")
    throttle(provider, here, ask, 300)
    time.sleep(2 * VIEW_AGE)
    with suppress(ThrottledError):  # no call waits to hear whether it may be sent
        ask(there, "q")
    until(lambda: gate_of(there).wait_time() > 0)
    with pytest.raises(ThrottledError):
        ask(there, "q")
    until(lambda: any(isinstance(each, Throttled) for each in told))


def test_another_credential_is_not_held_up(provider, make, valkey, patient, ask):
    """One tenant's quota never stops another, and the store learns no credential."""
    here, there = (make(shared=valkey.url, **ONCE) for _ in range(2))
    throttle(provider, here, ask, 300, api_key="key-of-one-tenant")
    assert ask(there, "q", api_key="key-of-another-tenant") == ["Paris"]
    catch_up(there, api_key="key-of-one-tenant")
    with pytest.raises(ThrottledError):
        ask(there, "q", api_key="key-of-one-tenant")
    client = valkey.client()
    kept = [(key, client.get(key)) for key in client.keys("*")]
    assert [key for key, _ in kept if b"throttle" in key]
    assert "tenant" not in repr(kept)
    assert all(0 < client.pttl(key) <= 2 * 86_400_000 for key, _ in kept)
    client.close()


def test_a_function_that_fetches_tokens_has_a_gate_of_its_own(make, shared):
    """Two of them cannot be told apart, so that they are not taken for one."""
    here, there = (make(shared=shared, **ONCE) for _ in range(2))
    gates = [gate_of(lm, api_key=lambda: "token") for lm in (here, there)]
    assert gates[0]._key != gates[1]._key
    assert gate_of(here)._key == gate_of(there)._key


def test_a_reset_is_not_undone_by_the_store(provider, make, shared, patient, ask):
    """Whoever opens the gate by hand goes on at once, and so does a client that comes later."""
    here = make(shared=shared, **ONCE)
    throttle(provider, here, ask, 300)
    before = gate_of(here)._stamp
    gate_of(here).reset()
    until(lambda: gate_of(here)._stamp != before)
    assert ask(here, "q") == ["Paris"]
    assert ask(make(shared=shared, **ONCE), "q") == ["Paris"]


def test_an_attempt_is_not_sent_when_the_answer_closes_the_gate(provider, make, store, ask):
    """A permit of the circuit that was given meanwhile is given back."""
    lm = make(shared=store, **ONCE)
    store.throttle(gate_of(lm)._key, ThrottleReport(seconds=60, hint=300))
    catch_up(lm)
    with pytest.raises(ThrottledError):
        ask(lm, "q")
    assert provider.count == 0
    assert lm.circuit.state == "closed"


def test_without_the_store_the_gate_is_this_process_s(provider, make, mortal, ask):
    """It closes and opens as ever, and is told when the store is back."""
    server, told = mortal(), []
    here = make(shared=server.url, on_event=told.append, **ONCE)
    ask(here, "q")
    server.kill()
    provider.script(rate_limited(300))
    with pytest.raises(dspy.LMRateLimitError):
        ask(here, "q")
    with pytest.raises(ThrottledError):
        ask(here, "q")
    until(lambda: any(isinstance(each, StoreLost) for each in told))
    server.start()
    there = make(shared=server.url, **ONCE)
    until(lambda: gate_of(here)._stamp)  # by itself: no call gets as far as asking
    catch_up(there)
    with pytest.raises(ThrottledError):
        ask(there, "q")


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xff", b"\x93\x01\x02\x03", b"\x81\xa6closed\xc0"])
def test_rubbish_under_our_key_is_replaced(store, valkey, rubbish):
    """A hostile value runs nothing; the gate begins anew."""
    client = valkey.client()
    client.set("{k}", rubbish)
    assert store.throttle("{k}", ThrottleReport()).seconds == 0
    assert store.throttle("{k}", ThrottleReport(seconds=5)).seconds == pytest.approx(5)
    client.close()


def test_the_script_decides_as_the_store_in_memory_does(store):
    """Several clients at once: each answer is the model's, asked in the server's order."""
    log, seed = [], random.randrange(2**32)
    print("seed", seed)

    def work(number):
        pick = random.Random(seed + number)
        for _ in range(100):
            report = ThrottleReport(
                seconds=pick.choice([0.0, 0.0, 0.002, 0.01]),
                hint=pick.choice([0.0, 0.0, 0.004, 0.02]),
                reset=pick.random() < 0.1,
            )
            view = store.throttle("{k}", report)
            log.append((view.at, report, view))
            if pick.random() < 0.3:
                time.sleep(pick.random() * 0.005)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.sort(key=lambda entry: entry[0])
    assert len({at for at, *_ in log}) == len(log) == 400
    now = 0.0
    model = MemoryStore(clock=lambda: now)
    for at, report, view in log:
        now = at
        expected = model.throttle("{k}", report)
        assert (view.stamp, view.longer) == (expected.stamp, expected.longer)
        assert view.seconds == pytest.approx(expected.seconds, abs=2e-6)
        assert view.hint == pytest.approx(expected.hint, abs=2e-6)
