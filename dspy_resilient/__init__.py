"""A drop-in `dspy.LM` that survives its provider.

`ResilientLM` treats each configured model as a client of its own: its cache, its circuit breaker,
its limits, its retries, and the targets it may fall back to. Nothing is shared unless somebody
shared it.
"""

from dspy_resilient.budgets import Budget, BudgetStop
from dspy_resilient.circuit import CircuitBreaker, CircuitState
from dspy_resilient.clients import Clients
from dspy_resilient.errors import (
    AllTargetsFailedError,
    BrokenStateError,
    BudgetExceededError,
    CallRejectedError,
    CircuitOpenError,
    ClientClosedError,
    DeadlineExceededError,
    LimitExceededError,
    ResilienceError,
    RestartLimitError,
    ThrottledError,
)
from dspy_resilient.evaluation import Evaluate
from dspy_resilient.lm import ResilientLM
from dspy_resilient.pipeline.health import Health, HealthState
from dspy_resilient.policies import CachePolicy, CircuitPolicy, LimitPolicy, RetryPolicy

__all__ = [
    "AllTargetsFailedError",
    "BrokenStateError",
    "Budget",
    "BudgetExceededError",
    "BudgetStop",
    "CachePolicy",
    "CallRejectedError",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitPolicy",
    "CircuitState",
    "ClientClosedError",
    "Clients",
    "DeadlineExceededError",
    "Evaluate",
    "Health",
    "HealthState",
    "LimitExceededError",
    "LimitPolicy",
    "ResilienceError",
    "ResilientLM",
    "RestartLimitError",
    "RetryPolicy",
    "ThrottledError",
]

# Saved programs name the class by its module: it must not change when files move.
ResilientLM.__module__ = "dspy_resilient"


def __getattr__(name: str) -> str:
    """Return `__version__`, which is looked up when it is asked for: that takes a moment."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415  # not at every import

        return version("dspy-resilient")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
