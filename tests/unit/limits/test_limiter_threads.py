"""One limiter before threads and several event loops."""

import asyncio
import concurrent.futures
import itertools
import math
import random
import sys
import threading

import pytest

from dspy_resilient.errors import LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.policies import LimitPolicy

THREADS, LOOPS, TASKS, TURNS = 64, 4, 16, 8


def wait(slot, patience=math.inf):
    """Wait on this thread until `slot` is granted, or give up when patience is gone."""
    while not slot.granted:
        seconds = min(slot.wait_time(), patience)
        try:
            slot.future.result(None if math.isinf(seconds) else seconds)
        except concurrent.futures.TimeoutError:
            if seconds == patience:
                return
        slot.poll()


async def await_(slot):
    """Wait on this loop until `slot` is granted."""
    while not slot.granted:
        seconds = slot.wait_time()
        future = asyncio.shield(asyncio.wrap_future(slot.future))
        await asyncio.wait([future], timeout=None if math.isinf(seconds) else seconds)
        slot.poll()


def run_all(bodies):
    """Run every body on a thread of its own, all from one start, and re-raise what they raise."""
    start = threading.Barrier(len(bodies))

    def begin(body):
        start.wait()
        body()

    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        for future in [pool.submit(begin, body) for body in bodies]:
            future.result()


def test_thread_hands_its_place_to_a_task():
    """A place left on a thread wakes a task waiting on a loop."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    busy = limiter.enter()

    async def main():
        slot = limiter.enter()
        waiting = asyncio.create_task(await_(slot))
        await asyncio.to_thread(busy.release)
        await asyncio.wait_for(waiting, 30)
        slot.release()

    asyncio.run(main())
    assert limiter.in_use == 0


def test_task_hands_its_place_to_a_thread():
    """A place left on a loop wakes a thread that waits."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    busy = limiter.enter()
    slot = limiter.enter()
    thread = threading.Thread(target=wait, args=(slot,))
    thread.start()

    async def main():
        busy.release()

    asyncio.run(main())
    thread.join(30)
    assert slot.granted


def test_cancelled_task_leaves_no_trace():
    """Cancelling a waiting task frees its turn, wherever it was in the queue."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    busy = limiter.enter()

    async def call():
        with limiter.enter() as slot:
            await await_(slot)

    async def main():
        tasks = [asyncio.create_task(call()) for _ in range(10)]
        await asyncio.sleep(0)
        assert limiter.queued == 10
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        assert limiter.queued == 5
        busy.release()
        await asyncio.gather(*tasks[1::2])

    asyncio.run(main())
    assert (limiter.in_use, limiter.queued) == (0, 0)


def test_loop_closed_under_its_waiters_holds_nobody_up():
    """Waiters of a loop that ended are gone; those of other loops and threads go on."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    busy = limiter.enter()

    async def call():
        with limiter.enter() as slot:
            await await_(slot)

    async def main():
        main.tasks = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(0)

    asyncio.run(main())
    survivor = limiter.enter()
    busy.release()
    assert survivor.poll()


class Storm:
    """Callers on threads and loops who come, wait, give up, are cancelled, and are served."""

    def __init__(self, limiter):
        self.limiter = limiter
        self.served, self.most = [], 0
        self._arrival, self._tickets, self._busy = threading.Lock(), itertools.count(), []

    def arrive(self, rng):
        """Enter, with a ticket that tells the true order of arrival; None if refused."""
        with self._arrival:
            ticket = next(self._tickets)
            try:
                return ticket, self.limiter.enter(rng.randrange(100))
            except LimitExceededError:
                return ticket, None

    def serve(self, ticket, slot, rng):
        self._busy.append(ticket)
        self.most = max(self.most, len(self._busy))
        self.served.append(ticket)
        self._busy.remove(ticket)
        slot.release(
            tokens=rng.choice([None, 0, 50, 150]),
            sent=rng.random() < 0.9,
            throttled=rng.random() < 0.05,
            slow=rng.random() < 0.05,
            ok=rng.random() < 0.9,
        )

    def thread(self, seed):
        rng = random.Random(seed)
        for _ in range(TURNS):
            ticket, slot = self.arrive(rng)
            if slot is not None:
                with slot:
                    wait(slot, rng.choice([0.0, 0.001, math.inf]))
                    if slot.granted:
                        self.serve(ticket, slot, rng)

    async def task(self, rng):
        for _ in range(TURNS):
            ticket, slot = self.arrive(rng)
            if slot is not None:
                with slot:
                    await await_(slot)
                    self.serve(ticket, slot, rng)

    async def loop(self, seed):
        rng = random.Random(seed)
        tasks = [asyncio.create_task(self.task(random.Random(rng.random()))) for _ in range(TASKS)]
        while any(not task.done() for task in tasks):
            await asyncio.sleep(0)
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run(self):
        run_all(
            [lambda seed=seed: self.thread(seed) for seed in range(THREADS)]
            + [lambda seed=seed: asyncio.run(self.loop(seed)) for seed in range(LOOPS)]
        )


@pytest.fixture
def _eager_switching():
    """Switch threads far more often than usual, to meet in unusual places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "policy",
    [
        LimitPolicy(max_concurrent=1),
        LimitPolicy(max_concurrent=7, max_queue=40),
        LimitPolicy(max_concurrent=16, adaptive=True),
        LimitPolicy(max_concurrent=9, rpm=600_000, tpm=60_000_000),
        LimitPolicy(rpm=300_000, tpm=30_000_000, adaptive=True),
    ],
    ids=["serial", "queue", "adaptive", "rate", "adaptive-rate"],
)
@pytest.mark.usefixtures("_eager_switching")
def test_nothing_leaks_from_threads_and_loops(policy):
    """After any storm of calls and cancellations nothing is in use and nobody queued.

    Meanwhile the limit is never exceeded, and under max_concurrent=1 all who are served are
    served in the order of arrival.
    """
    limiter = Limiter(policy)
    storm = Storm(limiter)
    storm.run()
    assert (limiter.in_use, limiter.queued) == (0, 0)
    assert storm.served
    if policy.max_concurrent is not None:
        assert storm.most <= policy.max_concurrent
    if policy.max_concurrent == 1:
        assert storm.served == sorted(storm.served)
