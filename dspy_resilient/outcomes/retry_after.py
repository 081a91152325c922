"""When the provider wants to be asked again, wherever and however it says so.

This module reads the hint; how much of it is obeyed is for others to say.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from dspy_resilient.outcomes.causes import Causes

WallClock = Callable[[], float]

_LONGEST = 31 * 86_400.0  # a monthly quota; what is longer is a date, or a mistake
_LONGEST_TEXT = 64
_BUSY = (429, 503, 529)

_RESET = re.compile(r"x-ratelimit-reset-.+|anthropic-ratelimit-.+-reset")
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
_LONGEST_BODY = 20_000
_SENTENCE = re.compile(
    r"(?:try again in|retry after|retryDelay[\\'\"]*\s*:)[\s\\'\"]*"
    r"((?:\d{1,9}(?:\.\d{1,9})?(?:ms|s|m|h|d| seconds?))+)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def retry_after(
    error: BaseException,
    *,
    wall: WallClock = time.time,  # noqa: TID251  # a Retry-After date is wall-clock time
) -> float | None:
    """Return the seconds after which the provider wants to be asked again, or None; never raises.

    Read from DSPy's `retry_after`, else from the headers that any error of the chain carries:
    retry-after-ms, retry-after (seconds or a date), and, after a 429, 503 or 529, the reset times
    of the limits that are used up (or of the first to be renewed, where none is said to be), else
    what the body says: Google's RetryInfo, or "try again in 4s" and "retry after 4 seconds".
    What is not a number of seconds between 0 and a month is ignored.

    Args:
        error: What an attempt raised.
        wall: The wall clock that dates are compared with, in seconds since 1970.
    """
    return hint_of(Causes(error), wall)


def hint_of(causes: Causes, wall: WallClock) -> float | None:
    """Return the same for causes that have been read already."""
    for seconds in map(_seconds, causes.attributes("retry_after")):
        if seconds is not None:
            return seconds
    for headers in causes.headers():
        hint = _read(headers, wall, busy=causes.status in _BUSY)
        if hint is not None:
            return hint
    return _told(causes) if causes.status in _BUSY else None


def _told(causes: Causes) -> float | None:
    """Return what the text of a busy provider's answer says, where no header does.

    Google's `RetryInfo` ("retryDelay": "37s"), OpenAI's "try again in 1m4.5s" and Azure's "retry
    after 4 seconds". A prompt that is echoed could say so too, and would be waited for: no more.
    """
    for text in causes.texts():
        found = _SENTENCE.search(text[:_LONGEST_BODY])
        if found is not None:
            spans = _SPAN.findall(found[1].replace(" seconds", "s").replace(" second", "s"))
            hint = _seconds(sum(float(number) * _UNITS[unit] for number, unit in spans))
            if hint:
                return hint
    return None


def _read(headers: Mapping[str, str], wall: WallClock, *, busy: bool) -> float | None:
    milliseconds = _seconds(headers.get("retry-after-ms"), unit=0.001)
    if milliseconds is not None:
        return milliseconds
    hint = _until(headers.get("retry-after"), wall)
    return _next_reset(headers, wall) if hint is None and busy else hint


def _next_reset(headers: Mapping[str, str], wall: WallClock) -> float | None:
    used_up: list[float] = []
    others: list[float] = []
    for name, value in headers.items():
        if _RESET.fullmatch(name) and (wait := _until(value, wall)) is not None:
            left = headers.get(name.replace("reset", "remaining"))
            (used_up if left == "0" else others).append(wait)
    return max(used_up) if used_up else min(others, default=None)


def _until(value: str | None, wall: WallClock) -> float | None:
    """Return the seconds that "7", "6m0s", an HTTP date or an RFC 3339 date mean."""
    if value is None or len(value) > _LONGEST_TEXT:
        return None
    value = value.strip()
    spans = _SPAN.findall(value)
    if spans and "".join(map("".join, spans)) == value:
        return _seconds(sum(float(number) * _UNITS[unit] for number, unit in spans))
    for read in (parsedate_to_datetime, dt.datetime.fromisoformat):
        try:
            when = read(value)
            when = when if when.tzinfo else when.replace(tzinfo=dt.UTC)
            return _seconds(when.timestamp() - wall())
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
    return _seconds(value)


def _seconds(value: object, *, unit: float = 1.0) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        seconds = float(value) * unit
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds <= _LONGEST else None
