"""What is in contrib/: promtool reads it, and it names metrics and labels that there are."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from fanwise.metrics.health import METRICS, STATES

ROOT = Path(__file__).parents[2]
RULES = ROOT / "contrib/fanwise.rules.yml"
DASHBOARD = ROOT / "contrib/grafana-dashboard.json"

_spec = spec_from_file_location("promtool", Path(__file__).with_name("promtool.py"))
promtool = module_from_spec(_spec)
_spec.loader.exec_module(promtool)


def series():
    """Every name that can stand in a query, and the labels it has."""
    out = {}
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for end in ends:
            out[metric.name + end] = {*metric.labels, *(["le"] if end == "_bucket" else [])}
    return out


def panel_queries():
    document = json.loads(DASHBOARD.read_text())
    for panel in document["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def rule_queries():
    for line in RULES.read_text().splitlines():
        if found := re.match(r"\s+expr: (.*)", line):
            yield found[1]


def assert_names_exist(query):
    known = series()
    names = re.findall(r"\bfanwise_\w+", query)
    assert names or "vector" in query
    for name in names:
        assert name in known, query
    for name, inside in re.findall(r"\b(fanwise_\w+)\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*[=!]~?", inside):
            assert label in known[name], query
    for states in re.findall(r'state(?:=|!=|=~)"([^"]*)"', query):
        assert set(states.split("|")) <= set(STATES)


def test_promtool_accepts_the_alert_rules(cannot_run):
    status, said = promtool.check(cannot_run, "check", "rules", RULES)
    assert (status, f"{len(list(rule_queries()))} rules found" in said) == (0, True), said


def test_alerts_name_what_there_is():
    queries = list(rule_queries())
    assert len(queries) > 5
    for query in queries:
        assert_names_exist(query)
    text = RULES.read_text()
    # Labels in the texts are of the metric of their own rule.
    for rule in text.split("- alert: ")[1:]:
        (name, *_) = re.findall(r"\bfanwise_\w+", rule)
        assert set(re.findall(r"\$labels\.(\w+)", rule)) <= series()[name]


def test_promtool_parses_each_query_of_the_dashboard(cannot_run, tmp_path):
    lines = ["groups:", "  - name: dashboard", "    rules:"]
    count = 0
    for title, query in panel_queries():
        if query.startswith("label_values("):
            continue
        query = query.replace("$__rate_interval", "5m").replace("$device", ".*")
        assert "$" not in query, title
        lines += [f"      - record: fanwise:q{count}", f"        expr: {json.dumps(query)}"]
        count += 1
    path = tmp_path / "dashboard.yml"
    path.write_text("\n".join(lines) + "\n")
    status, said = promtool.check(cannot_run, "check", "rules", path)
    assert status == 0, said
    assert f"{count} rules found" in said
    path.write_text(path.read_text().replace("sum(", "sum((", 1))
    assert promtool.check(cannot_run, "check", "rules", path)[0] != 0


def test_the_dashboard_names_what_there_is():
    for _, query in panel_queries():
        assert_names_exist(query)
    shown = {n for _, q in panel_queries() for n in re.findall(r"\bfanwise_\w+", q)}
    assert {m.name for m in METRICS} <= {n.removesuffix("_bucket") for n in shown}


def test_panels_do_not_lie_on_each_other():
    taken = set()
    ids = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["id"] not in ids
        ids.add(panel["id"])
