"""Settings made for one model and a fallback that does not take them."""

from __future__ import annotations

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from dspy_resilient.targets.reasoning_models import fit, fit_config, is_reasoning
from dspy_resilient.testing import Status

REASONING = ["openai/o1", "openai/o3-mini", "openai/gpt-5", "openai/gpt-5-mini", "azure/gpt-5.1"]
OTHERS = ["openai/gpt-4o-mini", "openai/gpt-5-chat", "anthropic/claude-haiku-4-5", "groq/llama"]


def sent(request):
    """What of a request's body is about temperature and length."""
    names = ("temperature", "max_tokens", "max_completion_tokens")
    return {name: request.body[name] for name in names if name in request.body}


def test_dspy_says_which_models_these_are():
    """No list of our own to fall behind."""
    assert [is_reasoning(model) for model in REASONING] == [True] * len(REASONING)
    assert [is_reasoning(model) for model in OTHERS] == [False] * len(OTHERS)


@pytest.mark.parametrize("model", REASONING)
def test_a_reasoning_model_gets_what_it_takes(model):
    """No temperature but 1, enough tokens or none, and under its own name for them."""
    assert fit(model, {"temperature": 0.2, "seed": 3}) == {"seed": 3}
    assert fit(model, {"temperature": 0, "max_tokens": 500}) == {}
    assert fit(model, {"temperature": 1.0}) == {"temperature": 1.0}
    assert fit(model, {"temperature": None}) == {"temperature": None}
    assert fit(model, {"max_tokens": 20_000}) == {"max_completion_tokens": 20_000}
    assert fit(model, {"max_completion_tokens": 16_000}) == {"max_completion_tokens": 16_000}
    config = Config(temperature=0.2, max_tokens=500, seed=3)
    assert fit_config(model, config) == Config(seed=3)
    assert fit_config(model, Config(temperature=1.0, max_tokens=20_000)) == Config(
        temperature=1.0, max_tokens=20_000
    )


@pytest.mark.parametrize("model", OTHERS)
def test_any_other_model_gets_what_was_set(model):
    """Under the name that every provider knows."""
    settings = {"temperature": 0.2, "max_tokens": 500, "seed": 3}
    assert fit(model, settings) == settings
    assert fit(model, {"max_completion_tokens": 20_000}) == {"max_tokens": 20_000}
    config = Config(temperature=0.2, max_tokens=500)
    assert fit_config(model, config) is config


@pytest.mark.parametrize("given", ["name", "lm"])
def test_a_call_set_for_one_model_is_answered_by_a_reasoning_fallback(provider, make, ask, given):
    """The primary gets what the caller set; the fallback what it takes, and it answers."""
    url = provider.api_base
    fallback = {
        "name": "openai/gpt-5-mini",
        "lm": dspy.LM("openai/gpt-5-mini", engine="litellm", api_base=url, api_key="k"),
    }[given]
    lm = make("openai/gpt-4o-mini", fallbacks=[fallback], temperature=0.7, num_retries=0)
    provider.script(Status(500))
    assert ask(lm, "q", temperature=0.2, max_tokens=500) == ["Paris"]
    first, second = provider.requests
    assert sent(first) == {"temperature": 0.2, "max_tokens": 500}
    assert second.body["model"] == "gpt-5-mini"
    assert sent(second) == {}
    assert lm.history[-1]["model"] == "openai/gpt-5-mini"
    assert ask(lm, "q", temperature=0.2, max_tokens=500) == ["Paris"]


def test_a_typed_request_is_fitted_too(provider, make, ask):
    """The same for dspy.lm15 requests."""
    lm = make("openai/gpt-4o-mini", fallbacks=["openai/gpt-5-mini"], num_retries=0)
    provider.script(Status(500))
    config = Config(temperature=0.2, max_tokens=500)
    response = ask(lm, Request(lm.model, (Message.user("q"),), config=config))
    assert response.text == "Paris"
    first, second = provider.requests
    assert sent(first)["temperature"] == 0.2
    assert sent(second) == {}


def test_the_other_way_round_the_setting_keeps_its_meaning(provider, make, ask):
    """A reasoning primary's max_completion_tokens is any other model's max_tokens."""
    lm = make("openai/gpt-5", fallbacks=["openai/gpt-4o-mini"], max_tokens=20_000, num_retries=0)
    provider.script(Status(500))
    ask(lm, "q", max_completion_tokens=30_000)
    first, second = provider.requests
    assert sent(first) == {"max_completion_tokens": 30_000}
    assert sent(second) == {"max_tokens": 30_000}


def test_a_copys_setting_is_fitted_as_a_calls_is(provider, make, ask):
    """Optimizers set temperatures on copies."""
    gpt5 = dspy.LM("openai/gpt-5", engine="litellm", api_base=provider.api_base, api_key="k")
    lm = make("openai/gpt-4o-mini", fallbacks=[gpt5, "openai/o3-mini"], num_retries=0)
    provider.script(Status(500), Status(500))
    ask(lm.copy(temperature=0.9, rollout_id=1), "q")
    assert [sent(request) for request in provider.requests] == [{"temperature": 0.9}, {}, {}]


@pytest.mark.parametrize("name", ["", None, "mine", "mine/"])
def test_a_name_that_dspy_would_refuse_is_nobody_special(name):
    """An LM class of somebody's own may be called anything."""
    assert is_reasoning(name) is False
    assert fit(name, {"temperature": 0.2}) == {"temperature": 0.2}
