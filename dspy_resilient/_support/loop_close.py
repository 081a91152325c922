"""Tells when an event loop is closed, at that moment, without looking at it now and then.

A closed loop drops the timers that were still to come. One that is due in decades, and that only
its loop holds, is dropped then and at no other time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_NEVER = 2.0**31  # seconds: 68 years


class _AtClose:
    """A timer's callback that acts as it is dropped, not as it is called."""

    __slots__ = ("_act",)

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def __call__(self) -> None:
        """Do nothing: nobody's loop runs for that long."""

    def __del__(self) -> None:
        with suppress(Exception):  # also of an interpreter that is half gone
            self._act()


def when_closed(loop: asyncio.AbstractEventLoop, act: Callable[[], object]) -> None:
    """Have `act` called once, within `loop.close()`, on the thread that calls that.

    `loop` counts as closed by then. Errors of `act` are dropped. To be called on `loop`. The loop
    holds `act` until then; `act` must not hold the loop.
    """
    loop.call_later(_NEVER, _AtClose(act))
