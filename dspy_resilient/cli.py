"""The command line: `python -m dspy_resilient demo`, also installed as `dspy-resilient`.

It reads arguments and sets the exit code; what they ask for is done elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dspy_resilient.demo import run_demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="dspy-resilient", description="Shows what the package does."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="show an outage with and without ResilientLM")
    demo.add_argument("--seconds", type=float, default=30.0, help="1 to 45; default 30")
    demo.add_argument("--model", help="ask this real model instead; then no outage is staged")
    demo.add_argument("--api-base", help="endpoint of the real model")
    options = parser.parse_args(argv)
    if not 1 <= options.seconds <= 45:  # noqa: PLR2004
        parser.error(f"--seconds must be from 1 to 45; got {options.seconds:g}")
    if options.api_base and not options.model:
        parser.error("--api-base needs --model")
    try:
        run_demo(options.seconds, options.model, options.api_base, sys.stdout)
    except KeyboardInterrupt:
        sys.stdout.write("\nStopped.\n")
        return 130
    return 0
