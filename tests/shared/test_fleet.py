"""Many processes on a real server: one outage, one opening, one probe, one recovery."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from dspy_resilient import CircuitOpenError, CircuitPolicy, ResilientLM
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.testing import Hold, Status

PROCESSES = int(os.environ.get("FLEET_PROCESSES", "8"))
CALLERS = 8
POLICY = CircuitPolicy(failure_threshold=5, recovery_time=5, max_recovery_time=5, jitter=0)
ONCE = {"num_retries": 0, "cache": False, "max_wait": 0, "api_key": "dummy-key-for-tests"}
forked = multiprocessing.get_context("fork")


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def worker(mode, api_base, url, answered, stop):
    """Call all the time, as a worker of a service would; count the answers."""
    lm = ResilientLM("openai/test", name="shared_state", circuit=POLICY, shared=url,
                     api_base=api_base, **ONCE)  # fmt: skip

    def call():
        while not stop.is_set():
            try:
                lm("q")
                answered.value += 1
            except CircuitOpenError:
                time.sleep(0.1)
            except Exception:
                pass

    async def acall():
        while not stop.is_set():
            try:
                await lm.acall("q")
                answered.value += 1
            except CircuitOpenError:
                await asyncio.sleep(0.1)
            except Exception:
                pass

    async def crowd():
        await asyncio.gather(*(acall() for _ in range(CALLERS)))

    if mode == "async":
        asyncio.run(crowd())
    else:
        threads = [threading.Thread(target=call) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    os._exit(0)


@contextmanager
def shared_state(mode, api_base, url):
    """Run the workers; yields what each has answered so far, as shared numbers."""
    stop = forked.Event()
    answered = [forked.Value("i", 0, lock=False) for _ in range(PROCESSES)]
    workers = [
        forked.Process(target=worker, args=(mode, api_base, url, each, stop)) for each in answered
    ]
    for each in workers:
        each.start()
    try:
        yield answered
    finally:
        stop.set()
        for each in workers:
            each.join(10)
            each.kill()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_outage_costs_the_threshold_and_what_was_under_way(provider, valkey, patient, mode):
    """However many processes: threshold + in flight at the opening, one probe, all recover.

    When the provider fails, everybody has a request under way. So what reaches it after that, until
    everybody knows, comes from those of whom the threshold has been counted; and from a thread or
    two of a process whose failure LiteLLM's own thread is still reporting. (Circuits of their own
    would let the threshold pass in each process: twice as many.)
    """
    crowd = PROCESSES * CALLERS  # of whom a few may be held before `count` is read
    down, gate = Hold(then=Status(500)), Hold()
    with shared_state(mode, provider.api_base, valkey.url) as answered, released(down, gate):
        until(lambda: all(each.value > 0 for each in answered), 60)
        provider.always(down)
        count = provider.count
        until(lambda: provider.count >= count + crowd - CALLERS)
        before = settled(provider)  # and whatever was answered until now has been told
        provider.always(Status(500))
        down.release()
        until_open(valkey)
        provider.always(gate)  # from the opening on, every request stays there to be counted
        time.sleep(3.5)  # for those who were let go before they could know
        opened = provider.count
        assert opened - before <= POLICY.failure_threshold + 2 * PROCESSES
        until(lambda: provider.count > opened)
        time.sleep(1.0)
        assert provider.count - opened == 1
        marks = [each.value for each in answered]
        gate.release()
        until(lambda: all(e.value > m for e, m in zip(answered, marks, strict=True)), 60)


@contextmanager
def released(*gates):
    try:
        yield
    finally:
        for each in gates:
            each.release()


def settled(provider):
    """Wait until no more requests come; return how many have."""
    seen = -1
    while seen != provider.count:
        seen = provider.count
        time.sleep(0.7)
    return seen


def until_open(valkey):
    """Wait until the store has the circuit open."""
    client = valkey.client()
    try:
        until(lambda: any(b"\xa4open" in client.get(key) for key in client.keys("*circuit")))
    finally:
        client.close()


def worker_that_probes(api_base, url):
    lm = ResilientLM("openai/test", name="shared_state", circuit=FRAGILE, shared=url,
                     api_base=api_base, **ONCE)  # fmt: skip
    while True:
        try:
            lm("q")
        except CircuitOpenError:
            time.sleep(0.02)


FRAGILE = CircuitPolicy(failure_threshold=1, recovery_time=0.5, backoff=1, jitter=0)


def test_a_process_that_is_killed_with_the_probe_holds_up_no_other(provider, valkey, patient, make):
    """After the next interval another process sends one."""
    lm = make(name="shared_state", circuit=FRAGILE, shared=valkey.url, **ONCE)
    lm("q")
    lm.circuit.trip()
    until(lambda: valkey.client().keys("*circuit"))
    gate = Hold()
    provider.always(gate)
    count = provider.count
    doomed = forked.Process(target=worker_that_probes, args=(provider.api_base, valkey.url))
    doomed.start()
    until(lambda: provider.count == count + 1)
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    provider.always(None)
    until(lambda: _answers(lm))
    assert provider.count == count + 2
    gate.release()


def _answers(lm):
    try:
        return lm("q") == ["Paris"]
    except CircuitOpenError:
        time.sleep(0.1)
        return False


def kill(server):
    server.kill()
    return server.start


def pause(server):
    server.pause()
    return server.resume


def wrong_type(server):
    client = server.client()
    for key in client.keys("*circuit"):
        client.delete(key)
        client.rpush(key, "rubbish")
    return lambda: (client.flushall(), client.close())


def full(server):
    client = server.client()
    client.config_set("maxmemory", "1")
    return lambda: (client.config_set("maxmemory", "0"), client.close())


@pytest.mark.parametrize("fault", [kill, pause, wrong_type, full])
def test_calls_go_on_without_the_store_and_find_it_again(provider, make, mortal, ask, fault):
    """Killed, stopped, full, or something else under our key: one event each way, no error."""
    server, told = mortal(), []
    lm = make(shared=server.url, on_event=told.append, circuit=FRAGILE, **ONCE)

    def heard(kind):
        ask(lm, "q")
        time.sleep(0.05)
        return any(isinstance(each, kind) for each in told)

    ask(lm, "q")
    until(lambda: server.client().keys("*circuit"))
    told.clear()
    mend = fault(server)
    until(lambda: heard(StoreLost))
    provider.script(Status(500))
    with pytest.raises(Exception, match="500"):
        ask(lm, "q")
    with pytest.raises(CircuitOpenError):  # the circuit of this process works meanwhile
        ask(lm, "q")
    mend()
    until(lambda: _answered(ask, lm) and any(isinstance(each, StoreFound) for each in told))
    changes = [type(each) for each in told if isinstance(each, (StoreLost, StoreFound))]
    assert changes == [StoreLost, StoreFound]


def _answered(ask, lm):
    time.sleep(0.05)
    try:
        return ask(lm, "q") == ["Paris"]
    except CircuitOpenError:
        return False


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xff", b"\x81\xa5state\xc0", b"x" * 10_000, b"\x93\x01\x02\x03"])  # fmt: skip
def test_rubbish_under_our_key_is_replaced(provider, make, valkey, patient, rubbish):
    """A hostile value runs nothing and fails no call; the circuit begins anew."""
    told = []
    lm = make(shared=valkey.url, on_event=told.append, **ONCE)
    client = valkey.client()
    lm("q")
    until(lambda: client.keys("*circuit"))
    (key,) = client.keys("*circuit")
    client.set(key, rubbish)
    time.sleep(0.3)
    assert lm("q") == ["Paris"]
    until(lambda: client.get(key) != rubbish)
    assert not [each for each in told if isinstance(each, StoreLost)]
    client.close()


def test_a_wrong_password_is_no_error_of_a_call(provider, make, mortal, ask):
    """One event says so, without the password."""
    server, told = mortal("--requirepass", "right-pw"), []
    url = server.url.replace("redis://", "valkey://:wrong-pw@")
    lm = make(shared=url, on_event=told.append, **ONCE)
    assert ask(lm, "q") == ["Paris"]
    until(lambda: any(isinstance(each, StoreLost) for each in told))
    assert "wrong-pw" not in repr(told)


def test_a_restarted_server_is_sent_the_script_again(provider, valkey, patient, make):
    """NOSCRIPT is not a fault."""
    told = []
    lm = make(shared=valkey.url, on_event=told.append, **ONCE)
    lm("q")
    client = valkey.client()
    client.script_flush()
    time.sleep(0.3)
    assert lm("q") == ["Paris"]
    until(lambda: client.script_exists(script_name())[0])
    assert not [each for each in told if isinstance(each, StoreLost)]
    client.close()


def script_name():
    from dspy_resilient.shared.redis_scripts import CIRCUIT

    return CIRCUIT.sha
