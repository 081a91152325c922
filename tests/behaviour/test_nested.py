"""A client that asks another client of its own."""

from __future__ import annotations

import dspy
import pytest

from dspy_resilient import AllTargetsFailedError, CircuitOpenError
from dspy_resilient.testing import Status


class Relay(dspy.BaseLM):
    """An LM that has another one answer."""

    def __init__(self, inner):
        super().__init__("relay/model")
        self.inner = inner
        self.asked = []  # an attempt runs on a copy

    def __call__(self, prompt=None, **kwargs):
        self.asked.append(prompt)
        return self.inner(prompt)

    async def acall(self, prompt=None, **kwargs):
        self.asked.append(prompt)
        return await self.inner.acall(prompt)


@pytest.mark.parametrize("circuit", [True, False])
def test_an_open_circuit_further_inside_is_not_waited_for(provider, make, ask, circuit):
    """Whoever asks has no say in it: the refusal leads on, and is not asked for again."""
    inner = make("openai/inner", max_wait=0)
    inner.circuit.force_open(seconds=60)
    relay = Relay(inner)
    lm = make(fallbacks=[relay], circuit=circuit, max_wait=5, num_retries=0)
    provider.always(Status(500))
    with pytest.raises(AllTargetsFailedError) as caught:
        ask(lm, "q")
    assert type(caught.value.errors[1]) is CircuitOpenError
    assert relay.asked == ["q"]
