"""The circuit: when a provider is left alone, and the throttle gate: when it asked to be."""

from dspy_resilient.circuit.breaker import CircuitBreaker
from dspy_resilient.circuit.early import EarlyProbes
from dspy_resilient.circuit.gate import GatePass, ThrottleGate
from dspy_resilient.circuit.outcome import Kind, Verdict, classify, redacted
from dspy_resilient.circuit.permit import Permit
from dspy_resilient.circuit.state import CircuitState, Outcome

__all__ = [
    "CircuitBreaker",
    "CircuitState",
    "EarlyProbes",
    "GatePass",
    "Kind",
    "Outcome",
    "Permit",
    "ThrottleGate",
    "Verdict",
    "classify",
    "redacted",
]
