"""A typing mistake in a setting of ours is caught; what is a provider's goes to the provider."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import dspy
import pytest

from dspy_resilient import ResilientLM
from dspy_resilient.targets.keywords import OURS, meant_by

MISTAKES = {
    "max_wiat": "max_wait",
    "maxwait": "max_wait",
    "max_waits": "max_wait",
    "MAX_WAIT": "max_wait",
    "max-wait": "max_wait",
    "dedline": "deadline",
    "deadlien": "deadline",
    "circuti": "circuit",
    "circiut": "circuit",
    "circuit_breaker": "circuit",
    "cache_policy": "cache",
    "limitss": "limits",
    "fallback": "fallbacks",
    "fall_backs": "fallbacks",
    "fallbaks": "fallbacks",
    "context_window_fallback": "context_window_fallbacks",
    "policy_fallback": "policy_fallbacks",
    "on_events": "on_event",
    "onevent": "on_event",
    "shard": "shared",
    "retryy": "retry",
    "nname": "name",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_in_the_constructor_names_the_right_setting(wrong):
    """`max_wiat=900` would have been sent to the provider, and the run have failed after 60 s."""
    with pytest.raises(TypeError, match=rf"{wrong!r}.*{MISTAKES[wrong]!r}"):
        ResilientLM("openai/m", **{wrong: 900})


@pytest.mark.parametrize("wrong", ["max_wiat", "dedline", "fallback"])
def test_a_mistake_in_a_copy_a_call_a_dict_or_an_attribute_too(wrong):
    """Wherever settings are taken, and before anything is sent."""
    lm = ResilientLM("openai/m", api_base="http://127.0.0.1:1", api_key="k")
    for give in (
        lambda: lm.copy(**{wrong: 1}),
        lambda: lm("q", **{wrong: 1}),
        lambda: setattr(lm, wrong, 1),
        lambda: ResilientLM("openai/m", fallbacks=[{"model": "openai/n", wrong: 1}]),
    ):
        with pytest.raises(TypeError, match=MISTAKES[wrong]):
            give()
    assert lm.stats().attempts == 0


def test_what_is_nobodys_name_goes_to_the_provider(provider, ask):
    """As with `dspy.LM`: settings that only a provider knows, under names of any kind."""
    sent = {"seed": 7, "some_new_setting": 1, "waiting": 2, "deal": 3, "min_wait": 4}
    endpoint = {"api_base": provider.api_base, "api_key": "k", "cache": False}
    ask(ResilientLM("openai/m", **endpoint, **sent), "q")
    ask(dspy.LM("openai/m", engine="litellm", **endpoint, **sent), "q")
    ours, plain = (request.body for request in provider.requests)
    assert ours == plain
    assert sent.items() <= ours.items()


def names_of_others():
    """Return every name that LiteLLM's calls, its provider settings and request types take."""
    import litellm
    from litellm.types.utils import all_litellm_params

    root = Path(litellm.__file__).parent
    names = {*all_litellm_params, *inspect.signature(dspy.LM).parameters}
    for function in (
        *(litellm.completion, litellm.text_completion, litellm.responses, litellm.embedding),
        *(litellm.image_generation, litellm.transcription, litellm.rerank, litellm.speech),
        *(litellm.Router.__init__, litellm.get_optional_params, litellm.moderation),
    ):
        names.update(inspect.signature(function).parameters)
    for file in (*(root / "llms").rglob("*.py"), *(root / "types" / "llms").rglob("*.py")):
        for part in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(part, ast.ClassDef) and any(
                ast.unparse(base).endswith(("TypedDict", "BaseModel", "Config"))
                for base in part.bases
            ):
                fields = (each.target for each in part.body if isinstance(each, ast.AnnAssign))
                names.update(each.id for each in fields if isinstance(each, ast.Name))
    return names


def names_of_openai():
    """Return every name that the OpenAI client's calls take."""
    from openai.resources import chat, completions, responses

    calls = (chat.completions.Completions, responses.Responses, completions.Completions)
    return {name for each in calls for name in inspect.signature(each.create).parameters}


@pytest.mark.parametrize("names", [names_of_others, names_of_openai])
def test_no_name_that_a_provider_takes_is_taken_for_a_mistake(names):
    """Against LiteLLM's and OpenAI's own lists, as installed."""
    known = names()
    assert {"temperature", "max_tokens", "stream"} <= known
    assert len(known) > 30
    assert {name: meant_by(name) for name in known if meant_by(name)} == {}


def test_our_own_names_are_no_mistakes():
    """A name is never a mistake for another one."""
    arguments = set(inspect.signature(ResilientLM).parameters)
    assert arguments >= OURS - {"cache_policy"}
    assert [name for name in arguments if meant_by(name)] == []


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_wait", math.nan, ValueError),
        ("max_wait", -1, ValueError),
        ("max_wait", "60", TypeError),
        ("max_wait", None, TypeError),
        ("deadline", 0, ValueError),
        ("deadline", math.inf, ValueError),
        ("num_retries", -1, ValueError),
        ("num_retries", 1.5, TypeError),
        ("cache", "yes", TypeError),
        *((name, 3, AttributeError) for name in sorted(OURS - {"max_wait", "deadline"})),
    ],
)
def test_an_attribute_set_later_is_checked_like_the_argument(name, value, error):
    """`lm.max_wait = nan` is refused where it is written, and changes nothing."""
    lm = ResilientLM("openai/m")
    before = getattr(lm, name, None)
    with pytest.raises(error, match=name):
        setattr(lm, name, value)
    assert getattr(lm, name, None) is before


def test_a_sound_attribute_set_later_holds(provider, ask):
    """What a user may change is changed, for this client and for what is copied from it."""
    lm = ResilientLM("openai/m", api_base=provider.api_base, api_key="k")
    lm.max_wait, lm.deadline, lm.num_retries, lm.cache = 900, 5.0, 0, False
    twin = lm.copy()
    assert (twin.max_wait, twin.deadline, twin.num_retries, twin.cache) == (900, 5.0, 0, False)
    ask(lm, "q")
    ask(lm, "q")
    assert len(provider.requests) == 2
