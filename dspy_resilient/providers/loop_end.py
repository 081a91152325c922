"""Has something done at the end of an event loop: on it before it is closed, and when it is.

`asyncio.run` last calls the loop's `shutdown_asyncgens`, which ends every async generator that was
begun on it. A generator of ours that waits for nothing is among them, so that what belongs to the
loop can be closed in good order while it still runs. A loop that somebody closes without that is
caught in `close()` itself. Requests are not our business.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.loop_close import when_closed

Loop = asyncio.AbstractEventLoop
Finish = Callable[[Loop], Awaitable[None]]
Abandon = Callable[[weakref.ref[Loop]], None]


class _Tended:
    """The loops that are seen to; locked at a loop's first request only."""

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self.renew()

    def renew(self) -> None:
        """Begin anew in a forked child, which neither runs nor ends its parent's loops."""
        self._inherited.append(getattr(self, "_ends", None))
        self._changing = threading.Lock()
        self._ends: weakref.WeakKeyDictionary[Loop, AsyncGenerator[None]]
        self._ends = weakref.WeakKeyDictionary()

    def add(self, loop: Loop, finish: Finish, abandon: Abandon) -> None:
        if loop in self._ends:
            return
        ref = weakref.ref(loop)
        end = _end(ref, finish)
        with self._changing:
            self._ends[loop] = end
        when_closed(loop, lambda: abandon(ref))
        if not getattr(loop, "_asyncgens_shutdown_called", False):  # else asyncio would warn
            _start(end)


async def _end(own: weakref.ref[Loop], finish: Finish) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        # Nothing if it goes together with its loop, or when that has been closed already.
        loop = own()
        if loop is not None and asyncio._get_running_loop() is loop:  # noqa: SLF001  # documented
            with contextlib.suppress(Exception):
                await finish(loop)


def _start(generator: AsyncGenerator[None]) -> None:
    """Run `generator` to its `yield`, known to its loop but not holding it.

    A generator keeps the finalizer in use when it starts, and asyncio's belongs to the loop.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=None)
    try:
        started = generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)
    with contextlib.suppress(StopIteration):  # it awaits nothing on its way
        started.__await__().send(None)


_tended = _Tended()
renew_after_fork(_tended)


def tend(loop: Loop, finish: Finish, abandon: Abandon) -> None:
    """Have `finish(loop)` awaited when `loop`, which runs, shuts down, and `abandon` called at its end.

    `abandon` gets a weak reference to the loop, on the thread that closes it. Once for each loop;
    afterwards a look-up. Never raises.
    """
    with contextlib.suppress(Exception):
        _tended.add(loop, finish, abandon)
