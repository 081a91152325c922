"""The observer and LiteLLM: who hears of a failure, when, and that nothing of ours leaves."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import litellm
import pytest
from litellm.integrations.custom_logger import CustomLogger
from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

from dspy_resilient import providers
from dspy_resilient.outcomes import Kind, classify
from dspy_resilient.outcomes.outcome import Outcome
from dspy_resilient.providers import observer
from dspy_resilient.providers.callback import Hook
from dspy_resilient.providers.callback_event import endpoint_name, provider_name
from dspy_resilient.testing import (
    Provider,
    Reset,
    Status,
    cut_json,
    overloaded,
    quota_exceeded,
    rate_limited,
)

# LiteLLM's own, of its models at first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning")

PREFIXES = ("openai", "anthropic")
LISTS = (
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)


@pytest.fixture(autouse=True)
def _lists_as_before(monkeypatch):
    """Give LiteLLM its lists back, whatever a test has done to them."""
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    before = {name: list(getattr(litellm, name)) for name in LISTS}
    yield
    for name, callbacks in before.items():
        setattr(litellm, name, callbacks)


@pytest.fixture(params=["sync", "async"])
def send(request, provider):
    """Make one LiteLLM call, through its sync and its async entry: `send("openai", tags, **more)`."""

    def call(prefix, tags, **more):
        arguments = {
            "model": f"{prefix}/test",
            "messages": [{"role": "user", "content": "Capital of France?"}],
            "api_base": provider.base(prefix),
            "api_key": "key-for-tests",
            "num_retries": 0,
            **tags,
            **more,
        }
        if request.param == "sync":
            return litellm.completion(**arguments)
        return asyncio.run(tended(litellm.acompletion(**arguments)))

    return call


async def tended(call):
    """Await `call` on a loop on which LiteLLM leaves no client open."""
    try:
        return await call
    finally:
        await close_litellm_async_clients()


FAULTS = {
    "500": (Status(500), Kind.FAILURE),
    "503": (Status(503), Kind.FAILURE),
    "529": (overloaded(), Kind.FAILURE),
    "429": (rate_limited(retry_after=7), Kind.THROTTLED),
    "quota": (quota_exceeded(), Kind.BILLING),
    "401": (Status(401), Kind.AUTH),
    "400": (Status(400), Kind.REQUEST),
    "reset": (Reset(), Kind.FAILURE),
    "rubbish": (cut_json(), Kind.FAILURE),
}


def judge(evidence):
    """Return the verdict, formed while the loop's clients are open, and the thread."""
    return classify(evidence.error, handed_off=evidence.handed_off), threading.get_ident()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_failure_is_heard_once_before_its_caller_sees_it(provider, send, prefix, fault):
    """In the caller's own thread, with provider and endpoint, and judged like the error."""
    fault, kind = FAULTS[fault]
    provider.always(fault)
    order = []
    sighting = providers.observe(lambda evidence: order.append((evidence, judge(evidence))))
    with pytest.raises(litellm.exceptions.openai.OpenAIError) as caught:
        send(prefix, sighting.tags())
    order.append("raised")
    (evidence, (verdict, thread)), last = order
    assert (last, thread) == ("raised", threading.get_ident())
    assert evidence.error is caught.value
    assert (evidence.handed_off, evidence.provider) == (True, prefix)
    assert evidence.endpoint.startswith(provider.url)
    assert verdict.kind is kind
    assert verdict.retry_after == (7.0 if kind is Kind.THROTTLED else None)
    sighting.close()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_refused_connection_is_heard(provider, send, prefix):
    """Nobody listens: a failure, and the request counts as handed off."""
    provider.down("refuse")
    heard = []
    with (
        pytest.raises(litellm.InternalServerError),
        providers.watch(lambda evidence: heard.append((evidence, judge(evidence)))) as tags,
    ):
        send(prefix, tags)
    ((evidence, (verdict, _)),) = heard
    assert evidence.handed_off is True
    assert verdict.outcome == Outcome.FAILURE


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_timeout_is_heard(provider, send, prefix):
    """The client's own timeout, and how long it took by LiteLLM's clock."""
    provider.down("hang")
    heard = []
    with pytest.raises(litellm.Timeout), providers.watch(heard.append) as tags:
        send(prefix, tags, timeout=0.2)
    (evidence,) = heard
    verdict = classify(evidence.error, handed_off=True, seconds=evidence.seconds, timeout=0.2)
    assert (verdict.kind, verdict.outcome) == (Kind.TIMEOUT, Outcome.FAILURE)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_stream_that_is_refused_is_heard(provider, send, prefix):
    """Before the first byte a stream fails like any call."""
    provider.always(Status(500))
    heard = []
    with pytest.raises(litellm.InternalServerError), providers.watch(heard.append) as tags:
        send(prefix, tags, stream=True)
    assert len(heard) == 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_success_is_not_heard(send, prefix):
    """The return path is the authority for success."""
    heard = []
    with providers.watch(heard.append) as tags:
        assert send(prefix, tags).choices[0].message.content == "Paris"
    assert heard == []


@pytest.mark.parametrize("prefix", [*PREFIXES, "groq", "gemini", "hosted_vllm", "openrouter"])
def test_nothing_of_ours_is_sent(provider, send, prefix):
    """No tag in body, headers or path of the one request."""
    with providers.watch(print, True, {"litellm_metadata": {"theirs": "x"}}) as tags:
        send(prefix, tags)
    (request,) = provider.requests
    sent = f"{request.path} {dict(request.headers)} {request.body}"
    for ours in (tags["litellm_call_id"], "dspy_resilient", "litellm_metadata", "max_retries"):
        assert ours not in sent


def replace_with_another():
    litellm.callbacks = [CustomLogger()]


def reset_all():
    litellm.logging_callback_manager._reset_all_callbacks()


def empty_all():
    for name in LISTS:
        setattr(litellm, name, [])


def crowd_out():
    for name in LISTS:
        setattr(litellm, name, [CustomLogger() for _ in range(120)])


@pytest.mark.parametrize(
    "wipe", [replace_with_another, reset_all, empty_all, crowd_out, providers.unregister]
)
def test_the_observer_comes_back(provider, send, wipe):
    """Whatever somebody does to LiteLLM's lists, the next attempt is heard of."""
    provider.always(Status(500))
    wipe()
    heard = []
    with pytest.raises(litellm.InternalServerError), providers.watch(heard.append) as tags:
        send("openai", tags)
    assert len(heard) == 1


def test_others_stay_where_they_are(provider):
    """Registering and leaving touch nobody else's callback."""
    other = CustomLogger()
    litellm.callbacks = [other]
    providers.ensure_registered()
    providers.ensure_registered()
    assert litellm.callbacks[0] is other
    assert len(litellm.callbacks) == 2
    providers.unregister()
    assert litellm.callbacks == [other]
    assert not any(
        "dspy_resilient" in type(c).__module__ for n in LISTS for c in getattr(litellm, n)
    )


def test_a_hundred_clients_take_one_place(make):
    """LiteLLM has a hundred in all, and lets nobody else in after that."""
    for _ in range(101):
        make(cache=False)("?")
    for name in LISTS:
        assert sum("dspy_resilient" in type(c).__module__ for c in getattr(litellm, name)) == 1


def test_a_list_that_is_none_is_left_alone(monkeypatch):
    """Somebody's odd assignment must not fail a call."""
    monkeypatch.setattr(litellm, "input_callback", None)
    providers.ensure_registered()
    providers.unregister()
    assert litellm.input_callback is None


def test_registered_twice_is_heard_once(provider, send):
    """Two threads that register at once, or a user's copied list, do not double a failure."""
    provider.always(Status(500))
    providers.ensure_registered()
    for name in LISTS:
        setattr(litellm, name, getattr(litellm, name) * 2)
    heard = []
    with pytest.raises(litellm.InternalServerError), providers.watch(heard.append) as tags:
        send("openai", tags)
    assert len(heard) == 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_missing_key_is_not_handed_off(monkeypatch, provider, send, prefix):
    """LiteLLM calls it a 500 or a 401, but nobody was asked."""
    monkeypatch.delenv(f"{prefix.upper()}_API_KEY")
    heard = []
    with (
        pytest.raises(litellm.exceptions.openai.OpenAIError),
        providers.watch(heard.append) as tags,
    ):
        send(prefix, tags, api_key=None)
    (evidence,) = heard
    assert evidence.handed_off is False
    assert classify(evidence.error, handed_off=False).kind is Kind.LOCAL
    assert provider.count == 0


def test_a_missing_package_is_not_handed_off(monkeypatch, send):
    """Nor is a call for which a package is missing, or of an unknown provider."""
    monkeypatch.setitem(sys.modules, "botocore", None)
    for prefix in ("sagemaker", "nonsense"):
        heard = []
        with pytest.raises(Exception, match=r".") as caught, providers.watch(heard.append) as tags:
            send(prefix, tags)
        assert [evidence.handed_off for evidence in heard] == [False]
        assert classify(caught.value, handed_off=False).kind is Kind.LOCAL


def test_a_fault_of_the_listener_stays_here(provider, send, caplog):
    """What `on_failure` raises reaches neither the caller nor, with its text, the log."""
    provider.always(Status(500))

    def broken(evidence):
        raise RuntimeError("my secret")

    with pytest.raises(litellm.InternalServerError), providers.watch(broken) as tags:
        send("openai", tags)
    assert "RuntimeError" in caplog.text
    assert "my secret" not in caplog.text


def test_after_close_nothing_is_heard(provider, send):
    """A late event finds nobody."""
    provider.always(Status(500))
    heard = []
    sighting = providers.observe(heard.append)
    sighting.close()
    sighting.close()
    with pytest.raises(litellm.InternalServerError):
        send("openai", sighting.tags())
    assert heard == []


def test_a_call_id_of_the_users_own_is_no_obstacle(provider, send):
    """The metadata is the second tag, for a call whose id is somebody else's."""
    provider.always(Status(500))
    heard = []
    with pytest.raises(litellm.InternalServerError), providers.watch(heard.append) as tags:
        send("openai", {**tags, "litellm_call_id": "theirs"})
    assert len(heard) == 1


def test_metadata_of_the_users_own_is_kept():
    """Tags are fresh each time and swallow nothing."""
    theirs = {"trace": "x"}
    sighting = providers.observe(print)
    first, second = (sighting.tags({"litellm_metadata": theirs}) for _ in range(2))
    assert first["litellm_metadata"]["trace"] == "x"
    assert first["litellm_metadata"] is not second["litellm_metadata"]
    assert theirs == {"trace": "x"}
    sighting.close()


async def test_a_cancelled_call_is_not_heard(provider):
    """Cancellation fires nothing; the permit is for the caller to release."""
    provider.down("hang")
    heard = []
    with providers.watch(heard.append) as tags:
        call = litellm.acompletion(
            model="openai/test",
            messages=[{"role": "user", "content": "x"}],
            api_base=provider.api_base,
            api_key="key",
            num_retries=0,
            **tags,
        )
        task = asyncio.ensure_future(call)
        await asyncio.to_thread(provider.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await close_litellm_async_clients()
    assert heard == []


@pytest.mark.parametrize("prefix", ["openai", "azure"])
def test_an_attempt_is_one_request(provider, send, prefix):
    """Also where somebody's earlier call has taught LiteLLM's cached client to retry."""
    provider.always(Status(500))
    more = {"api_version": "2024-02-01"} if prefix == "azure" else {}
    with pytest.raises(litellm.exceptions.openai.OpenAIError):
        send(prefix, {}, num_retries=None, **more)
    assert provider.count > 1
    provider.clear()
    with (
        pytest.raises(litellm.exceptions.openai.OpenAIError),
        providers.watch(print, True, {"model": f"{prefix}/test"}) as tags,
    ):
        send(prefix, tags, **more)
    assert provider.count == 1


def test_azure_keeps_the_users_identity(monkeypatch):
    """What sets our Azure clients apart in LiteLLM's cache changes nobody's login."""
    sighting = providers.observe(print)
    monkeypatch.delenv("AZURE_USERNAME", raising=False)
    assert sighting.tags({"model": "azure/x"})["azure_username"] == ""
    monkeypatch.setenv("AZURE_USERNAME", "me")
    assert sighting.tags({"model": "azure/x"})["azure_username"] == "me"
    assert "azure_username" not in sighting.tags({"model": "azure/x", "azure_username": "you"})
    assert "azure_username" not in sighting.tags({"model": "openai/x"})
    sighting.close()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_reset_is_heard_once_even_where_litellm_sends_again(provider, send, prefix):
    """LiteLLM 1.106 re-sends silently after an async reset; it stays one failure."""
    provider.always(Reset())
    heard = []
    with (
        pytest.raises(litellm.exceptions.openai.OpenAIError),
        providers.watch(heard.append) as tags,
    ):
        send(prefix, tags)
    assert len(heard) == 1
    assert provider.count <= (1 if prefix == "openai" else 2)


def test_two_hundred_event_loops_leave_nothing(provider):
    """One `asyncio.run` per call: every failure is heard, nothing is kept."""

    async def call(tags, **outcome):
        messages = [{"role": "user", "content": "x"}]
        await litellm.acompletion("openai/test", messages, num_retries=0, **tags, **outcome)

    heard = []
    for number in range(200):
        with providers.watch(heard.append) as tags:
            if number % 2:
                with pytest.raises(litellm.InternalServerError):
                    asyncio.run(call(tags, mock_response="litellm.InternalServerError"))
            else:
                asyncio.run(call(tags, mock_response="fine"))
    assert len(heard) == 100
    assert observer._observer._sightings == {}


def test_a_sighting_that_nobody_closed_goes_with_its_watcher():
    """Ctrl-C may strike between the two; what is left must not keep the client."""
    sighting = providers.observe([].append)
    assert list(observer._observer._sightings.values()) == [sighting]
    del sighting
    gc.collect()
    assert observer._observer._sightings == {}


def test_every_thread_hears_its_own_failures(provider):
    """Sixteen threads, one provider that answers and one that fails: nothing is mixed up."""

    def work(thread):
        for number in range(10):
            place = (broken if (thread + number) % 3 == 0 else provider).api_base
            heard = []
            with providers.watch(heard.append) as tags:
                try:
                    litellm.completion(
                        "openai/test",
                        [{"role": "user", "content": "x"}],
                        api_base=place,
                        api_key="key",
                        num_retries=0,
                        **tags,
                    )
                except litellm.InternalServerError:
                    assert [evidence.endpoint for evidence in heard] == [endpoint_name(place)]
                else:
                    assert heard == []

    with Provider(faults=()) as broken, ThreadPoolExecutor(16) as pool:
        broken.always(Status(500))
        list(pool.map(work, range(16)))
    assert observer._observer._sightings == {}


def test_without_keywords_the_context_tells(provider, ask):
    """A typed Request carries no tags, so its attempt is found by where it runs."""
    providers.load()
    provider.always(Status(503))
    lm = dspy.LM(
        "openai/test",
        engine="litellm",
        api_base=provider.api_base,
        api_key="key",
        cache=False,
        num_retries=0,
    )
    request = dspy.lm15.Request(model="openai/test", messages=(dspy.lm15.Message.user("x"),))
    heard = []
    with (
        pytest.raises(dspy.LMServerError),
        providers.watch(heard.append, by_keywords=False, service=here(provider)) as tags,
    ):
        ask(lm, request)
    assert tags == {}
    (evidence,) = heard
    assert (evidence.handed_off, evidence.provider) == (True, "openai")


def test_dspy_carries_the_tags(provider, ask):
    """Tags survive DSPy's deep copies, and its error is judged like LiteLLM's."""
    provider.always(rate_limited(retry_after=7))
    lm = dspy.LM(
        "openai/test",
        engine="litellm",
        api_base=provider.api_base,
        api_key="key",
        cache=False,
        num_retries=0,
    )
    heard = []
    with providers.watch(heard.append) as tags:
        lm.kwargs.update(tags)
        with pytest.raises(dspy.LMRateLimitError) as caught:
            ask(lm, "x")
    (evidence,) = heard
    verdict = classify(evidence.error, handed_off=evidence.handed_off)
    assert verdict == classify(caught.value)
    assert (verdict.kind, verdict.retry_after) == (Kind.THROTTLED, 7.0)


def here(provider, name="openai"):
    """Where the local provider is."""
    return providers.Service(f"{name}/test", name, provider.api_base)


class Subscriber:
    """Remembers what it hears, as a circuit would count it."""

    def __init__(self):
        self.heard = []
        self.news = threading.Event()

    def subscribe(self, service):
        return providers.subscribe(service, hear, self)


def hear(subscriber, evidence, succeeded):
    subscriber.heard.append((evidence, succeeded))
    subscriber.news.set()


def elsewhere(provider, **more):
    """Make a call of LiteLLM's that is no attempt of ours."""
    arguments = {"api_base": provider.api_base, "api_key": "key", "num_retries": 0, **more}
    return litellm.completion("openai/test", [{"role": "user", "content": "x"}], **arguments)


def test_a_subscriber_hears_of_everybody_elses_calls(provider):
    """Successes and failures, chats and embeddings, but no attempt of ours."""
    subscriber = Subscriber()
    end = subscriber.subscribe(here(provider))
    with providers.watch(print) as tags:
        elsewhere(provider, **tags)
    elsewhere(provider)
    assert subscriber.news.wait(10)
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        elsewhere(provider)
    with pytest.raises(litellm.InternalServerError):
        litellm.embedding(
            "openai/test", ["x"], api_base=provider.api_base, api_key="key", max_retries=0
        )
    end()
    end()
    with pytest.raises(litellm.InternalServerError):
        elsewhere(provider)
    assert [succeeded for _, succeeded in subscriber.heard] == [True, False, False]
    assert {evidence.provider for evidence, _ in subscriber.heard} == {"openai"}


def test_a_subscriber_hears_of_its_own_place_only(provider):
    """Another endpoint, or another provider at the same one, is none of its business."""
    mine, there, anthropic, default = (Subscriber() for _ in range(4))
    ends = [
        mine.subscribe(here(provider)._replace(url=f"{provider.api_base}/")),
        there.subscribe(here(provider)._replace(url=f"{provider.api_base}2")),
        anthropic.subscribe(here(provider, "anthropic")),
        default.subscribe(here(provider)._replace(url="")),
    ]
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        elsewhere(provider)
    for end in ends:
        end()
    assert [len(s.heard) for s in (mine, there, anthropic, default)] == [1, 0, 0, 0]


def test_a_dead_subscriber_disappears(provider):
    """A subscription ends with its subscriber."""
    gone, left = Subscriber(), Subscriber()
    gone.subscribe(here(provider))
    del gone
    gc.collect()
    end = left.subscribe(here(provider))
    assert len(observer._observer._subscriptions) == 1
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        elsewhere(provider)
    assert len(left.heard) == 1
    end()


def test_a_circuit_that_subscribes_again_hears_once(provider):
    """However many clients, routes and keys share it; at another place it subscribes anew."""
    subscriber = Subscriber()
    ends = [subscriber.subscribe(here(provider)) for _ in range(5)]
    ends.append(subscriber.subscribe(here(provider)._replace(url=f"{provider.api_base}2")))
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        elsewhere(provider)
    assert len(subscriber.heard) == 1
    for end in ends:
        end()
    assert observer._observer._subscriptions == ()


HOMES = {
    "openai": "https://api.openai.com/v1/chat/completions",
    "anthropic": "https://api.anthropic.com/v1/messages",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/models/m:generateContent",
    "groq": "https://api.groq.com/openai/v1",
    "mistral": "https://api.mistral.ai/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "deepinfra": "https://api.deepinfra.com/v1/openai",
    "xai": "https://api.x.ai/v1",
    "cohere": "https://api.cohere.com/v2/chat",
    "replicate": "https://api.replicate.com/v1",
}


@pytest.mark.parametrize("name", HOMES)
def test_a_providers_own_address_is_known_and_no_local_server_is_it(name):
    """LiteLLM tells where it is; of those it does not tell of, what is nearby is not it."""
    service = providers.Service(f"{name}/m", name)

    def event(endpoint):
        return providers.CallbackEvent(None, True, True, provider_name(name), endpoint)

    assert service.answers(event(HOMES[name]))
    assert not service.answers(event("http://127.0.0.1:8000/v1"))
    assert not service.answers(event("http://vllm:8000/v1"))
    assert not providers.Service("azure/m", "azure").answers(event(HOMES[name]))


@pytest.mark.parametrize("model", ["gpt-4o-mini", "claude-sonnet-4-5"])
def test_who_serves_a_model_without_a_prefix_is_known(model):
    """LiteLLM knows."""
    name = "openai" if model.startswith("gpt") else "anthropic"
    event = providers.CallbackEvent(None, True, True, name, HOMES[name])
    assert providers.Service(model, "").answers(event)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("http://user:pw@127.0.0.1:8000/v1?key=secret#x", "http://127.0.0.1:8000/v1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("HTTP://Example.COM", "http://example.com"),
        ("http://host:port/v1", None),
        ("no url", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_an_endpoint_is_named_without_secrets(url, name):
    """Scheme, host, port and path; never a query or a login."""
    assert endpoint_name(url) == name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_with_nothing():
    """The parent's attempts do not run there, and its ids are not used again."""
    sighting = providers.observe(print)
    child = os.fork()
    if child == 0:
        mine = providers.observe(print)
        fresh = list(observer._observer._sightings) == [mine.call_id]
        os._exit(0 if fresh and mine.call_id[:23] != sighting.call_id[:23] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sighting.call_id in observer._observer._sightings
    sighting.close()


def test_litellm_is_not_imported_for_another_engine():
    """Watching an attempt that carries no keywords loads nothing."""
    script = """if True:
        import sys
        from dspy_resilient import providers
        with providers.watch(print, by_keywords=False):
            assert not providers.loaded()
        assert "litellm" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)


def test_loading_leaves_litellms_settings_to_dspy(monkeypatch):
    """DSPy makes its own, once; we make none."""
    names = ("telemetry", "cache", "suppress_debug_info", "disable_hf_tokenizer_download")
    for name in names:
        monkeypatch.setattr(litellm, name, "as it was")
    Hook(print, bool).load()
    assert {getattr(litellm, name) for name in names} == {"as it was"}
