"""Gives text completions a client that is kept, as LiteLLM's chat completions have one.

LiteLLM makes a client of the OpenAI SDK for every single text completion, opens a connection and
leaves it to the collector. That cannot be avoided by an argument of DSPy's call. Streamed text
completions stay as they are: DSPy makes none.
"""

from __future__ import annotations

import contextlib
from typing import Any


def keep_clients(main: Any) -> None:
    """Have the text completions of `litellm.main` use the clients of its chat completions.

    What somebody else has put there stays; once is enough.
    """
    from litellm.llms.openai.completion.handler import (  # noqa: PLC0415  # LiteLLM comes late
        OpenAITextCompletion,
    )

    if type(main.openai_text_completions) is OpenAITextCompletion:
        main.openai_text_completions = _texts(OpenAITextCompletion, main.openai_chat_completions)


def _texts(base: Any, chats: Any) -> Any:
    def kept(*, is_async: bool, settings: dict[str, Any], max_retries: int) -> Any:
        names = ("api_key", "api_base", "timeout", "organization")
        given = {name: settings.get(name) for name in names}
        with contextlib.suppress(Exception):  # LiteLLM then says what is wrong in its own words
            return chats._get_openai_client(is_async=is_async, max_retries=max_retries, **given)  # noqa: SLF001  # LiteLLM has no other way to it that is older than a year
        return None

    class Texts(base):
        """LiteLLM's text completions. It asks for the async kind off the loop, and sends on it."""

        def completion(self, *args: Any, client: Any = None, **settings: Any) -> Any:
            if client is None and not settings.get("acompletion"):
                retries = settings["optional_params"].get("max_retries", 2)
                client = kept(is_async=False, settings=settings, max_retries=retries)
            return super().completion(*args, client=client, **settings)

        async def acompletion(self, *args: Any, client: Any = None, **settings: Any) -> Any:
            if client is None:
                retries = settings["max_retries"]
                client = kept(is_async=True, settings=settings, max_retries=retries)
            return await super().acompletion(*args, client=client, **settings)

    return Texts()
