"""The circuit: when a provider is left alone, and what closes the circuit again."""

from dspy_resilient.circuit.breaker import CircuitBreaker
from dspy_resilient.circuit.permit import Permit
from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.outcomes.outcome import Outcome

__all__ = ["CircuitBreaker", "CircuitState", "Outcome", "Permit"]
