"""What every test stands on: no network but loopback, dummy keys, DSPy's own cache untouched."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS"] = "True"
os.environ["HF_HUB_OFFLINE"] = "1"
for provider in ("OPENAI", "ANTHROPIC", "GROQ", "GEMINI"):
    os.environ[f"{provider}_API_KEY"] = "dummy-key-for-tests"

if hasattr(os, "register_at_fork"):  # before ours: coverage's lock may be held by another thread
    os.register_at_fork(after_in_child=lambda: sys.settrace(None))

import dspy
import hypothesis
import pytest

if os.environ.get("DSPY_SHAPE") == "3.5":
    import dspy35

    dspy35.apply()

from dspy_resilient import ResilientLM, providers
from dspy_resilient.testing import Provider

pytest_plugins = ["dspy_resilient.testing.fixtures"]

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def _no_disk_cache(tmp_path_factory):
    """Keep every cache of the run in a folder of its own, and DSPy's off the disk."""
    os.environ["DSPY_CACHEDIR"] = str(tmp_path_factory.mktemp("dspy-cache"))
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)


@pytest.fixture(scope="session", autouse=True)
def _litellm_is_warm(_no_disk_cache):
    """LiteLLM takes seconds to import and to make its first call; no test's clock should run then."""
    asyncio.run(asyncio.sleep(0))  # or a sync call of LiteLLM's would leave an event loop open
    providers.load()
    with Provider("ready") as running:
        dspy.LM(
            "openai/warm", engine="litellm", api_base=running.api_base, api_key="k", cache=False
        )("?")


@pytest.fixture(autouse=True)
def _dspy_cache_untouched():
    """Nothing of ours goes through DSPy's global cache; what a test of plain DSPy puts there goes."""
    yield
    dspy.cache.reset_memory_cache()


@pytest.fixture(autouse=True)
def _attempts_end():
    """An attempt that its caller has left ends with its provider, before the next test begins."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("attempt:"):
            thread.join(10)


@pytest.fixture
def caplog(caplog):
    """What is logged here, and not what the way to a store of an earlier test's has yet to say."""

    def is_ours(record):
        return record.threadName != "store"

    caplog.handler.addFilter(is_ours)
    yield caplog
    caplog.handler.removeFilter(is_ours)


@pytest.fixture
def provider(provider):
    """A local provider that answers "Paris" until told otherwise."""
    provider.answer = "Paris"
    return provider


@pytest.fixture
def make(provider):
    """Build a `ResilientLM` that talks to the local provider; the end of the test ends its calls."""
    made = []

    def build(model="openai/test", **options):
        options = {"api_base": provider.api_base, "api_key": "dummy-key-for-tests", **options}
        lm = ResilientLM(model, **options)
        made.append(lm)
        return lm

    yield build
    for lm in made:
        lm.close(grace=0)


@pytest.fixture
def plain(provider):
    """Build the plain `dspy.LM` that a `ResilientLM` is compared with."""

    def build(model="openai/test", **options):
        options = {"api_base": provider.api_base, "api_key": "dummy-key-for-tests", **options}
        return dspy.LM(model, **{"engine": "litellm", **options})

    return build


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Make one call through the sync and through the async driver: `ask(lm, "prompt", **options)`."""
    if request.param == "sync":
        return lambda lm, *args, **kwargs: lm(*args, **kwargs)
    return lambda lm, *args, **kwargs: asyncio.run(lm.acall(*args, **kwargs))
