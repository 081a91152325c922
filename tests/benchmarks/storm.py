"""A retry storm: 50 callers at once, and a provider that is down for all of them.

    python tests/benchmarks/storm.py

Plain `dspy.LM`, `litellm.Router` and `ResilientLM` in the same run, each with three retries, in
processes of their own against a provider in another: first with a thread for each caller, then
with a task for each on one event loop. Counted at the provider: requests, how many of
them were retries, and how many of those arrived within the worst 100 ms (a storm comes in
waves); and at the callers, how long until the last of them was told.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import threading
import time
from bisect import bisect_left
from collections import Counter

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

CALLERS = 50
WINDOW = 0.1


def serve(pipe):
    from dspy_resilient.testing import Provider, Status

    with Provider(latency=0.05) as provider:
        provider.always(Status(503))
        pipe.send(provider.api_base)
        while pipe.recv() == "report":
            pipe.send([(_caller(request.body), request.at) for request in provider.requests])
            provider.clear()


def _caller(body):
    return body["messages"][-1]["content"]


def plain(base):
    import dspy

    lm = dspy.LM("openai/m", engine="litellm", api_base=base, api_key="k", cache=False)
    return lm, lm.acall


def router(base):
    import litellm

    deployment = {"model": "openai/m", "api_base": base, "api_key": "k"}
    routed = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": deployment}], num_retries=3
    )

    def call(method):
        return lambda prompt: method("m", [{"role": "user", "content": prompt}])

    return call(routed.completion), call(routed.acompletion)


def resilient(base, **options):
    from dspy_resilient import ResilientLM

    lm = ResilientLM("openai/m", api_base=base, api_key="k", cache=False, **options)
    return lm, lm.acall


def without_circuit(base):
    return resilient(base, circuit=False)


def failing_fast(base):
    return resilient(base, max_wait=0)


SIDES = {
    "dspy.LM": plain,
    "litellm.Router": router,
    "ResilientLM": resilient,
    "ResilientLM(max_wait=0)": failing_fast,
    "ResilientLM(circuit=False)": without_circuit,
}


def in_threads(call):
    """Return how long each caller was kept."""
    barrier, kept = threading.Barrier(CALLERS), []

    def caller(number):
        barrier.wait()
        began = time.monotonic()
        try:
            call(f"caller {number}")
        except Exception:
            kept.append(time.monotonic() - began)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return kept


def in_tasks(acall):
    """Return how long each caller was kept."""
    kept = []

    async def caller(number):
        began = time.monotonic()
        try:
            await acall(f"caller {number}")
        except Exception:
            kept.append(time.monotonic() - began)

    async def callers():
        await asyncio.gather(*(caller(n) for n in range(CALLERS)))

    asyncio.run(callers())
    return kept


def storm(pipe, side, how, base):
    """Warm up, then let all callers go at once; send back how long each was kept."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    call, acall = SIDES[side](base)
    try:
        import litellm

        litellm.suppress_debug_info = True
        litellm.completion("openai/m", [{"role": "user", "content": "warm"}], api_base=base,
                           api_key="k", num_retries=0, max_retries=0)  # fmt: skip
    except Exception:
        pass
    pipe.send("ready")
    pipe.recv()
    pipe.send(in_threads(call) if how == "threads" else in_tasks(acall))


def worst(times):
    """Return how many of `times` fall within the worst 100 ms."""
    times = sorted(times)
    return max((bisect_left(times, at + WINDOW) - n for n, at in enumerate(times)), default=0)


def row(side, requests, kept):
    """Return a line of the table."""
    seen, retries = Counter(), []
    for caller, at in requests:
        seen[caller] += 1
        if seen[caller] > 1:
            retries.append(at)
    most = worst(retries)
    share = f"{most} ({most / max(1, len(retries)):.0%})"
    return f"{side:28} {len(requests):8} {len(retries):8} {share:>16} {max(kept):9.1f}s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--callers", nargs="*", default=["threads", "tasks"])
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    server, far = spawn.Pipe()
    provider = spawn.Process(target=serve, args=(far,), daemon=True)
    provider.start()
    base = server.recv()
    print(f"{CALLERS} callers at once, three retries each, a provider that is down")
    for how in asked.callers:
        print(
            f"\n{how:28} {'requests':>8} {'retries':>8} {'in worst 100 ms':>16} {'last told':>10}"
        )
        for side in asked.sides:
            near, other = spawn.Pipe()
            process = spawn.Process(target=storm, args=(other, side, how, base), daemon=True)
            process.start()
            near.recv()
            server.send("report")
            server.recv()
            near.send("go")
            kept = near.recv()
            process.join(10)
            server.send("report")
            print(row(side, server.recv(), kept))
    server.send("stop")
    provider.join(10)


if __name__ == "__main__":
    main()
