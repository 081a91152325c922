"""Who hears what LiteLLM reports: the attempt that caused it, before its caller does.

LiteLLM's callbacks are process-wide, few, and one per class, so there is one for all clients. It
routes each failure to the attempt that it belongs to, found by a call id which LiteLLM passes
from call to event and never sends anywhere. A client that listens to a provider hears of
the calls that were no attempt of ours. This module judges nothing and keeps nothing: it knows an
attempt while it runs, and a subscriber while it lives.

An attempt's success is not reported: LiteLLM delivers it late, or never.
"""

from __future__ import annotations

import itertools
import os
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.events import logger
from dspy_resilient.providers.callback import Hook, successes_unreported
from dspy_resilient.providers.callback_event import (
    TAG,
    CallbackEvent,
    call_ids,
    endpoint_name,
    provider_name,
    read_event,
)
from dspy_resilient.providers.litellm_module import litellm_so_far

OnFailure = Callable[[CallbackEvent], None]
OnOutcome = Callable[[CallbackEvent, bool], None]

# The attempt of this context, where it carries no tags.
_untagged: ContextVar[AttemptWatch | None] = ContextVar("dspy_resilient_untagged", default=None)


class AttemptWatch:
    """An attempt as the observer sees it: it hears of one failure at most, of none once closed.

    Attributes:
        call_id: The attempt's name in LiteLLM: a UUID.
        client: Whose attempt it is; others may hear of it.
        on_failure: Called with the evidence on the thread, and in the task, of the attempt, before
            the exception gets there. (Where a stream breaks half-way LiteLLM reports it when it
            gets round to it, on a thread of its own.)
    """

    __slots__ = ("__weakref__", "call_id", "client", "on_failure")

    def __init__(self, call_id: str, on_failure: OnFailure, client: object = None) -> None:
        self.call_id = call_id
        self.on_failure = on_failure
        self.client = client

    def tags(self, keywords: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return fresh keywords that mark the attempt for LiteLLM and keep it to one request.

        They reach LiteLLM's events, never the provider. With them and the `num_retries=0` that
        DSPy passes, an attempt is one HTTP request, but for two cases that no keyword prevents:
        LiteLLM 1.106 re-sends once, silently, when the connection of an async call is reset (not
        to OpenAI, Azure and Cerebras), and somebody's `litellm.num_retries` is applied, once, to
        the next sync call that fails.

        Args:
            keywords: What the attempt passes besides, `model` included: its `litellm_metadata` is
                kept, and Azure is recognised. LiteLLM's Azure clients go on retrying as whoever
                made them first in this process wanted; a user name, which without a password
                means nothing, makes ours distinct in its cache.
        """
        keywords = keywords or {}
        metadata = keywords.get("litellm_metadata")
        tags: dict[str, Any] = {
            "litellm_call_id": self.call_id,
            "litellm_metadata": {
                **(metadata if isinstance(metadata, Mapping) else {}),
                TAG: self.call_id,
            },
            "max_retries": 0,
        }
        provider = keywords.get("custom_llm_provider") or keywords.get("model") or ""
        is_azure = provider_name(str(provider).partition("/")[0]) == "azure"
        if is_azure and keywords.get("azure_username") is None:
            tags["azure_username"] = os.environ.get("AZURE_USERNAME", "")
        return tags

    def close(self) -> None:
        """Forget the attempt; later events find nothing. Idempotent."""
        _observer.take(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Subscription:
    provider: str
    endpoint: str | None
    on_outcome: Callable[[], OnOutcome | None]
    client: weakref.ref[Any] | None

    def concerns(self, evidence: CallbackEvent) -> bool:
        is_there = self.endpoint is None or f"{evidence.endpoint}/".startswith(f"{self.endpoint}/")
        return is_there and evidence.provider == self.provider


class _Observer:
    """All the process knows of attempts under way and of subscribers; no lock on an attempt's way."""

    def __init__(self) -> None:
        self.hook = Hook(self.receive, self.spares_success)
        self._subscriptions: tuple[_Subscription, ...] = ()
        self.renew()

    def renew(self) -> None:
        """Forget all attempts, as a forked child must: nobody runs them there."""
        self.hook.renew()
        self._changing = threading.Lock()
        # Weakly: Ctrl-C may strike before its watcher can close a sighting.
        self._sightings: weakref.WeakValueDictionary[str, AttemptWatch] = (
            weakref.WeakValueDictionary()
        )
        self._series = str(uuid.uuid4())[:-12]  # one random UUID, whose last digits count
        self._numbers = itertools.count()

    def sight(self, on_failure: OnFailure, client: object = None) -> AttemptWatch:
        """Return a new attempt under observation."""
        sighting = AttemptWatch(f"{self._series}{next(self._numbers):012x}", on_failure, client)
        self._sightings[sighting.call_id] = sighting
        return sighting

    def take(self, sighting: AttemptWatch) -> bool:
        """End the observation of `sighting`; False if it has ended already."""
        return self._sightings.pop(sighting.call_id, None) is not None

    def subscribe(self, subscription: _Subscription) -> None:
        """Add a subscription; those whose subscriber is gone go."""
        with self._changing:
            living = [each for each in self._subscriptions if each.on_outcome() is not None]
            self._subscriptions = (*living, subscription)

    def unsubscribe(self, subscription: _Subscription) -> None:
        """End a subscription. Idempotent."""
        with self._changing:
            others = (each for each in self._subscriptions if each is not subscription)
            self._subscriptions = tuple(others)

    def spares_success(self, keywords: Mapping[str, Any]) -> bool:
        """Whether LiteLLM need not report the success of a call with `keywords`: an attempt's."""
        is_attempt = keywords.get("litellm_call_id") in self._sightings
        return is_attempt and not self._subscriptions and not self.hook.is_heard(keywords)

    def receive(self, kwargs: dict[str, Any], *facts: Any, succeeded: bool) -> None:
        """Hand an event of LiteLLM's to whom it concerns; never raises."""
        if succeeded and not self._subscriptions:
            return
        try:
            self._route(kwargs, *facts, succeeded=succeeded)
        except Exception as error:  # noqa: BLE001  # LiteLLM would log it, with key and prompt
            logger.warning("dspy_resilient.observer_failed error=%s", type(error).__name__)

    def _route(self, kwargs: dict[str, Any], *facts: Any, succeeded: bool) -> None:
        ids = tuple(call_ids(kwargs))
        is_tagged = any(call_id.startswith(self._series) for call_id in ids)
        untagged = None if is_tagged else _untagged.get()
        if not is_tagged and untagged is None:
            if not kwargs.get("cache_hit"):
                self._publish(read_event(kwargs, *facts), succeeded=succeeded)
        elif not succeeded:
            found = (self._sightings.get(call_id) for call_id in ids)
            sighting = next((each for each in found if each is not None), untagged)
            if sighting is not None and self.take(sighting):
                evidence = read_event(kwargs, *facts)
                sighting.on_failure(evidence)
                self._publish(evidence, succeeded=False, client=sighting.client)

    def _publish(self, evidence: CallbackEvent, *, succeeded: bool, client: object = None) -> None:
        """Tell those whom it concerns, but not the `client` whose own attempt it was."""
        for subscription in self._subscriptions:
            own = subscription.client is not None and subscription.client() is client
            if not own and subscription.concerns(evidence):
                on_outcome = subscription.on_outcome()
                if on_outcome is not None:
                    on_outcome(evidence, succeeded)


_observer = _Observer()
renew_after_fork(_observer)


def loaded() -> bool:
    """Whether `load` has been done, so that `observe` need not."""
    return _observer.hook.loaded


def load() -> None:
    """Import LiteLLM, which takes seconds the first time; on any thread, idempotent.

    DSPy's own settings of LiteLLM are left to DSPy, which makes them at its first call.
    """
    if not loaded():
        _observer.hook.load()


def ensure_registered() -> None:
    """Put the observer where LiteLLM looks for callbacks, if it is not there."""
    load()
    _observer.hook.register()


def unregister() -> None:
    """Take the observer out of LiteLLM; the next attempt puts it back."""
    _observer.hook.unregister()


def observe(on_failure: OnFailure) -> AttemptWatch:
    """Watch one attempt, until `close()`.

    Its `tags()` have to be among the keywords that LiteLLM gets. Imports LiteLLM if need be. An
    exception of `on_failure` is logged and goes no further.
    """
    ensure_registered()
    return _observer.sight(on_failure)


@contextmanager
def watch(
    on_failure: OnFailure,
    by_keywords: bool = True,
    keywords: Mapping[str, Any] | None = None,
    client: object = None,
    is_sync: bool = False,
) -> Iterator[dict[str, Any]]:
    """Watch the attempt that runs in the block; the value is what to add to its keywords.

    Args:
        on_failure: As for `observe`.
        by_keywords: Whether keywords reach LiteLLM. If not (a typed Request, another engine), there
            are none to add, LiteLLM is not imported, and what fails in this context, untagged, is
            taken for the attempt.
        keywords: As for `AttemptWatch.tags`.
        client: Whose attempt it is: that of which `subscribe` is told by the same object.
        is_sync: Whether LiteLLM is called without an event loop in between.
    """
    if by_keywords or loaded():
        ensure_registered()
    sighting = _observer.sight(on_failure, client)
    token = None if by_keywords else _untagged.set(sighting)
    tags = sighting.tags(keywords) if by_keywords else {}
    is_spared = is_sync and _observer.spares_success({**(keywords or {}), **tags})
    try:
        with successes_unreported() if is_spared else nullcontext():
            yield tags
    finally:
        sighting.close()
        if token is not None:
            with suppress(ValueError):  # the collector ends it in another context
                _untagged.reset(token)


def subscribe(
    provider: str, endpoint: str | None, on_outcome: OnOutcome, client: object = None
) -> Callable[[], None]:
    """Hear of the process's LiteLLM calls to a provider that are no attempts of one's own.

    Of the attempts of other clients only failures are heard. LiteLLM is not imported for it: where
    it has not been yet, hearing begins with the first attempt of any client.

    Args:
        provider: LiteLLM's name for it, e.g. "openai".
        endpoint: An `api_base`, for the calls to it or to a path below; None or "" for all calls
            to that provider.
        on_outcome: Called with the evidence and whether the call succeeded, on any thread; of a
            success, late. Held weakly: the subscription ends with the object it is a method of.
        client: Whose attempts are not to be heard, as given to `watch`; held weakly.

    Returns:
        A function that ends the subscription.
    """
    if loaded() or "callbacks" in litellm_so_far():
        ensure_registered()
    is_method = isinstance(on_outcome, types.MethodType)
    held: Callable[[], OnOutcome | None]
    held = weakref.WeakMethod(on_outcome) if is_method else weakref.ref(on_outcome)
    own = None if client is None else weakref.ref(client)
    subscription = _Subscription(provider_name(provider), endpoint_name(endpoint), held, own)
    _observer.subscribe(subscription)
    return partial(_observer.unsubscribe, subscription)
