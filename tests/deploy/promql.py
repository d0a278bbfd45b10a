"""What a PromQL expression asks for, read off its syntax tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser as ast

Labels = frozenset[str]


@dataclass(frozen=True)
class Matcher:
    """One condition on a label."""

    label: str
    operator: str
    """=, !=, =~ or !~."""
    value: str


@dataclass(frozen=True)
class Selector:
    """One vector selector, and what is done with it."""

    metric: str
    matchers: tuple[Matcher, ...]
    function: str
    """The function that is applied to it directly; "" if there is none."""
    range_s: float | None
    """Of a range vector; a subquery's range is not the selector's."""


def selectors(text: str) -> list[Selector]:
    """Every selector of an expression, from left to right."""
    return list(_selectors(ast.parse(text), ""))


def functions(text: str) -> set[str]:
    """The names of the functions that an expression calls."""
    return {node.func.name for node in _nodes(ast.parse(text)) if isinstance(node, ast.Call)}


def _selectors(node: Any, function: str) -> Iterator[Selector]:
    if isinstance(node, ast.VectorSelector):
        yield _selector(node, function, None)
    elif isinstance(node, ast.MatrixSelector):
        yield _selector(node.vector_selector, function, node.range.total_seconds())
    else:
        name = node.func.name if isinstance(node, ast.Call) else ""
        for child in _children(node):
            yield from _selectors(child, name)


def _selector(node: Any, function: str, range_s: float | None) -> Selector:
    matchers = tuple(Matcher(one.name, _SIGNS[int(one.op)], one.value) for one in node.matchers.matchers)
    return Selector(node.name, matchers, function, range_s)


_SIGNS = {
    int(ast.MatchOp.Equal): "=",
    int(ast.MatchOp.NotEqual): "!=",
    int(ast.MatchOp.Re): "=~",
    int(ast.MatchOp.NotRe): "!~",
}


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _nodes(child)


def _children(node: Any) -> list[Any]:
    match node:
        case ast.Call():
            return list(node.args)
        case ast.BinaryExpr():
            return [node.lhs, node.rhs]
        case ast.AggregateExpr():
            return [node.expr] if node.param is None else [node.param, node.expr]
        case ast.ParenExpr() | ast.UnaryExpr() | ast.SubqueryExpr():
            return [node.expr]
        case ast.MatrixSelector():
            return [node.vector_selector]
    return []


def labels(text: str, known: Mapping[str, Labels]) -> Labels | None:
    """The labels of an expression's series; None for a scalar.

    Args:
        text: the expression.
        known: the labels of every metric that it may name.

    Raises:
        ValueError: a metric or label that does not exist, or two sides that can never match.
    """
    return _labels(ast.parse(text), known)


def _labels(node: Any, known: Mapping[str, Labels]) -> Labels | None:
    match node:
        case ast.VectorSelector():
            return _metric_labels(node, known)
        case ast.AggregateExpr():
            return _aggregated(node, _labels(node.expr, known) or frozenset())
        case ast.BinaryExpr():
            return _joined(node, _labels(node.lhs, known), _labels(node.rhs, known))
        case ast.Call():
            return _called(node, known)
        case ast.NumberLiteral() | ast.StringLiteral():
            return None
    return _labels(_children(node)[0], known)


def _metric_labels(node: Any, known: Mapping[str, Labels]) -> Labels:
    if node.name not in known:
        raise ValueError(f"there is no metric {node.name}")
    for matcher in node.matchers.matchers:
        if matcher.name not in known[node.name]:
            raise ValueError(f"{node.name} has no label {matcher.name}, only {sorted(known[node.name])}")
    return known[node.name]


def _aggregated(node: Any, inner: Labels) -> Labels:
    if node.modifier is None:
        return frozenset()
    named = frozenset(node.modifier.labels)
    if not named <= inner:
        raise ValueError(f"{sorted(named - inner)} are not among {sorted(inner)}")
    return named if node.modifier.type == ast.AggModifierType.By else inner - named


def _joined(node: Any, left: Labels | None, right: Labels | None) -> Labels | None:
    if left is None or right is None:
        return right if left is None else left
    if str(node.op) == "or":  # takes series of either kind
        return left & right
    matching = node.modifier.matching if node.modifier else None
    if matching is None and left != right:
        raise ValueError(f"{sorted(left)} {node.op} {sorted(right)} match nothing")
    if matching is None:
        return left
    raise ValueError("on() and ignoring() between values are not known here")


def _called(node: Any, known: Mapping[str, Labels]) -> Labels | None:
    given = [_labels(argument, known) for argument in node.args]
    if node.func.name == "time":
        return None
    if node.func.name in ("vector", "absent"):
        return frozenset()
    found = next(one for one in given if one is not None)
    if node.func.name != "histogram_quantile":
        return found
    if "le" not in found:
        raise ValueError(f"histogram_quantile() needs le, got {sorted(found)}")
    return found - {"le"}
