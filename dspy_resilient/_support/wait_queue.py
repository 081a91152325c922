"""Who waits, and who is to be told.

What the circuit and the throttle gate have in common. Nothing here decides who may go, waits for
anything, or starts a thread.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections import OrderedDict, deque
from concurrent.futures import Future
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakMethod

from dspy_resilient._support.deliverer import Deliverer

if TYPE_CHECKING:
    from collections.abc import Callable

    Listener: TypeAlias = Callable[[Any], object]


_SAME = 1.0  # seconds by which two readings of the end of one wait may differ


class Notifier:
    """What others must hear once their owner's lock is released: waiters and events.

    Under the lock, `call` picks waiters and `note` queues events; without it, `send` resolves the
    former and delivers the latter.

    Args:
        listener: Called with each event, or the `Deliverer` of the client, or None.
    """

    __slots__ = ("_called", "_deliverers", "_line", "pending")

    def __init__(self, listener: Listener | None) -> None:
        self._deliverers: list[tuple[Callable[[], Listener | None], Deliverer]] = []
        self._line: OrderedDict[Future[float], None] = OrderedDict()
        self._called: deque[tuple[Future[float], float]] = deque()
        self.pending = False  # whether there may be anything to send
        if listener is not None:
            deliverer = listener if isinstance(listener, Deliverer) else Deliverer(listener)
            self._deliverers = [(lambda: listener, deliverer)]

    def add(self, listener: Listener) -> None:
        """Have `listener` hear every event from now on, once; a method's object is held weakly."""
        self.remove(listener)
        get = WeakMethod(listener) if isinstance(listener, MethodType) else lambda: listener

        def tell(event: Any) -> None:
            if (alive := get()) is not None:
                alive(event)

        self._deliverers = [*self._deliverers, (get, Deliverer(tell))]

    def remove(self, listener: Listener) -> None:
        """Have `listener` hear nothing more; one that never did is ignored."""
        self._deliverers = [each for each in self._deliverers if each[0]() not in (None, listener)]

    @property
    def waiting(self) -> int:
        """Waiters in line."""
        return len(self._line)

    def enlist(self, waiter: Future[float]) -> None:
        """Put `waiter` at the end of the line; needs the lock."""
        self._line[waiter] = None

    def leave(self, waiter: Future[float]) -> bool:
        """Take `waiter` out of the line; False if it was called already; needs the lock."""
        in_line = waiter in self._line
        self._line.pop(waiter, None)
        return in_line

    def call(self, count: float = math.inf, seconds: Callable[[], float] | None = None) -> None:
        """Call the `count` waiters that have waited longest (default: all); needs the lock.

        Each is told to go after `seconds()`; None (default): at once.
        """
        while self._line and count > 0:
            waiter, _ = self._line.popitem(last=False)
            if waiter.set_running_or_notify_cancel():
                self._called.append((waiter, 0.0 if seconds is None else seconds()))
                self.pending = True
                count -= 1

    def note(self, event: Any) -> None:
        """Queue `event` for the listeners, if there are any; needs the lock."""
        for _, deliverer in self._deliverers:
            deliverer.note(event)
            self.pending = True

    def renew(self) -> None:
        """Forget everything: in a forked child nobody waits."""
        self._line.clear()
        self._called.clear()

    def send(self) -> None:
        """Resolve the called waiters and deliver the events; without the lock."""
        self.pending = False
        try:
            while self._called:
                try:
                    waiter, seconds = self._called.popleft()
                except IndexError:  # another thread was quicker
                    break
                waiter.set_result(seconds)
            for _, deliverer in self._deliverers:
                deliverer.send()
        except BaseException:  # Ctrl-C
            self.pending = True
            raise


class WaitQueue:
    """Something that callers may have to wait at, in line and without a timer.

    Whoever is one calls `_set_up` first, and says how long the wait is.
    """

    _told_until = -math.inf

    def _set_up(self, clock: Callable[[], float], listener: Listener | None) -> None:
        self._clock = clock
        # Re-entrant: the garbage collector may close an abandoned generator on this very thread
        # while it is in here, and the generator then reports its permit.
        self._lock = threading.RLock()
        self._notifier = Notifier(listener)

    def renew(self) -> None:
        """Make it usable in a forked child, where its callers do not exist."""
        self._lock = threading.RLock()
        self._notifier.renew()

    @abstractmethod
    def _wait(self, now: float) -> float:
        """Answer `wait_time` at the clock's reading `now`; has the lock."""

    def wait_time(self) -> float:
        """Return the seconds until it makes sense to ask for leave again.

        0.0 if a call would be let through now, and `math.inf` if only a hand can end the wait. A
        caller that means to wait enlists.
        """
        with self._lock:
            return self._wait(self._clock())

    def recheck_time(self) -> float:
        """Return the seconds after which a waiter must ask again though it was not called.

        There is no timer to tell that the clock alone has ended the wait. `math.inf` if only a
        hand can change anything.
        """
        return self.wait_time()

    def is_news(self, until: float) -> bool:
        """Whether nobody has been told yet of a wait that lasts until the clock reads `until`."""
        with self._lock:
            is_news = until > self._told_until + _SAME
            if is_news:
                self._told_until = until
        return is_news

    def enlist(self) -> Future[float]:
        """Return a future that is resolved as soon as there is something new for this waiter.

        Its result is the seconds after which to ask again: those who wait do not go all at once.
        To be called is not to be let through: ask again, and enlist again if refused. Wait no
        longer than `recheck_time()`. A waiter that was not called, or was but does not ask again,
        must `leave`.
        """
        waiter: Future[float] = Future()
        with self._lock:
            if self._wait(self._clock()) == 0:
                waiter.set_result(0.0)
            else:
                self._notifier.enlist(waiter)
        return waiter

    def leave(self, waiter: Future[float]) -> None:
        """Stop waiting. If `waiter` was called, a place that is free now goes to the next."""
        with self._lock:
            if not self._notifier.leave(waiter) and self._wait(self._clock()) == 0:
                self._notifier.call(1)
        self._notifier.send()
