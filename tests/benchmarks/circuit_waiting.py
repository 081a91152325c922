"""What becomes of calls that retry and wait, in weather of all kinds, under different circuits.

    python tests/benchmarks/circuit_waiting.py

Whole calls in virtual time, see `virtual_time.py`: 32 callers at a provider that fails a share of
its requests at random, or is gone for some seconds. Two models: one answers in 0.5 to 2 s, one in
3 to 8 s. Shown are the share of calls that failed in the end, and requests per call.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from virtual_time import Drill, down, server_error

from dspy_resilient import CircuitPolicy

CIRCUITS = {
    "none": False,
    "default": CircuitPolicy(),
    "5 s, doubled to 300 s": CircuitPolicy(
        window=60.0, failure_rate=0.5, recovery_time=5.0, backoff=2.0, max_recovery_time=300.0
    ),
    "3 successes close": CircuitPolicy(successes_to_close=3),
    "60 s, as circuitbreaker": CircuitPolicy(
        min_calls=10**9,
        recovery_time=60.0,
        backoff=1.0,
        max_recovery_time=60.0,
        successes_to_close=1,
    ),
}
WEATHER = {
    **{f"{share:.0%} fail": down(server_error, (0.0, math.inf), share=share) for share in (0.1, 0.2, 0.3)},
    **{f"gone for {blip:g} s": down(server_error, (20.0, 20.0 + blip)) for blip in (0.6, 2.0, 4.0, 8.0)},
}  # fmt: skip
MODELS = {"quick model": ((0.5, 2.0), 60), "slow model": ((3.0, 8.0), 15)}
SEEDS = 8


def main() -> None:
    logging.getLogger("dspy_resilient").setLevel(logging.CRITICAL)
    for model, (latency, calls) in MODELS.items():
        print(f"\n{model:20}", *(f"{name:>24}" for name in CIRCUITS))
        for weather, fails in WEATHER.items():
            row = []
            for circuit in CIRCUITS.values():
                drills = [
                    Drill(fails, latency=latency, seed=seed, circuit=circuit).run(32, calls)
                    for seed in range(SEEDS)
                ]
                made = 32 * calls * SEEDS
                failed = sum(drill.failed for drill in drills) / made
                sent = sum(drill.sent for drill in drills) / made
                row.append(f"{f'{100 * failed:.2f} % ({sent:.2f})':>24}")
            print(f"{weather:20}", *row)


if __name__ == "__main__":
    main()
