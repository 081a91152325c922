"""What code can see of a `ResilientLM` itself: signature, attributes, capabilities, warnings."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
import warnings

import dspy
import pytest

from dspy_resilient import ResilientLM
from dspy_resilient.testing import Provider

MODELS = [
    "openai/gpt-4o-mini",
    "openai/gpt-5",
    "anthropic/claude-haiku-4-5",
    "gemini/gemini-2.0-flash",
    "ollama_chat/llama3",
    "unheard/of",
    "bare",
]
OTHERS = {
    "temperature": 0.5,
    "max_tokens": 20_000,
    "num_retries": 1,
    "provider": dspy.Provider(),
    "finetuning_model": "openai/base",
    "launch_kwargs": {"a": 1},
    "train_kwargs": {"b": 2},
    "use_developer_role": True,
    "seed": 3,
}


def visible(lm):
    """Return the public attributes that `dspy.LM` has, as plain data."""
    names = [name for name in dir(dspy.LM("openai/x")) if not name.startswith("_")]
    values = {name: getattr(lm, name) for name in names}
    return {name: value for name, value in values.items() if not callable(value)}


def test_every_parameter_is_there():
    """Each parameter of dspy.LM has its name, place and kind here; ours are keyword-only.

    Wanted difference: `engine` is "litellm" where dspy.LM has "auto", or "auto" if need be.
    """
    theirs = list(inspect.signature(dspy.LM).parameters.values())
    ours = list(inspect.signature(ResilientLM).parameters.values())
    shared = ours[: len(theirs) - 1]
    assert [(p.name, p.kind) for p in shared] == [(p.name, p.kind) for p in theirs[:-1]]
    differing = {p.name for p, q in zip(shared, theirs[:-1], strict=True) if p.default != q.default}
    assert differing == {"engine"}
    extra = ours[len(theirs) - 1 : -1]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra)
    assert ours[-1].kind is theirs[-1].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("method", ["__call__", "acall", "copy", "dump_state", "load_state"])
def test_every_method_takes_the_same(method):
    """Names and kinds of the parameters; a callback sees the same inputs."""
    theirs, ours = (inspect.signature(getattr(kind, method)) for kind in (dspy.LM, ResilientLM))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("model", MODELS)
def test_attributes_and_capabilities(model):
    """Everything that dspy.LM shows has the same value."""
    theirs = dspy.LM(model, engine="litellm", **OTHERS | {"temperature": 1.0})
    with ResilientLM(model, **OTHERS | {"temperature": 1.0}) as ours:
        assert visible(ours) == visible(theirs)
        assert visible(ours.copy(temperature=0.1, rollout_id=4)) == visible(
            theirs.copy(temperature=0.1, rollout_id=4)
        )


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
def test_positional_arguments(model_type):
    """All of them may be given by position, up to the last."""
    given = (
        "openai/x",
        model_type,
        0.3,
        99,
        False,
        [],
        2,
        dspy.Provider(),
        "openai/f",
        {},
        {},
        True,
    )
    theirs = dspy.LM(*given, "litellm", None, None)
    ours = ResilientLM(*given, "litellm", None, None)
    assert visible(ours) == visible(theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": "openai/"},
        {"model": "openai/x", "num_retries": -1},
        {"model": "openai/x", "engine": "best"},
        {"model": "openai/x", "engine": 3.5},
        {"model": "openai/x", "async_engine": 3.5},
        {"model": "openai/x", "prompt_cache": "yes", "engine": "auto"},
        {"model": "openai/gpt-5", "temperature": 0.2},
        {"model": "openai/gpt-5", "max_tokens": 10},
    ],
    ids=str,
)
def test_what_the_constructor_refuses(wrong):
    """An error of the same class; the text is dspy.LM's but where we name the range (section 2)."""
    with pytest.raises((ValueError, TypeError, dspy.LMError)) as theirs:
        dspy.LM(**wrong)
    with pytest.raises(type(theirs.value)) as ours:
        ResilientLM(**wrong)
    if "num_retries" not in wrong:
        assert str(ours.value) == str(theirs.value)


def test_finetuning():
    """`finetune` and `reinforce` say the same where the provider cannot."""
    for method, arguments in [("finetune", ([], None)), ("reinforce", ({},))]:
        with pytest.raises(dspy.LMUnsupportedFeatureError) as theirs:
            getattr(dspy.LM("some/model"), method)(*arguments)
        with pytest.raises(dspy.LMUnsupportedFeatureError) as ours:
            getattr(ResilientLM("some/model"), method)(*arguments)
        assert str(ours.value).split(" object at ")[0] == str(theirs.value).split(" object at ")[0]


def test_a_finetuned_model_is_the_same_client():
    """The job's result is a copy with the new model."""

    class Quick(dspy.Provider):
        def __init__(self):
            super().__init__()
            self.finetunable = True

        @staticmethod
        def finetune(job, model, train_data, train_data_format, train_kwargs=None):
            return f"{model}-tuned"

    def tuned(kind, **options):
        lm = kind("some/model", provider=Quick(), **options)
        result = lm.finetune([{"messages": []}], None).result()
        return type(result), result.model, result.kwargs

    assert tuned(ResilientLM)[1:] == tuned(dspy.LM, engine="litellm")[1:]
    assert tuned(ResilientLM)[0] is ResilientLM


def test_settings_may_be_changed_after_construction(compare, call):
    """`lm.kwargs`, `lm.model`, `lm.cache`, `lm.callbacks` and `lm.num_retries` are read per call."""

    def scenario(lm):
        call(lm, "q")
        lm.kwargs["temperature"] = 0.25
        call(lm, "q")
        lm.kwargs["headers"] = {"x-mine": "1"}
        lm.model = "openai/gpt-4o"
        call(lm, "q")
        lm.callbacks.append(dspy.utils.callback.BaseCallback())
        lm.history = []
        call(lm, "another")
        return len(lm.history)

    theirs, _ = compare(scenario)
    assert theirs.result == 1
    assert [each["body"].get("temperature") for each in theirs.requests] == [None, 0.25, 0.25, 0.25]


def test_launching_a_local_server_changes_the_address(compare, call):
    """`launch` and `kill` belong to the provider, which may set `api_base`."""

    class Local(dspy.Provider):
        @staticmethod
        def launch(lm, launch_kwargs=None):
            lm.kwargs["seed"] = 5

        @staticmethod
        def kill(lm, launch_kwargs=None):
            lm.kwargs.pop("seed")

    def scenario(lm):
        lm.launch()
        call(lm, "q")
        lm.kill()
        call(lm, "q")

    theirs, _ = compare(scenario, provider=Local())
    assert [each["body"].get("seed") for each in theirs.requests] == [5, None]


# Warnings


def _warned(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [(w.category, w.filename) for w in caught]


@pytest.mark.skipif(hasattr(dspy.LM, "generate"), reason="DSPy 3.5 takes no messages=")
@pytest.mark.parametrize("how", ["sync", "async", "positional prompt too"])
def test_deprecated_messages_warn_at_the_users_line(compare, on_a_loop, how):
    """The same category, attributed to the caller's file; the words are our own."""
    messages = [{"role": "user", "content": "q"}]

    def scenario(lm):
        async def asked():
            return await lm.acall(messages=messages)

        acts = {
            "sync": lambda: lm(messages=messages),
            "async": lambda: on_a_loop(asked()),
            "positional prompt too": lambda: lm("q", messages=messages),
        }
        return _warned(acts[how])

    theirs, _ = compare(scenario)
    ((category, file),) = theirs.result
    assert category[0] == "DeprecationWarning"
    assert file == __file__


def test_programs_do_not_warn(compare, call):
    """An adapter's own messages= call is not the user's."""

    def scenario(lm):
        return _warned(lambda: call(dspy.Predict("question -> answer"), question="q"))

    theirs, _ = compare(scenario, answer="[[ ## answer ## ]]\nA")
    assert theirs.result == []


def test_a_rollout_at_temperature_zero_warns(compare, call):
    """As dspy.LM does, which counts how often on each object; a request of ours is a new one."""

    def scenario(lm):
        def act():
            call(lm, "a", temperature=0, rollout_id=1)
            call(lm, "b", temperature=0, rollout_id=2)
            call(lm.copy(temperature=0, rollout_id=3), "c")

        return {category for category, _ in _warned(act)}

    theirs, _ = compare(scenario)
    assert len(theirs.result) == 1


# Calls that DSPy may make one day


_NEXT_DSPY = """
import dspy
from dspy.utils.callback import with_callbacks


@with_callbacks
def generate(self, request, *, n=1, cache=None, rollout_id=None):
    self.update_history  # recorded by the calls below
    plain = dspy.LM.__call__.__wrapped__
    return [plain(self, request, cache=cache, rollout_id=rollout_id) for _ in range(n)]


@with_callbacks
async def agenerate(self, request, *, n=1, cache=None, rollout_id=None):
    plain = dspy.LM.acall.__wrapped__
    return [await plain(self, request, cache=cache, rollout_id=rollout_id) for _ in range(n)]


dspy.LM.generate, dspy.LM.agenerate = generate, agenerate
"""

_UNDER_NEXT_DSPY = """
import asyncio, sys, warnings
from dspy.lm15 import Message, Request
from dspy_resilient import CircuitOpenError, ResilientLM
from dspy_resilient.testing import Provider, Status

warnings.filterwarnings("error", module="dspy_resilient")
MODEL = "openai/gpt-4o-mini"


def request(text):
    return Request(model=MODEL, messages=(Message.user(text),))


with Provider("Paris") as provider:
    lm = ResilientLM(MODEL, api_base=provider.api_base, api_key="k", max_wait=0)
    told = []

    class Told(dspy.utils.callback.BaseCallback):
        def on_lm_start(self, call_id, instance, inputs):
            told.append(inputs)

    with dspy.context(callbacks=[Told()]):
        (first,) = lm.generate(request("q"))
        (second,) = asyncio.run(lm.agenerate(request("q")))
    assert first.text == second.text == "Paris"
    assert provider.count == 1, provider.count
    assert lm.history[-1]["cache_hit"] is True
    assert told == [{"request": request("q"), "n": 1, "cache": None, "rollout_id": None}] * 2, told

    assert len(lm.generate(request("q"), n=2)) == 2
    assert lm(request("q")).text == "Paris"  # one Response, not a list of them
    provider.script(Status(500))
    assert lm.generate(request("again"))[0].text == "Paris"
    assert len(lm.history[-1]["attempts"]) == 2
    lm.circuit.force_open()
    try:
        lm.generate(request("new"))
    except CircuitOpenError:
        print("fine")
"""


def _python(code):
    """Run `code` in a process of its own and return what it printed."""
    done = subprocess.run(  # our own interpreter and code
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_call_methods_of_dspy_3_5_are_wrapped():
    """`generate` and `agenerate`, where DSPy has them, have cache, retries and circuit."""
    assert _python(_NEXT_DSPY + _UNDER_NEXT_DSPY) == "fine"


def test_a_call_past_us_warns_once(compare):
    """An entry that arrives by a way we do not wrap is recorded, with one warning."""

    class Next(ResilientLM):
        def speak(self, prompt):
            return dspy.LM.__call__.__wrapped__(self, prompt)

    with Provider("Paris") as provider:
        lm = Next("openai/test", api_base=provider.api_base, api_key="k", cache=False)
        with pytest.warns(UserWarning, match="did not apply to it"):
            assert lm.speak("q") == ["Paris"]
        assert lm.copy().speak("q") == ["Paris"]
        assert len(lm.history) == 1
        assert lm("q") == ["Paris"]


def test_help_shows_what_a_user_can_use():
    """No mark of ours without a meaning, and no method that is there for other modules only."""
    text = pydoc.render_doc(ResilientLM, renderer=pydoc.plaintext)
    assert "<object" not in text
    ours = {
        name
        for kind in ResilientLM.__mro__
        if kind.__module__.startswith("dspy_resilient")
        for name, value in vars(kind).items()
        if not name.startswith("_") and not isinstance(value, (int, str))
    }
    assert ours - set(dir(dspy.LM)) == {
        *("name", "cache_policy", "circuit", "circuits", "stats", "explain", "health"),
        *("budget", "clear_cache", "reset", "restart"),
    }
