"""Plain `dspy.LM` and `ResilientLM` through bad weather, over real HTTP and in real time.

    python tests/benchmarks/weather_http.py
    python tests/benchmarks/weather_http.py "gone 14 s" "lone caller, gone 25 s"

Both with their defaults and 32 threads, each in a process of its own beside a provider of its own.
The two sides of a cell run at the same time, so that they meet the same machine, and the n-th
request of both meets the same dice. Printed for each cell: calls lost, requests sent for an
answer, and seconds until the last call had ended. The default engines differ (DSPy's own, and
LiteLLM's, which takes more CPU time); `--engine litellm` gives both the same. Of 600 calls of which
6 % are lost, 37 on average, 6 more or fewer are chance. `weather.py` has many more cells, in
virtual time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

LATENCY = 0.3
BEGINS = 2.0
"""Seconds of good weather before an outage."""


@dataclass(frozen=True)
class Cell:
    """How many calls on how many threads, and the weather: a share of faults, or an outage."""

    name: str
    status: int = 503
    share: float = 0.0
    outage: float = 0.0
    period: float = 0.0
    calls: int = 600
    threads: int = 32


CELLS = [
    Cell("fair", calls=300),
    Cell("30 % 503", share=0.3),
    Cell("50 % 503", share=0.5),
    Cell("20 % 429", status=429, share=0.2),
    Cell("gone 4 s", outage=4),
    Cell("gone 14 s", outage=14),
    Cell("gone 25 s", outage=25),
    Cell("flaps, 3 s", period=3),
    Cell("lone caller, gone 25 s", outage=25, calls=30, threads=1),
]


@dataclass(frozen=True)
class Found:
    """What became of the calls of one side."""

    lost: int
    requests: int
    answered: int
    seconds: float
    errors: dict[str, int]

    @property
    def per_answer(self) -> float:
        """Requests sent for one answer."""
        return self.requests / max(self.answered, 1)


def make(side, base, engine=None):
    """Return an LM of one side, with its defaults."""
    import dspy

    from dspy_resilient import ResilientLM

    options = {} if engine is None else {"engine": engine}
    return {"dspy.LM": dspy.LM, "ResilientLM": ResilientLM}[side](
        "openai/m", api_base=base, api_key="k", **options
    )


@contextlib.contextmanager
def weather(provider, cell):
    """Let the cell's weather come over `provider`, from now on."""
    from dspy_resilient.testing import Chaos, Status

    fault, over = Status(cell.status), threading.Event()

    def blow():
        if cell.outage:
            over.wait(BEGINS)
            provider.down(fault)
            over.wait(cell.outage)
            provider.up()
        while cell.period and not over.wait(cell.period):
            provider.down(fault)
            over.wait(cell.period)
            provider.up()

    if cell.share:
        provider.always(Chaos(seed=7, rate=cell.share, faults=(fault,)))
    wind = threading.Thread(target=blow)
    wind.start()
    try:
        yield
    finally:
        over.set()
        wind.join()


def run(side, folder, barrier, pipe, cell, engine):
    """Make the cell's calls with one side; send what became of them."""
    os.environ["DSPY_CACHEDIR"] = folder
    from dspy_resilient.testing import Provider

    with Provider("Paris", latency=LATENCY) as provider:
        lm = make(side, provider.api_base, engine)
        lm("warm up")
        provider.clear()
        errors = collections.Counter()

        def call(number):
            try:
                lm(f"question {number}")
            except Exception as error:  # whatever it is, the call is lost
                errors[type(error).__name__] += 1

        barrier.wait()
        with weather(provider, cell), ThreadPoolExecutor(cell.threads) as pool:
            began = time.perf_counter()
            list(pool.map(call, range(cell.calls)))
            seconds = time.perf_counter() - began
        lost = errors.total()
        pipe.send(Found(lost, provider.count, cell.calls - lost, seconds, dict(errors)))


SIDES = ("dspy.LM", "ResilientLM")


def side_by_side(run, *args):
    """Return what `run(side, folder, barrier, pipe, *args)` sends, of both sides at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(SIDES))
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for side in SIDES:
            ours, theirs = context.Pipe(duplex=False)
            where = str(Path(folder, side))
            child = context.Process(target=run, args=(side, where, barrier, theirs, *args))
            child.start()
            started.append((child, ours))
        found = [ours.recv() for _, ours in started]
        for child, _ in started:
            child.join()
    return found


def main():
    """Measure the cells that are named, or all, and print a line for each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="cell", help="names of cells; default: all")
    parser.add_argument("--engine", help="of both sides; default: the default of each")
    chosen = parser.parse_args()
    names = chosen.cells
    print(f"{'':24}{'lost':>14}{'requests/answer':>18}{'seconds':>16}   (dspy.LM  ResilientLM)")
    for cell in CELLS:
        if names and cell.name not in names:
            continue
        plain, ours = side_by_side(run, cell, chosen.engine)
        worse = ours.lost > plain.lost or ours.per_answer > plain.per_answer
        print(
            f"{cell.name:24}{plain.lost:>7}{ours.lost:>7}"
            f"{plain.per_answer:>9.2f}{ours.per_answer:>9.2f}"
            f"{plain.seconds:>8.1f}{ours.seconds:>8.1f}"
            f"   {'WORSE ' if worse else ''}{ours.errors or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
