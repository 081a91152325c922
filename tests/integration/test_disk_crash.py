"""Processes that share a folder of answers, and processes that are killed while they write."""

import hashlib
import os
import random
import signal
import traceback

import pytest
from whole_cache import WholeCache

from dspy_resilient.cache import Answer, DiskCache
from dspy_resilient.policies import CachePolicy

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

LIMIT = 2**28
LIVES = 100


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def text(number, version=0):
    return f"{number}.{version} " * 10_000


def answer(number, version=0):
    return Answer.of([text(number, version)], {"response": None, "model": "m"})


def start(work):
    """Run `work(tell)` in a child; return its id and what it tells, as a stream of bytes."""
    hear, say = os.pipe()
    child = os.fork()
    if child:
        os.close(say)
        return child, os.fdopen(hear, "rb", buffering=0)
    code = 1
    try:
        work(lambda: os.write(say, b"."))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def work_together(work):
    """Run `work` in three children at a time and return how they ended."""
    children = [start(work) for _ in range(3)]
    for _, told in children:
        told.close()
    return [ended(child) for child, _ in children]


def test_killed_writer_loses_at_most_what_it_was_writing(tmp_path):
    """kill -9 at any moment: every entry is whole and right, or was never stored."""
    chance = random.Random(7)
    for life in range(LIVES):

        def write_for_ever(tell, life=life):
            disk = DiskCache(tmp_path, limit_bytes=LIMIT)
            number = 0
            while True:
                assert disk.store(key(number % 40), answer(number % 40, life))
                tell()
                number += 1

        child, told = start(write_for_ever)
        with told:
            stored = sum(len(told.read(1)) for _ in range(chance.randrange(1, 60)))
            os.kill(child, signal.SIGKILL)
            stored += len(told.readall())
        assert ended(child) == -signal.SIGKILL
        disk = DiskCache(tmp_path, limit_bytes=LIMIT)
        for number in range(40):
            found = disk.load(key(number))
            if number < stored and number != stored % 40:  # the one that was being written
                assert found.outputs == [text(number, life)]
            elif found is not None:
                assert found.outputs[0] in {text(number, past) for past in range(life + 1)}
        assert not disk.errors
    assert len(list(tmp_path.glob("*/*.json"))) <= 40


def test_disk_that_is_really_full_is_a_miss(tmp_path):
    """The system cuts a write short: no call fails, nothing half is left, the rest is read."""
    disk = DiskCache(tmp_path, limit_bytes=LIMIT)
    assert disk.store(key(1), answer(1))

    def work(tell):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache = WholeCache(CachePolicy(), folder=str(tmp_path))
        for number in range(2, 6):
            cache.put(key(number), answer(number))
            assert cache.get(key(number)).outputs == [text(number)]
        assert sum(cache.numbers().disk_errors.values()) == 4
        cache.close()
        assert cache.get(key(1)).outputs == [text(1)]
        assert cache.get(key(2)) is None

    child, told = start(work)
    told.close()
    assert ended(child) == 0
    assert [file.name for file in tmp_path.glob("*/*")] == [f"{key(1)}.json"]


def test_processes_share_a_folder(tmp_path):
    """What one process stores another finds, and neither sees a half of anything."""

    def work(tell):
        disk = DiskCache(tmp_path, limit_bytes=LIMIT)
        chance = random.Random(os.getpid())
        for _ in range(120):
            number = chance.randrange(8)
            if chance.random() < 0.4:
                disk.store(key(number), answer(number, chance.randrange(3)))
            elif chance.random() < 0.1:
                disk.evict(key(number))
            else:
                found = disk.load(key(number))
                assert found is None or found.outputs[0] in {text(number, v) for v in range(3)}
        assert not disk.errors

    assert work_together(work) == [0, 0, 0]


def test_folder_emptied_by_another_process_is_no_fault(tmp_path):
    """One process clears and fills, another trims, a third stores and looks up."""

    def work(tell):
        disk = DiskCache(tmp_path, limit_bytes=2**20)
        for number in range(50):
            disk.store(key(number), answer(number))
            if number % 10 == os.getpid() % 10:
                disk.clear()
            found = disk.load(key(number))
            assert found is None or found.outputs == [text(number)]
        assert not disk.errors

    assert work_together(work) == [0, 0, 0]


def test_answer_of_one_process_is_a_hit_in_another(tmp_path):
    """A worker pool pays for an answer once."""

    def work(tell):
        WholeCache(CachePolicy(), folder=str(tmp_path)).put(key(1), answer(1))

    child, told = start(work)
    told.close()
    assert ended(child) == 0
    cache = WholeCache(CachePolicy(ttl=60), folder=str(tmp_path))
    assert cache.get(key(1)).outputs == [text(1)]
