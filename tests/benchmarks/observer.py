"""What watching an attempt costs: `python tests/benchmarks/observer.py`.

Prints the microseconds of one `observe()` + `tags()` + `close()`, of `watch()`, and of judging an
error; the last is spent on failures only.
"""

from __future__ import annotations

import os
import timeit

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy
import httpx

from dspy_resilient import providers
from dspy_resilient.outcomes import classify

KEYWORDS = {"model": "openai/gpt-4o-mini", "temperature": 0.7, "api_key": "key"}


def microseconds(function, number=20_000):
    """Return the best of five, per call."""
    return min(timeit.repeat(function, number=number, repeat=5)) / number * 1e6


def heard(evidence):
    """Hear of a failure."""


def by_hand():
    sighting = providers.observe(heard)
    sighting.tags(KEYWORDS)
    sighting.close()


def in_a_block():
    with providers.watch(heard, True, KEYWORDS):
        pass


def without_keywords():
    with providers.watch(heard, False):
        pass


def failed():
    request = httpx.Request("POST", "http://provider/v1")
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(500))
    outer = dspy.LMServerError("down", status=500)
    outer.__cause__ = error
    return outer


if __name__ == "__main__":
    providers.load()
    error = failed()
    print(f"observe + tags + close   {microseconds(by_hand):6.2f} us")
    print(f"watch, by keywords       {microseconds(in_a_block):6.2f} us")
    print(f"watch, by context        {microseconds(without_keywords):6.2f} us")
    print(f"classify a 500           {microseconds(lambda: classify(error), 5_000):6.2f} us")
