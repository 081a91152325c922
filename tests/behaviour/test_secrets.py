"""A secret that is put in comes out at the provider and nowhere else.

Every secret and every prompt holds the word MARKED; everything this package writes, shows or says
is searched for it. Two things are DSPy's and not searched: its history entries, which hold prompts
and a call's keywords, and the text of the provider's own exceptions, which leave as they came.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import pickle
import threading
import traceback
import warnings

import circuitbreaker
import cloudpickle
import dspy
import pytest

from dspy_resilient import (
    CachePolicy,
    CircuitPolicy,
    LimitPolicy,
    ResilienceError,
    ResilientLM,
    RetryPolicy,
)
from dspy_resilient.testing import Hang, Provider, Status, rate_limited

MARK = "MARKED"
TENANT = "tenant-of-alice"
PROMPT = f"the {MARK}-prompt"
SERVICE_ACCOUNT = json.dumps({"type": "service_account", "private_key": f"-----{MARK}-pem"})


def secret(where):
    """A secret that no pattern knows by its look."""
    return f"{MARK}{where}0x7f3a91"


def settings_with_secrets(api_base, where):
    return {
        "api_base": api_base.replace("://", f"://user:{secret(where)}@"),
        "api_key": secret(where),
        "headers": {"Authorization": f"Bearer {secret(where)}"},
        "extra_headers": {"X-Api-Key": secret(where), "X-Title": "mine"},
        "extra_query": {"key": secret(where)},
        "extra_body": {"upstream": {"api_key": secret(where)}},
        "azure_ad_token": secret(where),
        "azure_ad_token_provider": lambda: secret(where),
        "aws_access_key_id": secret(where),
        "aws_secret_access_key": secret(where),
        "aws_session_token": secret(where),
        "vertex_credentials": SERVICE_ACCOUNT,
        "organization": "org-harmless",
        "engine": "litellm",
    }


QUOTING = {
    "api key": f"Incorrect API key provided: {secret('quoted')}. You can find yours at",
    "json": json.dumps({"error": {"message": "no", "api_key": secret("quoted")}}),
    "header": f"Authorization: Bearer {secret('quoted')} was refused",
    "address": f"could not reach https://user:{secret('quoted')}@upstream/v1?key={secret('quoted')}",
}


class Collector(logging.Handler):
    """Keeps what the package logs, as text, with everything that a formatter could show."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        shown = {k: v for k, v in vars(record).items() if k not in ("exc_info", "exc_text")}
        self.records.append(f"{record.getMessage()} {shown!r}")


class Scenario:
    """One eventful day of a client with secrets everywhere, and all it has said."""

    def __init__(self, folder):
        self.folder = folder
        self.events, self.errors, self.said, self.sent = [], [], {}, []
        self.threads = set()

    def client(self, provider, where="primary", **options):
        settings = settings_with_secrets(provider.api_base, where)
        return ResilientLM(
            "openai/test",
            **{
                **settings,
                "on_event": self.events.append,
                "cache": CachePolicy(disk=str(self.folder / "disk"), tenant=TENANT),
                "circuit": CircuitPolicy(failure_threshold=2),
                "retry": RetryPolicy(base=0.0, max_attempts=2),
                "max_wait": 0,
                **options,
            },
        )

    def ask(self, lm, prompt=PROMPT, **options):
        try:
            lm(prompt, **options)
        except Exception as error:
            self.errors.append(error)
        self.threads |= {thread.name for thread in threading.enumerate()}

    def look_at(self, name, lm):
        """Ask the client for everything that it can show of itself."""
        targets = lm._lend_targets()
        self.said[f"{name}: shown"] = "\n".join(
            [
                *(repr(lm), str(lm), lm.explain(), repr(lm.stats()), repr(lm.cache_policy)),
                *(f"{label} {circuit!r}" for label, circuit in lm.circuits.items()),
                *(str(each.last_error) + str(each.last_failure) for each in lm.circuits.values()),
                *map(repr, [targets, *targets, *(target.lm for target in targets)]),
                *(target.label for target in targets),
            ]
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.said[f"{name}: pickle"] = pickle.dumps(lm).decode("latin-1")
            self.said[f"{name}: cloudpickle"] = cloudpickle.dumps(lm).decode("latin-1")
            self.said[f"{name}: state"] = json.dumps(lm.dump_state())
            self.save_programs(name, lm)
        self.said[f"{name}: warnings"] = repr([str(each.message) for each in caught])

    def save_programs(self, name, lm):
        program = dspy.Predict("question -> answer")
        program.lm = lm
        folder = self.folder / name
        folder.mkdir()
        program.save(folder / "program.json")
        program.save(folder / "program.pkl")
        program.save(folder / "whole", save_program=True)
        self.said[f"{name}: saved programs"] = "".join(
            file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file()
        )


def live(day):
    """Answer, hit, refuse, fail, fall back, throttle, overrun, overflow, close, and rebuild."""
    with Provider("Paris") as one, Provider("Lyon") as two:
        lm = day.client(one)
        day.ask(lm), day.ask(lm)
        day.ask(lm, api_key=secret("call"), extra_headers={"X-Api-Key": secret("call")})
        for body in QUOTING.values():
            for code in (401, 500, 402):
                one.always(Status(code, body=body))
                day.ask(day.client(one, name=f"quoting {code}"), cache=False)
        one.always(Status(500, body=QUOTING["api key"]))
        for _ in range(3):
            day.ask(lm, cache=False)
        one.always(rate_limited("3600"))
        throttled = day.client(one, max_wait=0)
        day.ask(throttled, cache=False), day.ask(throttled, cache=False)
        one.always(Hang())
        day.ask(day.client(one, deadline=0.3), cache=False)
        full = day.client(one, limits=LimitPolicy(max_concurrent=1, max_queue=0), deadline=2.0)
        waiting = threading.Thread(target=day.ask, args=(full,), kwargs={"cache": False})
        sent = one.count
        waiting.start()
        one.wait_for(sent + 1)
        day.ask(full, cache=False)
        waiting.join(20)
        one.down("500")
        two.down("500")
        backed = day.client(one, name="backed", fallbacks=fallbacks_with_secrets(two))
        for _ in range(2):
            day.ask(backed, f"{PROMPT}, again")
        two.up()
        day.ask(backed, f"{PROMPT}, again")
        with_env = day.client(one, api_key=None, api_base=None, headers=None)
        day.ask(with_env)
        for name, each in (("primary", lm), ("backed", backed), ("with env", with_env)):
            day.look_at(name, each)
        rebuilt = ResilientLM.load_state(json.loads(day.said["primary: state"]))
        day.ask(rebuilt)
        day.look_at("rebuilt", rebuilt)
        lm.close()
        day.ask(lm)
        day.sent = [*one.requests, *two.requests]


def fallbacks_with_secrets(provider):
    return [
        "openai/by-name",
        {"model": "openai/by-dict", **settings_with_secrets(provider.api_base, "dict")},
        dspy.LM("openai/by-lm", **settings_with_secrets(provider.api_base, "lm")),
        ResilientLM("openai/by-client", **settings_with_secrets(provider.api_base, "client")),
    ]


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """The scenario, once, with secrets in the environment too."""
    scenario = Scenario(tmp_path_factory.mktemp("secrets"))
    collector = Collector()
    logger = logging.getLogger("dspy_resilient")
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    with pytest.MonkeyPatch.context() as patch, Provider("from env") as by_env:
        patch.setenv("OPENAI_API_KEY", secret("env"))
        patch.setenv("OPENAI_API_BASE", by_env.api_base.replace("://", f"://u:{secret('env')}@"))
        patch.setenv("MISTRAL_API_KEY", secret("env"))
        live(scenario)
        scenario.sent += by_env.requests
    logger.removeHandler(collector)
    logger.setLevel(level)
    scenario.said["logs"] = "\n".join(collector.records)
    return scenario


def leaks(text, word=MARK):
    """Return every place of `text` where the word stands, with a little around it."""
    found, at = [], text.find(word)
    while at >= 0 and len(found) < 5:
        found.append(text[max(0, at - 80) : at + 60])
        at = text.find(word, at + 1)
    return found


SHOWN = ["shown", "pickle", "cloudpickle", "state", "saved programs", "warnings"]
CLIENTS = ["primary", "backed", "with env", "rebuilt"]


def test_the_day_was_eventful(day):
    """What is searched below was really said, and the secrets were really sent."""
    kinds = {type(error).__name__ for error in day.errors}
    assert kinds >= {
        "AllTargetsFailedError",
        "CircuitOpenError",
        "ClientClosedError",
        "DeadlineExceededError",
        "LMConfigurationError",
        "LimitExceededError",
        "ThrottledError",
    }
    assert {type(event).__name__ for event in day.events} >= {
        "AttemptFailed",
        "CacheHit",
        "CallFinished",
        "CallRejected",
        "CircuitOpened",
        "FellBack",
        "RetryScheduled",
        "Throttled",
    }
    sent = " ".join(f"{each.headers} {each.body} {each.path}" for each in day.sent)
    for where in ("primary", "call", "lm"):
        assert secret(where) in sent, where
    user = base64.b64encode(f"u:{secret('env')}".encode()).decode()
    assert user in sent  # from OPENAI_API_BASE
    assert PROMPT in sent
    assert "circuit_opened" in day.said["logs"]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("how", SHOWN)
def test_no_secret_in_what_a_client_shows_or_saves(day, client, how):
    """Reprs, explain, stats, labels, circuits, pickles, states, saved programs, warnings."""
    assert leaks(day.said[f"{client}: {how}"]) == []


HARMLESS = [
    {"max_tokens": 5, "stop_token_ids": [1], "prompt_cache_key": "team", "user": "me"},
    {"input_cost_per_audio_token": 0.1, "output_cost_per_reasoning_token": 0.2},
    {"api_base": "https://host/v1?api-version=2024-02-01", "use_auth_token": True},
    {"aws_region_name": "eu-west-1", "vertex_project": "p", "litellm_credential_name": "team"},
    {"extra_headers": {"X-Title": "mine", "Authorization": None}, "seed": 3},
    {"tools": [{"function": {"parameters": {"properties": {"api_key": {"type": "string"}}}}}]},
    {"response_format": {"schema": {"properties": {"password": {"anyOf": [{"type": "null"}]}}}}},
]
HOLDING = [
    {"api_base": f"https://host/v1?key={MARK}"},
    {"api_base": f"https://host/v1?api-version=1&code={MARK}"},
    {"api_base": f"https://user:{MARK}@host/v1"},
    {"base_url": f"https://host/v1?x-api_key={MARK}"},
    {"oci_key": MARK, "zenapikey": MARK, "token": MARK},
    {"api_keys": [MARK]},
    {"vertex_credentials": {"type": "service_account", "private_key": MARK}},
    {"extra_body": {"deep": [{"credentials": {"refresh_token": MARK}}]}},
    {"extra_headers": {"Cookie": MARK}},
    {"extra_headers": {"X-Gateway": f"sk-{MARK}0123456789"}},
    {"tools": [{"type": "mcp", "headers": {"Authorization": MARK}}]},
    {"tools": [{"type": "mcp", "authorization": MARK}]},
    {"launch_kwargs": {"hf_token": MARK}, "train_kwargs": {"wandb": {"api_key": MARK}}},
]


@pytest.mark.filterwarnings("ignore:.*cannot be saved:UserWarning")
@pytest.mark.parametrize("settings", HOLDING, ids=str)
def test_a_secret_is_found_wherever_it_is(settings):
    """By the name of the setting, of a field further inside, or by its look."""
    lm = ResilientLM("openai/test", **settings)
    saved = json.dumps(lm.dump_state()) + pickle.dumps(lm).decode("latin-1")
    assert leaks(saved) == []
    as_fallback = ResilientLM("openai/other", fallbacks=[dspy.LM("openai/test", **settings)])
    saved = json.dumps(as_fallback.dump_state()) + pickle.dumps(as_fallback).decode("latin-1")
    assert leaks(saved) == []


@pytest.mark.parametrize("settings", HARMLESS, ids=str)
def test_what_only_sounds_like_a_secret_is_saved(settings):
    """A counted token, a price, or a tool that takes a password is no credential."""
    lm = ResilientLM("openai/test", **settings)
    assert ResilientLM.load_state(lm.dump_state()).kwargs == lm.kwargs
    assert pickle.loads(pickle.dumps(lm)).kwargs == lm.kwargs


@pytest.mark.filterwarnings("ignore:.*cannot be saved:UserWarning")
def test_settings_of_training_lose_their_secrets_only():
    """Nothing misses them in a call, so what is harmless stays."""
    lm = ResilientLM("openai/test", train_kwargs={"epochs": 3, "hf_token": MARK})
    new = ResilientLM.load_state(lm.dump_state())
    assert new.train_kwargs == {"epochs": 3}
    assert new.dump_state()["resilient"]["dropped"] == []


def test_a_save_still_holds_what_is_no_secret(day):
    """Harmless settings are not lost with the others."""
    state = json.loads(day.said["primary: state"])
    assert state["organization"] == "org-harmless"
    assert set(state["resilient"]["dropped"]) == {
        name
        for name in settings_with_secrets("http://host", "x")
        if name not in ("organization", "engine")
    }


def test_no_secret_in_an_error_of_ours(day):
    """Message, arguments, repr and attributes."""
    ours = [
        error
        for error in day.errors
        if isinstance(error, (ResilienceError, dspy.LMConfigurationError, TypeError))
    ]
    for error in ours:
        facts = {name: value for name, value in vars(error).items() if name != "errors"}
        shown = f"{error!s} {error!r} {error.args!r} {facts!r}"
        assert leaks(shown) == [], type(error)
        assert leaks("".join(traceback.format_exception_only(error))) == []


def test_no_secret_in_what_is_attached_to_a_providers_error(day):
    """`.attempts` and our verdict name outcomes, not requests."""
    for error in day.errors:
        for name in ("attempts", "verdict"):
            assert leaks(repr(getattr(error, name, None))) == []


def test_no_secret_in_an_event(day):
    """Events carry facts, not live objects."""
    for event in day.events:
        assert leaks(f"{event!r} {dataclasses.asdict(event)!r}") == []


def test_no_secret_in_the_log(day):
    """At DEBUG, with every extra."""
    assert leaks(day.said["logs"]) == []


def test_no_secret_in_what_circuitbreaker_lists(day):
    """Names in the monitor are seen by everybody in the process."""
    entries = circuitbreaker.CircuitBreakerMonitor.circuit_breakers
    assert leaks(" ".join(map(str, entries))) == []


def test_no_secret_in_the_name_of_a_thread(day):
    """A thread dump is shown around."""
    assert leaks(" ".join(day.threads)) == []


def test_no_secret_and_no_prompt_on_disk(day):
    """Answers are kept; what was asked, and with which key, is not."""
    files = [file for file in (day.folder / "disk").rglob("*") if file.is_file()]
    assert files
    for file in files:
        text = str(file) + file.read_bytes().decode("latin-1")
        assert leaks(text) == []
        assert leaks(text, TENANT) == []


def test_a_tenants_name_is_saved_with_the_policy_and_seen_nowhere_else(day):
    """It is no credential; without it a rebuilt client would mix up its users."""
    for client in CLIENTS:
        for how in SHOWN:
            is_there = leaks(day.said[f"{client}: {how}"], TENANT) != []
            assert is_there == (how in ("pickle", "cloudpickle", "state", "saved programs")), how
    assert leaks(day.said["logs"], TENANT) == []
    assert all(leaks(repr(event), TENANT) == [] for event in day.events)


def test_credentials_of_one_provider_never_reach_another(provider, make):
    """A fallback of another provider inherits no credential and no connection."""
    with Provider("Lyon") as second:
        lm = ResilientLM(
            "azure/test",
            **{**settings_with_secrets(provider.api_base, "azure"), "temperature": 0.5},
            timeout=5,
            fallbacks=["openai/backup", "mistral/backup"],
        )
        for target in lm._lend_targets()[1:]:
            kept = {name for name, value in target.lm.kwargs.items() if value is not None}
            assert kept == {"temperature", "timeout"}
        assert second.count == 0


@pytest.mark.parametrize("form", ["attribute", "call"])
def test_cloud_credentials_of_a_call_stay_with_the_primary(provider, make, form):
    """Per-call keywords of one provider are not sent to a fallback of another."""
    with Provider("Lyon") as second:
        backup = dspy.LM("openai/b", api_base=second.api_base, api_key="k", engine="litellm")
        given = {"aws_secret_access_key": secret("aws"), "extra_headers": {"X-Api-Key": MARK}}
        lm = make(fallbacks=[backup], num_retries=0, **(given if form == "attribute" else {}))
        provider.down("500")
        assert lm("q", **(given if form == "call" else {})) == ["Lyon"]
        request = second.requests[-1]
        assert leaks(f"{request.headers} {request.body} {request.path}") == []


def test_environment_is_left_as_it_was(day):
    """No credential is put into the environment."""
    assert leaks(repr(dict(os.environ))) == []
