"""What the limits cost: side by side with the standard library's semaphores, in one run.

    python tests/benchmarks/limits.py

One place taken and given back by one caller; many threads, and many tasks, before 8 places; and
a 50 ms provider asked by 64 threads, and by 256 tasks, through a limit that never bites. A
semaphore is neither FIFO across loops nor shared between threads and loops; it is the least that
one could pay. The best of several runs counts: the machine may be busy.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from dspy_resilient.limits import Limiter
from dspy_resilient.policies import LimitPolicy

RUNS = 5
PROVIDER = 0.05


def seconds(body, *args):
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        body(*args)
        times.append(time.perf_counter() - began)
    return min(times)


def enter(limiter: Limiter) -> AbstractContextManager:
    """Wait on this thread for a place."""
    slot = limiter.enter(100)
    while not slot.granted:
        wait = slot.wait_time()
        slot.future.result(None if math.isinf(wait) else wait)
        slot.poll()
    return slot


async def aenter(limiter: Limiter) -> AbstractContextManager:
    """Wait on this loop for a place."""
    slot = limiter.enter(100)
    while not slot.granted:
        await asyncio.wrap_future(slot.future)
        slot.poll()
    return slot


def alone(turns, take):
    for _ in range(turns):
        with take():
            pass


def in_threads(threads, turns, take, work=0.0):
    def body(_):
        for _ in range(turns):
            with take():
                if work:
                    time.sleep(work)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(body, range(threads)))


def in_tasks(tasks, turns, policy, work=0.0):
    async def main():
        if policy is None:
            places = asyncio.Semaphore(8 if not work else tasks)
        else:
            limiter = Limiter(policy)

        async def body():
            for _ in range(turns):
                if policy is None:
                    async with places:
                        await asyncio.sleep(work)
                else:
                    with await aenter(limiter):
                        await asyncio.sleep(work)

        await asyncio.gather(*(body() for _ in range(tasks)))

    asyncio.run(main())


def row(what, ours, theirs, unit, scale):
    print(
        f"{what:44} {ours * scale:9.2f} {unit:3} {theirs * scale:9.2f} {unit:3} {ours / theirs:6.2f}x"
    )


def main() -> None:
    print(f"{'':44} {'limits':>13} {'semaphore':>13}   ratio")
    turns = 20_000
    for name, policy in {
        "one caller, max_concurrent": LimitPolicy(max_concurrent=8),
        "one caller, everything on": LimitPolicy(
            max_concurrent=8, max_queue=100, rpm=1e9, tpm=1e12, adaptive=True
        ),
    }.items():
        limiter, semaphore = Limiter(policy), threading.BoundedSemaphore(8)
        ours = seconds(alone, turns, lambda limiter=limiter: limiter.enter(100))
        row(name, ours / turns, seconds(alone, turns, lambda s=semaphore: s) / turns, "us", 1e6)

    eight = LimitPolicy(max_concurrent=8)
    limiter, semaphore = Limiter(eight), threading.BoundedSemaphore(8)
    ours = seconds(in_threads, 64, 50, lambda: enter(limiter))
    row(
        "64 threads before 8 places, per turn",
        ours / 3200,
        seconds(in_threads, 64, 50, lambda: semaphore) / 3200,
        "us",
        1e6,
    )
    ours = seconds(in_tasks, 256, 10, eight)
    row(
        "256 tasks before 8 places, per turn",
        ours / 2560,
        seconds(in_tasks, 256, 10, None) / 2560,
        "us",
        1e6,
    )

    wide = Limiter(LimitPolicy(max_concurrent=64, rpm=1e9))
    ours = seconds(in_threads, 64, 8, lambda: enter(wide), PROVIDER)
    row(
        "64 threads, 50 ms provider (beside: nothing)",
        ours,
        seconds(in_threads, 64, 8, nullcontext, PROVIDER),
        "s",
        1,
    )
    ours = seconds(in_tasks, 256, 8, LimitPolicy(max_concurrent=256, rpm=1e9), PROVIDER)
    row("256 tasks, 50 ms provider", ours, seconds(in_tasks, 256, 8, None, PROVIDER), "s", 1)


if __name__ == "__main__":
    main()
