"""The cache against a naive model: a list of (key, text, stored at), least recently used first.

One machine compares memory alone, to the entry; the other adds a folder and restarts, and asks only
that what is served is what was stored last, is young enough, and was not forgotten.
"""

import tempfile

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from whole_cache import WholeCache

from dspy_resilient.cache import Answer
from dspy_resilient.policies import CachePolicy
from dspy_resilient.testing.clock import Clock

KEYS = st.sampled_from([f"{number:064x}" for number in range(6)])
TEXTS = st.sampled_from(["Paris", "Rome", "Oslo"])
SECONDS = st.sampled_from([0.0, 1.0, 4.0, 5.0, 11.0])


def answer(text):
    return Answer.of([text], None)


def text_of(found):
    return None if found is None else found.outputs[0]


class MemoryModel(RuleBasedStateMachine):
    """Bounded, ageing, least recently used out first."""

    @initialize(
        size=st.integers(1, 4),
        ttl=st.sampled_from([None, 5.0, 10.0]),
        stale=st.sampled_from([None, 5.0]),
    )
    def start(self, size, ttl, stale):
        stale = None if ttl is None else stale
        self.size, self.clock = size, Clock()
        self.ttl = float("inf") if ttl is None else ttl
        self.kept = self.ttl + (stale or 0.0)
        policy = CachePolicy(max_entries=size, ttl=ttl, stale_if_error=stale)
        self.cache = WholeCache(policy, clock=self.clock)
        self.entries = []
        self.counts = {"hits": 0, "misses": 0, "stale": 0, "stored": 0, "evicted": 0}

    def age(self, entry):
        return self.clock() - entry[2]

    def find(self, key):
        """Return the entry under `key` and make it the most recently used."""
        found = next((entry for entry in self.entries if entry[0] == key), None)
        if found is not None:
            self.entries.remove(found)
            self.entries.append(found)
        return found

    @rule(key=KEYS, text=TEXTS)
    def put(self, key, text):
        self.cache.put(key, answer(text))
        self.entries = [entry for entry in self.entries if entry[0] != key]
        self.counts["stored"] += 1
        while len(self.entries) >= self.size:
            self.entries.pop(0)
            self.counts["evicted"] += 1
        self.entries.append((key, text, self.clock()))

    @rule(key=KEYS)
    def get(self, key):
        found = self.find(key)
        fresh = found is not None and self.age(found) < self.ttl
        self.counts["hits" if fresh else "misses"] += 1
        assert text_of(self.cache.get(key)) == (found[1] if fresh else None)

    @rule(key=KEYS)
    def get_stale(self, key):
        found = self.find(key)
        if found is not None:
            self.counts["hits" if self.age(found) < self.ttl else "stale"] += 1
        assert text_of(self.cache.get_stale(key)) == (found[1] if found else None)

    @rule(key=KEYS)
    def peek(self, key):
        found = self.find(key)
        fresh = found is not None and self.age(found) < self.ttl
        if fresh:
            self.counts["hits"] += 1
            self.counts["misses"] -= 1
        assert text_of(self.cache.peek(key)) == (found[1] if fresh else None)

    @rule(key=KEYS)
    def evict(self, key):
        self.cache.evict(key)
        self.entries = [entry for entry in self.entries if entry[0] != key]

    @rule()
    def clear(self):
        self.cache.clear()
        self.entries = []

    @rule(seconds=SECONDS)
    def pass_time(self, seconds):
        self.clock.advance(seconds)
        self.entries = [entry for entry in self.entries if self.age(entry) < self.kept]

    @invariant()
    def numbers_agree(self):
        numbers = self.cache.numbers()
        assert {name: getattr(numbers, name) for name in self.counts} == self.counts
        assert numbers.entries == len(self.cache) == len(self.entries) <= self.size


class DiskModel(RuleBasedStateMachine):
    """What is on disk survives restarts, and obeys ttl, eviction and clearing."""

    TTL, STALE = 10.0, 5.0

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.wall = Clock(1e9)
        self.stored = {}
        self.restart()

    def teardown(self):
        self.folder.cleanup()

    @rule()
    def restart(self):
        policy = CachePolicy(max_entries=2, ttl=self.TTL, stale_if_error=self.STALE)
        self.clock = Clock(50.0)
        self.cache = WholeCache(policy, clock=self.clock, folder=self.folder.name, wall=self.wall)

    @rule(key=KEYS, text=TEXTS)
    def put(self, key, text):
        self.cache.put(key, answer(text))
        self.stored[key] = (text, self.wall())

    def known(self, key, limit):
        text, when = self.stored.get(key, (None, 0.0))
        return text if self.wall() - when < limit else None

    @rule(key=KEYS)
    def get(self, key):
        assert text_of(self.cache.get(key)) == self.known(key, self.TTL)

    @rule(key=KEYS)
    def get_stale(self, key):
        assert text_of(self.cache.get_stale(key)) == self.known(key, self.TTL + self.STALE)

    @rule(key=KEYS)
    def evict(self, key):
        self.cache.evict(key)
        self.stored.pop(key, None)

    @rule()
    def clear(self):
        self.cache.clear()
        self.stored.clear()

    @rule()
    def close(self):
        self.cache.close()

    @rule(seconds=SECONDS)
    def pass_time(self, seconds):
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    @invariant()
    def disk_is_well(self):
        assert not self.cache.numbers().disk_errors


TestMemory = MemoryModel.TestCase
TestDisk = DiskModel.TestCase
