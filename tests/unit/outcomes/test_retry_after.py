"""Hints that providers give in the text of a 429 only."""

from __future__ import annotations

import dspy
import pytest

from dspy_resilient.outcomes.retry_after import retry_after

GEMINI = '{"error": {"code": 429, "details": [{"@type": "x.RetryInfo", "retryDelay": "37.5s"}]}}'


def error(text, status=429, **more):
    return dspy.LMRateLimitError(text, model="openai/test", status=status, **more)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Rate limit reached for gpt-4o. Please try again in 4s. Visit", 4.0),
        ("Please try again in 250ms.", 0.25),
        ("Please try again in 1m4.5s.", 64.5),
        ("Please retry after 12 seconds.", 12.0),
        ("Please retry after 1 second.", 1.0),
        (GEMINI, 37.5),
        ("Please try again in a while", None),
        ("try again in 4 days", None),
        ("slow down", None),
    ],
)
def test_plain_sentences_are_read(text, seconds):
    """As OpenAI, Azure and Gemini write them."""
    assert retry_after(error(text)) == seconds


def test_a_header_or_dspys_own_hint_is_believed_first():
    """What is said in words counts only where nothing else does."""
    assert retry_after(error("try again in 4s", retry_after=9.0)) == 9.0


def test_only_a_busy_provider_is_believed():
    """A text that another error echoes asks for nothing."""
    assert retry_after(dspy.LMServerError("try again in 4s", model="m", status=500)) is None
