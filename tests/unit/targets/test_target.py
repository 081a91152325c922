"""How many tokens a call reserves before anybody knows."""

from __future__ import annotations

import pytest
from dspy.lm15 import Config, Message, Request

from dspy_resilient import ResilientLM


def estimate(prompt=None, *, messages=None, model="openai/m", settings=None, **kwargs):
    lm = ResilientLM(model, **(settings or {}))
    call = lm._begin("__call__", prompt, messages, kwargs)
    return call.targets[0].estimate(call)


def test_four_characters_are_a_token_and_an_answer_has_256():
    assert estimate("x" * 400) == 100 + 256


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_takes_what_it_may_take(name):
    """The call's own setting counts, else the client's."""
    assert estimate("x" * 400, **{name: 50}) == 150
    assert estimate("x" * 400, settings={name: 70}) == 170
    assert estimate("x" * 400, settings={"max_tokens": 70}, max_tokens=50) == 150


def test_a_typed_request_says_it_itself():
    request = Request("openai/m", (Message.user("x" * 400),), config=Config(max_tokens=5000))
    assert 5100 <= estimate(request) < 5400


@pytest.mark.filterwarnings("ignore:messages= dictionaries:DeprecationWarning")
def test_an_image_counts_for_what_it_costs_and_not_for_its_bytes():
    """A megabyte in base64 would hold up everybody else until the answer is there."""
    image = "data:image/png;base64," + "iVBORw0KGgo+/" * 80_000
    parts = [{"type": "text", "text": "x" * 400}]
    parts.append({"type": "image_url", "image_url": {"url": image}})
    assert 1350 <= estimate(messages=[{"role": "user", "content": parts}]) < 1450
