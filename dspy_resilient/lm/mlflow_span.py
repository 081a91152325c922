"""What MLflow's span of a call says beyond DSPy's callbacks: hit or not, attempts, who answered.

`mlflow.dspy.autolog()` opens the span. This module imports nothing of MLflow: it is asked only
where a program has.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dspy_resilient.events import logger

if TYPE_CHECKING:
    from dspy_resilient.pipeline.state import Call, Served


def is_open() -> bool:
    """Whether this program traces DSPy with MLflow, so that a span may be open."""
    return "mlflow.dspy" in sys.modules


def describe(call: Call, served: Served | None) -> None:
    """Set attributes of the span that is active; None was served if the call ends in an error."""
    try:
        span = sys.modules["mlflow"].get_current_active_span()
        if span is None:
            return
        facts = {
            "dspy_resilient.client": call.targets[0].client.name,
            "dspy_resilient.cache_hit": served is not None and served.hit,
            "dspy_resilient.attempts": len(call.attempts),
            "dspy_resilient.outcomes": [f"{each.target}: {each.outcome}" for each in call.attempts],
        }
        if served is not None:
            facts["dspy_resilient.target"] = served.answer.target
        span.set_attributes(facts)
    except Exception:  # noqa: BLE001  # a span must not fail the call
        logger.warning("dspy_resilient.mlflow_span_failed", exc_info=True)
