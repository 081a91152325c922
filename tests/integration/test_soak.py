"""Thousands of mixed calls under faults, cancellations, breaks, restarts and closes: nothing is left.

Some are left behind by an event loop that is closed under them: theirs is the outcome "stranded".

`SOAK_CALLS` (default 800) and `SOAK_SEED` set how many calls and which; `SOAK_REPORT` prints what
came of them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import httpx
import pytest

from dspy_resilient import (
    CircuitBreaker,
    CircuitPolicy,
    Clients,
    LimitPolicy,
    RetryPolicy,
)
from dspy_resilient.limits import Limiter, ThrottleGate
from dspy_resilient.limits.slot import State
from dspy_resilient.providers.pool import pool
from dspy_resilient.testing import Chaos, Hang, Provider, dspy_answers

CALLS = int(os.environ.get("SOAK_CALLS", "800"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
THREADS, LOOPS, AT_ONCE = 12, 3, 12
DESCRIPTORS = Path("/proc/self/fd")
TROUBLE = {"break": 1, "restart": 5, "stop": 5, "trip": 5, "clear": 5, "health": 5}
NAMES = ("plain", "cached", "tight", "backed", "volatile")
SIGNATURE = dspy.Signature("question -> answer")  # CPython 3.11 cannot always parse on two threads


class Held:
    """Every permit, pass and slot that is handed out from here on."""

    def __init__(self, monkeypatch):
        self.handed_out = []
        for kind, method in (
            (CircuitBreaker, "try_admit"),
            (ThrottleGate, "admit"),
            (Limiter, "enter"),
        ):
            monkeypatch.setattr(kind, method, self._noting(getattr(kind, method)))

    def _noting(self, method):
        def noting(*args, **kwargs):
            given = method(*args, **kwargs)
            if given is not None:
                self.handed_out.append(given)
            return given

        return noting

    def left(self):
        """Return those that nobody has given back."""
        return [
            each
            for each in self.handed_out
            if getattr(each, "reported", True) is False
            or getattr(each, "state", State.RELEASED) is not State.RELEASED
        ]


class Soak:
    """The clients, the calls, and what came of each."""

    def __init__(self, clients, provider, calls, seed):
        self.clients = clients
        self.provider = provider
        self.seed = seed
        self.numbers = iter(range(calls))
        self.outcomes = Counter()
        self.runtimes = []
        self.wrong = []
        self.over = threading.Event()
        self._lock = threading.Lock()

    def start(self, name):
        options = {
            "plain": {},
            "cached": {"cache": True},
            "tight": {"limits": LimitPolicy(max_concurrent=3, max_queue=30)},
            "backed": {
                "fallbacks": [
                    dspy.LM("openai/backup", api_base=self.provider.api_base, api_key="k")
                ],
                "max_wait": 0,
            },
            "volatile": {"deadline": 2.0},
        }[name]
        lm = self.clients.start(
            name,
            "anthropic/test" if name == "tight" else "openai/test",
            api_base=self.provider.base("anthropic" if name == "tight" else "openai"),
            api_key=f"key-of-{name}",
            replace=True,
            **{
                "cache": False,
                "timeout": 5.0,
                "max_wait": 0.5,
                "retry": RetryPolicy(max_attempts=3, base=0.005),
                "circuit": CircuitPolicy(
                    failure_threshold=8, recovery_time=0.02, max_recovery_time=0.1
                ),
                **options,
            },
        )
        self.runtimes.append(lm._runtime)

    def next(self):
        """Return the next call: its dice, client and question; None when all have been made."""
        with self._lock:
            number = next(self.numbers, None)
        if number is None:
            return None
        dice = random.Random(f"{self.seed}:{number}")
        name = dice.choices(NAMES, (3, 8, 2, 2, 2))[0]
        question = f"q{dice.randrange(60)}" if name == "cached" else f"q{number}"
        return dice, name, question

    def note(self, question, outputs=None, error=None, *, stranded=False):
        """Count the one outcome of a call; an answer has to be the one to its question."""
        if stranded:
            outcome = "stranded"
        elif error is None:
            outcome = "answer"
            if outputs != [f"answer to {question}"]:
                self.wrong.append((question, outputs))
        elif isinstance(error, (dspy.LMError, asyncio.CancelledError)):
            outcome = type(error).__name__
        elif isinstance(error, KeyError) and "no client" in str(error):
            outcome = "stopped"
        else:
            outcome = "unexpected"
            self.wrong.append((question, error))
        with self._lock:
            self.outcomes[outcome] += 1

    # Threads

    def thread(self):
        while (drawn := self.next()) is not None:
            dice, name, question = drawn
            timeout = dice.choice([None, None, None, 30.0, 0.05])
            try:
                outputs = self.clients.request(name, question, timeout=timeout)
            except BaseException as error:
                self.note(question, error=error)
            else:
                self.note(question, outputs)

    # Event loops

    def loop(self):
        while asyncio.run(self._one_loop()):
            self._strand()

    async def _one_loop(self):
        """Make some calls on a loop of their own; False once there are none left."""
        more = await asyncio.gather(*(self._task() for _ in range(AT_ONCE)))
        for _ in range(100):  # a report of LiteLLM's may still be under way
            others = {each for each in asyncio.all_tasks() if not is_of_litellm(each)}
            others.discard(asyncio.current_task())
            if not others:
                break
            await asyncio.sleep(0.01)
        if others:
            self.wrong.append(others)
        return all(more)

    def _strand(self):
        """Make some calls, and close their loop under those that are not done by then."""
        loop = asyncio.new_event_loop()
        tasks = {}
        while len(tasks) < 3 and (drawn := self.next()) is not None:
            dice, name, question = drawn
            tasks[loop.create_task(self.clients.arequest(name, question))] = question
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=dice.random() * 0.02))
        loop.close()
        for task, question in tasks.items():
            if not task.done():
                self.note(question, stranded=True)
            elif (error := task.exception()) is not None:
                self.note(question, error=error)
            else:
                self.note(question, task.result())

    async def _task(self):
        for _ in range(10):
            drawn = self.next()
            if drawn is None:
                return False
            await self._call(*drawn)
        return True

    async def _call(self, dice, name, question):
        what = dice.random()
        if what < 0.005:
            await self._close_own()
        if what > 0.96:
            return await self._stream(name, question)
        # Nothing but a deadline ends one that reads its answer when its client is closed under it.
        timeout = dice.choice([30.0, 30.0, 30.0, 0.05])
        task = asyncio.ensure_future(self.clients.arequest(name, question, timeout=timeout))
        if 0.1 < what < 0.2:
            await asyncio.sleep(dice.random() * 0.02)
            task.cancel()
        try:
            outputs = await task
        except BaseException as error:
            self.note(question, error=error)
        else:
            self.note(question, outputs)
        return None

    async def _stream(self, name, question):
        """Stream an answer; nothing but a deadline ends one whose client is closed under it."""
        program = dspy.streamify(dspy.Predict(SIGNATURE), is_async_program=True)
        prediction = None
        try:
            lm = self.clients[name].copy(deadline=5.0)
            with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
                async for value in program(question=question):
                    if isinstance(value, dspy.Prediction):
                        prediction = value
        except BaseException as error:
            self.note(question, error=error)
        else:
            self.note(question, [prediction.answer])

    async def _close_own(self):
        loop = asyncio.get_running_loop()
        for each in list(pool._clients.values()):
            if each.is_of(loop):
                await each._http.aclose()

    # Trouble

    def meddle(self):
        """Break, restart, stop, start, trip and empty things until all calls have been made."""
        dice = random.Random(self.seed)
        while not self.over.wait(dice.random() * 0.1):
            name = dice.choice(NAMES)
            lm = self.clients.get(name)
            (what,) = dice.choices(list(TROUBLE), TROUBLE.values())
            if what == "break":
                self._close_sync_clients()
            elif what == "stop" and name == "volatile" and lm is not None:
                self.clients.stop(name, grace=dice.choice([0, 0.02]))
                self.start(name)
            elif what == "restart" and lm is not None:
                lm.restart()
            elif what == "trip" and lm is not None:
                lm.circuit.trip()
            elif what == "clear" and lm is not None:
                lm.clear_cache()
            elif what == "health":
                assert all(each.in_flight >= 0 for each in self.clients.health().values())

    def _close_sync_clients(self):
        """Have them say that they are closed; their sockets are left to those who read from them.

        (A thread that reads from a closed socket may read from the next one of the same number.)
        """
        for each in list(pool._clients.values()):
            if isinstance(each._http, httpx.Client):
                each._http._state = httpx._client.ClientState.CLOSED


def is_of_litellm(task):
    """Whether it is a logging worker: LiteLLM leaves one on a loop whenever another loop logs."""
    return task.get_coro().__qualname__ == "LoggingWorker._worker_loop"


def answer(body):
    """Answer a plain question, or one of a DSPy program."""
    asked = body["messages"][-1]["content"]
    if not isinstance(asked, str):  # as Anthropic has it
        asked = "".join(part["text"] for part in asked)
    if "[[ ##" in asked or "JSON" in asked:
        return dspy_answers(lambda question: f"answer to {question}")(body)
    return f"answer to {asked}"


def run(soak):
    """Make all calls; return who made them, once they are done."""
    meddler = threading.Thread(target=soak.meddle, name="meddler")
    meddler.start()
    with ThreadPoolExecutor(THREADS + LOOPS) as pool:
        workers = [pool.submit(soak.thread) for _ in range(THREADS)]
        workers += [pool.submit(soak.loop) for _ in range(LOOPS)]
        for each in workers:
            each.result()
    soak.over.set()
    meddler.join()


def soaked(calls, seed):
    """Run `calls` calls against a provider with faults, and close everything; return the soak."""
    faults = Chaos(seed, 0.15, (*Chaos().faults, Hang(0.2)))
    with Provider(answer, faults=[]) as provider, Clients(grace=2.0) as clients:
        provider.always(faults)
        soak = Soak(clients, provider, calls, seed)
        for name in NAMES:
            soak.start(name)
        run(soak)
        provider.always(None)
    return soak


def waited_for(condition, seconds=20.0):
    """Return whether `condition` comes true: what was left behind may still be ending."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def threads():
    """Return the names of all threads but those that LiteLLM and the cache keep for good."""
    names = (each.name for each in threading.enumerate())
    return Counter(name for name in names if not name.startswith(("litellm-logging", "disk")))


def descriptors():
    """Return what this process has open, after what is garbage has gone."""
    gc.collect()
    return Counter(map(_target, DESCRIPTORS.iterdir())) if DESCRIPTORS.is_dir() else Counter()


def sockets():
    """Return the ends of every open socket and who holds it, to find out whose it is."""
    holders = {}
    for each in gc.get_objects():
        if issubclass(type(each), socket.socket) and each.fileno() >= 0:
            kinds = {type(holder).__qualname__ for holder in gc.get_referrers(each)}
            holders[each.fileno()] = sorted(kinds - {"list"})
    found = []
    for descriptor in DESCRIPTORS.iterdir():
        if _target(descriptor) == "socket":
            with socket.socket(fileno=os.dup(int(descriptor.name))) as end:
                found.append((_ends(end), holders.get(int(descriptor.name), "nobody")))
    return found


def _ends(end):
    try:
        return end.getsockname(), end.getpeername()
    except OSError as error:
        return str(error)


def _target(descriptor):
    try:
        return descriptor.readlink().name.partition(":")[0]
    except OSError:  # that of the directory itself
        return "gone"


@pytest.mark.timeout(max(120, CALLS // 20))
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the clients that the soak itself closes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")
def test_every_call_has_one_outcome_and_nothing_is_left(monkeypatch):
    """No permit, pass, slot, flight, future, thread, task or socket."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's holds what it reports
    soaked(100, SEED)  # what the process opens once and keeps
    before, running = descriptors(), threads()
    held = Held(monkeypatch)
    started = time.monotonic()
    soak = soaked(CALLS, SEED)
    seconds = time.monotonic() - started

    assert soak.wrong == []
    assert sum(soak.outcomes.values()) == CALLS
    assert soak.outcomes["answer"] > CALLS * 0.4
    assert waited_for(lambda: threads() <= running), threads() - running
    assert held.left() == []
    for runtime in soak.runtimes:
        assert len(runtime.in_flight) == 0
        assert len(runtime.flights) == 0
        for route in runtime.all_routes():
            assert route.limiter is None or (route.limiter.in_use, route.limiter.queued) == (0, 0)
            assert route.gate._notifier._line == {}
            if route.circuit is not None:
                assert route.circuit._notifier._line == {}
    if "SOAK_REPORT" in os.environ:
        restarts = sum(runtime.totals().restarts for runtime in soak.runtimes)
        print(f"\n{CALLS} calls in {seconds:.0f} s: {dict(soak.outcomes.most_common())}")
        print(f"{len(held.handed_out)} permits, passes and slots; {restarts} restarts")
    assert waited_for(lambda: descriptors() <= before), (descriptors() - before, sockets())
