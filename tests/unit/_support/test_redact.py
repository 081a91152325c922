"""What is a credential, by name and by look."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_resilient._support.redact import is_secret, redact, strip_secrets

SECRET = """
api_key API_KEY apiKey openai_api_key api-key x-api-key X-Goog-Api-Key apikey key auth token
access_token auth_token id_token hf_token azure_ad_token azure_ad_token_provider aws_session_token
aws_access_key_id aws_secret_access_key aws_web_identity_token vertex_credentials credentials
client_secret azure_password password passwd Authorization Proxy-Authorization cookie Set-Cookie
Ocp-Apim-Subscription-Key X-Auth-Token private_key signature
"""
HARMLESS = """
max_tokens max_completion_tokens max_output_tokens min_tokens prompt_tokens total_tokens logit_bias
stop_token_ids eos_token eos_token_id bos_token input_cost_per_token output_cost_per_token
skip_special_tokens end_thinking_token token_budget token_count tokenizer prompt_cache_key model temperature
api_base api_version organization project keyword monkey top_k n rollout_id
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_credentials_are_known(name):
    """Whatever is called like a credential is one."""
    assert is_secret(name)


@pytest.mark.parametrize("name", [*HARMLESS.split(), "", "_", "-"])
def test_names_of_settings_are_left_alone(name):
    """Tokens that are counted are no tokens to steal."""
    assert not is_secret(name)


def test_secrets_are_stripped_from_settings():
    """State keeps the settings, and the names of what was left out."""
    settings = {"model": "m", "api_key": "sk", "temperature": 1, "azure_ad_token": "t"}
    assert strip_secrets(settings) == (
        {"model": "m", "temperature": 1},
        ("api_key", "azure_ad_token"),
    )
    assert "api_key" in settings


def test_setting_with_a_secret_inside_goes_as_a_whole():
    """Half a set of headers is of no use, and its name says what to give again."""
    settings = {
        "extra_headers": {"Authorization": "Bearer x", "beta": "1"},
        "headers": {"beta": "1"},
        "api_base": "https://me:pw@host/v1",
        "fallbacks": [{"api_key": "sk"}],
        "tools": [{"name": "look"}],
    }
    kept, dropped = strip_secrets(settings)
    assert dropped == ("extra_headers", "api_base", "fallbacks")
    assert kept == {"headers": {"beta": "1"}, "tools": [{"name": "look"}]}


def test_unset_credentials_are_no_secret():
    """None hides nothing."""
    assert strip_secrets({"api_key": None, "headers": {"cookie": None}})[1] == ()


def test_settings_without_end_are_left_out():
    """A cycle is not searched for ever, and not passed on unsearched."""
    loop = {}
    loop["again"] = loop
    assert strip_secrets({"x": loop}) == ({}, ("x",))


LEAKS = [
    "Incorrect API key provided: {}.",
    "api_key={} was refused",
    '{{"api_key": "{}"}}',
    "'x-api-key': '{}'",
    "Authorization: Bearer {}",
    "bearer {}",
    "GET https://host/v1?key={}&alt=sse",
    "https://user:{}@host/v1",
    "password={}",
    "aws_secret_access_key: {}",
    "token={}",
]


@pytest.mark.parametrize("text", LEAKS)
@pytest.mark.parametrize("secret", ["Xy7-opaque_value", "0123456789abcdef"])
def test_announced_credentials_are_masked(text, secret):
    """Whatever follows the name of a credential is masked."""
    masked = redact(text.format(secret))
    assert secret not in masked
    assert "***" in masked
    assert redact(masked) == masked


KEYS = """
sk-abc123DEF456 sk-proj-abc_123-xyz sk-ant-api03-abcdefgh gsk_abcdefgh12345678 xai-abcdefgh1234
AIzaSyA1234567890abcdef AKIAIOSFODNN7EXAMPLE ASIAIOSFODNN7EXAMPLE hf_abcdefghijklmnop
ghp_abcdefghijklmnop github_pat_abcdefghij eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_def-123
sk-abc1**********yz99
"""


@pytest.mark.parametrize("secret", KEYS.split())
def test_well_known_keys_are_masked_anywhere(secret):
    """A key is known by its look, wherever it stands."""
    assert redact(f"no use: {secret}, sorry") == "no use: ***, sorry"


@pytest.mark.parametrize(
    "text",
    [
        "Rate limit reached for gpt-4o-mini: 90000 tokens per minute",
        "max_tokens: 4096 is too large",
        "risk-assessment of the task-force",
        "https://api.openai.com/v1/chat/completions?model=gpt-4o",
        "This model's maximum context length is 8192 tokens",
        "",
    ],
)
def test_ordinary_words_stay(text):
    """An error must still say what is wrong."""
    assert redact(text) == text


@given(st.text(max_size=300))
def test_masking_takes_any_text(text):
    """Whatever a provider says can be masked."""
    assert isinstance(redact(text), str)


@pytest.mark.parametrize("part", ["api_key" * 3000, "://" * 9000, "sk-" * 9000, "token: " * 4000])
def test_long_text_is_masked_in_no_time(part):
    """No text makes a pattern search without end (the suite's timeout would end it)."""
    assert isinstance(redact(part), str)
