"""`dspy.LM = ResilientLM`: a whole program, and what builds LMs for itself, switched over in a line."""

from __future__ import annotations

import asyncio

import dspy
import pytest
from dspy.clients.lm import LM

from dspy_resilient import Clients, ResilientLM
from dspy_resilient.testing import Status, dspy_answers


@pytest.fixture(autouse=True)
def _switched(monkeypatch):
    monkeypatch.setattr(dspy, "LM", ResilientLM)


@pytest.fixture
def lm(provider):
    """What a program that knows nothing of us builds."""
    with dspy.LM("openai/test", api_base=provider.api_base, api_key="k") as made:
        yield made


def test_a_program_runs_on_resilient_clients(provider, lm):
    """Programs, copies, streams and fallbacks, sync and async."""
    provider.answer = dspy_answers({"Capital of France?": "Paris", "Capital of Peru?": "Lima"})
    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=lm):
        assert program(question="Capital of France?").answer == "Paris"
        assert program(question="Capital of France?").answer == "Paris"
        assert asyncio.run(program.acall(question="Capital of Peru?")).answer == "Lima"
    assert lm.copy(rollout_id=1, temperature=1.0)("q")
    assert lm.stats().hits == 1
    assert len(provider.requests) == 3


@pytest.mark.parametrize("fallback", ["openai/other", {"model": "openai/other"}])
def test_fallbacks_are_plain(provider, fallback):
    """Each is an LM of DSPy's, not a client within a client, and its attempts are DSPy's own."""
    endpoint = {"api_base": provider.api_base, "api_key": "k"}
    if isinstance(fallback, dict):
        fallback = {**fallback, **endpoint}
    with dspy.LM("openai/test", fallbacks=[fallback], num_retries=0, **endpoint) as lm:
        provider.script(Status(500))
        assert lm("q") == ["Paris"]
        assert type(lm._fallbacks.general[0].lm) is LM


def test_a_reasoning_model_is_known_without_a_client_for_it(provider):
    """What DSPy knows of models is asked of DSPy."""
    with dspy.LM("openai/test", temperature=0.5, fallbacks=["openai/o3-mini"]) as lm:
        assert lm._fallbacks.general[0].lm.kwargs["temperature"] is None


def test_saved_programs_and_named_clients(tmp_path, provider, lm):
    """Saving names our class; loading builds it; `Clients` goes on as before."""
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program.save(tmp_path / "program.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert type(loaded.lm) is ResilientLM
    loaded.lm.close()
    with Clients() as clients:
        clients.start("a", "openai/test", api_base=provider.api_base, api_key="k")
        assert clients.request("a", "q") == ["Paris"]


def test_what_a_program_saved_with_plain_lms_loads(tmp_path, provider):
    """DSPy restores the class that it has put down."""
    program = dspy.Predict("question -> answer")
    program.set_lm(LM("openai/test", api_base=provider.api_base, api_key="k"))
    program.save(tmp_path / "program.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert type(loaded.lm) is LM


@pytest.mark.parametrize("name", ["forward", "aforward"])
def test_a_subclass_with_a_method_that_is_never_called_is_refused(name):
    """When it is defined, with what to override instead; also where a mix-in brings it along."""
    mixin = type("Mixin", (), {name: lambda self, **kwargs: None})
    for bases, own in (((ResilientLM,), {name: lambda self: None}), ((mixin, ResilientLM), {})):
        with pytest.raises(TypeError, match=rf"Mine overrides {name}.* __call__ and acall"):
            type("Mine", bases, own)


def test_a_subclass_that_overrides_the_call_is_asked(provider):
    """By programs too."""

    class Shouting(ResilientLM):
        def __call__(self, prompt=None, **kwargs):
            return [each.upper() for each in super().__call__(prompt, **kwargs)]

    with Shouting("openai/test", api_base=provider.api_base, api_key="k") as lm:
        assert lm("q") == ["PARIS"]


def test_a_forward_set_on_one_client_is_called_as_dspy_does(provider, lm):
    """DSPy 3.4 honours it, with its own warning."""
    if not hasattr(LM, "aforward"):
        pytest.skip("gone from DSPy")
    lm.forward = lambda prompt=None, messages=None, **kwargs: LM.forward(lm, "other", **kwargs)
    with pytest.warns(DeprecationWarning, match="forward"):
        assert lm("q") == ["Paris"]
    assert provider.requests[0].body["messages"][0]["content"] == "other"
