"""The queue before one target: who may send now, and when the next may.

This module owns the queue. It never waits, and it has no timer and no thread: a caller that waits
does so on its slot's future, for as long as `wait_time` says, and then polls. How many at once and
how many per minute is for `bulkhead` and `rate` to say.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from itertools import islice
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.errors import LimitExceededError
from dspy_resilient.limits.bulkhead import Bulkhead
from dspy_resilient.limits.rate import Rates
from dspy_resilient.limits.slot import RESOLVED, Departure, Slot, State, pending
from dspy_resilient.outcomes.broken_state import needs_intact_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from dspy_resilient.policies import LimitPolicy

_ROUNDING = 1e-6
"""Seconds by which sums of floats may make a turn look late that is not."""


class Limiter:
    """Admits attempts to one target in strict arrival order, within every limit of its policy.

    Threads and any number of event loops may share one. A place that becomes free belongs to the
    head of the queue before anybody else can ask, and nobody overtakes, not even a small request
    a large one. Futures are resolved with no lock held. A forked child starts with an empty
    limiter, in which the parent's slots count for nothing.
    """

    def __init__(
        self,
        policy: LimitPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        client: str = "",
        target: str | None = None,
        rates: Rates | None = None,
    ) -> None:
        """Start empty, with a full rate budget.

        Args:
            policy: What is allowed.
            clock: Monotonic seconds.
            client: Name of the client, for errors.
            target: Label of the target, for errors.
            rates: What of the policy's rates there is, if others use them too.
        """
        self.policy = policy
        self._rates = Rates(policy.rpm, policy.tpm) if rates is None else rates
        self._rates.wake = self.look_again
        self._has_others = self._rates.patience > 0
        self._clock = clock
        self._client = client
        self._target = target
        self._is_told = False
        self.renew()
        renew_after_fork(self)

    @property
    def in_use(self) -> int:
        """Attempts under way."""
        return self._leases.in_use

    @property
    def queued(self) -> int:
        """Callers waiting for their turn."""
        return len(self._queue)

    @property
    def limit(self) -> int | None:
        """How many attempts may be under way at present, or None for any number."""
        limit = self._leases.limit
        return None if math.isinf(limit) else int(limit)

    @property
    def patience(self) -> float:
        """Seconds in which a slot may yet be granted without having queued; see `Rates`."""
        return self._rates.patience

    @needs_intact_state
    def enter(self, tokens: int = 0, patience: float = math.inf) -> Slot:
        """Return a slot: granted if its turn is now, else at the end of the queue.

        Args:
            tokens: Estimate of the tokens this attempt will use, prompt and answer together. An
                attempt with more than the rate ever holds at once goes when the rate is full.
            patience: Seconds the caller can wait. If the rates alone make it longer, it is refused
                at once; how long those under way will take is not known, and not counted.

        Raises:
            LimitExceededError: The queue is full, or too slow for `patience`. Nothing was taken;
                `retry_after` is set where the rate alone decides when there is room again.
        """
        slot = Slot(self, self._leases, max(0, tokens))
        refusal: LimitExceededError | None = None
        try:
            with self._lock:
                now = self._clock()
                woken = self._advance(now)
                if not self._queue and self._ready_at(slot) - now <= _ROUNDING:
                    self._grant(slot, State.GRANTED, now)
                elif (
                    self.policy.max_queue is not None
                    and len(self._queue) >= self.policy.max_queue
                    and not self._may_be_ready(slot, now)
                ):
                    refusal = self._full(self._ready_at(next(iter(self._queue), slot)) - now)
                elif (wait := self._turn_at(slot) - now) > patience:
                    refusal = self._too_slow(wait)
                else:
                    slot.future = pending()
                    self._queue[slot] = None
                    self._queued_tokens += slot.tokens
                    if self._has_others:
                        self._foresee()
            self._resolve(woken)
        except BaseException:  # Ctrl-C
            slot.release(sent=False)
            raise
        if refusal is not None:
            raise refusal
        return slot

    @needs_intact_state
    def has_room(self) -> bool:
        """Whether an attempt, however small, would be let in now."""
        with self._lock:
            now = self._clock()
            woken = self._advance(now)
            is_free = not self._queue and self._leases.has_room
            has_room = is_free and self._rates.ready_at(0) - now <= _ROUNDING
        self._resolve(woken)
        return has_room

    @needs_intact_state
    def wait_time(self, slot: Slot) -> float:
        """Answer `Slot.wait_time`."""
        due = -math.inf
        with self._lock:
            now = self._clock()
            if slot.state is State.QUEUED:
                if next(iter(self._queue), None) is slot:
                    slot.due = self._ready_at(slot)
                due = slot.due
        self._resolve(())
        return due - now if due - now > _ROUNDING else 0.0

    @needs_intact_state
    def poll(self, slot: Slot) -> bool:
        """Answer `Slot.poll`."""
        with self._lock:
            woken = self._advance(self._clock())
            if slot.state is State.OFFERED:
                slot.state = State.GRANTED
            elif slot.state is State.QUEUED and slot.future is RESOLVED:
                slot.future = pending()
        self._resolve(woken)
        return slot.granted

    def is_news(self) -> bool:
        """Whether nobody has been told yet that this queue is long: once until it is empty."""
        with self._lock:
            was_told = self._is_told
            self._is_told = True
        self._resolve(())
        return not was_told

    @needs_intact_state
    def release(self, departure: Departure) -> None:
        """Perform `Slot.release`: note it, and let whoever holds the lock apply it."""
        self._departures.append(departure)
        self._settle()

    def look_again(self) -> None:
        """Let in whoever may go by now, as `poll` does: the rates have changed."""
        with self._lock:
            woken = self._advance(self._clock())
        self._resolve(woken)

    def disband(self) -> None:
        """Wake everybody in the queue: another limiter has taken the place of this one."""
        with self._lock:
            waiting = [slot for slot in self._queue if slot.future is not RESOLVED]
            woken = [slot.future for slot in waiting]
            for slot in waiting:
                slot.future = RESOLVED
        self._resolve(woken)

    def renew(self) -> None:
        """Start empty, with a full rate budget: what a forked child does."""
        policy = self.policy
        self._lock = threading.Lock()
        self._leases = Bulkhead(policy.max_concurrent, adaptive=policy.adaptive)
        self._rates.renew()
        self._queue: OrderedDict[Slot, None] = OrderedDict()
        self._queued_tokens = 0.0
        self._is_told = False
        self._departures: deque[Departure] = deque()

    def _ready_at(self, slot: Slot) -> float:
        """Return from when `slot` may go once it is first; requires the lock."""
        return self._rates.ready_at(slot.tokens) if self._leases.has_room else math.inf

    def _turn_at(self, slot: Slot) -> float:
        """Return from when the rates let `slot` go behind the whole queue; requires the lock."""
        return self._rates.turn_at(slot.tokens, len(self._queue), self._queued_tokens)

    def _may_be_ready(self, slot: Slot, now: float) -> bool:
        """Whether nothing is known that `slot` would have to wait for; requires the lock."""
        return self._leases.has_room and self._turn_at(slot) - now <= _ROUNDING

    def _foresee(self) -> None:
        """Tell the rates who goes next if they let it; requires the lock."""
        room = self._leases.limit - self._leases.in_use
        queue = self._queue if math.isinf(room) else islice(self._queue, max(0, int(room)))
        self._rates.foresee(slot.tokens for slot in queue)

    def _grant(self, slot: Slot, state: State, now: float) -> None:
        """Give `slot` its place; requires the lock."""
        slot.state = state
        slot.begun = self._leases.round
        self._leases.in_use += 1
        self._rates.take(1, slot.tokens, now)

    def _advance(self, now: float) -> list[Future[None]]:
        """Offer places from the head of the queue on; requires the lock.

        Returns:
            The futures to resolve with the lock released: of everybody who was offered a place,
            and of the new head if it may go sooner than it knows.
        """
        woken: list[Future[None]] = []
        while self._queue:
            head = next(iter(self._queue))
            ready = self._ready_at(head)
            if ready - now <= _ROUNDING:
                self._unqueue(head)
                self._grant(head, State.OFFERED, now)
            elif ready < head.due:
                head.due = ready
            else:
                break
            if head.future is not RESOLVED:
                woken.append(head.future)
                head.future = RESOLVED
        if self._has_others:
            self._foresee()
        return woken

    def _unqueue(self, slot: Slot) -> None:
        """Take `slot` out of the queue if it got there; requires the lock."""
        if slot in self._queue:
            del self._queue[slot]
            self._queued_tokens -= slot.tokens
            self._is_told = self._is_told and bool(self._queue)

    def _depart(self, departure: Departure, now: float) -> None:
        """Take a slot out of the queue or off its place; requires the lock."""
        slot, used, sent, throttled, slow, ok = departure
        state = slot.state
        if state is State.RELEASED or slot.places is not self._leases:
            return
        slot.state = State.RELEASED
        if state is State.QUEUED:
            self._unqueue(slot)
            return
        self._leases.in_use -= 1
        if self._leases.in_use < 0:
            raise RuntimeError("more attempts have ended than were let in")
        if state is State.OFFERED or not sent:
            self._rates.take(-1, -slot.tokens, now)
            return
        if used is not None and 0 <= used < math.inf:
            self._rates.take(0, used - slot.tokens, now)
        self._leases.learn(slot.begun, throttled=throttled, slow=slow, ok=ok)

    def _settle(self) -> None:
        """Apply departures, unless the lock is taken: its holder comes here after releasing it."""
        while self._departures and self._lock.acquire(blocking=False):
            try:
                now = self._clock()
                while self._departures:
                    self._depart(self._departures.popleft(), now)
                woken = self._advance(now)
            finally:
                self._lock.release()
            for future in woken:
                future.set_result(None)
        if self._has_others and not self._lock.locked():  # else its holder comes here
            self._rates.fetch()

    def _resolve(self, woken: Iterable[Future[None]]) -> None:
        """Resolve `woken`, then apply the departures that found the lock taken."""
        for future in woken:
            future.set_result(None)
        self._settle()

    def _full(self, wait: float) -> LimitExceededError:
        when = "" if math.isinf(wait) else f"; there is room in {wait:.1f} s"
        return LimitExceededError(
            f"client {self._client!r}: {self._target or 'the target'} takes no more calls, "
            f"{self.in_use} are under way and {self.queued} waiting "
            f"(max_queue={self.policy.max_queue}){when}",
            client=self._client,
            retry_after=None if math.isinf(wait) else wait,
        )

    def _too_slow(self, wait: float) -> LimitExceededError:
        return LimitExceededError(
            f"client {self._client!r}: the rate of {self._target or 'the target'} (rpm="
            f"{self.policy.rpm}, tpm={self.policy.tpm}) lets this call go in {wait:.1f} s, which is "
            "longer than it may wait",
            client=self._client,
            retry_after=wait,
        )
