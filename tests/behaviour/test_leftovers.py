"""However a call ends, it leaves nothing behind: no place taken, nobody waiting, no flight."""

from __future__ import annotations

import contextvars
import gc
import itertools
import os
import sys
import threading
from pathlib import Path

import dspy
import pytest

import dspy_resilient
from dspy_resilient import RetryPolicy
from dspy_resilient.testing import Hold, Status, rate_limited


def left_behind(lm):
    """Return what somebody would have to give back: attempts and queues, waiters, flights."""
    found = {"flights": len(lm._runtime.flights), "calls": len(lm._runtime.in_flight)}
    for route in lm._runtime.all_routes():
        queues = [route.gate, *filter(None, (route.circuit, route.access))]
        if route.limiter is not None:
            found["attempts"] = route.limiter.in_use
            found["queued"] = route.limiter.queued
        found["waiters"] = sum(each._notifier.waiting for each in queues)
    return {what: count for what, count in found.items() if count}


@pytest.mark.parametrize(("status", "error"), [(401, dspy.LMAuthError), (402, dspy.LMBillingError)])
def test_a_crowd_whose_credential_is_refused_gives_all_places_back(provider, make, status, error):
    """Those still under way when the credential's circuit opens change nothing about it."""
    lm = make(limits=6, cache=False, max_wait=0)
    hold = Hold(then=Status(status))
    provider.script(*[hold] * 6)
    errors = []

    def ask():
        with pytest.raises(error) as caught:
            lm("q")
        errors.append(caught.value)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    provider.wait_for(6)
    hold.release()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 6
    assert left_behind(lm) == {}


PACKAGE = str(Path(dspy_resilient.__file__).parent)
DROPPED = {"<genexpr>", "headers"}  # generators that are dropped half-way: nobody can be told
EVERY = int(os.environ.get("INTERRUPT_EVERY", "11"))  # 1 tries them all


class Interrupt:
    """Raises KeyboardInterrupt at the n-th moment at which Python looks for a signal in this package.

    That is where a function begins, and where a built-in one has returned. But not right after a
    lock was taken without waiting: nobody knows of it yet, so nobody could give it back.
    """

    def __init__(self, moment):
        self.left = moment
        self.where = None

    def __call__(self, frame, event, built_in):
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name in DROPPED or getattr(built_in, "__name__", "") == "acquire":
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
            sys.setprofile(None)
            raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.mark.parametrize("faults", [(), (Status(500),), (rate_limited(0.01),)], ids=str)
def test_ctrl_c_wherever_it_strikes_a_call_leaves_nothing(provider, make, faults):
    """Also where it does not hit a wait, and while its traceback is kept, as notebooks do."""
    context = contextvars.copy_context()  # what an interrupt leaves in it is not for other tests
    gc.disable()  # an interrupted finalizer is only warned of
    try:
        lm = make(limits=2, retry=RetryPolicy(base=0.0), on_event=lambda _: None, max_wait=5)
        lost = {}
        for moment in itertools.count(1, EVERY):
            provider._script.clear()
            provider.script(*faults)
            lm.clear_cache()
            kept = None
            with Interrupt(moment) as interrupt:
                try:
                    context.run(lm, "q")
                except KeyboardInterrupt as error:
                    kept = error
            if interrupt.where is None:
                break
            assert kept is not None, interrupt.where
            found = left_behind(lm)
            for bounded in ("places", "waiters", "calls"):  # which a lease ends, or a grace
                found.pop(bounded, None)
            if found:
                lost[interrupt.where] = found
                lm.restart()
            lm.reset()
    finally:
        gc.enable()
    assert moment > 100
    assert lost == {}
    assert context.run(lm, "q") == ["Paris"]
