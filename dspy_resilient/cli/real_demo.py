"""The demo with a real model: few requests, after a question, with the price said before.

Nothing is staged, so it shows that both sides answer alike, and how long they take.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

import dspy

from dspy_resilient._support.redact import describe
from dspy_resilient.cli.check import missing_keys, way_out
from dspy_resilient.demo import quiet, wait_for
from dspy_resilient.demo.board import board_for, summary
from dspy_resilient.demo.side import Side
from dspy_resilient.events import printable
from dspy_resilient.lm import ResilientLM

CALLERS = 2
PROMPT_TOKENS, ANSWER_TOKENS = 350, 100
"""About what one call of the demo takes; a model that reasons takes more."""


def run_real(model: str, api_base: str | None, limit: int, out: TextIO, *, ask: bool) -> int:
    """Call a real model at most `limit` times through both sides; return the exit code.

    One request checks key and endpoint; the others are shared between the sides.
    """
    out.write(
        f"This sends at most {limit} requests to {printable(model)}, {price(model, limit)}.\n"
    )
    if ask and not _agreed(out):
        return 1
    where: dict[str, Any] = {} if api_base is None else {"api_base": api_base}
    missing = missing_keys(model)
    if api_base is not None and missing:
        where["api_key"] = "none"  # a local server takes any
    settings = {"cache": False, "num_retries": 0, "timeout": 60, **where}
    with quiet(), contextlib.ExitStack() as stack:
        sides = [
            Side("dspy.LM", dspy.LM(model, **settings), None),
            Side("ResilientLM", ResilientLM(model, **settings), None),
        ]
        for side in sides:
            stack.callback(side.close)
        try:
            sides[1].lm("Say hello.")
        except Exception as error:  # noqa: BLE001  # one line says it
            out.write(f"{describe(error)} -- {way_out(error, missing)}\n")
            return 1
        _run(sides, limit - 1, out)
    return 0


def price(model: str, limit: int) -> str:
    """Return what `limit` requests may cost, in words."""
    import litellm  # noqa: PLC0415  # takes seconds

    litellm.suppress_debug_info = True
    try:
        info: Mapping[str, Any] = litellm.get_model_info(model)
        cost = PROMPT_TOKENS * info["input_cost_per_token"]
        cost += ANSWER_TOKENS * info["output_cost_per_token"]
    except Exception:  # noqa: BLE001  # LiteLLM does not know every model
        return "whose price is not known"
    return f"for about ${limit * cost:.4f}"


def _agreed(out: TextIO) -> bool:
    if not sys.stdin.isatty():
        out.write("Say --yes to go on without a question.\n")
        return False
    out.write("Go on? [y/N] ")
    out.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _run(sides: list[Side], limit: int, out: TextIO) -> None:
    places = {side.name: threading.Semaphore(limit // len(sides)) for side in sides}

    def work(side: Side) -> None:
        while places[side.name].acquire(blocking=False):
            side.call()

    callers = [threading.Thread(target=work, args=(side,), daemon=True) for side in sides * CALLERS]
    started = time.monotonic()
    with board_for(sides, out) as board:
        for caller in callers:
            caller.start()
        while any(caller.is_alive() for caller in callers):
            board.show(time.monotonic() - started, "real")
            wait_for(callers, 0.2)
        board.close(time.monotonic() - started)
    out.write(summary(*sides))
    for side in sides:
        if side.last_error is not None:
            out.write(f"{side.name}: {describe(side.last_error)}\n")
