"""Numbers add up, can be taken apart, and tell what happened lately."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_resilient.stats import LastMinute, Latency, Stats, Tally
from dspy_resilient.stats.latency import Stopwatch, duration
from dspy_resilient.stats.spending import Spending

SECONDS = st.floats(0.001, 2000)


def latency(*durations):
    watch = Stopwatch()
    for seconds in durations:
        watch.record(seconds)
    return watch.latency()


@given(
    st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 1.0])
)
def test_a_quantile_is_off_by_a_twentieth_at_most(durations, share):
    """Beside the durations themselves, whatever they are."""
    exact = sorted(durations)[max(0, -int(-share * len(durations) // 1) - 1)]
    assert latency(*durations).quantile(share) == pytest.approx(exact, rel=0.05)


@given(st.lists(SECONDS, max_size=50), st.lists(SECONDS, max_size=50))
def test_latencies_add_up_and_can_be_taken_apart(one, two):
    """Merged over clients they are what one client with all the answers would show."""
    both = latency(*one) + latency(*two)
    assert both.buckets == latency(*one, *two).buckets
    assert both.total == pytest.approx(sum(one) + sum(two))
    assert (both - latency(*one)).buckets == latency(*two).buckets


def test_what_is_beyond_the_buckets_still_counts():
    """No answer is too quick or too slow, not even one that took no time or an hour."""
    found = latency(0.0, -0.1, 1e-9, 3600.0, 1e9)
    assert found.count == 5
    assert found.quantile(0) < 0.002
    assert found.quantile(1) > 1500


def test_nothing_has_no_quantile():
    """None is no number that somebody could take for a time."""
    assert latency().p50 is latency().mean is None
    assert repr(latency()) == "Latency(count=0)"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share):
    """Percent are refused rather than taken for the slowest answer."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        latency(1.0).quantile(share)


def test_powers_of_two_split_the_answers():
    """What Prometheus is told is exact: at most so many seconds."""
    split = dict(latency(0.5, 0.51, 1.0, 1.01, 300).up_to())
    assert (split[0.25], split[0.5], split[1.0], split[2.0], split[256.0], split[512.0]) == (
        *(0, 1, 3, 4, 4, 5),
    )


def sample(**numbers):
    return Stats(client="fast", **numbers)


def test_a_snapshot_is_frozen():
    """What was handed out does not change any more."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().calls = 3


def test_a_snapshot_is_a_row():
    """Ready for JSON: every number, parts by name, unknown prices as None."""
    spent = {"a": Spending(requests=2, known_dollars=0.5), "b": Spending(requests=1, unpriced=1)}
    stats = sample(
        calls=3,
        failed_by_target={"m": {"timeout": 1}},
        spent_by_target=spent,
        recent=sample(calls=1),
    )
    row = json.loads(json.dumps(stats.to_dict()))
    assert {field.name for field in dataclasses.fields(stats)} <= row.keys()
    assert (row["calls"], row["failed"], row["recent"]["calls"]) == (3, {"timeout": 1}, 1)
    assert row["spent_by_target"]["a"]["dollars"] == 0.5
    assert row["spent"]["dollars"] is None
    assert row["latency"]["p95"] is None


def test_numbers_of_two_clients_add_up():
    """Totals, parts, times and the last minute."""
    one = sample(
        seconds=10.0,
        calls=3,
        failed_by_target={"m": {"timeout": 1}},
        latency=latency(1.0),
        recent=sample(seconds=10.0, calls=2),
    )
    two = Stats(
        client="slow",
        seconds=4.0,
        calls=1,
        failed_by_target={"m": {"timeout": 1}, "n": {"failure": 2}},
        latency=latency(2.0, 3.0),
        recent=Stats(client="slow", seconds=4.0, calls=1),
    )
    both = one + two
    assert (both.client, both.seconds, both.calls) == ("fast, slow", 10.0, 4)
    assert both.failed == {"timeout": 2, "failure": 2}
    assert both.failed_by_target == {"m": {"timeout": 2}, "n": {"failure": 2}}
    assert both.latency.count == 3
    assert (both.recent.calls, both.recent.seconds) == (3, 10.0)
    assert sum([one, two]) == both


def test_an_earlier_snapshot_can_be_subtracted():
    """What one evaluation cost."""
    before = sample(seconds=10.0, calls=3, skipped={"empty": 1}, latency=latency(1.0))
    after = sample(
        seconds=15.0, calls=8, skipped={"empty": 1, "partial": 2}, latency=latency(1.0, 4.0)
    )
    since = after - before
    assert (since.seconds, since.calls, since.skipped) == (5.0, 5, {"partial": 2})
    assert since.latency.p50 == pytest.approx(4.0, rel=0.05)
    assert since.calls_per_second == 1.0


def test_snapshots_mix_with_nothing_else():
    """A number is not a client."""
    with pytest.raises(TypeError):
        sample() + 1
    with pytest.raises(TypeError):
        1 + sample()
    with pytest.raises(TypeError):
        sample() - 1


def test_rates_of_nothing_are_zero():
    """A client that has done nothing divides by nothing."""
    nothing = sample()
    assert nothing.hit_rate == nothing.failure_rate == nothing.calls_per_second == 0.0
    assert sample(calls=4, hits=1, coalesced=1).hit_rate == 0.5
    assert sample(attempts=4, failures=1).failure_rate == 0.25


def test_counters_and_their_parts():
    """A part is counted under its whole."""
    tally = Tally()
    for name in ("calls", "calls", "failed:timeout", "failed:auth", "failed:timeout"):
        tally.add(name)
    tally.time(0.5)
    totals = tally.totals()
    assert (totals["calls"], totals["failed"]) == (2, {"timeout": 2, "auth": 1})
    assert totals["latency"].count == 1


def test_no_count_is_lost_between_threads():
    """Whatever the interleaving, the sums are right."""
    tally, start = Tally(), threading.Barrier(8)

    def count():
        start.wait()
        for _ in range(500):
            tally.add("calls")
            tally.time(0.1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = tally.totals()
    assert totals["calls"] == totals["latency"].count == 4000


class Counted:
    """A client with a clock of its own, counting calls as `ClientState` does."""

    def __init__(self):
        self.now, self.calls, self.minute = 0.0, 0, LastMinute()

    def totals(self):
        return sample(seconds=self.now, calls=self.calls)

    def call(self, times=1):
        if self.now >= self.minute.due:
            self.minute.mark(self.now, self.totals)
        self.calls += times

    @property
    def recent(self):
        return self.minute.since(self.totals())


def test_recent_is_the_last_minute_and_no_more():
    """Old calls do not count, and the rate is the present one."""
    client = Counted()
    for second in range(300):
        client.now = float(second)
        client.call(10 if second < 200 else 1)
    assert 55 <= client.recent.calls <= 60
    assert client.recent.calls_per_second == pytest.approx(1.0, rel=0.05)


def test_after_a_rest_nothing_is_recent():
    """A client that nobody calls shows no rate, however busy it was before."""
    client = Counted()
    client.call(1000)
    client.now = 3600.0
    assert client.recent.calls == 0
    client.call(7)
    assert client.recent.calls == 7


@given(st.lists(st.tuples(st.floats(0, 90), st.integers(1, 5)), min_size=1, max_size=60))
def test_recent_is_never_far_off(steps):
    """Beside a list of all calls: everything of the last 55 s counts, nothing older than 60 s."""
    client, log = Counted(), []
    for pause, calls in steps:
        client.now += pause
        client.call(calls)
        log += [client.now] * calls
    client.now += 1.0
    found = client.recent
    sure = sum(at >= client.now - LastMinute.SECONDS + LastMinute.STEP for at in log)
    most = sum(at >= client.now - LastMinute.SECONDS for at in log)
    assert sure <= found.calls <= most
    assert found.seconds <= LastMinute.SECONDS


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.0 s"),
        (4.56, "4.6 s"),
        (45.4, "45 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (3600, "1 h"),
    ],
)
def test_durations_are_told_as_people_say_them(seconds, told):
    """Two units at most."""
    assert duration(seconds) == told


def test_latency_is_a_value():
    """Equal when equal, and usable as a key."""
    assert latency(1.0) == latency(1.0) != latency(2.0)
    assert len({Latency(), Latency()}) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_snapshot_can_be_sent_away(copied):
    """To another process, or into JSON."""
    stats = sample(
        calls=3,
        failed_by_target={"m": {"timeout": 1}},
        latency=latency(1.0),
        recent=sample(calls=1),
    )
    assert copied(stats) == stats
    assert json.loads(json.dumps(dataclasses.asdict(stats)))["recent"]["calls"] == 1
