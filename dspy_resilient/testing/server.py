"""A TCP server in a daemon thread that can vanish from its port and come back to it.

It owns the listening socket, the thread, its event loop and the open connections, and gives all
of them back in `stop()`. It does not know what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.testing.wire import Connection, Incoming

_BACKLOG = 1024


class Server:
    """Serves on 127.0.0.1 from `start()` to `stop()`; both may be repeated.

    Args:
        serve: Answers one request on one connection; runs on the server's thread.
        accepted: Called with the number of each new connection, on the server's thread.
    """

    def __init__(
        self,
        serve: Callable[[Connection, Incoming], Coroutine[Any, Any, None]],
        accepted: Callable[[], int],
    ) -> None:
        self.port = 0
        self._serve = serve
        self._accepted = accepted
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._accepting: set[asyncio.Task[Any]] = set()

    @property
    def is_running(self) -> bool:
        """Whether this process has started it and not stopped it."""
        return self._thread is not None and self._pid == os.getpid()

    def start(self, *, listen: bool) -> None:
        """Bind a port (the same as before, if there was one) and serve there if `listen`.

        Raises:
            RuntimeError: If it runs already.
            OSError: If the port of a previous start is taken.
        """
        if self.is_running:
            raise RuntimeError("the provider runs already")
        self._listener = self._bind()
        self._pid = os.getpid()
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready, listen), name="dspy-resilient-provider", daemon=True
        )
        renew_after_fork(self)
        self._thread.start()
        ready.result()

    def stop(self) -> None:
        """Drop every connection and give back port, sockets and thread. Idempotent.

        In a child process, which inherited nothing that works, it does nothing.

        Raises:
            RuntimeError: If called from what is being served.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("an answer cannot stop its own provider; it can take it down()")
        thread, self._thread = self._thread, None
        if thread is None or self._pid != os.getpid():
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()

    def open(self) -> None:
        """Accept connections (again)."""
        self._on_loop(self._open)

    def shut(self) -> None:
        """Drop every connection and refuse new ones, but keep the port."""
        self._on_loop(self._shut)

    def _on_loop(self, act: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            act()
            return
        done: Future[None] = Future()

        def run() -> None:
            try:
                act()
            except BaseException as error:  # noqa: BLE001  # handed to the caller's thread
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result()

    def _bind(self) -> socket.socket:
        # With the protocol named, asyncio switches Nagle's algorithm off; 40 ms per answer else.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":  # elsewhere the option would let others take the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(("127.0.0.1", self.port))
        except BaseException:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        return listener

    def _run(self, ready: Future[None], listen: bool) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._main(ready, listen))

    async def _main(self, ready: Future[None], listen: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._is_open = False
        if listen:
            self._open()
        ready.set_result(None)
        await self._stopping.wait()
        self._shut()
        if self._accepting:
            await asyncio.wait(self._accepting)
        while self._connections:
            for connection in list(self._connections):
                connection.abort()
            await asyncio.sleep(0)
        assert self._listener is not None
        self._listener.close()

    def _open(self) -> None:
        if not self._is_open and self._listener is not None:
            self._is_open = True
            self._listener.listen(_BACKLOG)
            self._loop.add_reader(self._listener, self._accept)

    def _shut(self) -> None:
        if self._is_open and self._listener is not None:
            self._is_open = False
            self._loop.remove_reader(self._listener)
            with contextlib.suppress(OSError):  # not every system can shut a listening socket
                self._listener.shutdown(socket.SHUT_RDWR)  # also where a forked child has a copy
            self._listener.close()
            # Bound but not listening, the port refuses, and nobody else can be given it: not even
            # a caller of ours as the local end of its connection, which would then reach itself.
            self._listener = self._bind()
        for connection in list(self._connections):
            connection.abort()

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody is waiting, or hung up before we came
                return
            sock.setblocking(False)
            connection = Connection(self._accepted(), self._serve, self._connections.discard)
            self._connections.add(connection)
            task = self._loop.create_task(
                self._loop.connect_accepted_socket(lambda c=connection: c, sock)  # type: ignore[misc]  # mypy cannot infer a lambda's default
            )
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    def renew(self) -> None:
        """Close, in a forked child, the copies of our sockets, so that the parent's own closing counts.

        Each descriptor is replaced, not closed: its owner may still close it by number.
        """
        null = os.open(os.devnull, os.O_RDWR)
        numbers = [connection.descriptor() for connection in self._connections]
        numbers.append(self._listener.fileno() if self._listener is not None else None)
        for number in numbers:
            if number is not None and number >= 0:
                os.dup2(null, number, inheritable=False)
        os.close(null)
