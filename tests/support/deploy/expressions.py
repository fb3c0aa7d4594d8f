"""What the dashboard and the alert rules ask of Prometheus, and whether metrics pages have it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import promql_parser as promql
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "reft-serve.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
# Made by Prometheus itself, for whatever it scrapes.
_OWN_METRICS, _OWN_LABELS = {"up"}, {"instance", "job"}


@dataclass(frozen=True)
class Asked:
    """An expression. `where` says whose; `legend` are the labels that its legend shows."""

    where: str
    text: str
    legend: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Selector:
    """A metric as an expression selects it: matchers as (label, regular expression), and labels
    that it groups by.
    """

    metric: str
    matchers: tuple[tuple[str, str], ...]
    labels: frozenset[str]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    return [
        panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
    ]


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def asked() -> list[Asked]:
    """Every expression of dashboard and rules, with Grafana's variables filled in."""
    found = [
        Asked(
            panel["title"],
            _filled(target["expr"]),
            frozenset(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"])),
        )
        for panel in panels()
        for target in panel["targets"]
    ]
    return found + [Asked(rule["alert"], rule["expr"]) for rule in alerts()]


def _filled(expression: str) -> str:
    return expression.replace("$__rate_interval", "5m").replace("$tenant", ".*")


def selectors(expression: Asked) -> list[Selector]:
    """The metrics that an expression reads. Raises ValueError where it is not PromQL."""
    return list(_selectors(promql.parse(expression.text), expression.legend))


def _selectors(node: Any, labels: frozenset[str]) -> Iterator[Selector]:
    match node:
        case promql.VectorSelector():
            matchers = tuple((m.name, _pattern(m)) for m in node.matchers.matchers)
            yield Selector(node.name or "", matchers, labels)
        case promql.MatrixSelector():
            yield from _selectors(node.vector_selector, labels)
        case promql.AggregateExpr():
            by = frozenset(node.modifier.labels) if node.modifier is not None else frozenset()
            yield from _selectors(node.expr, labels | by)
        case promql.BinaryExpr():
            yield from _selectors(node.lhs, labels)
            yield from _selectors(node.rhs, labels)
        case promql.Call():
            for argument in node.args:
                yield from _selectors(argument, labels)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _selectors(node.expr, labels)


def _pattern(matcher: Any) -> str:
    assert matcher.op in (promql.MatchOp.Equal, promql.MatchOp.Re), "only = and =~ are used"
    return matcher.value if matcher.op == promql.MatchOp.Re else re.escape(matcher.value)


def unmet(
    pages: Sequence[str],
    *,
    seldom: frozenset[str] = frozenset(),
    of: Callable[[str], bool] = lambda metric: True,
) -> list[str]:
    """What dashboard and rules ask for and no page has, in sentences.

    Args:
        pages: metrics pages of every process.
        seldom: labels whose values need not be there: an answer 5xx, for instance.
        of: which metrics are looked for.
    """
    samples: dict[str, list[dict[str, str]]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample.labels)
    missing = []
    for expression in asked():
        for selector in selectors(expression):
            if selector.metric in _OWN_METRICS or not of(selector.metric):
                continue
            labels = (selector.labels | {name for name, _ in selector.matchers}) - _OWN_LABELS
            patterns = [
                (name, pattern)
                for name, pattern in selector.matchers
                if name not in seldom | _OWN_LABELS
            ]
            if not any(
                labels <= set(sample)
                and all(re.fullmatch(pattern, sample[name]) for name, pattern in patterns)
                for sample in samples.get(selector.metric, [])
            ):
                missing.append(
                    f"{expression.where}: no sample of {selector.metric} with {sorted(labels)}, "
                    f"{patterns}"
                )
    return missing
