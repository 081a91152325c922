"""Connections to providers: reused while a loop runs, and none left behind when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import litellm
import pytest
from litellm.litellm_core_utils import litellm_logging, logging_worker

from dspy_resilient import CircuitPolicy, ResilientLM, providers
from dspy_resilient.events import logger
from dspy_resilient.providers import observer
from dspy_resilient.testing import (
    CutStream,
    Garbage,
    Hang,
    Hold,
    Provider,
    Reset,
    StallStream,
    Status,
    dspy_answers,
)

PREFIXES = ("openai", "anthropic")
KEY = "key-for-tests"
DESCRIPTORS = Path("/proc/self/fd")


def descriptors():
    """Count this process's open descriptors, after what is garbage has gone."""
    gc.collect()
    return len(list(DESCRIPTORS.iterdir()))


@pytest.fixture
def leaves_nothing(caplog, monkeypatch):
    """A block in which a provider runs; afterwards no descriptor is left and nothing was warned of.

    Nobody listens to LiteLLM's successes, whatever other tests have left behind: these reports are
    LiteLLM's own, and it loses some of them where loops run in parallel.
    """
    for name in ("callbacks", "success_callback", "_async_success_callback"):
        monkeypatch.setattr(litellm, name, [])
    monkeypatch.setattr(observer._observer, "_subscriptions", ())
    if not DESCRIPTORS.is_dir():
        pytest.skip("needs /proc")

    @contextlib.contextmanager
    def block(answer="Paris"):
        with Provider("ready") as running:
            asyncio.run(client(running).acall("?"))  # what the process opens once and keeps
        before = descriptors()
        caplog.clear()  # of what other tests' garbage has said
        with Provider(answer) as running:
            yield running
        assert descriptors() <= before
        assert [each.getMessage() for each in caplog.records if each.name != logger.name] == []

    return block


def client(provider, prefix="openai", **options):
    """Build a client that sends each call, once."""
    options = {"cache": False, "num_retries": 0, "circuit": False, **options}
    return ResilientLM(f"{prefix}/test", api_base=provider.base(prefix), api_key=KEY, **options)


async def stream(lm, provider):
    """Stream an answer through DSPy and return its text."""
    listener = dspy.streaming.StreamListener("answer")
    program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
    with dspy.context(lm=lm):
        chunks = [chunk async for chunk in program(question="Capital of France?")]
    return chunks[-1].answer


async def cancelled(lm, provider):
    """Cancel a call that is under way."""
    call = asyncio.ensure_future(lm.acall("?"))
    # Until it has sent the request, LiteLLM leaves a coroutine unawaited when it is cancelled.
    await asyncio.to_thread(provider.wait_for, provider.count + 1)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def failed(lm, provider):
    """Make a call that fails."""
    with pytest.raises(dspy.LMError):
        await lm.acall("?")


async def broken_stream(lm, provider):
    """Stream an answer that ends in the middle."""
    with pytest.raises(dspy.LMError):
        await stream(lm, provider)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_hundred_event_loops_in_a_row_leave_nothing_behind(leaves_nothing, prefix):
    """Plain LiteLLM holds a hundred connections then, and warns of each in the end."""
    with leaves_nothing() as provider:
        lm = client(provider, prefix)
        for _ in range(100):
            assert asyncio.run(lm.acall("?")) == ["Paris"]
        assert provider.connections == 100


ENDINGS = {
    "500": (Status(500), failed),
    "reset": (Reset(), failed),
    "garbage": (Garbage(), failed),
    "timeout": (Hang(), failed),
    "cancelled": (Hang(), cancelled),
    "stream": (None, stream),
    "broken stream": (CutStream(), broken_stream),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_however_calls_end_their_loops_leave_nothing_behind(leaves_nothing, prefix, ending):
    """Neither descriptors nor warnings."""
    fault, call = ENDINGS[ending]
    with leaves_nothing(None) as provider:
        provider.always(fault)
        lm = client(provider, prefix, timeout=0.05 if ending == "timeout" else 30)
        for _ in range(5):
            asyncio.run(call(lm, provider))


def test_a_provider_that_refuses_connections_leaves_nothing_behind(leaves_nothing):
    """A connection that never came about is none to close."""
    with leaves_nothing() as provider:
        provider.down()
        lm = client(provider)
        for _ in range(5):
            asyncio.run(failed(lm, provider))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_eight_threads_with_loops_of_their_own_leave_nothing_behind(leaves_nothing, prefix):
    """Nor do they disturb one another: LiteLLM's log stays silent, too."""
    with leaves_nothing() as provider:
        lm = client(provider, prefix)

        async def three():
            return await asyncio.gather(*(lm.acall("?") for _ in range(3)))

        def loops():
            return [asyncio.run(three()) for _ in range(5)]

        with ThreadPoolExecutor(8) as pool:
            answers = [future.result() for future in [pool.submit(loops) for _ in range(8)]]
        assert answers == [[[["Paris"]] * 3] * 5] * 8


def test_calls_on_one_loop_share_a_connection(provider, make):
    """Twenty in a row take one, five at once no more than five."""
    lm = make(cache=False)

    async def calls():
        for _ in range(20):
            await lm.acall("?")
        assert provider.connections == 1
        await asyncio.gather(*(lm.acall("?") for _ in range(5)))
        assert provider.connections <= 5

    asyncio.run(calls())


@pytest.mark.parametrize("prefix", ["openai", "anthropic", "groq"])
def test_a_crowd_of_threads_keeps_its_connections(prefix):
    """None is closed as surplus: httpcore closes such under a thread that has just taken it.

    By default the twenty-first would be. (A crowd that takes long loses connections in another way:
    what has been idle for 5 s is closed, too.)
    """
    with Provider("Paris") as provider:
        lm = client(provider, prefix)
        lm("first")  # of a crowd of first calls, some would make clients that LiteLLM then drops
        for turn in range(1, 4):
            hold = Hold()
            provider.always(hold)
            with ThreadPoolExecutor(24) as pool:
                calls = [pool.submit(lm, f"{number}?") for number in range(24)]
                provider.wait_for(1 + 24 * turn)
                hold.release()
                assert [call.result() for call in calls] == [["Paris"]] * 24
        assert provider.connections == 24


def test_a_pooled_client_keeps_its_connections():
    """So does what `providers.client` returns."""
    with Provider("Paris") as provider:
        pooled = providers.client("openai", api_base=provider.api_base, api_key=KEY)
        messages = [{"role": "user", "content": "?"}]
        hold = Hold()
        provider.always(hold)
        with ThreadPoolExecutor(24) as pool:
            create = pooled.chat.completions.create
            calls = [pool.submit(create, model="test", messages=messages) for _ in range(24)]
            provider.wait_for(24)
            hold.release()
            assert [call.result().choices[0].message.content for call in calls] == ["Paris"] * 24
        assert len(pooled._client._transport._pool.connections) == 24


@pytest.mark.parametrize("prefix", [*PREFIXES, "gemini"])
def test_a_stream_outlives_other_loops(prefix):
    """With plain LiteLLM a second loop's stream ends the first's, which then hangs."""
    program = dspy.streamify(dspy.Predict("question -> answer"))
    got_a_chunk = threading.Event()

    async def words(lm):
        with dspy.context(lm=lm):
            async for each in program(question="?"):
                value = each
                got_a_chunk.set()
        return value.answer

    answer = dspy_answers(lambda question: "The capital is Paris")
    stalls = Provider(answer, faults=[StallStream(1, 1.0)])
    with stalls as provider, ThreadPoolExecutor(1) as pool:
        lm = client(provider, prefix)
        first = pool.submit(asyncio.run, words(lm))
        assert got_a_chunk.wait(30)
        assert asyncio.run(words(lm)) == "The capital is Paris"
        assert first.result(30) == "The capital is Paris"


def test_a_call_outlives_other_loops(provider, make):
    """The end of a loop closes its own clients only."""
    lm, hold = make(cache=False), Hold()
    provider.script(hold)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(asyncio.run, lm.acall("first"))
        provider.wait_for(1)
        asyncio.run(lm.acall("second"))
        hold.release()
        assert first.result(30) == ["Paris"]


@pytest.mark.filterwarnings("ignore:asynchronous generator:ResourceWarning")  # httpx starts others
def test_a_call_outlives_the_shutdown_of_its_loops_generators(provider, make):
    """Whoever runs it early finds idle connections closed, and none under a request."""
    lm, hold = make(cache=False), Hold()

    async def calls():
        await lm.acall("warm")
        provider.script(hold)
        call = asyncio.ensure_future(lm.acall("held"))
        await asyncio.to_thread(provider.wait_for, 2)
        await asyncio.get_running_loop().shutdown_asyncgens()
        hold.release()
        return await call

    assert asyncio.run(calls()) == ["Paris"]


def test_loops_closed_by_hand_are_cleaned_up_after(leaves_nothing):
    """Without `shutdown_asyncgens`, as they are closed."""
    with leaves_nothing() as provider:
        lm = client(provider)
        for _ in range(5):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(lm.acall("?"))
            loop.close()


def test_another_kind_of_loop_is_tended_to_as_well(leaves_nothing):
    """Nothing relies on asyncio's own loops."""
    uvloop = pytest.importorskip("uvloop")

    def run(work):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work)

    run(asyncio.sleep(0))  # uvloop keeps a pair of descriptors for good
    with leaves_nothing() as provider:
        lm = client(provider)
        for _ in range(5):
            assert run(lm.acall("?")) == ["Paris"]


@pytest.fixture
def is_accounted_for(monkeypatch):
    """Whether LiteLLM draws up an account of the success of the call with this prompt.

    Nobody listens, whatever other tests have left behind.
    """
    drawn, draw = [], litellm_logging.get_standard_logging_object_payload

    def get_standard_logging_object_payload(*args, **kwargs):
        drawn.append(f"{args}{kwargs}")
        return draw(*args, **kwargs)

    monkeypatch.setattr(
        litellm_logging, "get_standard_logging_object_payload", get_standard_logging_object_payload
    )
    for name in ("callbacks", "success_callback", "_async_success_callback"):
        monkeypatch.setattr(litellm, name, [])
    monkeypatch.setattr(observer._observer, "_subscriptions", ())

    pool = ThreadPoolExecutor(1)
    monkeypatch.setattr(litellm.utils, "executor", pool, raising=False)
    monkeypatch.setattr(litellm_logging, "executor", pool)

    def check(prompt):
        pool.submit(int).result()  # after all that it was given before
        return any(prompt in each for each in drawn)

    yield check
    pool.shutdown()


def hears(kwargs, response, start, end):
    """A success callback."""


@pytest.fixture
def ask_and_stay(ask):
    """Make a call, and let its loop live until LiteLLM has reported what it has to report."""

    def call(lm, prompt):
        async def acall():
            await lm.acall(prompt)
            for _ in range(3):
                await asyncio.sleep(0)
            await logging_worker.GLOBAL_LOGGING_WORKER.flush()

        if asks_async:
            asyncio.run(acall())
        else:
            lm(prompt)

    asks_async = "acall" in ask.__code__.co_names
    return call


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
def test_no_account_of_a_success_is_drawn_up_for_nobody(is_accounted_for, ask, make, model_type):
    """Plain LiteLLM does so after each call, for a fifth of its processor time (section 11)."""
    ask(make(cache=False, model_type=model_type), "Unheard?")
    assert not is_accounted_for("Unheard?")


@pytest.mark.parametrize("wish", ["success_callback", "_async_success_callback", "max_budget"])
def test_an_account_of_a_success_is_drawn_up_for_somebody(
    monkeypatch, is_accounted_for, ask_and_stay, make, wish
):
    """A callback, of whatever kind, or a budget that counts what calls cost."""
    monkeypatch.setattr(litellm, wish, 1e9 if wish == "max_budget" else [hears])
    ask_and_stay(make(cache=False), "Heard?")
    assert is_accounted_for("Heard?")


def test_an_account_is_drawn_up_for_a_callback_of_the_call(is_accounted_for, ask_and_stay, make):
    """LiteLLM takes callbacks as keywords as well."""
    ask_and_stay(make(cache=False, success_callback=[hears]), "Heard?")
    assert is_accounted_for("Heard?")


def test_an_account_is_drawn_up_for_a_circuit_that_listens(
    is_accounted_for, ask_and_stay, provider, make
):
    """To the provider, that is: it hears of successes from LiteLLM, for as long as it is there."""
    listener = ResilientLM(
        "openai/test", api_base=provider.api_base, api_key=KEY, circuit=CircuitPolicy(listen="provider")
    )  # fmt: skip
    ask_and_stay(make(cache=False), "Heard?")
    assert is_accounted_for("Heard?")
    listener.close()
    del listener
    gc.collect()
    ask_and_stay(make(cache=False), "Unheard?")
    assert not is_accounted_for("Unheard?")


def test_calls_that_are_not_ours_are_accounted_for_as_ever(is_accounted_for, provider, make):
    """Whoever calls LiteLLM may look at what it notes."""
    make(cache=False)("Unheard?")
    messages = [{"role": "user", "content": "Not ours?"}]
    litellm.completion("openai/test", messages, api_base=provider.api_base, api_key=KEY)
    assert is_accounted_for("Not ours?")
    assert not is_accounted_for("Unheard?")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_opens_connections_of_its_own(provider, make):
    """On the parent's, each would read the other's answers."""
    lm = make(cache=False)

    async def calls():
        await lm.acall("?")
        lm("?")
        assert provider.connections == 2
        child = os.fork()
        if child == 0:
            answers = lm("?")  # the loop is the parent's; a child must not run it
            os._exit(0 if answers == ["Paris"] else 1)
        status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status[1]) == 0
        assert provider.connections == 3
        await lm.acall("?")
        lm("?")
        assert provider.connections == 3

    asyncio.run(calls())


@pytest.mark.timeout(150)
def test_nothing_is_left_to_warn_of_at_exit():
    """Neither by loops that ended as they should nor by those that did not."""
    script = """if True:
        import asyncio, gc
        from dspy_resilient import ResilientLM
        from dspy_resilient.testing import Provider
        with Provider("Paris") as provider:
            for prefix in ("openai", "anthropic"):
                base = provider.base(prefix)
                lm = ResilientLM(prefix + "/test", api_base=base, api_key="k", cache=False)
                asyncio.run(lm.acall("?"))
                loop = asyncio.new_event_loop()
                loop.run_until_complete(lm.acall("?"))
                loop.close()
        print("done")
    """
    warnings = ["-W", "error::ResourceWarning", "-W", "error::RuntimeWarning"]
    command = [sys.executable, *warnings, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=140, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


def run_and_exit(script):
    litellms = ["-W", "ignore:coroutine 'ServiceLogging:RuntimeWarning"]
    command = [sys.executable, *litellms, "-c", ON_A_LOOP + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=140, check=True)


ON_A_LOOP = """
import asyncio
from dspy_resilient import ResilientLM
from dspy_resilient.testing import Hold, Provider

loop = asyncio.new_event_loop()
provider = Provider("Paris").__enter__()
lm = ResilientLM("openai/x", api_base=provider.api_base, api_key="k", cache=False)
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("end", ["", "loop.close()"], ids=["open", "closed"])
def test_a_call_that_nothing_goes_on_with_ends_with_the_process(end):
    """Without a word, whether its loop was closed under it or never."""
    script = """if True:
        async def call():
            print(await lm.acall("?"))
            provider.always(Hold())
            calls = asyncio.gather(lm.acall("!"))  # else asyncio has to say that a task is pending
            await asyncio.to_thread(provider.wait_for, 2)
            return [calls]

        calls = loop.run_until_complete(call())
    """
    ended = run_and_exit(f"{script}\n{end}")
    assert (ended.stdout, ended.stderr) == ("['Paris']\n", "")
