"""What may happen to a store, with everything shared: calls go on, one event says so, it heals."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import dspy
import pytest
import redis

from dspy_resilient import CachePolicy, CircuitOpenError, CircuitPolicy, LimitPolicy, ResilientLM
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.link import Link
from dspy_resilient.testing import Status, rate_limited

PROCESSES = int(os.environ.get("FLEET_PROCESSES", "4"))
ALL = {
    "name": "fast",
    "num_retries": 0,
    "max_wait": 0,
    "circuit": CircuitPolicy(failure_threshold=2, recovery_time=30, jitter=0),
    "limits": LimitPolicy(rpm=60_000, tpm=60_000_000),
    "cache": CachePolicy(shared=True, disk=None),
}
forked = multiprocessing.get_context("fork")


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def links_of(lm):
    route = lm._runtime.routes.find(lm, {})
    return [*route.links, route.shared, route.limiter._rates, lm._runtime.cache.others]


def kinds(told, *wanted):
    return [type(each) for each in list(told) if isinstance(each, wanted)]


def kill(server, proxy):
    server.kill()
    return server.start


def pause(server, proxy):
    server.pause()
    return server.resume


def full(server, proxy):
    client = server.client()
    client.config_set("maxmemory", "1")  # with noeviction, its default
    return lambda: (client.config_set("maxmemory", "0"), client.close())


def wrong_types(server, proxy):
    client = server.client()
    for key in client.keys("*"):
        client.delete(key)
        client.rpush(key, "rubbish")
    return lambda: (client.flushall(), client.close())


def network(**settings):
    def fault(server, proxy):
        before = {name: getattr(proxy, name) for name in settings}
        vars(proxy).update(settings)
        return lambda: vars(proxy).update(before)

    return fault


FAULTS = {
    "killed": kill,
    "stopped": pause,
    "full": full,
    "wrong types": wrong_types,
    "swallowing network": network(doing="swallow"),
    "cutting network": network(doing="cut"),
    "babbling server": network(doing="babble"),
    "too slow": network(delay=1.5),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_calls_go_on_whatever_happens_to_the_store(provider, make, mortal, proxied, ask, fault):
    """Every call is answered, one event tells of it, one of its end, and everything is shared again."""
    server, told = mortal(), []
    proxy = proxied(server)
    lm = make(shared=proxy.url, on_event=told.append, **ALL)
    number = iter(range(10**9))

    def answered():
        return ask(lm, f"question {next(number)}") == ["Paris"]

    assert answered()
    client = server.client()
    until(lambda: len(client.keys("*")) >= 4)
    client.close()
    told.clear()
    mend = fault(server, proxy)
    until(lambda: answered() and kinds(told, StoreLost))
    for _ in range(5):
        assert answered()
    mend()
    until(lambda: answered() and kinds(told, StoreFound))
    until(lambda: answered() and not any(link.alone for link in links_of(lm)))
    if fault is not wrong_types:  # some of the keys hold what is no fault
        assert kinds(told, StoreLost, StoreFound) == [StoreLost, StoreFound]


@pytest.mark.parametrize("fault", ["killed", "swallowing network"])
def test_a_store_that_is_away_costs_calls_nothing_after_the_first(provider, make, mortal, proxied, ask, fault):  # fmt: skip
    """One waits its patience, four times at most; the tries after that are made by nobody's call."""
    server = mortal()
    proxy = proxied(server)
    lm = make(shared=proxy.url, **ALL)
    ask(lm, "first")
    FAULTS[fault](server, proxy)
    ask(lm, "second")
    started = time.monotonic()
    for number in range(20):
        assert ask(lm, f"{number}") == ["Paris"]
    assert time.monotonic() - started < 20 * 0.25


def test_a_store_at_some_distance_is_no_fault(provider, make, mortal, proxied):
    """All that a call has to ask fits into its patience with 80 ms there and back, once connected."""
    server, told = mortal(), []
    proxy = proxied(server)
    lm = make(shared=proxy.url, on_event=told.append, **ALL)
    proxy.delay = 0.08
    until(lambda: lm(f"{time.monotonic()}") and not any(link.alone for link in links_of(lm)))
    until(lambda: has_peace(told))
    for number in range(4):
        assert lm(f"{number}") == ["Paris"]
        time.sleep(0.3)
    assert not kinds(told, StoreLost)


def has_peace(told):
    """Whether nothing has been told for a while."""
    told.clear()
    time.sleep(0.5)
    return not told


class Stuck(MemoryStore):
    """A user's own store, which hangs when the test says so."""

    def __init__(self):
        super().__init__()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def together(self, verbs):
        self.goes_on.wait()
        return super().together(verbs)


def test_an_attempt_waits_for_the_store_once_whatever_it_has_to_ask(provider, make, monkeypatch):
    """Rates first, then circuit and gate: all have been asked when the first wait begins."""
    monkeypatch.setattr(Link, "patience", 3.0)
    store = Stuck()
    lm = make(shared=store, **{**ALL, "cache": False})
    lm("first")
    time.sleep(0.3)  # what is known is old
    store.goes_on.clear()
    started = time.monotonic()
    assert lm("q") == ["Paris"]
    assert 2.9 < time.monotonic() - started < 6
    store.goes_on.set()


def test_an_emptied_store_changes_nothing(provider, make, valkey, patient, ask):
    """FLUSHALL amid calls: no error, no event, an open circuit stays open."""
    told = []
    lm = make(shared=valkey.url, on_event=told.append, **ALL)
    client = valkey.client()
    for number in range(6):
        assert ask(lm, f"{number}") == ["Paris"]
        client.flushall()
        time.sleep(0.1)
    lm.circuit.force_open("maintenance")
    until(lambda: client.keys("*circuit"))
    client.flushall()
    time.sleep(0.3)
    with pytest.raises(CircuitOpenError):
        ask(lm, "refused")
    assert not kinds(told, StoreLost)
    client.close()


def test_a_replica_that_takes_over_knows_what_was_decided(provider, make, mortal, proxied):
    """The primary is lost during an outage: nobody stampedes, and its replica goes on."""
    primary, replica, told = mortal(), mortal(), []
    proxy = proxied(primary)
    here = make(shared=proxy.url, on_event=told.append, **ALL)
    promoted = replica.client()
    promoted.replicaof("127.0.0.1", primary.port)
    until(lambda: promoted.info("replication")["master_link_status"] == "up")
    assert here("paid for") == ["Paris"]
    provider.always(Status(500))
    for number in range(2):
        with pytest.raises(dspy.LMServerError):
            here(f"{number}")
    until(
        lambda: any(b"\xa4open" in (promoted.get(key) or b"") for key in promoted.keys("*circuit"))
    )
    until(lambda: promoted.keys("*:cache:*"))
    primary.kill()
    promoted.replicaof("NO", "ONE")
    proxy.port = replica.port
    count = provider.count
    there = make(shared=proxy.url, **ALL)
    until(lambda: _refused(call, here) and _refused(call, there) and not any(
        link.alone for link in links_of(here)[:2]))  # fmt: skip
    assert provider.count <= count + 1, "who came new has asked once at most, before it knew"
    assert there("paid for") == ["Paris"]
    until(lambda: _refused(call, here) and not any(link.alone for link in links_of(here)))
    changes = kinds(told, StoreLost, StoreFound)  # once for each connection that was to the primary
    assert changes in ([StoreLost, StoreFound], [StoreLost, StoreFound] * 2)
    promoted.close()


def call(lm, prompt):
    return lm(prompt)


def _refused(ask, lm):
    time.sleep(0.05)
    try:
        ask(lm, f"{time.monotonic()}")
    except CircuitOpenError:
        return True
    except dspy.LMServerError:
        return False
    return False


def test_a_cluster_has_all_of_one_verb_on_one_node(provider, make, mortal, patient, ask):
    """Real cluster mode: a script that touched two slots would be an error (CROSSSLOT)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        bus = free.getsockname()[1]
    server = mortal("--cluster-enabled", "yes", "--cluster-port", str(bus))
    client = server.client()
    client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
    told, cluster = [], redis.RedisCluster("127.0.0.1", server.port)
    here, there = (make(shared=cluster, on_event=told.append, **ALL) for _ in range(2))
    assert ask(here, "q") == ask(there, "q") == ["Paris"]
    assert provider.count == 1
    here.circuit.force_open("maintenance")
    until(lambda: _refused(ask, there))
    here.clear_cache()
    until(lambda: not here._runtime.cache.others._outbox)
    kinds_of_keys = {key.decode().partition("}:")[2].split(":")[0] for key in client.keys("*")}
    assert kinds_of_keys == {"circuit", "throttle", "rate", "cache"}
    assert len({client.cluster("KEYSLOT", key) for key in client.keys("*:cache*")}) == 1
    assert not kinds(told, StoreLost)
    cluster.close(), client.close()


def test_a_cluster_of_three_nodes_goes_on_when_one_of_them_ends(
    provider, make, mortal, patient, ask
):
    """Circuits, pauses, rates and answers lie on whichever node their key says, and are found there."""
    servers = []
    for number in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            bus = free.getsockname()[1]
        servers.append(mortal("--cluster-enabled", "yes", "--cluster-port", str(bus),
                              "--cluster-require-full-coverage", "no"))  # fmt: skip
        first, last = number * 5462, min(number * 5462 + 5461, 16383)
        client = servers[-1].client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number:
            buses = servers[0].options[servers[0].options.index("--cluster-port") + 1]
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port, buses)
        client.close()
    for server in servers:
        client = server.client()
        until(lambda each=client: each.cluster("INFO")["cluster_state"] == "ok")
        until(lambda each=client: each.cluster("INFO")["cluster_known_nodes"] == "3")
        client.close()
    cluster = redis.RedisCluster("127.0.0.1", servers[0].port)
    pairs = [
        [make(shared=cluster, **{**ALL, "name": f"client {number}"}) for _ in range(2)]
        for number in range(12)
    ]
    for here, there in pairs:
        assert ask(here, "q") == ask(there, "q") == ["Paris"]
        here.circuit.force_open("maintenance")
    assert provider.count == 12
    for _, there in pairs:
        until(lambda lm=there: _refused(ask, lm))
    clients = [server.client() for server in servers]
    held = [len(client.keys("dspy_resilient:*")) for client in clients]
    assert all(count > 0 for count in held), held
    for client in clients:
        client.close()
    servers[2].kill()
    for here, _ in pairs:
        here.circuit.auto()
        here.circuit.reset()
        until(lambda lm=here: ask(lm, f"{time.monotonic()}") == ["Paris"])
    cluster.close()


def test_a_sentinel_leads_every_process_to_the_new_master(
    provider, make, mortal, patient, ask, tmp_path
):
    """The master ends and its replica takes over: what was shared is still known, and goes on."""
    master = mortal()
    replica = mortal("--replicaof", "127.0.0.1", str(master.port))
    until(lambda: replica.client().info("replication")["master_link_status"] == "up")
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds mymaster 500\n"
    )
    guard = mortal("--sentinel", settings=settings)
    sentinel = redis.sentinel.Sentinel([("127.0.0.1", guard.port)], socket_timeout=5.0)
    until(lambda: sentinel.discover_slaves("mymaster"))
    told = []
    here, there = (
        make(shared=sentinel.master_for("mymaster"), on_event=told.append, **ALL) for _ in range(2)
    )
    assert ask(here, "q") == ask(there, "q") == ["Paris"]
    assert provider.count == 1
    here.circuit.force_open("maintenance")
    until(lambda: _refused(ask, there))
    client = replica.client()
    until(lambda: len(client.keys("dspy_resilient:*")) >= 3)
    master.kill()
    until(lambda: _leads(sentinel, replica))
    newcomer = make(shared=sentinel.master_for("mymaster"), **ALL)
    assert _refused(ask, newcomer)
    assert ask(newcomer, "q") == ["Paris"]
    assert provider.count == 1
    here.circuit.reset()
    until(lambda: not _refused(ask, there))
    client.close()


def _leads(sentinel, server):
    try:
        return sentinel.discover_master("mymaster") == ("127.0.0.1", server.port)
    except redis.sentinel.MasterNotFoundError:
        return False


ACL = Path(__file__).parents[2] / "docs" / "how-to" / "many-processes.md"


def test_the_permissions_in_the_documentation_are_enough(provider, make, mortal, patient, ask):
    """A user with nothing but them shares everything; without one of them no call fails."""
    (rule,) = re.findall(r"^ACL SETUSER worker (.*)$", ACL.read_text(), flags=re.MULTILINE)
    server, told = mortal(), []
    client = server.client()
    client.execute_command("ACL", "SETUSER", "worker", *rule.split())
    address = server.url.replace("//", "//worker:a-long-password@")
    here, there = (make(shared=address, on_event=told.append, **ALL) for _ in range(2))
    assert ask(here, "q") == ask(there, "q") == ["Paris"]
    assert provider.count == 1
    here.circuit.force_open("maintenance")
    until(lambda: _refused(ask, there))
    assert not kinds(told, StoreLost)
    with pytest.raises(redis.exceptions.NoPermissionError):
        redis.Redis.from_url(address).get("another program's key")
    client.execute_command("ACL", "SETUSER", "worker", "-evalsha")
    here.circuit.reset()
    assert ask(here, "another") == ["Paris"]
    client.close()


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "volatile-ttl"])
def test_a_store_without_room_fails_no_call(provider, make, mortal, patient, ask, policy):
    """It refuses (noeviction) or forgets: a miss, or a client on its own, and never an error."""
    server = mortal("--maxmemory", "3mb", "--maxmemory-policy", policy)
    client = server.client()
    lm = make(shared=server.url, **ALL)
    for number in range(60):
        with suppress(redis.exceptions.ResponseError):
            client.set(f"filler {number}", os.urandom(100_000), ex=3600)
        assert ask(lm, f"{number}") == ["Paris"]
    assert provider.count == 60
    client.close()


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1, signed by itself."""
    where = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", str(where), "-out", str(tmp_path / "only"), "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    where.write_text(where.read_text() + (tmp_path / "only").read_text())
    return where


def test_tls_is_used_and_checked(provider, make, valkey, patient, proxied, certificate, ask):
    """`rediss://` works with the right authority; without, no call fails and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy, told = proxied(valkey, context), []
    known = f"{proxy.url}?ssl_ca_certs={certificate}"
    here, there = (make(shared=known, **ALL) for _ in range(2))
    assert ask(here, "q") == ["Paris"]
    until(lambda: valkey.client().keys("*:cache:*"))
    assert ask(there, "q") == ["Paris"]
    assert provider.count == 1
    stranger = make(shared=proxy.url, on_event=told.append, **ALL)
    assert ask(stranger, "q") == ["Paris"]
    until(lambda: kinds(told, StoreLost))
    assert provider.count == 2


def child(lm, answered):
    assert lm("in the child") == ["Paris"]
    assert lm("before") == ["Paris"]  # a hit
    lm.circuit.force_open("the child says so")
    until(lambda: all(link._next is None and link._under_way is None for link in links_of(lm)))
    answered.set()
    os._exit(0)


def test_a_child_forked_amid_calls_shares_what_its_parent_does(provider, make, valkey, patient):
    """The courier of the parent is under way all the time; the child has one of its own."""
    lm, stop = make(shared=valkey.url, **ALL), threading.Event()
    lm("before")

    def call_on():
        while not stop.is_set():
            try:
                lm(f"{time.monotonic()}")
            except CircuitOpenError:
                time.sleep(0.01)

    caller = threading.Thread(target=call_on)
    caller.start()
    answered = forked.Event()
    process = forked.Process(target=child, args=(lm, answered))
    process.start()
    process.join(60)
    stop.set()
    caller.join()
    assert process.exitcode == 0
    assert answered.is_set()
    until(lambda: _refused(call, lm))
    assert lm.circuit.reason == "the child says so"


def work(api_base, url, answered, stop):
    lm = ResilientLM("openai/test", api_base=api_base, api_key="dummy-key-for-tests", shared=url,
                     name="fast", cache=False, circuit=False, num_retries=0)  # fmt: skip
    while not stop.is_set():
        try:
            lm("q")
            answered.value += 1
        except dspy.LMRateLimitError:
            time.sleep(0.01)
    os._exit(0)


def test_a_429_of_one_process_holds_up_all(provider, valkey):
    """From when everybody knows until the provider's pause is over, nobody sends."""
    stop = forked.Event()
    answered = [forked.Value("i", 0, lock=False) for _ in range(PROCESSES)]
    workers = [
        forked.Process(target=work, args=(provider.api_base, valkey.url, each, stop))
        for each in answered
    ]
    for each in workers:
        each.start()
    until(lambda: all(each.value > 3 for each in answered))
    provider.script(rate_limited(5))
    time.sleep(1.5)
    count = provider.count
    time.sleep(1.5)
    assert provider.count == count
    marks = [each.value for each in answered]
    until(lambda: all(e.value > m for e, m in zip(answered, marks, strict=True)))
    stop.set()
    for each in workers:
        each.join(30)
        each.kill()
