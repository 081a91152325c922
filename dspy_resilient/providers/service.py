"""Which of LiteLLM's calls go to the same service: the same provider, at the same address.

Asked when an event of LiteLLM's is there, so that LiteLLM is; it knows who serves a model and, of most
providers, where they are unless told otherwise.
"""

from __future__ import annotations

import functools
import ipaddress
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from dspy_resilient.providers.callback_event import endpoint_name, provider_name
from dspy_resilient.providers.litellm_module import load_litellm

if TYPE_CHECKING:
    from dspy_resilient.providers.callback_event import CallbackEvent


_ASK_A_USER = (
    "PROVIDERS_THAT_AUTHENTICATE_ON_PROVIDER_INFO"  # in a browser, when asked where they are
)


class Service(NamedTuple):
    """A provider at an address.

    Attributes:
        model: A model it serves, as DSPy is told, or "provider/" for any.
        provider: LiteLLM's name for it, or "" where the model has to tell.
        url: Its address, or "" for the provider's own.
    """

    model: str
    provider: str
    url: str = ""

    def answers(self, event: CallbackEvent) -> bool:
        """Whether the call of `event` went to this service.

        Where nobody knows the provider's own address, a call to a machine nearby went elsewhere.
        """
        if event.provider != _provider(self.model, self.provider, self.url):
            return False
        address = endpoint_name(self.url) or _home(event.provider)
        if address is not None:
            return f"{event.endpoint}/".startswith(f"{address}/")
        return event.endpoint is None or not _is_nearby(event.endpoint)


@functools.lru_cache(maxsize=512)
def _provider(model: str, known: str, url: str) -> str:
    """Return the name that LiteLLM's events have for who serves `model`."""
    with suppress(Exception):  # a name that LiteLLM does not know is one that no event has
        known = load_litellm().get_llm_provider(model, known or None, url or None)[1]
    return provider_name(known)


@functools.lru_cache(maxsize=512)
def _home(provider: str) -> str | None:
    """Return where LiteLLM finds a provider unless told otherwise, or None if it does not tell."""
    from litellm import constants, utils  # noqa: PLC0415  # LiteLLM comes late
    from litellm.types.utils import LlmProviders  # noqa: PLC0415  # likewise

    if provider in getattr(constants, _ASK_A_USER, ()):
        return None
    with suppress(Exception):  # a provider that must be told where it is
        if found := load_litellm().get_llm_provider(f"{provider}/any")[3]:
            return endpoint_name(found)
    with suppress(Exception):  # likewise
        manager = utils.ProviderConfigManager
        described = manager.get_provider_model_info("any", LlmProviders(provider))
        return endpoint_name(described.get_api_base(None))
    return None


def _is_nearby(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))
