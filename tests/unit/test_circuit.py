"""What opens a circuit, how long for, what closes it again, and what it tells.

Of the changes of one operator or constant in `machine.py`, those that no test notices change
nothing: first values that the first change of state sets anew, a failure counted as slow as well
(a window counts it once), `/` for `//` before `int`, and edges at which both sides come to the same
(a hint of 0, the opening at which the longest time is reached). Those of waiting and of early probes are
noticed in `test_circuit_crowd.py` and `test_early_probes.py`. In `breaker.py` they are: the jitter's
source, which is read where circuits are shared, a number that no generation has, the shortcut of a
closed circuit, a default lease below the shortest, and a default that every caller fills in; in
`describe.py` how much of an endless text is read; in `permit.py` `__slots__`; in `early.py` None for
False.
"""

from __future__ import annotations

import logging
import math

import pytest

from dspy_resilient.circuit import CircuitBreaker, CircuitState
from dspy_resilient.errors import CircuitOpenError
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened
from dspy_resilient.outcomes import Outcome
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.testing import Clock

SECRET = "sk-abc123DEF456ghi789"

# Round numbers, easier to follow than the defaults.
ROUND = {
    "window": 60.0,
    "failure_rate": 0.5,
    "recovery_time": 5.0,
    "backoff": 2.0,
    "max_recovery_time": 300.0,
}


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def make(clock):
    """Build a circuit on the test's clock, without jitter unless asked for."""

    def build(*, random=lambda: 0.5, listener=None, client="", **policy):
        return CircuitBreaker(
            CircuitPolicy(**{**ROUND, **policy}), name="c", clock=clock, random=random, listener=listener,
            client=client,
        )  # fmt: skip

    return build


def fail(breaker, times=1, **report):
    for _ in range(times):
        breaker.admit().failure(**report)


def succeed(breaker, times=1):
    for _ in range(times):
        breaker.admit().success()


def open_for(breaker, clock):
    """Fail the circuit open, and return for how long."""
    fail(breaker, breaker.policy.failure_threshold if breaker.closed else 1)
    return breaker.open_remaining


def reopen(breaker, clock):
    """Wait the open time out, fail the probe, and return the new open time."""
    clock.advance(breaker.open_remaining)
    return open_for(breaker, clock)


def recover(breaker, clock):
    clock.advance(breaker.open_remaining)
    succeed(breaker, breaker.policy.successes_to_close)
    assert breaker.closed


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


def test_neutral_outcomes_count_nowhere(make):
    """A neutral outcome neither counts, nor resets the count, nor fills the window."""
    breaker = make(failure_threshold=3, min_calls=4)
    fail(breaker, 2)
    for _ in range(50):
        breaker.admit().neutral()
    assert breaker.failure_count == 2
    fail(breaker)
    assert breaker.opened


def test_neutral_outcomes_alone_never_open_it(make):
    """Traffic of nothing but bad requests says nothing about the provider."""
    breaker = make()
    for _ in range(200):
        breaker.admit().neutral()
    assert breaker.closed


def test_failure_rate_opens_it(make):
    """Half of ten verdicts in the window is too much, though never five in a row."""
    breaker = make()
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    succeed(breaker)
    assert breaker.closed
    fail(breaker)
    assert breaker.opened


def test_failure_rate_needs_enough_calls(make):
    """One failed request is no rate."""
    breaker = make(min_calls=10)
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    fail(breaker)
    assert breaker.closed


def test_old_verdicts_leave_the_window(make, clock):
    """What lies further back than `window` seconds counts for no rate."""
    breaker = make(window=60.0)
    for _ in range(4):
        fail(breaker)
        succeed(breaker)
    clock.advance(61)
    succeed(breaker)
    fail(breaker)
    assert breaker.closed


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
    breaker = make(failure_threshold=9, window=60.0, min_calls=2, failure_rate=1.0)
    succeed(breaker)
    clock.advance(5)  # a bucket later, to the moment
    fail(breaker)
    clock.advance(57)
    fail(breaker)
    assert breaker.state == "open"


def test_window_moves_on_bucket_by_bucket(make, clock):
    """Verdicts age one by one, not all at once."""
    breaker = make(window=60.0, failure_threshold=99)
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
    breaker = make(failure_threshold=99)
    fail(breaker, 9)
    clock.advance(rest)
    fail(breaker)
    assert breaker.opened is (rest < 60)


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


# How long for


def test_open_time_doubles_up_to_its_longest(make, clock):
    """5, 10, 20 … and 300 s from then on."""
    breaker = make()
    times = [open_for(breaker, clock), *(reopen(breaker, clock) for _ in range(8))]
    assert times == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert breaker.opening == 9


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.8), (0.5, 1.0), (0.999999, 1.2)])
def test_open_time_is_jittered(make, clock, draw, factor):
    """The open time varies by `jitter` to either side."""
    breaker = make(random=lambda: draw, jitter=0.2)
    assert open_for(breaker, clock) == pytest.approx(5 * factor, rel=1e-4)


def test_open_time_stays_finite_for_ever(make, clock):
    """An outage of months overflows nothing."""
    breaker = make()
    open_for(breaker, clock)
    for _ in range(5000):
        clock.advance(breaker.open_remaining)
        fail(breaker)
    assert breaker.open_remaining == 300


@pytest.mark.parametrize(
    ("backoff", "longest"), [(1.0, 5.0), (1.0, 300.0), (1e300, 1e300), (1 + 1e-15, 6.0)]
)
def test_every_allowed_backoff_works(make, clock, backoff, longest):
    """No allowed policy overflows or leaves the bounds."""
    breaker = make(backoff=backoff, max_recovery_time=longest)
    open_for(breaker, clock)
    for _ in range(20):
        assert 5 <= reopen(breaker, clock) <= longest * (1 + 1e-9)


def test_retry_after_is_a_floor(make, clock):
    """A provider that asks for longer is left alone for longer."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=42)
    assert breaker.open_remaining == 42


def test_retry_after_of_less_than_a_second_counts(make, clock):
    """Seconds may have fractions."""
    breaker = make(failure_threshold=1, recovery_time=0.1)
    fail(breaker, retry_after=0.9)
    assert breaker.open_remaining == pytest.approx(0.9)


def test_retry_after_is_no_ceiling(make, clock):
    """A shorter hint shortens nothing."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=1)
    assert breaker.open_remaining == 5


def test_retry_after_is_clamped(make):
    """No provider keeps a circuit open for longer than `max_recovery_time`."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=86_400)
    assert breaker.open_remaining == 300


@pytest.mark.parametrize("hint", [math.nan, -5, 0, None, "7", -math.inf])
def test_senseless_retry_after_is_ignored(make, hint):
    """Nonsense in a header does not reach the open time."""
    breaker = make(failure_threshold=1)
    fail(breaker, retry_after=hint)
    assert breaker.open_remaining == 5


def test_openings_are_forgiven_while_closed(make, clock):
    """One opening is forgiven for each `recovery_time` spent closed."""
    breaker = make()
    open_for(breaker, clock)
    for _ in range(3):
        reopen(breaker, clock)
    recover(breaker, clock)
    assert breaker.opening == 4
    clock.advance(10)
    assert breaker.opening == 2
    assert open_for(breaker, clock) == 20


@pytest.mark.parametrize("slow", [False, True])
def test_reopening_after_an_answered_probe_is_no_longer_than_before(make, clock, slow):
    """A provider that answers now and then is not gone: only failure upon failure adds."""
    breaker = make(slow_call=2.0 if slow else None, successes_to_close=2)
    open_for(breaker, clock)
    assert reopen(breaker, clock) == 10
    for _ in range(5):
        clock.advance(breaker.open_remaining)
        succeed(breaker)
        permit = breaker.admit()
        clock.advance(2)
        permit.success() if slow else permit.failure()
        assert breaker.open_remaining == 10
    assert reopen(breaker, clock) == 20


def test_a_lucky_probe_forgives_nothing(make, clock):
    """A circuit that closes and fails again at once goes on where it was."""
    breaker = make()
    open_for(breaker, clock)
    reopen(breaker, clock)
    recover(breaker, clock)
    assert open_for(breaker, clock) == 20


def test_long_outage_is_forgiven_like_a_shorter_one(make, clock):
    """Openings beyond the longest open time are not held against anybody."""
    breaker = make()
    open_for(breaker, clock)
    for _ in range(100):
        reopen(breaker, clock)
    recover(breaker, clock)
    clock.advance(7 * 5)
    assert breaker.opening == 0


@pytest.mark.parametrize("switch", ["force_open", "force_half_open", "force_closed"])
def test_forgiveness_survives_the_hand(make, clock, switch):
    """What was forgiven stays forgiven when somebody switches the circuit."""
    breaker = make()
    open_for(breaker, clock)
    reopen(breaker, clock)
    recover(breaker, clock)
    clock.advance(100)
    getattr(breaker, switch)()
    breaker.auto()
    assert breaker.opening == 0


def test_remaining_time_is_exact(make, clock):
    """Remaining time, rejection and waiting time are the same exact number."""
    breaker = make(failure_threshold=1)
    fail(breaker)
    clock.advance(1.25)
    assert breaker.open_remaining == 3.75
    assert breaker.wait_time() == 3.75
    assert breaker.rejection().retry_after == 3.75


# Half-open


def test_half_open_is_seen_as_soon_as_the_time_is_over(make, clock):
    """Looking shows half-open, and changes nothing."""
    heard = []
    breaker = make(failure_threshold=1, listener=heard.append)
    fail(breaker)
    clock.advance(5)
    assert breaker.state is CircuitState.HALF_OPEN
    assert not breaker.opened
    assert not breaker.closed
    assert [type(event) for event in heard] == [CircuitOpened]


def test_only_half_open_gives_probes(make):
    """Whoever is let through otherwise holds no place."""
    breaker = make()
    assert not breaker.admit().probe
    breaker.force_closed()
    assert not breaker.admit().probe
    breaker.force_half_open()
    assert breaker.admit().probe


@pytest.mark.parametrize("probes", [1, 3])
def test_half_open_lets_so_many_probes_through(make, clock, probes):
    """Half-open admits `probes` at a time."""
    breaker = make(probes=probes, successes_to_close=9)
    open_for(breaker, clock)
    clock.advance(5)
    permits = [breaker.try_admit() for _ in range(50)]
    admitted = [permit for permit in permits if permit is not None]
    assert len(admitted) == probes
    assert all(permit.probe for permit in admitted)
    admitted[0].success()
    assert breaker.try_admit() is not None
    assert breaker.try_admit() is None


def test_successful_probes_close_it(make, clock):
    """`successes_to_close` successes close it, with nothing counted."""
    breaker = make()
    open_for(breaker, clock)
    clock.advance(5)
    succeed(breaker)
    assert breaker.state == "half_open"
    succeed(breaker)
    assert breaker.state == "closed"
    assert breaker.failure_count == 0


def test_closed_again_starts_with_an_empty_window(make, clock):
    """The failures of the outage are not counted again after it."""
    breaker = make(window=1000.0)
    for _ in range(5):
        succeed(breaker)
        fail(breaker)
    assert breaker.opened
    recover(breaker, clock)
    for _ in range(4):
        fail(breaker)
    assert breaker.closed


def test_failed_probe_reopens_for_longer(make, clock):
    """One failure in half-open is enough."""
    breaker = make()
    open_for(breaker, clock)
    clock.advance(5)
    fail(breaker)
    assert breaker.open_remaining == 10


def test_reopening_takes_back_the_places_of_hanging_probes(make, clock):
    """A probe of the last half-open time takes no place in this one."""
    breaker = make(probes=2)
    open_for(breaker, clock)
    clock.advance(5)
    hanging = breaker.admit()
    breaker.admit().failure()
    clock.advance(breaker.open_remaining)
    assert [breaker.try_admit() is not None for _ in range(3)] == [True, True, False]
    hanging.success()
    assert breaker.try_admit() is None


def test_one_failed_probe_outweighs_the_successes_before_it(make, clock):
    """Only successes without a failure among them close it."""
    breaker = make(successes_to_close=3)
    open_for(breaker, clock)
    clock.advance(5)
    succeed(breaker, 2)
    fail(breaker)
    assert breaker.state == "open"


def test_slow_probe_reopens(make, clock):
    """A provider that is still slow has not recovered."""
    breaker = make(slow_call=10.0)
    open_for(breaker, clock)
    clock.advance(5)
    permit = breaker.admit()
    clock.advance(10)
    permit.success()
    assert breaker.opened
    assert breaker.reason == "slow"


def test_neutral_probe_gives_its_place_back(make, clock):
    """A probe that learnt nothing leaves half-open as it was."""
    breaker = make()
    open_for(breaker, clock)
    clock.advance(5)
    for _ in range(20):
        breaker.admit().neutral()
    assert breaker.state == "half_open"
    assert breaker.wait_time() == 0


def test_silent_probe_loses_its_place(make, clock):
    """After `probe_lease` the next caller may try."""
    breaker = make(probe_lease=60.0)
    open_for(breaker, clock)
    clock.advance(5)
    breaker.admit()
    clock.advance(59)
    assert breaker.try_admit() is None
    clock.advance(1)
    assert breaker.wait_time() == 0
    assert breaker.try_admit() is not None
    assert breaker.try_admit() is None


def test_client_timeout_lengthens_the_lease(make, clock):
    """A probe may take as long as its client allows."""
    breaker = make(probe_lease=60.0)
    open_for(breaker, clock)
    clock.advance(5)
    breaker.try_admit(lease=300.0)
    clock.advance(299)
    assert breaker.try_admit() is None
    clock.advance(1)
    assert breaker.try_admit() is not None


@pytest.mark.parametrize(("report", "state"), [("success", "closed"), ("failure", "open")])
def test_late_probe_still_counts_once(make, clock, report, state):
    """A probe that lost its place reports for its own generation."""
    breaker = make(successes_to_close=1)
    open_for(breaker, clock)
    clock.advance(5)
    late = breaker.admit()
    clock.advance(60)
    other = breaker.admit()
    getattr(late, report)()
    assert breaker.state == state
    remaining = breaker.open_remaining
    getattr(late, report)()
    other.failure()
    assert breaker.state == state
    assert breaker.open_remaining == remaining


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


@pytest.mark.parametrize("report", ["success", "failure", "neutral"])
def test_late_results_change_nothing(make, clock, report):
    """A result from before the circuit opened neither closes nor prolongs it."""
    breaker = make()
    late = breaker.admit()
    open_for(breaker, clock)
    clock.advance(3)
    before = breaker.failure_count, breaker.last_error
    getattr(late, report)()
    assert breaker.open_remaining == 2
    assert (breaker.failure_count, breaker.last_error) == before


@pytest.mark.parametrize("report", ["success", "failure"])
def test_late_results_do_not_judge_the_probes(make, clock, report):
    """A call admitted before the outage is no probe."""
    breaker = make(successes_to_close=1)
    late = breaker.admit()
    open_for(breaker, clock)
    clock.advance(5)
    probe = breaker.admit()
    getattr(late, report)()
    assert breaker.state == "half_open"
    probe.success()
    assert breaker.closed


def test_results_of_an_earlier_closed_time_are_stale(make, clock):
    """Closed again is another generation."""
    breaker = make(failure_threshold=2)
    late = [breaker.admit() for _ in range(5)]
    open_for(breaker, clock)
    recover(breaker, clock)
    for permit in late:
        permit.failure()
    assert breaker.closed
    assert breaker.failure_count == 0


# By hand


def test_trip_opens_as_a_failure_would(make, clock):
    """`trip` opens for a growing time, after which probes decide."""
    breaker = make()
    breaker.trip("deploy", error="host is gone")
    assert breaker.open_remaining == 5
    assert (breaker.reason, breaker.last_error) == ("deploy", "host is gone")
    clock.advance(5)
    breaker.trip()
    assert breaker.open_remaining == 10
    recover(breaker, clock)


def test_trip_of_an_open_circuit_only_takes_longer_hints(make, clock):
    """Tripping again moves the time only for an explicit, longer pause."""
    breaker = make()
    breaker.trip()
    breaker.trip()
    assert (breaker.open_remaining, breaker.opening) == (5, 1)
    breaker.trip(retry_after=2)
    assert breaker.open_remaining == 5
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


def test_forced_open_for_a_time_ends_half_open(make, clock):
    """After the given seconds probes decide."""
    breaker = make()
    breaker.force_open(seconds=30)
    clock.advance(29)
    assert breaker.wait_time() == 1
    clock.advance(1)
    assert breaker.state == "half_open"
    succeed(breaker, 2)
    assert breaker.closed


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_forced_open_time_must_make_sense(make, seconds):
    """Bad arguments are refused by name."""
    with pytest.raises(ValueError, match=r"^CircuitBreaker.force_open: seconds must"):
        make().force_open(seconds=seconds)


def test_forced_closed_lets_everything_through_and_still_counts(make):
    """`force_closed` counts, and opens for nothing."""
    breaker = make()
    breaker.force_closed()
    fail(breaker, 50, reason="billing")
    assert breaker.state is CircuitState.FORCED_CLOSED
    assert breaker.closed
    assert breaker.failure_count == 50


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


def test_force_half_open_lets_a_probe_through_now(make):
    """Nobody need wait for the open time."""
    breaker = make()
    breaker.trip(retry_after=300)
    breaker.force_half_open()
    assert breaker.admit().probe


def test_reset_forgets_everything(make, clock):
    """After `reset` it is as new."""
    breaker = make()
    open_for(breaker, clock)
    reopen(breaker, clock)
    breaker.reset()
    assert breaker.state == "closed"
    assert (breaker.failure_count, breaker.opening) == (0, 0)
    assert (breaker.reason, breaker.last_error) == (None, None)


def test_observe_counts_and_reports_but_never_blocks(make, clock):
    """`mode="observe"` shows what would have happened."""
    heard = []
    breaker = make(mode="observe", listener=heard.append)
    open_for(breaker, clock)
    assert breaker.opened
    assert breaker.wait_time() == 0
    assert breaker.enlist().done()
    fail(breaker, 7)
    assert breaker.rejected == 7
    assert breaker.open_remaining == 5
    clock.advance(5)
    succeed(breaker, 2)
    assert [type(event) for event in heard] == [CircuitOpened, CircuitHalfOpened, CircuitClosed]


# What it tells


def test_rejection_says_who_why_and_until_when(make):
    """The error of a refused call is fresh and carries the facts."""
    breaker = make(failure_threshold=1, client="fast")
    fail(breaker, error=TimeoutError("no answer"))
    with pytest.raises(CircuitOpenError) as caught:
        breaker.admit()
    error = caught.value
    assert (error.client, error.reason, error.retry_after) == ("fast", "failures", 5.0)
    assert error.last_error == "TimeoutError: no answer"
    says = f"circuit {breaker.name!r} is open (failures): try again in 5.0 s"
    assert str(error).startswith(says)
    assert breaker.rejection() is not error


def test_rejection_in_half_open_promises_no_time(make, clock):
    """While the probes are under way nobody knows when."""
    breaker = make()
    open_for(breaker, clock)
    clock.advance(5)
    breaker.admit()
    assert breaker.rejection().retry_after is None
    assert "half open (failures): its probes are under way; try again soon" in str(
        breaker.rejection()
    )


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


@pytest.mark.parametrize("leave", ["open", "force_half_open", "force_open"])
def test_closing_tells_how_long_it_was_not_closed(make, clock, leave):
    """Counted from when it last left closed, however that came about."""
    closings = []
    breaker = make(listener=closings.append)
    for _ in range(2):
        clock.advance(100)
        if leave == "open":
            fail(breaker, 5)
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
    """Opened, half-opened, opened again, half-opened, closed; with the times."""
    heard = []
    breaker = make(listener=heard.append, client="fast")
    fail(breaker, 5, error=TimeoutError("slow"))
    clock.advance(5)
    fail(breaker, error="still down")
    clock.advance(10)
    succeed(breaker, 2)
    facts = {"client": "fast", "target": "c"}
    assert heard == [
        CircuitOpened(
            at=1000, reason="failures", seconds=5, last_error="TimeoutError: slow", **facts
        ),
        CircuitHalfOpened(at=1005, **facts),
        CircuitOpened(at=1005, reason="failures", seconds=10, last_error="still down", **facts),
        CircuitHalfOpened(at=1015, **facts),
        CircuitClosed(at=1015, seconds=15, **facts),
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


def test_half_opening_is_told_when_the_probe_goes(make, clock):
    """Not only when it returns."""
    heard = []
    breaker = make(listener=heard.append)
    open_for(breaker, clock)
    clock.advance(5)
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


def test_interrupt_in_a_listener_loses_no_permit(make, clock):
    """Ctrl-C may come while a listener runs; the probe's place is free all the same."""

    def listener(event):
        if isinstance(event, CircuitHalfOpened):
            raise KeyboardInterrupt

    breaker = make(listener=listener)
    open_for(breaker, clock)
    clock.advance(5)
    with pytest.raises(KeyboardInterrupt):
        breaker.admit()
    assert (breaker.state, breaker.wait_time()) == ("half_open", 0)


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
