"""The calls of a client that are under way: how many, when the last has ended, and how to end them.

A client that is being closed lets its calls finish for a while and then ends what is left. A call
is ended in the step it is in, so that it leaves nothing behind: its driver says, for each step that
takes time, what would end it. A call is stranded when its event loop was closed under it: nothing
will ever go on with it, nor give back what it holds; its coroutine is closed then, as the loop is.
This module waits for nothing.
"""

from __future__ import annotations

import contextvars
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.loop_close import when_closed
from dspy_resilient.errors import ClientClosedError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop as Loop
    from collections.abc import Callable, Coroutine, Iterator


class InFlight:
    """The calls of one client that are under way; safe for threads, event loops and forks.

    Attributes:
        are_endable: Whether sync attempts run on threads of their own, so that their callers need
            not wait for them. (Else a sync attempt ends when its request does.)
        ended: Whether the calls have been told to end.
    """

    def __init__(self, client: str = "") -> None:
        """Begin with none.

        Args:
            client: Name of the client, for errors.
        """
        self.are_endable = False
        self.ended = False
        self._client = client
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Forget, in a forked child, what only its parent has under way."""
        self._running: set[Running] = set()
        self._idle: Future[None] | None = None

    def __len__(self) -> int:
        """Return how many calls are under way."""
        return len(self._running)

    def call(self) -> Running:
        """Return a call, which is under way in its `with` block."""
        return Running(self)

    def idle(self) -> Future[None]:
        """Return a future that is done once no call is under way. Nobody must begin one any more."""
        idle = self._idle
        if idle is None:
            idle = self._idle = Future()
            idle.set_running_or_notify_cancel()
        self._look()
        return idle

    def end(self) -> None:
        """Have all calls end at once with ClientClosedError, and all that begin later."""
        self.ended = True
        for each in list(self._running):
            each.end()

    def check(self) -> None:
        """Raise ClientClosedError if the calls have been told to end."""
        if self.ended:
            raise ClientClosedError(
                f"client {self._client!r} was closed before the call had finished",
                client=self._client,
            )

    def add(self, running: Running) -> None:
        """Note that a call has begun."""
        self._running.add(running)

    def discard(self, running: Running) -> None:
        """Note that a call has ended."""
        self._running.discard(running)
        if self._idle is not None:
            self._look()

    def _look(self) -> None:
        idle = self._idle
        if idle is not None and not self._running:
            with suppress(Exception):  # another thread has just said so
                idle.set_result(None)


class Running:
    """One call under way."""

    __slots__ = ("_coroutine", "_end", "_loop", "_task", "calls")

    def __init__(self, calls: InFlight) -> None:
        """Belong to `calls`, which alone makes them."""
        self.calls = calls
        self._end: Callable[[], object] | None = None
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._loop: Loop | None = None
        self._task: object = None

    def __enter__(self) -> Self:
        """Begin."""
        self.calls.add(self)
        if self._loop is not None:
            _on_loops.add(self, self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        """End; if stranded, the task is let go of later, when nobody is in the middle of it."""
        self.calls.discard(self)
        if not self.is_stranded:
            self._let_go()

    def depend_on(self, loop: Loop, task: object, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Note that only `loop` goes on with `coroutine`, which belongs to its `task`."""
        self._coroutine, self._loop, self._task = coroutine, loop, task

    @property
    def is_stranded(self) -> bool:
        """Whether nothing will ever go on with this call."""
        loop = self._loop
        return loop is not None and loop.is_closed()

    @contextmanager
    def ended_by(self, end: Callable[[], object]) -> Iterator[None]:
        """Do something that `end`, called on any thread, breaks off; not at all if it is too late."""
        self._end = end
        try:
            self.calls.check()  # whoever ends the calls says so first, and then looks for `end`
            yield
        finally:
            self._end = None

    def end(self) -> None:
        """Break off what is being done; a stranded call gives back, on this thread, what it holds."""
        if self.is_stranded:
            contextvars.Context().run(self._close)
        elif (end := self._end) is not None:
            with suppress(RuntimeError):  # its event loop has been closed just now
                end()

    def _close(self) -> None:
        """Close the coroutine, in a context in which nobody is.

        Its task lives until that is done: without another holder it would close the coroutine once
        more in the middle of it, and CPython 3.11 does not survive that.
        """
        task, coroutine = self._task, self._coroutine
        if coroutine is not None:
            with suppress(Exception):  # such as another thread's doing the same
                coroutine.close()
        self.calls.discard(self)
        self._let_go()
        del task

    def _let_go(self) -> None:
        if self._loop is not None:
            _on_loops.discard(self, self._loop)
        self._coroutine = self._loop = self._task = None


class _OnLoops:
    """The calls of all clients of the process that depend on an event loop, by loop.

    Clients lend each other targets, circuits and limits, so that a stranded call may hold what any
    other waits for: it is ended as its loop is closed. Until then calls are held here lest the
    collector end them, which it does anywhere: should that be within `ContextVar.set`, in whose
    context LiteLLM sets variables as it ends, CPython 3.11 goes on with freed memory. A forked child
    holds its parent's, for the same reason.
    """

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin with none in a forked child."""
        self._inherited.append(getattr(self, "_by_loop", None))
        self._by_loop: WeakKeyDictionary[Loop, set[Running]] = WeakKeyDictionary()

    def add(self, running: Running, loop: Loop) -> None:
        """Hold a call that begins; on `loop`."""
        calls = self._by_loop.get(loop)
        if calls is None:
            calls = self._by_loop[loop] = set()
            when_closed(loop, partial(_end_all, calls))
        calls.add(running)

    def has_any(self, loop: Loop) -> bool:
        """Whether calls on `loop` are under way."""
        return bool(self._by_loop.get(loop))

    def discard(self, running: Running, loop: Loop) -> None:
        """Hold a call that has ended no more."""
        calls = self._by_loop.get(loop)
        if calls is not None:
            calls.discard(running)


def _end_all(calls: set[Running]) -> None:
    for each in list(calls):
        each.end()


_on_loops = _OnLoops()


def has_calls_on(loop: Loop) -> bool:
    """Whether calls, of whatever client, are under way that only `loop` goes on with."""
    return _on_loops.has_any(loop)


class Sending:
    """Marks a context as inside an attempt, until that has ended.

    Not the attempt itself: connections and timers keep copies of the context they were made in.
    """

    __slots__ = ("ended",)

    def __init__(self) -> None:
        self.ended = False


sending: contextvars.ContextVar[Sending | None] = contextvars.ContextVar(
    "dspy_resilient_sending", default=None
)


def is_sending() -> bool:
    """Whether the caller runs inside an attempt of ours, and so may not wait for a flight."""
    mark = sending.get()
    return mark is not None and not mark.ended  # Ctrl-C may strike before the mark is taken back
