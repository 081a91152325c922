"""What each policy costs a call when it is switched on and has nothing to do.

    python tests/benchmarks/policies.py

An engine that answers at once takes the place of the provider, so that a few microseconds show.
All variants take turns, in several rounds; the median of a round's calls counts, and of the rounds
the best: the machine may be busy. "Plain" is `dspy.LM` on the same engine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
import warnings

import dspy
from dspy.lm15 import Message, Response, Usage

from dspy_resilient import CachePolicy, CircuitPolicy, LimitPolicy, ResilientLM

warnings.simplefilter("ignore")
NUMBERS = itertools.count()


def answer(request):
    usage = Usage(input_tokens=5, output_tokens=1, total_tokens=6)
    return Response("1", request.model, Message.assistant("Paris"), "stop", usage)


class Instant:
    """Answers without a provider."""

    def complete(self, request):
        return answer(request)


class AsyncInstant:
    """The same on an event loop."""

    async def complete(self, request):
        return answer(request)


def client(**options):
    bare = {"cache": False, "circuit": False, "max_wait": 0}
    return ResilientLM("openai/m", engine=Instant(), async_engine=AsyncInstant(), **bare | options)


SPARE = [dspy.LM("openai/spare", engine=Instant(), async_engine=AsyncInstant())]
VARIANTS = {
    "dspy.LM": lambda: dspy.LM(
        "openai/m", engine=Instant(), async_engine=AsyncInstant(), cache=False
    ),
    "nothing on (retries only)": client,
    "circuit": lambda: client(circuit=CircuitPolicy()),
    "circuit, slow_call": lambda: client(circuit=CircuitPolicy(slow_call=30.0)),
    "limits: max_concurrent": lambda: client(limits=64),
    "limits: rpm and tpm": lambda: client(limits=LimitPolicy(rpm=1e9, tpm=1e12)),
    "limits: adaptive": lambda: client(limits=LimitPolicy(adaptive=True)),
    "deadline": lambda: client(deadline=60.0),
    "fallbacks": lambda: client(fallbacks=SPARE),
    "special lists": lambda: client(context_window_fallbacks=SPARE, policy_fallbacks=SPARE),
    "on_event": lambda: client(on_event=lambda event: None),
    "cache: key, flight, store": lambda: client(cache=CachePolicy(disk=None)),
    "the defaults": lambda: client(cache=CachePolicy(disk=None), circuit=CircuitPolicy()),
}


def sync_call(lm, calls):
    times = []
    for _ in range(calls):
        prompt = f"question {next(NUMBERS)}"
        began = time.perf_counter()
        lm(prompt)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


async def async_call(lm, calls):
    times = []
    for _ in range(calls):
        prompt = f"question {next(NUMBERS)}"
        began = time.perf_counter()
        await lm.acall(prompt)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50)
    options = parser.parse_args()
    dspy.configure(disable_history=True)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    lms = {name: build() for name, build in VARIANTS.items()}
    best = {name: [float("inf"), float("inf")] for name in lms}
    with asyncio.Runner() as runner:
        for _ in range(options.rounds):
            for name, lm in lms.items():
                took = sync_call(lm, options.calls), runner.run(async_call(lm, options.calls))
                best[name] = [min(pair) for pair in zip(best[name], took, strict=True)]
    base = best["nothing on (retries only)"]
    print(f"{'':28} {'sync':>9} {'more':>9}   {'async':>9} {'more':>9}")
    for name, times in best.items():
        cells = (
            f"{1e6 * each:7.1f}us {1e6 * (each - first):+7.1f}us"
            for each, first in zip(times, base, strict=True)
        )
        print(f"{name:28} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
