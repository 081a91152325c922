"""Shows the sides of a demo: a live table on a terminal, plain lines elsewhere.

The live table needs `rich` (the extra `demo`). Without it, without a terminal, or on one that cannot move its
cursor, there is a line every two seconds and a table at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, TextIO

from dspy_resilient.demo.side import ROWS, Side

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_EVERY = 2.0
_LABEL, _COLUMN = 28, 14
_GOOD = {"answers"}
_BAD = {"calls lost", "  of them unanswered"}


class Board(Protocol):
    """What shows a demo."""

    def show(self, elapsed: float, state: str) -> None:
        """Show the state of affairs `elapsed` seconds after the start."""

    def close(self, elapsed: float) -> None:
        """Show the end."""


@contextlib.contextmanager
def board_for(sides: Sequence[Side], out: TextIO) -> Iterator[Board]:
    """Return the board that suits `out`."""
    if not out.isatty() or find_spec("rich") is None or os.environ.get("TERM") == "dumb":
        yield PlainBoard(sides, out)
        return
    from rich.console import Console  # noqa: PLC0415  # an extra
    from rich.live import Live  # noqa: PLC0415  # an extra

    console = Console(file=out)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        yield LiveBoard(sides, live)


class PlainBoard:
    """A line now and then, and the table at the end."""

    def __init__(self, sides: Sequence[Side], out: TextIO) -> None:
        self._sides = sides
        self._out = out
        self._next_line = 0.0

    def show(self, elapsed: float, state: str) -> None:
        """Write a line, if the last one was two seconds ago."""
        if elapsed < self._next_line:
            return
        if not self._next_line:
            names = "".join(f"{side.name:>20}" for side in self._sides)
            self._out.write(f"{'time':>5}  {'provider':<9}{names}\n")
        self._next_line = elapsed + _EVERY
        counts = (f"{side.answers} ok, {side.errors} lost" for side in self._sides)
        self._out.write(f"{elapsed:3.0f} s  {state:<9}{''.join(f'{c:>20}' for c in counts)}\n")
        self._out.flush()

    def close(self, elapsed: float) -> None:
        """Write the table."""
        lines = [f"\nAfter {elapsed:.1f} s:"]
        columns = [[side.name, *side.column()] for side in self._sides]
        for label, *values in zip(("", *ROWS), *columns, strict=True):
            lines.append(f"{label:<{_LABEL}}" + "".join(f"{v:>{_COLUMN}}" for v in values))
        self._out.write("\n".join(lines) + "\n")
        self._out.flush()


class LiveBoard:
    """A table that is redrawn in place."""

    def __init__(self, sides: Sequence[Side], live: Live) -> None:
        self._sides = sides
        self._live = live

    def show(self, elapsed: float, state: str) -> None:
        """Draw the table."""
        colour = "green" if state == "up" else "bold red"
        self._live.update(
            self._table(f"{elapsed:.0f} s   provider: [{colour}]{state}[/]"), refresh=True
        )

    def close(self, elapsed: float) -> None:
        """Draw the end."""
        self._live.update(self._table(f"After {elapsed:.1f} s"), refresh=True)

    def _table(self, title: str) -> Table:
        from rich import box  # noqa: PLC0415  # an extra
        from rich.table import Table  # noqa: PLC0415  # an extra

        table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
        table.add_column("")
        for side in self._sides:
            table.add_column(side.name, justify="right", min_width=11)
        columns = [side.column() for side in self._sides]
        for label, *values in zip(ROWS, *columns, strict=True):
            table.add_row(label, *(_coloured(label, value) for value in values))
        return table


def _coloured(label: str, value: str) -> str:
    if value in {"0", "-"}:
        return value
    colour = "green" if label in _GOOD else "red" if label in _BAD else ""
    return f"[{colour}]{value}[/]" if colour else value


def summary(plain: Side, ours: Side) -> str:
    """Return in a sentence what was seen on each side."""
    return f"\n{_seen(plain)}\n{_seen(ours)}\n"


def _seen(side: Side) -> str:
    calls = side.answers + side.errors
    text = f"{side.name} lost {side.errors} of {calls} calls"
    if side.failed_requests is not None:
        text += f" and sent {side.failed_requests} requests that were not answered"
    if side.waiting:
        text += f"; {side.waiting} calls were still waiting at the end"
    return f"{text}."
