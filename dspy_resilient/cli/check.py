"""One tiny call to a model, and what it shows: key, endpoint, latency, abilities, rate limits.

It explains a problem and what to do about it. It changes nothing, and it never shows a key.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from dspy_resilient._support.redact import describe
from dspy_resilient.events import printable
from dspy_resilient.lm import ResilientLM
from dspy_resilient.outcomes import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TIMEOUT = 30.0
_WAYS_OUT: Mapping[Kind, str] = {
    Kind.AUTH: "The provider refuses this key. Set {keys} to a valid one.",
    Kind.BILLING: "The account has no money or no quota. Pay, or use another key.",
    Kind.THROTTLED: "The provider asks for a pause. The key works; try again later.",
    Kind.TIMEOUT: "No answer in 30 s. The endpoint is slow or hangs; is it the right one?",
    Kind.FAILURE: "The endpoint cannot be reached, or it is down. Check the address and your network.",
    Kind.POLICY: "A content filter refuses even a greeting. Check the account's settings.",
    Kind.LOCAL: "Nothing was sent. Set {keys}, and check the name of the model.",
}
_OTHERWISE = (
    "The provider does not take this request. Check the name of the model and the endpoint."
)


def check(model: str, api_base: str | None, out: TextIO) -> bool:
    """Make the call, write what was found to `out`, and return whether the model answered.

    Args:
        model: As for `dspy.LM`.
        api_base: Endpoint, or None for the provider's own.
        out: Gets one line for each thing that was found.
    """

    def tell(what: str, found: str) -> None:
        out.write(f"{what:<10} {printable(found)}\n")
        out.flush()

    tell("model", model)
    missing = missing_keys(model)
    tell("key", f"not found: {', '.join(missing)}" if missing else "found, or none needed")
    where: dict[str, Any] = {} if api_base is None else {"api_base": api_base}
    if api_base is not None and missing:
        where["api_key"] = "none"  # a local server takes any
    started = time.monotonic()
    try:
        lm = _make(model, where)
        with lm, _quiet():
            lm("Say hello.")
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what was to be found out
        tell("problem", describe(error))
        tell("do", way_out(error, missing))
        return False
    tell("endpoint", _endpoint(lm, api_base))
    tell("call", f"answered in {time.monotonic() - started:.2f} s; {_costs(lm)}")
    tell("can", _abilities(lm))
    for line in rate_limits(lm):
        tell("limits", line)
    tell("result", "all is well")
    return True


def missing_keys(model: str) -> list[str]:
    """Return the environment variables that LiteLLM would read for this model and does not find."""
    import litellm  # noqa: PLC0415  # takes seconds

    litellm.suppress_debug_info = True
    with suppress(Exception):
        found: list[str] = litellm.validate_environment(model=model)["missing_keys"]
        return found
    return []


def way_out(error: Exception, missing: list[str]) -> str:
    """Return what to do about an error."""
    kind = getattr(getattr(error, "verdict", None), "kind", None)
    keys = ", ".join(missing) or "the provider's key"
    return _WAYS_OUT.get(kind, _OTHERWISE).format(keys=keys)  # type: ignore[arg-type]  # None is no key


def rate_limits(lm: ResilientLM) -> Iterator[str]:
    """Yield what the provider's headers said of its rate limits."""
    headers = _hidden(lm).get("additional_headers") or {}
    for name in sorted(headers):
        if "ratelimit" in name.lower() or "retry-after" in name.lower():
            yield f"{name.removeprefix('llm_provider-')}: {headers[name]}"


def _make(model: str, where: dict[str, Any]) -> ResilientLM:
    return ResilientLM(
        model, cache=False, max_wait=0, num_retries=0, deadline=TIMEOUT, name="check", **where
    )


def _endpoint(lm: ResilientLM, api_base: str | None) -> str:
    return f"{_hidden(lm).get('api_base') or api_base or 'the provider'} answers"


def _hidden(lm: ResilientLM) -> dict[str, Any]:
    return getattr(lm.history[-1].get("response"), "_hidden_params", None) or {}


def _costs(lm: ResilientLM) -> str:
    entry = lm.history[-1]
    usage, cost = entry.get("usage") or {}, entry.get("cost")
    tokens = (
        f"{usage.get('prompt_tokens', '?')} tokens in, {usage.get('completion_tokens', '?')} out"
    )
    return f"{tokens}, " + ("price unknown" if cost is None else f"${cost:.6f}")


def _abilities(lm: ResilientLM) -> str:
    abilities = {
        "tools": lm.supports_function_calling,
        "structured output": lm.supports_response_schema,
        "native reasoning": lm.supports_reasoning,
    }
    can = ", ".join(name for name, has in abilities.items() if has) or "plain text"
    cannot = ", ".join(name for name, has in abilities.items() if not has)
    return can + (f" (LiteLLM knows of no {cannot})" if cannot else "")


class _quiet:  # noqa: N801  # reads as a statement
    """Keep what libraries log off the terminal: the lines above say it."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)
