"""`ResilientLM` as its user sees it: construction, attributes, saving and loading."""

from dspy_resilient.lm.resilient_lm import ResilientLM

__all__ = ["ResilientLM"]
