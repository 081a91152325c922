"""Clients in several places, and one rate between them."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import random
import threading
import time
from types import SimpleNamespace

import pytest

from dspy_resilient import (  # fmt: skip
    CircuitOpenError,
    DeadlineExceededError,
    LimitExceededError,
    LimitPolicy,
    ResilientLM,
)
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.limits import Limiter
from dspy_resilient.limits.rate import BURST_SECONDS
from dspy_resilient.shared import MemoryStore
from dspy_resilient.shared.link import Contact, Courier, carry
from dspy_resilient.shared.rates import SharedRates
from dspy_resilient.shared.store import RateReport
from dspy_resilient.testing import Clock

PROCESSES = int(os.environ.get("FLEET_PROCESSES", "4"))
ONCE = {"cache": False, "name": "fast", "num_retries": 0, "api_key": "dummy-key-for-tests"}
VIEW_AGE = 0.25  # the stated time
SLOW = LimitPolicy(rpm=2)  # one at a time, and one more every thirty seconds
forked = multiprocessing.get_context("fork")


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def rates_of(lm, **kwargs):
    return lm._runtime.routes.find(lm, kwargs).limiter._rates


def full_in(lm, name="requests"):
    """Seconds until the rate is full again, as the store has it."""
    rates = rates_of(lm)
    rate = rates._shares[name].per_minute
    return rates._courier.store.rate(rates._key, {name: RateReport(rate, 0.0)}).full_in[name]


@pytest.fixture(params=["memory", "redis"])
def shared(request):
    """What a user gives as `shared=`."""
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("valkey").url


@pytest.fixture
def pair(make, shared, patient):
    """Two clients of one name, as two processes would have them."""
    return lambda limits, **options: [
        make(shared=shared, limits=limits, **{**ONCE, **options}) for _ in range(2)
    ]


def test_clients_keep_within_one_rate(provider, pair, ask):
    """What goes out here cannot go out there; who cannot wait is told for how long."""
    here, there = pair(SLOW)
    there = there.copy(deadline=0.5)
    assert ask(here, "q") == ["Paris"]
    with pytest.raises(DeadlineExceededError):
        ask(there, "q")
    with pytest.raises(LimitExceededError) as caught:  # by now it knows
        ask(there, "q")
    assert 0.5 < caught.value.retry_after <= 30.0
    assert provider.count == 1


def test_calls_go_when_the_store_has_said_they_may(provider, pair, ask):
    """Four more than a full rate holds take as long as they must, in however many places."""
    here, there = pair(LimitPolicy(rpm=120))
    started = time.monotonic()
    for lm in [here, there] * 7:
        assert ask(lm, "q") == ["Paris"]
    assert 1.9 <= time.monotonic() - started < 10
    assert provider.count == 14


def test_tokens_that_were_not_used_are_there_for_others(provider, pair, ask):
    """An estimate is put right with the usage; what was too much goes back at once."""
    here, there = pair(LimitPolicy(tpm=12_000), max_tokens=1000, deadline=20.0)
    ask(here, "q")
    until(lambda: full_in(here, "tokens") < 0.1)
    ask(there, "q")
    assert provider.count == 2


async def test_a_cancelled_call_leaves_no_trace(provider, pair):
    """What was taken for one that waits goes back."""
    here, there = pair(SLOW)
    await here.acall("q")
    waiting = asyncio.create_task(there.acall("q"))
    await asyncio.to_thread(until, lambda: full_in(there) > 31)
    waiting.cancel()
    await asyncio.to_thread(until, lambda: full_in(there) < 30)


def test_refused_calls_take_nothing_and_ask_seldom(provider, make, valkey, patient, ask):
    """While the circuit is open, the rates stay full, and the store is left alone."""
    lm = make(shared=valkey.url, limits=LimitPolicy(rpm=600), max_wait=0, **ONCE)
    ask(lm, "q")
    lm.circuit.force_open("maintenance")
    client = valkey.client()
    before, started = client.info("commandstats")["cmdstat_evalsha"]["calls"], time.monotonic()
    for _ in range(50):
        with pytest.raises(CircuitOpenError):
            ask(lm, "q")
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert asked <= 6 * (2 + (time.monotonic() - started) / (VIEW_AGE / 2))
    until(lambda: full_in(lm) <= 0)
    client.close()


def test_another_credential_has_rates_of_its_own(provider, make, pair, ask):
    """One tenant's quota never stops another."""
    here, there = pair(SLOW)
    ask(here, "q", api_key="key-of-one-tenant")
    assert ask(there, "q", api_key="key-of-another-tenant") == ["Paris"]
    with pytest.raises((DeadlineExceededError, LimitExceededError)):
        ask(there.copy(deadline=1.0), "q", api_key="key-of-one-tenant")


def test_nobody_may_queue_is_no_reason_to_refuse_who_need_not(provider, pair, ask):
    """`max_queue=0`: to wait for the store is not to wait for a place."""
    here, _ = pair(LimitPolicy(rpm=2, max_queue=0))
    assert ask(here, "q") == ["Paris"]
    with pytest.raises(LimitExceededError):
        ask(here, "q")
    assert provider.count == 1


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_without_the_store_each_process_has_the_rate(provider, make, mortal, ask, fault):
    """A call waits its patience at most, is let go by the rates of its process, and they heal."""
    server, told = mortal(), []
    lm = make(shared=server.url, limits=LimitPolicy(rpm=600), on_event=told.append, **ONCE)
    ask(lm, "q")
    server.kill() if fault == "kill" else server.pause()
    time.sleep(2 * VIEW_AGE)
    started = time.monotonic()
    assert ask(lm, "q") == ["Paris"]
    assert time.monotonic() - started < 10
    until(lambda: any(isinstance(each, StoreLost) for each in told))
    assert ask(lm, "q") == ["Paris"]
    server.start() if fault == "kill" else server.resume()
    until(lambda: ask(lm, "q") and not rates_of(lm).alone)
    until(lambda: any(isinstance(each, StoreFound) for each in told))
    assert [type(e) for e in told if isinstance(e, (StoreLost, StoreFound))] == [StoreLost, StoreFound]  # fmt: skip


def test_the_rate_of_this_process_holds_without_the_store(provider, make, mortal, ask):
    """What has been sent before the store was lost counts."""
    server = mortal()
    lm = make(shared=server.url, limits=SLOW, **ONCE)
    ask(lm, "q")
    server.kill()
    with pytest.raises((DeadlineExceededError, LimitExceededError)):
        ask(lm.copy(deadline=1.0), "q")
    assert provider.count == 1


def test_an_answer_after_all_pays_for_nothing_more(store):
    """What the store grants to who has gone on without it has been sent: a second burst it is not."""
    contact = SimpleNamespace(note=lambda link, error: None)
    now = time.monotonic()
    courier = SimpleNamespace(clock=lambda: now, send=lambda link: None, contact=contact)
    courier.watch = courier.send
    here = SharedRates(courier, "{k}", 12, None)
    here.foresee([0])
    here.fetch()
    trip = here.set_out()
    here.go_alone()
    assert here.ready_at(0) <= now
    here.take(1, 0, now)
    here.foresee([])
    here.come_back(trip, *store.together([trip.verb]))
    assert not here.alone
    assert here.ready_at(0) == pytest.approx(now + 5, abs=0.01)


def test_an_emptied_store_takes_on_what_a_client_knows(store, valkey):
    """FLUSHALL is no second burst."""
    here = SharedRates(SimpleNamespace(clock=time.monotonic), "{k}", 60, None)
    here._hear(time.monotonic(), here._draft(0.0), store.rate("{k}", {"requests": RateReport(60, 5.0)}))  # fmt: skip
    client = valkey.client()
    client.flushall()
    client.close()
    view = store.rate("{k}", here._draft(time.monotonic()))
    assert view.full_in["requests"] == pytest.approx(5, abs=1)


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xff", b"\x93\x01\x02\x03", b"\x81\xa8requests\xc0", b"\x81\xa8requests\xcb\x7f\xf0\0\0\0\0\0\0", b"\x81\xa8requests\xcb\x7f\xf8\0\0\0\0\0\0"])  # fmt: skip
def test_rubbish_under_our_key_is_replaced(store, valkey, rubbish):
    """A hostile value runs nothing and stops nobody: no rate, inf, nan."""
    client = valkey.client()
    client.set("{k}", rubbish)
    assert store.rate("{k}", {"requests": RateReport(60, 1.0)}).full_in[
        "requests"
    ] == pytest.approx(1)
    assert 0 < client.pttl("{k}") < 2 * 86_400_000
    client.close()


@pytest.mark.parametrize("kind", ["memory", "server"])
def test_a_client_with_a_smaller_rate_locks_out_no_other(store, kind):
    """One request of a worker set to 1 per minute is no minute for those set to 600."""
    shared = MemoryStore() if kind == "memory" else store
    fast, slow = RateReport(600, 1.0), RateReport(1, 1.0)
    shared.rate("{k}", {"requests": fast})
    for _ in range(10):
        shared.rate("{k}", {"requests": slow})
    assert shared.rate("{k}", {"requests": fast}).full_in["requests"] == pytest.approx(1.2, abs=0.1)


def test_a_client_with_a_smaller_rate_keeps_to_it(store):
    """Its own rate holds although the store would let it go."""
    courier = Courier(store, Contact(clock=time.monotonic, emit=lambda *_, **__: None))
    store.rate("{k}", {"requests": RateReport(6000, 1.0)})
    limiter = Limiter(LimitPolicy(rpm=1), rates=SharedRates(courier, "{k}", 1, None))
    first = limiter.enter()
    deadline = time.monotonic() + 10
    while not first.poll() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.granted
    second = limiter.enter()
    time.sleep(2 * VIEW_AGE)
    assert not second.poll()
    assert second.wait_time() > 50


def test_the_script_decides_as_the_store_in_memory_does(store):
    """Several clients at once: each answer is the model's, asked in the server's order."""
    log, seed = [], random.randrange(2**32)
    print("seed", seed)

    def work(number):
        pick = random.Random(seed + number)
        for _ in range(100):
            reports = {
                name: RateReport(rate, pick.choice([0.0, 1.0, 7.0, -1.0, 0.5]), pick.random())
                for name, rate in (("requests", pick.choice([60_000, 600])), ("tokens", 1e6))
                if pick.random() < 0.8
            }
            view = store.rate("{k}", reports)
            log.append((view.at, reports, view))
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
    for at, reports, view in log:
        now = at
        assert view.full_in == pytest.approx(model.rate("{k}", reports).full_in, abs=1e-5)


class Simulation:
    """Several limiters on one store, on paper time; trips take a while, callers come and go."""

    def __init__(self, seed, clients, rpm, tpm):
        self.pick, self.now = random.Random(seed), Clock(1000.0)
        self.clock, self.contact = self.now, SimpleNamespace(note=lambda *_: None)
        self.store = MemoryStore(clock=self.now)
        self.trips, self.watched, self.waiting, self.in_flight, self.sent = [], set(), [], [], []
        self.limiters = [
            Limiter(
                LimitPolicy(rpm=rpm, tpm=tpm, max_concurrent=self.pick.choice([None, 8])),
                clock=self.now, rates=SharedRates(self, "k", rpm, tpm),
            )
            for _ in range(clients)
        ]  # fmt: skip

    def send(self, link):
        self.trips.append((self.now() + self.pick.choice([0.0, 0.001, 0.05]), link))

    def watch(self, link):
        self.watched.add(link)

    def arrive(self):
        slot = self.pick.choice(self.limiters).enter(self.pick.randrange(1, 50))
        self.look(slot)

    def look(self, slot):
        if slot.granted and self.pick.random() < 0.05:
            slot.release(sent=False)  # the circuit refuses
        elif slot.granted:
            self.sent.append(self.now())
            self.in_flight.append((self.now() + self.pick.random() / 5, slot))
        else:
            self.waiting.append((slot, slot.future, self.now() + slot.wait_time()))

    def step(self):
        """Go on to the next moment at which anything happens."""
        now = self.now()
        for each in [each for each in self.trips if each[0] <= now]:
            self.trips.remove(each)
            carry(self.store, [each[1]])
        for link in list(self.watched):
            if not link.wants_news():
                self.watched.remove(link)
            elif link.is_old:
                link.ask()
        for each in [each for each in self.in_flight if each[0] <= now]:
            self.in_flight.remove(each)
            each[1].release(tokens=self.pick.choice([None, each[1].tokens // 2]))
        for each in list(self.waiting):
            slot, future, due = each
            if future.done() or due <= now:
                self.waiting.remove(each)
                slot.poll()
                self.look(slot)
            elif self.pick.random() < 0.001:
                self.waiting.remove(each)
                slot.release(sent=False)  # cancelled
        moments = [at for at, _ in self.trips + self.in_flight]
        moments += [due for _, future, due in self.waiting if not future.done()]
        moments += [now + VIEW_AGE] if self.watched else []
        is_due = any(future.done() for _, future, _ in self.waiting)
        self.now.advance(0.0 if is_due else max(0.0, min(moments, default=now) - now))


def most_in_any_window(sent, rate):
    """Return how much more than `rate` per second has been sent in the worst span of time."""
    worst = level = 0.0
    before = -math.inf
    for at in sent:
        level = max(0.0, level - (at - before) * rate) + 1
        worst, before = max(worst, level), at
    return worst


@pytest.mark.parametrize("seed", range(12))
def test_all_together_keep_within_the_rate_and_use_it(seed):
    """Random callers in several places: never more than rate * T and a burst, and hardly less.

    A trip takes up to 0.05 s and unused credit goes back within `VIEW_AGE`: for so long may what was
    taken be sent late. Nobody waits for ever.
    """
    clients, number = 1 + seed % 4, 150
    rpm, tpm = (600, None) if seed % 3 else (1200, 12_000)
    world = Simulation(seed, clients, rpm, tpm)
    for _ in range(number):
        world.arrive()
    steps = 0
    while world.waiting or world.in_flight or world.trips or world.watched:
        world.step()
        steps += 1
        assert steps < 100_000, "somebody waits for ever"
    late = 0.05 + 2 * VIEW_AGE
    assert len(world.sent) > number * 0.8
    assert most_in_any_window(world.sent, rpm / 60) <= rpm / 60 * (BURST_SECONDS + late) + 1
    if tpm is None:
        assert world.sent[-1] - 1000.0 <= 1.3 * (number * 60 / rpm - BURST_SECONDS)
    for limiter in world.limiters:
        assert (limiter.in_use, limiter.queued) == (0, 0)
        assert all(share.credit == 0 for share in limiter._rates._shares.values())


def work(api_base, url, answered, stop):
    lm = ResilientLM("openai/test", shared=url, api_base=api_base, limits=LimitPolicy(rpm=600),
                     circuit=False, **ONCE)  # fmt: skip
    while not stop.is_set():
        lm("q")
        answered.value += 1
    os._exit(0)


def test_processes_keep_within_one_rate_and_share_it(provider, valkey):
    """Ten a second, and fifty at first, however many processes; nobody goes hungry."""
    stop = forked.Event()
    answered = [forked.Value("i", 0, lock=False) for _ in range(PROCESSES)]
    started = time.monotonic()
    workers = [
        forked.Process(target=work, args=(provider.api_base, valkey.url, each, stop))
        for each in answered
    ]
    for each in workers:
        each.start()
    until(lambda: provider.count >= 80, 60)
    stop.set()
    for each in workers:
        each.join(30)
        each.kill()
    seconds = time.monotonic() - started
    assert provider.count <= 10 * (BURST_SECONDS + seconds) + 1
    assert all(each.value >= 3 for each in answered)


def test_a_forked_child_has_no_credit_of_its_parents(provider, make, valkey, patient):
    """It would be spent twice."""
    lm = make(shared=valkey.url, limits=LimitPolicy(rpm=600), **ONCE)
    lm("q")
    rates = rates_of(lm)
    rates._shares["requests"].credit = 3.0
    rates.renew()
    assert rates._shares["requests"].credit == 0
    assert lm("q") == ["Paris"]
