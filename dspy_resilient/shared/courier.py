"""Who goes to the store, so that nobody else has to stand there waiting.

A client has one `Courier`: a daemon thread that lives while there is something to carry. Callers
leave word with a `Link` and get a future, on which a thread can block and a task can wait. This
module decides when to go and what a fault of the store means; what is said is the links' business.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dspy_resilient.circuit.describe import describe
from dspy_resilient.events import StoreFound, StoreLost
from dspy_resilient.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.circuit.waiting import Signals
    from dspy_resilient.shared.store import Store

Request = TypeVar("Request")
Reply = TypeVar("Reply")

VIEW_AGE = 0.25
"""Seconds: a client acts on nothing older that the store has said, while the store answers."""

PATIENCE = 0.25
"""Seconds that a call waits for the store before it goes on with what its own client knows."""

_IDLE = 5.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Courier:
    """Carries what the links of one client have to say, one after the other.

    Args:
        store: Where to.
        clock: Monotonic seconds.
        emit: Told of `StoreLost` and `StoreFound`: kind and facts.
    """

    def __init__(
        self, store: Store, *, clock: Callable[[], float], emit: Callable[..., object]
    ) -> None:
        self.store = store
        self.clock = clock
        self._emit = emit
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew: in a forked child there is no thread and nothing under way."""
        self._lock = threading.Lock()
        self._errands: SimpleQueue[Link[Any, Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._watched: dict[Link[Any, Any], None] = {}
        self._lost: dict[Link[Any, Any], float] = {}

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

    def note(self, link: Link[Any, Any], error: BaseException | None) -> None:
        """Tell of it when the first link loses the store, and when the last has found it again."""
        with self._lock:
            now, before = self.clock(), bool(self._lost)
            since = self._lost.setdefault(link, now)
            if error is None:
                del self._lost[link]
            changed = before is not bool(self._lost)
        if changed and error is not None:
            self._emit(StoreLost, error=describe(error))
        elif changed:
            self._emit(StoreFound, seconds=now - since)

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
                errands.get(timeout=VIEW_AGE if self._watched else _IDLE).carry(self.store)
            except Empty:
                if self._may_leave():
                    return
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


class Link(ABC, Generic[Request, Reply]):
    """One piece of state that this process has in common with others, as far as it is known here.

    While the store answers, the store decides. When it does not, the link is alone: the state of
    this process decides, and the store is tried again in the background, after a growing pause.
    Fields are guarded by the lock of the owner, who provides `_lock` and `_signals`.

    Attributes:
        alone: Whether the store has last failed to answer.
        patience: Seconds that a call waits for an answer.
    """

    patience = PATIENCE

    _lock: threading.RLock
    _signals: Signals
    _courier: Courier

    def _begin(self, courier: Courier) -> None:
        """Set up; nothing has been heard yet."""
        self._courier = courier
        self.alone = False
        self._next: Future[bool] | None = None
        self._under_way: Request | None = None
        self._arrives: Future[bool] | None = None
        self._heard_at = -math.inf
        self._faults = 0
        self._try_at = -math.inf

    @abstractmethod
    def wants_news(self) -> bool:
        """Whether somebody waits for what the store may say."""

    @abstractmethod
    def _draft(self, now: float) -> Request:
        """Return what is to be said; has the lock."""

    @abstractmethod
    def _say(self, store: Store, request: Request) -> Reply:
        """Say it, and return the answer."""

    @abstractmethod
    def _hear(self, now: float, request: Request, reply: Reply) -> None:
        """Act on the answer; has the lock."""

    @abstractmethod
    def _do_without(self, now: float, request: Request | None) -> None:
        """Act on what the store did not hear, with what is known here; has the lock."""

    @property
    def is_old(self) -> bool:
        """Whether it is time to ask again."""
        now = self._courier.clock()
        if self._next is not None:
            return False
        return now >= self._try_at if self.alone else now - self._heard_at >= VIEW_AGE

    def question(self) -> Future[bool] | None:
        """Return what to wait for, if anything, before acting on what is known here."""
        if self.alone:
            if self.is_old:
                self.ask()
            return None
        age = self._courier.clock() - self._heard_at
        if age < VIEW_AGE / 2:
            return None
        answer = self.ask()
        return answer if age >= VIEW_AGE else None

    def ask(self) -> Future[bool]:
        """Have the courier go; the future is resolved when the answer, or a fault, is in."""
        with self._lock:
            if self._next is not None:
                return self._next
            future = self._next = Future()
            future.set_running_or_notify_cancel()
        try:
            self._courier.send(self)
        except RuntimeError as error:  # no thread can be started: the interpreter is on its way out
            self.go_alone(error)
        return future

    def carry(self, store: Store) -> None:
        """Say what there is to say; called by the courier."""
        with self._lock:
            future, self._next = self._next, None
            if future is None:
                return
            request = self._under_way = self._draft(self._courier.clock())
            self._arrives = future
        fault: Exception | None = None
        try:
            reply = self._say(store, request)
            with self._lock:
                now = self._courier.clock()
                self.alone, self._faults, self._heard_at = False, 0, now
                self._under_way = None
                self._hear(now, request, reply)
        except Exception as error:  # noqa: BLE001  # whatever it is, no call may end with it
            fault = error
            with self._lock:
                self._lose(request if self._under_way is request else None)
        future.set_result(True)
        self._signals.send()
        self._courier.note(self, fault)

    def go_alone(self, error: Exception | None = None) -> None:
        """Go on without the store, for which a call has waited long enough."""
        with self._lock:
            self._lose(self._under_way)
        self._signals.send()
        self._courier.note(self, error or TimeoutError(f"no answer within {PATIENCE:g} s"))

    def _lose(self, request: Request | None) -> None:
        """Be alone from now on; has the lock. What the store may not have heard counts here."""
        now = self._courier.clock()
        self._under_way = None
        self.alone = True
        self._try_at = now + min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(self._faults, 16))
        self._faults += 1
        self._do_without(now, request)
