"""One client's answers: a bounded memory, and behind it a folder if there is one.

`ResponseCache` owns what is kept, for how long, and the numbers about it. It does not decide which
answers are fit to be kept (`answer.usable`, `CachePolicy.store_if`), and it never fails a call.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cachetools import TLRUCache

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.cache.answer import Answer
from dspy_resilient.cache.disk import DiskCache

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from dspy_resilient.cache.answer import Answer
    from dspy_resilient.policies import CachePolicy


@dataclass(frozen=True, kw_only=True)
class CacheNumbers:
    """What a cache has done so far.

    Attributes:
        entries: Answers in memory.
        hits: Look-ups answered by a fresh answer.
        misses: Look-ups that found none.
        stale: Expired answers served because the provider failed.
        stored: Answers stored.
        evicted: Answers that had to make room in memory.
        skipped: Answers kept out, by reason: "too_large" for memory; "disk" for those that are
            too large for the disk, or not to be put into JSON.
        disk_hits: Hits that came from disk.
        shared_hits: Hits that came from other processes.
        disk_errors: Faults of the disk, by kind, e.g. "write: ENOSPC".
    """

    entries: int
    hits: int
    misses: int
    stale: int
    stored: int
    evicted: int
    skipped: dict[str, int] = field(default_factory=dict)
    disk_hits: int
    shared_hits: int
    disk_errors: dict[str, int] = field(default_factory=dict)


class _Entries(TLRUCache[str, Answer]):
    """The entries in memory; counts those that had to make room."""

    counts: Counter[str]

    def popitem(self) -> tuple[str, Answer]:
        item = super().popitem()
        self.counts["evicted"] += 1
        return item


_UNOPENED: Any = object()
_MOST_WEIGHED = 20_000  # parts of one answer; it may lead to far more than itself


class ResponseCache:
    """Answers by key; safe for threads, processes and forks.

    The lock is short: neither the disk nor anybody else's code runs under it. A child process
    starts with its parent's answers.

    Args:
        policy: Bounds and times.
        clock: Monotonic seconds.
        folder: Where answers outlive the process, or a function that says so at the first use, or
            None for memory only.
        wall: Wall-clock seconds, for the age of answers from an earlier process.
        others: The answers of other processes, if they are shared. Who looks there or stores there
            waits for it, and so is not here but in `call.py`.
    """

    def __init__(
        self,
        policy: CachePolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        folder: Callable[[], str | None] | str | None = None,
        wall: Callable[[], float] = time.time,  # noqa: TID251  # entries outlive the process
        others: RemoteTier | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._folder = folder
        self._wall = wall
        self._ttl = math.inf if policy.ttl is None else policy.ttl
        self._kept = policy.kept
        self.others = others
        self._disk: DiskCache | None = None if folder is None else _UNOPENED
        self._counts: Counter[str] = Counter()
        self._entries = self._no_entries()
        self.evictions = 0
        self._lock = threading.Lock()
        renew_after_fork(self)

    def __len__(self) -> int:
        """Return how many answers are in memory, those that may be served stale included."""
        with self._lock:
            self._entries.expire()
            return len(self._entries)

    @property
    def has_disk(self) -> bool:
        """Whether there is a folder, as far as is known before the first use."""
        return self._disk is not None

    def recall(self, key: str) -> Answer | None:
        """Return the fresh answer in memory, or None; what follows on a miss is `load`."""
        with self._lock:
            try:
                answer = self._entries[key]  # faster than `get`, which looks twice
            except KeyError:
                answer = None
            if answer is not None and self._is_fresh(answer):
                self._counts["hits"] += 1
                return answer
            self._counts["misses"] += self._disk is None and self.others is None
        return None

    def load(self, key: str) -> Answer | None:
        """Return the fresh answer on disk, or None, after `recall` has found nothing. Blocks.

        What follows on a miss, if others share their answers, is `load_shared`.
        """
        answer = self._from_disk(key)
        if answer is not None and not self._is_fresh(answer):
            answer = None
        with self._lock:
            self._counts["hits"] += answer is not None
            self._counts["misses"] += answer is None and self.others is None
            self._counts["disk_hits"] += answer is not None
        return answer

    def load_shared(self, answer: Answer | None, evictions: int) -> Answer | None:
        """Take what others had when `recall` and `load` found nothing; return it if it is fresh.

        Args:
            answer: What they had.
            evictions: The number of evictions when they were asked: it may be from before the last.
        """
        if answer is not None and evictions == self.evictions:
            self._remember_if_newer(answer, evictions)
        is_hit = answer is not None and evictions == self.evictions and self._is_fresh(answer)
        with self._lock:
            self._counts["hits" if is_hit else "misses"] += 1
            self._counts["shared_hits"] += is_hit
        return answer if is_hit else None

    def peek(self, key: str) -> Answer | None:
        """Look again, in memory only, right after `recall` and `load` have found nothing.

        For a leader: an identical call may have landed in between. A find counts as a hit and no
        longer as a miss.
        """
        with self._lock:
            answer = self._entries.get(key)
            if answer is None or not self._is_fresh(answer):
                return None
            self._counts.update(hits=1, misses=-1)
            return answer

    def get_stale(self, key: str) -> Answer | None:
        """Return an answer that expired at most `stale_if_error` seconds ago (or not yet).

        For a call that cannot be answered otherwise.
        """
        with self._lock:
            answer = self._entries.get(key)
        if answer is None:
            answer = self._from_disk(key)
        if answer is not None:
            with self._lock:
                self._counts["hits" if self._is_fresh(answer) else "stale"] += 1
        return answer

    def store(self, key: str, answer: Answer) -> None:
        """Store `answer` under `key` in memory; what follows is `save`.

        Marks the answer with key and time, so one answer belongs under one key.
        """
        answer.key = key
        answer.stored_at = self._clock()
        if self._policy.max_bytes is not None:
            answer.size = _weight(answer)
        with self._lock:
            self._counts["stored"] += 1
            self._remember(answer)

    def save(self, answer: Answer) -> None:
        """Write an answer that is kept, and not evicted since, to disk if there is one. Blocks."""
        disk = self._opened_disk()
        if disk is not None and not answer.is_evicted and disk.store(answer.key, answer):
            self._undo_if_evicted(disk, answer)

    def evict(self, key: str) -> None:
        """Forget the answer stored under `key`, if there is one."""
        with self._lock:
            self.evictions += 1
            answer = self._entries.pop(key, None)
            if answer is not None:
                answer.is_evicted = True
        disk = self._opened_disk()
        if disk is not None:
            disk.evict(key)
        if self.others is not None:
            self.others.forget(key)

    def clear(self) -> None:
        """Forget every answer, also those that the folder keeps for other processes."""
        with self._lock:
            for answer in self._entries.values():
                answer.is_evicted = True
        self.close()
        disk = self._opened_disk()
        if disk is not None:
            disk.clear()
        if self.others is not None:
            self.others.forget()

    def close(self) -> None:
        """Release the memory; what is on disk stays. The cache can still be used."""
        with self._lock:
            self.evictions += 1
            self._entries = self._no_entries()

    def numbers(self) -> CacheNumbers:
        """Return the numbers so far."""
        entries = len(self)
        disk = None if self._disk is _UNOPENED else self._disk
        with self._lock:
            counts = Counter(self._counts)
        skipped = {"too_large": counts["too_large"], "disk": disk.skipped if disk else 0}
        names = ("hits", "misses", "stale", "stored", "evicted", "disk_hits", "shared_hits")
        return CacheNumbers(
            entries=entries,
            skipped={reason: count for reason, count in skipped.items() if count},
            disk_errors=dict(disk.errors) if disk else {},
            **{name: counts[name] for name in names},
        )

    def renew(self) -> None:
        """Make the lock anew in a forked child; keep the entries unless one was being changed."""
        if self._lock.locked():
            self._entries = self._no_entries()
        self._lock = threading.Lock()

    def _no_entries(self) -> _Entries:
        room = self._policy.max_bytes
        entries = _Entries(
            self._policy.max_entries if room is None else room,
            ttu=lambda _, answer, __: answer.stored_at + self._kept,
            timer=self._clock,
            getsizeof=None if room is None else operator.attrgetter("size"),
        )
        entries.counts = self._counts
        return entries

    def _is_fresh(self, answer: Answer) -> bool:
        return self._clock() - answer.stored_at < self._ttl

    def _remember(self, answer: Answer) -> None:
        """Put `answer` into memory; the lock is held."""
        try:
            self._entries[answer.key] = answer
        except ValueError:  # larger than all the room there is
            self._counts["too_large"] += 1
            self._entries.pop(answer.key, None)
        with suppress(KeyError):  # some may expire meanwhile
            while len(self._entries) > self._policy.max_entries:
                self._entries.popitem()

    def _opened_disk(self) -> DiskCache | None:
        if self._disk is _UNOPENED:
            folder = self._folder() if callable(self._folder) else self._folder
            disk = None if folder is None else self._disk_at(folder)
            with self._lock:
                self._disk = disk if self._disk is _UNOPENED else self._disk
        return self._disk

    def _disk_at(self, folder: str) -> DiskCache:
        limit = self._policy.disk_bytes
        beside = self._policy.disk == "auto"
        return DiskCache(
            folder, limit_bytes=limit, beside=beside, clock=self._clock, wall=self._wall
        )

    def _undo_if_evicted(self, disk: DiskCache, answer: Answer) -> None:
        """Remove the file of an answer that was evicted while it was being written."""
        if answer.is_evicted:
            disk.evict(answer.key)

    def _from_disk(self, key: str) -> Answer | None:
        """Return the answer on disk, now in memory too, unless it has expired for good."""
        disk = self._opened_disk()
        if disk is None:
            return None
        evictions = self.evictions
        answer = disk.load(key)
        if answer is None:
            return None
        if self._clock() - answer.stored_at >= self._kept:
            disk.evict(key)
            return None
        self._remember_if_newer(answer, evictions)
        return answer

    def _remember_if_newer(self, answer: Answer, evictions: int) -> None:
        """Put an answer from elsewhere into memory, unless a newer one is there or it was evicted."""
        if self._policy.max_bytes is not None:
            answer.size = _weight(answer)
        with self._lock:
            known = self._entries.get(answer.key)
            if evictions == self.evictions and (
                known is None or known.stored_at < answer.stored_at
            ):
                self._remember(answer)


def _weight(answer: Answer) -> int:
    """Estimate the bytes `answer` takes up, by adding up everything it leads to."""
    seen: set[int] = set()
    todo: list[Any] = [answer.outputs, answer.record, answer.key]
    total = sys.getsizeof(answer)
    while todo and len(seen) < _MOST_WEIGHED:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        total += sys.getsizeof(value, 64)
        if isinstance(value, dict):
            todo.extend(value)
            todo.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo.extend(value)
        elif not isinstance(value, (str, bytes, int, float)):
            slots = (getattr(value, name, None) for name in getattr(value, "__slots__", ()))
            todo.extend((getattr(value, "__dict__", None), *slots))
    return total


class RemoteTier(Protocol):
    """Answers that other processes have stored, and will find. Nothing here blocks or raises."""

    def load(self, key: str) -> Future[Answer | None] | None:
        """Return the future of the answer stored under `key`, or None if there is no asking now."""
        ...

    def store(self, answer: Answer) -> Future[Answer | None] | None:
        """Store `answer` in the background; return the future of its being there, or None."""
        ...

    def forget(self, key: str | None = None) -> None:
        """Have the answer stored under `key` forgotten, or all."""
        ...

    def patience_left(self) -> float:
        """Seconds to wait yet for the futures, before `go_alone`."""
        ...

    def go_alone(self) -> None:
        """Hear that somebody has waited in vain."""
        ...
