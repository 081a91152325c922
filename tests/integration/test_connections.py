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
import openai
import pytest
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils import litellm_logging

from dspy_resilient import CircuitPolicy, ResilientLM, providers
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
)

PREFIXES = ("openai", "anthropic")
KEY = "key-for-tests"
DESCRIPTORS = Path("/proc/self/fd")


def descriptors():
    """Count this process's open descriptors, after what is garbage has gone."""
    gc.collect()
    return len(list(DESCRIPTORS.iterdir()))


@pytest.fixture
def leaves_nothing(caplog):
    """A block in which a provider runs; afterwards no descriptor is left and nothing was warned of."""
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
        assert [record.getMessage() for record in caplog.records] == []

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
    got_a_chunk = threading.Event()

    async def words(provider):
        await providers.tend()
        chunks = await litellm.acompletion(
            f"{prefix}/test",
            [{"role": "user", "content": "?"}],
            api_base=provider.base(prefix),
            api_key=KEY,
            stream=True,
            num_retries=0,
        )
        text = ""
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            got_a_chunk.set()
        return text

    answer = "The capital is Paris"
    stalls = Provider(answer, faults=[StallStream(1, 1.0)])
    with stalls as provider, ThreadPoolExecutor(1) as pool:
        first = pool.submit(asyncio.run, words(provider))
        assert got_a_chunk.wait(30)
        assert asyncio.run(words(provider)) == answer
        assert first.result(30) == answer


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
    asyncio.run(lm.acall("sweeps"))


def test_loops_closed_by_hand_are_cleaned_up_after(leaves_nothing):
    """Without `shutdown_asyncgens`, the next loop's first call closes what they left."""
    with leaves_nothing() as provider:
        lm = client(provider)
        for _ in range(5):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(lm.acall("?"))
            loop.close()
        asyncio.run(lm.acall("?"))


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


@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")  # they are the user's now
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cache_emptied_by_the_user_breaks_nothing(provider, make):
    """LiteLLM makes new clients then."""
    lm = make(cache=False)

    async def calls():
        await lm.acall("?")
        litellm.in_memory_llm_clients_cache.flush_cache()
        return await lm.acall("?")

    assert asyncio.run(calls()) == ["Paris"]
    assert asyncio.run(calls()) == ["Paris"]
    gc.collect()


def test_a_client_lent_to_litellm_stays_open(provider):
    """Azure's are cached like LiteLLM's own."""

    async def call(lent):
        await providers.tend()
        await litellm.acompletion(
            "azure/test", [{"role": "user", "content": "?"}], client=lent, num_retries=0
        )

    with asyncio.Runner() as runner:
        lent = openai.AsyncAzureOpenAI(
            api_key=KEY, api_version="2024-10-21", azure_endpoint=provider.url, max_retries=0
        )
        runner.run(call(lent))
        runner.run(runner.get_loop().shutdown_asyncgens())
        assert not lent.is_closed()
        runner.run(lent.close())
    litellm.in_memory_llm_clients_cache.flush_cache()


def test_callbacks_hear_of_every_success_though_its_loop_ends_at_once(provider, make):
    """Plain LiteLLM keeps these reports for a later loop, or loses them."""
    heard = []

    class Listener(CustomLogger):
        async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
            heard.append(response_obj.choices[0].message.content)

    listener = Listener()
    litellm.callbacks.append(listener)
    try:
        lm = make(cache=False)
        for _ in range(10):
            asyncio.run(lm.acall("?"))
        assert heard == ["Paris"] * 10
    finally:
        litellm.logging_callback_manager.remove_callback_from_list_by_object(
            litellm.callbacks, listener
        )
        for name in ("success_callback", "_async_success_callback", "failure_callback"):
            getattr(litellm, name)[:] = [c for c in getattr(litellm, name) if c is not listener]


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
@pytest.mark.parametrize("listeners", [[], ["somebody"]])
def test_a_sync_call_starts_no_event_loop_for_nobody(monkeypatch, make, model_type, listeners):
    """Plain LiteLLM starts one after each, to tell `service_callback`s even if there are none."""
    lm = make(cache=False, model_type=model_type)
    lm("warm")
    started = []
    monkeypatch.setattr(litellm, "service_callback", listeners)
    run = asyncio.run
    monkeypatch.setattr(asyncio, "run", lambda work: started.append(run(work)))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lm, "?").result(30)
    assert bool(started) is (bool(listeners) and model_type == "chat")


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


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
def test_no_account_of_a_success_is_drawn_up_for_nobody(is_accounted_for, ask, make, model_type):
    """Plain LiteLLM does so after each call, for a fifth of its processor time (section 11)."""
    ask(make(cache=False, model_type=model_type), "Unheard?")
    assert not is_accounted_for("Unheard?")


@pytest.mark.parametrize("wish", ["success_callback", "_async_success_callback", "max_budget"])
def test_an_account_of_a_success_is_drawn_up_for_somebody(
    monkeypatch, is_accounted_for, ask, make, wish
):
    """A callback, of whatever kind, or a budget that counts what calls cost."""
    monkeypatch.setattr(litellm, wish, 1e9 if wish == "max_budget" else [hears])
    ask(make(cache=False), "Heard?")
    assert is_accounted_for("Heard?")


def test_an_account_is_drawn_up_for_a_callback_of_the_call(is_accounted_for, ask, make):
    """LiteLLM takes callbacks as keywords as well."""
    ask(make(cache=False, success_callback=[hears]), "Heard?")
    assert is_accounted_for("Heard?")


def test_an_account_is_drawn_up_for_a_circuit_that_listens(is_accounted_for, ask, make):
    """To the provider, that is: it hears of successes from LiteLLM."""
    listener = make(circuit=CircuitPolicy(listen="provider"))
    ask(make(cache=False), "Heard?")
    assert is_accounted_for("Heard?")
    listener.close()


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
import asyncio, atexit, litellm
from litellm.integrations.custom_logger import CustomLogger
from dspy_resilient import ResilientLM
from dspy_resilient.testing import Hold, Provider

loop = asyncio.new_event_loop()
provider = Provider("Paris").__enter__()
lm = ResilientLM("openai/x", api_base=provider.api_base, api_key="k", cache=False)
"""


@pytest.mark.timeout(150)
def test_an_exit_handler_may_run_a_loop_that_was_left_open():
    """What is being reported on it is not ended before."""
    ended = run_and_exit("""if True:
        class Log(CustomLogger):
            async def async_log_success_event(self, **_):
                await exiting.wait()
                print("told")
                loop.stop()

        def end():
            exiting.set()
            loop.run_forever()

        exiting = asyncio.Event()
        atexit.register(end)
        litellm.callbacks = [Log()]
        print(loop.run_until_complete(lm.acall("?")))
    """)
    assert (ended.stdout, ended.stderr) == ("['Paris']\ntold\n", "")


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
