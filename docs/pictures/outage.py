"""Draws outage-light.svg and outage-dark.svg: the same traffic through one outage, defaults on both sides.

    python docs/pictures/outage.py

Takes a minute: it is what happens, in real time. Needs matplotlib (the group `notebooks`).
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp()

import dspy
import matplotlib as mpl
import matplotlib.pyplot as plt

from dspy_resilient import ResilientLM
from dspy_resilient.testing import Provider, Status

logging.disable(logging.CRITICAL)
OUTAGE, END, CALLERS, LATENCY = (8.0, 28.0), 40.0, 12, 0.8
HERE = Path(__file__).parent
# Okabe and Ito's colours, which the colour-blind can tell apart; the markers differ too.
THEMES = {
    "light": {"ink": "#1f2328", "good": "#0072b2", "bad": "#c14d00", "band": "#d0d7de"},
    "dark": {"ink": "#e6edf3", "good": "#56b4e9", "bad": "#ff8c42", "band": "#3d444d"},
}
numbers = itertools.count()


def work(lm, calls, begun):
    """Ask one question after the other, and note when each call ended and how."""
    while time.monotonic() - begun < END:
        started = time.monotonic()
        try:
            lm(f"Question {next(numbers)}?")
            answered = True
        except Exception:
            answered = False
        now = time.monotonic()
        calls.append((now - begun, now - started, answered))


def drill():
    """Return the calls and the requests of each side."""
    sides = {}
    for name, make in {"dspy.LM": dspy.LM, "ResilientLM": ResilientLM}.items():
        provider = Provider("An answer.", latency=LATENCY).start()
        lm = make("openai/demo", api_base=provider.api_base, api_key="none", cache=False)
        lm("Are you there?")  # imports and connects before the clock runs
        provider.clear()
        sides[name] = lm, provider, []
    begun = time.monotonic()
    threads = [
        threading.Thread(target=work, args=(lm, calls, begun))
        for lm, _, calls in sides.values()
        for _ in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    time.sleep(OUTAGE[0])
    for _, provider, _ in sides.values():
        provider.down(Status(503))
    time.sleep(OUTAGE[1] - OUTAGE[0])
    for _, provider, _ in sides.values():
        provider.up()
    for thread in threads:
        thread.join()
    found = {}
    for name, (lm, provider, calls) in sides.items():
        found[name] = calls, [request.at - begun for request in provider.requests]
        lm.close()
        provider.stop()
    return found


def draw(found, theme, path):
    """Draw what was found."""
    ink, good, bad, band = (THEMES[theme][name] for name in ("ink", "good", "bad", "band"))
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    style = dict.fromkeys((*inked, "xtick.color", "ytick.color"), ink)
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "outage"}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            2, 2, figsize=(10, 5), sharex=True, sharey="row", layout="constrained"
        )
        for (top, bottom), (name, (calls, requests)) in zip(axes.T, found.items(), strict=True):
            for axis in (top, bottom):
                axis.axvspan(*OUTAGE, color=band, alpha=0.45, lw=0)
                axis.spines[["top", "right"]].set_visible(False)
            for answered, marker, colour, what in (
                (True, "o", good, "answered"),
                (False, "x", bad, "lost"),
            ):
                dots = [(end, took) for end, took, ok in calls if ok == answered]
                label = f"{len(dots)} {what}"
                xs, ys = zip(*dots, strict=True) if dots else ((), ())
                top.scatter(xs, ys, s=16, marker=marker, color=colour, label=label, alpha=0.8)
            top.set_title(name, loc="left", fontweight="bold")
            top.legend(loc="upper left", frameon=False)
            during = sum(OUTAGE[0] <= at < OUTAGE[1] for at in requests)
            bottom.hist(requests, bins=range(int(END) + 2), color=good)
            bottom.set_xlabel("time (s)")
            bottom.set_xlim(0, END + 1)
            bottom.text(
                sum(OUTAGE) / 2, 0.86, f"{during} requests in the outage",
                ha="center", transform=bottom.get_xaxis_transform(),
            )  # fmt: skip
        axes[0, 0].set_ylabel("duration of a call (s)")
        axes[1, 0].set_ylabel("requests per second")
        top = axes[0, 0].get_ylim()[1]
        axes[0, 0].set_ylim(0, top * 1.25)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    found = drill()
    for theme in THEMES:
        draw(found, theme, HERE / f"outage-{theme}.svg")
    for name, (calls, requests) in found.items():
        lost = sum(not ok for *_, ok in calls)
        slowest = max(took for _, took, ok in calls if ok)
        print(f"{name}: {len(calls) - lost} answered, {lost} lost, {len(requests)} requests, "
              f"slowest answer {slowest:.1f} s")  # fmt: skip
