"""Who goes to the store, so that nobody else has to stand there waiting.

A `Courier` is a daemon thread that lives while there is something to carry. Callers leave word with
a `Link` and get a future, on which a thread can block and a task can wait. This module decides when
to go; what is said, and what a fault of the store means, is the links' business.
"""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from dspy_resilient.circuit.describe import describe
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.fork import renew_after_fork
from dspy_resilient.shared.link import VIEW_AGE, carry

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.shared.link import Link
    from dspy_resilient.shared.store import Store

_IDLE = 5.0


class Contact:
    """Whether a client is in contact with the store, and since when it is not.

    Args:
        clock: Monotonic seconds.
        emit: Told of `StoreLost` and `StoreFound`: kind and facts.
    """

    def __init__(self, *, clock: Callable[[], float], emit: Callable[..., object]) -> None:
        self.clock = clock
        self._emit = emit
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew in a forked child."""
        self._lock = threading.Lock()
        self._lost: dict[Link[Any, Any], float] = {}

    def note(self, link: Link[Any, Any], error: BaseException | None) -> None:
        """Tell of it when the first link loses the store, and when the last has found it again."""
        with self._lock:
            now, before = self.clock(), bool(self._lost)
            since = self._lost.setdefault(link, now)
            if error is None:
                del self._lost[link]
            changed = before is not bool(self._lost)
            others = list(self._lost) if error is None else ()
        for other in others:  # it need not wait for somebody to need it
            if other.is_old:
                other.ask()
        if changed and error is not None:
            self._emit(StoreLost, error=describe(error))
        elif changed:
            self._emit(StoreFound, seconds=now - since)


class Courier:
    """Carries what links have to say, one after the other.

    Args:
        store: Where to.
        contact: Told how it went; shared by all couriers of a client.
    """

    def __init__(self, store: Store, contact: Contact) -> None:
        self.store = store
        self.contact = contact
        self.clock = contact.clock
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew: in a forked child there is no thread and nothing under way."""
        self._lock = threading.RLock()  # a finalizer may leave word while this thread does
        self._errands: SimpleQueue[Link[Any, Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._watched: dict[Link[Any, Any], None] = {}

    def send(self, link: Link[Any, Any]) -> None:
        """Go for `link` as soon as possible."""
        self._errands.put(link)
        self._wake()

    def watch(self, link: Link[Any, Any]) -> None:
        """Go for `link` from time to time, for as long as it wants news."""
        with self._lock:
            is_new = link not in self._watched
            self._watched[link] = None
        if is_new:  # the thread may have settled down for a long wait
            self.send(link)

    def _wake(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="store", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        errands = self._errands
        while True:
            try:
                links = [errands.get(timeout=VIEW_AGE if self._watched else _IDLE)]
            except Empty:
                if self._may_leave():
                    return
            else:
                while not errands.empty():  # nobody else takes any
                    links.append(errands.get())
                carry(self.store, links)
            self._look_round()

    def _look_round(self) -> None:
        """Ask for the links that want news."""
        for link in list(self._watched):
            if not link.wants_news():
                with self._lock:
                    self._watched.pop(link, None)
            elif link.is_old:
                link.ask()

    def _may_leave(self) -> bool:
        with self._lock:
            if self._watched:
                return False
            self._thread = None
        if not self._errands.empty():  # from somebody who still saw this thread
            self._wake()
        return True
