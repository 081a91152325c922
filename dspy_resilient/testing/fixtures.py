"""Fixtures for pytest, for those who ask for them.

One line in your `conftest.py` does:

    pytest_plugins = ["dspy_resilient.testing.fixtures"]

Then a test of your own program is as short as this:

    def test_it_survives_a_bad_minute(provider, make_lm):
        provider.script(Status(503), rate_limited(0.1))
        with dspy.context(lm=make_lm()):
            assert my_program(question="?").answer

Nothing is registered with pytest otherwise, so that nobody pays for DSPy who does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dspy_resilient.lm import ResilientLM
from dspy_resilient.policies import CachePolicy, RetryPolicy
from dspy_resilient.testing.clock import Clock
from dspy_resilient.testing.provider import Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider on this machine under which DSPy programs run; set `answer` for what it says."""
    with Provider() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until it is told to `advance()`."""
    return Clock()


@pytest.fixture
def make_lm(provider: Provider) -> Iterator[Callable[..., ResilientLM]]:
    """Build a `ResilientLM` that talks to `provider`, closed at the end of the test.

    `make_lm("openai/test", **options)` takes what `ResilientLM` takes. Unless told otherwise it
    keeps no answer on disk, where the next run would find it, and hardly waits between attempts.
    """
    with ExitStack() as made:

        def make(model: str = "openai/test", **options: Any) -> ResilientLM:
            if "num_retries" not in options:
                options.setdefault("retry", RetryPolicy(base=0.01))
            options.setdefault("cache", CachePolicy(disk=None))
            options = {"api_base": provider.api_base, "api_key": "none", **options}
            return made.enter_context(ResilientLM(model, **options))

        yield make
