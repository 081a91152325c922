"""A few cells of `benchmarks/weather.py`: in none is `ResilientLM` worse than plain `dspy.LM`."""

from __future__ import annotations

import pytest
from benchmarks.weather import cell

CELLS = [
    (1, "quick", "50 % fail"),
    (1, "slow, fails fast", "gone 40 s"),
    (4, "quick", "70 % fail"),
    (4, "quick", "90 % fail for 60 s"),
    (4, "quick", "20 % 429, hint 20 s"),
    (4, "slow", "10 % hang"),
    (32, "quick", "30 % fail"),
    (32, "quick", "gone 14 s"),
    (32, "quick", "flaps, 3 s"),
    (32, "slow", "20 % 429"),
    (128, "quick", "gone 59 s"),
    (128, "slow", "429 for 20 s"),
]


@pytest.mark.parametrize(("callers", "model", "weather"), CELLS)
def test_no_weather_is_worse_than_with_plain_dspy(callers, model, weather):
    """Neither more calls are lost, nor more requests sent for an answer."""
    found = cell(callers, model, weather)
    assert not found.is_worse, str(found)
