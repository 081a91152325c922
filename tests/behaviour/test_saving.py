"""What a copy shares, what a save keeps, and what neither does."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings

import cloudpickle
import dspy
import pytest

from dspy_resilient import (
    CachePolicy,
    CircuitBreaker,
    CircuitOpenError,
    CircuitPolicy,
    ClientClosedError,
    LimitPolicy,
    ResilientLM,
    RetryPolicy,
)
from dspy_resilient.testing import Provider, dspy_answers

KEY = "dummy-key-for-tests"
COPIES = {
    "copy()": lambda lm: lm.copy(),
    "copy(settings)": lambda lm: lm.copy(temperature=0.5),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "inside a module": lambda lm: holding(lm).deepcopy().lm,
    "inside a structure": lambda lm: copy.deepcopy({"lm": [lm]})["lm"][0],
}
SAVES = {
    "pickle": lambda lm: pickle.loads(pickle.dumps(lm)),
    "cloudpickle": lambda lm: pickle.loads(cloudpickle.dumps(lm)),
    "state": lambda lm: ResilientLM.load_state(as_json(lm.dump_state())),
    "dspy": lambda lm: dspy.BaseLM.load_state(as_json(lm.dump_state()), allow_custom_lm_class=True),
}


def as_json(state):
    return json.loads(json.dumps(state))


def holding(lm, signature="question -> answer"):
    predict = dspy.Predict(signature)
    predict.lm = lm
    return predict


@pytest.fixture(params=COPIES)
def twin_of(request):
    """Make a copy, in each of the ways there are."""
    return COPIES[request.param]


@pytest.fixture(params=SAVES)
def rebuilt(request):
    """Save and load, in each of the ways there are."""
    return SAVES[request.param]


# Copies are the same client.


def test_a_copy_is_the_same_client(make, twin_of):
    """Circuit, cache, limits, numbers and name are one."""
    lm = make(name="fast", limits=2)
    twin = twin_of(lm)
    assert type(twin) is ResilientLM
    assert twin is not lm
    assert twin.circuit is lm.circuit
    assert twin.name == "fast"
    lm("q", temperature=0.5)
    assert twin.stats() == lm.stats()


def test_a_copy_shares_the_cache_and_the_open_circuit(provider, make, twin_of):
    """What one has asked the other need not; what one has tripped the other finds open."""
    lm = make(max_wait=0, temperature=0.5)
    twin = twin_of(lm)
    assert lm("q") == twin("q") == ["Paris"]
    assert provider.count == 1
    twin.circuit.force_open()
    with pytest.raises(CircuitOpenError):
        lm("other")


def test_a_copy_keeps_the_credentials(provider, make, twin_of):
    """A rollout is the same client, so it may ask."""
    lm = make(api_key="sk-mine", extra_headers={"X-Api-Key": "also-mine"})
    twin_of(lm)("q")
    headers = provider.requests[-1].headers
    assert headers["authorization"] == "Bearer sk-mine"
    assert headers["x-api-key"] == "also-mine"


def test_closing_one_closes_all(make, twin_of):
    """A closed client is closed for its copies too."""
    lm = make()
    twin_of(lm).close()
    with pytest.raises(ClientClosedError):
        lm("q")


@pytest.mark.parametrize("way", sorted(COPIES.keys() - {"copy.copy"}))
def test_a_copy_has_its_own_settings_history_and_callbacks(make, way):
    """What dspy.LM isolates in a copy is isolated."""
    lm = make(callbacks=[])
    twin = COPIES[way](lm)
    twin.kwargs["temperature"] = 0.9
    twin.callbacks.append("mine")
    twin.history.append("mine")
    assert lm.kwargs["temperature"] != 0.9
    assert lm.callbacks == []
    assert lm.history == []


def test_the_history_of_a_copy_is_its_own(make):
    """A call is recorded where it was made."""
    lm = make()
    one, two = lm.copy(), copy.deepcopy(lm)
    one("a"), two("b"), lm("c")
    assert [[e["prompt"] for e in each.history] for each in (lm, one, two)] == [["c"], ["a"], ["b"]]


def test_a_deepcopy_keeps_identity_within_a_structure(make):
    """One client that occurs twice is one client in the copy too."""
    lm = make()
    one, two = copy.deepcopy([lm, lm])
    assert one is two


def test_a_rollout_has_answers_of_its_own(provider, make):
    """copy(rollout_id=, temperature=) asks again, once, on the same circuit."""
    lm = make()
    rollouts = [lm.copy(rollout_id=n, temperature=1.0) for n in (1, 2, 1)]
    for rollout in rollouts:
        rollout("q")
    assert provider.count == 2
    assert len({id(each.circuit) for each in rollouts}) == 1


def test_a_copy_for_another_model_has_a_circuit_of_its_own(provider, make):
    """copy(model=) is the same client at another place."""
    lm = make(max_wait=0)
    other = lm.copy(model="openai/other")
    lm.circuit.force_open()
    assert other("q") == ["Paris"]
    assert provider.requests[-1].body["model"] == "other"
    assert other.circuit is not lm.circuit
    assert other.stats().calls == lm.stats().calls == 1


def test_a_copy_may_have_its_own_patience_retries_deadline_and_cache_flag(provider, make):
    """What is no property of the client can be given to a copy."""
    lm = make()
    twin = lm.copy(num_retries=0, max_wait=0, deadline=5.0, cache=False)
    assert (twin.num_retries, twin.max_wait, twin.deadline, twin.cache) == (0, 0, 5.0, False)
    assert (lm.num_retries, lm.max_wait, lm.deadline, lm.cache) == (3, 60.0, None, True)
    twin("q"), twin("q")
    assert provider.count == 2


def test_settings_of_a_copy_reach_its_fallbacks(provider, make, ask):
    """A copy's setting means what the same setting on a call means: every target hears it."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/b", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=[backup], num_retries=0)
        provider.down("500")
        for rollout in (1, 2, 1):
            ask(lm.copy(rollout_id=rollout, temperature=1.0), "q")
        assert second.count == 2
        assert [each.body["temperature"] for each in second.requests] == [1.0, 1.0]
        assert "temperature" not in backup.kwargs or backup.kwargs["temperature"] is None
        assert second.requests[0].headers["authorization"] == "Bearer k"


def test_credentials_of_a_copy_stay_with_its_provider(provider, make):
    """copy(api_key=) is for the primary and what inherits from it, nobody else."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/b", api_base=second.api_base, api_key="k", engine="litellm")
        lm = make(fallbacks=["openai/same", backup], num_retries=0).copy(api_key="sk-new")
        provider.down("500")
        lm("q")
        assert [each.headers["authorization"] for each in provider.requests] == [
            "Bearer sk-new"
        ] * 2
        assert second.requests[0].headers["authorization"] == "Bearer k"


def test_a_copy_that_asks_its_own_fallback_asks_it_once(make):
    """copy(model=) never fails because of the fallbacks that it leaves behind."""
    lm = make(fallbacks=["openai/b", "openai/c"])
    assert list(make(fallbacks=["openai/b"]).copy(model="openai/b").circuits) == [
        next(iter(lm.copy(model="openai/b").circuits))
    ]
    assert len(lm.circuits) == 3


def test_a_copy_of_a_copy_is_still_the_client(make):
    """However often."""
    lm = make(fallbacks=["openai/b"])
    far = copy.deepcopy(copy.deepcopy(lm.copy(temperature=0.1)).copy(max_wait=1).copy())
    assert far.circuit is lm.circuit
    assert far.kwargs["temperature"] == 0.1
    assert far.circuits == lm.circuits


def test_a_new_client_is_isolated(provider, make):
    """The same arguments again are another client."""
    one, two = make(max_wait=0), make(max_wait=0)
    one("q")
    one.circuit.force_open()
    assert two("q") == ["Paris"]
    assert provider.count == 2
    assert (one.stats().calls, two.stats().calls) == (1, 1)
    one.close()
    two("other")


def test_best_of_n_runs_on_one_client(make):
    """DSPy's rollouts share circuit and cache, and ask each once."""
    with Provider(dspy_answers({"q": "no"})) as provider:
        lm = make(api_base=provider.api_base)
        best = dspy.BestOfN(dspy.Predict("question -> answer"), 3, lambda args, pred: 0.0, 1.0)
        with dspy.context(lm=lm):
            assert best(question="q").answer == "no"
            assert provider.count == 3
            best(question="q")
        assert provider.count == 3
        assert lm.stats().hits == 3


def test_an_optimizer_compiles_on_one_client(make):
    """Copies that an optimizer makes are the same client."""
    examples = [dspy.Example(question=q, answer="yes").with_inputs("question") for q in "ab"]
    with Provider(dspy_answers({"a": "yes", "b": "yes"})) as provider:
        lm = make(api_base=provider.api_base)
        optimizer = dspy.BootstrapFewShot(metric=lambda e, p, trace=None: e.answer == p.answer)
        with dspy.context(lm=lm):
            compiled = optimizer.compile(dspy.Predict("question -> answer"), trainset=examples)
        assert len(compiled.demos) == 2
        assert lm.stats().attempts == provider.count == 2


def test_reset_copies_and_set_lm_work(make):
    """What DSPy does to modules works with the client in them."""
    lm = make()
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    assert program.deepcopy().get_lm().circuit is lm.circuit
    assert program.reset_copy().predict.lm is None


# Saves rebuild an empty client of the same policies.

FULL = {
    "name": "fast",
    "cache": CachePolicy(max_entries=7, ttl=60.0, stale_if_error=5.0, disk=None, tenant="team-a"),
    "circuit": CircuitPolicy(failure_threshold=2, recovery_time=0.5, mode="observe"),
    "retry": RetryPolicy(max_attempts=2, base=0.0, jitter=0.5),
    "limits": LimitPolicy(max_concurrent=3, rpm=600.0, adaptive=True),
    "max_wait": 0.5,
    "deadline": 30.0,
}


def test_a_rebuilt_client_has_the_same_policies_and_nothing_else(provider, make, rebuilt):
    """Policies survive; answers, numbers and an open circuit do not."""
    lm = make(**FULL)
    lm("q")
    lm.circuit.force_open()
    new = rebuilt(lm)
    assert type(new) is ResilientLM
    options = new._runtime.options
    assert {
        name: getattr(options, name) for name in ("name", "cache", "circuit", "retry", "limits")
    }
    assert (options.name, options.cache, options.circuit) == (
        "fast",
        FULL["cache"],
        FULL["circuit"],
    )
    assert (options.retry, options.limits) == (FULL["retry"], FULL["limits"])
    assert (new.max_wait, new.deadline, new.num_retries) == (0.5, 30.0, 1)
    assert new.circuit.state == "closed"
    assert new.stats() == make(**FULL).stats()
    assert new.history == []
    assert new("q") == ["Paris"]
    assert provider.count == 2


@pytest.mark.parametrize("off", [{"circuit": False}, {"cache": False}, {"num_retries": 0}])
def test_what_is_switched_off_stays_off(make, rebuilt, off):
    """False and 0 are settings (section 2)."""
    new = rebuilt(make(**off))
    assert {name: getattr(new, name) or False for name in off} == dict.fromkeys(off, False)
    assert new.circuit is None or "circuit" not in off


def test_settings_of_a_copy_are_saved(make, rebuilt):
    """What a copy has for itself survives."""
    twin = make(fallbacks=["openai/b"]).copy(
        num_retries=7, cache=False, max_wait=0, deadline=9.0, temperature=0.25, rollout_id=4
    )
    new = rebuilt(twin)
    assert (new.num_retries, new.cache, new.max_wait, new.deadline) == (7, False, 0, 9.0)
    assert new.kwargs["temperature"] == 0.25
    assert new.kwargs["rollout_id"] == 4
    assert new._fallbacks.general[0].lm.kwargs["rollout_id"] == 4


SETTINGS = [
    {"temperature": 0.7, "max_tokens": 321, "seed": 3, "stop": ["x"], "top_p": 0.5},
    {"model_type": "text"},
    {"model_type": "responses"},
    {"cache": False},
    {"num_retries": 0},
    {"use_developer_role": True},
    {"engine": "auto"},
    {"engine": "lm15"},
    {"engine": "litellm"},
    {"prompt_cache": dspy.lm15.CacheConfig()},
    {"finetuning_model": "other", "launch_kwargs": {"a": 1}, "train_kwargs": {"epochs": 3}},
    {"organization": "org-1", "api_version": "2024-02-01", "timeout": 9},
    {"extra_headers": {"X-Title": "mine"}, "extra_body": {"top_k": 4}, "metadata": {"a": "b"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"tools": [{"type": "function", "function": {"name": "login", "parameters": {"type": "object",
        "properties": {"password": {"type": "string"}, "token": {"title": "T"}}}}}]},
    {"model": "openai/gpt-5", "temperature": 1.0, "max_tokens": 20000},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_of_dspy_lm_survives(make, rebuilt, settings):
    """State round-trips, and again."""
    lm = make(**settings)
    new = rebuilt(lm)
    assert new.dump_state() == lm.dump_state()
    assert new.kwargs == {n: v for n, v in lm.kwargs.items() if n != "api_key"}
    same = ("model", "model_type", "engine", "cache", "num_retries", "use_developer_role")
    assert [getattr(new, name) for name in same] == [getattr(lm, name) for name in same]
    assert new.finetuning_model == lm.finetuning_model
    assert (new.launch_kwargs, new.train_kwargs) == (lm.launch_kwargs, lm.train_kwargs)


def test_what_a_plain_lm_saves_a_client_saves_too(make, plain):
    """Our state is DSPy's state and one key more."""
    settings = {"temperature": 0.7, "seed": 3, "num_retries": 1}
    ours, theirs = make(**settings).dump_state(), plain(**settings).dump_state()
    assert ours.pop("_dspy_lm_class") == "dspy_resilient.ResilientLM"
    assert theirs.pop("_dspy_lm_class") == "dspy.clients.lm.LM"
    del ours["resilient"]
    assert ours == theirs


def test_state_of_a_plain_lm_loads(provider, plain):
    """So does one without a class, or without our key."""
    state = plain(temperature=0.7, num_retries=1, cache=False).dump_state()
    for old in (state, {k: v for k, v in state.items() if k != "_dspy_lm_class"}):
        lm = ResilientLM.load_state(as_json(old))
        assert (lm.kwargs["temperature"], lm.num_retries, lm.cache) == (0.7, 1, False)
        assert lm._runtime.options.retry == RetryPolicy(max_attempts=2)
        assert lm("q") == ["Paris"]


def test_loading_changes_no_state(make):
    """A state can be loaded twice."""
    state = make(**FULL, fallbacks=["openai/b", dspy.LM("openai/c")]).dump_state()
    before = copy.deepcopy(state)
    ResilientLM.load_state(state)
    assert state == before


@pytest.mark.parametrize("given", ["name", "lm", "dict", "client", "chain"])
def test_fallbacks_survive_in_whatever_form(provider, make, rebuilt, given):
    """Strings, dspy.LMs, dicts, and clients with fallbacks of their own."""
    with Provider("Lyon") as second:
        settings = {"model": "openai/b", "api_base": second.api_base, "temperature": 0.3}
        inner = ResilientLM(**settings, name="inner", circuit=CircuitPolicy(failure_threshold=1))
        fallback, count = {
            "name": ("openai/b", 2),
            "lm": (dspy.LM(**settings, engine="litellm", num_retries=1), 2),
            "dict": (settings, 2),
            "client": (inner, 2),
            "chain": (ResilientLM("openai/c", fallbacks=[inner, "openai/d"]), 4),
        }[given]
        lm = make(fallbacks=[fallback], num_retries=0)
        new = rebuilt(rebuilt(lm))
        assert list(new.circuits) == list(lm.circuits)
        assert len(new.circuits) == count
        assert [t.lm.kwargs.get("temperature") for t in new._fallbacks.all()] == [
            t.lm.kwargs.get("temperature") for t in lm._fallbacks.all()
        ]
        provider.down("500")
        if given == "name":
            with pytest.raises(dspy.LMError):
                new("q")
            assert [each.body["model"] for each in provider.requests] == ["test", "b"]
        elif given != "chain":
            assert new("q") == ["Lyon"]


def test_every_list_of_fallbacks_survives(make, rebuilt):
    """So do those kept for prompts too long, or refused."""
    given = {
        "fallbacks": ["openai/b"],
        "context_window_fallbacks": ["openai/long", {"model": "openai/longer", "temperature": 0.3}],
        "policy_fallbacks": [ResilientLM("openai/open", fallbacks=["openai/d"])],
    }
    lm = make(**given)
    new = rebuilt(rebuilt(lm))
    assert list(new.circuits) == list(lm.circuits)
    assert [len(targets) for targets in new._fallbacks.special.values()] == [2, 2]
    assert new.dump_state() == lm.dump_state()


def test_a_shared_circuit_is_saved_as_its_policy(make, rebuilt):
    """What comes back is a circuit of its own."""
    shared = CircuitBreaker(CircuitPolicy(failure_threshold=9))
    new = rebuilt(make(circuit=shared))
    assert new.circuit is not shared
    assert new.circuit.policy == shared.policy


# Hooks cannot be saved; one warning says so.


def test_what_cannot_be_saved_is_named_in_one_warning(make, rebuilt):
    """Callables are left out, and every one is named."""
    lm = make(
        on_event=print,
        cache=CachePolicy(store_if=lambda entry: True),
        logger_fn=lambda entry: None,
    )
    with pytest.warns(UserWarning, match="on_event") as caught:
        new = rebuilt(lm)
    (warning,) = caught
    assert str(warning.message).startswith(
        "ResilientLM 'openai/test': logger_fn and on_event and store_if cannot be saved"
    )
    assert warning.filename in (__file__, cloudpickle.cloudpickle.__file__)
    options = new._runtime.options
    assert (options.on_event, options.cache.store_if) == (None, None)
    assert "logger_fn" not in new.kwargs
    assert new("q") == ["Paris"]


@pytest.mark.parametrize("save", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
def test_callbacks_are_not_pickled_and_named(make, save):
    """They may hold anything, a credential included."""

    class Callback(dspy.utils.callback.BaseCallback):
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.warns(UserWarning, match="callbacks"):
        new = pickle.loads(save(make(callbacks=[Callback()])))
    assert new.callbacks == []


def test_a_save_without_hooks_warns_of_nothing(make, rebuilt):
    """Silence means that everything is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rebuilt(make(**FULL, fallbacks=["openai/b"]))


# Credentials are never saved; the environment has them, or an error names them.


def test_a_rebuilt_client_reads_the_environment(provider, make, rebuilt):
    """OPENAI_API_KEY takes the place of what was left out."""
    rebuilt(make(api_key="sk-explicit"))("q")
    assert provider.requests[-1].headers["authorization"] == f"Bearer {KEY}"


def test_a_rebuilt_client_names_what_it_misses(provider, make, rebuilt, monkeypatch, ask):
    """LMConfigurationError, before anything is sent."""
    new = rebuilt(make(api_key="sk-explicit"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(dspy.LMConfigurationError, match=r"api_key was not saved.*OPENAI_API_KEY"):
        ask(new, "q")
    assert provider.count == 0
    assert "sk-explicit" not in repr(vars(new))


def test_what_is_missing_can_be_given_again(provider, make, rebuilt, monkeypatch):
    """To a call, to a copy, or in the environment later."""
    new = rebuilt(make(api_key="sk-explicit"))
    monkeypatch.delenv("OPENAI_API_KEY")
    new("a", api_key="sk-call")
    new.copy(api_key="sk-copy")("b")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-late")
    new("c")
    assert [each.headers["authorization"] for each in provider.requests] == [
        "Bearer sk-call",
        "Bearer sk-copy",
        "Bearer sk-late",
    ]


def test_what_is_missing_is_still_known_after_another_save(make, rebuilt, monkeypatch):
    """Saved, loaded, saved, loaded."""
    new = rebuilt(rebuilt(make()))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(dspy.LMConfigurationError, match="api_key"):
        new("q")


def test_secret_headers_are_missed_by_name(make, rebuilt):
    """Half a set of headers would be refused somewhere far away."""
    new = rebuilt(make(extra_headers={"Authorization": "Bearer x", "X-Title": "mine"}))
    assert "extra_headers" not in new.kwargs
    with pytest.raises(dspy.LMConfigurationError, match="extra_headers was not saved"):
        new("q")


@pytest.mark.parametrize(
    ("model", "setting", "variable"),
    [
        ("gpt-4o-mini", "api_key", "OPENAI_API_KEY"),
        ("anthropic/x", "api_key", "ANTHROPIC_AUTH_TOKEN"),
        ("gemini/x", "api_key", "GOOGLE_API_KEY"),
        ("huggingface/x", "api_key", "HF_TOKEN"),
        ("together_ai/x", "api_key", "TOGETHER_API_KEY"),
        ("together_ai/x", "api_key", "TOGETHERAI_API_KEY"),
        ("replicate/x", "api_key", "REPLICATE_API_TOKEN"),
        ("perplexity/x", "api_key", "PERPLEXITYAI_API_KEY"),
        ("azure/x", "azure_ad_token", "AZURE_API_KEY"),
        ("mistral/x", "api_key", "MISTRAL_API_KEY"),
        ("openai/x", "api_base", "OPENAI_BASE_URL"),
    ],
)
def test_each_provider_has_its_own_variables(monkeypatch, model, setting, variable):
    """The names are those that LiteLLM reads."""
    from dspy_resilient.lm.saving import check_credentials

    for name in list(os.environ):
        if name.startswith(model.partition("/")[0].upper().partition("_")[0]):
            monkeypatch.delenv(name)
    for name in ("OPENAI_API_KEY", "GOOGLE_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    secret = "https://me:pw@host" if setting == "api_base" else "sk-1"
    new = ResilientLM.load_state(ResilientLM(model, **{setting: secret}).dump_state())
    with pytest.raises(dspy.LMConfigurationError, match=setting):
        check_credentials(new, {})
    monkeypatch.setenv(variable, "there")
    check_credentials(new, {})


@pytest.mark.parametrize("model", ["bedrock/x", "sagemaker/x", "vertex_ai/x"])
def test_whose_library_looks_further_is_left_to_it(model):
    """A role or a profile is as good as a variable; only its library can tell."""
    from dspy_resilient.lm.saving import check_credentials

    lm = ResilientLM(model, aws_secret_access_key="s", vertex_credentials="{}")
    check_credentials(ResilientLM.load_state(lm.dump_state()), {})


def test_a_fallback_that_misses_its_credential_is_no_silent_loss(make, rebuilt, monkeypatch):
    """Better an error now than a fallback that fails when it is needed."""
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    for fallback in (
        dspy.LM("mistral/x", api_key="k", engine="litellm"),
        {"model": "mistral/x", "api_key": "k"},
        ResilientLM("mistral/x", api_key="k"),
    ):
        new = rebuilt(rebuilt(make(fallbacks=[fallback])))
        with pytest.raises(dspy.LMConfigurationError, match="MISTRAL_API_KEY"):
            new("q")


# DSPy's own doors.


def test_a_program_saved_as_json_needs_the_flag_to_load(provider, make, tmp_path):
    """A custom LM class is loaded on request only, and then it works."""
    file = tmp_path / "program.json"
    holding(make(**FULL, fallbacks=[ResilientLM("openai/b", name="inner")])).save(file)
    program = dspy.Predict("question -> answer")
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        program.load(file)
    program.load(file, allow_unsafe_lm_state=True)
    assert type(program.lm) is ResilientLM
    assert program.lm.name == "fast"
    assert len(program.lm.circuits) == 2
    assert program.lm("q") == ["Paris"]


def test_a_saved_state_names_the_class_by_the_package(make, tmp_path):
    """Files may move inside the package."""
    file = tmp_path / "program.json"
    holding(make()).save(file)
    assert json.loads(file.read_bytes())["lm"]["_dspy_lm_class"] == "dspy_resilient.ResilientLM"


def test_a_fallback_of_another_class_needs_the_flag_too(make):
    """No class is imported because a nested state says so."""
    state = make(fallbacks=[dspy.LM("openai/b")]).dump_state()
    state["resilient"]["fallbacks"][0]["lm"]["_dspy_lm_class"] = "somewhere.Evil"
    with pytest.raises(ValueError, match="Refusing to import"):
        ResilientLM.load_state(state)


def test_a_whole_program_can_be_saved(provider, make, tmp_path):
    """save_program=True pickles the client and brings it back."""
    folder = str(tmp_path / "program")
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(make(**FULL))
    program.save(folder, save_program=True)
    loaded = dspy.load(folder, allow_pickle=True)
    assert loaded.get_lm()("q") == ["Paris"]
    assert loaded.get_lm()._runtime.options == program.get_lm()._runtime.options


# Other processes.


@pytest.fixture(scope="module")
def other_process():
    """A fresh interpreter, as multiprocessing spawns it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda function, *args: pool.apply_async(function, args).get(120)


@pytest.mark.timeout(180)
def test_a_client_works_in_another_process(provider, make, other_process, tmp_path):
    """Pickled here, rebuilt and asked there; what comes back works here."""
    lm = make(**FULL)
    lm("before")
    assert other_process(lm, "q") == ["Paris"]
    assert provider.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert other_process(copy.copy, lm)("q") == ["Paris"]
    holding(lm).save(tmp_path / "program.json")
    assert json.loads((tmp_path / "program.json").read_bytes())["lm"]["model"] == "openai/test"


@pytest.mark.timeout(180)
def test_an_error_comes_back_from_another_process(make, other_process, monkeypatch):
    """A missing credential is named across processes too."""
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    with pytest.raises(dspy.LMConfigurationError, match="api_key was not saved"):
        other_process(make(model="mistral/x"), "q")


def forked(body, seconds=60):
    """Run `body` in a forked child; return its exit status: 0 if it returned True."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(seconds)  # a child that hangs is killed by it
            status = 0 if body() is True else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@needs_fork
@ignore_fork_warning
@pytest.mark.timeout(180)
def test_a_forked_child_goes_on_with_the_client(provider, make):
    """Answers and circuits are there, new calls work, and the parent notices nothing."""
    lm = make(name="fast", max_wait=0, fallbacks=["openai/b"])
    lm("q")
    sent = provider.count
    assert forked(lambda: lm("q") == ["Paris"] and lm.stats().hits == 1) == 0
    assert provider.count == sent
    assert forked(lambda: lm("new in the child") == ["Paris"]) == 0
    assert lm("new in the parent") == ["Paris"]
    assert lm.stats().hits == 0


@needs_fork
@ignore_fork_warning
@pytest.mark.timeout(180)
def test_a_fork_while_threads_are_calling_hangs_nobody(provider, make):
    """No lock that another thread held at the fork is held in the child for ever."""
    heard = []

    def listen(event):
        heard.append(event)
        time.sleep(0.0001)  # so that a fork finds a delivery under way

    lm = make(on_event=listen)
    lm("q")
    stop = threading.Event()

    def call():
        while not stop.is_set():
            lm("q")
            lm.stats()

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()

    def body():
        before = len(heard)
        lm("q")
        return lm.stats().hits > 0 and len(heard) > before and lm.explain() != ""

    try:
        assert [forked(body, seconds=10) for _ in range(15)] == [0] * 15
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


@needs_fork
@ignore_fork_warning
@pytest.mark.timeout(180)
def test_a_child_does_not_wait_for_a_call_of_its_parent(provider, make):
    """A flight that the parent leads does not exist in the child."""
    from dspy_resilient.testing import Hold

    lm = make()
    lm("warm")
    hold = Hold()
    provider.script(hold)
    leader = threading.Thread(target=lambda: lm("q"), daemon=True)
    leader.start()
    provider.wait_for(2)
    try:
        assert forked(lambda: lm("q") == ["Paris"]) == 0
    finally:
        hold.release()
        leader.join(20)
    assert provider.count == 3


@pytest.mark.parametrize(
    ("model", "settings", "advice"),
    [
        ("openai/m", {"api_key": "k"}, "set OPENAI_API_KEY in the environment, or pass it again"),
        ("together_ai/m", {"api_key": "k"}, "set TOGETHERAI_API_KEY in the environment"),
        ("made_up/m", {"api_key": "k"}, "credential; pass api_key again"),
        ("openai/m", {"extra_headers": {"authorization": "s"}}, "credential; pass extra_headers"),
        ("azure/m", {"azure_ad_token": "t"}, "set AZURE_AD_TOKEN in the environment"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_advice_about_a_lost_credential_names_only_what_helps(monkeypatch, model, settings, advice):
    """A variable if LiteLLM reads it; headers and the like have to be passed again."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_TOKEN")):
            monkeypatch.delenv(name)
    with (
        ResilientLM(model, **settings) as lm,
        pickle.loads(pickle.dumps(lm)) as rebuilt,
        pytest.raises(dspy.LMConfigurationError) as caught,
    ):
        rebuilt("q")
    assert advice in str(caught.value)
