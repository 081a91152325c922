"""The whole speed table: ours beside plain `dspy.LM`, beside others, and what watching costs.

    python tests/benchmarks/table.py [--rounds N] [--json FILE] [--quick]

Everything is measured side by side in one run: each side in a process of its own, taking turns, so
that a busy machine slows all of them alike. Read the ratios; the quartiles beside them say how far to
trust them. Takes about six minutes, most of them in an outage, where plain `dspy.LM` is patient;
`--quick` leaves that row out. Needs the dependency group `benchmarks`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import breakers
import calls

IMPORT = """
import sys, time
begun = time.process_time()
import dspy
between = time.process_time()
import dspy_resilient
print(between - begun, time.process_time() - between, "litellm" in sys.modules)
"""
WATCHING = {
    "listener": "a listener (on_event)",
    "otel": "OpenTelemetry, spans and metrics",
    "prometheus": "Prometheus collector",
}


def against_plain(sides, rounds):
    """Return the rows of the table that are times: seconds of both, ratio, quartiles, bound."""
    return {name: calls.measure(sides, row, rounds) for row, name in calls.NAMES.items()}


def beside_others(sides, rounds):
    """Return the seconds that an uncached call takes in each way to make one."""
    jobs = {
        "dspy.LM, engine litellm": ("plain", "uncached"),
        "dspy.LM, engine auto (its default)": ("plain", "auto"),
        "litellm.Router, one deployment": ("router", "uncached"),
        "LangChain's ChatOpenAI, with_fallbacks": ("langchain", "uncached"),
        "ResilientLM, engine litellm (its default)": ("ours", "uncached"),
        "ResilientLM, engine auto": ("ours", "auto"),
    }
    times = calls.interleave(sides, list(jobs.values()), rounds)
    base = times["plain", "uncached"]
    return {name: calls.compare(base, times[job]) for name, job in jobs.items()}


def cost_of_watching(sides, rounds):
    """Return the processor time of a call and a hit with something that watches, and without."""
    found = {}
    for job, what in (("uncached, processor", "uncached call"), ("hit, processor", "cache hit")):
        times = calls.interleave(sides, [(side, job) for side in ("unwatched", *WATCHING)], rounds)
        for side, name in WATCHING.items():
            found[f"{what}, {name}"] = calls.compare(times["unwatched", job], times[side, job])
    return found


def import_time(rounds=7):
    """Return the median processor seconds of our import after DSPy's, and whether LiteLLM came along.

    With compiled bytecode, as pip leaves it: the first import only compiles.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-c", IMPORT]
        found = [
            subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            for _ in range(1 + rounds)
        ]
    found = [done.stdout.split() for done in found[1:]]
    return {
        "plain": statistics.median(float(dspys) for dspys, *_ in found),
        "ours": statistics.median(float(ours) for _, ours, _ in found),
        "ratio": statistics.median(float(ours) / float(dspys) for dspys, ours, _ in found),
        "litellm loaded": any(loaded == "True" for *_, loaded in found),
        "bound": 0.08,
    }


def _weigh(pipe):
    import cache

    pipe.send(cache.memory())


def memory():
    """Return the bytes of a cached entry, measured in a process of its own."""
    pipe, far = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_weigh, args=(far,))
    process.start()
    ours, plain = pipe.recv()
    process.join()
    return {"plain": plain, "ours": ours, "ratio": ours / plain, "bound": 1.2}


def _meet_an_outage(pipe, side, base, threads, each):
    import dspy

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    settings = {"max_wait": 0} if side == "ours" else {}  # else its calls outwait the outage
    lm = calls._builder(side, dspy)(base, cache=False, **settings)
    lm("warm")
    pipe.send("ready")
    pipe.recv()

    def body():
        for number in range(each):
            try:
                lm(f"{number}")
            except Exception:
                pass

    crowd = [threading.Thread(target=body) for _ in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    pipe.send("done")


def outage(threads=50, each=20):
    """Return the requests that a dead provider gets from 1000 calls; ours do not wait for it."""
    found = {}
    for side in ("ours", "plain"):
        server = calls.Process(calls.serve, 0.0)
        base = server.pipe.recv()
        callers = calls.Process(_meet_an_outage, side, base, threads, each)
        callers.pipe.recv()
        before = server.ask("down")
        callers.pipe.send("go")
        callers.pipe.recv()
        found[side] = server.ask("count") - before
        server.stop()
        callers.process.join(10)
    return {**found, "ratio": found["ours"] / found["plain"], "bound": 0.02}


def run(rounds, quick):
    """Measure everything, and return it as JSON-ready values."""
    servers = {"fast": calls.Process(calls.serve, 0.0), "slow": calls.Process(calls.serve, 0.05)}
    bases = {name: server.pipe.recv() for name, server in servers.items()}
    names = ("plain", "ours", *calls.OTHERS, "unwatched", *WATCHING)
    sides = {side: calls.Process(calls.work, side, bases) for side in names}
    for side in sides.values():
        side.pipe.recv()
    found = {
        "machine": calls.machine_line(),
        "versions": {name: version(name) for name in ("dspy", "litellm", "dspy-resilient")},
        "against dspy.LM": against_plain(sides, rounds),
        "beside others": beside_others(sides, rounds),
        "cost of watching": cost_of_watching(sides, rounds),
    }
    for process in (*sides.values(), *servers.values()):
        process.stop()
    found["circuits"] = breakers.peers()
    found["import"] = import_time()
    found["memory"] = memory()
    if not quick:
        found["outage"] = outage()
    return found


def lines(found):
    """Yield the table as Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    yield f"{found['machine']}; {packages}"
    yield ""
    yield "| against `dspy.LM` | `dspy.LM` | ours | ratio (quartiles) | at most |"
    yield "|---|--:|--:|--:|--:|"
    for name, row in found["against dspy.LM"].items():
        yield f"| {name} | {_micro(row['plain'])} | {_micro(row['ours'])} | {_ratio(row)} | {row['bound']:.2f} |"
    row = found["memory"]
    yield f"| memory of a cached entry | {row['plain']:.0f} B | {row['ours']:.0f} B | {row['ratio']:.3f} | {row['bound']:.2f} |"
    if row := found.get("outage"):
        yield f"| requests sent in an outage, 1000 calls on 50 threads | {row['plain']} | {row['ours']} | {row['ratio']:.3f} | {row['bound']:.2f} |"
    row = found["import"]
    loaded = "with" if row["litellm loaded"] else "without"
    yield f"| `import dspy_resilient` after `import dspy`, {loaded} LiteLLM | {row['plain'] * 1000:.0f} ms | {row['ours'] * 1000:.0f} ms | {row['ratio']:.3f} | {row['bound']:.2f} |"
    yield ""
    yield "| an uncached call, loopback provider | median | beside the first (quartiles) |"
    yield "|---|--:|--:|"
    for name, row in found["beside others"].items():
        yield f"| {name} | {_micro(row['ours'])} | {_ratio(row)} |"
    yield ""
    yield "| what watching costs, processor time | without | with | ratio (quartiles) |"
    yield "|---|--:|--:|--:|"
    for name, row in found["cost of watching"].items():
        yield f"| {name} | {_micro(row['plain'])} | {_micro(row['ours'])} | {_ratio(row)} |"
    yield ""
    yield "| a circuit alone (beside the first) | closed: pass and report | by 8 threads | open: refuse |"
    yield "|---|--:|--:|--:|"
    for name, row in found["circuits"].items():
        yield f"| {name} | {' | '.join(breakers.cells(row))} |"


def _micro(seconds):
    return f"{seconds * 1e6:,.0f} µs"


def _ratio(row):
    return f"{row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="leave the outage out")
    options = parser.parse_args()
    found = run(options.rounds, options.quick)
    print("\n".join(lines(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
