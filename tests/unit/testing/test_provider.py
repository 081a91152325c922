"""The test kit's own promises: the clock, and the provider as seen over bare HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import socket
import threading
import warnings

import pytest

from dspy_resilient.testing import (
    BadChunk,
    Chaos,
    Clock,
    Close,
    CutStream,
    Empty,
    EmptyText,
    Filtered,
    Garbage,
    Hang,
    Hold,
    NoChoices,
    Provider,
    Reply,
    Reset,
    Slow,
    StallStream,
    Status,
    ToolCall,
    Truncated,
    content_refused,
    context_too_long,
    cut_json,
    overloaded,
    quota_exceeded,
    rate_limited,
)

DESCRIPTORS = pathlib.Path("/proc/self/fd")
CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello big world"}]}


@pytest.fixture
def provider():
    with Provider("one two three four") as running:
        yield running


def port(provider):
    return int(provider.url.rpartition(":")[2])


def dial(provider):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port(provider), timeout=10))


def exchange(connection, body=HELLO, path=CHAT):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def post(provider, body=HELLO, path=CHAT):
    with dial(provider) as connection:
        return exchange(connection, body, path)


def say(provider, **extra):
    return json.loads(post(provider, {**HELLO, **extra})[2])


def text(provider, **extra):
    return say(provider, **extra)["choices"][0]["message"]["content"]


def in_thread(function):
    """Run `function` in a thread and return what joins it and hands out its result or error."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except Exception as error:  # handed to the test
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join()
        return outcome[0]

    return result


def descriptors():
    return {entry.name for entry in DESCRIPTORS.iterdir()}


# --- the clock


def test_the_clock_stands_still_until_it_is_advanced():
    """Time is what the test says it is."""
    clock = Clock(3)
    assert clock() == clock() == 3.0
    assert clock.advance(2.5) == clock() == 5.5


def test_the_clock_never_goes_back():
    """A monotonic clock has no negative steps."""
    with pytest.raises(ValueError, match="at least 0; got -1"):
        Clock().advance(-1)


def test_no_advance_is_lost_between_threads():
    """The clock may be moved from any thread."""
    clock = Clock()
    joins = [in_thread(lambda: [clock.advance(1) for _ in range(500)]) for _ in range(8)]
    for join in joins:
        join()
    assert clock() == 4000.0


# --- starting and stopping


def test_nothing_runs_before_start():
    """Construction opens no socket and starts no thread, so there is no address either."""
    threads = set(threading.enumerate())
    provider = Provider()
    assert set(threading.enumerate()) <= threads
    with pytest.raises(RuntimeError, match="before start"):
        provider.url  # noqa: B018  # the property is what raises


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="needs /proc")
def test_stop_leaves_no_thread_and_no_descriptor():
    """What the provider opens it gives back, whatever its connections were doing."""
    threads, open_before = set(threading.enumerate()), descriptors()
    provider = Provider("hi", faults=[None, Hang(), StallStream()]).start()
    with dial(provider) as idle, dial(provider) as hung, dial(provider) as stalled:
        exchange(idle)
        for connection in (hung, stalled):
            connection.request("POST", CHAT, b"{}")
        provider.wait_for(3)
        provider.stop()
    assert set(threading.enumerate()) <= threads
    assert descriptors() <= open_before


def test_stop_does_not_wait_for_hanging_requests(provider):
    """A caller of a hung provider is dropped the moment the provider stops."""
    provider.always(Hang())
    answer = in_thread(lambda: post(provider))
    provider.wait_for(1)
    provider.stop()
    assert isinstance(answer(), (ConnectionError, http.client.HTTPException))


def test_stop_is_idempotent_and_start_is_not(provider):
    """Stopping what is stopped is fine; starting what runs is a mistake."""
    with pytest.raises(RuntimeError, match="runs already"):
        provider.start()
    provider.stop()
    provider.stop()


def test_a_restart_keeps_the_port(provider):
    """A client configured with the address finds the restarted provider there."""
    url = provider.url
    post(provider)
    provider.stop()
    provider.start()
    assert provider.url == url
    assert text(provider) == "one two three four"


def test_two_providers_do_not_know_each_other(provider):
    """Answers, faults and counts belong to one provider."""
    with Provider("other") as other:
        other.always(Status(500))
        assert text(provider) == "one two three four"
        assert post(other)[0] == 500
        assert (provider.count, other.count) == (1, 1)
        other.stop()
        assert text(provider) == "one two three four"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_port_open(provider):
    """After a fork the parent's provider still serves, vanishes and comes back alone."""
    with dial(provider) as connection:
        exchange(connection)
        read_end, write_end = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking a threaded process
            child = os.fork()
        if child == 0:
            os.close(write_end)
            provider.stop()  # nothing to stop here
            os.read(read_end, 1)
            os._exit(0)
        os.close(read_end)
        try:
            assert exchange(connection)[0] == 200
            provider.down("refuse")
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                exchange(connection)
            with pytest.raises(ConnectionRefusedError):
                post(provider)
            provider.up()
            assert post(provider)[0] == 200
        finally:
            os.close(write_end)
            os.waitpid(child, 0)


# --- outages


def test_a_refusing_provider_drops_and_refuses_connections_and_comes_back(provider):
    """down("refuse") is a dead process; up() is its restart on the same port."""
    with dial(provider) as connection:
        exchange(connection)
        provider.down()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            exchange(connection)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            post(provider)
    provider.up()
    assert text(provider) == "one two three four"
    assert provider.count == 2


def test_a_refusing_provider_keeps_its_port(provider):
    """While the provider is away, nobody else can be given its port."""
    provider.down()
    with contextlib.closing(socket.socket()) as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", port(provider)))


@pytest.mark.parametrize(
    ("mode", "meets"),
    [
        ("reset", ConnectionResetError),
        ("500", 500),
        (Status(503), 503),
        (Close(), http.client.RemoteDisconnected),
    ],
)
def test_an_outage_meets_every_request_and_counts_it(provider, mode, meets):
    """Requests sent to a provider that is down are seen by it, and the script waits."""
    provider.script(Status(418))
    provider.down(mode)
    for _ in range(2):
        if isinstance(meets, int):
            assert post(provider)[0] == meets
        else:
            with pytest.raises(meets):
                post(provider)
    assert provider.count == 2
    provider.up()
    assert [post(provider)[0] for _ in range(2)] == [418, 200]


def test_a_hanging_provider_says_nothing(provider):
    """down("hang") accepts a request and leaves the caller alone with it."""
    provider.down("hang")
    connection = http.client.HTTPConnection("127.0.0.1", port(provider), timeout=0.05)
    with contextlib.closing(connection), pytest.raises(TimeoutError):
        exchange(connection)
    provider.up()
    assert [request.status for request in provider.requests] == [None]


def test_a_provider_can_be_down_from_the_start():
    """down() before start() holds when it starts."""
    provider = Provider()
    provider.down()
    with provider:
        with pytest.raises(ConnectionRefusedError):
            post(provider)
        provider.up()
        assert post(provider)[0] == 200


def test_an_answer_function_may_take_its_provider_down():
    """The controls work on the provider's own thread too."""

    def answer(body):
        provider.down()
        return "lost"

    with Provider(answer) as provider:
        for error in ((ConnectionError, http.client.HTTPException), ConnectionRefusedError):
            with pytest.raises(error):
                post(provider)


def test_an_answer_function_cannot_stop_its_provider(caplog):
    """The provider's thread cannot wait for its own end, and says so."""
    with Provider(lambda body: provider.stop()) as provider:
        assert post(provider)[0] == 500
    assert "cannot stop its own provider" in caplog.text


@pytest.mark.parametrize("wrong", ["429", 503, object()])
def test_what_is_not_a_fault_is_refused(provider, wrong):
    """A typing mistake in a test must not look like a healthy provider."""
    with pytest.raises(TypeError, match="expected a fault"):
        provider.script(Reset(), wrong)
    with pytest.raises(TypeError, match="expected a fault"):
        provider.always(wrong)
    with pytest.raises((TypeError, ValueError), match="Provider: "):
        provider.down(wrong)
    with pytest.raises(TypeError, match="expected a fault"):
        Provider(faults=[wrong])
    assert post(provider)[0] == 200


# --- faults


def test_the_script_is_used_up_in_order_and_then_always_rules(provider):
    """One scripted fault per request; None stands for a normal answer."""
    provider.script(Status(500), None)
    provider.script(Status(502))
    provider.always(Status(503))
    assert [post(provider)[0] for _ in range(5)] == [500, 200, 502, 503, 503]
    provider.always(None)
    assert post(provider)[0] == 200


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (rate_limited(7), 429, "rate_limit_exceeded"),
        (overloaded(), 529, None),
        (quota_exceeded(), 429, "insufficient_quota"),
        (quota_exceeded(402), 402, "insufficient_quota"),
        (context_too_long(), 400, "context_length_exceeded"),
        (content_refused(), 400, "content_policy_violation"),
        (Status(401), 401, "invalid_api_key"),
        (Status(418, headers={"x-tea": "pot"}), 418, None),
    ],
)
def test_an_error_has_the_body_its_dialect_gives_it(provider, fault, status, code):
    """Errors carry the codes that clients look for, and the headers they were given."""
    provider.script(fault)
    sent, headers, body = post(provider)
    assert sent == status
    assert json.loads(body)["error"]["code"] == code
    assert headers.get("retry-after") == ("7" if fault.retry_after else None)
    assert fault.headers.items() <= headers.items()


def test_an_error_may_have_any_body(provider):
    """`body` replaces the dialect's own."""
    provider.script(Status(503, body="<h1>no</h1>", headers={"content-type": "text/html"}))
    assert post(provider)[1:] == (
        {"content-length": "11", "content-type": "text/html"},
        b"<h1>no</h1>",
    )


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Reset(), ConnectionResetError),
        (Close(), http.client.RemoteDisconnected),
        (Hang(0), http.client.RemoteDisconnected),
        (CutStream(), http.client.IncompleteRead),
        (CutStream(how="eof"), http.client.IncompleteRead),
        (CutStream(how="reset"), ConnectionResetError),
        (CutStream(0, "reset"), ConnectionResetError),
    ],
)
def test_a_broken_connection_looks_broken(provider, fault, error):
    """Resets, closings and bodies that end too early reach the caller as such."""
    provider.script(fault)
    with pytest.raises(error):
        post(provider)
    assert text(provider) == "one two three four"


@pytest.mark.parametrize("fault", [Garbage(), cut_json(), Empty(), BadChunk()])
def test_a_spoilt_answer_is_a_200_that_is_not_json(provider, fault):
    """Some failures hide behind a good status."""
    provider.script(fault)
    status, _, body = post(provider)
    assert status == 200
    with pytest.raises(ValueError, match="line 1"):
        json.loads(body)


@pytest.mark.parametrize(
    ("fault", "content", "finish"),
    [
        (Truncated(), "one two ", "length"),
        (Filtered(), "", "content_filter"),
        (EmptyText(), "", "stop"),
        (Slow(0), "one two three four", "stop"),
        (StallStream(seconds=0), "one two three four", "stop"),
    ],
)
def test_a_poor_answer_is_well_formed(provider, fault, content, finish):
    """What the model did badly is still a proper response."""
    provider.script(fault)
    (choice,) = say(provider)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, finish)


def test_an_answer_without_choices_is_well_formed(provider):
    """NoChoices keeps everything but the choices."""
    provider.script(NoChoices())
    assert say(provider)["choices"] == []


def test_held_requests_go_when_they_are_released(provider):
    """Hold lets a test decide the moment of an answer, without sleeping."""
    hold = Hold()
    provider.always(hold)
    answers = [in_thread(lambda: post(provider)[0]) for _ in range(3)]
    provider.wait_for(3)
    assert [request.status for request in provider.requests] == [None] * 3
    hold.release()
    hold.release()
    assert [answer() for answer in answers] == [200] * 3
    assert post(provider)[0] == 200


def test_a_held_request_may_end_badly(provider):
    """`then` says what follows a wait, also through several."""
    hold = Hold(then=Slow(0, then=Status(502)))
    provider.script(hold)
    answer = in_thread(lambda: post(provider)[0])
    provider.wait_for(1)
    hold.release()
    assert answer() == 502


def test_a_hold_may_be_released_after_the_provider_stopped(provider):
    """Teardown order does not matter."""
    hold = Hold()
    provider.always(hold)
    answer = in_thread(lambda: post(provider))
    provider.wait_for(1)
    provider.stop()
    assert isinstance(answer(), Exception)
    hold.release()


def test_chaos_is_the_same_for_the_same_seed():
    """Chaos picks by seed and request number, so a failing run can be run again."""
    picks = [Chaos(seed=1, rate=0.5).pick(n) for n in range(200)]
    assert picks == [Chaos(seed=1, rate=0.5).pick(n) for n in range(200)]
    assert picks != [Chaos(seed=2, rate=0.5).pick(n) for n in range(200)]
    assert 60 < sum(pick is not None for pick in picks) < 140


@pytest.mark.parametrize(("rate", "statuses"), [(0, {200}), (1, {500})])
def test_chaos_keeps_to_its_rate(provider, rate, statuses):
    """Rate 0 is peace and rate 1 is trouble, from the given faults only."""
    provider.always(Chaos(rate=rate, faults=(Status(500),)))
    assert {post(provider)[0] for _ in range(5)} == statuses


# --- streams


def stream(provider, **extra):
    body = post(provider, {**HELLO, "stream": True, **extra})[2].decode()
    return [line.removeprefix("data: ") for line in body.split("\n\n") if line]


def test_a_stream_sends_word_by_word_and_ends_properly(provider):
    """One chunk per word, then the finish reason, the usage if asked for, and [DONE]."""
    *words, last, done = stream(provider)
    said = [json.loads(word)["choices"][0]["delta"]["content"] for word in words]
    assert said == ["one ", "two ", "three ", "four"]
    assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"
    *_, usage, done = stream(provider, stream_options={"include_usage": True})
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["total_tokens"] == 7


def test_a_stream_cut_at_a_clean_end_is_just_short(provider):
    """how="eof" is the treacherous cut: HTTP sees nothing wrong."""
    provider.script(CutStream(2, "eof"))
    assert len(stream(provider)) == 2


@pytest.mark.parametrize(
    ("how", "error"), [("close", http.client.IncompleteRead), ("reset", ConnectionResetError)]
)
def test_a_stream_cut_in_the_middle_is_an_error(provider, how, error):
    """The other cuts are visible to HTTP."""
    provider.script(CutStream(2, how))
    with pytest.raises(error):
        stream(provider)


def test_a_bad_chunk_comes_between_good_ones(provider):
    """BadChunk spoils one event and leaves the rest."""
    provider.script(BadChunk(1, data="{oops"))
    assert stream(provider)[1] == "{oops"
    provider.script(StallStream(1, seconds=0))
    assert len(stream(provider)) == 6


# --- answers


def test_usage_counts_words(provider):
    """Token numbers can be worked out by hand."""
    usage = say(provider)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 4, 7)


def test_the_model_is_echoed_from_body_or_path(provider):
    """Azure and Gemini name the model in the path."""
    assert say(provider)["model"] == "m"
    body = {"messages": HELLO["messages"]}
    _, _, raw = post(provider, body, "/openai/deployments/gpt-x/chat/completions?api-version=1")
    assert json.loads(raw)["model"] == "gpt-x"


def test_an_answer_function_sees_the_request_and_may_say_more_than_text():
    """Text, reasoning and tool calls, in OpenAI's shape or the short one, or a Reply."""
    said = {
        "text": {"text": "hi", "reasoning": "hm"},
        "tools": {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        "openai": {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        "reply": Reply(tool_calls=(ToolCall("f", {"x": 1}),), finish="tool_calls"),
    }
    with Provider(lambda body: said[body["model"]]) as provider:
        message = say(provider, model="text")["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("hi", "hm")
        for model in ("tools", "openai", "reply"):
            (choice,) = say(provider, model=model)["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
            assert choice["finish_reason"] == "tool_calls"


def test_several_choices_may_differ():
    """A list answers n choices one after the other, and again from the start."""
    with Provider(["a", "b"]) as provider:
        choices = say(provider, n=3)["choices"]
        assert [choice["message"]["content"] for choice in choices] == ["a", "b", "a"]


@pytest.mark.parametrize(
    "answer", [lambda body: 1 / 0, lambda body: 42, []], ids=["raises", "number", "nothing"]
)
def test_a_failing_answer_function_is_a_500_and_a_log_line(caplog, answer):
    """A mistake in a test's own function neither hangs the caller nor goes unseen."""
    with Provider(answer) as provider:
        status, _, body = post(provider)
    assert status == 500
    assert b"no answer could be made" in body
    assert "answer_failed" in caplog.text


def test_latency_comes_before_any_answer(provider):
    """The provider can be made slower at any time."""
    provider.latency = 0.02
    answer = in_thread(lambda: post(provider)[0])
    provider.wait_for(1)
    assert answer() == 200


def test_an_unknown_path_is_not_found(provider):
    """Only the known dialects are served."""
    assert post(provider, path="/v1/unknown")[0] == 404


# --- what is remembered


def test_requests_are_remembered_as_they_came():
    """Time, path, lower-case headers, parsed body, connection and status of each request."""
    clock = Clock(9)
    with Provider("hi", clock=clock, faults=[None, Status(500)]) as provider:
        post(provider, path=CHAT + "?x=1")
        clock.advance(1)
        post(provider, b"not json")
        first, second = provider.requests
        assert (first.at, first.method, first.path) == (9.0, "POST", CHAT)
        assert (first.headers["content-type"], first.body) == ("application/json", HELLO)
        assert (first.connection, first.status) == (1, 200)
        assert (second.at, second.body, second.connection, second.status) == (10.0, {}, 2, 500)
        assert "messages" not in repr(first)


def test_clear_counts_from_zero():
    """Counts and the list start anew; the script stays."""
    with Provider("hi", faults=[None, Status(500)]) as provider:
        post(provider)
        assert (provider.count, provider.connections, len(provider.requests)) == (1, 1, 1)
        provider.clear()
        assert (provider.count, provider.connections, provider.requests) == (0, 0, [])
        assert post(provider)[0] == 500
        assert (provider.count, provider.connections) == (1, 1)


def test_only_the_newest_requests_are_kept():
    """A long benchmark does not fill the memory; counting goes on."""
    with Provider("hi", keep=2) as provider:
        for number in range(4):
            post(provider, {**HELLO, "model": str(number)})
        assert [request.body["model"] for request in provider.requests] == ["2", "3"]
        assert provider.count == 4


def test_waiting_for_requests_that_do_not_come_ends(provider):
    """wait_for gives up, and says how many came."""
    with pytest.raises(TimeoutError, match="0 of 1 requests"):
        provider.wait_for(1, timeout=0.01)


def test_repr_shows_where_and_how_many(provider):
    """The repr is for a person in a notebook."""
    assert repr(provider) == f"<Provider {provider.url} requests=0>"
    assert repr(Provider()) == "<Provider not started requests=0>"


# --- connections


def test_many_connections_are_served_at_once_and_kept():
    """64 callers at a time, each on one connection for all its requests."""
    barrier = threading.Barrier(64)

    def caller():
        with dial(provider) as connection:
            barrier.wait()
            return [exchange(connection)[0] for _ in range(5)]

    with Provider("hi") as provider:
        callers = [in_thread(caller) for _ in range(64)]
        assert all(result() == [200] * 5 for result in callers)
        assert (provider.count, provider.connections) == (320, 64)


def raw_request(connection="keep-alive"):
    body = json.dumps(HELLO).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\nConnection: {connection}\r\n\r\n"
    )
    return head.encode() + body


def read_all(sock):
    return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_requests_may_arrive_in_any_pieces(provider, size):
    """A request may be split anywhere, and two may come in one piece."""
    raw = raw_request() + raw_request("close")
    with contextlib.closing(socket.create_connection(("127.0.0.1", port(provider)), 10)) as sock:
        for start in range(0, len(raw), size):
            sock.sendall(raw[start : start + size])
        assert read_all(sock).count(b"HTTP/1.1 200 OK") == 2
    assert (provider.count, provider.connections) == (2, 1)


@pytest.mark.parametrize(
    ("rubbish", "status"),
    [
        (b"\r\n\r\n", b"404"),
        (b"GET\r\n\r\n", b"404"),
        (b"\xff\xfe: \x00\r\nno colon\r\ncontent-length: many\r\n\r\n", b"404"),
        (b"POST " + CHAT.encode() + b" HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", b"411"),
        (b"POST " + CHAT.encode() + b" HTTP/1.1\r\ncontent-length: 2\r\n\r\n[]", b"200"),
    ],
)
def test_rubbish_gets_an_answer(provider, rubbish, status):
    """Nothing that is sent can stop the provider."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port(provider)), 10)) as sock:
        sock.sendall(rubbish)
        assert sock.recv(65536).startswith(b"HTTP/1.1 " + status)
    assert post(provider)[0] == 200


def test_a_caller_who_hangs_up_is_forgotten(provider):
    """The work for a request ends with its connection; the record stays without status."""
    provider.script(Hold())
    with contextlib.closing(socket.create_connection(("127.0.0.1", port(provider)), 10)) as sock:
        sock.sendall(raw_request())
        provider.wait_for(1)
    assert post(provider)[0] == 200
    assert [request.status for request in provider.requests] == [None, 200]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": 5},
        {"messages": [None, 3, {"content": [None, {"text": 7}]}]},
        {"n": "x"},
        {"stream": True, "stream_options": 3},
        {"prompt": {"a": 1}, "system": [[]]},
    ],
)
def test_a_nonsensical_request_does_not_hang(provider, body):
    """Whatever the body, there is a response."""
    assert post(provider, body)[0] in {200, 500}
