"""Cache keys: equal for equal requests, different for different ones, and no secret in them."""

import dataclasses
import datetime as dt
import enum
import functools
import math
import threading
from decimal import Decimal
from uuid import UUID

import pydantic
import pytest
from dspy import lm15
from hypothesis import given
from hypothesis import strategies as st

from dspy_resilient._support.canonical import stand_in
from dspy_resilient.targets.request_key import request_key

HEX = set("0123456789abcdef")


def key(prompt="hi", messages=None, request=None, **changes):
    asked = {
        "entry": "call" if request is None else "request",
        "model": "openai/gpt-4o-mini",
        "model_type": "chat",
        "where": "https://api.openai.com/v1",
        "tenant": "",
    }
    named = {name: changes.pop(name) for name in list(changes) if name in asked}
    return request_key(
        **{**asked, **named}, prompt=prompt, messages=messages, kwargs=changes, request=request
    )


def test_a_key_is_a_sha256_in_hex():
    """A key is 64 hex digits."""
    assert len(key()) == 64
    assert set(key()) <= HEX


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (key("hi"), "4cc4005d4e7586c2cd32ce88f1b657d30f4a86f51e4d8c5fcd162e29d0408a7f"),
        (
            key(None, [{"role": "user", "content": "é 你好"}], temperature=0.7, n=2),
            "49562581699385c56d10c655deaedc8ed63b94f9a2b15d00b35e5d948346b125",
        ),
        (
            key(stop={"b", "a"}, response_format=None),
            "921bb9957bd047e4fad3c4efb0c01ed1a98901e52188f4b7aa3bd32a14fa145b",
        ),
        (stand_in("sk-1234"), "4bdc00a0d1257d54a7f228d12193bb5e35cc987343f2452bdf954fc6fd39c29e"),
    ],
    ids=["prompt", "chat", "spelled out", "tenant"],
)
def test_keys_are_the_same_in_every_process(made, known):
    """A key written down by another process is still the key."""
    assert made == known


PLACES = ["entry", "model", "model_type", "where", "tenant"]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_asked_of_whom_for_whom_is_in_the_key(place):
    """Two models, endpoints, tenants or call shapes never share an answer."""
    assert key(**{place: "another"}) != key()


def test_neighbouring_parts_do_not_run_together():
    """What ends one part cannot begin the next."""
    assert key(model="ab", model_type="c") != key(model="a", model_type="bc")
    assert key("x", endpoint="", tenant="y") != key("x", endpoint="y", tenant="")


def test_order_of_settings_does_not_matter():
    """A dict is what it holds."""
    assert key(a={"x": 1, "y": 2}, b=2) == key(b=2, a={"y": 2, "x": 1})
    assert key(a={"x": {1}, "y": 2}, b=2) == key(b=2, a={"y": 2, "x": {1}})


def test_order_of_messages_and_tools_matters():
    """A list is an order."""
    assert key(tools=["a", "b"]) != key(tools=["b", "a"])


@pytest.mark.parametrize("kind", ["plain", "spelled out"])
def test_types_are_told_apart(kind):
    """30, 30.0, "30" and True are four settings."""
    more = {} if kind == "plain" else {"stop": {"end"}}
    values = [30, 30.0, "30", True, 1, 1.0, "True", False, 0, "", [], {}, [30], {"30": 30}]
    assert len({key(x=value, **more) for value in values}) == len(values)


def test_keys_of_another_type_stay_apart_from_text():
    """A logit bias for token 1 is not one for the text "1"."""
    biases = [{1: 5}, {"1": 5}, {1.0: 5}, {True: 5}, {None: 5}, {"null": 5}]
    assert len({key(logit_bias=bias) for bias in biases}) == len(biases)


def test_unset_settings_count_as_absent():
    """`lm.kwargs` holds temperature=None; that says nothing."""
    assert key(temperature=None, max_tokens=None, headers={}) == key()


def test_null_inside_a_setting_is_no_nan():
    """NaN, infinity and None are three values, though JSON would write two of them as null."""
    values = [None, math.nan, math.inf, -math.inf, "NaN", 0.0]
    assert len({key(x=[value]) for value in values}) == len(values)


def test_prompt_is_the_one_user_message_it_becomes():
    """DSPy sends a prompt as a user message, so both spellings ask the same."""
    assert key("hi") == key(None, [{"role": "user", "content": "hi"}])
    assert key("hi") == key("hi", [])
    assert key("hi") != key("ho")


@pytest.mark.parametrize(
    "name",
    [
        "cache",
        "timeout",
        "request_timeout",
        "metadata",
        "num_retries",
        "max_retries",
        "litellm_call_id",
        "litellm_metadata",
        "api_key",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "azure_ad_token",
        "azure_ad_token_provider",
        "vertex_credentials",
        "client_secret",
    ],
)
def test_what_does_not_change_the_answer_is_left_out(name):
    """Cache flag, timeouts, metadata, retries and credentials are in no key."""
    assert key(**{name: "one"}) == key(**{name: "two"}) == key()
    assert key(**{name: threading.Lock()}) == key()


@pytest.mark.parametrize(
    "name",
    [
        "rollout_id",
        "n",
        "tools",
        "response_format",
        "extra_body",
        "max_tokens",
        "max_completion_tokens",
        "stop_token_ids",
        "logit_bias",
        "prompt_cache_key",
        "seed",
        "user",
    ],
)
def test_what_may_change_the_answer_stays_in(name):
    """Every other setting counts, whether we know it or not."""
    assert len({key(), key(**{name: 1}), key(**{name: 2})}) == 3


@pytest.mark.parametrize("place", ["headers", "extra_headers", "extra_query"])
def test_headers_count_but_for_the_secret_ones(place):
    """A beta header changes the answer; a credential in a header must not enter."""
    secret = {"Authorization": "Bearer a", "X-Api-Key": "b", "cookie": "c"}
    assert key(**{place: secret}) == key()
    assert key(**{place: {**secret, "beta": "1"}}) == key(**{place: {"beta": "1"}}) != key()
    assert key(**{place: [("beta", "1")]}) not in (key(), None)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shape(pydantic.BaseModel):
    sides: int = 3


def shape_with(field):
    return pydantic.create_model("Shape", **{field: (int, ...)})


@dataclasses.dataclass
class Point:
    x: int

    def shift(self):
        return self.x


@dataclasses.dataclass
class Spot:
    x: int


def one():
    return 1


def two():
    return 2


def adder(amount):
    def add(number):
        return number + amount

    return add


@pytest.mark.parametrize(
    "values",
    [
        [shape_with("sides"), shape_with("corners"), Shape],
        [Shape(), Shape(sides=4), {"sides": 3}, Point(3)],
        [Colour.RED, Colour.BLUE],
        [b"a", b"b", "a"],
        [{"a"}, {"b"}, ["a"], frozenset({"a", "b"})],
        [Point(1), Point(2), Spot(1), {"x": 1}],
        [one, two, len, max, "one"],
        [adder(1), adder(2), adder],
        [functools.partial(adder, 1), functools.partial(adder, 2)],
        [str, int, "str"],
        [{Colour.RED}, {Colour.BLUE}, {"green"}],
        [
            dt.date(2026, 1, 1),
            dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            "2026-01-01",
            dt.time(1),
            dt.timedelta(1),
        ],
        [Decimal("1.0"), Decimal(1), UUID(int=1)],
        [Point(1).shift, Point(2).shift, Spot(1)],
    ],
    ids=lambda values: str(values[0])[:30].split(" at ")[0],
)
def test_what_json_does_not_know_counts_by_its_content(values):
    """Schemas, objects, enums, bytes, sets, dataclasses and functions are told by content."""
    keys = [key(x=value) for value in values]
    assert None not in keys
    assert len(set(keys)) == len(values)


def test_equal_content_has_equal_keys():
    """Content decides, not identity."""
    assert key(x=shape_with("sides")) == key(x=shape_with("sides"))
    assert key(x=Shape()) == key(x=Shape())
    assert key(x={"b", "a"}) == key(x={"a", "b"})
    assert key(x=adder(1)) == key(x=adder(1))
    assert key(x=(1, 2)) == key(x=[1, 2])


class Opaque:
    pass


def endless():
    loop = []
    loop.append(loop)
    return loop


def deep():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    return nested


class Angry(dict):
    def __bool__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        Opaque(),
        Opaque,
        (number for number in "abc"),
        lambda: 1,
        [].append,
        endless(),
        deep(),
        {"nested": [Opaque()]},
    ],
    ids=["lock", "object", "class", "generator", "lambda", "method", "endless", "deep", "nested"],
)
def test_what_cannot_be_told_by_content_has_no_key(value):
    """Not keyable means not cached, never an error."""
    assert key(x=value) is None


def test_messages_that_break_have_no_key():
    """Nothing that a caller passes makes the key fail the call."""
    assert key(None, Angry()) is None
    assert key(prompt=object()) is None


def test_text_that_no_provider_takes_is_keyable():
    """A lone surrogate is not our business."""
    assert key("\ud800") not in (None, key("?"))


def test_huge_numbers_are_keyable():
    """Whole numbers beyond 64 bits count exactly."""
    assert len({key(x=2**70), key(x=2**70 + 1), key(x=float(2**70))}) == 3


def request(*parts, **config):
    message = lm15.Message(role="user", parts=parts or (lm15.TextPart("hi"),))
    return lm15.Request(model="m", messages=(message,), config=lm15.Config(**config))


def test_typed_requests_are_told_by_content():
    """A typed request counts as a whole: messages, tools and settings."""
    tool = lm15.FunctionTool(name="look")
    requests = [
        request(),
        request(lm15.TextPart("ho")),
        request(temperature=0.5),
        request(extensions={"x": 1}),
        dataclasses.replace(request(), tools=(tool,)),
        dataclasses.replace(request(), system="be kind"),
    ]
    keys = [key(None, request=each) for each in requests]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(None, request=request()) == keys[0]
    assert key(None, request=request(), rollout_id=1) != keys[0]


def test_local_media_count_by_their_content(tmp_path):
    """A file that changes is another request; the same picture elsewhere is not."""
    picture, copy = tmp_path / "a.png", tmp_path / "b.png"
    picture.write_bytes(b"1")
    copy.write_bytes(b"1")
    before = key(None, request=request(lm15.ImagePart(path=picture)))
    assert before is not None
    assert before == key(None, request=request(lm15.ImagePart(path=copy)))
    picture.write_bytes(b"2")
    assert before != key(None, request=request(lm15.ImagePart(path=picture)))
    picture.unlink()
    assert key(None, request=request(lm15.ImagePart(path=picture))) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(one, other):
    """Whether two JSON values are strictly the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@given(JSON, JSON, st.sampled_from([{}, {"stop": {"x"}}]))
def test_keys_are_equal_exactly_for_equal_values(one, other, more):
    """No two JSON values share a key, on either path."""
    made = key(x=[one], **more)
    assert made is not None
    assert (made == key(x=[other], **more)) == same(one, other)


def shuffled(value):
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_no_order_of_any_dict_matters(value):
    """However deep a dict is, its order says nothing."""
    assert key(x=[value]) == key(x=[shuffled(value)])
    assert key(x=[value], stop={"x"}) == key(x=[shuffled(value)], stop={"x"})
