"""Clients in several places, and the answers that they share if their user wants that."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zlib

import dspy
import pytest

from dspy_resilient import CachePolicy, ResilientLM
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.shared import MemoryStore, RedisStore
from dspy_resilient.shared.store import MOST_TEXT, CacheOrder
from dspy_resilient.testing import Status, Truncated

SHARED = CachePolicy(shared=True, disk=None)
NAMED = {"name": "fast", "num_retries": 0}


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


@pytest.fixture
def client(valkey):
    """A plain client, to see and to change what lies there."""
    client = valkey.client()
    yield client
    client.close()


@pytest.fixture
def pair(make, shared, patient):
    """Two clients of one name, as two processes would have them."""
    return lambda policy=SHARED, **options: [
        make(shared=shared, cache=policy, **{**NAMED, **options}) for _ in range(2)
    ]


def has_told(lm):
    """Whether the store has heard everything."""
    others = lm._runtime.cache.others
    with others._lock:
        return not others._outbox and others._under_way is None


def entries(client):
    return [key for key in client.keys("*") if key.rpartition(b":")[2].isalnum() and b":cache:" in key]  # fmt: skip


def test_an_answer_paid_for_here_is_a_hit_there(provider, pair, ask):
    """One request in all; the other client's numbers and history show a hit."""
    here, there = pair()
    assert ask(here, "q") == ask(there, "q") == ["Paris"]
    assert provider.count == 1
    assert (there.stats().hits, there.stats().misses, there.stats().attempts) == (1, 0, 0)
    assert (here.stats().hits, here.stats().misses) == (0, 1)
    assert there.stats().tokens_saved > 0
    entry = there.history[-1]
    assert (entry["outputs"], entry["usage"], entry["cache_hit"]) == (["Paris"], {}, True)
    assert entry["response"].choices[0].message.content == "Paris"
    assert ask(there, "q") == ["Paris"]
    assert there._runtime.cache.numbers().shared_hits == 1, "from then on it is in memory"


def test_nothing_is_shared_unless_the_user_asked_for_it(provider, make, client, valkey, ask):
    """`shared=` alone keeps answers at home."""
    lm = make(shared=valkey.url, **NAMED)
    ask(lm, "q")
    until(lambda: client.keys("*circuit"))
    assert not client.keys("*cache*")


def test_what_lies_there_is_an_answer_that_expires(provider, make, client, valkey, patient, ask):
    """JSON under a hash: no prompt, no credential, and a time to live."""
    lm = make(shared=valkey.url, cache=SHARED, **NAMED)
    ask(lm, "a private prompt")
    (key,) = entries(client)
    value = client.get(key)
    assert json.loads(value[TIME + DIGEST :])["outputs"] == ["Paris"]
    assert 0 < client.pttl(key) <= 86_400_000
    for secret in (b"dummy-key", b"private"):
        assert secret not in key + value
    assert key.startswith(b"dspy_resilient:2::fast:{")


def test_ttl_counts_by_the_clock_of_the_store(provider, pair, ask):
    """An answer is as old there as it is here; an expired one helps out in an outage."""
    here, there = pair(CachePolicy(shared=True, disk=None, ttl=0.5, stale_if_error=60))
    ask(here, "q")
    time.sleep(0.6)
    provider.always(Status(500))
    assert ask(there, "q") == ["Paris"]
    assert (there.stats().stale, there.stats().hits, there.stats().misses) == (1, 0, 1)
    assert provider.count == 2


def test_an_unparsable_answer_goes_from_the_store_too(provider, pair):
    """Trying again asks the provider again, wherever that is done."""
    here, there = pair()
    provider.answer = "no json at all"
    predict = dspy.Predict("question -> number: int")
    with (
        dspy.context(lm=here, adapter=dspy.JSONAdapter()),
        pytest.raises(Exception, match=r"[Pp]arse"),
    ):
        predict(question="q")
    until(lambda: has_told(here))
    count = provider.count
    provider.answer = '{"number": 7}'
    with dspy.context(lm=there, adapter=dspy.JSONAdapter()):
        assert predict(question="q").number == 7
    assert provider.count > count


def test_a_cleared_cache_is_cleared_for_everybody(provider, pair, ask):
    """`clear_cache` forgets what others would find, and what comes later counts again."""
    here, there = pair()
    ask(here, "q")
    here.clear_cache()
    until(lambda: has_told(here))
    assert ask(there, "q") == ["Paris"]
    assert provider.count == 2
    assert ask(here, "q") == ["Paris"]
    assert provider.count == 2


def test_what_may_not_be_cached_is_not_shared(provider, pair, ask):
    """Truncated answers stay out."""
    here, there = pair()
    provider.script(Truncated())
    ask(here, "q")
    assert ask(there, "q") == ["Paris"]
    assert provider.count == 2


def test_tenants_and_names_share_no_answers(provider, make, pair, shared, ask):
    """Another key, another name: another answer."""
    here, there = pair()
    other = make(shared=shared, cache=SHARED, name="other")
    ask(here, "q")
    ask(there, "q", api_key="another-key")
    ask(other, "q")
    assert provider.count == 3


async def test_a_crowd_of_tasks_is_answered_in_a_few_trips(provider, make, client, valkey, patient):
    """Look-ups under way at once travel together."""
    here, there = (make(shared=valkey.url, cache=SHARED, **NAMED) for _ in range(2))
    await asyncio.gather(*(here.acall(f"q{i}") for i in range(100)))
    until(lambda: len(entries(client)) == 100)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    await asyncio.gather(*(there.acall(f"q{i}") for i in range(100)))
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 50
    assert provider.count == 100


def test_long_answers_are_compressed_and_the_longest_stay_at_home(
    provider, make, client, valkey, patient, ask
):
    """A store is not the place for megabytes."""
    here, there = (make(shared=valkey.url, cache=SHARED, **NAMED) for _ in range(2))
    provider.answer = "Paris is a city. " * 1000
    assert ask(here, "long") == ask(there, "long") == [provider.answer]
    (key,) = entries(client)
    assert client.strlen(key) < len(provider.answer) / 4
    provider.answer = base64.b85encode(random.Random(1).randbytes(MOST_TEXT)).decode()
    assert ask(here, "longest") == ask(there, "longest") == [provider.answer]
    assert entries(client) == [key]
    assert provider.count == 3


def test_a_client_that_decodes_what_it_reads_will_do(provider, make, valkey, patient, ask):
    """Users have set theirs up for other things."""
    clients = [valkey.client(decode_responses=True) for _ in range(2)]
    here, there = (make(shared=each, cache=SHARED, **NAMED) for each in clients)
    for answer in ("Zürich 🏔", "Zürich 🏔" * 1000):
        provider.answer = answer
        assert ask(here, answer) == ask(there, answer) == [answer]
    assert provider.count == 2
    for each in clients:
        each.close()


NOW = b"1000000000.000000"
TIME, DIGEST = len(NOW), 32
BOMB = b"z" + base64.b64encode(zlib.compress(b"[" * 10**8))
HOSTILE = {
    "empty": b"",
    "short": b"17",
    "no time": b"x" * 40,
    "no json": NOW + b"\xff\xfe",
    "pickle": NOW + pickle.dumps(print),
    "bomb": NOW + BOMB,
    "torn": NOW + BOMB[:100],
    "deep": NOW + b"[" * 5000,
    "too long": NOW + b"x" * (MOST_TEXT + 1),
    "no outputs": NOW + b'{"outputs":[],"record":null,"target":"","tokens":0,"stored":0.0}',
    "numbers": NOW + b'{"outputs":[1],"record":null,"target":"","tokens":0,"stored":0.0}',
    "number for text": NOW + b'{"outputs":[{"text":1}],"record":{},"target":"","tokens":0,"stored":0.0}',
    "class": NOW + b'{"outputs":["x"],"record":{"$":"object","class":"os:system","of":[{},null]},"target":"","tokens":0,"stored":0.0}',
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_rubbish_in_the_place_of_an_answer_is_a_miss(
    provider, make, client, valkey, patient, ask, hostile
):
    """It runs nothing, crashes nothing, and an answer takes its place."""
    told = []
    here, there = (
        make(shared=valkey.url, cache=SHARED, on_event=told.append, **NAMED) for _ in range(2)
    )
    ask(here, "q")
    (key,) = entries(client)
    client.set(key, hostile)
    assert ask(there, "q") == ["Paris"]
    assert provider.count == 2
    until(lambda: b'"Paris"' in (client.get(key) or b""))
    assert not [each for each in told if isinstance(each, StoreLost)]


@pytest.mark.parametrize("change", ["one letter", "moved", "cut", "no digest"])
@pytest.mark.parametrize("secret", ["", "a secret of the fleet"])
def test_a_garbled_or_edited_answer_is_a_miss(
    provider, make, client, valkey, patient, ask, monkeypatch, secret, change
):
    """Sound JSON that says something else than what was stored there is served to no caller."""
    monkeypatch.setenv("DSPY_RESILIENT_SECRET", secret)
    here, there = (make(shared=valkey.url, cache=SHARED, **NAMED) for _ in range(2))
    ask(here, "q")
    (key,) = entries(client)
    value = client.get(key)
    if change == "moved":
        ask(here, "another question")
        (other,) = set(entries(client)) - {key}
        value = client.get(other)
    elif change == "one letter":
        value = value.replace(b'"Paris"', b'"Parid"')
    else:
        value = value[:-1] if change == "cut" else value[:TIME] + value[TIME + DIGEST :]
    client.set(key, value)
    count = provider.count
    assert ask(there, "q") == ["Paris"]
    assert provider.count == count + 1


def test_an_answer_of_a_writer_without_the_secret_is_a_miss(
    provider, make, valkey, patient, ask, monkeypatch
):
    """Whoever can write to the store writes no answers for those who have a secret."""
    here, there, also = (make(shared=valkey.url, cache=SHARED, **NAMED) for _ in range(3))
    ask(here, "q")
    monkeypatch.setenv("DSPY_RESILIENT_SECRET", "a secret of the fleet")
    assert ask(there, "q") == ["Paris"]
    assert ask(also, "q") == ["Paris"]
    assert provider.count == 2


def test_a_distant_store_adds_nothing_to_a_call_but_looking_an_answer_up(
    provider, make, mortal, proxied, ask
):
    """With 200 ms there and back: within a quarter of a second on a miss, nothing on a hit."""
    proxy = proxied(mortal())
    lm = make(shared=proxy.url, cache=SHARED, **NAMED)
    alone = make(cache=CachePolicy(disk=None), name="alone", num_retries=0)
    ask(lm, "first"), ask(alone, "first")
    proxy.delay = 0.2
    misses, hits, plain = [], [], []
    for number in range(8):
        for times, client, prompt in (
            (misses, lm, f"{number}"),
            (hits, lm, f"{number}"),
            (plain, alone, f"{number}"),
        ):
            started = time.monotonic()
            ask(client, prompt)
            times.append(time.monotonic() - started)
        time.sleep(0.1)
    added = sorted(miss - base for miss, base in zip(misses, plain, strict=True))
    assert added[len(added) // 2] < 0.25 + 0.1
    assert sorted(hits)[len(hits) // 2] < 0.1
    uncached = []
    for number in range(8):
        started = time.monotonic()
        ask(lm, f"uncached {number}", cache=False)
        uncached.append(time.monotonic() - started)
        time.sleep(0.1)
    extra = sorted(uncached)[4] - sorted(plain)[4]
    assert extra < 0.1, "a call waits for the store"


def test_what_was_stored_last_is_there_when_the_interpreter_has_ended(provider, valkey):
    """A script of one call shares its answer, though no call waits for that."""
    script = f"""
from dspy_resilient import CachePolicy, ResilientLM
lm = ResilientLM("openai/test", api_base={provider.api_base!r}, api_key="k", name="fast",
                 shared={valkey.url!r}, cache=CachePolicy(shared=True, disk=None))
print(lm("q"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Paris" in done.stdout
    client = valkey.client()
    assert len(entries(client)) == 1
    client.close()


@pytest.mark.parametrize("kind", ["list", "hash"])
def test_another_type_in_the_place_of_an_answer_is_a_miss(
    provider, make, client, valkey, patient, kind
):
    """And no reason to do without the store."""
    here, there = (make(shared=valkey.url, cache=SHARED, **NAMED) for _ in range(2))
    here("q")
    (key,) = entries(client)
    client.delete(key)
    client.rpush(key, "x") if kind == "list" else client.hset(key, "x", "y")
    assert there("q") == ["Paris"]
    assert client.type(key) == b"string"


def mutated(pick, value):
    """Return a JSON value of which something somewhere is another."""
    if pick.random() < 0.15:
        return pick.choice([None, True, -1, 1e300, "x", [], {}, [[]], {"$": "typed"}, 2**63])
    if isinstance(value, dict):
        return {
            name if pick.random() > 0.05 else "$": mutated(pick, each)
            for name, each in value.items()
            if pick.random() > 0.05
        }
    return [mutated(pick, each) for each in value] if isinstance(value, list) else value


def test_no_value_crashes_a_call(provider, make, client, valkey, patient):
    """Answers changed at random: a call gets one of them, or the provider's, and no error."""
    lm, seed = make(shared=valkey.url, cache=SHARED, **NAMED), random.randrange(2**32)
    print("seed", seed)
    lm("q")
    (key,) = entries(client)
    sound, pick = json.loads(client.get(key)[TIME + DIGEST :]), random.Random(seed)
    digest = lm._runtime.cache.others._digest
    name = key.rpartition(b":")[2].decode()
    hostile = [mutated(pick, sound) for _ in range(int(os.environ.get("HOSTILE_VALUES", "100")))]
    for value in [*hostile, sound]:
        hits = lm.stats().hits
        text = json.dumps(value).encode()
        client.set(key, NOW + digest(name, text) + text)  # as another client would have stored it
        lm._runtime.cache.close()  # the memory only
        (output,) = lm("q")
        assert isinstance(output, (str, dict))
        assert lm.history[-1]["outputs"]
        lm.explain(), str(lm.stats()), repr(lm)
    assert lm.stats().hits == hits + 1


def test_a_store_that_hangs_costs_one_call_its_patience(provider, make, mortal, ask):
    """The first waits a quarter of a second; until it is back nobody else does."""
    server, told = mortal(), []
    lm = make(shared=server.url, cache=SHARED, on_event=told.append, circuit=False, **NAMED)
    ask(lm, "q")
    server.pause()
    ask(lm, "first")
    started = time.monotonic()
    for i in range(20):
        assert ask(lm, f"q{i}") == ["Paris"]
    assert time.monotonic() - started < 20 * 0.25
    until(lambda: any(isinstance(each, StoreLost) for each in told))
    server.resume()
    until(
        lambda: (
            (ask(lm, f"{time.monotonic()}") and isinstance(told[-1], StoreFound)) or _found(told)
        )
    )
    assert [type(e) for e in told if isinstance(e, (StoreLost, StoreFound))] == [
        StoreLost,
        StoreFound,
    ]


def _found(told):
    time.sleep(0.1)
    return any(isinstance(each, StoreFound) for each in told)


def test_what_was_forgotten_without_the_store_is_forgotten_when_it_is_back(
    provider, make, mortal, patient
):
    """A server that was out of reach still had the answer."""
    server = mortal()
    here = make(shared=server.url, cache=SHARED, **NAMED)
    here("q")
    server.pause()
    here.clear_cache()
    until(lambda: here._runtime.cache.others.alone)
    server.resume()
    client = server.client()
    until(lambda: has_told(here))
    there = make(shared=server.url, cache=SHARED, **NAMED)
    count = provider.count
    assert there("q") == ["Paris"]
    assert provider.count == count + 1
    client.close()


def test_a_shared_cache_needs_a_store():
    """The message says what to do."""
    with pytest.raises(ValueError, match=r"CachePolicy\(shared=True\).*give shared="):
        ResilientLM("openai/x", cache=SHARED)
    with pytest.raises(ValueError, match="shared must be one of True, False"):
        CachePolicy(shared="redis://x")


def test_a_saved_client_shares_its_cache_again(valkey):
    """With the address; and if that had a password, until it is given again, with nobody."""
    lm = ResilientLM("openai/x", shared=valkey.url, cache=SHARED)
    for again in (
        pickle.loads(pickle.dumps(lm)),
        ResilientLM.load_state(json.loads(json.dumps(lm.dump_state()))),
    ):
        assert again.cache_policy == SHARED
        assert again._runtime.cache.others is not None


def _reloaded(lm, way):
    with pytest.warns(UserWarning, match="shared cannot be saved"):
        saved = pickle.dumps(lm) if way == "pickle" else json.dumps(lm.dump_state())
    assert b"s3cr3t" not in (saved if isinstance(saved, bytes) else saved.encode())
    return lambda: (
        pickle.loads(saved) if way == "pickle" else ResilientLM.load_state(json.loads(saved))
    )


@pytest.mark.parametrize("way", ["pickle", "state"])
@pytest.mark.parametrize("given", ["an address with a password", "a client"])
def test_a_client_whose_store_is_not_saved_says_so_when_it_is_loaded(valkey, way, given):
    """It does not silently go on alone: it says how the store is given again, and that works."""
    shared = "redis://:s3cr3t-pw@h" if given != "a client" else valkey.client()
    load = _reloaded(ResilientLM("openai/x", name="n", shared=shared, cache=SHARED), way)
    with pytest.warns(
        UserWarning, match=r"'n': it shares nothing.*DSPY_RESILIENT_STORE.*copy\(shared"
    ):
        alone = load()
    assert alone._runtime.shared_state is None
    assert "shares nothing" in alone.explain()
    again = alone.copy(shared=valkey.url, temperature=0.5)
    assert again.cache_policy == SHARED
    assert again._runtime.cache.others is not None
    assert (again.name, again.kwargs["temperature"]) == ("n", 0.5)
    assert "shares nothing" not in again.explain()
    assert alone._runtime.shared_state is None
    with pytest.raises(TypeError, match="shares already"):
        again.copy(shared=valkey.url)
    with pytest.warns(UserWarning, match="shares nothing"):  # saved once more, it still knows
        ResilientLM.load_state(json.loads(json.dumps(alone.dump_state())))


@pytest.mark.parametrize("way", ["pickle", "state"])
def test_the_environment_gives_a_store_that_was_not_saved(valkey, way, monkeypatch, recwarn):
    """A worker that loads a program needs no code of its own for it."""
    shared = valkey.url.replace("//", "//:s3cr3t-pw@")
    load = _reloaded(ResilientLM("openai/x", shared=shared, cache=SHARED), way)
    monkeypatch.setenv("DSPY_RESILIENT_STORE", valkey.url)
    recwarn.clear()
    assert load()._runtime.cache.others is not None
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["class of a store", "class of a client", "pipeline", "asyncio"])
def test_what_is_no_store_is_refused_at_construction(valkey, kind):
    """A class has all the methods of a store, and a pipeline sends nothing."""
    import redis.asyncio

    client = valkey.client()
    shared = {
        "class of a store": RedisStore,
        "class of a client": type(client),
        "pipeline": client.pipeline(),
        "asyncio": redis.asyncio.Redis(),
    }[kind]
    with pytest.raises(TypeError, match="shared must be"):
        ResilientLM("openai/x", shared=shared)
    client.close()


def test_the_script_does_as_the_store_in_memory_does(store):
    """Random orders, several in one trip: the same is found, whatever was forgotten when."""
    pick, model = random.Random(seed := random.randrange(2**32)), MemoryStore()
    print("seed", seed)
    found = 0
    for _ in range(300):
        orders = []
        for _ in range(pick.randrange(6)):
            doing = pick.choice(["load"] * 4 + ["store"] * 3 + ["forget", "forget_all"])
            name = "" if doing == "forget_all" else pick.choice("abc")
            body = pick.randbytes(5).hex().encode() if doing == "store" else b""
            kept = pick.choice([float("inf"), 100_000.0, 60.0])
            orders.append(CacheOrder(doing, name, body, kept))
        there, here = store.cache("{k}", orders), model.cache("{k}", orders)
        assert [each and each.text for each in there] == [each and each.text for each in here]
        assert all(0 <= each.age < 60 for each in there if each is not None)
        found += sum(each is not None for each in there)
    assert found > 50


def test_what_is_in_use_is_not_forgotten(store, client):
    """Each recall in the second half of its life gives an answer another day, up to its ttl."""
    day = 86_400_000
    store.cache("{k}", [CacheOrder("store", "a", b"x"), CacheOrder("store", "b", b"x", 100.0)])
    assert (client.pttl("{k}:a") > day - 60_000, client.pttl("{k}:b") <= 100_000) == (True, True)
    client.pexpire("{k}:a", day // 3)
    store.cache("{k}", [CacheOrder("load", "a"), CacheOrder("load", "b", kept=100.0)])
    assert client.pttl("{k}:a") > day - 60_000
    assert client.pttl("{k}:b") <= 100_000
    assert store.cache("{k}", [CacheOrder("load", "b", kept=0.0)]) == [None]
