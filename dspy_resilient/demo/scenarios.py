"""What can happen to the provider of a demo, and how it is announced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspy_resilient.testing import Chaos, Fault, Hang, Status, rate_limited


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One kind of trouble.

    Attributes:
        what: What the provider does, as the end of a sentence.
        state: The same in a word, for the table.
        fault: What each request meets.
        window: When it begins and ends, as shares of the whole time.
        settings: Keyword arguments that both sides get.
        fallback: Whether `ResilientLM` has a second provider to go to.
    """

    what: str
    state: str
    fault: Fault
    window: tuple[float, float] = (0.25, 0.7)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fallback: bool = False

    def announce(self, callers: int, seconds: float) -> str:
        """Return two lines: who calls, and what will happen when."""
        begin, end = (share * seconds for share in self.window)
        extra = "".join(f", {name}={value}" for name, value in self.settings.items())
        extra += "; ResilientLM has a fallback that is well" if self.fallback else ""
        return (
            f"{callers} callers each, for {seconds:g} s: defaults on both sides, no cache{extra}.\n"
            f"From {begin:g} s to {end:g} s the provider (on this machine) {self.what}.\n\n"
        )


SCENARIOS: Mapping[str, Scenario] = {
    "outage": Scenario(what="answers 503 to everything", state="DOWN", fault=Status(503)),
    "brownout": Scenario(
        what="answers 503 to 40 % of the requests, at random",
        state="40 % 503",
        fault=Chaos(seed=1, rate=0.4, faults=(Status(503),)),
    ),
    "throttle": Scenario(
        what="answers 429, try again in 3 s",
        state="429",
        fault=rate_limited(retry_after=3),
        window=(0.25, 0.5),
    ),
    "hang": Scenario(
        what="accepts requests and says nothing",
        state="HANGS",
        fault=Hang(),
        settings={"timeout": 3},
    ),
    "fallback": Scenario(
        what="answers 503 to everything", state="DOWN", fault=Status(503), fallback=True
    ),
}
