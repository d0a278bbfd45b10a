"""The helpers that read PromQL see what is wrong with an expression."""

from __future__ import annotations

import promql
import pytest

KNOWN = {
    "asked_total": frozenset({"job", "model", "code"}),
    "waiting": frozenset({"job", "model"}),
    "seconds_bucket": frozenset({"job", "model", "le"}),
}


def test_a_selector_knows_its_metric_matchers_function_and_range():
    (first, second) = promql.selectors('sum by (job) (rate(asked_total{code=~"OK|X", job!="a"}[5m])) > waiting')
    assert first == promql.Selector(
        "asked_total", (promql.Matcher("code", "=~", "OK|X"), promql.Matcher("job", "!=", "a")), "rate", 300.0
    )
    assert second == promql.Selector("waiting", (), "", None)


@pytest.mark.parametrize(
    ("expr", "labels"),
    [
        ("waiting", {"job", "model"}),
        ("sum(waiting)", set()),
        ("sum by (job) (rate(asked_total[5m])) / sum by (job) (waiting)", {"job"}),
        ("sum without (job) (waiting)", {"model"}),
        ("histogram_quantile(0.9, sum by (le, model) (rate(seconds_bucket[5m])))", {"model"}),
        ("1 - waiting", {"job", "model"}),
        ("sum(waiting) or vector(0)", set()),
        ("sum by (job) (rate(asked_total[5m]) or waiting)", {"job"}),
        ("absent(waiting)", set()),
    ],
)
def test_labels_of_an_expression(expr, labels):
    assert promql.labels(expr, KNOWN) == labels


@pytest.mark.parametrize(
    ("expr", "complaint"),
    [
        ("nothing", "there is no metric nothing"),
        ('waiting{code="OK"}', "waiting has no label code"),
        ("sum by (code) (waiting)", "code"),
        ("sum by (code) (rate(asked_total[5m]) or waiting)", "code"),
        ("rate(asked_total[5m]) / waiting", "match nothing"),
        ("waiting and sum(waiting)", "match nothing"),
        ("histogram_quantile(0.9, sum by (model) (rate(seconds_bucket[5m])))", "needs le"),
    ],
)
def test_what_can_never_work_is_refused(expr, complaint):
    with pytest.raises(ValueError, match=complaint):
        promql.labels(expr, KNOWN)
