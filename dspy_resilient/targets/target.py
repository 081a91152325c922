"""A place that calls may go to: a `dspy.LM` as the user configured it, and the ways to it."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient.errors import ClientClosedError
from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.targets.reasoning_models import fit, fit_config
from dspy_resilient.targets.request_key import key_of
from dspy_resilient.targets.route import Routes
from dspy_resilient.targets.typed_requests import with_own

if TYPE_CHECKING:
    from dspy_resilient.errors import ResilienceError
    from dspy_resilient.targets.protocols import Call, Client
    from dspy_resilient.targets.route import Route

# What a call may say about the connection. It belongs to the provider that the caller had in mind.
CONNECTION = frozenset(
    {
        "api_base",
        "api_key",
        "api_version",
        "azure_ad_token",
        "azure_ad_token_provider",
        "base_url",
        "custom_llm_provider",
        "extra_headers",
        "extra_query",
        "headers",
        "organization",
        "project",
    }
)


_BLOB = re.compile(r"[A-Za-z0-9+/=_-]{2000,}")  # what no prompt says in words: base64


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Target:
    """One `dspy.LM` that calls may go to.

    Attributes:
        lm: The LM as configured.
        routes: The ways to its provider, shared with whoever lent the target.
        client: The client that makes the calls.
        kind: Class of the twin on which attempts run.
        history: Where DSPy records the calls (the caller's own list).
        own_connection: Whether per-call connection settings are meant for another provider.
    """

    lm: Any
    routes: Routes
    client: Client
    kind: type
    history: list[Any]
    own_connection: bool = False

    @property
    def label(self) -> str:
        """Return the model and endpoint, for people."""
        return self.routes.find(self.lm, {}).label

    @property
    def needs_litellm(self) -> bool:
        """Whether every attempt goes through LiteLLM."""
        return getattr(self.lm, "engine", None) == "litellm"

    def refusal(self) -> ResilienceError | None:
        """Return why nothing may be sent here at present, or None: its client broke, or is closed."""
        lender = self.routes.client
        if lender is not self.client and lender.closed:
            return ClientClosedError(f"client {lender.name!r} is closed", client=lender.name)
        return self.routes.supervisor.refusal()

    def route(self, call: Call) -> Route:
        """Return the way this call takes."""
        return self.routes.find(self.lm, self.kwargs(call))

    def kwargs(self, call: Call) -> dict[str, Any]:
        """Return the call's keywords as this target should see them."""
        kwargs = call.kwargs
        if self is call.targets[0]:
            return kwargs
        if self.own_connection:
            kwargs = {name: value for name, value in kwargs.items() if name not in CONNECTION}
        return fit(self.lm.model, kwargs)

    def args(self, call: Call) -> tuple[Any, ...]:
        """Return the call's positional arguments as this target should see them."""
        request = call.args[0] if call.args else None
        if self is call.targets[0] or not isinstance(request, dspy.lm15.Request):
            return call.args
        model = self.lm.model
        config = fit_config(model, with_own(request.config, call.targets[0].lm, self.lm))
        return dataclasses.replace(request, model=model, config=config), *call.args[1:]

    def timeout(self, call: Call) -> float | None:
        """Return the timeout of one attempt in seconds, or None if it has none."""
        return _seconds({**self.lm.kwargs, **self.kwargs(call)}.get("timeout"))

    def sent(self, call: Call) -> tuple[dict[str, Any], str | None]:
        """Return the LM's settings, and the key of an answer to a call sent with them, as of now.

        For the primary, now is when the call was made.
        """
        if self is call.targets[0]:
            return call.settings, call.key
        return dict(self.lm.kwargs), self.key(call)

    def key(self, call: Call) -> str | None:
        """Return the cache key of this call under this target, or None if it is not cached."""
        if call.key is None:
            return None
        lm, settings = self.lm, {**self.lm.kwargs, **self.kwargs(call)}
        place = resolve(lm.model, lm.model_type, settings, self.client.tenant)
        return key_of(place, call.method, self.args(call), settings)

    def estimate(self, call: Call) -> int:
        """Guess the tokens this call will use: its prompt and the most it may answer."""
        prompt, most = self.guess(call)
        return prompt + (256 if most is None else most)

    def guess(self, call: Call) -> tuple[int, int | None]:
        """Guess the tokens of the prompt, and return the most the answer may have, or None.

        4 characters each, and 1,000 for an image or a recording.
        """
        kwargs, args = self.kwargs(call), self.args(call)
        prompt = args[0] if args else kwargs.get("messages") or kwargs.get("prompt")
        text, blobs = _BLOB.subn("", str(prompt))
        if isinstance(prompt, dspy.lm15.Request):
            most = prompt.config.max_tokens
        else:
            settings = {**self.lm.kwargs, **kwargs}
            most = settings.get("max_tokens") or settings.get("max_completion_tokens")
        return len(text) // 4 + 1000 * blobs, most if isinstance(most, int) else None


def _seconds(timeout: Any) -> float | None:
    """Return a timeout as seconds: a number, a number in a str, or the read timeout of httpx."""
    timeout = getattr(timeout, "read", timeout)
    try:
        return None if timeout is None else float(timeout)
    except (TypeError, ValueError):
        return None
