"""Requests and tokens per minute: an even rate, a short burst, reserve and reconcile."""

import math

import pytest

from dspy_resilient.errors import LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.policies import LimitPolicy
from dspy_resilient.testing.clock import Clock


@pytest.fixture
def clock():
    return Clock(1_000.0)


def limiter_for(clock, **policy):
    return Limiter(LimitPolicy(**policy), clock=clock)


def granted_now(limiter, tokens=0):
    """How many of 1000 newcomers go at once; the others give up."""
    slots = [limiter.enter(tokens) for _ in range(1000)]
    count = sum(slot.granted for slot in slots)
    for slot in reversed(slots):
        if not slot.granted:
            slot.release()
    return count


def test_burst_is_five_seconds_of_the_rate(clock):
    """A rested limiter lets five seconds' worth through at once."""
    assert granted_now(limiter_for(clock, rpm=600)) == 50


def test_slow_rate_still_lets_one_through(clock):
    """At three a minute the first call does not wait, the second waits 20 s."""
    limiter = limiter_for(clock, rpm=3)
    assert limiter.enter().granted
    waiter = limiter.enter()
    assert waiter.wait_time() == pytest.approx(20.0)


def test_burst_is_saved_only_once(clock):
    """A long rest saves no more than one burst."""
    limiter = limiter_for(clock, rpm=600)
    granted_now(limiter)
    clock.advance(3600)
    assert granted_now(limiter) == 50


def test_after_the_burst_calls_go_evenly(clock):
    """Past the burst one call goes each 60/rpm seconds."""
    limiter = limiter_for(clock, rpm=120)
    granted_now(limiter)
    times = []
    waiters = [limiter.enter() for _ in range(4)]
    for waiter in waiters:
        clock.advance(waiter.wait_time())
        assert waiter.poll()
        times.append(clock())
    assert times == pytest.approx([1000.5, 1001.0, 1001.5, 1002.0])


def test_wait_time_is_exact(clock):
    """A poll before the time fails, at the time succeeds."""
    limiter = limiter_for(clock, rpm=7)
    limiter.enter()
    waiter = limiter.enter()
    clock.advance(waiter.wait_time() - 0.001)
    assert not waiter.poll()
    clock.advance(waiter.wait_time())
    assert waiter.wait_time() == 0.0
    assert waiter.poll()


def test_only_the_head_has_a_time_to_wait(clock):
    """Those behind the head are woken when they are first."""
    limiter = limiter_for(clock, rpm=12)
    limiter.enter()
    head, behind = limiter.enter(), limiter.enter()
    assert (head.wait_time(), behind.wait_time()) == (pytest.approx(5.0), math.inf)
    clock.advance(head.wait_time())
    assert head.poll()
    assert behind.future.done()
    assert not behind.poll()
    assert behind.wait_time() == pytest.approx(5.0)


def test_head_that_gives_up_wakes_the_next(clock):
    """When the head is cancelled, the next one learns its time."""
    limiter = limiter_for(clock, rpm=12)
    limiter.enter()
    head, behind = limiter.enter(), limiter.enter()
    head.release()
    assert behind.future.done()
    assert not behind.poll()
    assert not behind.future.done()
    assert behind.wait_time() == pytest.approx(5.0)


def test_rate_grants_without_the_heads_help(clock):
    """Whoever comes by offers the head its turn, and does not take it."""
    limiter = limiter_for(clock, rpm=12)
    limiter.enter()
    head = limiter.enter()
    clock.advance(5.0)
    assert not limiter.enter().granted
    assert head.future.done()
    assert head.poll()


def test_place_freed_for_a_rate_bound_head_starts_its_time(clock):
    """A head that waited for a place, and now only for the rate, is told so."""
    limiter = limiter_for(clock, max_concurrent=1, rpm=12)
    busy, head = limiter.enter(), limiter.enter()
    assert head.wait_time() == math.inf
    busy.release()
    assert head.future.done()
    assert not head.poll()
    assert head.wait_time() == pytest.approx(5.0)


def test_tokens_are_reserved_by_estimate(clock):
    """Estimates are charged before anything is known."""
    limiter = limiter_for(clock, tpm=12_000)  # 200 a second, 1000 at once
    assert limiter.enter(600).granted
    waiter = limiter.enter(600)
    assert waiter.wait_time() == pytest.approx(1.0)


def test_unused_tokens_are_given_back(clock):
    """A short answer frees what was reserved for a long one, and the head hears of it."""
    limiter = limiter_for(clock, tpm=12_000)
    slot, waiter = limiter.enter(1000), limiter.enter(1000)
    assert waiter.wait_time() == pytest.approx(5.0)
    slot.release(tokens=400)
    assert waiter.future.done()
    assert not waiter.poll()
    assert waiter.wait_time() == pytest.approx(2.0)


def test_tokens_used_beyond_the_estimate_are_debt(clock):
    """A longer answer than reserved is paid off before the next call goes."""
    limiter = limiter_for(clock, tpm=12_000)
    slot = limiter.enter(1000)
    slot.release(tokens=2000)
    waiter = limiter.enter(1)
    assert waiter.wait_time() == pytest.approx(5.0, abs=0.01)


def test_debt_found_during_a_wait_lengthens_it(clock):
    """A head that wakes at its old time is told the new one."""
    limiter = limiter_for(clock, tpm=12_000)
    slot, waiter = limiter.enter(1000), limiter.enter(200)
    wait = waiter.wait_time()
    slot.release(tokens=1200)
    clock.advance(wait)
    assert not waiter.poll()
    assert waiter.wait_time() == pytest.approx(1.0)


@pytest.mark.parametrize("usage", [None, -5, math.nan, math.inf, -math.inf])
def test_unknown_or_impossible_usage_leaves_the_estimate(clock, usage):
    """Rubbish from a provider neither frees tokens nor stops the client."""
    limiter = limiter_for(clock, tpm=12_000)
    limiter.enter(1000).release(tokens=usage)
    waiter = limiter.enter(1000)
    assert waiter.wait_time() == pytest.approx(5.0)
    clock.advance(waiter.wait_time())
    assert waiter.poll()


def test_attempt_that_was_not_sent_costs_nothing(clock):
    """What was never sent gives request and tokens back, whatever is said of them."""
    limiter = limiter_for(clock, rpm=12, tpm=12_000)
    limiter.enter(1000).release(sent=False, tokens=500)
    assert limiter.enter(1000).granted


def test_cancelled_waiter_costs_nothing(clock):
    """Neither one in the queue nor one just offered its turn spends any of the rate."""
    limiter = limiter_for(clock, max_concurrent=1, rpm=24, tpm=12_000)
    busy, offered, queued = limiter.enter(100), limiter.enter(900), limiter.enter(900)
    queued.release()
    busy.release()
    assert offered.future.done()
    offered.release()
    assert limiter.enter(900).granted


def test_sent_attempts_keep_their_request_when_they_fail(clock):
    """A failed request was a request all the same."""
    limiter = limiter_for(clock, rpm=12, tpm=12_000)
    limiter.enter(1000).release(tokens=0, ok=False)
    waiter = limiter.enter(1000)
    assert waiter.wait_time() == pytest.approx(5.0)


def test_request_larger_than_the_burst_goes_when_the_rate_is_full(clock):
    """What can never fit goes alone, and is paid off afterwards."""
    limiter = limiter_for(clock, tpm=12_000)
    assert limiter.enter(200).granted
    large = limiter.enter(5000)
    assert large.wait_time() == pytest.approx(1.0)
    clock.advance(large.wait_time())
    assert large.poll()
    after = limiter.enter(200)
    assert after.wait_time() == pytest.approx(21.0)


def test_small_request_does_not_overtake_a_large_one(clock):
    """A large request at the head is not starved by small ones behind it."""
    limiter = limiter_for(clock, tpm=12_000)
    limiter.enter(800)
    large, small = limiter.enter(1000), limiter.enter(1)
    assert not small.granted
    clock.advance(large.wait_time())
    assert not small.poll()
    assert large.poll()


def test_negative_estimate_reserves_nothing(clock):
    """A nonsensical estimate frees no tokens."""
    limiter = limiter_for(clock, tpm=12_000)
    assert limiter.enter(1000).granted
    assert limiter.enter(-500).granted
    assert not limiter.enter(1).granted


def test_both_rates_hold(clock):
    """Requests and tokens are limited together; the scarcer one decides."""
    limiter = limiter_for(clock, rpm=60, tpm=12_000)
    assert granted_now(limiter, tokens=500) == 2
    clock.advance(5)
    assert granted_now(limiter, tokens=1) == 5


@pytest.mark.parametrize(
    ("policy", "tokens"), [({"rpm": 60}, 0), ({"tpm": 600}, 10), ({"rpm": 3}, 0), ({"tpm": 60}, 40)]
)
def test_who_cannot_wait_so_long_is_refused_at_once_and_told_how_long(clock, policy, tokens):
    """The wait behind the whole queue, to the second; nothing is taken."""
    limiter = limiter_for(clock, **policy)
    slots = [limiter.enter(tokens) for _ in range(12)]
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter(tokens, patience=0.5)
    wait = caught.value.retry_after
    assert limiter.queued == sum(not slot.granted for slot in slots)
    last = limiter.enter(tokens, patience=wait + 0.001)
    began = clock()
    for slot in [*slots, last]:
        if not slot.granted:
            clock.advance(slot.wait_time())
            assert slot.poll()
    assert clock() - began == pytest.approx(wait)


def test_patience_covers_a_queue_of_unequal_requests(clock):
    """What those ahead have asked for counts, and what they give back."""
    limiter = limiter_for(clock, tpm=600)  # 10 a second, 50 at once
    limiter.enter(50)
    waiters = [limiter.enter(tokens) for tokens in (10, 30, 20)]
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter(10, patience=6.9)
    assert caught.value.retry_after == pytest.approx(7.0)
    waiters[1].release()
    assert limiter.enter(10, patience=4.1).future is not None
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter(10, patience=4.0)
    assert caught.value.retry_after == pytest.approx(5.0)


def test_a_place_is_waited_for_as_nobody_knows_how_long(clock):
    """How long those under way will take is not held against anybody."""
    limiter = limiter_for(clock, max_concurrent=1, rpm=600)
    limiter.enter()
    assert not limiter.enter(patience=0.0).granted
    assert limiter.queued == 1
