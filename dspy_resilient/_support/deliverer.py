"""The one way in which what has happened reaches a listener: in order, and one at a time.

It knows nothing of what it delivers, and needs no lock: a caller may be stopped by Ctrl-C anywhere.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.turns import Turn, Turns
from dspy_resilient._support.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_QUEUED = 10_000
"""Events that may wait for a slow listener; the oldest make room for later ones."""

_MOMENT = 0.05
_logger = logging.getLogger("dspy_resilient")


class Deliverer:
    """Calls `listener` with each event, in the order in which they were noted.

    The caller that notes an event also delivers it, and so is held up for as long as the listener
    takes for it. What other callers have noted meanwhile it delivers too if the listener is quick
    (50 ms in all); else that is left to a thread of its own, which ends when idle. So a slow
    listener holds up nobody for other callers' events, and events never overtake each other. At
    most `MOST_QUEUED` wait: then the oldest are dropped, counted, and the log says so once. A fault
    of the listener is logged once and reaches no caller; Ctrl-C loses at most the event that is
    being delivered.

    A listener may cause events of its own; it hears of them once it has returned.

    Attributes:
        listener: Called with each event, or None.
        dropped: How many events had to make room.
    """

    def __init__(self, listener: Callable[[Any], object] | None = None) -> None:
        self.listener = listener
        self.dropped = 0
        self._queue: deque[tuple[int, Any]] = deque()
        self._drops = count(1)
        self._worker = Worker("events")
        self._is_faulty = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew in a forked child: what is queued, the parent delivers."""
        self._queue.clear()
        self._turns = Turns()

    def __call__(self, event: Any) -> None:
        """Deliver `event`, after what is queued."""
        self.note(event)
        self.send()

    def note(self, event: Any) -> None:
        """Queue `event`; `send` follows, on this thread, once it holds no lock."""
        if len(self._queue) >= MOST_QUEUED:
            self._drop()
        self._queue.append((threading.get_ident(), event))

    def send(self) -> None:
        """Deliver what is queued, unless another thread is about it."""
        if self._queue:
            self._send(_MOMENT)

    def _send(self, moment: float) -> None:
        try:
            while self._queue and self._deliver_in_turn(moment):
                """What was queued just before the turn was over has found it taken."""
        finally:
            if self._queue and not self._turns.is_taken:
                self._hand_over()

    def _deliver_in_turn(self, moment: float) -> bool:
        """Deliver what is queued; False if another thread does, or is to."""
        turn = Turn()
        try:
            try:
                goes_on = self._turns.take(turn) and self._drain(moment)
            finally:
                turn.over = True
        finally:  # once more: Ctrl-C may have come just before that
            turn.over = True
            del turn  # a traceback that is kept must not keep all later turns
        return goes_on

    def _drain(self, moment: float) -> bool:
        me, end = threading.get_ident(), time.monotonic() + moment
        while self._queue:
            try:
                if self._queue[0][0] != me and time.monotonic() > end:
                    return False
                _, event = self._queue.popleft()
            except IndexError:  # dropped just now
                continue
            self._deliver(event)
        return True

    def _hand_over(self) -> None:
        """Have the thread deliver what is left."""
        try:
            self._worker.do(lambda: self._send(math.inf))
        except RuntimeError:  # no thread can be started: the interpreter is on its way out
            self._drain(math.inf)

    def _deliver(self, event: Any) -> None:
        if self.listener is None:
            return
        try:
            self.listener(event)
        except Exception:  # noqa: BLE001  # a fault of the listener must not become an outage
            if not self._is_faulty:
                self._is_faulty = True
                self._log(logging.ERROR, "listener_failed", event, exc_info=True)

    def _drop(self) -> None:
        try:
            _, event = self._queue.popleft()
        except IndexError:  # delivered just now
            return
        self.dropped = next(self._drops)
        if self.dropped == 1:
            self._log(logging.WARNING, "events_dropped", event)

    def _log(self, level: int, what: str, event: Any, **options: Any) -> None:
        name, client = f"dspy_resilient.{what}", getattr(event, "client", "")
        facts = {"event": name, "client": client}
        _logger.log(level, "%s client=%s", name, client, extra=facts, **options)
