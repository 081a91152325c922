"""How many connections calls open beside plain LiteLLM: `python tests/benchmarks/connections.py`.

Each side runs in a process of its own, since ours mends LiteLLM for the whole process. After
a tenth of the work to warm up, `opened` counts the connections, and `fds` and `MB` how much
descriptors and memory have grown by the end. `--loops N` (1000 for a soak) sets the number of event loops.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KEY = "dummy-key-for-benchmarks"
THREADS = 20


def descriptors():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Side:
    """The calls of one side: `call()` and `await acall()`."""

    def __init__(self, side, base, model_type):
        import dspy

        options = {"api_base": base, "api_key": KEY, "cache": False, "model_type": model_type}
        if side == "plain":
            self.lm = dspy.LM("openai/test", engine="litellm", **options)
        else:
            from dspy_resilient import ResilientLM

            self.lm = ResilientLM("openai/test", **options)

    def call(self, *_):
        return self.lm("?")

    async def acall(self):
        return await self.lm.acall("?")


def sequential(side, count):
    for _ in range(count):
        side.call()


def threads(side, count):
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(side.call, range(count)))


def tasks(side, count):
    async def all_at_once():
        await asyncio.gather(*(side.acall() for _ in range(count)))

    asyncio.run(all_at_once())


def loops(side, count):
    for _ in range(count):
        asyncio.run(side.acall())


def loops_in_threads(side, count):
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: asyncio.run(side.acall()), range(count)))


JOBS = {
    "1000 calls in a row": (sequential, 1000, "chat"),
    "300 text completions": (sequential, 300, "text"),
    "200 calls on 20 threads": (threads, 200, "chat"),
    "200 tasks on one loop": (tasks, 200, "chat"),
    "{} loops in a row": (loops, None, "chat"),
    "{} loops on 20 threads": (loops_in_threads, None, "chat"),
}


def work(pipe, side, name, number):
    """Run one job and send back warnings, and the growth of descriptors and memory."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import dspy

    dspy.settings.configure(disable_history=True)  # else it grows by an entry per call
    seen = []
    warnings.showwarning = lambda message, category, *_: seen.append(category.__name__)
    warnings.simplefilter("always", ResourceWarning)
    from dspy_resilient.testing import Provider

    job, count, model_type = JOBS[name]
    with Provider("Paris", keep=10) as provider:
        calls = Side(side, provider.api_base, model_type)
        job(calls, max(1, (count or number) // 10))
        before, megabytes = descriptors(), memory()
        provider.clear()
        begun = time.perf_counter()
        job(calls, count or number)
        took = time.perf_counter() - begun
        grown, heavier = descriptors() - before, memory() - megabytes
        pipe.send((provider.connections, grown, heavier, seen.count("ResourceWarning"), took))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loops", type=int, default=100)
    parser.add_argument("--jobs", nargs="*", help="words of the rows to run; default: all")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"{'':28} {'':6} {'opened':>7} {'fds':>5} {'MB':>6} {'warnings':>9} {'seconds':>8}")
    for name in JOBS:
        shown = name.format(options.loops)
        if options.jobs and not any(word in shown for word in options.jobs):
            continue
        for side in ("plain", "ours"):
            near, far = spawn.Pipe()
            process = spawn.Process(target=work, args=(far, side, name, options.loops))
            process.start()
            opened, grown, heavier, warned, took = near.recv()
            process.join()
            print(
                f"{shown:28} {side:6} {opened:7} {grown:+5} {heavier:+6.1f} {warned:9} {took:8.1f}"
            )


if __name__ == "__main__":
    main()
