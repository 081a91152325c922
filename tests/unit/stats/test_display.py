"""What people see: an aligned table, HTML that loads nothing, and names that stay names."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import dspy
import pytest

from dspy_resilient import CircuitBreaker, CircuitPolicy, Health, HealthState
from dspy_resilient.events import printable
from dspy_resilient.stats import Latency, Stats
from dspy_resilient.stats.display import badge, client_html, clients_html
from dspy_resilient.testing import Clock, rate_limited

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\n"
NUMBERS = Stats(
    client="fast",
    seconds=320.0,
    calls=1204,
    hits=301,
    errors=3,
    attempts=903,
    failures=20,
    failed_by_target={"openai/m": {"failure": 15, "timeout": 5}},
    skipped={"truncated": 2},
    tokens_saved=12345,
    cost_saved=0.5,
    latency=Latency(tuple(int(number == 80) * 883 for number in range(168)), 883.0),
    recent=Stats(client="fast", seconds=60.0, calls=120, hits=30, attempts=90),
)


class Page(HTMLParser):
    """The tags, attributes and text of a piece of HTML, and whether all tags are closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def views(name):
    breaker = CircuitBreaker(CircuitPolicy(), name=name)
    breaker.force_open(name)
    stats = Stats(client=name, failed_by_target={name: {name: 1}}, skipped={name: 2})
    yield breaker._repr_html_()
    yield stats._repr_html_()
    yield client_html(name, [(name, name, name)], stats)
    yield clients_html([(name, name, name, stats)])


@pytest.mark.parametrize("html", [*views(HOSTILE)], ids=["circuit", "stats", "client", "clients"])
def test_a_name_stays_a_name(html):
    """Nothing in a model's name becomes HTML, and no control character passes."""
    page = Page(html)
    assert set(page.tags) <= {"div", "span", "table", "tr", "th", "td"}
    assert {name for name, _ in page.attributes} <= {"style"}
    assert "<script>alert(1)</script>" in page.text
    assert page.text.replace("\N{EM SPACE}", "").isprintable()


@pytest.mark.parametrize("html", [*views("fast")], ids=["circuit", "stats", "client", "clients"])
def test_the_html_loads_nothing(html):
    """No script, no style sheet, no address: it works offline and tells nobody."""
    assert not re.search(r"https?:|//|url\(|@import|src=|href=|<style|<link|<script", html)


def test_a_client_at_an_endpoint_shows_it_as_text():
    """An address is something to read, never something to follow."""
    page = Page(client_html("m", [("m at http://a.b/v1", "open", "open for 3 s")], NUMBERS))
    assert "http://a.b/v1" in page.text
    assert "a" not in page.tags


def test_every_state_has_a_badge_that_reads_on_light_and_on_dark():
    """A badge brings both colours; the rest takes the notebook's own."""
    looks = {badge(state) for state in ("closed", "open", "half_open", "forced_open", "unknown")}
    assert len(looks) == 5
    assert all("background:#" in look and "color:#fff" in look for look in looks)
    rest = client_html("m", [], NUMBERS)
    assert not re.search(r"color:(?!rgba)", rest.replace("border-color", ""))


def test_a_card_says_what_is_wrong():
    """Closed, broken and throttled are said beside the title, each in a badge."""
    page = Page(client_html("m", [], NUMBERS, ["broken", "throttled"]))
    assert "m broken throttled" in " ".join(page.text.split())
    health = Health(
        client="<b>", model="m", state=HealthState.OPEN, retry_after=90.0, in_flight=1200
    )
    page = Page(health._repr_html_())
    assert "<b>" in page.text
    assert "1,200 under way, may change in 1 min 30 s" in page.text


def test_a_client_says_its_condition(make):
    """Its card follows it, from ready to closed."""
    lm = make()
    assert "ready" in Page(lm._repr_html_()).text
    lm.close()
    assert "closed" in Page(lm._repr_html_()).text


def test_a_throttled_client_says_so(make, provider):
    """The pause that a provider has asked for is a condition of its own."""
    lm = make(max_wait=0)
    provider.always(rate_limited(30))
    with pytest.raises(dspy.LMError):
        lm("?", num_retries=0)
    assert "throttled" in Page(lm._repr_html_()).text


def test_the_table_is_aligned():
    """Every line of a column ends at the same place, and says the same with and without colours."""
    lines = str(NUMBERS).splitlines()
    assert lines[0].split() == ["fast", "in", "5", "min", "20", "s", "last", "1", "min"]
    assert lines[1].split() == ["calls", "1,204", "120"]
    assert lines[2].split() == ["answered", "from", "the", "cache", "301", "25%", "30", "25%"]
    shares = [line for line in lines if line.endswith("%")]
    assert len(shares) > 2
    assert len({len(line) for line in shares}) == 1


def test_the_table_leaves_out_what_never_happened():
    """A quiet client has a short table."""
    assert [line.split("  ")[0] for line in str(Stats(client="quiet")).splitlines()] == [
        "quiet",
        "calls",
        "requests sent",
    ]


def test_the_table_shows_parts_times_and_savings():
    """What went wrong, how long answers took, and what was not paid for."""
    text = str(NUMBERS)
    for words in (
        r"^    failure +15",
        r"^    timeout +5",
        r"not kept: truncated +2",
        r"half answered within +\d\.\d s +-",
        r"tokens saved +12,345",
        r"dollars saved +0\.5000",
    ):
        assert re.search(words, text, flags=re.MULTILINE), words


def test_html_and_text_say_the_same():
    """One list of rows, shown in two ways."""
    page = Page(NUMBERS._repr_html_())
    squeezed = re.sub(r"\s+", "", page.text)
    assert squeezed == re.sub(r"\s+", "", str(NUMBERS))


def test_a_hostile_name_cannot_steer_a_terminal():
    """No escape sequence and no second line."""
    assert printable("a\x1b[2J\nb\u202ec") == "a�[2J�b�c"
    assert len(str(Stats(client=HOSTILE)).splitlines()) == 3


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda b: None, "closed for 12 s"),
        (
            lambda b: b.admit().failure(TimeoutError("late")),
            "closed for 12 s, with 1 failures in a row",
        ),
        (
            lambda b: b.trip(error="boom"),
            "open for 0.0 s (manual), for 20 s more; last error: boom",
        ),
        (lambda b: b.force_open("tea"), "forced open for 0.0 s (tea), until auto() or reset()"),
        (lambda b: b.force_open("tea", 300), "forced open for 0.0 s (tea), for 5 min more"),
        (lambda b: b.force_half_open(), "half open for 0.0 s, until a probe is answered"),
        (lambda b: b.force_open("tea", 0.5), "forced open for 0.0 s (tea), for 0.5 s more"),
        (
            lambda b: (b.trip("tea"), b.force_closed()),
            "forced closed for 0.0 s, until auto() or reset()",
        ),
    ],
)
def test_a_circuit_says_what_why_since_when_and_until_when(act, says):
    """In words, in every state."""
    clock = Clock()
    breaker = CircuitBreaker(CircuitPolicy(recovery_time=20, jitter=0), clock=clock)
    clock.advance(12)
    act(breaker)
    assert breaker.explain() == says
