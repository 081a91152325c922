"""Copies of a client, which are the same client, and what is saved of it, which is another one."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, Self

from dspy_resilient.lm.entry import CallEntry
from dspy_resilient.lm.options import check_call_options, refuse_to_copy
from dspy_resilient.lm.saving import (
    STATE_KEY,
    TRAINING,
    clean_state,
    dump_options,
    load_options,
    savable,
)
from dspy_resilient.pipeline.options import NOT_SAVED, Options
from dspy_resilient.targets.keywords import FALLBACKS, refuse_stream

if TYPE_CHECKING:
    from collections.abc import Iterable


class Copyable(CallEntry):
    """An LM whose copies share cache, circuits and limits, and whose saved state holds no secret."""

    _given_name: str | None
    _dropped: tuple[str, ...]

    if TYPE_CHECKING:

        def _start(self, options: Options, fallbacks: dict[str, Any]) -> None: ...

    def copy(self, **kwargs: Any) -> Self:
        """Return a copy with other settings that is the same client: same circuit, cache, limits.

        But with `shared=`, for a client whose store could not be saved: that is a new client of the
        same configuration, which shares through that store.

        Raises:
            TypeError: If `kwargs` names something that belongs to the client as a whole.
        """
        shared = kwargs.pop("shared", None)
        if shared is not None:
            return self._sharing(shared).copy(**kwargs)
        refuse_to_copy(kwargs)
        own = ("max_wait", "deadline", "num_retries", "cache")
        check_call_options(**{name: kwargs[name] for name in own if name in kwargs})
        refuse_stream(kwargs)
        copied: Self = super().copy(**kwargs)
        if kwargs:
            copied._fallbacks = self._fallbacks.vary(copied, self._runtime, kwargs)
        return copied

    def _sharing(self, shared: Any) -> Self:
        before = self._runtime.options
        if before.shared is not NOT_SAVED and before.shared is not None:
            raise TypeError("ResilientLM.copy: this client shares already; build a new one instead")
        twin: Self = copy.deepcopy(self)
        twin._start(dataclasses.replace(before, shared=shared), self._fallbacks.given)
        twin._is_rebuilt = self._is_rebuilt
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that is the same client, with keywords of its own."""
        twin: Self = copy.copy(self)
        memo[id(self)] = twin
        twin.kwargs = copy.deepcopy(self.kwargs, memo)
        twin.callbacks = list(self.callbacks)
        twin.history = list(self.history)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle may hold: no runtime, no credential, no callable."""
        state: dict[str, Any] = super().__getstate__()
        state["kwargs"], secrets, lost = savable(self.kwargs)
        state["_dropped"] = tuple(sorted({*self._dropped, *secrets}))
        for name in TRAINING:
            state[name], own, hooks = savable(state[name])
            lost = (*lost, *own, *hooks)
        if self.callbacks:
            lost = (*lost, "callbacks")
        for name in ("_runtime", "_primary", "_fallbacks", "_is_rebuilt"):
            del state[name]
        state["history"] = []
        state["callbacks"] = []
        state[STATE_KEY] = self._dump_options(lost)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild from a pickle with an empty runtime."""
        state = dict(state)
        options = load_options(state.pop(STATE_KEY), type(self), allow_custom=True)
        super().__setstate__(state)
        name = options.pop("name")
        fallbacks = {each: options.pop(each) for each in FALLBACKS}
        circuit = options.pop("circuit") or None
        self._start(Options(name=name or self.model, circuit=circuit, **options), fallbacks)
        self._is_rebuilt = True

    def dump_state(self) -> dict[str, Any]:
        """Return JSON-ready state that rebuilds this client, with no credential in it.

        Warns once of what cannot be saved and will not be missed by a call: functions, and
        credentials of `launch_kwargs` and `train_kwargs`.
        """
        state, secrets, lost = clean_state(super().dump_state(), self.kwargs)
        state.setdefault("engine", self.engine)
        state[STATE_KEY] = {
            **self._dump_options(lost),
            "dropped": sorted({*self._dropped, *secrets}),
            "max_wait": self.max_wait,
            "deadline": self.deadline,
        }
        return state

    def _dump_options(self, lost: Iterable[str]) -> dict[str, Any]:
        return dump_options(self._runtime.options, self._given_name, self._fallbacks.given, lost)

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> Self:
        """Rebuild a client from `dump_state()`, or from that of a plain `dspy.LM`.

        Same policies, empty runtime. Credentials were never saved; they are read from the
        environment when a call is made, and LMConfigurationError then names what is missing.
        """
        state = dict(state)
        options = dict(state.pop(STATE_KEY, {}))
        dropped = options.pop("dropped", ())
        cached, retries = state.pop("cache", True), state.pop("num_retries", 3)
        if options:
            options = load_options(options, cls, allow_custom=allow_custom_lm_class)
        else:
            options["num_retries"] = retries
        lm: Self = super().load_state(
            {**state, **options}, allow_custom_lm_class=allow_custom_lm_class
        )
        lm.cache, lm.num_retries = cached, retries
        lm._dropped = tuple(dropped)
        lm._is_rebuilt = True
        return lm
