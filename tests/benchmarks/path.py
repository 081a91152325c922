"""The way of one call through the package: which files it enters, and how often it changes files.

    python tests/benchmarks/path.py [--verbose]

One miss and one hit with the defaults, on a client that is warm, traced with `sys.setprofile`; the
test provider and DSPy's and LiteLLM's own code are left out. A change is a call, from one of our
functions, of one in another of our files. A house that is easy to enter needs few of either.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
MOST = {"miss": (22, 60), "hit": (10, 20)}  # files, changes


def trace(work):
    """Return how often each file of ours was entered from another while `work()` ran on this thread."""
    import dspy_resilient

    ours = str(Path(dspy_resilient.__file__).parent) + os.sep
    left_out = ours + "testing" + os.sep
    stack: list[str] = []
    entered: Counter[tuple[str, str]] = Counter()

    def profile(frame, event, _):
        name = frame.f_code.co_filename
        if not name.startswith(ours) or name.startswith(left_out):
            return
        if event == "call":
            before = stack[-1] if stack else ""
            if name != before:
                entered[before.removeprefix(ours), name.removeprefix(ours)] += 1
            stack.append(name)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return entered


def measure():
    """Return the traces of a miss and of a hit."""
    import dspy

    from dspy_resilient import ResilientLM
    from dspy_resilient.testing import Provider

    with tempfile.TemporaryDirectory() as folder, Provider() as provider:
        os.environ["DSPY_CACHEDIR"] = folder
        dspy.configure_cache(disk_cache_dir=folder)
        lm = ResilientLM("openai/m", api_base=provider.api_base, api_key="k")
        for warm in range(3):
            lm(f"warm {warm}")
        miss = trace(lambda: lm("Hello"))
        hit = trace(lambda: lm("Hello"))
        lm.close()
    return {"miss": miss, "hit": hit}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="print every change")
    args = parser.parse_args()
    for name, entered in measure().items():
        files, changes = {file for _, file in entered}, sum(entered.values())
        most_files, most_changes = MOST[name]
        print(
            f"{name:5} enters {len(files):3} files (at most {most_files}), "
            f"changes files {changes:3} times (at most {most_changes})"
        )
        if args.verbose:
            for (before, after), times in entered.most_common():
                print(f"   {times:3}  {before or '-':32} -> {after}")


if __name__ == "__main__":
    main()
