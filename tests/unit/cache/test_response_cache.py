"""The answers of one client: bounded, ageing, shared by threads, and never a reason to fail."""

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from whole_cache import WholeCache

from dspy_resilient.cache import Answer
from dspy_resilient.policies import CachePolicy
from dspy_resilient.testing.clock import Clock


def cache_for(clock=None, folder=None, wall=None, **policy):
    clock = clock or Clock()
    return WholeCache(CachePolicy(**policy), clock=clock, folder=folder, wall=wall or clock)


def key(number):
    return f"{number:064x}"


def answer(text="Paris"):
    return Answer.of([text], {"response": None, "model": "m", "cost": 0.5})


def texts(cache, numbers):
    return [found.outputs[0] if (found := cache.get(key(n))) else None for n in numbers]


def test_answer_comes_back():
    """What was stored is found, marked with its key and its time."""
    clock = Clock(100.0)
    cache = cache_for(clock)
    assert cache.get(key(1)) is None
    cache.put(key(1), answer())
    found = cache.get(key(1))
    assert (found.outputs, found.key, found.stored_at) == (["Paris"], key(1), 100.0)


def test_later_answer_replaces_the_earlier():
    """One key, one answer."""
    cache = cache_for()
    cache.put(key(1), answer("Paris"))
    cache.put(key(1), answer("Rome"))
    assert texts(cache, [1]) == ["Rome"]
    assert len(cache) == 1


def test_least_recently_used_makes_room():
    """No more than `max_entries` are kept; whoever was asked for last stays."""
    cache = cache_for(max_entries=2)
    cache.put(key(1), answer("one"))
    cache.put(key(2), answer("two"))
    cache.get(key(1))
    cache.put(key(3), answer("three"))
    assert texts(cache, [1, 2, 3]) == ["one", None, "three"]
    assert cache.numbers().evicted == 1


def test_bytes_are_bounded_as_well():
    """`max_bytes` bounds what the answers take up, beside `max_entries`."""
    cache = cache_for(max_entries=3, max_bytes=100_000)
    for number in range(3):
        cache.put(key(number), answer(str(number) * 30_000))
    assert texts(cache, range(3))[1:] == ["1" * 30_000, "2" * 30_000]
    for number in range(10):
        cache.put(key(number), answer("x"))
    assert len(cache) == 3


def test_answer_larger_than_the_cache_is_left_out():
    """It would only drive out all others; an older one under its key must not survive it."""
    cache = cache_for(max_bytes=10_000)
    cache.put(key(1), answer("small"))
    cache.put(key(2), answer("small"))
    cache.put(key(2), answer("x" * 20_000))
    assert texts(cache, [1, 2]) == ["small", None]
    assert cache.numbers().skipped == {"too_large": 1}


def test_weighing_ends():
    """An answer that leads to a large part of the program is weighed in part only."""
    cache = cache_for(max_bytes=10**9)
    cache.put(key(1), Answer.of(["x"], {"response": [[number] for number in range(50_000)]}))
    assert len(cache) == 1


def test_answer_expires():
    """After `ttl` seconds an answer is gone."""
    clock = Clock()
    cache = cache_for(clock, ttl=10)
    cache.put(key(1), answer())
    clock.advance(9.9)
    assert cache.get(key(1)) is not None
    clock.advance(0.1)
    assert cache.get(key(1)) is None
    assert len(cache) == 0


def test_without_ttl_nothing_expires():
    """Answers of a model do not age unless the user says so."""
    clock = Clock()
    cache = cache_for(clock)
    cache.put(key(1), answer())
    clock.advance(1e9)
    assert cache.get(key(1)) is not None


def test_expired_answer_is_there_for_a_failed_call_only():
    """Within `stale_if_error` an expired answer is a miss, but better than an error."""
    clock = Clock()
    cache = cache_for(clock, ttl=10, stale_if_error=5)
    cache.put(key(1), answer())
    clock.advance(10)
    assert cache.get(key(1)) is None
    assert cache.get_stale(key(1)).outputs == ["Paris"]
    clock.advance(5)
    assert cache.get_stale(key(1)) is None


def test_stale_answers_are_only_kept_if_asked_for():
    """Without `stale_if_error` an expired answer is gone."""
    clock = Clock()
    cache = cache_for(clock, ttl=10)
    cache.put(key(1), answer())
    assert cache.get_stale(key(1)) is not None
    clock.advance(10)
    assert cache.get_stale(key(1)) is None


def test_evicted_answer_is_gone():
    """An answer that nobody could parse is forgotten, by the key it carries."""
    cache = cache_for()
    cache.put(key(1), answer())
    cache.evict(cache.get(key(1)).key)
    cache.evict(key(2))
    assert cache.get(key(1)) is None


def test_cleared_cache_is_empty_and_goes_on():
    """Clearing forgets everything; the cache can be used again."""
    cache = cache_for()
    cache.put(key(1), answer())
    cache.clear()
    assert (len(cache), cache.get(key(1)), cache.numbers().evicted) == (0, None, 0)
    cache.put(key(1), answer())
    assert len(cache) == 1


def test_numbers_tell_what_happened():
    """Hits, misses, stale, stored and evicted are counted."""
    clock = Clock()
    cache = cache_for(clock, ttl=10, stale_if_error=10, max_entries=1)
    cache.get(key(1))
    cache.put(key(1), answer())
    cache.put(key(2), answer())
    cache.get(key(2))
    clock.advance(10)
    cache.get_stale(key(2))
    numbers = cache.numbers()
    assert (numbers.entries, numbers.hits, numbers.misses, numbers.stale) == (1, 1, 1, 1)
    assert (numbers.stored, numbers.evicted, numbers.skipped) == (2, 1, {})
    assert (numbers.disk_hits, numbers.disk_errors) == (0, {})


def test_second_look_turns_its_miss_into_a_hit():
    """A leader that finds the answer after all was served by the cache, once."""
    cache = cache_for()
    assert cache.get(key(1)) is None
    assert cache.peek(key(1)) is None
    cache.put(key(1), answer())
    assert cache.peek(key(1)) is not None
    assert (cache.numbers().hits, cache.numbers().misses) == (1, 0)


def test_many_threads_share_one_cache():
    """Whatever they do at the same time, the bound holds and nothing is lost."""
    cache = cache_for(max_entries=50)
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        for number in range(300):
            place = (number * 7 + seed) % 80
            cache.put(key(place), answer(str(place)))
            found = cache.get(key((place + seed) % 80))
            assert found is None or found.outputs == [str((place + seed) % 80)]
            if number % 50 == seed:
                cache.evict(key(place))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    numbers = cache.numbers()
    assert numbers.entries <= 50
    assert numbers.stored == 2400
    assert numbers.hits + numbers.misses == 2400


def test_nothing_of_others_runs_under_the_lock(tmp_path):
    """The disk and the question where it is may take their time; others go on meanwhile."""
    asked, go_on = threading.Event(), threading.Event()

    def folder():
        asked.set()
        assert go_on.wait(10)
        return str(tmp_path)

    cache = cache_for(folder=folder)
    slow = threading.Thread(target=cache.get, args=(key(1),))
    slow.start()
    assert asked.wait(10)
    assert len(cache) == 0  # takes the lock
    go_on.set()
    slow.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_keeps_the_answers_and_a_working_lock():
    """A child starts with its parent's answers; a lock held at the fork does not stay held."""
    cache = cache_for()
    cache.put(key(1), answer())

    def found_in_child():
        child = os.fork()
        if child == 0:
            code = 9
            try:
                found = cache.get(key(1))
                cache.put(key(2), answer())
                code = 1 if found else 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert found_in_child() == 1
    holding, done = threading.Event(), threading.Event()

    def hold():
        with cache._lock:
            holding.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait(10)
    assert found_in_child() == 0  # who was changing the entries is unknown, so they are dropped
    done.set()
    holder.join()


def test_renewed_cache_drops_only_what_may_be_broken():
    """Entries that somebody was changing at the fork are dropped, others are kept."""
    cache = cache_for()
    cache.put(key(1), answer())
    cache.renew()
    assert len(cache) == 1
    with cache._lock:
        cache.renew()
        assert len(cache) == 0


def test_forgotten_cache_is_freed():
    """Nothing global holds a cache."""
    cache = cache_for()
    cache.put(key(1), answer())
    gone = weakref.ref(cache._entries)
    del cache
    gc.collect()
    assert gone() is None


def test_disk_answers_after_a_restart(tmp_path):
    """The next process finds what this one stored, once, and then has it in memory."""
    cache_for(folder=str(tmp_path)).put(key(1), answer())
    later = cache_for(folder=str(tmp_path))
    assert later.get(key(1)).outputs == ["Paris"]
    assert later.get(key(1)).outputs == ["Paris"]
    assert (later.numbers().hits, later.numbers().disk_hits, len(later)) == (2, 1, 1)


def test_bound_on_bytes_holds_for_answers_from_disk(tmp_path):
    """What comes back from disk is weighed as well."""
    first = cache_for(folder=str(tmp_path))
    for number in range(3):
        first.put(key(number), answer(str(number) * 30_000))
    later = cache_for(folder=str(tmp_path), max_bytes=40_000)
    assert texts(later, range(3)) == [str(number) * 30_000 for number in range(3)]
    assert len(later) == 1


def test_disk_is_opened_at_the_first_use(tmp_path):
    """A client that is never asked touches no disk, and asks nobody where it is."""
    asked = []

    def folder():
        asked.append(1)
        return str(tmp_path / "answers")

    cache = cache_for(folder=folder)
    cache.numbers()
    cache.close()
    assert (asked, list(tmp_path.iterdir())) == ([], [])
    cache.get(key(1))
    assert (asked, list(tmp_path.iterdir())) == ([1], [])
    cache.put(key(1), answer())
    assert asked == [1]
    assert (tmp_path / "answers").is_dir()


def test_no_folder_means_memory_only():
    """None from the function that knows the folder switches the disk off."""
    cache = cache_for(folder=lambda: None)
    cache.put(key(1), answer())
    cache.evict(key(1))
    cache.clear()
    assert cache.get(key(1)) is None


def test_age_counts_across_a_restart(tmp_path):
    """An answer expires by the time it was first stored, whichever process asks."""
    wall = Clock(1e9)
    first = cache_for(Clock(5.0), folder=str(tmp_path), wall=wall, ttl=10, stale_if_error=10)
    first.put(key(1), answer())
    wall.advance(9)
    clock = Clock(77.0)
    second = cache_for(clock, folder=str(tmp_path), wall=wall, ttl=10, stale_if_error=10)
    assert second.get(key(1)).stored_at == pytest.approx(68.0)
    clock.advance(1)
    wall.advance(1)
    assert second.get(key(1)) is None
    assert second.get_stale(key(1)) is not None
    wall.advance(10)
    third = cache_for(folder=str(tmp_path), wall=wall, ttl=10, stale_if_error=10)
    assert third.get_stale(key(1)) is None
    assert list(tmp_path.glob("*/*.json")) == []


def test_stale_answer_of_an_earlier_process_helps_too(tmp_path):
    """A restart during an outage does not lose the stale answers."""
    wall = Clock(1e9)
    cache_for(folder=str(tmp_path), wall=wall, ttl=10, stale_if_error=10).put(key(1), answer())
    wall.advance(15)
    later = cache_for(folder=str(tmp_path), wall=wall, ttl=10, stale_if_error=10)
    assert later.get(key(1)) is None
    assert later.get_stale(key(1)).outputs == ["Paris"]


def test_eviction_and_clearing_reach_the_disk(tmp_path):
    """What is forgotten does not come back from disk."""
    cache = cache_for(folder=str(tmp_path))
    for number in range(3):
        cache.put(key(number), answer())
    cache.evict(key(0))
    assert texts(cache_for(folder=str(tmp_path)), range(2)) == [None, "Paris"]
    cache.close()
    assert texts(cache, [1]) == ["Paris"]
    cache.clear()
    assert texts(cache_for(folder=str(tmp_path)), range(3)) == [None] * 3


def test_answer_evicted_while_it_is_read_does_not_return(tmp_path):
    """An eviction wins over a look-up or a store that is under way."""
    cache_for(folder=str(tmp_path)).put(key(1), answer())
    late = []

    def wall():
        if late:
            late.pop()()
        return 0.0

    cache = cache_for(folder=str(tmp_path), wall=wall)
    late.append(lambda: cache.evict(key(1)))  # the look-up has read the file by now
    assert cache.get(key(1)).outputs == ["Paris"]
    assert (len(cache), cache.get(key(1))) == (0, None)
    late.append(lambda: cache.evict(key(1)))  # the store is about to write the file
    cache.put(key(1), answer())
    assert (len(cache), cache.get(key(1))) == (0, None)


def test_broken_disk_is_no_reason_to_fail(tmp_path):
    """Memory goes on alone, and the numbers say so."""
    (tmp_path / "file").write_text("not a folder")
    cache = cache_for(folder=str(tmp_path / "file"))
    cache.put(key(1), answer())
    assert texts(cache, [1, 2]) == ["Paris", None]
    assert sum(cache.numbers().disk_errors.values()) > 0
