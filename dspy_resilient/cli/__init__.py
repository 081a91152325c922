"""The command line: `python -m dspy_resilient`, also installed as `dspy-resilient`.

It reads arguments and sets the exit code; what they ask for is done elsewhere, and imported only then.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if all went well, 1 if not, 130 after Ctrl-C. Wrong arguments exit with 2.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look-up of prices at import
    options = _parser().parse_args(argv)
    command: _Command = options.run
    try:
        return command(options)
    except KeyboardInterrupt:
        sys.stdout.write("\nStopped.\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dspy-resilient", description="Show, check and look after resilient DSPy clients."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_check(commands)
    _add_cache(commands)
    return parser


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from dspy_resilient import __version__  # noqa: PLC0415

        sys.stdout.write(f"dspy-resilient {__version__}\n")
        parser.exit()


# demo


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="show an outage with dspy.LM and with ResilientLM")
    demo.add_argument(
        "--scenario",
        choices=("outage", "brownout", "throttle", "hang", "fallback"),
        default="outage",
        help="what happens to the provider; default outage",
    )
    demo.add_argument("--seconds", type=float, default=30.0, help="1 to 120; default 30")
    demo.add_argument("--model", help="ask this real model instead; then nothing is staged")
    demo.add_argument("--api-base", help="endpoint of the real model")
    demo.add_argument(
        "--max-requests", type=int, help="most requests to the real model; default 20"
    )
    demo.add_argument("--yes", action="store_true", help="do not ask before the real model is used")
    demo.set_defaults(run=_demo, parser=demo)


def _demo(options: argparse.Namespace) -> int:
    refuse = options.parser.error
    if not 1 <= options.seconds <= 120:  # noqa: PLR2004
        refuse(f"--seconds must be from 1 to 120; got {options.seconds:g}")
    if options.max_requests is not None and options.max_requests < 3:  # noqa: PLR2004
        refuse(f"--max-requests must be at least 3; got {options.max_requests}")
    if options.model is None:
        for name in ("api_base", "max_requests"):
            if getattr(options, name) is not None:
                refuse(f"--{name.replace('_', '-')} needs --model")
        sys.stdout.write("Loading DSPy and LiteLLM ...\n")
        sys.stdout.flush()
        from dspy_resilient.demo import run_demo  # noqa: PLC0415

        run_demo(options.scenario, options.seconds, sys.stdout)
        return 0
    from dspy_resilient.cli.real_demo import run_real  # noqa: PLC0415

    limit = 20 if options.max_requests is None else options.max_requests
    return run_real(options.model, options.api_base, limit, sys.stdout, ask=not options.yes)


# check


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check", help="make one tiny call to a model, and say what it found"
    )
    check.add_argument("model", help='as for dspy.LM, e.g. "openai/gpt-4o-mini"')
    check.add_argument("--api-base", help="endpoint, if it is not the provider's own")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from dspy_resilient.cli.check import check  # noqa: PLC0415

    return 0 if check(options.model, options.api_base, sys.stdout) else 1


# cache


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser("cache", help="look after the answers on disk")
    actions = cache.add_subparsers(dest="action", required=True)
    for name, does in (
        ("info", "say how many answers there are, and where"),
        ("clear", "delete them"),
        ("export", "write them to a file, one JSON object a line"),
    ):
        action = actions.add_parser(name, help=does)
        if name == "export":
            action.add_argument("file", type=Path, help='a new file, or "-" for the terminal')
        action.add_argument("--client", help="only the folder of this name; see `cache info`")
        action.add_argument("--folder", type=Path, help="default: where DSPy keeps its cache")
        if name == "clear":
            action.add_argument("--yes", action="store_true", help="do not ask")
        action.set_defaults(run=_cache, parser=action)


def _cache(options: argparse.Namespace) -> int:
    from dspy_resilient.cli import stored  # noqa: PLC0415

    folders = stored.find(options.folder, options.client)
    if options.action == "info":
        return stored.info(folders, sys.stdout)
    if options.action == "clear":
        return stored.clear(folders, sys.stdout, ask=not options.yes)
    return stored.export(folders, options.file, sys.stdout)
