"""What a call costs beside plain `dspy.LM`: ratios, interleaved, medians, from one run.

    python tests/benchmarks/calls.py [--rounds N]

Each side runs in a process of its own, because an observer registered with LiteLLM would slow the
other side down and flatter us; the provider runs in a third. The rounds alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # for whoever imports this, too
PROMPT = ("The quick brown fox jumps over the lazy dog. " * 14)[:600]
KEY = "dummy-key-for-benchmarks"


def serve(pipe, latency):
    from dspy_resilient.testing import Provider

    with Provider("Paris", latency=latency, keep=10) as provider:
        pipe.send(provider.api_base)
        while (order := pipe.recv()) != "stop":
            if order == "down":
                provider.down("500")
            elif order == "up":
                provider.up()
            elif order == "clear":
                provider.clear()
            pipe.send(provider.count)


def work(pipe, side, bases):
    import dspy

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    dspy.settings.configure(max_history_size=100)
    build = _builder(side, dspy)
    jobs = (
        {"uncached": Uncached(OTHERS[side](bases["fast"]))}
        if side in OTHERS
        else {
            "hit": Hits(build(bases["fast"])),
            "uncached": Uncached(build(bases["fast"], cache=False)),
            "auto": Uncached(build(bases["fast"], cache=False, engine="auto")),
            "hit, processor": Hits(build(bases["fast"]), time.process_time),
            "uncached, processor": Uncached(build(bases["fast"], cache=False), time.process_time),
            "threads": Threads(build(bases["slow"], cache=False), 64),
            "tasks": Tasks(build(bases["slow"], cache=False), 256),
        }
    )
    if side == "ours":
        jobs["rejection"] = Rejections(build(bases["fast"], max_wait=0))
    answer_orders(pipe, jobs)


def answer_orders(pipe, jobs):
    pipe.send(sorted(jobs))
    while (order := pipe.recv()) != "stop":
        pipe.send(jobs[order]())


def _builder(side, dspy):
    def build(base, **options):
        # Among 64 threads a request of plain `dspy.LM` now and then waits until its timeout: its HTTP
        # pool closes surplus connections under whoever has just taken one.
        options = {
            "engine": "litellm",
            "api_base": base,
            "api_key": KEY,
            "timeout": 20.0,
            **options,
        }
        if side == "plain":
            return dspy.LM("openai/test", **options)
        from dspy_resilient import CachePolicy, ResilientLM

        if options.get("cache", True):
            options["cache"] = CachePolicy(disk=None)
        if side == "listener":
            options["on_event"] = lambda event: None
        return _watched(side, ResilientLM("openai/test", **options))

    return build


def _watched(side, lm):
    """Have what `side` names watch the calls, with nothing behind it that would cost more."""
    if side == "otel":
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider

        from dspy_resilient.observe.otel import instrument

        meters = MeterProvider([InMemoryMetricReader()])
        instrument(lm, tracer_provider=TracerProvider(), meter_provider=meters)
    elif side == "prometheus":
        from prometheus_client import CollectorRegistry

        from dspy_resilient.observe.prometheus import ClientCollector

        CollectorRegistry().register(ClientCollector(lm))
    return lm


class Router:
    """LiteLLM's router with one deployment, called as an LM."""

    def __init__(self, base):
        import litellm

        place = {"model": "openai/test", "api_base": base, "api_key": KEY}
        deployment = {"model_name": "test", "litellm_params": place}
        self.router = litellm.Router([deployment], num_retries=0)

    def __call__(self, prompt):
        return self.router.completion(model="test", messages=[{"role": "user", "content": prompt}])


class LangChain:
    """LangChain's chat model with a fallback that is not needed, called as an LM."""

    def __init__(self, base):
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model="test", base_url=base, api_key=KEY, max_retries=0)
        self.model = model.with_fallbacks([model])

    def __call__(self, prompt):
        return self.model.invoke(prompt)


OTHERS = {"router": Router, "langchain": LangChain}


class Hits:
    def __init__(self, lm, clock=time.perf_counter):
        self.lm, self.clock = lm, clock
        lm(PROMPT)

    def __call__(self, count=300):
        begun = self.clock()
        for _ in range(count):
            self.lm(PROMPT)
        return (self.clock() - begun) / count


class Uncached:
    def __init__(self, lm, clock=time.perf_counter):
        self.lm, self.clock = lm, clock
        for _ in range(5):
            lm(PROMPT)

    def __call__(self, count=40):
        begun = self.clock()
        for _ in range(count):
            self.lm(PROMPT)
        return (self.clock() - begun) / count


class Rejections:
    def __init__(self, lm):
        self.lm = lm
        lm.circuit.force_open()

    def __call__(self, count=300):
        begun = time.perf_counter()
        for number in range(count):
            try:
                self.lm(f"{number} {PROMPT}")
            except Exception as error:
                assert type(error).__name__ == "CircuitOpenError", error
        return (time.perf_counter() - begun) / count


class Threads:
    """Seconds per call with all threads busy against a 50 ms provider."""

    def __init__(self, lm, threads):
        self.lm, self.threads = lm, threads

    def __call__(self, each=4):
        def body():
            for _ in range(each):
                self.lm(PROMPT)

        threads = [threading.Thread(target=body) for _ in range(self.threads)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - begun) / (each * self.threads)


class Tasks:
    """Seconds per call with all tasks of one loop busy against a 50 ms provider."""

    def __init__(self, lm, tasks):
        self.lm, self.tasks = lm, tasks
        self.runner = asyncio.Runner()

    def __call__(self, bursts=3):
        async def burst():
            await asyncio.gather(*(self.lm.acall(PROMPT) for _ in range(self.tasks)))

        begun = time.perf_counter()
        for _ in range(bursts):
            self.runner.run(burst())
        return (time.perf_counter() - begun) / (bursts * self.tasks)


class Process:
    """A process that answers orders through a pipe."""

    def __init__(self, target, *args):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, far = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(far, *args), daemon=True)
        self.process.start()
        far.close()  # so that a process that dies is an EOFError here, and no silence

    def ask(self, order):
        self.pipe.send(order)
        return self.pipe.recv()

    def stop(self):
        self.pipe.send("stop")
        self.process.join(10)


BOUNDS = {"hit": 0.3, "uncached": 1.0, "auto": 1.25, "threads": 1 / 1.02, "tasks": 1 / 1.02}
NAMES = {
    "hit": "cache hit, 600-character prompt",
    "uncached": "uncached call, loopback provider",
    "auto": 'uncached call, engine="auto"',
    "threads": "64 threads, 50 ms provider",
    "tasks": "256 tasks, 50 ms provider",
    "rejection": "rejection while open / one dspy.LM call",
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="*", default=list(NAMES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    servers = {"fast": Process(serve, 0.0), "slow": Process(serve, 0.05)}
    bases = {name: server.pipe.recv() for name, server in servers.items()}
    sides = {side: Process(work, side, bases) for side in ("plain", "ours")}
    for side in sides.values():
        side.pipe.recv()
    rows = {row: measure(sides, row, options.rounds) for row in options.rows}
    for process in (*sides.values(), *servers.values()):
        process.stop()
    machine = machine_line()
    if options.json:
        json.dump({"machine": machine, "rows": rows}, sys.stdout, indent=2)
        return
    print(machine)
    print(f"{'':45} {'dspy.LM':>10} {'ours':>10} {'ratio':>7} {'spread':>13} {'bound':>6}")
    for row, found in rows.items():
        spread = f"{found['low']:.3f}-{found['high']:.3f}"
        print(
            f"{NAMES[row]:45} {found['plain'] * 1e6:8.0f}us {found['ours'] * 1e6:8.0f}us "
            f"{found['ratio']:7.3f} {spread:>13} {found['bound']:6.3f}"
        )


def machine_line():
    return (
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}"
    )


def measure(sides, row, rounds):
    plain_row = "uncached" if row == "rejection" else row
    times = interleave(sides, [("plain", plain_row), ("ours", row)], rounds)
    found = compare(times["plain", plain_row], times["ours", row])
    return {**found, "bound": BOUNDS.get(row, 0.02)}


def interleave(sides, jobs, rounds):
    """Return the times of each (side, job), done in turns, every other round in reverse."""
    times = {job: [] for job in jobs}
    for turn in range(rounds):
        for side, job in jobs if turn % 2 else reversed(jobs):
            times[side, job].append(sides[side].ask(job))
    return times


def compare(plain, ours):
    """Return medians, and the median and quartiles of the ratios within each round."""
    ratios = sorted(o / p for o, p in zip(ours, plain, strict=True))
    return {
        "plain": statistics.median(plain),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
    }


if __name__ == "__main__":
    main()
