"""The first calls of a process, from threads and event loops at once, as a web service gets them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVICE = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
import dspy
from dspy_resilient import ResilientLM
from dspy_resilient.testing import Provider

assert "litellm" not in sys.modules
REQUESTS = 24
start = threading.Barrier(REQUESTS + 1)

def sync_endpoint(lm):
    start.wait()
    return lm("?")

async def async_endpoint(lm):
    return await lm.acall("?")

async def service(lm, plain):
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(REQUESTS) as threads:
        sync = [loop.run_in_executor(threads, sync_endpoint, lm if n % 4 else plain)
                for n in range(REQUESTS)]
        while start.n_waiting < REQUESTS:
            await asyncio.sleep(0.001)
        start.wait()
        answers = await asyncio.gather(*sync, *(async_endpoint(lm) for _ in range(REQUESTS)),
                                       return_exceptions=True)
    return answers

with Provider("Paris") as provider:
    settings = {"api_base": provider.api_base, "api_key": "k", "cache": False}
    plain = dspy.LM("openai/test", engine="litellm", num_retries=0, **settings)
    lm = ResilientLM("openai/test", num_retries=0, **settings)
    wrong = [each for each in asyncio.run(service(lm, plain)) if each != ["Paris"]]
    print(len(wrong), *wrong[:3])
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("attempt", range(2))
def test_a_first_burst_is_answered(attempt):
    """24 requests on threads and as many on the loop, beside calls of plain `dspy.LM`.

    Where LiteLLM is imported otherwise than through DSPy's loader, some of them find it half made.
    """
    command = [sys.executable, "-W", "ignore", "-c", SERVICE]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=230, check=True)
    assert ended.stdout == "0\n", ended.stdout + ended.stderr
