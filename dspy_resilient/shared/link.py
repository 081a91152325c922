"""One piece of state that a process has in common with others: what it says, hears, and does alone.

This module decides what a fault of the store means. What is said, and what comes of the answer, is
decided by whoever is linked.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.redact import describe
from dspy_resilient._support.turns import Turn, Turns
from dspy_resilient._support.worker import Worker
from dspy_resilient.events import StoreFound, StoreLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dspy_resilient.shared.store import Store, Verb


Request = TypeVar("Request")
Reply = TypeVar("Reply")

VIEW_AGE = 0.25
"""Seconds: a client acts on nothing older that the store has said, while the store answers."""

PATIENCE = 0.25
"""Seconds that a call waits for the store, where it waits for it at all."""

SILENCE = 2.0
"""Seconds without an answer after which a client goes on with what it knows itself."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Trip(NamedTuple):
    """What is under way between a link and the store.

    Attributes:
        link: Whose it is.
        request: What the link wants to say.
        verb: The same in the words of the store.
        future: Resolved when the link has heard what came of it.
    """

    link: Link[Any, Any]
    request: Any
    verb: Verb
    future: Future[bool]


def carry(store: Store, links: Iterable[Link[Any, Any]]) -> None:
    """Say to the store, in one go, what `links` have to say, and let each hear what comes of it."""
    trips = [trip for link in dict.fromkeys(links) if (trip := link.set_out()) is not None]
    if not trips:
        return
    try:
        replies = store.together([trip.verb for trip in trips])
    except Exception as error:  # noqa: BLE001  # whatever it is, it is a fault of the store
        replies = [error] * len(trips)
    for trip, reply in zip(trips, replies, strict=True):
        trip.link.come_back(trip, reply)


class Link(ABC, Generic[Request, Reply]):
    """One piece of state that this process has in common with others, as far as it is known here.

    While the store answers, the store decides. When it does not, the link is alone: the state of
    this process decides, and the store is tried again in the background, after a growing pause.
    Fields are guarded by the lock of the owner, who provides `_lock`.

    Attributes:
        alone: Whether the store has last failed to answer.
        patience: Seconds that a call waits for an answer.
    """

    patience = PATIENCE

    _lock: threading.RLock
    _courier: Courier

    def _begin(self, courier: Courier) -> None:
        """Set up; nothing has been heard yet."""
        self._courier = courier
        self.alone = False
        self._next: Future[bool] | None = None
        self._under_way: Request | None = None
        self._arrives: Future[bool] | None = None
        self._asked_at = self._heard_at = -math.inf
        self._faults = 0
        self._try_at = -math.inf

    @abstractmethod
    def wants_news(self) -> bool:
        """Whether somebody waits for what the store may say."""

    @abstractmethod
    def _draft(self, now: float) -> Request:
        """Return what is to be said; has the lock."""

    @abstractmethod
    def _say(self, request: Request) -> Verb:
        """Return it in the words of the store; without the lock."""

    def _read(self, request: Request, reply: Any) -> Reply:  # noqa: ARG002  # it may explain it
        """Return what the store's reply means; without the lock."""
        answer: Reply = reply
        return answer

    @abstractmethod
    def _hear(self, now: float, request: Request, reply: Reply) -> None:
        """Act on the answer; has the lock."""

    @abstractmethod
    def _do_without(self, now: float, request: Request | None) -> None:
        """Act on what the store did not hear, with what is known here; has the lock."""

    @abstractmethod
    def _wake(self) -> None:
        """Wake whoever waits for what has come of it; without the lock."""

    @property
    def is_old(self) -> bool:
        """Whether it is time to ask again."""
        now = self._courier.clock()
        if self._next is not None:
            return False
        return now >= self._try_at if self.alone else now - self._heard_at >= VIEW_AGE

    def patience_left(self) -> float:
        """Seconds to wait yet for the answer to what has been asked, whoever asked first."""
        return max(0.0, self._asked_at + self.patience - self._courier.clock())

    def question(self) -> None:
        """Ask in the background if what is known here is old; no caller waits for the answer."""
        now = self._courier.clock()
        is_asked = self._next is not None or self._under_way is not None
        if is_asked and not self.alone and now >= self._asked_at + SILENCE:
            self.go_alone()
        elif self.is_old if self.alone else now - self._heard_at >= VIEW_AGE / 2:
            self.ask()

    def ask(self) -> Future[bool]:
        """Have the courier go; the future is resolved when the answer, or a fault, is in."""
        with self._lock:
            if self._next is not None:
                return self._next
            if self._under_way is None:
                self._asked_at = self._courier.clock()
            future = self._next = Future()
            future.set_running_or_notify_cancel()
        try:
            self._courier.send(self)
        except RuntimeError as error:  # no thread can be started: the interpreter is on its way out
            self.go_alone(error)
        return future

    def set_out(self) -> Trip | None:
        """Return what the courier has to carry, or None if it has been carried."""
        with self._lock:
            future, self._next = self._next, None
            if future is None:
                return None
            request = self._under_way = self._draft(self._courier.clock())
            self._arrives = future
        return Trip(self, request, self._say(request), future)

    def come_back(self, trip: Trip, reply: Any) -> None:
        """Act on what the courier has brought: an answer, or an exception."""
        fault: Exception | None = None
        try:
            self._accept(trip.request, reply)
        except Exception as error:  # noqa: BLE001  # whatever it is, no call may end with it
            fault = error
            with self._lock:
                self._lose(trip.request if self._under_way is trip.request else None)
        trip.future.set_result(True)
        self._wake()
        self._courier.contact.note(self, fault)

    def _accept(self, request: Request, reply: Any) -> None:
        if isinstance(reply, Exception):
            raise reply
        heard = self._read(request, reply)
        with self._lock:
            now = self._courier.clock()
            self.alone, self._faults, self._heard_at, self._asked_at = False, 0, now, now
            self._under_way = None
            self._hear(now, request, heard)

    def go_alone(self, error: Exception | None = None) -> None:
        """Go on without the store, for which a call has waited long enough."""
        with self._lock:
            self._lose(self._under_way)
        self._wake()
        self._courier.contact.note(self, error or TimeoutError(f"no answer within {PATIENCE:g} s"))

    def _lose(self, request: Request | None) -> None:
        """Be alone from now on; has the lock. What the store may not have heard counts here."""
        now = self._courier.clock()
        self._under_way = None
        self.alone = True
        self._try_at = now + min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(self._faults, 16))
        self._faults += 1
        self._do_without(now, request)


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
        self._worker = Worker("store")
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew: in a forked child nothing is under way."""
        self._errands: SimpleQueue[Link[Any, Any]] = SimpleQueue()
        self._watched: dict[Link[Any, Any], None] = {}
        self._turns = Turns()

    def send(self, link: Link[Any, Any]) -> None:
        """Go for `link` as soon as possible.

        Raises:
            RuntimeError: No thread can be started: the interpreter is on its way out.
        """
        self._errands.put(link)
        self._go()

    def watch(self, link: Link[Any, Any]) -> None:
        """Go for `link` from time to time, for as long as it wants news."""
        if link not in self._watched:
            self._watched[link] = None
            self._go()

    def _go(self) -> None:
        if not self._turns.is_taken and (self._watched or not self._errands.empty()):
            self._worker.do(self._work)

    def _work(self) -> None:
        turn = Turn()
        if not self._turns.take(turn):
            return
        while self._watched or not self._errands.empty():
            with suppress(Empty):
                links = [self._errands.get(timeout=VIEW_AGE)]
                while not self._errands.empty():  # only one thread takes any
                    links.append(self._errands.get())
                carry(self.store, links)
            self._look_round()
        turn.over = True
        self._go()  # for what came while this thread still seemed to be at work

    def _look_round(self) -> None:
        """Ask for the links that want news."""
        for link in list(self._watched):
            if not link.wants_news():
                del self._watched[link]
            if link.wants_news():  # also one that has come to want some just now
                self._watched[link] = None
                if link.is_old:
                    link.ask()
