"""What is asked is what was asked when the call was made, whatever the caller does meanwhile."""

from __future__ import annotations

import asyncio

import pytest


@pytest.mark.filterwarnings("ignore:messages= dictionaries:DeprecationWarning")
@pytest.mark.parametrize("change", ["messages", "settings"])
async def test_what_a_caller_changes_meanwhile_poisons_nothing(provider, make, change):
    """The answer to the old question is not found under the new one, nor the other way round."""
    provider.answer = lambda body: f"{body['messages'][-1]['content']} at {body.get('temperature')}"
    lm = make(temperature=0.5, max_wait=30)
    messages = [{"role": "user", "content": "old"}]
    lm.circuit.force_open("for a moment", seconds=1)
    call = asyncio.ensure_future(lm.acall(messages=messages))
    await asyncio.sleep(0.2)  # it waits for the circuit
    assert not call.done()
    assert provider.requests == []
    if change == "messages":
        messages[0]["content"] = "new"
    else:
        lm.kwargs["temperature"] = 0.9
    assert await call == ["old at 0.5"]
    later = await lm.acall(messages=messages)
    assert later == (["new at 0.5"] if change == "messages" else ["old at 0.9"])
