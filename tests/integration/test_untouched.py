"""LiteLLM, the OpenAI SDK and httpx are left as they were found, whatever calls are made."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import types

import dspy
import litellm
import pytest

from dspy_resilient import ResilientLM, providers
from dspy_resilient.testing import Hang, Provider, Reset, Status, dspy_answers

ROOTS = ("litellm", "openai", "httpx", "httpcore", "aiohttp", "asyncio")
# What LiteLLM itself changes as it makes a call, plain or ours.
LITELLMS_OWN = {
    "litellm.num_retries",  # after any sync call that fails
    "litellm.model_fallbacks",
    "openai.api_type",
    "openai.api_version",
    "openai.organization",
    "litellm.utils.user_logger_fn",
}
# What a registered callback is, and the one setting that goes with it.
OURS = {
    *("callbacks", "input_callback", "success_callback", "failure_callback"),
    *("_async_success_callback", "_async_failure_callback", "disable_hf_tokenizer_download"),
}


def attributes():
    """Return every attribute of the modules concerned, of their classes, and of their instances."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ROOTS or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(object.__getattribute__(module, "__dict__").items()):
            if key.startswith("__"):
                continue
            found[f"{name}.{key}"] = frozen(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, each in list(vars(value).items()):
                    if not member.startswith(("__", "_abc_")):
                        found[f"{name}.{key}.{member}"] = frozen(each)
            elif type(value).__module__.startswith("litellm"):
                own = vars(value) if hasattr(value, "__dict__") else {}
                for member, each in list(own.items()):
                    if callable(each):
                        found[f"{name}.{key}.{member}"] = frozen(each)
    return found


def frozen(value):
    """Return what differs when an attribute is replaced: plain values by value, others by identity."""
    if isinstance(value, list):
        return [id(each) for each in value]
    if isinstance(value, (str, int, float, bool, tuple, type(None))):
        return repr(value)
    return id(value)


def changed(before):
    """Return what was replaced since, but for what LiteLLM changes itself."""
    after = attributes()
    return {
        name
        for name, value in before.items()
        if name in after and after[name] != value and name not in LITELLMS_OWN
    }


async def stream(lm):
    program = dspy.streamify(dspy.Predict("question -> answer"))
    with dspy.context(lm=lm):
        async for _ in program(question="?"):
            pass


def stream_sync(lm):
    program = dspy.streamify(dspy.Predict("question -> answer"), async_streaming=False)
    with dspy.context(lm=lm):
        list(program(question="?"))


async def cancelled(lm, provider):
    call = asyncio.ensure_future(lm.acall("?"))
    await asyncio.to_thread(provider.wait_for, provider.count + 1)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


def all_kinds(make):
    """Make calls of every kind: chat, text, responses, streamed, sync, async, failed, cancelled."""
    for prefix in ("openai", "anthropic", "groq", "gemini", "ollama", "azure"):
        kinds = ("chat", "text", "responses") if prefix == "openai" else ("chat",)
        for kind in kinds:
            with Provider(dspy_answers(lambda question: "Paris")) as provider:
                version = {"api_version": "2024-10-21"} if prefix == "azure" else {}
                lm = make(f"{prefix}/test", provider.base(prefix), model_type=kind, **version)
                lm("?")
                asyncio.run(lm.acall("?"))
                if kind == "chat":
                    asyncio.run(stream(lm))
                    stream_sync(lm)
                for fault in (Status(500), Reset()):
                    provider.script(fault, fault)
                    with contextlib.suppress(dspy.LMError):
                        lm("?")
                    with contextlib.suppress(dspy.LMError):
                        asyncio.run(lm.acall("?"))
                provider.script(Hang())
                asyncio.run(cancelled(lm, provider))


def plain(model, base, **options):
    options = {"api_base": base, "api_key": "k", "engine": "litellm", **options}
    return dspy.LM(model, cache=False, num_retries=0, **options)


def ours(model, base, **options):
    options = {"api_base": base, "api_key": "k", "circuit": False, **options}
    return ResilientLM(model, cache=False, num_retries=0, **options)


@pytest.mark.timeout(300)
def test_nothing_of_theirs_is_replaced():
    """Neither a function nor a class nor a method nor an instance; nothing at all is left behind.

    In a process of its own, in which nothing of ours has been loaded before.
    """
    command = [sys.executable, "-W", "ignore", __file__]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert (ended.returncode, ended.stdout) == (0, "untouched\n"), ended.stderr


def compare():
    all_kinds(plain)  # LiteLLM imports and makes what it needs at its first calls
    before = attributes()
    all_kinds(ours)
    assert changed(before) <= {f"litellm.{name}" for name in OURS}, changed(before)
    assert litellm.disable_hf_tokenizer_download is True
    providers.unregister()
    assert changed(before) == set(), changed(before)
    print("untouched")


def test_the_users_choice_of_tokenizers_stays(monkeypatch, make):
    """It is LiteLLM's own setting."""
    monkeypatch.setattr(litellm, "disable_hf_tokenizer_download", False)
    make(cache=False)("?")
    assert litellm.disable_hf_tokenizer_download is False
    providers.unregister()
    assert litellm.disable_hf_tokenizer_download is False


if __name__ == "__main__":
    compare()
