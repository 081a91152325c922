"""What breaks a client, and how often it may be restarted for that (R60).

A break lies on our side of the wire: an HTTP client that somebody has closed, an event loop that
is gone, our own queue or in-flight table in a state they cannot be in. What a provider answers, or
fails to answer, is never one. This module tells breaks by what the errors themselves show and
counts restarts; what a restart consists of is for the client to say.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspy_resilient.errors import ResilienceError, RestartLimitError
from dspy_resilient.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

# What httpx, aiohttp and asyncio say; they have no class of their own for it.
_SAYINGS = (
    "client has been closed",
    "Session is closed",
    "Event loop is closed",
    "bound to a different event loop",
    "attached to a different loop",
)
_ON_THE_WAY = {"TransportError", "OSError"}
_OUT_OF_TIME = {"TimeoutException", "TimeoutError"}
_SENDERS = ("httpx._client", "openai._streaming")
# What LiteLLM 1.106 calls a client that it makes to re-send once after a reset, and closes itself.
_ONE_OFF = "new_client"
_OWN_STATE = ("dspy_resilient.limits", "dspy_resilient.cache.flight")


def is_break(chain: Iterable[BaseException]) -> bool:
    """Whether a request failed because the means of sending it are closed or gone.

    Args:
        chain: The error and its causes; none may come from an answer of the provider's.
    """
    return any(_says_so(each) or _used_a_closed_client(each) for each in chain)


def _says_so(error: BaseException) -> bool:
    return type(error) is RuntimeError and any(saying in str(error) for saying in _SAYINGS)


def _used_a_closed_client(error: BaseException) -> bool:
    """Whether the connection went away because its client was closed meanwhile.

    The error is that of a connection which the provider resets, so it is the client that tells: it
    stands in the traceback, for every request passes through a method of it.
    """
    names = {base.__name__ for base in type(error).__mro__}
    if _ON_THE_WAY.isdisjoint(names) or not _OUT_OF_TIME.isdisjoint(names):
        return False
    frames = list(_frames(error))
    one_offs = [frame.f_locals.get(_ONE_OFF) for frame in frames]
    return any(
        _is_closed(client) and not any(client is each for each in one_offs)
        for client in map(_client_in, frames)
    )


def _client_in(frame: FrameType) -> object:
    """Return the client whose method runs in `frame`, or whose stream's, or None."""
    if not _module_of(frame).startswith(_SENDERS):
        return None
    sender = frame.f_locals.get("self")
    return getattr(sender, "_client", sender)  # a stream of the OpenAI SDK has its client there


def _is_closed(client: object) -> bool:
    is_closed = getattr(client, "is_closed", False)
    return (is_closed() if callable(is_closed) else is_closed) is True


def broke_state(error: BaseException) -> bool:
    """Whether `error` shows our own queue or in-flight table in a state they cannot be in.

    They raise nothing but our own errors on purpose.
    """
    return (
        isinstance(error, Exception)
        and not isinstance(error, (ResilienceError, MemoryError, RecursionError))
        and any(_module_of(frame).startswith(_OWN_STATE) for frame in _frames(error))
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


class Supervisor:
    """Allows so many restarts within a sliding window, and counts a break that many calls saw once.

    The intensity limit is that of Erlang's supervisors. Thread safe; it never waits.

    Attributes:
        generation: Number of restarts so far. What broke in an older one is mended already.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        client: str = "",
        max_restarts: int = 3,
        window: float = 5.0,
    ) -> None:
        """Begin with no restart behind.

        Args:
            clock: Monotonic seconds.
            client: Name of the client, for errors.
            max_restarts: Restarts allowed within `window`.
            window: Seconds.
        """
        self.generation = 0
        self._clock = clock
        self._client = client
        self._max_restarts = max_restarts
        self._window = window
        self._restarts: deque[float] = deque(maxlen=max_restarts)
        self._exhausted = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Make the lock anew in a forked child, where nobody is restarting anything."""
        self._lock = threading.Lock()
        self._under_way = False

    def wait_time(self) -> float:
        """Return the seconds for which calls are refused: 0.0 unless the limit was exceeded."""
        if not self._exhausted:  # the common case takes no lock
            return 0.0
        with self._lock:
            wait = self._until_allowed()
            self._exhausted = wait > 0
        return wait

    def refusal(self) -> RestartLimitError | None:
        """Return a fresh error if calls are refused at present, else None."""
        wait = self.wait_time()
        return self._error(wait) if wait > 0 else None

    @contextmanager
    def restart(self, seen: int) -> Iterator[bool]:
        """Enter a block that restarts the client; the value is whether it is this caller's turn.

        It is not if somebody has restarted since generation `seen`, or is about to.

        Raises:
            RestartLimitError: The client has been restarted too often already.
        """
        with self._lock:
            mine = seen == self.generation and not self._under_way
            wait = self._until_allowed() if mine else 0.0
            if wait > 0:
                self._exhausted = True
            elif mine:
                self._restarts.append(self._clock())
                self._under_way = True
        if wait > 0:
            raise self._error(wait)
        try:
            yield mine
        finally:
            if mine:
                self._done()

    def forgive(self) -> None:
        """Count a restart that a person asked for: it clears the record."""
        with self._lock:
            self._restarts.clear()
            self._exhausted = False
            self.generation += 1

    def _done(self) -> None:
        with self._lock:
            self._under_way = False
            self.generation += 1

    def _until_allowed(self) -> float:
        """Return the seconds until a restart is allowed; requires the lock."""
        if len(self._restarts) < self._max_restarts:
            return 0.0
        return max(0.0, self._restarts[0] + self._window - self._clock())

    def _error(self, wait: float) -> RestartLimitError:
        return RestartLimitError(
            f"client {self._client!r} broke more than {self._max_restarts} times within "
            f"{self._window:g} s and is left alone for {wait:.1f} s; the cause was a closed HTTP "
            "client, a dead event loop or broken state of our own. restart() clears it",
            client=self._client,
            retry_after=wait,
        )
