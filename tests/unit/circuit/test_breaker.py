"""What opens a circuit, when a probe goes, what closes it again, and what it tells."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle

import pytest

from dspy_resilient.circuit import CircuitBreaker, CircuitState
from dspy_resilient.errors import CircuitOpenError
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened
from dspy_resilient.outcomes import Outcome
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.testing import Clock

SECRET = "sk-abc123DEF456ghi789"


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def make(clock):
    """Build a circuit on the test's clock, without jitter and with round numbers."""

    def build(policy=None, *, random=lambda: 0.5, listener=None, client="", hint=60.0, **fields):
        policy = CircuitPolicy(**{"backoff": 2.0, **fields}) if policy is None else policy
        return CircuitBreaker(
            policy, name="c", clock=clock, random=random, listener=listener, client=client,
            longest_hint=hint,
        )  # fmt: skip

    return build


def fail(breaker, times=1, **report):
    for _ in range(times):
        breaker.admit().failure(**report)


def succeed(breaker, times=1):
    for _ in range(times):
        breaker.admit().success()


def open_up(breaker):
    """Fail the circuit open."""
    fail(breaker, breaker.policy.failure_threshold)
    assert breaker.opened


def recover(breaker, clock):
    clock.advance(breaker.open_remaining)
    succeed(breaker)
    assert breaker.closed


def run_that_opens(breaker):
    """Fail until it opens, and return how many failures that took."""
    for number in range(1, 200):
        fail(breaker)
        if breaker.opened:
            return number
    return math.inf


# What opens it


def test_consecutive_failures_open_it(make):
    """`failure_threshold` failures in a row open it, and not one less."""
    breaker = make(failure_threshold=3)
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"
    assert breaker.try_admit() is None


def test_a_success_starts_the_count_again(make):
    """Only failures in a row count for the threshold."""
    breaker = make(failure_threshold=3)
    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)
    assert breaker.closed
    assert breaker.failure_count == 2


def test_defaults_open_it_after_five_failures_in_a_row(make):
    """Without experience, and after any number of answers, the fifth in a row opens it."""
    assert run_that_opens(make()) == 5
    seasoned = make()
    succeed(seasoned, 10_000)
    assert run_that_opens(seasoned) == 5


def alternate(breaker, pattern, times):
    """Let failures ("x") and successes ("o") come in the order of `pattern`, again and again."""
    for each in pattern * times:
        fail(breaker) if each == "x" else succeed(breaker)


@pytest.mark.parametrize(
    ("pattern", "need"), [("o", 5), ("xoooo", 6), ("xo", 14), ("xxo", 23), ("xxxxo", 40)]
)
def test_where_failures_are_common_a_longer_run_opens_it(make, pattern, need):
    """As many in a row as chance brings less than once in 10,000 times, at the recent share."""
    breaker = make()
    alternate(breaker, pattern, 300 // len(pattern))
    assert breaker.closed
    assert run_that_opens(breaker) == pytest.approx(need, abs=1)


def test_no_share_of_failures_needs_more_than_a_hundred(make):
    """A provider that hardly ever answered is left alone all the same when it is gone."""
    breaker = make()
    alternate(breaker, "x" * 4 + "o", 10)
    for length in (*range(5, 60, 5), *[90] * 10):
        alternate(breaker, "x" * length + "o", 1)
    assert run_that_opens(breaker) == 100


def test_the_threshold_holds_where_it_is_larger(make):
    """`surprise` asks for more failures than `failure_threshold`, never for fewer."""
    assert run_that_opens(make(failure_threshold=150)) == 150
    assert run_that_opens(make(failure_threshold=9)) == 9


@pytest.mark.parametrize(("surprise", "need"), [(1.0, 5), (1e-2, 7), (1e-8, 28), (0.0, math.inf)])
def test_surprise_says_how_improbable_a_run_must_be(make, surprise, need):
    """1 takes any run of `failure_threshold`, 0 none ever."""
    breaker = make(surprise=surprise)
    for _ in range(150):
        fail(breaker)
        succeed(breaker)
    assert run_that_opens(breaker) == pytest.approx(need, abs=1)


def test_experience_fades_with_about_fifty_verdicts(make):
    """Once the provider answers again, five failures are news soon."""
    breaker = make()
    for _ in range(100):
        fail(breaker)
        succeed(breaker)
    succeed(breaker, 100)
    assert run_that_opens(breaker) == 5


def test_a_run_does_not_excuse_itself(make):
    """The share of failures is that from before the run, however long the run gets."""
    breaker = make()
    for _ in range(30):
        fail(breaker)
        succeed(breaker)
    need = run_that_opens(breaker)
    assert 5 < need < 14


def test_an_outage_hardly_counts_as_experience(make, clock):
    """However long it was, the next one is noticed about as quickly."""
    breaker = make()
    open_up(breaker)
    for _ in range(500):
        clock.advance(breaker.open_remaining)
        fail(breaker)
    recover(breaker, clock)
    assert run_that_opens(breaker) == 5


def test_neutral_outcomes_alone_never_open_it(make):
    """Traffic of nothing but bad requests says nothing about the provider."""
    breaker = make()
    for _ in range(200):
        breaker.admit().neutral()
    assert breaker.closed


def test_neutral_outcomes_count_nowhere(make):
    """A neutral outcome neither counts, nor resets the count, nor is experience."""
    breaker = make(failure_threshold=3)
    fail(breaker, 2)
    for _ in range(50):
        breaker.admit().neutral()
    assert breaker.failure_count == 2
    fail(breaker)
    assert breaker.opened


def test_half_of_all_calls_may_fail_for_ever(make):
    """No rate opens it unless asked for."""
    breaker = make()
    for _ in range(3000):
        fail(breaker)
        succeed(breaker)
    assert breaker.closed


def test_billing_failure_opens_at_once(make):
    """One failure for want of money is enough, and says so."""
    breaker = make()
    fail(breaker, reason="billing")
    assert breaker.opened
    assert breaker.reason == "billing"
    assert breaker.rejection().reason == "billing"


def test_reason_of_counted_failures_reaches_the_opening(make):
    """Three refused credentials in a row open a circuit that counts those, as "auth"."""
    breaker = make(failure_threshold=3)
    fail(breaker, 2, reason="auth")
    assert breaker.closed
    fail(breaker, reason="auth")
    assert breaker.reason == "auth"


# The rules that are asked for


RATE = {"surprise": 0.0, "failure_threshold": 2, "failure_rate": 0.5, "min_calls": 10}


def test_failure_rate_opens_it(make):
    """Half of ten verdicts in the window is too much, though never five in a row."""
    breaker = make(**RATE)
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    succeed(breaker)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


def test_failure_rate_needs_enough_calls(make):
    """One failed request is no rate."""
    breaker = make(**RATE)
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    fail(breaker)
    assert breaker.closed


def test_failure_rate_needs_enough_failures(make):
    """`failure_threshold` of them."""
    breaker = make(**{**RATE, "failure_threshold": 3, "min_calls": 1})
    fail(breaker, 2)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


def test_old_verdicts_leave_the_window(make, clock):
    """What lies further back than `window` seconds counts for no rate."""
    breaker = make(**RATE, window=60.0)
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    clock.advance(61)
    succeed(breaker)
    fail(breaker)
    assert breaker.closed


def test_window_moves_on_bucket_by_bucket(make, clock):
    """Verdicts age one by one, not all at once."""
    breaker = make(**RATE, window=60.0)
    for _ in range(5):
        fail(breaker)
        clock.advance(10)
    clock.advance(11)
    succeed(breaker, 6)  # the first failure is too old by now: 4 of 10
    fail(breaker)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


@pytest.mark.parametrize("rest", [1, 59, 61, 600, 1e9])
def test_window_survives_any_rest(make, clock, rest):
    """However long nothing happens, the counts stay right."""
    breaker = make(**RATE)
    fail(breaker, 9)
    clock.advance(rest)
    fail(breaker)
    assert breaker.opened is (rest < 60)


def test_closed_again_starts_with_an_empty_window(make, clock):
    """The failures of the outage are not counted again after it."""
    breaker = make(**RATE, window=1000.0)
    for _ in range(5):
        succeed(breaker)
        fail(breaker)
    assert breaker.opened
    recover(breaker, clock)
    fail(breaker, 9)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


@pytest.mark.parametrize("pause", [61, 116])
def test_what_has_left_the_window_counts_no_more(make, clock, pause):
    """Neither calls, nor failures, nor slow ones: the rates are those of the window."""
    breaker = make(
        failure_threshold=9, failure_rate=1.0, window=60.0, min_calls=4, slow_call=1.0, slow_rate=0.5
    )  # fmt: skip

    def slow():
        permit = breaker.admit()
        clock.advance(1)
        permit.success()

    fail(breaker)
    slow()
    slow()
    clock.advance(pause)
    succeed(breaker, 3)
    slow()
    slow()
    assert breaker.state == "closed"
    slow()
    assert (breaker.state, breaker.reason) == ("open", "slow")


def test_verdict_on_the_edge_of_a_bucket_belongs_to_the_later_one(make, clock):
    """It is kept for the whole `window`."""
    breaker = make(surprise=0.0, failure_threshold=1, window=60.0, min_calls=2, failure_rate=0.5)
    clock.advance(5)  # a bucket later, to the moment
    succeed(breaker)
    clock.advance(57)
    fail(breaker)
    assert breaker.state == "open"


def test_slow_calls_open_it(make, clock):
    """Where `slow_call` is set, too many slow answers open it."""
    breaker = make(slow_call=10.0, window=1000.0)
    succeed(breaker, 2)
    for _ in range(7):
        permit = breaker.admit()
        clock.advance(10)
        permit.success()
    assert breaker.closed
    permit = breaker.admit()
    clock.advance(10)
    permit.success()
    assert breaker.opened
    assert breaker.reason == "slow"


def test_slow_calls_are_successes_to_the_failure_counts(make, clock):
    """A slow answer is an answer: it breaks a row of failures."""
    breaker = make(slow_call=10.0, failure_threshold=2)
    fail(breaker)
    permit = breaker.admit()
    clock.advance(20)
    permit.success()
    fail(breaker)
    assert breaker.closed


def test_without_slow_call_nothing_is_slow(make, clock):
    """Slowness is off by default."""
    breaker = make()
    for _ in range(20):
        permit = breaker.admit()
        clock.advance(3600)
        permit.success()
    assert breaker.closed


def test_a_slow_probe_closes_nothing(make, clock):
    """Where slowness counts, a provider that is still slow has not recovered; a quick probe shows it."""
    breaker = make(slow_call=3.0)
    open_up(breaker)
    clock.advance(1)
    permit = breaker.admit()
    clock.advance(3)
    permit.success()
    assert not breaker.closed
    recover(breaker, clock)


# The classic fuse


def test_fuse_blows_at_the_fifth_failure_within_ten_seconds(make, clock):
    """Whatever succeeded meanwhile."""
    breaker = make(CircuitPolicy.fuse())
    for _ in range(4):
        fail(breaker)
        succeed(breaker, 500)
        clock.advance(2.5)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


def test_fuse_bears_fewer_for_ever(make, clock):
    """Five failures that take longer than ten seconds blow nothing, though nothing succeeds."""
    breaker = make(CircuitPolicy.fuse())
    for _ in range(200):
        fail(breaker)
        clock.advance(2.51)
    assert breaker.closed


def test_fuse_is_tried_after_5_10_20_40_and_60_seconds(make, clock):
    """And is whole again with the first answer."""
    breaker = make(CircuitPolicy.fuse())
    open_up(breaker)
    waits = []
    for _ in range(6):
        waits.append(breaker.open_remaining)
        clock.advance(breaker.open_remaining)
        fail(breaker)
    assert waits == [5, 10, 20, 40, 60, 60]
    recover(breaker, clock)
    fail(breaker, 4)
    assert breaker.closed


def test_fuse_takes_its_own_numbers(make, clock):
    """Failures, seconds, recovery time and backoff."""
    breaker = make(CircuitPolicy.fuse(2, 1.0, recovery_time=90.0, backoff=1.0))
    fail(breaker)
    clock.advance(1.01)
    fail(breaker)
    assert breaker.closed
    clock.advance(0.99)
    fail(breaker)
    assert breaker.open_remaining == 90
    clock.advance(90)
    fail(breaker)
    assert breaker.open_remaining == 90


@pytest.mark.parametrize("name", ["failures", "seconds", "recovery_time", "backoff"])
def test_fuse_refuses_nonsense_by_name(name):
    """The message names the argument of the fuse, not a field that it becomes."""
    with pytest.raises(ValueError, match=rf"^CircuitPolicy\.fuse: {name} must be .*got 0"):
        CircuitPolicy.fuse(**{name: 0})


# When a probe goes


def test_probes_go_1_2_4_and_5_seconds_after_each_other(make, clock):
    """Counted from the sending of the one before, whether or not that has ended."""
    breaker = make()
    open_up(breaker)
    waits, hanging = [], []
    for _ in range(6):
        waits.append(breaker.wait_time())
        clock.advance(breaker.wait_time())
        hanging.append(breaker.admit())
        assert hanging[-1].probe
        assert breaker.try_admit() is None
    assert waits == [1, 2, 4, 5, 5, 5]


def test_probes_go_by_default_after_1_and_half_as_long_again_up_to_5_seconds(make, clock):
    """Quickly at first, for most outages are short."""
    breaker = make(CircuitPolicy())
    open_up(breaker)
    waits = []
    for _ in range(6):
        waits.append(breaker.wait_time())
        clock.advance(breaker.wait_time())
        breaker.admit()
    assert waits == [1, 1.5, 2.25, 3.375, 5, 5]


@pytest.mark.parametrize("end", ["failure", "neutral", None])
def test_what_becomes_of_a_probe_moves_no_other(make, clock, end):
    """Failed, neutral, hanging or lost: the next goes at its time."""
    breaker = make()
    open_up(breaker)
    clock.advance(1)
    probe = breaker.admit()
    clock.advance(0.5)
    if end is not None:
        getattr(probe, end)()
    assert breaker.wait_time() == 1.5
    clock.advance(1.5)
    assert breaker.admit().probe


def test_each_opening_begins_with_the_shortest_interval(make, clock):
    """Nothing is held against a provider that has answered."""
    breaker = make()
    for _ in range(3):
        open_up(breaker)
        assert breaker.wait_time() == 1
        clock.advance(1)
        fail(breaker)
        assert breaker.wait_time() == 2
        recover(breaker, clock)
        succeed(breaker, 50)


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.8), (0.5, 1.0), (0.999999, 1.2)])
def test_intervals_are_jittered(make, clock, draw, factor):
    """Each varies by `jitter` to either side."""
    breaker = make(random=lambda: draw)
    open_up(breaker)
    for seconds in (1, 2, 4, 5, 5):
        assert breaker.wait_time() == pytest.approx(seconds * factor, rel=1e-4)
        clock.advance(breaker.wait_time())
        breaker.admit()


@pytest.mark.parametrize(
    ("backoff", "longest"), [(1.0, 5.0), (1.0, 300.0), (1e300, 1e300), (1 + 1e-15, 6.0)]
)
def test_every_allowed_backoff_works(make, clock, backoff, longest):
    """No allowed policy overflows or leaves the bounds."""
    breaker = make(recovery_time=5.0, backoff=backoff, max_recovery_time=longest)
    open_up(breaker)
    for _ in range(2000):
        clock.advance(breaker.wait_time())
        breaker.admit()
        assert 5 <= breaker.wait_time() <= longest * (1 + 1e-9)


def test_a_recovery_time_beyond_the_longest_is_every_interval(make, clock):
    """`CircuitPolicy(recovery_time=30)` needs no second number."""
    breaker = make(recovery_time=30.0)
    open_up(breaker)
    for _ in range(3):
        assert breaker.wait_time() == 30
        clock.advance(30)
        breaker.admit()


def test_retry_after_is_a_floor(make):
    """A provider that asks for longer is left alone for longer."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=42)
    assert breaker.open_remaining == 42


def test_retry_after_of_a_failed_probe_is_a_floor_too(make, clock):
    """It holds back the next probe, and never brings it forward."""
    breaker = make(failure_threshold=1)
    fail(breaker)
    clock.advance(1)
    fail(breaker, retry_after=30)
    assert breaker.open_remaining == 30
    clock.advance(30)
    fail(breaker, retry_after=0.5)
    assert breaker.open_remaining == 4


def test_retry_after_is_no_ceiling(make):
    """A shorter hint shortens nothing."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=0.25)
    assert breaker.open_remaining == 1


def test_retry_after_is_clamped(make):
    """No provider keeps a circuit open for longer than `longest_hint`."""
    breaker = make(failure_threshold=1, hint=50)
    fail(breaker, retry_after=86_400)
    assert breaker.open_remaining == 50


@pytest.mark.parametrize("hint", [math.nan, -5, 0, None, "7", -math.inf])
def test_senseless_retry_after_is_ignored(make, hint):
    """Nonsense in a header does not reach the open time."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=hint)
    assert breaker.open_remaining == 1


def test_remaining_time_is_exact(make, clock):
    """Remaining time, rejection and waiting time are the same exact number."""
    breaker = make(failure_threshold=1)
    fail(breaker)
    clock.advance(0.25)
    assert breaker.open_remaining == 0.75
    assert breaker.wait_time() == 0.75
    assert breaker.rejection().retry_after == 0.75


def test_half_open_while_a_probe_is_due_or_under_way(make, clock):
    """Looking changes nothing."""
    heard = []
    breaker = make(failure_threshold=1, listener=heard.append)
    fail(breaker)
    assert breaker.state is CircuitState.OPEN
    clock.advance(1)
    assert breaker.state is CircuitState.HALF_OPEN
    assert not breaker.closed
    assert [type(event) for event in heard] == [CircuitOpened]
    first = breaker.admit()
    assert breaker.state is CircuitState.HALF_OPEN
    first.failure()
    assert breaker.state is CircuitState.OPEN
    clock.advance(2)
    second = breaker.admit()
    first.failure()
    assert breaker.state is CircuitState.HALF_OPEN
    second.neutral()
    assert breaker.state is CircuitState.OPEN


def test_only_an_open_circuit_gives_probes(make):
    """A call that is let through otherwise is no probe."""
    breaker = make()
    assert not breaker.admit().probe
    breaker.force_closed()
    assert not breaker.admit().probe
    breaker.force_half_open()
    assert breaker.admit().probe


# What closes it


def test_the_first_answered_probe_closes_it(make, clock):
    """One is enough, and nothing is counted then."""
    breaker = make()
    open_up(breaker)
    clock.advance(1)
    succeed(breaker)
    assert breaker.state == "closed"
    assert breaker.failure_count == 0


def test_a_probe_that_others_overtook_closes_it_too(make, clock):
    """A slow probe may answer when further ones have been sent, or have failed."""
    breaker = make()
    open_up(breaker)
    clock.advance(1)
    slow = breaker.admit()
    for _ in range(3):
        clock.advance(breaker.wait_time())
        fail(breaker)
    slow.success()
    assert breaker.closed


def test_a_hanging_probe_is_forgotten_once_another_attempt_is_answered(make, clock):
    """Closed is closed."""
    breaker = make()
    fail(breaker)
    under_way = breaker.admit()
    fail(breaker, 4)
    clock.advance(1)
    hanging = breaker.admit()
    under_way.success()
    assert breaker.state == "closed"
    hanging.failure()
    assert breaker.failure_count == 0


def test_an_attempt_that_began_within_the_run_closes_it(make, clock):
    """It was under way when the circuit opened: its answer is news that the provider answers."""
    breaker = make()
    fail(breaker)
    clock.advance(0.1)
    under_way = breaker.admit()
    fail(breaker, 4)
    assert breaker.opened
    under_way.success()
    assert breaker.closed


def test_an_attempt_that_began_before_the_run_says_nothing(make, clock):
    """Its answer may have been on its way when the provider went down."""
    breaker = make()
    before = breaker.admit()
    clock.advance(0.1)
    open_up(breaker)
    before.success()
    assert breaker.opened


def test_a_run_begins_with_the_attempt_that_failed_first(make, clock):
    """Not with its failure, which may come a time-out later."""
    breaker = make()
    clock.advance(1)
    first = breaker.admit()
    clock.advance(1)
    within = breaker.admit()
    clock.advance(30)
    first.failure()
    fail(breaker, 4)
    within.success()
    assert breaker.closed


@pytest.mark.parametrize("report", ["failure", "neutral"])
def test_late_failures_change_nothing(make, clock, report):
    """A failure from before the circuit opened neither prolongs it nor leaves a text."""
    breaker = make()
    late = breaker.admit()
    open_up(breaker)
    clock.advance(0.25)
    before = breaker.failure_count, breaker.last_error
    getattr(late, report)()
    assert breaker.open_remaining == 0.75
    assert (breaker.failure_count, breaker.last_error) == before


def test_failures_of_an_earlier_closed_time_are_stale(make, clock):
    """Closed again is another generation: what failed in the outage opens nothing after it."""
    breaker = make()
    late = [breaker.admit() for _ in range(50)]
    open_up(breaker)
    recover(breaker, clock)
    for permit in late:
        permit.failure()
    assert breaker.closed
    assert breaker.failure_count == 0


def test_answers_of_an_earlier_closed_time_count(make, clock):
    """An answer is an answer: it breaks a run, and is experience."""
    breaker = make()
    late = breaker.admit()
    open_up(breaker)
    recover(breaker, clock)
    fail(breaker, 4)
    late.success()
    assert breaker.failure_count == 0


# Permits


def test_first_report_counts(make):
    """A permit reports exactly once."""
    breaker = make(failure_threshold=2)
    permit = breaker.admit()
    permit.failure()
    permit.success()
    permit.failure()
    assert breaker.failure_count == 1


def test_block_without_report_is_neutral(make):
    """Leaving a permit's block without a report says nothing, error or not."""
    breaker = make(failure_threshold=2)
    fail(breaker)
    with breaker.admit():
        pass
    with pytest.raises(KeyError), breaker.admit():
        raise KeyError
    assert breaker.failure_count == 1


def test_reported_block_keeps_its_report(make):
    """The end of the block overrules no report."""
    breaker = make(failure_threshold=2)
    with breaker.admit() as permit:
        permit.failure()
    assert permit.reported
    assert breaker.failure_count == 1


# By hand


def test_trip_opens_as_a_failure_would(make, clock):
    """Probes go, and what is answered closes it; what began before it closes nothing."""
    breaker = make()
    before = breaker.admit()
    clock.advance(0.5)
    breaker.trip("deploy", error="host is gone")
    before.success()
    assert breaker.open_remaining == 1
    assert (breaker.reason, breaker.last_error) == ("deploy", "host is gone")
    clock.advance(1)
    breaker.trip()
    assert breaker.open_remaining == 1
    recover(breaker, clock)


def test_trip_of_an_open_circuit_only_takes_longer_hints(make):
    """Tripping again moves the time only for an explicit, longer pause."""
    breaker = make()
    breaker.trip("first")
    breaker.trip("second")
    assert (breaker.open_remaining, breaker.reason) == (1, "first")
    breaker.trip(retry_after=0.5)
    assert breaker.open_remaining == 1
    breaker.trip(retry_after=50)
    assert breaker.open_remaining == 50


@pytest.mark.parametrize("switch", ["force_open", "force_closed"])
def test_forced_states_beat_a_trip(make, switch):
    """What somebody has forced stays."""
    breaker = make()
    getattr(breaker, switch)()
    before = breaker.state
    breaker.trip()
    assert breaker.state is before


def test_forced_open_refuses_without_end(make, clock):
    """`force_open` holds until `auto` or `reset`, and nobody can say how long."""
    breaker = make()
    breaker.force_open("maintenance")
    clock.advance(1e6)
    assert breaker.state is CircuitState.FORCED_OPEN
    assert breaker.opened
    assert breaker.wait_time() == math.inf
    rejection = breaker.rejection()
    assert (rejection.reason, rejection.retry_after) == ("maintenance", None)
    assert "forced open (maintenance): it stays so until auto() or reset()" in str(rejection)


def test_no_answer_ends_what_was_forced(make):
    """An attempt that is answered meanwhile closes nothing."""
    breaker = make()
    breaker.force_half_open()
    probe = breaker.admit()
    breaker.force_open()
    probe.success()
    assert breaker.state is CircuitState.FORCED_OPEN


def test_forced_open_for_a_time_ends_with_a_probe(make, clock):
    """After the given seconds probes decide, and an answer to an older request does not."""
    breaker = make()
    older = breaker.admit()
    clock.advance(1)
    breaker.force_open(seconds=30)
    clock.advance(29)
    assert breaker.wait_time() == 1
    clock.advance(1)
    assert breaker.state == "half_open"
    probe = breaker.admit()
    assert probe.probe
    assert breaker.wait_time() == 2
    older.success()
    assert not breaker.closed
    probe.success()
    assert breaker.closed


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_forced_open_time_must_make_sense(make, seconds):
    """Bad arguments are refused by name."""
    with pytest.raises(ValueError, match=r"^CircuitBreaker.force_open: seconds must"):
        make().force_open(seconds=seconds)


def test_forced_closed_lets_everything_through_and_still_counts(make):
    """`force_closed` counts, opens for nothing, and what it counted breaks nothing later."""
    breaker = make()
    breaker.force_closed()
    fail(breaker, 50, reason="billing")
    assert breaker.state is CircuitState.FORCED_CLOSED
    assert breaker.closed
    assert breaker.failure_count == 50
    fail(breaker, 100_000)
    breaker.auto()
    assert run_that_opens(breaker) == 100


def test_auto_ends_what_was_forced(make):
    """From forced open probes decide, from forced closed it is closed."""
    breaker = make()
    breaker.force_open()
    breaker.auto()
    assert breaker.state == "half_open"
    breaker.force_closed()
    breaker.auto()
    assert breaker.state == "closed"


def test_auto_leaves_the_rest_alone(make):
    """Nothing forced, nothing to end."""
    breaker = make()
    breaker.trip()
    breaker.auto()
    assert breaker.opened


@pytest.mark.parametrize("switch", ["trip", "force_open"])
def test_whoever_gives_no_reason_did_it_by_hand(make, switch):
    """And it can be read."""
    breaker = make()
    getattr(breaker, switch)()
    assert breaker.reason == "manual"


def test_force_half_open_lets_a_probe_through_now(make, clock):
    """No caller need wait for the next; the intervals begin anew."""
    breaker = make()
    before = breaker.admit()
    breaker.trip(retry_after=60)
    clock.advance(1)
    breaker.force_half_open()
    before.success()
    assert breaker.state == "half_open"
    probe = breaker.admit()
    assert probe.probe
    assert breaker.wait_time() == 2
    probe.success()  # at the very moment
    assert breaker.closed


def test_reset_forgets_everything(make, clock):
    """After `reset` it is as new."""
    breaker = make()
    for _ in range(100):
        fail(breaker, 3)
        succeed(breaker)
    breaker.trip()
    breaker.reset()
    assert breaker.state == "closed"
    assert breaker.failure_count == 0
    assert (breaker.reason, breaker.last_error) == (None, None)
    assert run_that_opens(breaker) == 5


def test_observe_counts_and_reports_but_never_blocks(make, clock):
    """`mode="observe"` shows what would have happened."""
    heard = []
    breaker = make(mode="observe", listener=heard.append)
    open_up(breaker)
    assert breaker.wait_time() == 0
    assert breaker.enlist().done()
    succeed(breaker, 7)
    assert breaker.rejected == 7
    assert breaker.open_remaining == 1
    clock.advance(1)
    succeed(breaker)
    assert [type(event) for event in heard] == [CircuitOpened, CircuitHalfOpened, CircuitClosed]


# Waiting


def test_those_who_wait_are_let_go_over_half_of_the_recovery_time(make, clock):
    """Each is told its own number of seconds."""
    draws = [0.999, 0.25]
    breaker = make(jitter=0.0, recovery_time=4.0, random=lambda: draws.pop() if draws else 0.5)
    open_up(breaker)
    clock.advance(4)
    probe = breaker.admit()
    waiters = [breaker.enlist() for _ in range(2)]
    draws[:] = [0.999, 0.25]
    assert not any(waiter.done() for waiter in waiters)
    probe.success()
    assert [waiter.result(0) for waiter in waiters] == [0.5, pytest.approx(1.998)]


def test_a_hand_that_lets_a_probe_go_sends_all_who_wait_to_ask(make):
    """They have been told of a longer wait, or of none."""
    breaker = make()
    breaker.force_open()
    waiters = [breaker.enlist() for _ in range(3)]
    breaker.auto()
    assert [waiter.result(0) for waiter in waiters] == [0, 0, 0]


# Copies


def test_a_copy_is_the_same_circuit(make):
    """A program that holds one may be copied as programs are."""
    breaker = make()
    assert copy.copy(breaker) is breaker
    assert copy.deepcopy({"lm": [breaker]})["lm"][0] is breaker


def test_pickling_is_refused_with_advice(make):
    """The message says what to do in its place."""
    with pytest.raises(TypeError, match=r"CircuitBreaker: cannot be pickled.*`policy`.*shared="):
        pickle.dumps(make())


# What it tells


def test_rejection_says_who_why_and_until_when(make):
    """The error of a refused call is fresh and carries the facts."""
    breaker = make(failure_threshold=1, client="fast")
    fail(breaker, error=TimeoutError("no answer"))
    with pytest.raises(CircuitOpenError) as caught:
        breaker.admit()
    error = caught.value
    assert (error.client, error.reason, error.retry_after) == ("fast", "failures", 1.0)
    assert error.last_error == "TimeoutError: no answer"
    says = f"circuit {breaker.name!r} is open (failures): try again in 1.0 s"
    assert str(error).startswith(says)
    assert breaker.rejection() is not error


def test_rejection_while_a_probe_is_under_way_knows_when_the_next_goes(make, clock):
    """However long that one takes."""
    breaker = make()
    open_up(breaker)
    clock.advance(1)
    breaker.admit()
    assert breaker.rejection().retry_after == 2
    assert "half open (failures): try again in 2.0 s" in str(breaker.rejection())


def test_refused_calls_are_counted(make):
    """The number of refused calls is known."""
    breaker = make(failure_threshold=1)
    fail(breaker)
    for _ in range(3):
        breaker.try_admit()
    assert breaker.rejected == 3


def test_last_error_is_a_redacted_text(make):
    """The failure leaves a text without credentials, never the exception."""

    class ServerError(Exception):
        status = 503

    breaker = make()
    fail(breaker, error=ServerError(f"bad\n key {SECRET} " + "x" * 500))
    assert breaker.last_error.startswith("ServerError 503: bad key *** xxx")
    assert SECRET[:8] not in breaker.last_error
    assert len(breaker.last_error) < 250


@pytest.mark.parametrize("attribute", ["status", "status_code"])
def test_last_error_has_the_status_whatever_it_is_called(make, attribute):
    """DSPy's errors have one, the SDKs' the other."""
    error = ConnectionError("gone")
    setattr(error, attribute, 503)
    breaker = make()
    fail(breaker, error=error)
    assert breaker.last_error == "ConnectionError 503: gone"


def test_long_text_is_cut(make):
    """200 characters are kept, and what follows is hinted at."""
    breaker = make()
    fail(breaker, error="word " * 39 + "words")
    assert breaker.last_error == "word " * 39 + "words"
    fail(breaker, error="word " * 39 + "words!")
    assert breaker.last_error == "word " * 39 + "words..."


def test_given_text_is_redacted_too(make):
    """A text in place of an exception gets no better treatment."""
    breaker = make()
    fail(breaker, error=f"refused {SECRET}")
    assert breaker.last_error == "refused ***"


def test_broken_exceptions_do_no_harm(make):
    """An exception that cannot be shown is still a failure."""

    class BrokenError(Exception):
        def __str__(self):
            raise RuntimeError

    breaker = make()
    fail(breaker, error=BrokenError())
    assert breaker.last_error == "BrokenError"
    assert breaker.failure_count == 1


def test_explain_says_what_why_and_until_when(make, clock):
    """In words for people."""
    breaker = make()
    fail(breaker, 2)
    assert breaker.explain() == "closed for 0.0 s, with 2 failures in a row"
    fail(breaker, 3, error="gone")
    assert breaker.explain() == "open for 0.0 s (failures), for 1.0 s more; last error: gone"
    clock.advance(1)
    assert "half open for 1.0 s (failures), until a probe is answered" in breaker.explain()
    breaker.force_open()
    assert breaker.explain() == "forced open for 0.0 s (manual), until auto() or reset()"


@pytest.mark.parametrize("leave", ["open", "force_half_open", "force_open"])
def test_closing_tells_how_long_it_was_not_closed(make, clock, leave):
    """Counted from when it last left closed, however that came about."""
    closings = []
    breaker = make(listener=closings.append)
    for _ in range(2):
        clock.advance(100)
        if leave == "open":
            open_up(breaker)
        elif leave == "force_half_open":
            breaker.force_half_open()
        else:
            breaker.force_open(seconds=7)
        clock.advance(10)
        recover(breaker, clock)
    assert [each.seconds for each in closings if isinstance(each, CircuitClosed)] == [10, 10]


def test_since_is_when_it_last_changed(make, clock):
    """From the beginning on."""
    breaker = make()
    assert breaker.since == 1000
    clock.advance(5)
    breaker.trip()
    clock.advance(5)
    assert breaker.since == 1005


def test_events_tell_every_change_in_order(make, clock):
    """Opened, each probe, closed; with the times."""
    heard = []
    breaker = make(listener=heard.append, client="fast")
    fail(breaker, 5, error=TimeoutError("slow"))
    clock.advance(1)
    fail(breaker, error="still down")
    clock.advance(2)
    succeed(breaker)
    facts = {"client": "fast", "target": "c"}
    assert heard == [
        CircuitOpened(
            at=1000, reason="failures", seconds=1, last_error="TimeoutError: slow", **facts
        ),
        CircuitHalfOpened(at=1001, **facts),
        CircuitHalfOpened(at=1003, **facts),
        CircuitClosed(at=1003, seconds=3, **facts),
    ]


def test_switching_by_hand_is_told(make):
    """A change by hand is a change."""
    heard = []
    breaker = make(listener=heard.append)
    for switch, event in {
        "force_open": CircuitOpened,
        "auto": CircuitHalfOpened,
        "force_closed": CircuitClosed,
        "force_half_open": CircuitHalfOpened,
        "reset": CircuitClosed,
        "trip": CircuitOpened,
    }.items():
        getattr(breaker, switch)()
        assert type(heard[-1]) is event
    assert len(heard) == 6
    assert heard[0].seconds == math.inf
    breaker.reset()
    breaker.force_closed()
    breaker.auto()
    assert len(heard) == 7


def test_a_probe_is_told_of_when_it_goes(make, clock):
    """Not only when it returns."""
    heard = []
    breaker = make(listener=heard.append)
    open_up(breaker)
    clock.advance(1)
    breaker.admit()
    assert type(heard[-1]) is CircuitHalfOpened


def test_failing_listener_breaks_nothing_and_is_logged_once(make, caplog):
    """A listener's fault reaches no call."""

    def listener(event):
        raise KeyError

    breaker = make(listener=listener, client="fast")
    with caplog.at_level(logging.ERROR, "dspy_resilient"):
        for _ in range(3):
            breaker.trip()
            breaker.reset()
    assert breaker.closed
    (record,) = caplog.records
    assert (record.event, record.client) == ("dspy_resilient.listener_failed", "fast")
    assert record.exc_info[0] is KeyError


class Ear:
    def __init__(self):
        self.heard = []

    def hear(self, event):
        self.heard.append(type(event))


def test_every_listener_hears_each_change_once(make):
    """However often it was added; one that was removed hears nothing more."""
    first, second, third = [], Ear(), []
    breaker = make(listener=first.append)
    for _ in range(2):
        breaker.add_listener(second.hear)
    breaker.add_listener(third.append)
    breaker.trip()
    breaker.remove_listener(second.hear)
    breaker.remove_listener(print)
    breaker.reset()
    assert [type(event) for event in first] == [CircuitOpened, CircuitClosed]
    assert second.heard == [CircuitOpened]
    assert len(third) == 2


def test_a_listener_that_is_gone_is_no_concern(make):
    """A circuit keeps no client alive."""
    breaker, ear, heard = make(), Ear(), []
    breaker.add_listener(ear.hear)
    breaker.add_listener(heard.append)
    del ear
    gc.collect()
    assert not any(isinstance(each, Ear) for each in gc.get_objects())
    breaker.trip()
    assert len(heard) == 1


def test_a_listeners_fault_keeps_no_other_from_hearing(make, caplog):
    """Each is told apart."""
    heard = []

    def faulty(event):
        raise KeyError

    breaker = make(listener=faulty)
    breaker.add_listener(heard.append)
    breaker.trip()
    assert len(heard) == 1


def test_interrupt_in_a_listener_loses_no_permit(make, clock):
    """Ctrl-C may come while a listener runs; the probe is none then, and the next goes in time."""

    def listener(event):
        if isinstance(event, CircuitHalfOpened):
            raise KeyboardInterrupt

    breaker = make(listener=listener)
    open_up(breaker)
    clock.advance(1)
    with pytest.raises(KeyboardInterrupt):
        breaker.admit()
    assert (breaker.state, breaker.wait_time()) == ("open", 2)


def test_nameless_circuit_tells_no_name():
    """Neither its events nor its refusals do."""
    heard = []
    breaker = CircuitBreaker(CircuitPolicy(), listener=heard.append)
    breaker.trip()
    assert (heard[0].client, heard[0].target, breaker.rejection().client) == ("", None, "")
    assert str(breaker.rejection()).startswith("the circuit is open")


def test_listener_may_use_the_circuit(make):
    """No lock is held while a listener runs, and its own events come after."""
    heard = []

    def listener(event):
        heard.append((type(event), breaker.state))
        if isinstance(event, CircuitOpened):
            breaker.reset()
            heard.append("reset")

    breaker = make(listener=listener)
    breaker.trip()
    assert heard == [(CircuitOpened, "open"), "reset", (CircuitClosed, "closed")]


def test_words_are_those_of_the_vocabulary():
    """States and outcomes are strings that dashboards and shared stores may keep (12)."""
    assert list(CircuitState) == ["closed", "open", "half_open", "forced_open", "forced_closed"]
    assert list(Outcome) == ["success", "failure", "neutral"]


def test_repr_names_it_and_its_state(make):
    """A circuit can be read in a debugger."""
    breaker = make()
    assert repr(breaker) == f"<CircuitBreaker {breaker.name!r}: closed>"


def test_policy_and_package_arguments_exclude_each_other():
    """Nothing is accepted and ignored."""
    with pytest.raises(TypeError, match=r"^CircuitBreaker: .* fields of the policy"):
        CircuitBreaker(CircuitPolicy(), failure_threshold=3)
    with pytest.raises(TypeError, match=r"^CircuitBreaker: .* fields of the policy"):
        CircuitBreaker(CircuitPolicy(), 30)


def test_longest_hint_must_make_sense():
    """Bad arguments are refused by name."""
    with pytest.raises(ValueError, match=r"^CircuitBreaker: longest_hint must be"):
        CircuitBreaker(CircuitPolicy(), longest_hint=-1)
