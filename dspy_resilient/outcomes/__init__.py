"""What the end of a request says about the provider: success, failure, or nothing."""

from dspy_resilient.outcomes.classify import classify, redacted
from dspy_resilient.outcomes.outcome import Kind, Outcome, Verdict

__all__ = ["Kind", "Outcome", "Verdict", "classify", "redacted"]
