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
    provider_name,
    read_event,
)
from dspy_resilient.providers.litellm_module import litellm_so_far
from dspy_resilient.providers.service import Service

_HEARD = "_heard_by_dspy_resilient"

OnFailure = Callable[[CallbackEvent], None]
OnOutcome = Callable[[Any, CallbackEvent, bool], None]

# The attempt of this context, where it carries no tags.
_untagged: ContextVar[AttemptWatch | None] = ContextVar("dspy_resilient_untagged", default=None)


class AttemptWatch:
    """An attempt as the observer sees it: it hears of one failure at most, of none once closed.

    Attributes:
        call_id: The attempt's name in LiteLLM: a UUID.
        is_spared: Whether LiteLLM need not report its success.
        on_failure: Called with the evidence on the thread, and in the task, of the attempt, before
            the exception gets there. (Where a stream breaks half-way LiteLLM reports it when it
            gets round to it, on a thread of its own.) LiteLLM may yet find another way to an answer.
        circuit: Which circuit the attempt reports to; others may hear of it.
        service: Where it goes, by which an event without a tag is known.
    """

    __slots__ = ("__weakref__", "call_id", "circuit", "is_spared", "on_failure", "service")

    def __init__(
        self,
        call_id: str,
        on_failure: OnFailure,
        circuit: object = None,
        service: Service | None = None,
    ) -> None:
        self.call_id = call_id
        self.on_failure = on_failure
        self.circuit = circuit
        self.service = service
        self.is_spared = False

    def made(self, event: CallbackEvent) -> bool:
        """Whether an event without a tag, in the context of this attempt, may be its own."""
        return self.service is not None and self.service.answers(event)

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
    service: Service
    hear: Callable[[Any, CallbackEvent, bool], None]
    circuit: weakref.ref[Any]

    def is_like(self, other: _Subscription) -> bool:
        return self.service == other.service and self.circuit() is other.circuit()


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

    def sight(
        self, on_failure: OnFailure, circuit: object = None, service: Service | None = None
    ) -> AttemptWatch:
        """Return a new attempt under observation."""
        call_id = f"{self._series}{next(self._numbers):012x}"
        sighting = self._sightings[call_id] = AttemptWatch(call_id, on_failure, circuit, service)
        return sighting

    def take(self, sighting: AttemptWatch) -> bool:
        """End the observation of `sighting`; False if it has ended already."""
        return self._sightings.pop(sighting.call_id, None) is not None

    def subscribe(self, subscription: _Subscription) -> _Subscription:
        """Add a subscription, or return the like of it; those whose circuit is gone go."""
        with self._changing:
            living = [each for each in self._subscriptions if each.circuit() is not None]
            found = next((each for each in living if each.is_like(subscription)), None)
            self._subscriptions = tuple(living) if found else (*living, subscription)
        return found or subscription

    def unsubscribe(self, subscription: _Subscription) -> None:
        """End a subscription. Idempotent."""
        with self._changing:
            others = (each for each in self._subscriptions if each is not subscription)
            self._subscriptions = tuple(others)

    def needs_no_success(self, keywords: Mapping[str, Any]) -> bool:
        """Whether nobody hears of the success of an attempt with `keywords`."""
        is_anyones = any(each.circuit() is not None for each in self._subscriptions)
        return not is_anyones and not self.hook.is_heard(keywords)

    def spares_success(self, call_id: object) -> bool:
        """Whether LiteLLM need not report the success of the call with this id: an attempt's."""
        sighting = self._sightings.get(call_id) if isinstance(call_id, str) else None
        return sighting is not None and sighting.is_spared

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
        if kwargs.get("cache_hit") or (is_tagged and succeeded):
            return
        event = read_event(kwargs, *facts)
        if not _is_news(event.error):
            return
        if is_tagged:
            found = (self._sightings.get(call_id) for call_id in ids)
            watch = next((each for each in found if each is not None), None)
            if watch is None:  # it has ended, and been reported
                return
        else:
            watch = _untagged.get()
            if watch is not None and not watch.made(event):
                watch = None  # a call of an engine's, to another service
        if watch is not None and not succeeded:
            watch.on_failure(event)
        if watch is None or not succeeded:
            self._publish(event, succeeded=succeeded, circuit=watch.circuit if watch else None)

    def _publish(self, event: CallbackEvent, *, succeeded: bool, circuit: object) -> None:
        """Tell the circuits that it concerns, but not the one that the attempt reports to."""
        for subscription in self._subscriptions:
            own = subscription.circuit()
            if own is not None and own is not circuit and subscription.service.answers(event):
                subscription.hear(own, event, succeeded)


def _is_news(error: BaseException | None) -> bool:
    """Whether an event is the first about its error; of some streams LiteLLM reports two."""
    if error is None:
        return True
    if getattr(error, _HEARD, False):
        return False
    with suppress(AttributeError):
        setattr(error, _HEARD, True)
    return True


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
    circuit: object = None,
    service: Service | None = None,
    is_sync: bool = False,
) -> Iterator[dict[str, Any]]:
    """Watch the attempt that runs in the block; the value is what to add to its keywords.

    Args:
        on_failure: As for `observe`.
        by_keywords: Whether keywords reach LiteLLM. If not (a typed Request, another engine), there
            are none to add, LiteLLM is not imported, and what fails in this context, untagged, at
            the attempt's own `service`, may be the attempt.
        keywords: As for `AttemptWatch.tags`.
        circuit: Which circuit the attempt reports to, and so need not hear of it.
        service: Where the attempt goes.
        is_sync: Whether LiteLLM is called without an event loop in between.
    """
    if by_keywords or loaded():
        ensure_registered()
    sighting = _observer.sight(on_failure, circuit, service)
    token = None if by_keywords else _untagged.set(sighting)
    tags = sighting.tags(keywords) if by_keywords else {}
    sighting.is_spared = by_keywords and _observer.needs_no_success(keywords or {})
    try:
        with successes_unreported() if is_sync and sighting.is_spared else nullcontext():
            yield tags
    finally:
        sighting.close()
        if token is not None:
            with suppress(ValueError):  # the collector ends it in another context
                _untagged.reset(token)


def subscribe(service: Service, hear: OnOutcome, circuit: object) -> Callable[[], None]:
    """Have a circuit hear of the process's LiteLLM calls to a service that do not report to it.

    Of other circuits' attempts only failures are heard. A circuit hears of each call once, however
    often it subscribes. LiteLLM is not imported for it: where it has not been yet, hearing begins
    with the first attempt of any client.

    Args:
        service: The provider and its address.
        hear: Called with the circuit, the evidence and whether the call succeeded, on any thread; of
            a success, late. It must not hold the circuit.
        circuit: Which hears; held weakly: the subscription ends with it.

    Returns:
        A function that ends the subscription.
    """
    if loaded() or "callbacks" in litellm_so_far():
        ensure_registered()
    subscription = _observer.subscribe(_Subscription(service, hear, weakref.ref(circuit)))
    return partial(_observer.unsubscribe, subscription)
