"""The benchmark history can be read, and tells a change from noise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import history


def test_every_line_of_the_history_has_what_a_comparison_needs():
    """Ratios with their bounds, by row of the speed table."""
    rows = history.load()
    assert rows
    for row in rows:
        assert row.keys() == {"date", "commit", "note", "machine", "versions", "ratios"}
        assert all(len(numbers) == 4 for numbers in row["ratios"].values())


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ([1.0, 0.9, 1.1, 1.5], [0.8, 0.7, 0.85, 1.5], "better"),
        ([1.0, 0.9, 1.1, 1.5], [1.05, 0.95, 1.2, 1.5], "same"),
        ([1.0, 0.9, 1.1, 1.5], [1.3, 1.2, 1.4, 1.5], "worse"),
        ([1.0, 0.9, 1.1, 1.5], [1.6, 1.5, 1.7, 1.5], "worse  OVER ITS BOUND"),
        ([1.0, None, None, None], [1.04, None, None, None], "same"),
        ([1.0, None, None, None], [1.06, None, None, None], "worse"),
        (None, [1.0, None, None, None], "new"),
        ([1.0, None, None, None], None, "gone"),
    ],
)
def test_a_change_within_the_quartiles_is_noise(before, after, word):
    """Only ranges that do not meet are a change."""
    assert history.verdict(before, after) == word


def test_a_line_is_made_of_what_the_table_found():
    """`table.py --json` writes it; the machine and the versions come along."""
    found = {
        "machine": "here",
        "versions": {"dspy": "3.4.1"},
        "against dspy.LM": {
            "a hit": {"ratio": 0.25, "low": 0.2, "high": 0.3, "bound": 0.3, "plain": 1, "ours": 1}
        },
        "memory": {"ratio": 1.1, "bound": 1.2},
        "import": {"plain": 0.9, "ours": 0.07, "ratio": 0.078, "bound": 0.08},
    }
    row = history.row_of(found, "a note", date="2026-01-02", commit="abc")
    assert row["ratios"]["a hit"] == [0.25, 0.2, 0.3, 0.3]
    assert row["ratios"]["memory"] == [1.1, None, None, 1.2]
    assert "outage" not in row["ratios"]
    text = "\n".join(history.lines(row, row))
    assert "a note" in text
    assert "same" in text
