"""Turn what a user gave as `fallbacks` into targets.

This module decides what a fallback inherits from the primary and refuses chains that lead back. It
asks nobody anything.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import dspy
from dspy.clients.lm import LM  # by reference: a program may put another class at dspy.LM

from dspy_resilient._support.redact import strip_secrets
from dspy_resilient.events import logger, printable
from dspy_resilient.outcomes import Kind
from dspy_resilient.targets.keywords import FALLBACKS, refuse_ours, refuse_stream
from dspy_resilient.targets.reasoning_models import fit
from dspy_resilient.targets.target import CONNECTION, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dspy_resilient.targets.protocols import Client

Given = tuple[Any, ...]
"""Fallbacks as a client keeps them: model names, which inherit from the primary, and LMs."""

_KEPT_FOR = {"context_window_fallbacks": Kind.CONTEXT, "policy_fallbacks": Kind.POLICY}

# Settings that mean something to one provider only, and would be sent to another as they are.
_OF_ONE_PROVIDER = ("aws_", "azure_", "databricks_", "oci_", "sagemaker_", "vertex_", "watsonx_")


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fallbacks:
    """Where a client's calls may go when the primary cannot answer.

    Attributes:
        given: What the user gave, by the name of the argument.
        general: Who is asked when others fail or are not to be asked, in order.
        special: Who is asked about a prompt that is too long (`Kind.CONTEXT`), or that a content
            filter refuses or answers with silence (`Kind.POLICY`).
        history: Where DSPy records their calls.
    """

    given: dict[str, Given]
    general: tuple[Target, ...]
    special: dict[Kind, tuple[Target, ...]]
    history: list[Any]

    @classmethod
    def build(cls, primary: Any, client: Client, given: dict[str, Any]) -> Self:
        """Return the fallbacks of `primary`; a `ResilientLM` among them brings its own along.

        Args:
            primary: The client.
            client: Its shared part.
            given: What the user gave, by the name of the argument; None is no fallback.

        Raises:
            TypeError: If one is no list, or something in it is no model name, LM or dict.
            ValueError: If a dict cannot be made an LM, or one leads back to the primary or to an
                earlier one of its list.
        """
        checked = {name: _check_list(name, given.get(name)) for name in FALLBACKS}
        targets = {
            name: _build(name, primary, client, fallbacks) for name, fallbacks in checked.items()
        }
        return cls._of(checked, targets, primary.history)

    @classmethod
    def _of(
        cls, given: dict[str, Given], targets: dict[str, tuple[Target, ...]], history: list[Any]
    ) -> Self:
        special = {kind: targets[name] for name, kind in _KEPT_FOR.items() if targets[name]}
        return cls(given, targets["fallbacks"], special, history)

    def all(self) -> tuple[Target, ...]:
        """Return the targets of every list."""
        return sum(self.special.values(), self.general)

    def can(self, capability: str, client: Client) -> bool:
        """Whether everybody can do what the primary can; log once if somebody cannot."""
        lacking = [each.lm.model for each in self.general if not getattr(each.lm, capability)]
        if lacking and capability not in client.lost:
            client.lost.add(capability)
            logger.warning(
                "dspy_resilient.capability_lost client=%s capability=%s fallback=%s",
                printable(client.name),
                capability,
                printable(lacking[0]),
                extra={"event": "dspy_resilient.capability_lost"},
            )
        return not lacking

    def recording(self, history: list[Any]) -> Self:
        """Return the same fallbacks, whose calls DSPy records in `history`."""

        def moved(targets: tuple[Target, ...]) -> tuple[Target, ...]:
            return tuple(dataclasses.replace(each, history=history) for each in targets)

        special = {kind: moved(targets) for kind, targets in self.special.items()}
        return type(self)(self.given, moved(self.general), special, history)

    def vary(self, primary: Any, client: Client, changes: dict[str, Any]) -> Self:
        """Return the fallbacks of a copy: a setting given to a copy reaches every target.

        As a setting given to a call does; what belongs to the primary's provider stays there. A
        fallback that the copy asks already, because it asks another model, is left out.
        """
        settings = {
            name: value
            for name, value in strip_secrets(changes)[0].items()
            if not _is_of_one_provider(name) and not hasattr(primary, name)
        }
        given: dict[str, Given] = {}
        targets: dict[str, tuple[Target, ...]] = {}
        for name, fallbacks in self.given.items():
            given[name], targets[name] = _vary(primary, client, fallbacks, settings)
        return self._of(given, targets, primary.history)


def _check_list(name: str, fallbacks: Any) -> Given:
    if fallbacks is None:
        return ()
    unordered = isinstance(fallbacks, (str, bytes, dict, set, frozenset))
    if unordered or not hasattr(fallbacks, "__iter__"):
        raise TypeError(
            f"ResilientLM: {name} must be a list of models; got a {type(fallbacks).__name__}"
        )
    return tuple(_check(name, each) for each in fallbacks)


def _build(name: str, primary: Any, client: Client, given: Given) -> tuple[Target, ...]:
    targets: list[Target] = []
    for fallback in given:
        for target in _targets(primary, client, fallback):
            if _is_asked(target, primary, targets):
                raise ValueError(
                    f"ResilientLM: {name} lead back to {target.lm.model!r}, which is asked already"
                )
            targets.append(target)
    return tuple(targets)


def _vary(
    primary: Any, client: Client, given: Given, settings: dict[str, Any]
) -> tuple[Given, tuple[Target, ...]]:
    varied: list[Any] = []
    targets: list[Target] = []
    for each in given:
        fallback = each if isinstance(each, str) else each.copy(**fit(each.model, settings))
        found = _targets(primary, client, fallback)
        fresh = [target for target in found if not _is_asked(target, primary, targets)]
        if fresh:
            varied.append(fallback)
            targets += fresh
    return tuple(varied), tuple(targets)


def _check(name: str, fallback: Any) -> Any:
    if isinstance(fallback, dict):
        refuse_ours("a fallback that is a dict", fallback)
        if not isinstance(fallback.get("model"), str):
            raise TypeError(
                f"ResilientLM: {name}: a fallback that is a dict needs a model, which is a str"
            )
        fallback = LM(**{"engine": "litellm", **fallback})
    if isinstance(fallback, str):
        if not fallback:
            raise ValueError(
                f"ResilientLM: {name}: a fallback must be a non-empty model name; got ''"
            )
    elif not isinstance(fallback, dspy.BaseLM):
        raise TypeError(
            f"ResilientLM: {name}: a fallback must be a model name, a dspy.LM, a ResilientLM or a "
            f"dict of dspy.LM arguments; got a {type(fallback).__name__}"
        )
    else:
        refuse_stream(fallback.kwargs)
        if (lender := _lender(fallback)) is not None and lender.closed:
            raise ValueError(
                f"ResilientLM: {name}: a fallback must be open; client {lender.name!r} was closed"
            )
    return fallback


def _lender(fallback: Any) -> Client | None:
    """Return the shared part of a `ResilientLM`, or None for another LM."""
    lend = getattr(fallback, "_lend_targets", None)
    return None if lend is None else lend()[0].routes.client


def _targets(primary: Any, client: Client, fallback: Any) -> Iterator[Target]:
    lent = getattr(fallback, "_lend_targets", None)
    if lent is not None:
        for target in lent():
            yield dataclasses.replace(
                target, client=client, history=primary.history, own_connection=True
            )
        return
    inherits = isinstance(fallback, str) and _provider(fallback) == _provider(primary.model)
    lm = _from_name(primary, fallback, inherits=inherits) if isinstance(fallback, str) else fallback
    yield Target(
        lm,
        client.fallback_routes,
        client,
        type(lm),
        primary.history,
        own_connection=not inherits,
    )


def _provider(model: str) -> str:
    provider, slash, _ = model.partition("/")
    return provider if slash else "openai"


def _from_name(primary: Any, model: str, *, inherits: bool) -> Any:
    """Return an LM for `model` with the primary's settings, and its connection if it `inherits`."""
    settings = {name: value for name, value in primary.kwargs.items() if value is not None}
    if not inherits:
        settings, _ = strip_secrets(settings)
        settings = {n: value for n, value in settings.items() if not _is_of_one_provider(n)}
    settings = fit(model, settings)
    if "max_completion_tokens" in settings:  # which dspy.LM takes by its old name only
        settings["max_tokens"] = settings.pop("max_completion_tokens")
    settings["engine"] = primary.engine if isinstance(primary.engine, str) else "litellm"
    settings["model_type"] = primary.model_type
    return LM(model, **settings)


def _is_of_one_provider(name: str) -> bool:
    return name in CONNECTION or name == "extra_body" or name.startswith(_OF_ONE_PROVIDER)


def _is_asked(target: Target, primary: Any, targets: list[Target]) -> bool:
    return any(_same(target.lm, lm) for lm in (primary, *(each.lm for each in targets)))


def _same(one: Any, other: Any) -> bool:
    return one is other or (
        (one.model, one.model_type) == (other.model, other.model_type)
        and one.kwargs == other.kwargs
    )
