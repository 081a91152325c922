"""A retry storm: 50 callers at once, and a provider that is down for all of them.

    python tests/benchmarks/storm.py

Plain `dspy.LM`, `litellm.Router` and `ResilientLM` in the same run, each with three retries, in
processes of their own against a provider in another. Counted at the provider: requests, how many of
them were retries, and how many of those arrived within the worst 100 ms (a storm comes in
waves); and at the callers, how long until the last of them was told.
"""

from __future__ import annotations

import argparse
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

    return dspy.LM("openai/m", engine="litellm", api_base=base, api_key="k", cache=False)


def router(base):
    import litellm

    deployment = {"model": "openai/m", "api_base": base, "api_key": "k"}
    routed = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": deployment}], num_retries=3
    )
    return lambda prompt: routed.completion("m", [{"role": "user", "content": prompt}])


def resilient(base, **options):
    from dspy_resilient import ResilientLM

    return ResilientLM("openai/m", api_base=base, api_key="k", cache=False, **options)


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


def storm(pipe, side, base):
    """Warm up, then let all callers go at once; send back how long each was kept."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    lm = SIDES[side](base)
    try:
        import litellm

        litellm.suppress_debug_info = True
        litellm.completion("openai/m", [{"role": "user", "content": "warm"}], api_base=base,
                           api_key="k", num_retries=0, max_retries=0)  # fmt: skip
    except Exception:
        pass
    pipe.send("ready")
    pipe.recv()
    barrier, kept = threading.Barrier(CALLERS), []

    def call(number):
        barrier.wait()
        began = time.monotonic()
        try:
            lm(f"caller {number}")
        except Exception:
            kept.append(time.monotonic() - began)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(kept)


def worst(times):
    """Return how many of `times` fall within the worst 100 ms."""
    times = sorted(times)
    return max((bisect_left(times, at + WINDOW) - n for n, at in enumerate(times)), default=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    sides = parser.parse_args().sides
    spawn = multiprocessing.get_context("spawn")
    server, far = spawn.Pipe()
    provider = spawn.Process(target=serve, args=(far,), daemon=True)
    provider.start()
    base = server.recv()
    print(f"{CALLERS} callers at once, three retries each, a provider that is down\n")
    print(f"{'':28} {'requests':>8} {'retries':>8} {'in worst 100 ms':>16} {'last told':>10}")
    for side in sides:
        near, other = spawn.Pipe()
        process = spawn.Process(target=storm, args=(other, side, base), daemon=True)
        process.start()
        near.recv()
        server.send("report")
        server.recv()
        near.send("go")
        kept = near.recv()
        process.join(10)
        server.send("report")
        requests = server.recv()
        seen, retries = Counter(), []
        for caller, at in requests:
            seen[caller] += 1
            if seen[caller] > 1:
                retries.append(at)
        most = worst(retries)
        share = f"{most} ({most / max(1, len(retries)):.0%})"
        print(f"{side:28} {len(requests):8} {len(retries):8} {share:>16} {max(kept):9.1f}s")
    server.send("stop")
    provider.join(10)


if __name__ == "__main__":
    main()
