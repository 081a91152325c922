"""Named clients under one roof: started once per configuration, looked up by name, closed together.

`Clients` owns the clients it starts and nothing else: how a client caches, waits, retries and mends
itself is its own affair, and no client learns of another.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from dspy_resilient._support.closable import ClosedAtEnd
from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.errors import ClientClosedError
from dspy_resilient.lm import ResilientLM
from dspy_resilient.pipeline.health import Health, HealthState
from dspy_resilient.policies import number, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dspy.lm15 import Request, Response

    from dspy_resilient.lm.entry import Messages
    from dspy_resilient.stats.stats import Stats

_ME = "Clients"


class _Started(NamedTuple):
    """A client, and what it was started with."""

    lm: ResilientLM
    model: str
    options: dict[str, Any]

    @property
    def is_usable(self) -> bool:
        return self.lm.health().state is not HealthState.CLOSED


class Clients(ClosedAtEnd, Mapping[str, ResilientLM]):
    """Named `ResilientLM`s: one per name, started once, closed together.

    A mapping from name to client, in the order in which they were started. Safe for threads, event
    loops and forks. Each client shares nothing with the others: an open circuit, a full limit or a
    crash loop of one is not noticed by the rest. A sync attempt runs on a thread of its own here, so
    that closing need not wait for the provider.

    Example:
        >>> from dspy_resilient import Clients
        >>> from dspy_resilient.testing import Provider
        >>> with Provider("Paris") as provider, Clients() as clients:
        ...     endpoint = {"api_base": provider.api_base, "api_key": "k"}
        ...     fast = clients.start("fast", "openai/gpt-4o-mini", cache=False, limits=8, **endpoint)
        ...     clients.request("fast", "What is the capital of France?", timeout=10)
        ...     clients["fast"] is fast, clients.health()["fast"].state
        ['Paris']
        (True, <HealthState.READY: 'ready'>)
    """

    def __init__(self, *, grace: float = 10.0) -> None:
        """Begin with no client.

        Args:
            grace: Seconds for which calls under way may go on when their client is stopped.

        Raises:
            TypeError: If `grace` is no number.
            ValueError: If it is negative.
        """
        number(_ME, "grace", grace)
        self._grace = grace
        self._started: dict[str, _Started] = {}
        self._closed = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Make the lock anew in a forked child; the clients renew themselves."""
        self._lock = threading.Lock()

    def start(self, name: str, model: str, *, replace: bool = False, **options: Any) -> ResilientLM:
        """Return the client called `name`, which is made unless it is there already.

        However many threads start it at once, they get the same client.

        Args:
            name: Its name here, and in errors, events and logs.
            model: As for `ResilientLM`.
            replace: Whether it may take the place of a client of another configuration; calls under
                way on that one finish, and further ones raise ClientClosedError.
            **options: As for `ResilientLM`.

        Raises:
            ClientClosedError: These clients were closed.
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range, or the name belongs to another configuration.
        """
        _check_name(name)
        kept = self._find(name, model, options, replace=replace)
        if kept is not None:
            return kept
        lm = ResilientLM(model, name=name, **options)
        lm._run_attempts_apart()  # noqa: SLF001  # not for users
        with self._lock:
            before = self._started.get(name)
            kept = self._keep(before, name, model, options, replace=replace)
            if kept is None:
                self._started[name] = _Started(lm, model, options)
        if kept is not None:
            lm.close()
            return kept
        if before is not None:
            before.lm.close()
        return lm

    def stop(self, name: str, *, grace: float | None = None) -> None:
        """Close the client called `name` and forget it; see `ResilientLM.close`.

        Args:
            name: Its name.
            grace: Seconds for which its calls may go on. Default: that of these clients.

        Raises:
            KeyError: There is no such client (any more).
        """
        wait = self._grace_of(grace)
        self._take(name).close(wait)

    async def astop(self, name: str, *, grace: float | None = None) -> None:
        """Do as `stop` does, without blocking the event loop."""
        wait = self._grace_of(grace)
        await self._take(name).aclose(wait)

    def restart(self, name: str) -> None:
        """Restart the client called `name` to a clean state; see `ResilientLM.restart`.

        Raises:
            KeyError: There is no such client.
        """
        self[name].restart()

    @overload
    def request(
        self,
        name: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = 30.0,
        **options: Any,
    ) -> list[Any]: ...
    @overload
    def request(
        self, name: str, prompt: Request, *, timeout: float | None = 30.0, **options: Any
    ) -> Response: ...
    def request(
        self,
        name: str,
        prompt: Any = None,
        *,
        messages: Any = None,
        timeout: float | None = 30.0,
        **options: Any,
    ) -> Any:
        """Return what the client called `name` answers, within `timeout`.

        Args:
            name: Its name.
            prompt: As for `dspy.LM`: a prompt, or a typed request.
            messages: As for `dspy.LM`.
            timeout: Seconds for the whole call, waits and retries included; a shorter `deadline` of
                the client holds all the same. None: no limit but the client's own.
            **options: As for a call of `dspy.LM`.

        Raises:
            KeyError: There is no such client.
            dspy.LMError: As for a call of the client: DeadlineExceededError when the time is up.
        """
        return self._within(name, timeout)(prompt, messages=messages, **options)

    @overload
    async def arequest(
        self,
        name: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = 30.0,  # noqa: ASYNC109
        **options: Any,
    ) -> list[Any]: ...
    @overload
    async def arequest(
        self,
        name: str,
        prompt: Request,
        *,
        timeout: float | None = 30.0,  # noqa: ASYNC109
        **options: Any,
    ) -> Response: ...
    async def arequest(
        self,
        name: str,
        prompt: Any = None,
        *,
        messages: Any = None,
        timeout: float | None = 30.0,  # noqa: ASYNC109  # the deadline of the call, which may retry
        **options: Any,
    ) -> Any:
        """Do as `request` does, on the running event loop; cancelling leaves nothing behind."""
        return await self._within(name, timeout).acall(prompt, messages=messages, **options)

    def health(self) -> dict[str, Health]:
        """Return the condition of every client at this moment, by name."""
        return {name: each.lm.health() for name, each in self._all().items()}

    def stats(self) -> dict[str, Stats]:
        """Return the numbers of every client, by name; `sum(clients.stats().values())` is all."""
        return {name: each.lm.stats() for name, each in self._all().items()}

    def close(self) -> None:
        """Close all clients and refuse to start more; idempotent, and safe while calls run.

        Calls under way may go on for the `grace` of these clients, all of them together; what is
        left then ends with ClientClosedError. On a thread whose event loop is running they end at
        once, for the loop could not go on meanwhile: use `aclose` there.
        """
        end, clients = self._leave()
        with ExitStack() as stack:
            for lm in clients:
                stack.callback(lambda each: each.close(_until(end)), lm)

    async def aclose(self) -> None:
        """Do as `close` does, without blocking the event loop."""
        end, clients = self._leave()
        async with AsyncExitStack() as stack:
            for lm in clients:
                stack.push_async_callback(lambda each: each.aclose(_until(end)), lm)

    def __getitem__(self, name: str) -> ResilientLM:
        """Return the client called `name`, or raise KeyError."""
        try:
            return self._started[name].lm
        except KeyError:
            raise self._unknown(name) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, as they are now."""
        return iter(self._all())

    def __len__(self) -> int:
        """Return how many clients there are."""
        return len(self._started)

    def __eq__(self, other: object) -> bool:
        """Return whether `other` is this very object: two of them never hold the same clients."""
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Return the names and models; no setting that could hold a secret."""
        models = {name: each.model for name, each in self._all().items()}
        return f"{_ME}({models!r})"

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import clients_html  # noqa: PLC0415  # only when asked

        started = self._all().items()
        return clients_html(
            (name, each.model, each.lm.health().state, each.lm.stats()) for name, each in started
        )

    def _find(
        self, name: str, model: str, options: dict[str, Any], *, replace: bool
    ) -> ResilientLM | None:
        with self._lock:
            return self._keep(self._started.get(name), name, model, options, replace=replace)

    def _keep(
        self,
        before: _Started | None,
        name: str,
        model: str,
        options: dict[str, Any],
        *,
        replace: bool,
    ) -> ResilientLM | None:
        """Return the client that is there already and stays, if any; requires the lock."""
        if self._closed:
            raise ClientClosedError(f"{_ME}: these clients were closed", client=name)
        if before is None or not before.is_usable:
            return None
        differs = _differing(before, model, options)
        if not differs:
            return before.lm
        if not replace:
            raise ValueError(
                f"{_ME}: {name!r} was started with another {' and '.join(differs)}; stop it first, "
                "or pass replace=True"
            )
        return None

    def _take(self, name: str) -> ResilientLM:
        with self._lock:
            started = self._started.pop(name, None)
        if started is None:
            raise self._unknown(name)
        return started.lm

    def _leave(self) -> tuple[float, list[ResilientLM]]:
        """Return until when calls may go on, and the clients, which take no more of them."""
        end = time.monotonic() + self._grace
        with self._lock:
            self._closed = True
            clients = [each.lm for each in self._started.values()]
            self._started.clear()
        for lm in clients:
            lm._refuse_calls()  # noqa: SLF001  # not for users
        return end, clients

    def _within(self, name: str, timeout: float | None) -> ResilientLM:
        """Return the client called `name`, the same client but for its deadline."""
        number(_ME, "timeout", timeout, above=True, optional=True)
        lm = self[name]
        if timeout is None or (lm.deadline is not None and lm.deadline <= timeout):
            return lm
        twin = copy.copy(lm)
        twin.deadline = timeout
        return twin

    def _grace_of(self, grace: float | None) -> float:
        number(_ME, "grace", grace, optional=True)
        return self._grace if grace is None else grace

    def _all(self) -> dict[str, _Started]:
        with self._lock:
            return dict(self._started)

    def _unknown(self, name: object) -> KeyError:
        names = ", ".join(map(repr, self._all())) or "none"
        return KeyError(f"{_ME}: no client is called {shown(name)}; there are: {names}")


def _until(end: float) -> float:
    return max(0.0, end - time.monotonic())


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{_ME}: name must be a str; got {shown(name)}")
    if not name:
        raise ValueError(f"{_ME}: name must not be empty")


def _differing(before: _Started, model: str, options: dict[str, Any]) -> list[str]:
    """Return the names of the settings in which another configuration differs."""
    one, other = {**before.options, "model": before.model}, {**options, "model": model}
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not _same(one[name], other[name])
    )


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # noqa: BLE001  # a user's object may compare in any way, or not at all
        return False
