"""Identical calls share one: who leads, who waits, and what becomes of both."""

import asyncio
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_resilient.cache import Answer, Failed, Flights, Landed, Lead, Waiter
from dspy_resilient.testing.clock import Clock

ANSWER = Answer.of(["Paris"], None)
OTHER = Answer.of(["Rome"], None)


def flights_for(clock=None, max_age=60.0):
    return Flights(clock=clock or Clock(), max_age=max_age)


def joined(flights, count, key="k"):
    """A lead that has sent, and waiters behind it."""
    lead, *waiters = [flights.join(key) for _ in range(count + 1)]
    lead.sent()
    assert isinstance(lead, Lead)
    assert all(isinstance(waiter, Waiter) for waiter in waiters)
    return lead, *waiters


def news(waiter):
    return waiter.future.result(0)


def test_first_one_leads_and_the_others_wait():
    """One call per key is sent."""
    flights = flights_for()
    joined(flights, 3)
    assert isinstance(flights.join("another key"), Lead)
    assert len(flights) == 2


def test_answer_reaches_all_who_wait():
    """Every follower gets the leader's answer, and the flight is over."""
    flights = flights_for()
    lead, *waiters = joined(flights, 3)
    lead.land(ANSWER)
    assert [news(waiter) for waiter in waiters] == [Landed(ANSWER)] * 3
    assert len(flights) == 0
    assert isinstance(flights.join("k"), Lead)


def test_providers_error_reaches_all_who_wait_at_once():
    """Nobody asks again one by one; each gets a copy with the leader's error as cause."""
    flights = flights_for()
    lead, *waiters = joined(flights, 2)
    error = dspy.LMServerError("down", model="m")
    error.attempts = (1, 2)
    lead.fail(error)
    copies = [news(waiter).error for waiter in waiters]
    assert len({id(each) for each in (*copies, error)}) == 3
    for each in copies:
        assert (type(each), str(each), each.attempts) == (type(error), str(error), (1, 2))
        assert each.__cause__ is error
    assert len(flights) == 0


def test_notes_on_a_copy_stay_on_the_copy():
    """What one follower adds to its error is not shown to the others."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    error = ValueError("x")
    error.add_note("from the provider")
    lead.fail(error)
    news(waiter).error.add_note("mine")
    assert error.__notes__ == ["from the provider"]
    assert news(waiter).error.__notes__ == ["from the provider", "mine"]


class UncopyableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class SoleError(Exception):
    def __copy__(self):
        return self


@pytest.mark.parametrize("error", [UncopyableError(1, 2), SoleError()])
def test_error_that_cannot_be_copied_is_shared(error):
    """Better the same object than another error."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    lead.fail(error)
    assert news(waiter) == Failed(error)
    assert error.__cause__ is None


def test_when_a_leader_gives_up_the_longest_waiting_leads():
    """A cancelled leader harms nobody: the next one sends, the others go on waiting."""
    flights = flights_for()
    lead, first, second = joined(flights, 2)
    lead.abandon()
    heir = news(first)
    assert isinstance(heir, Lead)
    assert heir.sent_at is None
    assert not second.future.done()
    heir.land(ANSWER)
    assert news(second) == Landed(ANSWER)
    assert len(flights) == 0


def test_when_nobody_waits_giving_up_ends_the_flight():
    """The next one who asks starts afresh."""
    flights = flights_for()
    (lead,) = joined(flights, 0)
    lead.abandon()
    assert len(flights) == 0
    assert isinstance(flights.join("k"), Lead)


@pytest.mark.parametrize("end", ["land", "fail", "abandon"])
def test_only_the_first_end_counts(end):
    """What a leader says after its end changes nothing, whatever came first."""
    flights = flights_for()
    lead, first = joined(flights, 1)
    ends = {"land": (ANSWER,), "fail": (ValueError("x"),), "abandon": ()}
    getattr(lead, end)(*ends[end])
    said = news(first)
    later, behind = joined(flights, 1, "other") if end == "abandon" else joined(flights, 1)
    for other, arguments in ends.items():
        getattr(lead, other)(*arguments)
    assert news(first) is said
    assert not behind.future.done()
    later.land(OTHER)
    assert news(behind) == Landed(OTHER)


def test_waiter_who_leaves_leaves_no_trace():
    """A cancelled follower is not promoted and gets nothing."""
    flights = flights_for()
    lead, gone, stays = joined(flights, 2)
    gone.leave()
    gone.leave()
    lead.abandon()
    assert not gone.future.done()
    assert isinstance(news(stays), Lead)


def test_lead_that_came_to_one_who_left_goes_on():
    """A follower promoted in the moment it is cancelled passes the lead on."""
    flights = flights_for()
    lead, first, second, third = joined(flights, 3)
    lead.abandon()
    first.leave()
    assert isinstance(news(second), Lead)
    second.leave()
    third.leave()
    assert len(flights) == 0


def test_leaving_after_the_news_changes_nothing():
    """An answer that came too late for a follower is still everybody else's."""
    flights = flights_for()
    lead, first, second = joined(flights, 2)
    lead.land(ANSWER)
    first.leave()
    assert news(second) == Landed(ANSWER)


def test_nobody_waits_behind_an_old_attempt():
    """Behind one older than `coalesce_max_age` a newcomer sends its own, and only one."""
    clock = Clock()
    flights = flights_for(clock)
    lead, waiter = joined(flights, 1)
    clock.advance(59.9)
    assert isinstance(flights.join("k"), Waiter)
    clock.advance(0.1)
    second = flights.join("k")
    assert isinstance(second, Lead)
    assert isinstance(flights.join("k"), Waiter)
    assert not waiter.future.done()
    assert lead.returned() is None


def test_age_counts_from_the_latest_send():
    """A retry makes the flight young again; before the first send it has no age."""
    clock = Clock()
    flights = flights_for(clock)
    lead = flights.join("k")
    clock.advance(1000)
    assert isinstance(flights.join("k"), Waiter)
    lead.sent()
    clock.advance(59)
    lead.sent()
    clock.advance(59)
    assert isinstance(flights.join("k"), Waiter)


@pytest.mark.parametrize("first", [0, 1])
def test_first_answer_serves_both_leads(first):
    """Whichever lead lands, all waiters and the other lead have its answer."""
    clock = Clock()
    flights = flights_for(clock)
    lead, early = joined(flights, 1)
    clock.advance(60)
    leads = [lead, flights.join("k")]
    late = flights.join("k")
    leads[first].land(ANSWER)
    assert news(early) == news(late) == Landed(ANSWER)
    assert leads[1 - first].returned() is ANSWER
    assert len(flights) == 0
    leads[1 - first].land(OTHER)
    assert leads[first].returned() is ANSWER
    assert len(flights) == 0


def test_error_of_one_lead_spares_who_can_still_be_served():
    """While another lead is under way, nobody fails."""
    clock = Clock()
    flights = flights_for(clock)
    lead, waiter = joined(flights, 1)
    clock.advance(60)
    second = flights.join("k")
    second.fail(ValueError("x"))
    second.abandon()  # it has ended already
    assert not waiter.future.done()
    lead.fail(ValueError("y"))
    assert str(news(waiter).error) == "y"
    assert len(flights) == 0


def test_abandoned_lead_passes_on_unless_a_young_one_is_left():
    """Nobody is left behind an old attempt alone, and no attempt is sent without need."""
    clock = Clock()
    flights = flights_for(clock)
    lead, first = joined(flights, 1)
    clock.advance(60)
    second = flights.join("k")
    second.abandon()  # only the old attempt is left
    heir = news(first)
    assert isinstance(heir, Lead)
    behind = flights.join("k")
    lead.abandon()  # the heir's is young
    assert not behind.future.done()
    heir.land(ANSWER)
    assert news(behind) == Landed(ANSWER)


def test_without_an_age_nobody_waits():
    """`coalesce_max_age=0` switches single-flight off."""
    flights = flights_for(max_age=0.0)
    leads = [flights.join("k") for _ in range(3)]
    assert all(isinstance(lead, Lead) for lead in leads)
    for lead in leads:
        lead.abandon()
    assert len(flights) == 0


def test_future_cannot_be_cancelled():
    """An event loop that cancels what it waits for does not break the flight."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    assert waiter.future.cancel() is False
    lead.land(ANSWER)
    assert news(waiter) == Landed(ANSWER)


@pytest.mark.parametrize(
    "end",
    [lambda lead: lead.land(ANSWER), lambda lead: lead.fail(ValueError()), Lead.abandon],
    ids=["land", "fail", "abandon"],
)
def test_news_is_given_without_the_lock(end):
    """A follower may join another flight from the callback of its own future."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    places = []
    waiter.future.add_done_callback(lambda _: places.append(flights.join("another key")))
    end(lead)
    assert isinstance(places[0], Lead)


def test_threads_and_loops_wait_for_the_same_leader():
    """Threads, and tasks of several loops, share one call."""
    flights = Flights()
    lead = flights.join("k")
    here = threading.Barrier(5)

    def in_thread():
        waiter = flights.join("k")
        here.wait()
        return waiter.future.result(10)

    async def in_loop():
        waiter = flights.join("k")
        await asyncio.to_thread(here.wait)
        return await asyncio.wrap_future(waiter.future)

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(in_thread) for _ in range(2)]
        loops = [pool.submit(asyncio.run, in_loop()) for _ in range(2)]
        here.wait()
        lead.land(ANSWER)
        assert [each.result(10) for each in (*threads, *loops)] == [Landed(ANSWER)] * 4


@pytest.mark.parametrize("round_", range(20))
def test_storm_of_threads_sends_few_and_serves_all(round_):
    """Whoever leads, fails or gives up meanwhile, everybody gets an end and no flight is left."""
    flights = Flights()
    start = threading.Barrier(12)
    sent = []

    def call(number):
        start.wait()
        place = flights.join("k")
        while isinstance(place, Waiter):
            if number % 5 == 4:
                place.leave()
                return "left"
            got = place.future.result(10)
            if not isinstance(got, Lead):
                return "served"
            place = got
        sent.append(number)
        place.sent()
        if number % 3 == 0:
            place.abandon()
            return "gave up"
        place.land(ANSWER)
        return "sent"

    with ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(call, range(12)))
    assert len(flights) == 0
    assert all(end in ("left", "served", "gave up", "sent") for end in ends)


def test_finalizer_that_interrupts_the_flights_does_not_block():
    """A dying task may give up its lead while its own thread is inside the lock."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    with flights._lock:
        lead.abandon()
        assert not waiter.future.done()
    flights.join("another key")  # whoever comes next sees to it
    assert isinstance(news(waiter), Lead)


class Dying:
    """Gives up its place in the garbage collector."""

    def __init__(self, place):
        self.place = place
        self.me = self

    def __del__(self):
        self.place.abandon() if isinstance(self.place, Lead) else self.place.leave()


def test_places_can_die_at_any_moment():
    """With the collector running at every allocation nothing deadlocks and nobody is lost."""
    flights = flights_for()
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(200):
            Dying(flights.join("k"))
            Dying(flights.join("k"))
            place = flights.join("k")
            if number % 2:
                Dying(place)
            elif isinstance(place, Lead):
                place.land(ANSWER)
            else:
                place.leave()
            del place
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(flights) == 0


def test_renewed_flights_are_empty():
    """Who led or waited before the fork does so in the parent only."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    with flights._lock:
        flights.renew()
        assert len(flights) == 0
        own = flights.join("k")
    lead.land(ANSWER)
    assert isinstance(own, Lead)
    assert (len(flights), waiter.future.done()) == (1, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_waits_for_nobody_of_its_parent():
    """The parent's calls do not exist in the child, whoever held the lock at the fork."""
    flights = flights_for()
    lead, waiter = joined(flights, 1)
    holding, done = threading.Event(), threading.Event()

    def hold():
        with flights._lock:
            holding.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait(10)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            own = flights.join("k")
            lead.land(ANSWER)
            code = isinstance(own, Lead) and len(flights) == 1 and not waiter.future.done()
        finally:
            os._exit(code)
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    lead.land(ANSWER)
    assert news(waiter) == Landed(ANSWER)
