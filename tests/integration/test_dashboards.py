"""The dashboard and the alert rules ask for metrics that exist, and the real programs take them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dspy_resilient.observe.prometheus import ClientCollector
from dspy_resilient.testing import Status

DASHBOARDS = Path(__file__).parents[2] / "docs/dashboards"
RULES = DASHBOARDS / "alerts.yml"
GRAFANA = json.loads((DASHBOARDS / "grafana.json").read_text())


@pytest.fixture
def metrics(make, provider):
    """What a scrape of a client that has met everything shows: names, with the names of their labels."""
    lm = make(num_retries=1)
    lm("an answer")
    provider.script(Status(503))
    lm("a retry")
    registry = CollectorRegistry()
    registry.register(ClientCollector(lm))
    found = {}
    for line in generate_latest(registry).decode().splitlines():
        if sample := re.match(r"(\w+)\{(.*)\} ", line):
            found.setdefault(sample[1], set()).update(re.findall(r"(\w+)=\"", sample[2]))
    for name in re.findall(r"# TYPE (\w+)", generate_latest(registry).decode()):
        found.setdefault(name, set())
    return found


def expressions():
    """Every expression of both files."""
    yield from re.findall(r"expr: (?:>\n)?((?:.|\n {10})*)", RULES.read_text())
    for panel in GRAFANA["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_every_metric_that_is_asked_for_exists(metrics):
    """A renamed metric fails here, and not silently on somebody's wall."""
    asked = [name for text in expressions() for name in re.findall(r"dspy_resilient_\w+", text)]
    assert len(asked) > 20
    assert not {name for name in asked if name not in metrics}


def test_every_label_that_is_asked_for_exists(metrics):
    """A matcher for a label that is not there matches nothing."""
    for text in expressions():
        for name, matchers in re.findall(r"(dspy_resilient_\w+)\{([^}]*)\}", text):
            if labels := metrics[name]:
                assert set(re.findall(r"(\w+)(?:=|!)", matchers)) <= labels, text


def test_the_dashboard_is_one_that_grafana_imports():
    """Ids are unique, each panel lies on the grid, each asks the chosen data source."""
    panels = GRAFANA["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {v["name"] for v in GRAFANA["templating"]["list"]} == {"datasource", "client"}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count("(") == target["expr"].count(")")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_prometheus_takes_the_rules_and_every_expression(tmp_path):
    """Its own checker reads the alerts, and the dashboard's queries as recording rules."""
    subprocess.run(["promtool", "check", "rules", RULES], check=True, capture_output=True)
    queries = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(expressions())
    ]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": queries}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", file], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
