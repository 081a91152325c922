"""For tests, demos and notebooks: a clock that obeys and a provider that fails on request.

    with Provider(dspy_answers({"Capital of France?": "Paris"})) as provider:
        lm = dspy.LM("openai/test", api_base=provider.api_base, api_key="none")
        provider.script(rate_limited(retry_after=7), Reset())
        provider.down()
        provider.up()

Standard library only; nothing runs at import, and nothing is left after `stop()`. Fixtures for pytest
are in `dspy_resilient.testing.fixtures`.
"""

from __future__ import annotations

from dspy_resilient.testing.answers import dspy_answers
from dspy_resilient.testing.clock import Clock
from dspy_resilient.testing.exchange import Request
from dspy_resilient.testing.faults import (
    BadChunk,
    Chaos,
    Close,
    CutStream,
    Empty,
    EmptyText,
    Fault,
    Filtered,
    Garbage,
    Hang,
    Hold,
    NoChoices,
    Reset,
    Slow,
    StallStream,
    Status,
    Truncated,
    content_refused,
    context_too_long,
    cut_json,
    overloaded,
    quota_exceeded,
    rate_limited,
)
from dspy_resilient.testing.provider import Provider
from dspy_resilient.testing.reply import Reply, ToolCall

__all__ = [
    "BadChunk",
    "Chaos",
    "Clock",
    "Close",
    "CutStream",
    "Empty",
    "EmptyText",
    "Fault",
    "Filtered",
    "Garbage",
    "Hang",
    "Hold",
    "NoChoices",
    "Provider",
    "Reply",
    "Request",
    "Reset",
    "Slow",
    "StallStream",
    "Status",
    "ToolCall",
    "Truncated",
    "content_refused",
    "context_too_long",
    "cut_json",
    "dspy_answers",
    "overloaded",
    "quota_exceeded",
    "rate_limited",
]
