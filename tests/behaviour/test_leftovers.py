"""However a call ends, it leaves nothing behind: no place taken, nobody waiting, no flight."""

from __future__ import annotations

import threading

import dspy
import pytest

from dspy_resilient.testing import Hold, Status


def left_behind(lm):
    """Return what somebody would have to give back: attempts and queues, waiters, flights."""
    found = {"flights": len(lm._runtime.flights), "calls": len(lm._runtime.under_way)}
    for route in lm._runtime.all_routes():
        queues = [route.gate, *filter(None, (route.circuit, route.access))]
        if route.limiter is not None:
            found["attempts"] = route.limiter.in_use
            found["queued"] = route.limiter.queued
        found["places"] = sum(len(each._places._leases) for each in queues)
        found["waiters"] = sum(each._signals.waiting for each in queues)
    return {what: count for what, count in found.items() if count}


@pytest.mark.parametrize(("status", "error"), [(401, dspy.LMAuthError), (402, dspy.LMBillingError)])
def test_a_crowd_whose_credential_is_refused_gives_all_places_back(provider, make, status, error):
    """Those still under way when the credential's circuit opens change nothing about it (R21)."""
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
