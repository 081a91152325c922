"""Clients in several places, and one circuit between them."""

from __future__ import annotations

import json
import pickle
import threading
import time
from contextlib import suppress

import dspy
import pytest

from dspy_resilient import CircuitBreaker, CircuitOpenError, CircuitPolicy, ResilientLM
from dspy_resilient.events import CircuitClosed, CircuitOpened, StoreFound, StoreLost
from dspy_resilient.shared import MemoryStore
from dspy_resilient.testing import Hold, Status

VIEW_AGE = 0.25  # the stated time
FRAGILE = CircuitPolicy(failure_threshold=3, recovery_time=0.3, jitter=0.0)
ONCE = {"num_retries": 0, "cache": False, "max_wait": 0}


def until(holds, seconds=10.0):
    """Wait for something that another thread or process will bring about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def fail(ask, lm, times=1):
    for _ in range(times):
        with pytest.raises(dspy.LMServerError):
            ask(lm, "q")


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


@pytest.fixture
def pair(make, shared, patient):
    """Two clients of one name, as two processes would have them, and what each has told."""

    def build(policy=FRAGILE, **options):
        told = [], []
        lms = [
            make(name="fast", circuit=policy, shared=shared, on_event=each.append,
                 **{**ONCE, **options})
            for each in told
        ]  # fmt: skip
        return *lms, *told

    return build


def kinds(events, *wanted):
    return [type(each) for each in list(events) if isinstance(each, wanted)]


def test_failures_of_all_clients_count_together(provider, pair, ask):
    """Two failures here and one there open the circuit of both; nobody is asked after that."""
    here, there, *_ = pair(CircuitPolicy(failure_threshold=3, recovery_time=30))
    provider.always(Status(500))
    fail(ask, here, 2)
    fail(ask, there)
    until(lambda: there.circuit.state == "open")  # the report is on its way
    for lm in (here, there):
        with pytest.raises(CircuitOpenError) as caught:
            ask(lm, "q")
        assert caught.value.reason == "failures"
    assert provider.count == 3


def test_a_success_anywhere_breaks_the_row(provider, pair, ask):
    """Only failures in a row open it; successes are told with the next word to the store."""
    here, there, *_ = pair()
    provider.script(Status(500), Status(500), None, Status(500), Status(500), None)
    fail(ask, here, 2)
    assert ask(here, "q") == ["Paris"]
    fail(ask, here)
    fail(ask, there)
    assert ask(there, "q") == ["Paris"]


def test_every_client_sees_a_transition_within_the_stated_time(provider, pair, ask):
    """One that makes calls all the time sees it with the first call after that time."""
    here, there, _, told = pair()
    ask(there, "q")
    here.circuit.force_open("maintenance")
    until(lambda: here.circuit._stamp)
    time.sleep(VIEW_AGE)
    with suppress(CircuitOpenError):
        ask(there, "q")  # does not wait for the store, but has it asked
    time.sleep(VIEW_AGE)
    with pytest.raises(CircuitOpenError) as caught:
        ask(there, "q")
    assert caught.value.reason == "maintenance"
    here.circuit.reset()
    until(lambda: _answered(ask, there))
    assert kinds(told, CircuitClosed)
    assert ask(there, "q") == ["Paris"]


def test_a_client_that_comes_later_finds_it_open(provider, make, shared, patient, ask):
    """A process that was restarted in an outage leaves the provider alone for what is left of it."""
    options = {"name": "fast", "circuit": CircuitPolicy(), "shared": shared, **ONCE}
    earlier = make(**options)
    earlier.circuit.trip("outage", retry_after=55)
    until(lambda: earlier.circuit._stamp)
    earlier.close()
    later = make(**options)
    with pytest.raises(CircuitOpenError) as caught:
        ask(later, "q")
    assert caught.value.reason == "outage"
    assert caught.value.retry_after == pytest.approx(55, abs=30)
    assert provider.count == 0


def _answered(ask, lm):
    time.sleep(VIEW_AGE)
    try:
        ask(lm, "q")
    except CircuitOpenError:
        return False
    return True


def test_one_probe_in_all_and_recovery_everywhere(provider, pair, ask):
    """While the one probe of all clients is under way, others are refused; two answers close it."""
    here, there, *told = pair(CircuitPolicy(failure_threshold=3, recovery_time=2, jitter=0))
    provider.always(Status(500))
    fail(ask, here, 3)
    until(lambda: here.circuit.state == "open")
    with pytest.raises(CircuitOpenError):
        ask(there, "q")
    time.sleep(2.1)
    gate = Hold()
    provider.script(gate)
    provider.always(None)
    probe = threading.Thread(target=ask, args=(here, "q"))
    probe.start()
    until(lambda: provider.count == 4)
    for lm in (here, there):
        with pytest.raises(CircuitOpenError):
            ask(lm, "q")
    gate.release()
    probe.join()
    assert provider.count == 4
    until(lambda: _answered(ask, there))
    until(lambda: _answered(ask, here))
    assert there.circuit.state == here.circuit.state == "closed"
    for each in told:
        assert kinds(each, CircuitOpened, CircuitClosed) == [CircuitOpened, CircuitClosed]


def test_a_waiting_call_hears_of_the_recovery(provider, pair, ask):
    """A call that waits for the circuit goes on though somebody else has closed it."""
    here, there, *_ = pair(max_wait=20)
    here.circuit.force_open("maintenance", seconds=15)
    time.sleep(2 * VIEW_AGE)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(there("q")))
    waiting.start()
    until(lambda: there.circuit.state == "forced_open" or answers)
    here.circuit.reset()
    waiting.join(12 * VIEW_AGE)
    assert answers == [["Paris"]]


def test_other_names_share_nothing(provider, make, shared, ask):
    """One namespace per client name."""
    one = make(name="one", circuit=FRAGILE, shared=shared, **ONCE)
    two = make(name="two", circuit=FRAGILE, shared=shared, **ONCE)
    one.circuit.force_open()
    time.sleep(2 * VIEW_AGE)
    assert ask(two, "q") == ["Paris"]


def test_namespaces_keep_environments_apart(provider, make, valkey, ask):
    """The same name on the same server, in staging and in production."""
    one = make(name="n", shared=valkey.url + "?namespace=prod", **ONCE)
    two = make(name="n", shared=valkey.url + "?namespace=staging", **ONCE)
    one.circuit.force_open()
    time.sleep(2 * VIEW_AGE)
    assert ask(two, "q") == ["Paris"]


def test_what_lies_in_the_store_expires_and_holds_no_secret(provider, make, valkey, ask):
    """Every key has a time to live; key, prompt, answer and address are nowhere in it."""
    lm = make(name="fa{st", shared=valkey.url, **ONCE)
    ask(lm, "a private prompt")
    provider.always(Status(500))
    fail(ask, lm)
    client = valkey.client()
    until(client.keys)
    for key in client.scan_iter():
        assert key.startswith(b"dspy_resilient:2:")
        assert key.count(b"{") == key.count(b"}") == 1
        assert 0 < client.ttl(key) <= 2 * 86_400
        everything = key + client.dump(key)
        for secret in (b"dummy-key", b"private", b"Paris", b"127.0.0.1"):
            assert secret not in everything
    client.close()


def test_closed_circuits_are_answered_from_the_local_view(provider, make, valkey, ask):
    """A hundred quick calls ask the store a handful of times, for circuit and gate each."""
    lm = make(shared=valkey.url, **ONCE)
    client = valkey.client()
    ask(lm, "q")
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    started = time.monotonic()
    for _ in range(50):
        ask(lm, "q")
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert asked <= 2 * (2 + (time.monotonic() - started) / (VIEW_AGE / 2))
    client.close()


@pytest.mark.parametrize(
    ("shared", "kind"),
    [
        ("http://x", ValueError),
        ("redis://h:secret-pw@host:notaport", ValueError),
        (7, TypeError),
        (["redis://x"], TypeError),
    ],
)
def test_what_makes_no_sense_is_refused_at_construction(shared, kind):
    """The message names the argument and never shows an address."""
    with pytest.raises(kind, match="shared") as caught:
        ResilientLM("openai/x", shared=shared)
    assert "secret-pw" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_asyncio_client_is_refused():
    """It belongs to one loop; the store has a thread of its own, which blocks none."""
    import redis.asyncio

    with pytest.raises(TypeError, match="without asyncio"):
        ResilientLM("openai/x", shared=redis.asyncio.Redis())


def test_a_circuit_of_ones_own_cannot_be_shared_too():
    """Two ways to share one circuit contradict each other."""
    with pytest.raises(ValueError, match="contradict"):
        ResilientLM("openai/x", circuit=CircuitBreaker(CircuitPolicy()), shared=MemoryStore())


def test_an_address_without_a_password_is_saved_and_one_with_is_not(valkey):
    """A password is a credential: neither state nor pickle nor repr holds it."""
    plain = ResilientLM("openai/x", shared=valkey.url)
    assert plain.dump_state()["resilient"]["shared"] == valkey.url
    assert pickle.loads(pickle.dumps(plain))._runtime.options.shared == valkey.url
    for address in (
        "redis://:s3cr3t-pw@h",
        "valkeys://u:s3cr3t-pw@h/1",
        "redis://h?password=s3cr3t-pw",
    ):
        lm = ResilientLM("openai/x", shared=address)
        with pytest.warns(UserWarning, match="shared"):
            saved = json.dumps(lm.dump_state())
        with pytest.warns(UserWarning, match="shared"):
            pickled = pickle.dumps(lm)
        shown = (
            repr(lm)
            + repr(lm._runtime.options)
            + repr(lm._runtime.shared_state._store)
            + lm.explain()
        )
        assert "s3cr3t-pw" not in saved + shown
        assert b"s3cr3t-pw" not in pickled
        with pytest.warns(UserWarning, match="ResilientLM: it shares nothing"):
            assert pickle.loads(pickled)._runtime.shared_state is None


def test_a_users_own_client_is_used_and_left_open(provider, make, valkey, ask):
    """Whoever constructs it closes it."""
    client = valkey.client()
    with make(shared=client, **ONCE) as lm:
        assert ask(lm, "q") == ["Paris"]
        until(lambda: client.keys("dspy_resilient:*"))
    assert client.ping()
    client.close()


@pytest.mark.parametrize("shared", ["redis"], indirect=True)
def test_an_emptied_store_takes_on_what_its_clients_know(provider, pair, ask, valkey):
    """FLUSHALL during an outage does not let a stampede through: the newest change counts."""
    here, there, *_ = pair(CircuitPolicy(failure_threshold=2, recovery_time=30))
    provider.always(Status(500))
    fail(ask, here, 2)
    until(lambda: here.circuit.state == "open")
    with pytest.raises(CircuitOpenError):
        ask(there, "q")
    client = valkey.client()
    client.flushall()
    client.close()
    for _ in range(4):
        time.sleep(VIEW_AGE)
        for lm in (here, there):
            with pytest.raises(CircuitOpenError):
                ask(lm, "q")
    assert provider.count == 2


def test_without_the_store_each_client_has_its_own_circuit(provider, make, mortal, ask):
    """The store is down from the start: calls go on, one event says so, and it heals by itself."""
    server, told = mortal(), []
    server.kill()
    lm = make(circuit=FRAGILE, shared=server.url, on_event=told.append, **ONCE)
    assert ask(lm, "q") == ["Paris"]
    provider.always(Status(500))
    fail(ask, lm, 3)
    with pytest.raises(CircuitOpenError):
        ask(lm, "q")
    server.start()
    provider.always(None)
    until(lambda: _answered(ask, lm) and kinds(told, StoreFound))
    assert kinds(told, StoreLost, StoreFound) == [StoreLost, StoreFound]
