"""How a client looks to a person: a table in a terminal, a small HTML view in a notebook.

Text goes in, text comes out: nothing here counts, calls or waits. The HTML is whole in itself (no
script, no style sheet, nothing to load), takes colours that do on light and on dark, and escapes
every name, since a model's name may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from dspy_resilient.events import printable
from dspy_resilient.stats.latency import duration
from dspy_resilient.stats.spending import NOTHING

if TYPE_CHECKING:
    from dspy_resilient.stats.latency import Latency
    from dspy_resilient.stats.spending import Spending
    from dspy_resilient.stats.stats import Stats


class Row(NamedTuple):
    """One line of the table: what, how deep below the line before, in all, and lately."""

    label: str
    depth: int
    total: str
    recent: str


def stats_text(stats: Stats) -> str:
    """Return the numbers as a table; what never happened is left out."""
    heads = _heads(stats)
    rows = [("  " * row.depth + row.label, row.total, row.recent) for row in _rows(stats)]
    return aligned([heads, *rows] if stats.recent else [heads[:2], *(row[:2] for row in rows)])


def stats_html(stats: Stats) -> str:
    """Return the numbers as an HTML table."""
    return _box(_stats_table(stats))


def circuit_html(name: str, state: str, says: str) -> str:
    """Return one circuit: its name, a badge, and what there is to say."""
    return _box(_circuit(name, state, says))


def client_html(
    title: str,
    circuits: Iterable[tuple[str, str, str]],
    stats: Stats,
    conditions: Iterable[str] = (),
) -> str:
    """Return a client: its conditions, its circuits as (label, state, what to say), its numbers."""
    badges = "".join(f" {badge(each, _HEALTH)}" for each in conditions)
    head = f'<div style="font-weight:600;margin-bottom:4px">{_text(title)}{badges}</div>'
    lines = "".join(_circuit(*circuit) for circuit in circuits)
    return _box(head + lines + _stats_table(stats, title=""))


def clients_html(rows: Iterable[tuple[str, str, str, Stats]]) -> str:
    """Return several clients, one a line: name, model, health and numbers."""
    heads = ("client", "model", "state", "calls", "hits", "requests", "failures", "p50", "p95")
    lines = [_cells("th", heads, first=3)]
    for name, model, state, stats in rows:
        took = [_seconds(stats.latency.p50), _seconds(stats.latency.p95)]
        counts = [f"{n:,}" for n in (stats.calls, stats.hits, stats.attempts, stats.failures)]
        lines.append(_cells("td", (name, model, badge(state, _HEALTH), *counts, *took), first=3))
    return _box(_table(lines))


def health_html(
    name: str, model: str, state: str, in_flight: int, retry_after: float | None
) -> str:
    """Return one client's condition: a badge, its calls under way, and when that may change."""
    says = f"{in_flight:,} under way"
    says += f", may change in {duration(retry_after)}" if retry_after else ""
    told = f"{badge(state, _HEALTH)} {_text(name)} ({_text(model)}) "
    return _box(told + _text(says))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows with their first column to the left and the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# The rows


def _heads(stats: Stats) -> tuple[str, str, str]:
    recent = stats.recent.seconds if stats.recent else 0.0
    return (stats.client, f"in {duration(stats.seconds)}", f"last {duration(recent)}")


def _rows(stats: Stats) -> Iterator[Row]:
    """Yield the lines; a share says how much of the line above it this is."""
    yield _count(stats, "calls", "calls")
    yield from _some(stats, "hits", "answered from the cache", of="calls")
    yield from _some(stats, "stale", "answered by a stale entry", of="calls")
    yield from _some(stats, "coalesced", "joined an identical call", of="calls")
    yield from _some(stats, "errors", "ended with an error", of="calls")
    yield _count(stats, "attempts", "requests sent")
    yield from _some(stats, "failures", "failed", of="attempts")
    yield from _parts(stats, "failed", depth=2)
    yield from _some(stats, "retries", "repeated after a pause", of="attempts")
    yield from _queue(stats)
    yield from _some(stats, "rejected", "not sent")
    yield from _parts(stats, "refused")
    yield from _some(stats, "restarts", "restarts")
    yield from _some(stats, "fallbacks", "went on to a fallback")
    yield from _some(stats, "stored", "answers kept")
    yield from _some(stats, "evicted", "dropped again")
    yield from _parts(stats, "skipped", "not kept: ")
    yield from _parts(stats, "disk_errors", "fault of the disk: ")
    yield from _some(stats, "events_dropped", "events dropped")
    yield from _times(stats)
    yield from _spending(stats)
    if stats.tokens_saved:
        yield _count(stats, "tokens_saved", "tokens saved")
    if stats.cost_saved:
        recent = stats.recent.cost_saved if stats.recent else 0.0
        yield Row("dollars saved", 0, f"{stats.cost_saved:,.4f}", f"{recent:,.4f}")


def _spending(stats: Stats) -> Iterator[Row]:
    """Yield what was billed in all, and by target if there are several."""
    spent, recent = stats.spent, stats.recent.spent if stats.recent else NOTHING
    if not spent:
        return
    for name, label, depth in _TOKENS:
        if count := getattr(spent, name):
            yield Row(label, depth, f"{count:,}", f"{getattr(recent, name):,}")
    yield Row("dollars spent", 0, _dollars(spent), _dollars(recent))
    if len(stats.spent_by_target) > 1:
        lately = stats.recent.spent_by_target if stats.recent else {}
        for target, each in stats.spent_by_target.items():
            yield Row(target, 1, _dollars(each), _dollars(lately.get(target, NOTHING)))
    if spent.unanswered:
        count = f"{spent.unanswered:,}"
        yield Row("requests that may be billed", 1, count, f"{recent.unanswered:,}")


_TOKENS = (
    ("prompt_tokens", "tokens sent", 0),
    ("cached_tokens", "cached by the provider", 1),
    ("completion_tokens", "tokens received", 0),
    ("reasoning_tokens", "spent on reasoning", 1),
)


def _dollars(spent: Spending) -> str:
    """Return an amount for people; answers of unknown price are named, not counted as 0."""
    known = (
        f"{spent.known_dollars:,.4f}" if spent.known_dollars >= 1 else f"{spent.known_dollars:.6f}"
    )
    if not spent.unpriced:
        return known
    unknown = f"unknown ({spent.unpriced:,} answers)"
    return f"{known} + {unknown}" if spent.known_dollars else unknown


def _count(stats: Stats, name: str, label: str, *, of: str = "") -> Row:
    def told(numbers: Stats | None) -> str:
        count = getattr(numbers, name, 0)
        whole = getattr(numbers, of, 0) if of else 0
        share = f"{count / whole:>5.0%}" if whole else " " * 5
        return f"{count:,} {share}"

    return Row(label, 1 if of else 0, told(stats), told(stats.recent))


def _some(stats: Stats, name: str, label: str, *, of: str = "") -> Iterator[Row]:
    if getattr(stats, name):
        yield _count(stats, name, label, of=of)


def _parts(stats: Stats, name: str, prefix: str = "", depth: int = 1) -> Iterator[Row]:
    """Yield a line for each reason among the parts called `name`."""
    recent: Mapping[str, int] = getattr(stats.recent, name, {})
    parts: Mapping[str, int] = getattr(stats, name)
    for reason, count in sorted(parts.items(), key=lambda part: -part[1]):
        label = prefix + reason.replace("_", " ")
        blank = " " * 6
        yield Row(label, depth, f"{count:,}{blank}", f"{recent.get(reason, 0):,}{blank}")


def _queue(stats: Stats) -> Iterator[Row]:
    def told(numbers: Stats | None) -> str:
        return _seconds(
            numbers.queue_seconds / numbers.queued if numbers and numbers.queued else None
        )

    if stats.queued:
        yield _count(stats, "queued", "waited within the limits")
        yield Row("on average for", 1, told(stats), told(stats.recent))


def _times(stats: Stats) -> Iterator[Row]:
    if not stats.latency.count:
        return
    recent = stats.recent.latency if stats.recent else None
    for share, name in ((0.5, "half"), (0.95, "95 %"), (0.99, "99 %")):
        yield Row(
            f"{name} answered within",
            0,
            _within(stats.latency, share),
            _within(recent, share),
        )


def _within(latency: Latency | None, share: float) -> str:
    return _seconds(latency.quantile(share) if latency is not None else None)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else duration(seconds)


# The HTML. Grey with an alpha and the notebook's own text colour do on light and on dark; the
# badges bring both of their colours along.

_GREEN, _RED, _AMBER, _BLUE, _GREY = "#1a7f37", "#c62828", "#8a5a00", "#5a4fcf", "#616161"
_COLOURS = {
    "closed": _GREEN,
    "open": _RED,
    "half_open": _AMBER,
    "forced_open": _BLUE,
    "forced_closed": _BLUE,
}
_HEALTH = {"ready": _GREEN, "open": _RED, "broken": _RED, "throttled": _AMBER}
_CELL = "padding:1px 10px 1px 0;border:none;background:none;vertical-align:top"
_NUMBER = ";white-space:pre;font-family:monospace"


class _Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def badge(state: str, colours: Mapping[str, str] = _COLOURS) -> _Html:
    """Return a circuit's state, or a client's health, as a coloured word."""
    style = (
        f"background:{colours.get(state, _GREY)};color:#fff;border-radius:9px;"
        "padding:1px 8px;font-size:90%;white-space:nowrap"
    )
    return _Html(f'<span style="{style}">{_text(state.replace("_", " "))}</span>')


def _text(text: str) -> str:
    return text if isinstance(text, _Html) else escape(printable(text))


def _box(content: str) -> str:
    style = (
        "display:inline-block;max-width:100%;box-sizing:border-box;overflow-x:auto;padding:8px 12px;"
        "border:1px solid rgba(128,128,128,.4);border-radius:6px"
    )
    return f'<div style="{style}">{content}</div>'


def _circuit(name: str, state: str, says: str) -> str:
    says = says.removeprefix(state.replace("_", " "))  # the badge has said it
    told = f"{badge(state)} {_text(name)} {_text(says)}"
    return f'<div style="margin:2px 0">{told}</div>'


def _table(lines: Iterable[str]) -> str:
    return f'<table style="border-collapse:collapse;margin:4px 0 0">{"".join(lines)}</table>'


def _stats_table(stats: Stats, title: str | None = None) -> str:
    name, *heads = _heads(stats)
    width = 3 if stats.recent else 2
    lines = [_cells("th", [name if title is None else title, *heads][:width])]
    for row in _rows(stats):
        label = _Html("&emsp;" * row.depth + _text(row.label))
        lines.append(_cells("td", (label, row.total, row.recent)[:width]))
    return _table(lines)


def _cells(tag: str, cells: Iterable[str], first: int = 1) -> str:
    """Return a row whose first cells are words and whose others are numbers."""
    told = []
    for number, cell in enumerate(cells):
        side = "left" if number < first else "right"
        style = f"{_CELL};text-align:{side}" + ("" if number < first else _NUMBER)
        told.append(f'<{tag} style="{style}">{_text(cell)}</{tag}>')
    return f'<tr style="background:none">{"".join(told)}</tr>'
