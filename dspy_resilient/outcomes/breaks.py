"""Whether an error shows a break: a closed HTTP client, a dead event loop, broken state of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_resilient.errors import ResilienceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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
_OWN_STATE = ("dspy_resilient.limits", "dspy_resilient.cache.single_flight")


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
