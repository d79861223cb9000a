"""The dashboard asks for what is exported, and the example of Prometheus reads the file that Ray writes."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from latentmill.jobs.executors.metrics import METRICS, OUTPUT
from latentmill.jobs.executors.ray_metrics import EXPORTED_PREFIX
from latentmill.jobs.stages import STAGES

FOLDER = Path(__file__).parents[1] / "configs/cluster"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
RAYS_OWN = {"ray_node_gpus_utilization"}
RAY = Path(importlib.util.find_spec("ray").origin).parent


def test_it_shows_every_metric_and_asks_for_no_other():
    [outputs] = [each["definition"] for each in DASHBOARD["templating"]["list"] if each["name"] == "output"]
    asked = {name for text in (*EXPRESSIONS, outputs) for name in re.findall(r"\bray_\w+", text)}
    assert asked - RAYS_OWN == {f"{EXPORTED_PREFIX}{name}" for name in METRICS}
    agent = (RAY / "dashboard/modules/reporter/reporter_agent.py").read_text(encoding="utf-8")
    assert all(f'"{name.removeprefix(EXPORTED_PREFIX)}"' in agent for name in asked & RAYS_OWN)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_asks_for_labels_that_the_metric_has_and_for_the_chosen_outputs(expression: str):
    for name, labels in re.findall(r"ray_(latentmill_\w+)\{([^}]*)\}", expression):
        asked = dict(re.findall(r"(\w+)!?=~?\"([^\"]*)\"", labels))
        assert asked.pop(OUTPUT) == "$output"
        assert asked.keys() <= set(METRICS[name].labels)
    found = re.findall(r"ray_(latentmill_\w+)", expression)
    for by in re.findall(r"by \((\w+)\)", expression):
        assert any(by in METRICS[name].labels for name in found)
    assert expression.count("(") == expression.count(")")


def test_only_counters_are_asked_for_their_rate():
    asked = {name for text in EXPRESSIONS for name in re.findall(r"rate\(ray_(latentmill_\w+)", text)}
    assert {METRICS[name].kind for name in asked} == {"counter"}
    assert all(name.endswith("_total") == (metric.kind == "counter") for name, metric in METRICS.items())


def test_it_has_what_grafana_needs_to_import_it():
    assert {"title", "uid", "schemaVersion", "version", "time", "templating", "panels"} <= DASHBOARD.keys()
    kinds = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "output": "query", "window": "custom"}
    assert {name for text in EXPRESSIONS for name in re.findall(r"\$(\w+)", text)} == {"output", "window"}
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert {"type", "title", "description", "gridPos", "fieldConfig", "options"} <= panel.keys()
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_no_panel_lies_on_another():
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = [one[a] + one[s] <= other[a] or other[a] + other[s] <= one[a] for a, s in (("x", "w"), ("y", "h"))]
        assert any(apart)


def test_prometheus_reads_the_file_in_which_ray_lists_its_nodes():
    [scrape] = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    [place] = scrape["file_sd_configs"]
    [file] = place["files"]
    assert place["refresh_interval"] == "10s"  # by itself Prometheus sees no change behind a symbolic link
    constants = (RAY / "_private/ray_constants.py").read_text(encoding="utf-8")
    assert f'PROMETHEUS_SERVICE_DISCOVERY_FILE = "{Path(file).name}"' in constants


def test_the_page_about_metrics_names_every_stage():
    page = (FOLDER.parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    assert [stage for stage in STAGES if f"`{stage}` (" not in page] == ["sample"]
